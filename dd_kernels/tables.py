r"""A sampler is a table: DDPM, DDIM, inversion and every parameterisation as rows of one update.

.. math::
    x_0 &= clip\big((x0\_num\_x\, x_t + x0\_num\_out\, out) / x0\_den\big) \\
    x_{prev} &= prev\_from\_x0\, x_0 + prev\_from\_x\, x_t + prev\_from\_out\, out + \sigma z

The coefficients are computed here in float64 and read by :func:`dd_kernels.reverse_step` in float32.
Numerator and denominator of x_0 stay apart: at a step with alpha_bar = 0 (zero terminal SNR) the
quotient is +-inf, which clipping makes finite, where folded factors would give inf - inf.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .ops.reverse_step.reference import COLUMNS
from .schedules import Schedule

PREDICTIONS = ("epsilon", "x_start", "v")
VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range")
SPACINGS = ("linspace", "leading", "trailing", "quadratic")


@dataclass(frozen=True)
class DynamicThreshold:
    """Dynamic thresholding of x_0 (Imagen, Saharia et al., 2022, section 2.3).

    Each sample's x_0 is clipped to [-s, s] and divided by s, where s is the ``ratio`` quantile of
    \\|x_0\\|, at least 1 and at most ``max_value``.
    """

    ratio: float = 0.995
    max_value: float = float("inf")

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio must lie in (0, 1]; got {self.ratio}")
        if not self.max_value >= 1:
            raise ValueError(f"max_value must be at least 1; got {self.max_value}")


class DeviceTable(NamedTuple):
    """A table on a device: rows [S, 10] (float32), timesteps [S] and every step's index as a tensor [1]."""

    rows: Tensor
    timesteps: Tensor
    steps: Sequence[Tensor]


@dataclass(frozen=True, eq=False)
class StepTable:
    """The coefficients of a sampler, one row per step, in the order in which steps are taken.

    Attributes:
        rows: [S, 10] float64 on the CPU; the columns are named in ``COLUMNS``.
        timesteps: [S] int64, what the model is called with (and the draw of the step's noise).
        learned_variance: the model's output is [N, 2 C, ...], its second half the variance.
        threshold: dynamic thresholding, or None.
    """

    rows: Tensor
    timesteps: Tensor
    learned_variance: bool = False
    threshold: DynamicThreshold | None = None
    stochastic: bool = field(init=False)
    _on: dict[torch.device, DeviceTable] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.rows.ndim != 2 or self.rows.shape[1] != len(COLUMNS):
            raise ValueError(f"rows must have the shape [S, {len(COLUMNS)}]; got {list(self.rows.shape)}")
        if self.timesteps.shape != self.rows.shape[:1]:
            wanted = list(self.rows.shape[:1])
            raise ValueError(f"timesteps must have the shape {wanted}; got {list(self.timesteps.shape)}")
        object.__setattr__(self, "stochastic", bool((self.column("sigma") != 0).any()))

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> Tensor:
        """One coefficient of every step, [S] float64."""
        return self.rows[:, COLUMNS.index(name)]

    def on(self, device: torch.device) -> DeviceTable:
        """The table on ``device``, uploaded at the first call, or while torch.compile traces it."""
        there = None if torch.compiler.is_compiling() else self._on.get(device)
        if there is None:
            self._upload(device)
            there = self._on[device]
        return there

    @torch.compiler.assume_constant_result
    def _upload(self, device: torch.device) -> None:
        if device not in self._on:
            steps = torch.arange(len(self), device=device).split(1)
            self._on[device] = DeviceTable(self.rows.to(device, torch.float32), self.timesteps.to(device), steps)


def from_columns(
    timesteps: np.ndarray,
    *,
    learned_variance: bool = False,
    threshold: DynamicThreshold | None = None,
    **columns: object,
) -> StepTable:
    """A table from named columns (arrays [S] or numbers); those not named are 0, ``x0_den`` 1, ``x0_clip`` inf."""
    defaults = {"x0_den": 1.0, "x0_clip": np.inf}
    values = [np.broadcast_to(columns.pop(name, defaults.get(name, 0.0)), timesteps.shape) for name in COLUMNS]
    if columns:
        raise TypeError(f"a table has the columns {', '.join(COLUMNS)}; got {', '.join(columns)}")
    rows = torch.from_numpy(np.stack(values, axis=1).astype(np.float64))
    if threshold is not None:
        # There is no quantile of x_0 = +-inf; a finite x_0 as large is clipped to the same.
        rows[:, COLUMNS.index("x0_den")].clamp_(min=2.0**-64)
    steps = torch.tensor(timesteps.tolist(), dtype=torch.int64)
    return StepTable(rows, steps, learned_variance, threshold)


def _choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def timestep_sequence(
    num_timesteps: int,
    steps: int | None = None,
    spacing: str = "leading",
    timesteps: Sequence[int] | None = None,
) -> np.ndarray:
    r"""The timesteps to visit, increasing, int64 [S].

    ``linspace`` is round(i (T-1) / (S-1)), ``leading`` i floor(T/S), ``trailing``
    round((i+1) T/S) - 1, ``quadratic`` floor((i \sqrt{0.8 T} / (S-1))^2) (DDIM, appendix D.2).
    ``timesteps`` names them explicitly instead, in any order.

    Raises:
        ValueError: steps out of [1, T]; two steps on one timestep; an unknown spacing; both or neither.
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
        _choice("spacing", spacing, SPACINGS)
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
    # A single step starts from the noisiest timestep.
    fraction = i / (steps - 1) if steps > 1 else np.ones(1)
    if spacing == "linspace":
        return np.round(fraction * (num_timesteps - 1)).astype(np.int64)
    return ((fraction * np.sqrt(0.8 * num_timesteps)) ** 2).astype(np.int64)


def _x0_columns(prediction: str, alpha_bar: np.ndarray) -> dict[str, object]:
    """x_0 from x_t and the output: epsilon (eq. 15 of DDPM), x_start, or v (eq. of Salimans & Ho, 2022, appendix D)."""
    signal, sigma = np.sqrt(alpha_bar), np.sqrt(1.0 - alpha_bar)
    if prediction == "epsilon":
        return {"x0_num_x": 1.0, "x0_num_out": -sigma, "x0_den": signal}
    if prediction == "x_start":
        return {"x0_num_x": 0.0, "x0_num_out": 1.0}
    return {"x0_num_x": signal, "x0_num_out": -sigma}


def _clip_columns(clip: float | DynamicThreshold | None) -> dict[str, object]:
    if isinstance(clip, DynamicThreshold):
        return {"threshold": clip}
    if clip is None:
        return {}
    if not clip > 0:
        raise ValueError(f"clip must be a positive number, a DynamicThreshold or None; got {clip!r}")
    return {"x0_clip": float(clip)}


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
    _choice("variance", variance, VARIANCES)
    _choice("prediction", prediction, PREDICTIONS)
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
    x0_columns = {k: v if np.isscalar(v) else v[::-1] for k, v in _x0_columns(prediction, alpha_bar).items()}
    return from_columns(
        sequence[::-1],
        prev_from_x0=process.posterior_mean_coef_x_start[::-1],
        prev_from_x=process.posterior_mean_coef_x_t[::-1],
        sigma=sigma[::-1],
        learned_variance=learned,
        **log_variances,
        **x0_columns,
        **_clip_columns(clip),
    )


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
    _choice("prediction", prediction, PREDICTIONS)
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
        **_x0_columns(prediction, alpha_bar),
        **_clip_columns(clip),
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
    _choice("prediction", prediction, PREDICTIONS)
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
