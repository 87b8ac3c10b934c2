r"""Noise schedules: the only home of beta, alpha and alpha_bar, all in float64.

In the notation of DDPM (Ho et al., 2020), with t = 0 .. T-1:

.. math:: \alpha_t = 1 - \beta_t, \qquad \bar\alpha_t = \prod_{s \le t} \alpha_s, \qquad \bar\alpha_{-1} = 1
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .ops.q_sample.table import MarginalTable
from .ops.upload import real


class Gaussian(NamedTuple):
    """Mean, variance and log-variance of a Gaussian; shapes broadcast against the samples."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor


def posterior_mean_coefficients(alpha: Any, beta: Any, alpha_bar: Any, alpha_bar_prev: Any) -> tuple[Any, Any]:
    r"""Factors of x_0 and x_t in the mean of q(x_{t-1} | x_t, x_0), eq. 7 of DDPM; of arrays or tensors.

    .. math:: \sqrt{\bar\alpha_{t-1}} \beta_t / (1 - \bar\alpha_t), \qquad
        \sqrt{\alpha_t} (1 - \bar\alpha_{t-1}) / (1 - \bar\alpha_t)
    """
    remaining = 1 - alpha_bar
    return alpha_bar_prev**0.5 * beta / remaining, alpha**0.5 * (1 - alpha_bar_prev) / remaining


def posterior_variance(alpha: Any, beta: Any, alpha_bar: Any, alpha_bar_prev: Any) -> Any:
    r"""\tilde\beta_t = (1 - \bar\alpha_{t-1}) / (1 - \bar\alpha_t) \beta_t, eq. 7 of DDPM; of arrays or tensors."""
    return (1 - alpha_bar_prev) / (1 - alpha_bar) * beta


class Schedule(MarginalTable):
    r"""The forward process q of a diffusion model with T steps.

    Args:
        betas: [T] variances of the single steps, each in (0, 1]; 1 (a step to pure noise) only at the end.

    Attributes:
        beta, alpha, alpha_bar, alpha_bar_prev: float64 arrays [T]; alpha_bar_prev[0] is 1.
        marginal: float64 tensor [T, 2] of \sqrt{\bar\alpha_t} and \sqrt{1 - \bar\alpha_t}.

    Raises:
        ValueError: betas is empty, not one-dimensional, not finite or out of range.
    """

    def __init__(self, betas: Sequence[float] | np.ndarray | Tensor) -> None:
        beta = np.array(betas, dtype=np.float64)
        if beta.ndim != 1 or beta.size == 0:
            raise ValueError(f"betas must be a sequence of at least one number; got the shape {list(beta.shape)}")
        if not np.all(np.isfinite(beta)) or beta.min() <= 0 or beta.max() > 1:
            raise ValueError(f"betas must lie in (0, 1]; got values from {beta.min()} to {beta.max()}")
        if np.any(beta[:-1] == 1):
            raise ValueError(f"betas may be 1 only at the last step; got 1 at step {int(np.argmax(beta == 1))}")
        self.beta = beta
        self.alpha = 1.0 - beta
        self.alpha_bar = np.cumprod(self.alpha)
        self.alpha_bar_prev = np.append(1.0, self.alpha_bar[:-1])
        stays = self.alpha_bar >= self.alpha_bar_prev
        if stays.any():
            t = int(np.argmax(stays))
            raise ValueError(
                f"betas must make alpha_bar smaller at every step, in float64; got {beta[t]} at step {t}, where "
                f"alpha_bar stays {self.alpha_bar[t]}"
            )
        for array in (self.beta, self.alpha, self.alpha_bar, self.alpha_bar_prev):
            array.flags.writeable = False
        marginal = np.stack((np.sqrt(self.alpha_bar), np.sqrt(1.0 - self.alpha_bar)), axis=1)
        super().__init__(real(lambda: torch.from_numpy(marginal)))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.beta,)

    def __repr__(self) -> str:
        return (
            f"Schedule(T={len(self)}, beta={self.beta[0]:.3g}..{self.beta[-1]:.3g}, alpha_bar={self.alpha_bar[-1]:.3g})"
        )

    @cached_property
    def posterior_variance(self) -> np.ndarray:
        r"""\tilde\beta_t = \beta_t (1 - \bar\alpha_{t-1}) / (1 - \bar\alpha_t), eq. 7 of DDPM; 0 at t = 0."""
        return posterior_variance(self.alpha, self.beta, self.alpha_bar, self.alpha_bar_prev)

    @cached_property
    def posterior_variance_clipped(self) -> np.ndarray:
        """The posterior variance, its first value (0) replaced by the second, or by beta where there is none."""
        variance = self.posterior_variance
        return np.append(variance[1], variance[1:]) if len(variance) > 1 else self.beta

    @cached_property
    def posterior_log_variance_clipped(self) -> np.ndarray:
        """log of :attr:`posterior_variance_clipped`."""
        return np.log(self.posterior_variance_clipped)

    @cached_property
    def _posterior_mean_coefficients(self) -> tuple[np.ndarray, np.ndarray]:
        return posterior_mean_coefficients(self.alpha, self.beta, self.alpha_bar, self.alpha_bar_prev)

    @cached_property
    def posterior_mean_coef_x_start(self) -> np.ndarray:
        r"""\sqrt{\bar\alpha_{t-1}} \beta_t / (1 - \bar\alpha_t), eq. 7 of DDPM."""
        return self._posterior_mean_coefficients[0]

    @cached_property
    def posterior_mean_coef_x_t(self) -> np.ndarray:
        r"""\sqrt{\alpha_t} (1 - \bar\alpha_{t-1}) / (1 - \bar\alpha_t), eq. 7 of DDPM."""
        return self._posterior_mean_coefficients[1]

    @cached_property
    def snr(self) -> np.ndarray:
        r"""Signal-to-noise ratio \bar\alpha_t / (1 - \bar\alpha_t), float64 [T]."""
        return self.alpha_bar / (1.0 - self.alpha_bar)

    def gather(self, values: np.ndarray, t: Tensor, like: Tensor) -> Tensor:
        """values[t] as [N, 1, ...] in ``like``'s float dtype (at least float32), to multiply ``like``."""
        check_timesteps("t", t, len(self), like.shape[0])
        dtype = torch.promote_types(like.dtype, torch.float32)
        picked = torch.tensor(values).to(like.device)[t]
        return picked.to(dtype).reshape(-1, *[1] * (like.ndim - 1))

    def _gaussian(self, mean: Tensor, variance: np.ndarray, log_variance: np.ndarray, t: Tensor) -> Gaussian:
        return Gaussian(mean, self.gather(variance, t, mean), self.gather(log_variance, t, mean))

    def q_step(self, x_prev: Tensor, t: Tensor) -> Gaussian:
        r"""One step q(x_t | x_{t-1}) = N(\sqrt{1 - \beta_t} x_{t-1}, \beta_t I), eq. 2 of DDPM; t is [N]."""
        mean = self.gather(np.sqrt(self.alpha), t, x_prev) * x_prev
        return self._gaussian(mean, self.beta, np.log(self.beta), t)

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> Gaussian:
        r"""Marginal q(x_t | x_0) = N(\sqrt{\bar\alpha_t} x_0, (1 - \bar\alpha_t) I), eq. 4 of DDPM; t is [N]."""
        mean = self.gather(np.sqrt(self.alpha_bar), t, x_start) * x_start
        return self._gaussian(mean, 1.0 - self.alpha_bar, np.log(1.0 - self.alpha_bar), t)

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> Gaussian:
        """Posterior q(x_{t-1} | x_t, x_0), eq. 6 and 7 of DDPM; t is [N]; the log-variance is clipped at t = 0."""
        mean = (
            self.gather(self.posterior_mean_coef_x_start, t, x_t) * x_start
            + self.gather(self.posterior_mean_coef_x_t, t, x_t) * x_t
        )
        return self._gaussian(mean, self.posterior_variance, self.posterior_log_variance_clipped, t)


