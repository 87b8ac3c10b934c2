"""The interface of guided-diffusion (and improved-diffusion's and DDPM-IP's) over the ops.

Code written against ``guided_diffusion.gaussian_diffusion`` and ``respace`` runs by changing the
import. The same ``torch.manual_seed`` gives the same noise, and so the same numbers to rounding.
"""

from .gaussian_diffusion import GaussianDiffusion
from .losses import approx_standard_normal_cdf, discretized_gaussian_log_likelihood, mean_flat, normal_kl
from .respace import SpacedDiffusion, space_timesteps
from .types import LossType, ModelMeanType, ModelVarType, betas_for_alpha_bar, get_named_beta_schedule
from .weights import load_guided_diffusion, to_guided_diffusion

__all__ = [
    "GaussianDiffusion",
    "LossType",
    "ModelMeanType",
    "ModelVarType",
    "SpacedDiffusion",
    "approx_standard_normal_cdf",
    "betas_for_alpha_bar",
    "discretized_gaussian_log_likelihood",
    "get_named_beta_schedule",
    "load_guided_diffusion",
    "mean_flat",
    "normal_kl",
    "space_timesteps",
    "to_guided_diffusion",
]
