"""diffusers' schedulers with their arithmetic in the ops: one pass per step, and no wait for the device.

>>> from dd_kernels.integrations.diffusers import DDIMScheduler
>>> pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)

Each class is a subclass of diffusers' of the same name: the same configuration, options, files and noise for the same
generator; the same images to rounding. Where versions of diffusers differ, ours follows the one that is installed.

- ``step`` reads its coefficients on the device, with a tensor timestep too. Nothing is synchronised, so it can be
  captured in a CUDA graph and by ``torch.compile(fullgraph=True)``.
- A step is one launch where diffusers' is 2 to 25. torch's noise is one more, and so are Euler's scaling of the input,
  its churn, and x_0 of a clipped LCM; a threshold sorts. In an accelerated pipeline on CUDA the step stands beside the
  network's graph, not in it: the pipeline's Python runs between them, and a graph of one launch would need its inputs
  copied.
- A generator on the CPU draws there, as in diffusers, and each step uploads its noise; one on the GPU, or philox, does
  not.
- Euler's ``scale_model_input`` is a pass of its own, as diffusers': pipelines hand x itself to the next step.
- What no row fits runs diffusers' own step: flow matching with ``per_token_timesteps``, and a threshold in "dpmsolver"
  and "sde-dpmsolver", which combine epsilon. Euler's ``s_churn`` is a pass before the step.
- ``noise="philox"`` (in the constructor or ``from_config``) draws the steps' noise inside the kernel from the
  generator's seed and the timestep: image n of a seed is the same in any batch.

What differs on purpose, found by random calls on both:

====================================================  ===========================  ================================
call                                                  theirs                       ours
====================================================  ===========================  ================================
16-bit samples                                        rounded by every operation   rounded once per step
``add_noise`` in bfloat16 at the first timesteps      adds nothing                 adds the noise
x_0 (``pred_original_sample``) of mixed dtypes        the output's dtype or shape  those of the previous sample
a timestep tensor [1] with 16-bit samples             float32 comes back           16 bits, as with a tensor []
a timestep per sample, or a list                      an error                     each sample's own step
``variance_type="fixed_large_log"``                   NaN; 0 at zero SNR           beta, as the name says
eta > 1, an ``alphas_cumprod`` that rises, rounding   NaN                          a negative square counts as 0
zero SNR with ``thresholding``                        NaN (a quantile of inf)      the sign of x_0 times its maximum
DDIMInverse, "sample", at alpha_bar = 1               divides by 0                 epsilon at the next noise level
a negative timestep                                   counts from the end          an error
``set_timesteps(0)``, or below                        no timesteps, or an error    an error
a timestep that the list has not, on the device       an error                     NaN: the device is not asked
``pred_original_sample`` of Euler with 16 bits        float32                      the samples' dtype
EulerAncestral with "sample", LCM at a float          an error                     as the others
"sde-dpmsolver" of third order                        an error                     as its second order goes on
LCM after the last step                               goes on at the last          an error, as the others
``step_index`` of a first timestep on the device      an int: the device is asked  a tensor [1]
``model_outputs`` of DPM-Solver                       the converted outputs        None: kept where the step reads
====================================================  ===========================  ================================

An error that both raise is of their type too, but for calls with several mistakes.
"""

# Pipelines that are reloaded look for the name SchedulerMixin in the module of the scheduler's class.
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .ddim import DDIMInverseScheduler, DDIMScheduler
from .ddpm import DDPMScheduler
from .dpm_solver import DPMSolverMultistepScheduler
from .euler import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from .flow import FlowMatchEulerDiscreteScheduler
from .lcm import LCMScheduler
from .unclip import UnCLIPScheduler
from .unet import from_diffusers, to_diffusers

__all__ = [
    "DDIMInverseScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "LCMScheduler",
    "SchedulerMixin",
    "UnCLIPScheduler",
    "from_diffusers",
    "to_diffusers",
]

# A saved pipeline names the module of its scheduler's class: this one, wherever the class is written.
SCHEDULERS = (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    UnCLIPScheduler,
)
for _scheduler in SCHEDULERS:
    _scheduler.__module__ = __name__
