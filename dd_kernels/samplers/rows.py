r"""The algebra of a row: what a prediction says about x_0 and epsilon, and where a step goes from there.

Each formula stands here once (the posterior of q, eq. 7 of DDPM, in :mod:`dd_kernels.schedules`), for numpy's
float64 arrays and torch's float32 tensors alike: it is written with operators and ``clip``, which both have.
The samplers of this package, diffusers', guided-diffusion's and latent-diffusion's are calls of it with their own
alpha_bar. The order of operations is that of diffusers, whose float32 results depend on it; in float64 the order does
not show once a row is rounded to float32.

A function returns columns of :class:`~dd_kernels.ops.reverse_step.table.StepTable` by name, [S] or a number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..ops.reverse_step.table import DynamicThreshold
from ..schedules import Schedule, posterior_mean_coefficients, posterior_variance

PREDICTIONS = ("epsilon", "x_start", "v")
VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range")

Array = Any  # np.ndarray or Tensor [S]; the operators of both do the same
Columns = dict[str, Any]


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raises ``ValueError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def check_signal(prediction: str, alpha_bar: np.ndarray, clip: object) -> None:
    """Raises ``ValueError`` where x_0 would be 0 / 0: of epsilon alone, at zero SNR, with nothing to clip it.

    Lin et al. (2023), "Common diffusion noise schedules and sample steps are flawed", section 3.2: a model of epsilon
    says nothing there, and has to predict v instead.
    """
    if prediction == "epsilon" and clip is None and np.any(alpha_bar == 0):
        raise ValueError(
            "prediction must be 'v' or 'x_start', or x_0 be clipped, at a timestep with alpha_bar 0 (zero SNR), where "
            "epsilon says nothing of x_0; got 'epsilon' and clip=None"
        )


def _log(x: Array) -> Array:
    return torch.log(x) if isinstance(x, Tensor) else np.log(x)


class Transition(NamedTuple):
    """Steps of a process from alpha_bar_prev to alpha_bar: alpha = alpha_bar / alpha_bar_prev, beta = 1 - alpha."""

    alpha: Array
    beta: Array
    alpha_bar: Array
    alpha_bar_prev: Array

    @classmethod
    def of(cls, schedule: Schedule) -> Transition:
        """All T steps of a schedule."""
        return cls(schedule.alpha, schedule.beta, schedule.alpha_bar, schedule.alpha_bar_prev)

    @classmethod
    def between(cls, alpha_bar: Array, alpha_bar_prev: Array) -> Transition:
        """Steps between two noise levels that need not be adjacent (Nichol & Dhariwal, 2021, eq. 19)."""
        alpha = alpha_bar / alpha_bar_prev
        return cls(alpha, 1 - alpha, alpha_bar, alpha_bar_prev)


class Epsilon(NamedTuple):
    """epsilon = from_x0 * x_0 + from_x * x_t + from_out * out."""

    from_x0: Array
    from_x: Array
    from_out: Array


GIVEN_EPSILON = Epsilon(0.0, 0.0, 1.0)


def epsilon_of_x0(alpha_bar: Array) -> Epsilon:
    r"""epsilon = (x_t - \sqrt{\bar\alpha} x_0) / \sqrt{1 - \bar\alpha}, eq. 4 of DDPM solved for it."""
    signal, noise = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    return Epsilon(-signal / noise, 1 / noise, 0.0)


def epsilon_of_output(prediction: str, alpha_bar: Array) -> Epsilon:
    r"""epsilon of x_t and the output; v is \sqrt{\bar\alpha} \epsilon - \sqrt{1 - \bar\alpha} x_0."""
    if prediction == "epsilon":
        return GIVEN_EPSILON
    if prediction == "x_start":
        of_x0 = epsilon_of_x0(alpha_bar)
        return Epsilon(0.0, of_x0.from_x, of_x0.from_x0)
    return Epsilon(0.0, (1 - alpha_bar) ** 0.5, alpha_bar**0.5)


def x0_of_epsilon(alpha_bar: Array, epsilon: Epsilon) -> Columns:
    r"""x_0 = (x_t - \sqrt{1 - \bar\alpha} \epsilon) / \sqrt{\bar\alpha}, eq. 4 of DDPM solved for it."""
    noise = (1 - alpha_bar) ** 0.5
    return {
        "x0_num_x": 1 - noise * epsilon.from_x,
        "x0_num_out": -noise * epsilon.from_out,
        "x0_den": alpha_bar**0.5,
    }


def x0_columns(prediction: str, alpha_bar: Array) -> Columns:
    r"""x_0 of x_t and the output: epsilon (eq. 15 of DDPM), x_start, or v (Salimans & Ho, 2022, appendix D)."""
    return x0_at(prediction, Level.of_alpha_bar(alpha_bar))


def x0_at(prediction: str, level: Level) -> Columns:
    """:func:`x0_columns` at any level; the output's v is signal * epsilon - noise * x_0."""
    if prediction == "x_start":
        return {"x0_num_out": 1.0}
    if prediction == "v":
        return {"x0_num_x": level.signal, "x0_num_out": -level.noise}
    return {"x0_num_x": 1.0, "x0_num_out": -level.noise, "x0_den": level.signal}


