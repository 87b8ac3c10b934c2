"""Fast exact kernels for denoising diffusion (DDPM, DDIM, DPM-Solver++ ...), and everything around them.

>>> import dd_kernels as dd
>>> schedule = dd.linear_schedule(1000)
>>> x = dd.sample(model, (64, 3, 32, 32), dd.ddim(schedule, steps=50), seed=0)
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from .backend import BackendUnavailableError, use_backend
from .nn.fuse import fuse, unfuse
from .ops import group_norm_silu, q_sample, randn, reverse_step
from .ops.reverse_step.table import DynamicThreshold, StepTable
from .samplers import (
    ddim,
    ddim_inversion,
    ddpm,
    dpm_solver,
    dynamic_shift,
    euler,
    euler_ancestral,
    flow_euler,
    heun,
    lcm,
    timestep_sequence,
    unipc,
)
from .sampling import (
    Sampler,
    SampleRequest,
    Step,
    ddim_step,
    ddpm_step,
    image_to_image,
    inpaint,
    interpolate,
    posterior_mean,
    sample,
    sample_progressive,
    slerp,
)
from .schedules import (
    Schedule,
    cosine_schedule,
    from_alpha_bars,
    from_betas,
    linear_schedule,
    named_schedule,
    rescale_zero_terminal_snr,
    scaled_linear_schedule,
    sigmoid_alpha_bar_schedule,
    sigmoid_schedule,
    squaredcos_cap_v2_schedule,
)

if TYPE_CHECKING:
    from .compile.accelerate import accelerate, restore
    from .integrations.guided_diffusion import (
        GaussianDiffusion,
        LossType,
        ModelMeanType,
        ModelVarType,
        SpacedDiffusion,
        get_named_beta_schedule,
        space_timesteps,
    )

try:
    __version__ = version("dd_kernels")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"

# Imported at first use: guided-diffusion's names are an integration, and compile imports Dynamo, which takes a second.
_GUIDED_DIFFUSION = (
    "GaussianDiffusion",
    "LossType",
    "ModelMeanType",
    "ModelVarType",
    "SpacedDiffusion",
    "get_named_beta_schedule",
    "space_timesteps",
)


_COMPILE = ("accelerate", "restore")


def __getattr__(name: str) -> object:
    """Imports what is not imported with the package."""
    if name in _COMPILE:
        return getattr(import_module(".compile", __name__), name)
    if name in _GUIDED_DIFFUSION:
        return getattr(import_module(".integrations.guided_diffusion", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "BackendUnavailableError",
    "DynamicThreshold",
    "GaussianDiffusion",
    "LossType",
    "ModelMeanType",
    "ModelVarType",
    "SampleRequest",
    "Sampler",
    "Schedule",
    "SpacedDiffusion",
    "Step",
    "StepTable",
    "accelerate",
    "cosine_schedule",
    "ddim",
    "ddim_inversion",
    "ddim_step",
    "ddpm",
    "ddpm_step",
    "dpm_solver",
    "dynamic_shift",
    "euler",
    "euler_ancestral",
    "flow_euler",
    "from_alpha_bars",
    "from_betas",
    "fuse",
    "get_named_beta_schedule",
    "group_norm_silu",
    "heun",
    "image_to_image",
    "inpaint",
    "interpolate",
    "lcm",
    "linear_schedule",
    "named_schedule",
    "posterior_mean",
    "q_sample",
    "randn",
    "rescale_zero_terminal_snr",
    "restore",
    "reverse_step",
    "sample",
    "sample_progressive",
    "scaled_linear_schedule",
    "sigmoid_alpha_bar_schedule",
    "sigmoid_schedule",
    "slerp",
    "space_timesteps",
    "squaredcos_cap_v2_schedule",
    "timestep_sequence",
    "unfuse",
    "unipc",
    "use_backend",
]
