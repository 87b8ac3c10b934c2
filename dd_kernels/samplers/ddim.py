"""DDIM and its inversion as tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..ops.reverse_step.table import DynamicThreshold, StepTable, from_columns
from ..schedules import Schedule
from .rows import PREDICTIONS, check_choice, clip_columns, x0_columns
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
        prediction, clip, spacing, timesteps: as in :func:`ddpm`.
        learned_variance: the model's output is [N, 2 C, ...]; its second half plays no part, since the
            log-variance columns are 0 and leave sigma as it is.
    """
    check_choice("prediction", prediction, PREDICTIONS)
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1]; got {eta}")
    sequence = timestep_sequence(len(schedule), None if timesteps is not None else steps, spacing, timesteps)[::-1]
    alpha_bar = schedule.alpha_bar[sequence]
    alpha_bar_prev = np.append(alpha_bar[1:], 1.0)
    # At the last step 1 - alpha_bar_prev is 0, and with it sigma: no noise.
    sigma = eta * np.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar)) * np.sqrt(1 - alpha_bar / alpha_bar_prev)
    direction = np.sqrt(np.maximum(1 - alpha_bar_prev - sigma**2, 0.0))
    # epsilon = (x_t - sqrt(alpha_bar) x_0) / sqrt(1 - alpha_bar), with the clipped x_0
    from_x = direction / np.sqrt(1 - alpha_bar)
    return from_columns(
        sequence,
        prev_from_x0=np.sqrt(alpha_bar_prev) - from_x * np.sqrt(alpha_bar),
        prev_from_x=from_x,
        sigma=sigma,
        learned_variance=learned_variance,
        **x0_columns(prediction, alpha_bar),
        **clip_columns(clip),
    )


def ddim_inversion(
    schedule: Schedule,
    steps: int = 50,
    *,
    prediction: str = "epsilon",
    spacing: str = "leading",
    timesteps: Sequence[int] | None = None,
) -> StepTable:
    r"""DDIM run backwards, from x_0 to the x_T that :func:`ddim` (eta = 0, no clip) takes to it.

    The Euler step of the ODE of DDIM (Song et al., 2021, eq. 14) in the direction of growing t:
    at step i the model is asked at t_i for epsilon, and x moves from alpha_bar_{i-1} (1 at first) to
    alpha_bar_i. The same steps, spacing and prediction as the sampler's give its mirror image.
    """
    check_choice("prediction", prediction, PREDICTIONS)
    sequence = timestep_sequence(len(schedule), None if timesteps is not None else steps, spacing, timesteps)
    after = schedule.alpha_bar[sequence]
    before = np.append(1.0, after[:-1])
    # epsilon = from_x * x + from_out * out, read at the timestep that the model was asked at
    signal, sigma = np.sqrt(after), np.sqrt(1 - after)
    from_x, from_out = {
        "epsilon": (np.zeros_like(after), np.ones_like(after)),
        "x_start": (1 / sigma, -signal / sigma),
        "v": (sigma, signal),
    }[prediction]
    return from_columns(
        sequence,
        x0_num_x=1 - np.sqrt(1 - before) * from_x,
        x0_num_out=-np.sqrt(1 - before) * from_out,
        x0_den=np.sqrt(before),
        prev_from_x0=signal,
        prev_from_x=sigma * from_x,
        prev_from_out=sigma * from_out,
    )