def x0_of_mean(step: Transition) -> Columns:
    """x_0 where the output is the mean of q(x_{t-1} | x_t, x_0): eq. 7 of DDPM solved for x_0."""
    from_x0, from_x = posterior_mean_coefficients(*step)
    return {"x0_num_x": -from_x, "x0_num_out": 1.0, "x0_den": from_x0}


def posterior_columns(step: Transition) -> Columns:
    """The mean of q(x_{t-1} | x_t, x_0), eq. 7 of DDPM."""
    from_x0, from_x = posterior_mean_coefficients(*step)
    return {"prev_from_x0": from_x0, "prev_from_x": from_x}


def variance_columns(kind: str, variance: Array, beta: Array, draws: Array) -> Columns:
    """The noise of DDPM's step: sigma, and the range of the log-variance where the model learns it.

    Args:
        kind: "fixed_small" (``variance``), "fixed_large" (``beta``), "learned_range" (between their logarithms,
            Nichol & Dhariwal, 2021, eq. 15) or "learned" (the output is the log-variance).
        variance: the posterior's, eq. 7 of DDPM, above 0 where it is learned.
        draws: booleans [S], whether a step adds noise.
    """
    if kind == "learned":
        # The model's value v enters as low + (v + 1) / 2 (high - low), which is v itself for -1 and 1.
        return {"sigma": 1.0 * draws, "log_var_min": -1.0, "log_var_max": 1.0}
    if kind == "learned_range":
        return {"sigma": 1.0 * draws, "log_var_min": _log(variance), "log_var_max": _log(beta)}
    return {"sigma": (beta if kind == "fixed_large" else variance) ** 0.5 * draws}


def ddim_sigma(alpha_bar: Array, alpha_bar_prev: Array, eta: float) -> Array:
    r"""\sigma = \eta \sqrt{(1 - \bar\alpha_{prev}) / (1 - \bar\alpha)} \sqrt{1 - \bar\alpha / \bar\alpha_{prev}}.

    Eq. 16 of DDIM: \eta times the posterior's standard deviation. Rounding, or an alpha_bar_prev below alpha_bar, can
    bring the variance below 0, which counts as 0.
    """
    step = Transition.between(alpha_bar, alpha_bar_prev)
    return eta * posterior_variance(*step).clip(min=0.0) ** 0.5


def ddim_columns(alpha_bar_prev: Array, epsilon: Epsilon, sigma: Array = 0.0) -> Columns:
    r"""\sqrt{\bar\alpha_{prev}} x_0 + \sqrt{1 - \bar\alpha_{prev} - \sigma^2} \epsilon + \sigma z, eq. 12 of DDIM.

    A direction whose square is below 0 (by rounding, or with eta above 1) counts as 0. With an alpha_bar_prev
    below alpha_bar and sigma = 0 it is the step of DDIM's inversion.
    """
    direction = (1 - alpha_bar_prev - sigma**2).clip(min=0.0) ** 0.5
    return {
        "prev_from_x0": alpha_bar_prev**0.5 + direction * epsilon.from_x0,
        "prev_from_x": direction * epsilon.from_x,
        "prev_from_out": direction * epsilon.from_out,
        "sigma": sigma,
    }


def ode_columns(alpha_bar: Array, alpha_bar_next: Array) -> Columns:
    r"""Euler's step of DDIM's ODE, eq. 13 of DDIM, with the output epsilon.

    .. math:: x_{next} / \sqrt{\bar\alpha_{next}} = x / \sqrt{\bar\alpha} + (s_{next} - s)\, \epsilon,
        \qquad s = \sqrt{1 / \bar\alpha - 1}
    """
    slope = (1 / alpha_bar_next - 1) ** 0.5 - (1 / alpha_bar - 1) ** 0.5
    return {"prev_from_x": (alpha_bar_next / alpha_bar) ** 0.5, "prev_from_out": alpha_bar_next**0.5 * slope}


def clip_columns(clip: float | DynamicThreshold | None) -> Columns:
    """How x_0 is clipped: to [-clip, clip], by dynamic thresholding, or not at all."""
    if isinstance(clip, DynamicThreshold):
        return {"threshold": clip}
    if clip is None:
        return {}
    if not clip > 0:
        raise ValueError(f"clip must be a positive number, a DynamicThreshold or None; got {clip!r}")
    return {"x0_clip": float(clip)}


