"""Samplers: each makes a :class:`~dd_kernels.ops.reverse_step.table.StepTable` from a schedule."""

from .ddim import ddim, ddim_inversion
from .ddpm import ddpm
from .dpm_solver import dpm_solver
from .euler import euler, euler_ancestral, heun
from .flow import dynamic_shift, flow_euler
from .lcm import lcm
from .timesteps import timestep_sequence
from .unipc import unipc

__all__ = [
    "ddim",
    "ddim_inversion",
    "ddpm",
    "dpm_solver",
    "dynamic_shift",
    "euler",
    "euler_ancestral",
    "flow_euler",
    "heun",
    "lcm",
    "timestep_sequence",
    "unipc",
]
