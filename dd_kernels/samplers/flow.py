"""Euler's method for rectified flows as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..ops.reverse_step.table import StepTable, from_columns
from . import rows
from .noise_levels import distinct_draws


def dynamic_shift(
    tokens: int,
    *,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    base_log_shift: float = 0.5,
    max_log_shift: float = 1.15,
) -> float:
    """The shift of :func:`flow_euler` for an image of so many tokens: its logarithm is linear in them.

    Larger images need more noise for the same loss of information (Esser et al., 2024, eq. 23). The defaults are
    Flux's.
    """
    slope = (max_log_shift - base_log_shift) / (max_tokens - base_tokens)
    return math.exp(base_log_shift + slope * (tokens - base_tokens))


def flow_euler(
    steps: int = 28,
    *,
    shift: float = 1.0,
    sigmas: Sequence[float] | None = None,
    num_timesteps: int = 1000,
    stochastic: bool = False,
) -> StepTable:
    r"""Euler's method for rectified flows (Liu et al., 2022, eq. 1): Stable Diffusion 3, Flux and video models.

    On the line x = (1 - \sigma) x_0 + \sigma \epsilon the output is the velocity \epsilon - x_0, and

    .. math:: x_t = x_s + (\sigma_t - \sigma_s)\, out, \qquad
        \sigma \leftarrow \frac{shift\, \sigma}{1 + (shift - 1)\, \sigma}

    the shift being eq. 23 of Esser et al. (2024). The model is called with \sigma times ``num_timesteps``, a float.

    Args:
        steps: how many noise levels to visit, evenly from 1 to 1 / ``num_timesteps`` before the shift (ignored when
            ``sigmas`` is given).
        shift: 1 is none; 3 is Stable Diffusion 3's; :func:`dynamic_shift` gives Flux's for an image's size.
        sigmas: the noise levels instead, in (0, 1], decreasing; they are shifted too.
        num_timesteps: what the model is called with at \sigma = 1.
        stochastic: x_t = (1 - \sigma_t) x_0 + \sigma_t z, with fresh noise, in place of the ODE's step.

    Raises:
        ValueError: a number out of its range.
    """
    if not shift > 0:
        raise ValueError(f"shift must be above 0; got {shift}")
    if sigmas is None:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps must be an int of at least 1; got {steps!r}")
        before = np.linspace(1.0, 1.0 / num_timesteps, steps)
    else:
        before = np.asarray(sigmas, dtype=np.float64)
        if before.ndim != 1 or before.size == 0 or not (np.diff(before) < 0).all():
            raise ValueError(f"sigmas must be a sequence of at least one number, decreasing; got {sigmas!r}")
        if not (before[0] <= 1 and before[-1] > 0):
            raise ValueError(f"sigmas must be in (0, 1]; got {before[0]} to {before[-1]}")
    sigma = shift * before / (1 + (shift - 1) * before)
    after = np.append(sigma[1:], 0.0)
    columns = rows.flow_columns(sigma, after)
    if stochastic:
        columns |= rows.renoised_columns(rows.Level.of_flow(after))
    times = sigma * num_timesteps
    return from_columns(distinct_draws(times), times=times, **columns)
