"""Single steps by name: the posterior mean, a step of DDPM and one of DDIM."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor

from ..ops.reverse_step import reverse_step
from ..ops.reverse_step.table import DynamicThreshold, StepTable, from_columns
from ..samplers import ddim, ddpm, rows
from ..schedules import Schedule


@lru_cache(maxsize=32)
def _posterior_table(schedule: Schedule) -> StepTable:
    """Returns the table whose row t is the posterior mean at t, the model's output being x_0 itself."""
    columns = rows.posterior_columns(rows.Transition.of(schedule))
    return from_columns(np.arange(len(schedule)), x0_num_out=1.0, **columns)


def posterior_mean(
    x_start: Tensor, x_t: Tensor, t: int | Tensor, schedule: Schedule, *, backend: str = "auto"
) -> Tensor:
    r"""Returns the mean of q(x_{t-1} | x_t, x_0), eq. 7 of DDPM (Ho et al., 2020).

    .. math:: \tilde\mu_t = \frac{\sqrt{\bar\alpha_{t-1}}\beta_t}{1-\bar\alpha_t} x_0
        + \frac{\sqrt{\alpha_t}(1-\bar\alpha_{t-1})}{1-\bar\alpha_t} x_t

    Args:
        x_start, x_t: x_0 and x_t, [N, ...] of one shape.
        t: timesteps in [0, T), one int or an integer tensor [N].
        schedule: where alpha and beta come from.
        backend: "auto", "cpu", "cuda", "triton" or "reference".

    Returns:
        The mean, of x_t's shape and dtype. Raises as :func:`dd_kernels.reverse_step`.
    """
    return reverse_step(x_t, x_start, _posterior_table(schedule), t, backend=backend)


@lru_cache(maxsize=32)
def _full_ddpm_table(schedule: Schedule, variance: str, prediction: str, clip: Any) -> StepTable:
    """Returns DDPM's table in the order of timesteps, so that row t is timestep t."""
    table = ddpm(schedule, variance=variance, prediction=prediction, clip=clip)
    return StepTable(table.rows.flip(0), table.timesteps.flip(0), table.learned_variance, table.threshold)


def ddpm_step(
    x: Tensor,
    out: Tensor,
    t: int | Tensor,
    schedule: Schedule,
    *,
    variance: str = "fixed_small",
    prediction: str = "epsilon",
    clip: float | DynamicThreshold | None = 1.0,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Takes one ancestral step x_t -> x_{t-1} on the full schedule, algorithm 2 of DDPM (Ho et al., 2020).

    Args:
        x, out: x_t and the model's output.
        t: timesteps in [0, T), one int or an integer tensor [N].
        schedule, variance, prediction, clip: as in :func:`dd_kernels.ddpm`.
        options: noise, seed, first_sample, uncond, guidance_scale, x_prev, return_x0, backend, as in
            :func:`dd_kernels.reverse_step`, which also says what is returned and raised.
    """
    return reverse_step(x, out, _full_ddpm_table(schedule, variance, prediction, clip), t, **options)


@lru_cache(maxsize=1024)
def _one_ddim_step(schedule: Schedule, t: int, t_prev: int, eta: float, prediction: str, clip: Any) -> StepTable:
    if not -1 <= t_prev < t < len(schedule):
        raise ValueError(f"t and t_prev must satisfy -1 <= t_prev < t < {len(schedule)}; got {t} and {t_prev}")
    timesteps = [t] if t_prev < 0 else [t_prev, t]
    return ddim(schedule, timesteps=timesteps, eta=eta, prediction=prediction, clip=clip)[:1]


def ddim_step(
    x: Tensor,
    out: Tensor,
    t: int,
    t_prev: int,
    schedule: Schedule,
    *,
    eta: float = 0.0,
    prediction: str = "epsilon",
    clip: float | DynamicThreshold | None = 1.0,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Takes one DDIM step from timestep ``t`` to ``t_prev`` (-1: to x_0), eq. 12 of DDIM (Song et al., 2021).

    Args:
        x, out: x_t and the model's output.
        t, t_prev: -1 <= t_prev < t < T.
        schedule, eta, prediction, clip: as in :func:`dd_kernels.ddim`.
        options: noise, seed, first_sample, uncond, guidance_scale, x_prev, return_x0, backend, as in
            :func:`dd_kernels.reverse_step`, which also says what is returned and raised.
    """
    return reverse_step(x, out, _one_ddim_step(schedule, t, t_prev, eta, prediction, clip), 0, **options)
