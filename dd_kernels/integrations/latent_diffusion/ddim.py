"""latent-diffusion's and stable-diffusion's ``DDIMSampler`` over the ops: change the import, keep the calls.

>>> from dd_kernels.integrations.latent_diffusion import DDIMSampler
>>> samples, intermediates = DDIMSampler(model).sample(S=50, batch_size=4, shape=(4, 64, 64), conditioning=c)

The model is theirs: ``num_timesteps``, ``betas``, ``alphas_cumprod``, ``alphas_cumprod_prev``,
``apply_model(x, t, c)``, and ``q_sample``, ``first_stage_model``, ``parameterization`` where they are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from ...ops.q_sample import q_sample
from ...ops.reverse_step import reverse_step
from ...ops.reverse_step.table import StepTable, from_columns
from ...samplers import rows
from ...schedules import from_alpha_bars

Conditioning = Any


def _joined(uncond: Conditioning, cond: Conditioning) -> Conditioning:
    """Both conditionings, a tensor or a dict or list of them, as one of twice the batch."""
    if isinstance(cond, dict):
        return {key: _joined(uncond[key], cond[key]) for key in cond}
    if isinstance(cond, list):
        return [_joined(a, b) for a, b in zip(uncond, cond, strict=True)]
    return torch.cat((uncond, cond))


class DDIMSampler:
    """DDIM (Song et al., 2021) as latent-diffusion samples with it: x_0 is not clipped, timesteps are one later.

    Noise comes from torch's global generator in the same order, also where eta is 0: the same seed
    gives the same samples to rounding.
    """

    def __init__(self, model: Any, schedule: str = "linear", **_: Any) -> None:
        self.model = model
        self.ddpm_num_timesteps = model.num_timesteps
        self.schedule = schedule
        self.parameterization = getattr(model, "parameterization", "eps")
        if self.parameterization not in ("eps", "v"):
            raise ValueError(f"model.parameterization must be 'eps' or 'v'; got {self.parameterization!r}")

    def make_schedule(
        self, ddim_num_steps: int, ddim_discretize: str = "uniform", ddim_eta: float = 0.0, verbose: bool = True
    ) -> None:
        """Chooses the timesteps: ``uniform``, every (T // S)-th (can be more than S of them), or ``quad``."""
        steps, count = self.ddpm_num_timesteps, ddim_num_steps
        if not 1 <= count <= steps:
            raise ValueError(f"ddim_num_steps must be in [1, {steps}]; got {count}")
        if ddim_discretize not in ("uniform", "quad"):
            raise ValueError(f"ddim_discretize must be 'uniform' or 'quad'; got {ddim_discretize!r}")
        uniform = ddim_discretize == "uniform"
        chosen = np.arange(0, steps, steps // count) if uniform else np.linspace(0, np.sqrt(0.8 * steps), count) ** 2
        self.ddim_timesteps = chosen.astype(int) + 1
        if self.ddim_timesteps[-1] >= steps:
            raise ValueError(f"ddim_num_steps must leave the last timestep below {steps}; got {count}")
        alpha_bar = self.model.alphas_cumprod.double().cpu().numpy()
        self._alpha_bars = {
            False: (alpha_bar[self.ddim_timesteps], np.append(alpha_bar[0], alpha_bar[self.ddim_timesteps[:-1]])),
            True: (alpha_bar, self.model.alphas_cumprod_prev.double().cpu().numpy()),
        }
        self.ddim_eta = ddim_eta
        self.ddim_alphas, self.ddim_alphas_prev = self._alpha_bars[False]
        self._tables: dict[tuple, StepTable] = {}
        self._schedules: dict[bool, Any] = {}
        if verbose:
            print(f"Selected timesteps for ddim sampler: {self.ddim_timesteps}")

    def _table(self, kind: str, original: bool, temperature: float = 1.0) -> StepTable:
        """ "sample" and "encode" start from the model's output, "of_x0" from epsilon in the place of x, and x_0."""
        key = (kind, original, temperature)
        if key not in self._tables:
            columns = getattr(self, f"_{kind}_columns")(*self._alpha_bars[original], temperature)
            self._tables[key] = from_columns(np.arange(len(self._alpha_bars[original][0])), **columns)
        return self._tables[key]

    def _of_x0_columns(self, alpha_bar: np.ndarray, before: np.ndarray, temperature: float) -> rows.Columns:
        """Eq. 12 of DDIM, epsilon and x_0 being given."""
        return {"x0_num_out": 1.0, **self._to(alpha_bar, before, temperature, rows.Epsilon(0.0, 1.0, 0.0))}

    def _sample_columns(self, alpha_bar: np.ndarray, before: np.ndarray, temperature: float) -> rows.Columns:
        """Eq. 12 of DDIM, epsilon and x_0 being those of x_t and the model's output."""
        prediction = {"eps": "epsilon", "v": "v"}[self.parameterization]
        epsilon = rows.epsilon_of_output(prediction, alpha_bar)
        return rows.x0_columns(prediction, alpha_bar) | self._to(alpha_bar, before, temperature, epsilon)

    def _to(self, alpha_bar: np.ndarray, before: np.ndarray, temperature: float, epsilon: rows.Epsilon) -> rows.Columns:
        columns = rows.ddim_columns(before, epsilon, rows.ddim_sigma(alpha_bar, before, self.ddim_eta))
        return columns | {"sigma": columns["sigma"] * temperature}

    def _encode_columns(self, alpha_bar: np.ndarray, before: np.ndarray, _: float) -> rows.Columns:
        """DDIM's ODE in the direction of noise."""
        return rows.ode_columns(before, alpha_bar)

    def _predict(
        self, x: Tensor, t: Tensor, c: Conditioning, scale: float, uncond: Conditioning
    ) -> tuple[Tensor, Tensor | None]:
        if uncond is None or scale == 1.0:
            return self.model.apply_model(x, t, c), None
        both = self.model.apply_model(torch.cat((x, x)), torch.cat((t, t)), _joined(uncond, c))
        uncond_out, out = both.chunk(2)
        return out, uncond_out

    @torch.no_grad()
    def p_sample_ddim(
        self,
        x: Tensor,
        c: Conditioning,
        t: Tensor,
        index: int,
        repeat_noise: bool = False,
        use_original_steps: bool = False,
        quantize_denoised: bool = False,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: dict[str, Any] | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Conditioning = None,
    ) -> tuple[Tensor, Tensor]:
        """(x_prev, x_0) from x_t at row ``index`` of the schedule, whose timestep is t [N]."""
        scale = unconditional_guidance_scale
        out, uncond = self._predict(x, t, c, scale, unconditional_conditioning)
        if uncond is not None and (score_corrector is not None or quantize_denoised):
            out, uncond = uncond + scale * (out - uncond), None
        if score_corrector is not None:
            if self.parameterization != "eps":
                raise ValueError("score_corrector must be None for a model that predicts v")
            out = score_corrector.modify_score(self.model, out, x, t, c, **(corrector_kwargs or {}))
        # Theirs draws at every step, also where sigma is 0: whoever samples next must find the same state.
        noise = torch.randn((1 if repeat_noise else x.shape[0], *x.shape[1:]), device=x.device).expand(x.shape)
        if noise_dropout > 0:
            noise = F.dropout(noise, p=noise_dropout)
        table = self._table("sample", use_original_steps, temperature)
        given = noise if table.stochastic else None
        x_prev, x0 = reverse_step(
            x, out, table, index, uncond=uncond, guidance_scale=scale, noise=given, return_x0=True
        )
        if not quantize_denoised:
            return x_prev, x0
        x0 = self.model.first_stage_model.quantize(x0)[0]
        epsilon = self.model.predict_eps_from_z_and_v(x, t, out) if self.parameterization == "v" else out
        table = self._table("of_x0", use_original_steps, temperature)
        return reverse_step(epsilon, x0, table, index, noise=given), x0

    @torch.no_grad()
    def sample(
        self,
        S: int,
        batch_size: int,
        shape: Sequence[int],
        conditioning: Conditioning = None,
        callback: Callable[[int], None] | None = None,
        img_callback: Callable[[Tensor, int], None] | None = None,
        quantize_x0: bool = False,
        eta: float = 0.0,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: dict[str, Any] | None = None,
        verbose: bool = True,
        x_T: Tensor | None = None,
        log_every_t: int = 100,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Conditioning = None,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Samples [batch_size, *shape], and what lies between: {"x_inter": [...], "pred_x0": [...]}.

        Args:
            S: number of timesteps, see :meth:`make_schedule`.
            conditioning, unconditional_conditioning: tensors, or dicts or lists of them; classifier-free
                guidance with ``unconditional_guidance_scale`` where it is not 1.
            mask, x0: where the mask is 1, x is kept at x0 (diffused by ``model.q_sample``).
            temperature, noise_dropout: factor and dropout of the steps' noise.
            score_corrector: its ``modify_score`` changes epsilon.
            quantize_x0: pass x_0 through ``model.first_stage_model.quantize``.
            x_T: where to start; drawn if None.
            callback, img_callback: called with the step, and with (x_0, step), after every step.
            log_every_t: how often a state is kept.
        """
        if mask is not None and x0 is None:
            raise ValueError("x0 must be given with mask; got None")
        self.make_schedule(S, ddim_eta=eta, verbose=verbose)
        device = self.model.betas.device
        x = torch.randn((batch_size, *shape), device=device) if x_T is None else x_T
        intermediates = {"x_inter": [x], "pred_x0": [x]}
        total = len(self.ddim_timesteps)
        for i in tqdm(range(total), desc="DDIM Sampler", disable=not verbose):
            index = total - i - 1
            t = torch.full((batch_size,), int(self.ddim_timesteps[index]), device=device)
            if mask is not None:
                x = self.model.q_sample(x0, t) * mask + (1.0 - mask) * x
            x, pred_x0 = self.p_sample_ddim(
                x,
                conditioning,
                t,
                index,
                quantize_denoised=quantize_x0,
                temperature=temperature,
                noise_dropout=noise_dropout,
                score_corrector=score_corrector,
                corrector_kwargs=corrector_kwargs,
                unconditional_guidance_scale=unconditional_guidance_scale,
                unconditional_conditioning=unconditional_conditioning,
            )
            if callback is not None:
                callback(i)
            if img_callback is not None:
                img_callback(pred_x0, i)
            if index % log_every_t == 0 or index == total - 1:
                intermediates["x_inter"].append(x)
                intermediates["pred_x0"].append(pred_x0)
        return x, intermediates

    @torch.no_grad()
    def stochastic_encode(
        self, x0: Tensor, t: Tensor, use_original_steps: bool = False, noise: Tensor | None = None
    ) -> Tensor:
        """x_0 diffused to the schedule's step t [N], in one draw, eq. 4 of DDPM (Ho et al., 2020)."""
        if use_original_steps not in self._schedules:
            self._schedules[use_original_steps] = from_alpha_bars(self._alpha_bars[use_original_steps][0])
        return q_sample(x0, t, self._schedules[use_original_steps], torch.randn_like(x0) if noise is None else noise)

    @torch.no_grad()
    def decode(
        self,
        x_latent: Tensor,
        cond: Conditioning,
        t_start: int,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Conditioning = None,
        use_original_steps: bool = False,
        callback: Callable[[int], None] | None = None,
    ) -> Tensor:
        """x_0 from the latent at the schedule's step ``t_start``: the last ``t_start`` steps of :meth:`sample`."""
        timesteps = (np.arange(self.ddpm_num_timesteps) if use_original_steps else self.ddim_timesteps)[:t_start]
        for i, index in enumerate(reversed(range(len(timesteps)))):
            t = torch.full((x_latent.shape[0],), int(timesteps[index]), device=x_latent.device)
            x_latent, _ = self.p_sample_ddim(
                x_latent,
                cond,
                t,
                index,
                use_original_steps=use_original_steps,
                unconditional_guidance_scale=unconditional_guidance_scale,
                unconditional_conditioning=unconditional_conditioning,
            )
            if callback is not None:
                callback(i)
        return x_latent

    @torch.no_grad()
    def encode(
        self,
        x0: Tensor,
        c: Conditioning,
        t_enc: int,
        use_original_steps: bool = False,
        return_intermediates: int | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Conditioning = None,
        callback: Callable[[int], None] | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """The latent at the schedule's step ``t_enc`` that :meth:`decode` (eta = 0) takes back to about x_0.

        The model is asked at the schedule's timesteps (some versions of theirs: at the steps' numbers).

        Returns:
            It, and {"x_encoded": it, "intermediate_steps": [...]} with "intermediates" where
            ``return_intermediates``, about how many, is given.
        """
        if self.parameterization != "eps":
            raise ValueError("encode needs a model that predicts epsilon; got parameterization='v'")
        timesteps = np.arange(self.ddpm_num_timesteps) if use_original_steps else self.ddim_timesteps
        if not 0 <= t_enc <= len(timesteps):
            raise ValueError(f"t_enc must be in [0, {len(timesteps)}]; got {t_enc}")
        x, kept = x0, {}
        table, scale = self._table("encode", use_original_steps), unconditional_guidance_scale
        for i in range(t_enc):
            t = torch.full((x.shape[0],), int(timesteps[i]), device=x.device)
            out, uncond = self._predict(x, t, c, scale, unconditional_conditioning)
            x = reverse_step(x, out, table, i, uncond=uncond, guidance_scale=scale)
            if return_intermediates and (i % max(t_enc // return_intermediates, 1) == 0 or i >= t_enc - 2):
                kept[i] = x
            if callback is not None:
                callback(i)
        result: dict[str, Any] = {"x_encoded": x, "intermediate_steps": list(kept)}
        return x, {**result, "intermediates": list(kept.values())} if return_intermediates else result
