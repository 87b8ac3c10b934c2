"""Sequences of timesteps that a sampler visits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .rows import check_choice

SPACINGS = ("linspace", "leading", "trailing", "quadratic")


def timestep_sequence(
    num_timesteps: int,
    steps: int | None = None,
    spacing: str = "leading",
    timesteps: Sequence[int] | None = None,
) -> np.ndarray:
    r"""Returns the timesteps to visit, increasing, int64 [S].

    ``linspace`` is round(i (T-1) / (S-1)), ``leading`` i floor(T/S), ``trailing``
    round((i+1) T/S) - 1, ``quadratic`` floor((i \sqrt{0.8 T} / (S-1))^2) (DDIM, appendix D.2).
    ``timesteps`` names them explicitly instead, in any order; some may come twice.

    Raises:
        ValueError: steps out of [1, T]; a spacing that is unknown or puts two steps on one timestep; both.
    """
    if timesteps is not None:
        if steps is not None:
            raise ValueError("only one of steps and timesteps may be given; got both")
        sequence = np.sort(np.asarray(timesteps))
        if sequence.ndim != 1 or sequence.size == 0 or sequence.dtype.kind not in "iu":
            raise ValueError(f"timesteps must be a sequence of at least one int; got {timesteps!r}")
        if sequence[0] < 0 or sequence[-1] >= num_timesteps:
            raise ValueError(f"timesteps must be in [0, {num_timesteps}); got {sequence[0]} to {sequence[-1]}")
    else:
        check_choice("spacing", spacing, SPACINGS)
        steps = num_timesteps if steps is None else steps
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= num_timesteps:
            raise ValueError(f"steps must be an int in [1, {num_timesteps}]; got {steps!r}")
        sequence = _spaced(num_timesteps, steps, spacing)
        if np.any(np.diff(sequence) == 0):
            raise ValueError(
                f"timesteps must differ from one another; got some twice ({len(sequence)} of {num_timesteps}, "
                f"spacing {spacing!r}): take fewer steps or another spacing"
            )
    return sequence.astype(np.int64)


def _spaced(num_timesteps: int, steps: int, spacing: str) -> np.ndarray:
    i = np.arange(steps)
    if spacing == "leading":
        return i * (num_timesteps // steps)
    if spacing == "trailing":
        return np.round((i + 1) * (num_timesteps / steps)).astype(np.int64) - 1
    # With a single step the sampler starts from the noisiest timestep.
    fraction = i / (steps - 1) if steps > 1 else np.ones(1)
    if spacing == "linspace":
        return np.round(fraction * (num_timesteps - 1)).astype(np.int64)
    return ((fraction * np.sqrt(0.8 * num_timesteps)) ** 2).astype(np.int64)
