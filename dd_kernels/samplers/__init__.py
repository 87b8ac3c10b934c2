"""Samplers: each makes a :class:`~dd_kernels.ops.reverse_step.table.StepTable` from a schedule."""

from .ddim import ddim, ddim_inversion
from .ddpm import ddpm
from .timesteps import timestep_sequence

__all__ = ["ddim", "ddim_inversion", "ddpm", "timestep_sequence"]
