"""guided-diffusion's module ``gaussian_diffusion``: a process, its sampling, and the losses that train its model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...losses import (
    bound_term,
    discretized_gaussian_log_likelihood,
    mean_flat,
    normal_kl,
    prior_term,
    simple_loss,
)
from ...sampling.guidance import Model
from .beta_schedules import betas_for_alpha_bar, get_beta_schedule, get_named_beta_schedule
from .process import _extract_into_tensor
from .sampling import Sampler
from .types import LossType, ModelMeanType, ModelVarType

# What guided-diffusion's module of this name holds.
__all__ = [
    "GaussianDiffusion",
    "LossType",
    "ModelMeanType",
    "ModelVarType",
    "_extract_into_tensor",
    "betas_for_alpha_bar",
    "discretized_gaussian_log_likelihood",
    "get_beta_schedule",
    "get_named_beta_schedule",
    "mean_flat",
    "normal_kl",
]

logger = logging.getLogger(__name__)


class GaussianDiffusion(Sampler):
    r"""A diffusion process, its sampling and its losses, with the interface of guided-diffusion.

    Args:
        betas: [T] variances of the forward steps, each in (0, 1].
        model_mean_type, model_var_type, loss_type: what the model predicts and is trained for; without them as in
            GLIDE, which predicts epsilon with a learned range of the variance.
        rescale_timesteps: the model is called with t * 1000 / T as float, instead of t.
        input_perturbation: gamma of DDPM-IP (Ning et al., 2023): training_losses makes x_t with
            z + gamma z', z' another normal, while the target stays z.
        input_pertub: the name that DDPM-IP's code gives to ``input_perturbation``; where it is given, 0 included,
            the second normal is drawn and gamma is logged, as there.

    Attributes:
        schedule: the process as a :class:`dd_kernels.Schedule`.
        num_timesteps: T.
        timestep_map: [T], the timestep of the original process that each one is.
        betas, alphas_cumprod, ...: float64 arrays [T], under guided-diffusion's names.

    Methods take x [N, C, ...] and t [N] int64, and return float32 for 16-bit inputs. Those that draw
    noise draw it as guided-diffusion does, from torch's global generator in the same order; with
    ``seed`` (and ``first_sample``) it is drawn inside the kernel instead, so that a sample does not
    depend on its batch (see :func:`dd_kernels.randn`). What does not fit raises ValueError or TypeError.
    """

    def __init__(
        self,
        *,
        betas: Sequence[float] | np.ndarray,
        model_mean_type: ModelMeanType = ModelMeanType.EPSILON,
        model_var_type: ModelVarType = ModelVarType.LEARNED_RANGE,
        loss_type: LossType = LossType.MSE,
        rescale_timesteps: bool = False,
        input_perturbation: float = 0.0,
        input_pertub: float | None = None,
    ) -> None:
        super().__init__(betas, model_mean_type, model_var_type, rescale_timesteps)
        if input_pertub is not None and input_perturbation != 0:
            raise ValueError("only one of input_perturbation and input_pertub may be given; got both")
        self.loss_type = LossType(loss_type)
        self.input_pertub = input_perturbation if input_pertub is None else input_pertub
        # DDPM-IP draws the second normal also where gamma is 0, and logs gamma.
        self._perturbs = input_pertub is not None or input_perturbation != 0
        if self._perturbs:
            logger.info("input perturbation is: %s", self.input_pertub)

    @property
    def input_perturbation(self) -> float:
        """gamma of DDPM-IP, which its code calls ``input_pertub``."""
        return self.input_pertub

    @input_perturbation.setter
    def input_perturbation(self, gamma: float) -> None:
        self.input_pertub = gamma

    def _vb_terms_bpd(
        self,
        model: Model,
        x_start: Tensor,
        x_t: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """Returns a term of the bound in bits per dimension, "output" [N], and "pred_xstart": see bound_term."""
        mean, _, log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
        p = self.p_mean_variance(model, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs)
        term = bound_term(x_start, t, mean, log_variance, p["mean"], p["log_variance"])
        return {"output": term, "pred_xstart": p["pred_xstart"]}

    def training_losses(
        self,
        model: Model,
        x_start: Tensor,
        t: Tensor,
        model_kwargs: Mapping[str, Any] | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Returns the losses [N] of one batch at the timesteps t: "loss", and "mse" and "vb" where it is their sum.

        Args:
            model: model(x_t, t, **model_kwargs) -> output.
            x_start: x_0 [N, C, ...].
            noise: z of x_start's shape; ``torch.randn_like`` draws it if None.
        """
        if noise is None:
            noise = torch.randn_like(x_start)
        perturbed = noise
        if self._perturbs or self.input_pertub != 0:
            perturbed = noise + self.input_pertub * torch.randn_like(noise)
        x_t = self.q_sample(x_start, t, noise=perturbed)
        if not self.loss_type.is_vb():
            return self._mse_terms(model, x_start, x_t, t, noise, model_kwargs)
        bound = self._vb_terms_bpd(model, x_start, x_t, t, clip_denoised=False, model_kwargs=model_kwargs)["output"]
        return {"loss": bound * (self.num_timesteps if self.loss_type == LossType.RESCALED_KL else 1)}

    def _mse_terms(
        self,
        model: Model,
        x_start: Tensor,
        x_t: Tensor,
        t: Tensor,
        noise: Tensor,
        model_kwargs: Mapping[str, Any] | None,
    ) -> dict[str, Tensor]:
        """Returns L_simple, plus the bound where the variance is learned (L_hybrid, Nichol & Dhariwal, 2021)."""
        out, _ = self._predict(model, x_t, t, model_kwargs)
        terms = {}
        if self._learned:
            out, values = out.chunk(2, dim=1)
            # The bound trains the variance alone: the mean is frozen in it.
            frozen = torch.cat((out.detach(), values), dim=1)
            terms["vb"] = self._vb_terms_bpd(lambda *_: frozen, x_start, x_t, t, clip_denoised=False)["output"]
            if self.loss_type == LossType.RESCALED_MSE:
                terms["vb"] = terms["vb"] * (self.num_timesteps / 1000.0)
        target = {ModelMeanType.START_X: x_start, ModelMeanType.EPSILON: noise}.get(self.model_mean_type)
        if target is None:
            target = self.q_posterior_mean_variance(x_start, x_t, t)[0]
        terms["mse"] = simple_loss(out, target)
        return {**terms, "loss": terms["mse"] + terms.get("vb", 0.0)}

    def _prior_bpd(self, x_start: Tensor) -> Tensor:
        """Returns KL(q(x_T | x_0) || N(0, I)), [N], in bits per dimension: the term that no training changes."""
        t = torch.full((x_start.shape[0],), self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        return prior_term(mean, log_variance)

    def calc_bpd_loop(
        self,
        model: Model,
        x_start: Tensor,
        clip_denoised: bool = True,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """Computes the whole variational bound of x_0 in bits per dimension.

        Returns:
            "total_bpd" and "prior_bpd" [N]; "vb", "xstart_mse" and "mse" (of epsilon) [N, T], noisiest step first.
        """
        columns: dict[str, list[Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
        for i in range(self.num_timesteps - 1, -1, -1):
            t = torch.full((x_start.shape[0],), i, device=x_start.device)
            noise = torch.randn_like(x_start)
            x_t = self.q_sample(x_start, t, noise=noise)
            with torch.no_grad():
                bound = self._vb_terms_bpd(model, x_start, x_t, t, clip_denoised, model_kwargs)
            eps = self._predict_eps_from_xstart(x_t, t, bound["pred_xstart"])
            columns["vb"].append(bound["output"])
            columns["xstart_mse"].append(simple_loss(bound["pred_xstart"], x_start))
            columns["mse"].append(simple_loss(eps, noise))
        terms = {name: torch.stack(values, dim=1) for name, values in columns.items()}
        prior = self._prior_bpd(x_start)
        return {"total_bpd": terms["vb"].sum(dim=1) + prior, "prior_bpd": prior, **terms}
