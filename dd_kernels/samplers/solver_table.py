"""The table of a solver: what it does at each noise level, and what the model predicts there."""

from __future__ import annotations

import numpy as np

from ..ops.reverse_step.table import DynamicThreshold, StepTable, from_columns
from . import rows
from .noise_levels import Visits


def solver_table(
    levels: Visits,
    columns: rows.Columns,
    prediction: str,
    clip: float | DynamicThreshold | None,
    learned_variance: bool = False,
) -> StepTable:
    """The rows of ``columns`` at ``levels``; timesteps between two integers go to the model as floats."""
    rows.check_choice("prediction", prediction, rows.PREDICTIONS)
    rows.check_signal(prediction, levels.alpha_bar, clip)
    whole = np.array_equal(levels.times, levels.draws)
    return from_columns(
        levels.draws,
        times=None if whole else levels.times,
        learned_variance=learned_variance,
        **rows.x0_columns(prediction, levels.alpha_bar),
        **rows.clip_columns(clip),
        **columns,
    )
