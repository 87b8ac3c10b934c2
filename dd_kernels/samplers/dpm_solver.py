"""DPM-Solver++ as a table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..ops.reverse_step.table import DynamicThreshold, StepTable
from ..schedules import Schedule
from . import rows
from .multistep import SOLVERS, multistep_columns
from .noise_levels import visits
from .solver_table import solver_table


def orders(steps: int, order: int, lower_order_final: bool | None) -> np.ndarray:
    """The order of each step: at most one more than there are steps before it, and 1 at the last, which goes to x_0.

    With ``lower_order_final`` (None: below 15 steps, as Lu et al. advise) also at most one more than there are after.
    """
    place = np.arange(steps)
    result = np.minimum(order, place + 1)
    if lower_order_final or (lower_order_final is None and steps < 15):
        result = np.minimum(result, steps - place)
    result[-1] = 1
    return result


def dpm_solver(
    schedule: Schedule,
    steps: int = 10,
    *,
    order: int = 2,
    solver: str = "midpoint",
    stochastic: bool = False,
    lower_order_final: bool | None = None,
    prediction: str = "epsilon",
    clip: float | DynamicThreshold | None = 1.0,
    spacing: str = "logsnr",
    timesteps: Sequence[int] | None = None,
    learned_variance: bool = False,
) -> StepTable:
    r"""DPM-Solver++ (Lu et al., 2022b, arXiv 2211.01095), multistep: good samples in 10 to 20 steps.

    .. math:: x_t = \frac{\sigma_t}{\sigma_s} x_s + \alpha_t (1 - e^{-h}) \left(\Big(1 + \frac{1}{2r}\Big) x_0
        - \frac{1}{2r} x_0^{last}\right), \qquad h = \lambda_t - \lambda_s, \quad r = h^{last} / h

    with \alpha = \sqrt{\bar\alpha}, \sigma = \sqrt{1 - \bar\alpha}, \lambda = \log(\alpha / \sigma): algorithm 2, of
    second order. First order is DDIM; :func:`dd_kernels.samplers.multistep.multistep_columns` has all orders, and
    the SDE of section 5. x_0 is clipped before it enters, as their code does for images.

    Args:
        schedule: the forward process.
        steps: how many noise levels to visit (ignored when ``timesteps`` is given).
        order: 1, 2 or 3. The last step, which goes to x_0, is of first order.
        solver: "midpoint" or "heun", how second order is reached.
        stochastic: solve the SDE (SDE-DPM-Solver++) in place of the ODE.
        lower_order_final: let the order fall by one per step towards the end; None: where there are fewer than
            15 steps.
        prediction, clip: as in :func:`ddpm`.
        spacing: a name as in :func:`ddim`, whose levels are timesteps, or "logsnr", "karras", "exponential" or "beta",
            whose levels lie between timesteps: the model is then called with a float.
        timesteps: the timesteps to visit, such as those of "Align Your Steps" (Sabour et al., 2024).
        learned_variance: the model's output is [N, 2 C, ...]; its second half plays no part.
    """
    rows.check_choice("solver", solver, SOLVERS)
    if order not in (1, 2, 3):
        raise ValueError(f"order must be 1, 2 or 3; got {order!r}")
    levels = visits(schedule, steps, spacing, timesteps)
    each = orders(len(levels.times), order, lower_order_final)
    columns = multistep_columns(levels.level, levels.after, each, solver=solver, stochastic=stochastic)
    return solver_table(levels, columns, prediction, clip, learned_variance)
