"""Euler, its ancestral variant and Heun as tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..ops.reverse_step.table import DynamicThreshold, StepTable
from ..schedules import Schedule
from . import rows
from .noise_levels import Visits, visits
from .solver_table import solver_table


def euler(
    schedule: Schedule,
    steps: int = 25,
    *,
    prediction: str = "epsilon",
    clip: float | DynamicThreshold | None = 1.0,
    spacing: str = "karras",
    timesteps: Sequence[int] | None = None,
    learned_variance: bool = False,
) -> StepTable:
    r"""Euler's method for the ODE of Karras et al. (2022), eq. 4, in \hat x = x / \sqrt{\bar\alpha}.

    .. math:: \hat x_t = \hat x_s + (s_t - s_s) \frac{\hat x_s - x_0}{s_s}, \qquad
        s = \sqrt{1 - \bar\alpha} / \sqrt{\bar\alpha}

    It is DDIM with eta = 0 (Song et al., 2021, eq. 13) on noise levels that need not be timesteps. x stays of unit
    variance, so that the model is given x itself, and x_T is standard normal.

    Args:
        schedule, steps, prediction, clip, spacing, timesteps, learned_variance: as in :func:`dpm_solver`.
    """
    levels = visits(schedule, steps, spacing, timesteps)
    return solver_table(levels, rows.line_columns(levels.level, levels.after), prediction, clip, learned_variance)


def euler_ancestral(
    schedule: Schedule,
    steps: int = 25,
    *,
    eta: float = 1.0,
    prediction: str = "epsilon",
    clip: float | DynamicThreshold | None = 1.0,
    spacing: str = "karras",
    timesteps: Sequence[int] | None = None,
    learned_variance: bool = False,
) -> StepTable:
    r"""Euler's method with fresh noise, k-diffusion's ``sample_euler_ancestral``.

    .. math:: \hat x_t = x_0 + \frac{s_{down}}{s_s} (\hat x_s - x_0) + s_{up} z, \qquad
        s_{up} = \eta\, s_t \sqrt{1 - s_t^2 / s_s^2}, \quad s_{down}^2 = s_t^2 - s_{up}^2

    in the variables of :func:`euler`. eta = 1 is DDPM's posterior between these noise levels (Ho et al., 2020, eq. 7),
    eta = 0 is :func:`euler`.

    Args:
        eta: in [0, 1].
        schedule, steps, prediction, clip, spacing, timesteps, learned_variance: as in :func:`dpm_solver`.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1]; got {eta}")
    levels = visits(schedule, steps, spacing, timesteps)
    columns = rows.ancestral_columns(levels.level, levels.after, eta)
    return solver_table(levels, columns, prediction, clip, learned_variance)


def heun(
    schedule: Schedule,
    steps: int = 10,
    *,
    prediction: str = "epsilon",
    clip: float | DynamicThreshold | None = 1.0,
    spacing: str = "karras",
    timesteps: Sequence[int] | None = None,
    learned_variance: bool = False,
) -> StepTable:
    r"""Heun's method, algorithm 1 of Karras et al. (2022) without its churn: second order, two model calls a step.

    The table has two rows per step: Euler's, and

    .. math:: x_t \leftarrow x_t + \alpha_t \frac{s_s - s_t}{2 s_t} (x_0 - x_0^{last})

    (:func:`dd_kernels.samplers.rows.correction_columns`), asked for at the same level as the next step's Euler row.
    The last step, to x_0, is Euler's alone: 2 steps - 1 model calls. Churn adds noise before the model is asked, which
    no row can.

    Args:
        steps: how many noise levels to visit.
        schedule, prediction, clip, spacing, timesteps, learned_variance: as in :func:`dpm_solver`.
    """
    levels = visits(schedule, steps, spacing, timesteps)
    if levels.alpha_bar[0] == 0:
        raise ValueError("schedule must leave some signal at every visited timestep for Heun's slopes; got alpha_bar 0")
    level, after = levels.level, levels.after
    count = len(levels.times)
    euler_rows = rows.line_columns(level, after)
    to_level = (rows.Level(*(v[:-1] for v in end)) for end in (level, after))
    corrections = rows.correction_columns(*to_level)
    columns = {}
    for name in corrections:
        values = np.zeros(2 * count - 1)
        values[::2] = euler_rows.get(name, 0.0)
        values[1::2] = corrections[name]
        columns[name] = values
    # Row 2 i is Euler's of step i; row 2 i + 1 corrects it, at the level of step i + 1.
    place = (np.arange(2 * count - 1) + 1) // 2
    visited = Visits(*(values[place] for values in levels))
    return solver_table(visited, columns, prediction, clip, learned_variance)
