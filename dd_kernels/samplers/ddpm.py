"""Ancestral sampling as a table."""

from __future__ import annotations

from collections.abc import Sequence

from ..ops.reverse_step.table import DynamicThreshold, StepTable, from_columns
from ..schedules import Schedule, from_alpha_bars
from . import rows
from .timesteps import timestep_sequence


def ddpm(
    schedule: Schedule,
    steps: int | None = None,
    *,
    variance: str = "fixed_small",
    prediction: str = "epsilon",
    clip: float | DynamicThreshold | None = 1.0,
    spacing: str = "linspace",
    timesteps: Sequence[int] | None = None,
) -> StepTable:
    r"""Ancestral sampling, algorithm 2 of DDPM (Ho et al., 2020), on all timesteps or a subsequence.

    On a subsequence the betas are those of the subsequence's own process,
    beta_i = 1 - alpha_bar_i / alpha_bar_{i-1} (Nichol & Dhariwal, 2021, eq. 19).
    x_{t-1} = posterior mean (eq. 7) of the clipped x_0 + sigma z; the last step adds no noise.

    Args:
        schedule: the forward process.
        steps: how many timesteps to visit; all T if None.
        variance: "fixed_small" (posterior variance), "fixed_large" (beta), "learned_range" (interpolated
            by the model's second half between the logs of the two, Nichol & Dhariwal, eq. 15) or "learned"
            (the second half is the log-variance).
        prediction: what the model's output is: "epsilon", "x_start" or "v".
        clip: x_0 is clipped to [-clip, clip]; or a DynamicThreshold; or None.
        spacing, timesteps: see :func:`timestep_sequence`.
    """
    rows.check_choice("variance", variance, rows.VARIANCES)
    rows.check_choice("prediction", prediction, rows.PREDICTIONS)
    sequence = timestep_sequence(len(schedule), steps, spacing, timesteps)
    rows.check_signal(prediction, schedule.alpha_bar[sequence], clip)
    if (sequence[1:] == sequence[:-1]).any():
        raise ValueError(f"timesteps must differ from one another for DDPM; got {sequence.tolist()}")
    # The subsequence is a diffusion process of its own; rows go from its noisiest step to its first.
    process = from_alpha_bars(schedule.alpha_bar[sequence])
    step = rows.Transition(*(values[::-1] for values in rows.Transition.of(process)))
    variances = process.posterior_variance_clipped[::-1]
    return from_columns(
        sequence[::-1],
        learned_variance=variance.startswith("learned"),
        **rows.x0_columns(prediction, schedule.alpha_bar[sequence[::-1]]),
        **rows.clip_columns(clip),
        **rows.posterior_columns(step),
        **rows.variance_columns(variance, variances, step.beta, draws=step.alpha_bar_prev < 1),
    )
