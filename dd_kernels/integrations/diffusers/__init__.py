"""diffusers' schedulers with their arithmetic in the ops: one pass per step, and no wait for the device.

>>> from dd_kernels.integrations.diffusers import DDIMScheduler
>>> pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)

Each class is a subclass of diffusers' of the same name: the same configuration, options, files and
noise for the same generator; the same images to rounding. What differs:

- ``step`` reads its coefficients on the device, with a tensor timestep too. Nothing is synchronised, so
  it can be captured in a CUDA graph and by ``torch.compile(fullgraph=True)``.
- A tensor timestep may hold one timestep per sample.
- 16-bit samples are rounded once per step instead of after every operation.
- Where theirs divides by 0 or takes the root of a negative number, the finite value that is meant.
- ``noise="philox"`` (in the constructor or ``from_config``) draws the steps' noise inside the kernel from
  the generator's seed and the timestep: image n of a seed is the same in any batch.
"""

# Pipelines that are reloaded look for the name SchedulerMixin in the module of the scheduler's class.
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .ddim import DDIMInverseScheduler, DDIMScheduler
from .ddpm import DDPMScheduler
from .unclip import UnCLIPScheduler
from .unet import from_diffusers, to_diffusers

__all__ = [
    "DDIMInverseScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "SchedulerMixin",
    "UnCLIPScheduler",
    "from_diffusers",
    "to_diffusers",
]

# A saved pipeline names the module of its scheduler's class: this one, wherever the class is written.
for _scheduler in (DDIMInverseScheduler, DDIMScheduler, DDPMScheduler, UnCLIPScheduler):
    _scheduler.__module__ = __name__