class Level(NamedTuple):
    """Noise levels: x = signal * x_0 + noise * epsilon.

    Diffusion models of DDPM's kind have signal^2 + noise^2 = 1, k-diffusion's a signal of 1, rectified flows
    signal + noise = 1. What follows holds for all of them.
    """

    signal: Array
    noise: Array

    @classmethod
    def of_alpha_bar(cls, alpha_bar: Array) -> Level:
        r"""\sqrt{\bar\alpha} and \sqrt{1 - \bar\alpha}, eq. 4 of DDPM."""
        return cls(alpha_bar**0.5, (1 - alpha_bar) ** 0.5)

    @classmethod
    def of_flow(cls, sigma: Array) -> Level:
        """1 - sigma and sigma: x on the straight line from x_0 to epsilon (Liu et al., 2022, eq. 1)."""
        return cls(1 - sigma, sigma)


def line_columns(level: Level, after: Level) -> Columns:
    r"""x on the straight line of Euler's step in x / signal: first order, without noise.

    .. math:: x_t = \frac{\sigma_t}{\sigma_s} x_s + \left(\alpha_t - \frac{\sigma_t}{\sigma_s} \alpha_s\right) x_0

    Eq. 12 of DDIM with sigma = 0, eq. 9 of DPM-Solver++ (Lu et al., 2022b), and Euler's step of eq. 4 of Karras et al.
    (2022).
    """
    ratio = after.noise / level.noise
    return {"prev_from_x0": after.signal - ratio * level.signal, "prev_from_x": ratio}


def ancestral_columns(level: Level, after: Level, eta: float = 1.0) -> Columns:
    r"""Euler's step to less noise than wanted, and fresh noise on top, as k-diffusion's ``euler_ancestral``.

    With s = noise / signal of both levels:

    .. math:: s_{up} = \eta\, s_t \sqrt{1 - s_t^2 / s_s^2}, \qquad s_{down} = \sqrt{s_t^2 - s_{up}^2}

    eta = 1 is the posterior of DDPM's eq. 7.
    """
    ratio = after.noise * level.signal / (after.signal * level.noise)
    up = after.noise * eta * (1 - ratio**2).clip(min=0.0) ** 0.5
    down = (after.noise**2 - up**2).clip(min=0.0) ** 0.5
    return line_columns(level, Level(after.signal, down)) | {"sigma": up}


def correction_columns(level: Level, after: Level) -> Columns:
    r"""Heun's second half of a step: from the end of Euler's step, where the model has been asked again.

    Euler's step ran along the slope (x_s - x_0^{last}) / s_s, which is that from its own end too. So the
    trapezoidal rule of Karras et al. (2022), algorithm 1, needs x_0 of both calls, and no x of before the step:

    .. math:: x_t \leftarrow x_t + \alpha_t \frac{s_s - s_t}{2 s_t} (x_0 - x_0^{last}), \qquad s = \sigma / \alpha
    """
    weight = after.signal * (level.noise * after.signal / (level.signal * after.noise) - 1) / 2
    return {"prev_from_x0": weight, "prev_from_x": 1.0, "prev_from_last": -weight}


def boundary_weights(time: Array, sigma_data: float, scaling: float) -> tuple[Array, Array]:
    r"""The boundary condition of a consistency model, eq. 5 of Luo et al. (2023): f = c_{skip} x_t + c_{out} x_0.

    .. math:: c_{skip} = \frac{d^2}{\tau^2 + d^2}, \qquad c_{out} = \frac{\tau}{\sqrt{\tau^2 + d^2}}

    where tau is ``scaling`` times the timestep and d is ``sigma_data``.
    """
    tau = time * scaling
    return sigma_data**2 / (tau**2 + sigma_data**2), tau / (tau**2 + sigma_data**2) ** 0.5


def consistency_columns(time: Array, after: Level, sigma_data: float, scaling: float, draws: Array) -> Columns:
    r"""A step of a consistency model, algorithm 2 of latent consistency models (Luo et al., 2023).

    .. math:: x \leftarrow \alpha f + \sigma z

    with f of :func:`boundary_weights`; the last step, which does not draw, gives f.
    """
    skip, out = boundary_weights(time, sigma_data, scaling)
    draws = 1.0 * draws
    signal = after.signal * draws + (1.0 - draws)
    return {"prev_from_x0": signal * out, "prev_from_x": signal * skip, "sigma": after.noise * draws}


def flow_columns(sigma: Array, sigma_next: Array) -> Columns:
    """Euler's step of a rectified flow (Liu et al., 2022, eq. 1), the output being epsilon - x_0.

    x_0 = x - sigma out plays no part in it.
    """
    return {"x0_num_x": 1.0, "x0_num_out": -sigma, "prev_from_x": 1.0, "prev_from_out": sigma_next - sigma}


def renoised_columns(after: Level) -> Columns:
    """x_0 with fresh noise, at the level where the step ends."""
    return {"prev_from_x0": after.signal, "prev_from_x": 0.0, "prev_from_out": 0.0, "sigma": after.noise}