def check_timesteps(name: str, t: Tensor, num_timesteps: int, batch: int) -> None:
    """Raises unless ``t`` is an integer tensor [batch] (or [1]) of timesteps; values on an accelerator are not read."""
    if not isinstance(t, Tensor) or t.dtype not in (torch.int64, torch.int32):
        kind = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"{name} must be an integer tensor; got {kind}")
    if t.ndim != 1 or t.numel() not in (1, batch):
        raise ValueError(f"{name} must have the shape [{batch}], one timestep per sample; got {list(t.shape)}")
    if t.device.type == "cpu" and t.numel() and not (int(t.min()) >= 0 and int(t.max()) < num_timesteps):
        raise ValueError(f"{name} must be in [0, {num_timesteps}); got {int(t.min())} to {int(t.max())}")


def _check_count(num_timesteps: int) -> None:
    if isinstance(num_timesteps, bool) or not isinstance(num_timesteps, int):
        raise TypeError(f"num_timesteps must be an int; got {type(num_timesteps).__name__}")
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps must be at least 1; got {num_timesteps}")


def _check_range(beta_start: float, beta_end: float) -> None:
    if not 0 < beta_start <= beta_end < 1:
        raise ValueError(f"beta_start and beta_end must satisfy 0 < start <= end < 1; got {beta_start} and {beta_end}")


