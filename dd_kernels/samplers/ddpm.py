"""Ancestral sampling as a table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..ops.reverse_step.table import DynamicThreshold, StepTable, from_columns
from ..schedules import Schedule
from .rows import PREDICTIONS, check_choice, clip_columns, x0_columns
from .timesteps import timestep_sequence

VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range")


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
    check_choice("variance", variance, VARIANCES)
    check_choice("prediction", prediction, PREDICTIONS)
    sequence = timestep_sequence(len(schedule), steps, spacing, timesteps)
    alpha_bar = schedule.alpha_bar[sequence]
    # The subsequence is a diffusion process of its own.
    process = Schedule(1.0 - alpha_bar / np.append(1.0, alpha_bar[:-1]))
    learned = variance.startswith("learned")
    sigma = {
        "fixed_small": np.sqrt(process.posterior_variance),
        "fixed_large": np.sqrt(process.beta),
    }.get(variance, np.ones(len(process)))
    sigma = np.append(0.0, sigma[1:])
    log_variances = {
        # Half-way between -1 and 1 by (v + 1) / 2 is v itself: the log-variance as the model gives it.
        "learned": {"log_var_min": -1.0, "log_var_max": 1.0},
        "learned_range": {
            "log_var_min": process.posterior_log_variance_clipped[::-1],
            "log_var_max": np.log(process.beta)[::-1],
        },
    }.get(variance, {})
    x0 = {k: v if np.isscalar(v) else v[::-1] for k, v in x0_columns(prediction, alpha_bar).items()}
    return from_columns(
        sequence[::-1],
        prev_from_x0=process.posterior_mean_coef_x_start[::-1],
        prev_from_x=process.posterior_mean_coef_x_t[::-1],
        sigma=sigma[::-1],
        learned_variance=learned,
        **log_variances,
        **x0,
        **clip_columns(clip),
    )
