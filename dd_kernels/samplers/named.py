"""Samplers for few steps by the names that users type."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ..ops.reverse_step.table import StepTable
from .dpm_solver import dpm_solver
from .euler import euler, euler_ancestral
from .unipc import unipc

# name -> a sampler of (schedule, steps, *, prediction, clip, spacing, learned_variance), one model call per step
FEW_STEP_SAMPLERS: dict[str, Callable[..., StepTable]] = {
    "dpm++": dpm_solver,
    "dpm++3m": partial(dpm_solver, order=3),
    "dpm++sde": partial(dpm_solver, stochastic=True),
    "unipc": unipc,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
}
