"""DDIM and its inversion as tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..ops.reverse_step.table import DynamicThreshold, StepTable, from_columns
from ..schedules import Schedule
from . import rows
from .timesteps import timestep_sequence


def ddim(
    schedule: Schedule,
    steps: int = 50,
    *,
    eta: float = 0.0,
    prediction: str = "epsilon",
    clip: float | DynamicThreshold | None = 1.0,
    spacing: str = "leading",
    timesteps: Sequence[int] | None = None,
    learned_variance: bool = False,
) -> StepTable:
    r"""DDIM (Song et al., 2021), eq. 12 with sigma of eq. 16, on a subsequence of the timesteps.

    .. math::
        x_{prev} &= \sqrt{\bar\alpha_{prev}}\, x_0 + \sqrt{1 - \bar\alpha_{prev} - \sigma^2}\, \epsilon + \sigma z \\
        \sigma &= \eta \sqrt{(1 - \bar\alpha_{prev}) / (1 - \bar\alpha)} \sqrt{1 - \bar\alpha / \bar\alpha_{prev}}

    epsilon is re-derived from the clipped x_0, as in guided-diffusion, so that x_t stays on the
    line from x_0 to epsilon. eta = 0 is deterministic, eta = 1 has DDPM's posterior variance.

    Args:
        schedule: the forward process.
        steps: how many timesteps to visit (ignored when ``timesteps`` is given).
        eta: in [0, 1].
        prediction, clip, spacing, timesteps: as in :func:`ddpm`; a timestep that comes twice, as in the quadratic
            sequences of DDIM's own code, is a step that leaves x on its line.
        learned_variance: the model's output is [N, 2 C, ...]; its second half plays no part, since the
            log-variance columns are 0 and leave sigma as it is.
    """
    rows.check_choice("prediction", prediction, rows.PREDICTIONS)
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1]; got {eta}")
    sequence = timestep_sequence(len(schedule), None if timesteps is not None else steps, spacing, timesteps)[::-1]
    alpha_bar = schedule.alpha_bar[sequence]
    rows.check_signal(prediction, alpha_bar, clip)
    alpha_bar_prev = np.append(alpha_bar[1:], 1.0)
    # At the last step 1 - alpha_bar_prev is 0, and with it sigma: no noise.
    sigma = rows.ddim_sigma(alpha_bar, alpha_bar_prev, eta)
    return from_columns(
        sequence,
        learned_variance=learned_variance,
        **rows.x0_columns(prediction, alpha_bar),
        **rows.clip_columns(clip),
        **rows.ddim_columns(alpha_bar_prev, rows.epsilon_of_x0(alpha_bar), sigma),
    )


def ddim_inversion(
    schedule: Schedule,
    steps: int = 50,
    *,
    prediction: str = "epsilon",
    spacing: str = "leading",
    timesteps: Sequence[int] | None = None,
    learned_variance: bool = False,
) -> StepTable:
    r"""DDIM run backwards, from x_0 to the x_T that :func:`ddim` (eta = 0, no clip) takes to it.

    The Euler step of the ODE of DDIM (Song et al., 2021, eq. 14) in the direction of growing t:
    at step i the model is asked at t_i for epsilon, and x moves from alpha_bar_{i-1} (1 at first) to
    alpha_bar_i. The same steps, spacing and prediction as the sampler's give its mirror image.
    ``learned_variance`` is as in :func:`ddim`.
    """
    rows.check_choice("prediction", prediction, rows.PREDICTIONS)
    sequence = timestep_sequence(len(schedule), None if timesteps is not None else steps, spacing, timesteps)
    after = schedule.alpha_bar[sequence]
    before = np.append(1.0, after[:-1])
    # The model is asked at the noise level that the step goes to.
    epsilon = rows.epsilon_of_output(prediction, after)
    columns = rows.x0_of_epsilon(before, epsilon) | rows.ddim_columns(after, epsilon)
    return from_columns(sequence, learned_variance=learned_variance, **columns)
