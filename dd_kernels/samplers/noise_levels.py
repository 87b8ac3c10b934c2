"""The noise levels that a solver visits, evenly spaced by one measure or another, and their timesteps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..schedules import Schedule
from .rows import Level, check_choice
from .timesteps import SPACINGS, timestep_sequence

SIGMA_SPACINGS = ("karras", "exponential", "logsnr", "beta")


class Visits(NamedTuple):
    """What a solver visits, from the noisiest on, [S].

    Attributes:
        alpha_bar: the noise levels.
        times: the timesteps, float64, that the model is asked at.
        draws: int64, the coordinate of each step's noise: the rounded timestep, or where two are alike one more.
    """

    alpha_bar: np.ndarray
    times: np.ndarray
    draws: np.ndarray

    @property
    def level(self) -> Level:
        """Where each step starts."""
        return Level.of_alpha_bar(self.alpha_bar)

    @property
    def after(self) -> Level:
        """Where each step ends: at the next level, the last one at x_0."""
        return Level.of_alpha_bar(np.append(self.alpha_bar[1:], 1.0))


def beta_quantile(p: np.ndarray, a: float, b: float) -> np.ndarray:
    """The inverse of the distribution function of Beta(a, b) at p in [0, 1], to 1e-12.

    The density's pole at 0 is taken out by u = t^a, and that at 1 by the distribution's mirror image.
    """
    nodes, weights = np.polynomial.legendre.leggauss(64)

    def mass(t: np.ndarray, a: float, b: float) -> np.ndarray:
        """The integral of the density, times a constant, up to t <= 1/2."""
        end = t[:, None] ** a
        return (weights * (1 - (end * (nodes + 1) / 2) ** (1 / a)) ** (b - 1)).sum(1) * end[:, 0] / (2 * a)

    half = np.array([0.5])
    below, above = mass(half, a, b)[0], mass(half, b, a)[0]
    total = below + above
    mirrored = p * total > below
    low, high = np.zeros_like(p), np.full_like(p, 0.5)
    wanted = np.where(mirrored, 1 - p, p) * total
    for _ in range(50):
        middle = (low + high) / 2
        found = np.where(mirrored, mass(middle, b, a), mass(middle, a, b))
        low, high = np.where(found < wanted, middle, low), np.where(found < wanted, high, middle)
    return np.where(mirrored, 1 - high, high)


def spaced_sigmas(largest: float, smallest: float, steps: int, spacing: str) -> np.ndarray:
    r"""``steps`` values of \sigma = \sqrt{1 - \bar\alpha} / \sqrt{\bar\alpha}, decreasing, both ends included.

    ``karras``: \sigma^{1/7} evenly spaced (Karras et al., 2022, eq. 5). ``exponential`` and ``logsnr``, two names of
    one spacing: log \sigma, which is minus half the log of the signal-to-noise ratio (Lu et al., 2022, section 4.2).
    ``beta``: at quantiles of Beta(0.6, 0.6), dense at both ends (Lee et al., 2024).
    """
    fraction = np.linspace(0.0, 1.0, steps)
    if spacing == "karras":
        return (largest ** (1 / 7) + fraction * (smallest ** (1 / 7) - largest ** (1 / 7))) ** 7
    if spacing == "beta":
        return smallest + beta_quantile(1 - fraction, 0.6, 0.6) * (largest - smallest)
    return np.exp(np.log(largest) + fraction * (np.log(smallest) - np.log(largest)))


def times_of(schedule: Schedule, sigmas: np.ndarray) -> np.ndarray:
    r"""The timesteps, between integers, where \log\sigma of a schedule, interpolated, has the values given."""
    with np.errstate(divide="ignore"):
        known = 0.5 * (np.log1p(-schedule.alpha_bar) - np.log(schedule.alpha_bar))
    return np.interp(np.log(sigmas), known, np.arange(len(schedule), dtype=np.float64))


def distinct_draws(times: np.ndarray) -> np.ndarray:
    """Integers that decrease as ``times`` do: each rounded time, or one more than the next where that is not less."""
    place = np.arange(len(times))
    rising = np.round(times[::-1]).astype(np.int64) - place
    return (np.maximum.accumulate(rising) + place)[::-1]


def visits(schedule: Schedule, steps: int, spacing: str, timesteps: Sequence[int] | None) -> Visits:
    """The noise levels of a solver: named timesteps, or ``steps`` of them evenly spaced.

    Raises:
        ValueError: an unknown spacing; steps out of range; timesteps that come twice; a spacing by noise of a schedule
            that ends without signal.
    """
    check_choice("spacing", spacing, SPACINGS + SIGMA_SPACINGS)
    if timesteps is not None or spacing in SPACINGS:
        sequence = timestep_sequence(len(schedule), None if timesteps is not None else steps, spacing, timesteps)[::-1]
        if (sequence[1:] == sequence[:-1]).any():
            raise ValueError(f"timesteps must differ from one another; got {sequence.tolist()}")
        return Visits(schedule.alpha_bar[sequence], sequence.astype(np.float64), sequence)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an int of at least 1; got {steps!r}")
    if schedule.alpha_bar[-1] == 0:
        raise ValueError(f"spacing must be one of {', '.join(SPACINGS)} for a schedule that ends with alpha_bar 0")
    largest, smallest = ((1 - ab) ** 0.5 / ab**0.5 for ab in (schedule.alpha_bar[-1], schedule.alpha_bar[0]))
    sigmas = spaced_sigmas(largest, smallest, steps, spacing)
    times = times_of(schedule, sigmas)
    return Visits(1 / (1 + sigmas**2), times, distinct_draws(times))
