"""The rows of diffusers' schedulers, from their alphas_cumprod by float32 operations in their order.

Their tests pin the float32 arithmetic (float64 tables end a noisy DDPM loop 0.02 away), so unlike
:mod:`dd_kernels.samplers` nothing here is float64 before it is a row. Arguments are float32 tensors [S].
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...ops.reverse_step.table import COLUMNS, DeviceTable, DynamicThreshold, StepTable, from_columns
from ...schedules import MarginalTable

Columns = dict[str, "Tensor | float"]


def x0_columns(prediction: str, alpha_bar: Tensor) -> Columns:
    """x_0 of x_t and the output; a ValueError for an unknown ``prediction_type``."""
    signal, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    if prediction == "epsilon":
        return {"x0_num_x": 1.0, "x0_num_out": -sigma, "x0_den": signal}
    if prediction == "sample":
        return {"x0_num_out": 1.0}
    if prediction == "v_prediction":
        return {"x0_num_x": signal, "x0_num_out": -sigma}
    raise ValueError(f"prediction_type must be one of epsilon, sample, v_prediction; got {prediction!r}")


class Coefficients(NamedTuple):
    """The process that a row's step takes: its timestep, alpha_bar at and before it, and alpha and beta of the step."""

    timestep: Tensor
    alpha_bar: Tensor
    alpha_bar_prev: Tensor
    alpha: Tensor
    beta: Tensor


def variance_columns(kind: str, variance: Tensor, beta: Tensor) -> Columns:
    """sigma, or the range of the log-variance, of a ``variance_type``; ``variance`` is the posterior's.

    diffusers' fixed_large_log is NaN (it takes the root of a logarithm); here it is what the name says.
    An unknown kind acts as fixed_small, as theirs does.
    """
    if kind == "learned":
        # Half-way between -1 and 1 by (v + 1) / 2 is v itself: the log-variance as it is given.
        return {"sigma": 1.0, "log_var_min": -1.0, "log_var_max": 1.0}
    if kind == "learned_range":
        return {"sigma": 1.0, "log_var_min": torch.log(variance), "log_var_max": torch.log(beta)}
    if kind.startswith("fixed_large"):
        variance = beta
    return {"sigma": torch.exp(0.5 * torch.log(variance)) if kind.endswith("_log") else variance**0.5}


def posterior_columns(c: Coefficients, prediction: str, variance_type: str, draws: bool) -> Columns:
    """DDPM's step, eq. 7 of Ho et al. (2020); without noise at timestep 0, or anywhere if not ``draws``."""
    columns = x0_columns(prediction, c.alpha_bar)
    columns["prev_from_x0"] = (c.alpha_bar_prev**0.5 * c.beta) / (1 - c.alpha_bar)
    columns["prev_from_x"] = c.alpha**0.5 * (1 - c.alpha_bar_prev) / (1 - c.alpha_bar)
    if draws:
        variance = (1 - c.alpha_bar_prev) / (1 - c.alpha_bar) * c.beta
        columns |= variance_columns(variance_type, torch.clamp(variance, min=1e-20), c.beta)
        columns["sigma"] = torch.where(c.timestep > 0, columns["sigma"], 0.0)
    return columns


def posterior_table(
    c: Coefficients,
    prediction: str,
    clip: tuple | None,
    variance_type: str,
    learned: bool,
    draws: bool,
    known: Tensor | None = None,
) -> StepTable:
    """The table of :func:`posterior_columns`."""
    return as_table(posterior_columns(c, prediction, variance_type, draws), clip, learned, known)


class Process:
    """The process of UnCLIP, whose steps go from any timestep to any before it."""

    def __init__(self, *columns: Tensor) -> None:
        """Of alpha_bar, alpha and beta [T]; here with alpha_bar = 1 before, and NaN after them."""
        values = torch.stack(columns, dim=1)
        self.values = torch.cat((values.new_ones(1, 3), values, values.new_full((1, 3), torch.nan)))
        self._on: dict[torch.device, Process] = {}

    def on(self, device: torch.device) -> Process:
        """The process on ``device``, uploaded at the first call."""
        if device not in self._on:
            self._on[device] = copy.copy(self)
            self._on[device].values = self.values.to(device)
        return self._on[device]

    def step(self, t: Tensor, prev: Tensor) -> Coefficients:
        """The step from t to prev, both [S]; by their order of operations."""
        last = len(self.values) - 1
        alpha_bar, alpha, beta = self.values[(t + 1).clamp(0, last)].unbind(1)
        alpha_bar_prev = self.values[(prev + 1).clamp(0, last), 0]
        adjacent = prev == t - 1
        beta = torch.where(adjacent, beta, 1 - alpha_bar / alpha_bar_prev)
        return Coefficients(t, alpha_bar, alpha_bar_prev, torch.where(adjacent, alpha, 1 - beta), beta)


