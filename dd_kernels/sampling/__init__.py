"""Drawing samples: the loop over a table's rows, single steps, guidance, a running batch of requests."""

from .continuous import Sampler
from .loop import Step, sample, sample_progressive
from .slots import SampleRequest
from .steps import ddim_step, ddpm_step, posterior_mean

__all__ = [
    "SampleRequest",
    "Sampler",
    "Step",
    "ddim_step",
    "ddpm_step",
    "posterior_mean",
    "sample",
    "sample_progressive",
]
