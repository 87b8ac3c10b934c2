r"""The algebra of multistep solvers: rows that combine x_0 of this step with that of earlier ones.

All solve the ODE or SDE of diffusion in \lambda = \log(\alpha / \sigma), half the log of the signal-to-noise ratio,
where x_0 varies slowly: a step of length h integrates a polynomial through x_0 of the last steps exactly (Lu et al.,
2022b, DPM-Solver++, eq. 8). As in :mod:`dd_kernels.samplers.rows`, arrays are numpy's or torch's, [S], one value per
step; what a step does not need (the length of the step before the first) may hold any number.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .rows import Array, Columns, Level

SOLVERS = ("midpoint", "heun")


def half_log_snr(level: Level) -> Array:
    r"""\lambda = \log(\alpha / \sigma); inf where there is no noise, -inf where there is no signal."""
    if isinstance(level.noise, Tensor):
        return torch.log(level.signal) - torch.log(level.noise)
    with np.errstate(divide="ignore"):
        return np.log(level.signal) - np.log(level.noise)


def _expm1(x: Array) -> Array:
    return torch.expm1(x) if isinstance(x, Tensor) else np.expm1(x)


def _where(condition: Array, x: Array, y: Array | float) -> Array:
    return torch.where(condition, x, y) if isinstance(x, Tensor) else np.where(condition, x, y)


def _before(h: Array) -> Array:
    """The value of the step before; the first step's own at the first."""
    return h[[0, *range(len(h) - 1)]]


class Lengths(NamedTuple):
    """Steps in lambda: their lengths h, and those of the one and two steps before, in units of h."""

    h: Array
    last: Array  # h of the step before / h
    older: Array  # h of the step before that / h

    @classmethod
    def between(cls, level: Level, after: Level) -> Lengths:
        """Steps from ``level`` to ``after``, in order."""
        h = half_log_snr(after) - half_log_snr(level)
        with np.errstate(invalid="ignore", divide="ignore"):
            return cls(h, _before(h) / h, _before(_before(h)) / h)


def _earlier_columns(order: Array, lengths: Lengths, slope: Array, curvature: Array) -> Columns:
    """Columns of slope * D1 + curvature * D2, differences of x_0 at this step, times h and h^2 / 2.

    ``slope`` and ``curvature`` are 0 at steps of a lower order.
    """
    r0, r1 = lengths.last, lengths.older
    third = order >= 3
    # D1_0 = (m0 - m1) / r0 and D1_1 = (m1 - m2) / r1; D2 = (D1_0 - D1_1) / (r0 + r1); D1 = D1_0 + r0 D2 at third order.
    of_second = _where(third, (r0 * slope + curvature) / (r0 + r1), 0.0)
    first = _where(order >= 2, (slope + of_second) / r0, 0.0)
    second = _where(third, of_second / r1, 0.0)
    return {"prev_from_x0": first, "prev_from_last": -first - second, "prev_from_older": second}


