"""The interface of guided-diffusion (and improved-diffusion's and DDPM-IP's) over the ops.

Code written against the modules ``gaussian_diffusion``, ``respace`` and ``losses`` of guided-diffusion, of
improved-diffusion, DDPM-IP, GLIDE or DiT runs with the package's name in the import changed, ``from . import
gaussian_diffusion as gd`` included. The same ``torch.manual_seed`` gives the same noise, and so the same numbers to
rounding. Members of their enumerations are taken for ours.
"""

from . import nn
from .beta_schedules import betas_for_alpha_bar, get_beta_schedule, get_named_beta_schedule
from .gaussian_diffusion import GaussianDiffusion
from .losses import approx_standard_normal_cdf, discretized_gaussian_log_likelihood, mean_flat, normal_kl
from .respace import SpacedDiffusion, space_timesteps
from .types import LossType, ModelMeanType, ModelVarType
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
    "get_beta_schedule",
    "get_named_beta_schedule",
    "load_guided_diffusion",
    "mean_flat",
    "nn",
    "normal_kl",
    "space_timesteps",
    "to_guided_diffusion",
]
