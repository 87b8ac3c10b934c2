"""One diffusion process: its arrays, its step tables, q, and the p(x_{t-1} | x_t) of a model's output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...losses import learned_log_variance
from ...ops.q_sample import q_sample
from ...ops.reverse_step import reverse_step
from ...ops.reverse_step.table import StepTable, from_columns
from ...ops.upload import real
from ...samplers import rows
from ...sampling.guidance import Model, model_output
from ...schedules import Schedule, check_timesteps
from .types import ModelMeanType, ModelVarType


def wide(x: Tensor) -> Tensor:
    """Returns ``x`` in at least float32: results are float32 for 16-bit inputs, as in guided-diffusion."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _extract_into_tensor(arr: np.ndarray | Tensor, timesteps: Tensor, broadcast_shape: Sequence[int]) -> Tensor:
    """Returns arr[timesteps] in float32, [N, 1, ...] expanded to ``broadcast_shape``, on the timesteps' device."""
    picked = torch.as_tensor(np.array(arr) if isinstance(arr, np.ndarray) else arr).to(timesteps.device)[timesteps]
    return picked.float().reshape(-1, *[1] * (len(broadcast_shape) - 1)).expand(tuple(broadcast_shape))


class Process:
    """The part of :class:`GaussianDiffusion` that needs neither noise nor a loss."""

    def __init__(
        self,
        betas: Sequence[float] | np.ndarray,
        model_mean_type: ModelMeanType,
        model_var_type: ModelVarType,
        rescale_timesteps: bool,
    ) -> None:
        self.model_mean_type = ModelMeanType(model_mean_type)
        self.model_var_type = ModelVarType(model_var_type)
        self.rescale_timesteps = rescale_timesteps
        self.schedule = Schedule(betas)
        self.num_timesteps = len(self.schedule)
        self.timestep_map = list(range(self.num_timesteps))
        self._name_arrays()
        self._tables: dict[tuple, StepTable] = {}
        self._uploads: dict[tuple, Tensor] = {}

    def _name_arrays(self) -> None:
        """Copies the schedule to arrays under guided-diffusion's names, and the model's variance where it is fixed."""
        s = self.schedule
        with np.errstate(divide="ignore"):  # 1 / 0 at a step of zero SNR
            recip, recipm1 = np.sqrt(1.0 / s.alpha_bar), np.sqrt(1.0 / s.alpha_bar - 1)
        self.betas, self.log_betas = s.beta.copy(), np.log(s.beta)
        self.alphas_cumprod, self.alphas_cumprod_prev = s.alpha_bar.copy(), s.alpha_bar_prev.copy()
        self.alphas_cumprod_next = np.append(s.alpha_bar[1:], 0.0)
        self.one_minus_alphas_cumprod = 1.0 - s.alpha_bar
        self.sqrt_alphas_cumprod = np.sqrt(s.alpha_bar)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(self.one_minus_alphas_cumprod)
        self.log_one_minus_alphas_cumprod = np.log(self.one_minus_alphas_cumprod)
        self.sqrt_recip_alphas_cumprod, self.sqrt_recipm1_alphas_cumprod = recip, recipm1
        self.posterior_mean_coef1 = s.posterior_mean_coef_x_start.copy()
        self.posterior_mean_coef2 = s.posterior_mean_coef_x_t.copy()
        self.posterior_variance = self.fixed_variance = s.posterior_variance.copy()
        self.posterior_log_variance_clipped = self.fixed_log_variance = s.posterior_log_variance_clipped.copy()
        if self.model_var_type == ModelVarType.FIXED_LARGE:
            # At t = 0 the variance is the small one, with which the decoder has a better likelihood.
            self.fixed_log_variance = np.append(s.posterior_log_variance_clipped[:1], self.log_betas[1:])
            self.fixed_variance = np.exp(self.fixed_log_variance)

    @property
    def _learned(self) -> bool:
        """Returns whether the second half of the model's output is the variance."""
        return self.model_var_type in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)

    def _at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """Returns the array ``name`` at the timesteps t [N], expanded to ``like``'s shape; one upload per device."""
        check_timesteps("t", t, self.num_timesteps, like.shape[0])
        key = (name, like.device, torch.promote_types(like.dtype, torch.float32))
        if key not in self._uploads:
            self._uploads[key] = real(lambda: torch.from_numpy(np.array(getattr(self, name))).to(*key[1:]))
        return self._uploads[key][t].reshape(-1, *[1] * (like.ndim - 1)).expand(like.shape)

    def _wrap_model(self, model: Model) -> Model:
        """Returns the model as it is called; SpacedDiffusion's is called with the original process's timesteps."""
        return model

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        return t.float() * (1000.0 / self.num_timesteps) if self.rescale_timesteps else t

    def _call(self, function: Model, x: Tensor, t: Tensor, model_kwargs: Mapping[str, Any] | None) -> Any:
        return self._wrap_model(function)(x, self._scale_timesteps(t), **(model_kwargs or {}))

    def _predict(
        self, model: Model, x: Tensor, t: Tensor, model_kwargs: Mapping[str, Any] | None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Calls the model.

        Returns:
            Its output, [N, C, ...], or [N, 2 C, ...] where the variance is learned, and {"extra": extra} where it
            returned (output, extra), as GLIDE's and DiT's do.
        """
        if t.shape != x.shape[:1]:
            raise ValueError(f"t must have the shape [{x.shape[0]}], one per sample; got {list(t.shape)}")
        result = self._call(model, x, t, model_kwargs)
        out = model_output(result)
        wanted = [x.shape[0], x.shape[1] * (2 if self._learned else 1), *x.shape[2:]]
        if list(out.shape) != wanted:
            raise ValueError(f"model must return {wanted} ({self.model_var_type.name}); got {list(out.shape)}")
        return out, {"extra": result[1]} if isinstance(result, tuple) and len(result) == 2 else {}

    def _table(self, kind: str, clip: bool = False, eta: float = 0.0) -> StepTable:
        """Returns the table whose row t is timestep t; ``kind`` says what is given and what comes out:

        "mean", "sample", "ddim", "ddim_reverse": the model's output; the mean of p(x_{t-1} | x_t), a sample
            of it, DDIM's x_{t-1} and x_{t+1}
        "posterior", "ddim_of_x0", "ddim_reverse_of_x0": the same of a given x_0
        "sample_of_mean": a sample, of a given mean and log-variance [N, 2 C, ...]
        """
        key = (kind, clip, eta)
        if key not in self._tables:
            columns = self._columns(kind, eta) | ({"x0_clip": 1.0} if clip else {})
            self._tables[key] = from_columns(np.array(self.timestep_map), **columns)
        return self._tables[key]

    def _columns(self, kind: str, eta: float) -> rows.Columns:
        step = rows.Transition.of(self.schedule)
        draws = np.arange(self.num_timesteps) > 0
        if kind == "sample_of_mean":
            variance = rows.variance_columns("learned", step.beta, step.beta, draws)
            return {"prev_from_out": 1.0, "learned_variance": True, **variance}
        of_x0 = kind == "posterior" or kind.endswith("_of_x0")
        x0 = self._x0_columns(step, of_x0)
        if kind.startswith("ddim"):
            reverse = kind.startswith("ddim_reverse")
            after = self.alphas_cumprod_next if reverse else step.alpha_bar_prev
            sigma = 0.0 if reverse else rows.ddim_sigma(step.alpha_bar, after, eta)
            to = rows.ddim_columns(after, rows.epsilon_of_x0(step.alpha_bar), sigma)
            return {**x0, **to, "learned_variance": self._learned and not of_x0}
        to = rows.posterior_columns(step)
        if self.model_mean_type == ModelMeanType.PREVIOUS_X and not of_x0:
            to = {"prev_from_out": 1.0}
        if kind != "sample":
            return x0 | to
        variances = self.schedule.posterior_variance_clipped
        variance = rows.variance_columns(self.model_var_type.name.lower(), variances, step.beta, draws)
        return {**x0, **to, **variance, "learned_variance": self._learned}

    def _x0_columns(self, step: rows.Transition, of_x0: bool) -> rows.Columns:
        """x_0 of the model's output, or x_0 itself ``of_x0``."""
        if self.model_mean_type == ModelMeanType.PREVIOUS_X and not of_x0:
            return rows.x0_of_mean(step)
        epsilon = self.model_mean_type == ModelMeanType.EPSILON and not of_x0
        return rows.x0_columns("epsilon" if epsilon else "x_start", step.alpha_bar)

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns mean, variance and log-variance of q(x_t | x_0), eq. 4 of DDPM (Ho et al., 2020)."""
        mean = self._at("sqrt_alphas_cumprod", t, x_start) * x_start
        variance = self._at("one_minus_alphas_cumprod", t, x_start)
        return mean, variance, self._at("log_one_minus_alphas_cumprod", t, x_start)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Returns a sample of q(x_t | x_0), see :func:`dd_kernels.q_sample`; torch.randn_like gives noise if None."""
        noise = torch.randn_like(x_start) if noise is None else noise
        return q_sample(wide(x_start), t, self.schedule, noise)

    def q_posterior_mean_variance(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_0), eq. 6 and 7 of DDPM."""
        mean = reverse_step(wide(x_t), x_start, self._table("posterior"), t)
        variance = self._at("posterior_variance", t, x_t)
        return mean, variance, self._at("posterior_log_variance_clipped", t, x_t)

    def p_mean_variance(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """Returns what the model says about x_{t-1}: "mean", "variance", "log_variance", "pred_xstart", of x's shape.

        Args:
            model: model(x, t, **model_kwargs) -> output, [N, C, ...], or [N, 2 C, ...] with learned variance; a
                model that returns (output, extra) adds "extra".
            x, t: x_t [N, C, ...] and timesteps [N].
            clip_denoised: clip x_0 to [-1, 1].
            denoised_fn: applied to x_0 before it is clipped.
        """
        out, extra = self._predict(model, x, t, model_kwargs)
        values = None
        if self._learned:
            out, values = out.chunk(2, dim=1)
        variance, log_variance = self._variance(values, x, t)
        if denoised_fn is None:
            mean, x0 = reverse_step(wide(x), out, self._table("mean", clip_denoised), t, return_x0=True)
        else:
            x0 = denoised_fn(self._x0(out, x, t))
            x0 = x0.clamp(-1, 1) if clip_denoised else x0
            previous = self.model_mean_type == ModelMeanType.PREVIOUS_X
            mean = out if previous else self.q_posterior_mean_variance(x0, x, t)[0]
        return {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": x0, **extra}

    def _variance(self, values: Tensor | None, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (variance, log-variance) of p; ``values`` are the model's second half, None where it is fixed."""
        if values is None:
            return self._at("fixed_variance", t, x), self._at("fixed_log_variance", t, x)
        log_variance = values
        if self.model_var_type == ModelVarType.LEARNED_RANGE:
            low, high = self._at("posterior_log_variance_clipped", t, x), self._at("log_betas", t, x)
            log_variance = learned_log_variance(values, low, high)
        return torch.exp(log_variance), log_variance

    def _x0(self, out: Tensor, x: Tensor, t: Tensor) -> Tensor:
        if self.model_mean_type == ModelMeanType.PREVIOUS_X:
            return self._predict_xstart_from_xprev(x, t, out)
        return self._predict_xstart_from_eps(x, t, out) if self.model_mean_type == ModelMeanType.EPSILON else out

    def _predict_xstart_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        scale = self._at("sqrt_recip_alphas_cumprod", t, x_t)
        return scale * x_t - self._at("sqrt_recipm1_alphas_cumprod", t, x_t) * eps

    def _predict_xstart_from_xprev(self, x_t: Tensor, t: Tensor, xprev: Tensor) -> Tensor:
        mean_of_x_t = self._at("posterior_mean_coef2", t, x_t) * x_t
        return (xprev - mean_of_x_t) / self._at("posterior_mean_coef1", t, x_t)

    def _predict_eps_from_xstart(self, x_t: Tensor, t: Tensor, pred_xstart: Tensor) -> Tensor:
        scale = self._at("sqrt_recip_alphas_cumprod", t, x_t)
        return (scale * x_t - pred_xstart) / self._at("sqrt_recipm1_alphas_cumprod", t, x_t)

    def condition_mean(
        self,
        cond_fn: Model,
        p_mean_var: Mapping[str, Tensor],
        x: Tensor,
        t: Tensor,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Returns the mean shifted by variance * cond_fn(x, t), that is the gradient of log p(y | x).

        It is the guidance of Sohl-Dickstein et al. (2015).
        """
        gradient = self._call(cond_fn, x, t, model_kwargs)
        return wide(p_mean_var["mean"]) + p_mean_var["variance"] * wide(gradient)

    def condition_score(
        self,
        cond_fn: Model,
        p_mean_var: Mapping[str, Tensor],
        x: Tensor,
        t: Tensor,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """Returns ``p_mean_var`` with cond_fn(x, t) added to the score: algorithm 2 of Dhariwal & Nichol (2021)."""
        eps = self._predict_eps_from_xstart(x, t, p_mean_var["pred_xstart"])
        eps = eps - self._at("sqrt_one_minus_alphas_cumprod", t, x) * self._call(cond_fn, x, t, model_kwargs)
        x0 = self._predict_xstart_from_eps(x, t, eps)
        return {**p_mean_var, "pred_xstart": x0, "mean": self.q_posterior_mean_variance(x0, x, t)[0]}
