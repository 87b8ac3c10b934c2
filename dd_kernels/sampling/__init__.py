"""Drawing samples: the loop over a table's rows, single steps, guidance, images from images, a running batch."""

from .continuous import Sampler
from .images import image_to_image, interpolate, slerp
from .inpaint import inpaint
from .loop import Step, sample, sample_progressive
from .slots import SampleRequest
from .steps import ddim_step, ddpm_step, posterior_mean

__all__ = [
    "SampleRequest",
    "Sampler",
    "Step",
    "ddim_step",
    "ddpm_step",
    "image_to_image",
    "inpaint",
    "interpolate",
    "posterior_mean",
    "sample",
    "sample_progressive",
    "slerp",
]