def linear_schedule(num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """beta from ``beta_start`` to ``beta_end`` in equal steps (DDPM, section 4).

    The defaults are meant for T = 1000; guided-diffusion multiplies both by 1000 / T for another T.
    """
    _check_count(num_timesteps)
    _check_range(beta_start, beta_end)
    return Schedule(np.linspace(beta_start, beta_end, num_timesteps, dtype=np.float64))


def scaled_linear_schedule(num_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> Schedule:
    """sqrt(beta) in equal steps (latent diffusion, Rombach et al., 2022); the defaults are Stable Diffusion's."""
    _check_count(num_timesteps)
    _check_range(beta_start, beta_end)
    return Schedule(np.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=np.float64) ** 2)


def sigmoid_schedule(num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """beta along a sigmoid over [-6, 6] (GeoDiff, Xu et al., 2022)."""
    _check_count(num_timesteps)
    _check_range(beta_start, beta_end)
    x = np.linspace(-6.0, 6.0, num_timesteps, dtype=np.float64)
    return Schedule((beta_end - beta_start) / (1.0 + np.exp(-x)) + beta_start)


def from_alpha_bar_function(
    num_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999
) -> Schedule:
    """beta_t = min(1 - alpha_bar((t + 1) / T) / alpha_bar(t / T), max_beta) of a function on [0, 1]."""
    _check_count(num_timesteps)
    if not 0 < max_beta <= 1:
        raise ValueError(f"max_beta must lie in (0, 1]; got {max_beta}")
    values = [alpha_bar(t / num_timesteps) for t in range(num_timesteps + 1)]
    return Schedule([min(1 - after / before, max_beta) for before, after in pairwise(values)])


def sigmoid_alpha_bar_schedule(
    num_timesteps: int = 1000, start: float = -3.0, end: float = 3.0, tau: float = 1.0, max_beta: float = 0.999
) -> Schedule:
    r"""\bar\alpha along a sigmoid (Jabri et al., 2022, arXiv 2212.11972, algorithm 1), lucidrains' "sigmoid".

    .. math:: \bar\alpha(u) = \frac{\sigma(end / \tau) - \sigma((start + u (end - start)) / \tau)}
        {\sigma(end / \tau) - \sigma(start / \tau)}
    """
    if not (start < end and tau > 0):
        raise ValueError(f"start, end and tau must satisfy start < end and tau > 0; got {start}, {end} and {tau}")

    def sigmoid(x: float) -> float:
        return 1.0 / (1.0 + math.exp(-x / tau))

    span = sigmoid(end) - sigmoid(start)
    return from_alpha_bar_function(
        num_timesteps, lambda u: (sigmoid(end) - sigmoid(start + u * (end - start))) / span, max_beta
    )


def _squared_cosine(s: float) -> Callable[[float], float]:
    return lambda u: math.cos((u + s) / (1 + s) * math.pi / 2) ** 2


def cosine_schedule(num_timesteps: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> Schedule:
    r"""\bar\alpha along a squared cosine, eq. 17 of Improved DDPM (Nichol & Dhariwal, 2021)."""
    return from_alpha_bar_function(num_timesteps, _squared_cosine(s), max_beta)


def squaredcos_cap_v2_schedule(num_timesteps: int = 1000) -> Schedule:
    """The squared cosine as diffusers has it under this name: betas of :func:`cosine_schedule` rounded to float32."""
    return Schedule(cosine_schedule(num_timesteps).beta.astype(np.float32))


def from_betas(betas: Sequence[float] | np.ndarray | Tensor) -> Schedule:
    """A schedule of given betas [T]."""
    return Schedule(betas)


def from_alpha_bars(alpha_bars: Sequence[float] | np.ndarray | Tensor) -> Schedule:
    """A schedule of given alpha_bars [T], strictly decreasing in [0, 1), 0 only at the end."""
    alpha_bar = np.array(alpha_bars, dtype=np.float64)
    if alpha_bar.ndim != 1 or alpha_bar.size == 0:
        raise ValueError(f"alpha_bars must be a sequence of at least one number; got the shape {list(alpha_bar.shape)}")
    before = np.append(1.0, alpha_bar[:-1])
    if not (np.all(np.isfinite(alpha_bar)) and np.all(alpha_bar < before) and alpha_bar[-1] >= 0):
        raise ValueError("alpha_bars must decrease strictly within [0, 1), 0 only at the end; got other values")
    return Schedule(1.0 - alpha_bar / before)


def rescale_zero_terminal_snr(schedule: Schedule) -> Schedule:
    """The schedule with alpha_bar_{T-1} = 0, sqrt(alpha_bar) shifted and scaled: algorithm 1 of Lin et al. (2023)."""
    if len(schedule) < 2:
        raise ValueError(f"schedule must have at least 2 timesteps to be rescaled; got {len(schedule)}")
    root = np.sqrt(schedule.alpha_bar)
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return from_alpha_bars(root**2)


SCHEDULES: dict[str, Callable[[int], Schedule]] = {
    "linear": linear_schedule,
    "scaled_linear": scaled_linear_schedule,
    "cosine": cosine_schedule,
    "squaredcos_cap_v2": squaredcos_cap_v2_schedule,
    "sigmoid": sigmoid_schedule,
    "sigmoid_alpha_bar": sigmoid_alpha_bar_schedule,
}


def named_schedule(name: str, num_timesteps: int = 1000) -> Schedule:
    """The schedule of that name with its default range; the names are the keys of ``SCHEDULES``."""
    if name not in SCHEDULES:
        raise ValueError(f"name must be one of {', '.join(SCHEDULES)}; got {name!r}")
    return SCHEDULES[name](num_timesteps)