class PairTable:
    """Rows that are computed on the device, in the place of a StepTable, as reverse_step reads it."""

    threshold = None

    def __init__(
        self,
        process: Process,
        timestep: int | Tensor,
        prev: int | Tensor,
        prediction: str,
        clip: tuple | None,
        variance_type: str,
        learned: bool,
        draws: bool,
    ) -> None:
        device = process.values.device
        pair = (t if isinstance(t, Tensor) else torch.full((), t, device=device) for t in (timestep, prev))
        t, prev = torch.broadcast_tensors(*(t.to(device, torch.int64).reshape(-1) for t in pair))
        columns = posterior_columns(process.step(t, prev), prediction, variance_type, draws)
        columns |= {} if clip is None else {"x0_clip": clip[1]}
        values = ({"x0_den": 1.0, "x0_clip": torch.inf} | columns).get
        full = (values(name, 0.0) for name in COLUMNS)
        full = (v if isinstance(v, Tensor) else torch.full(t.shape, v, device=device) for v in full)
        self.rows = torch.stack(list(full), dim=1)
        self.index = torch.arange(len(t), device=device)
        self.timesteps, self.learned_variance, self.stochastic = t, learned, draws

    def on(self, device: torch.device) -> DeviceTable:
        """The rows, which are on ``device``."""
        return DeviceTable(self.rows, self.timesteps, self.timesteps)


def epsilon_columns(prediction: str, alpha_bar: Tensor, clipped: bool) -> Columns:
    """epsilon = from_x0 * x_0 + from_x * x_t + from_out * out; ``clipped``: re-derived from the clipped x_0."""
    signal, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    zero = torch.zeros_like(alpha_bar)
    if clipped:
        return {"from_x0": -signal / sigma, "from_x": 1 / sigma, "from_out": zero}
    return {
        "epsilon": {"from_x0": zero, "from_x": zero, "from_out": torch.ones_like(alpha_bar)},
        "sample": {"from_x0": zero, "from_x": 1 / sigma, "from_out": -signal / sigma},
        "v_prediction": {"from_x0": zero, "from_x": sigma, "from_out": signal},
    }[prediction]


def ddim_columns(
    prediction: str, alpha_bar: Tensor, alpha_bar_prev: Tensor, eta: float, use_clipped_model_output: bool
) -> Columns:
    """DDIM (Song et al., 2021), eq. 12 with sigma of eq. 16."""
    x0 = x0_columns(prediction, alpha_bar)
    variance = ((1 - alpha_bar_prev) / (1 - alpha_bar)) * (1 - alpha_bar / alpha_bar_prev)
    # Rounding, an odd final_alpha_cumprod or an eta above 1 can bring either below 0, where theirs is NaN.
    sigma = eta * torch.clamp(variance, min=0.0) ** 0.5
    direction = torch.clamp(1 - alpha_bar_prev - sigma**2, min=0.0) ** 0.5
    epsilon = epsilon_columns(prediction, alpha_bar, use_clipped_model_output)
    return {
        **x0,
        "prev_from_x0": alpha_bar_prev**0.5 + direction * epsilon["from_x0"],
        "prev_from_x": direction * epsilon["from_x"],
        "prev_from_out": direction * epsilon["from_out"],
        "sigma": sigma if eta > 0 else 0.0,
    }


def ddim_inverse_columns(prediction: str, alpha_bar: Tensor, alpha_bar_next: Tensor) -> Columns:
    """DDIM backwards, from alpha_bar to alpha_bar_next.

    At alpha_bar = 1 there is no epsilon in x_0 itself (theirs divides by 0 there for "sample"): then
    it is read at alpha_bar_next, the noise level that the model was asked at.
    """
    x0 = x0_columns(prediction, alpha_bar)
    level = torch.where(alpha_bar < 1, alpha_bar, alpha_bar_next) if prediction == "sample" else alpha_bar
    epsilon = epsilon_columns(prediction, level, clipped=False)
    direction = (1 - alpha_bar_next) ** 0.5
    return {
        **x0,
        "prev_from_x0": alpha_bar_next**0.5,
        "prev_from_x": direction * epsilon["from_x"],
        "prev_from_out": direction * epsilon["from_out"],
    }


class Threshold(DynamicThreshold):
    """As diffusers clamps: a max_value below 1 wins over 1."""

    def __post_init__(self) -> None:
        pass


def as_table(
    columns: Mapping[str, Tensor | float], clip: tuple | None, learned_variance: bool, known: Tensor | None = None
) -> StepTable:
    """The table of these columns, with rows of NaN where not ``known``.

    ``clip`` is None, ("clip", range) or ("threshold", ratio, max_value).
    """
    arrays = {k: v.double().numpy() if isinstance(v, Tensor) else v for k, v in columns.items()}
    threshold = None
    if clip is not None and clip[0] == "threshold":
        threshold = Threshold(*clip[1:])
    elif clip is not None:
        arrays["x0_clip"] = clip[1]
    steps = next(len(v) for v in arrays.values() if isinstance(v, np.ndarray))
    table = from_columns(np.arange(steps), learned_variance=learned_variance, threshold=threshold, **arrays)
    if known is not None:
        table.rows[~known] = torch.nan
    return table


class Marginal:
    """sqrt(alpha_bar) and +-sqrt(1 - alpha_bar), in the place of a Schedule, as q_sample reads it."""

    def __init__(self, alpha_bar: Tensor, sign: float) -> None:
        self.marginal = torch.stack((alpha_bar**0.5, sign * (1 - alpha_bar) ** 0.5), dim=1).double()
        self._on: dict[torch.device, MarginalTable] = {}

    def on(self, device: torch.device) -> MarginalTable:
        """The coefficients on ``device``, uploaded at the first call."""
        if device not in self._on:
            steps = torch.arange(len(self.marginal), device=device).split(1)
            self._on[device] = MarginalTable(self.marginal.to(device, torch.float32), steps)
        return self._on[device]