def multistep_columns(
    level: Level,
    after: Level,
    order: Array,
    *,
    solver: str = "midpoint",
    stochastic: bool = False,
    as_diffusers: bool = False,
) -> Columns:
    r"""DPM-Solver++ (Lu et al., 2022b): multistep, of data prediction, of first to third order.

    With g = h, or 2 h where ``stochastic``, and D0 = x_0, D1, D2 its differences (D1 -> h x_0', D2 -> h^2 x_0'' / 2):

    .. math::
        x_t &= \frac{\sigma_t}{\sigma_s} e^{h - g} x_s + \alpha_t \big((1 - e^{-g}) D_0 + w_1 D_1 + w_2 D_2\big)
            + \sigma_t \sqrt{1 - e^{-2h}}\, z \\
        w_1 &= \tfrac12 (1 - e^{-g}) \text{ (midpoint) or } 1 - (1 - e^{-g}) / g \text{ (heun, and third order)} \\
        w_2 &= 1 - \frac 2 g \left(1 - \frac{1 - e^{-g}}{g}\right)

    First order is eq. 9, second order algorithm 2 (midpoint), the stochastic one section 5 (without z where not
    ``stochastic``). w_1 and w_2 integrate a polynomial of second degree exactly. The code of Lu et al. has half of w_2,
    which makes it of second order, and diffusers has, where ``stochastic``, 1 less than that half; ``as_diffusers``
    takes their numbers.

    Args:
        level, after: where each step starts and ends, in order.
        order: of each step, 1, 2 or 3, at most one more than there are steps before; 1 where a step ends without
            noise.
        solver: "midpoint" or "heun", which differ at second order alone.
    """
    lengths = Lengths.between(level, after)
    g = 2 * lengths.h if stochastic else lengths.h
    decay = -_expm1(-g)  # 1 - e^-g
    with np.errstate(invalid="ignore", divide="ignore"):
        exact = 1 - decay / g
        slope = exact if solver == "heun" else _where(order >= 3, exact, decay / 2)
        curvature = 1 - 2 / g * exact
        if as_diffusers:
            curvature = curvature / 2 - (1.0 if stochastic else 0.0)
        columns = _earlier_columns(order, lengths, after.signal * slope, after.signal * curvature)
    ratio = after.noise / level.noise
    columns["prev_from_x0"] = columns["prev_from_x0"] + after.signal * decay
    columns["prev_from_x"] = ratio * (1 + _expm1(-lengths.h)) if stochastic else ratio
    if stochastic:
        columns["sigma"] = after.noise * (-_expm1(-2 * lengths.h)) ** 0.5
    return columns


def _unipc_weights(order: Array, lengths: Lengths, variant: str) -> tuple[Array, Array, Array]:
    """(B, the weight of the older difference, that of the newest) of UniC; at first order (B, 0, 1/2)."""
    h = -lengths.h
    one = _expm1(h)
    two = one / h - 1
    three = two / h - 0.5
    b = one if variant == "bh2" else h
    # UniC solves w_old + w_new = two / B and r w_old + w_new = 2 three / B, r = -last being where the older x_0 lies.
    old = (two - 2 * three) / b / (1 + lengths.last)
    second = order >= 2
    return b, _where(second, old, 0.0), _where(second, two / b - old, 0.5)


def unipc_columns(level: Level, after: Level, order: Array, *, variant: str = "bh2") -> Columns:
    r"""UniPC (Zhao et al., 2023), of data prediction: the corrector UniC of the last step, then the predictor UniP.

    The corrector wants x of before the last step, which is a sum of what that step gave and of its x_0: so

    .. math::
        x^c &= x - \alpha_s B \Big((w_{old} - w_p) \frac{x_0^{older} - x_0^{last}}{r}
            + w_{new} (x_0 - x_0^{last})\Big) \\
        x_t &= \frac{\sigma_t}{\sigma_s} x^c + \alpha_t (1 - e^{-h}) x_0 - \alpha_t B' w'_p \frac{x_0^{last} - x_0}{r'}

    (eq. 3 and 9; w_p is 1/2 at second order, 0 at first; B is e^{-h} - 1, or -h in the variant "bh1"; the primes are
    of this step). Third order would need one x_0 more than a row has.

    Args:
        level, after: where each step starts and ends, in order.
        order: of each step's predictor, 1 or 2, and of the corrector in the step after it.
        variant: "bh1" or "bh2".
    """
    lengths = Lengths.between(level, after)
    first = np.arange(len(level.noise)) == 0
    first = torch.from_numpy(first) if isinstance(level.noise, Tensor) else first
    with np.errstate(invalid="ignore", divide="ignore"):
        weights = _unipc_weights(order, lengths, variant)
        half = _where(order >= 2, weights[0] / 2 / -lengths.last, 0.0)  # B w_p / r
        b, old, new = (_before(w) for w in weights)
        previous = _before(half)
        older = _where(first, 0.0 * level.signal, level.signal * (b * old / -_before(lengths.last) - previous))
        newest = _where(first, 0.0 * level.signal, level.signal * b * new)
    older = _where(_before(order) >= 2, older, 0.0)
    ratio, step = after.noise / level.noise, after.signal * half
    return {
        "prev_from_x": ratio,
        "prev_from_x0": -ratio * newest - after.signal * _expm1(-lengths.h) + step,
        "prev_from_last": ratio * (older + newest) - step,
        "prev_from_older": -ratio * older,
    }
