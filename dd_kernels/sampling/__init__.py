"""Drawing samples: the loop over a table's rows, single steps, guidance."""

from .loop import Step, sample, sample_progressive
from .steps import ddim_step, ddpm_step, posterior_mean

__all__ = ["Step", "ddim_step", "ddpm_step", "posterior_mean", "sample", "sample_progressive"]
