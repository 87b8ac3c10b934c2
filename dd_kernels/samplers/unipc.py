"""UniPC as a table."""

from __future__ import annotations

from collections.abc import Sequence

from ..ops.reverse_step.table import DynamicThreshold, StepTable
from ..schedules import Schedule
from . import rows
from .dpm_solver import orders
from .multistep import unipc_columns
from .noise_levels import visits
from .solver_table import solver_table

VARIANTS = ("bh1", "bh2")


def unipc(
    schedule: Schedule,
    steps: int = 10,
    *,
    order: int = 2,
    variant: str = "bh2",
    lower_order_final: bool | None = None,
    prediction: str = "epsilon",
    clip: float | DynamicThreshold | None = 1.0,
    spacing: str = "logsnr",
    timesteps: Sequence[int] | None = None,
    learned_variance: bool = False,
) -> StepTable:
    r"""UniPC (Zhao et al., 2023, arXiv 2302.04867): a predictor, corrected by the next step's model call.

    The corrector of eq. 3 raises the order by one, so that ``order`` 2 converges as third order does. The row of
    :func:`dd_kernels.samplers.multistep.unipc_columns` corrects and predicts at once, from x_0 of this step and of the
    two before. UniPC of third order would need the one before those too, and is left out.

    Args:
        order: of the predictor, 1 or 2.
        variant: "bh1" or "bh2", the paper's B(h) = h and e^h - 1.
        schedule, steps, lower_order_final, prediction, clip, spacing, timesteps, learned_variance: as in
            :func:`dpm_solver`.
    """
    rows.check_choice("variant", variant, VARIANTS)
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2; got {order!r}")
    levels = visits(schedule, steps, spacing, timesteps)
    each = orders(len(levels.times), order, lower_order_final)
    columns = unipc_columns(levels.level, levels.after, each, variant=variant)
    return solver_table(levels, columns, prediction, clip, learned_variance)
