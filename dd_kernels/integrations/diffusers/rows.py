"""The rows of diffusers' schedulers: those of :mod:`dd_kernels.samplers.rows`, of float32 tensors.

Their tests pin the float32 arithmetic (float64 tables end a noisy DDPM loop 0.02 away), so unlike our samplers
nothing here is float64 before it is a row. Arguments are float32 tensors [S].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...ops.q_sample.table import MarginalTable
from ...ops.reverse_step.table import DynamicThreshold, StepTable, from_columns
from ...samplers import rows
from ...samplers.rows import Columns, Transition
from ...schedules import posterior_variance

# prediction_type -> this package's name for it
PREDICTIONS = {"epsilon": "epsilon", "sample": "x_start", "v_prediction": "v"}


def our_prediction(prediction_type: str) -> str:
    """Returns this package's name of a ``prediction_type``; a ValueError for an unknown one."""
    if prediction_type not in PREDICTIONS:
        raise ValueError(f"prediction_type must be one of {', '.join(PREDICTIONS)}; got {prediction_type!r}")
    return PREDICTIONS[prediction_type]


def variance_columns(kind: str, variance: Tensor, beta: Tensor, draws: Tensor) -> Columns:
    """:func:`dd_kernels.samplers.rows.variance_columns` for a ``variance_type``.

    diffusers' fixed_large_log takes the root of a logarithm, which is NaN; here it is beta, as its name says. An
    unknown kind acts as fixed_small, as theirs does.
    """
    if kind.endswith("_log"):
        logarithm = torch.log(beta if kind.startswith("fixed_large") else variance)
        return {"sigma": torch.exp(0.5 * logarithm) * draws}
    return rows.variance_columns(kind, variance, beta, draws)


class AncestralOptions(NamedTuple):
    """What DDPM's rows depend on beside the process.

    Attributes:
        prediction, clip, variance_type: the configuration's; ``clip`` is as in :func:`as_table`.
        learned: the output is [N, 2 C, ...], its second half the variance.
        draws: noise is given; a step of timestep 0 alone has none.
    """

    prediction: str
    clip: tuple | None
    variance_type: str
    learned: bool
    draws: bool


def ancestral_columns(step: Transition, timestep: Tensor, options: AncestralOptions) -> Columns:
    """DDPM's step, eq. 7 of Ho et al. (2020); without noise at timestep 0, or anywhere if not ``draws``."""
    columns = rows.x0_columns(our_prediction(options.prediction), step.alpha_bar) | rows.posterior_columns(step)
    if options.draws:
        variance = posterior_variance(*step).clip(min=1e-20)
        columns |= variance_columns(options.variance_type, variance, step.beta, timestep > 0)
    return columns


def ddim_columns(
    prediction: str, alpha_bar: Tensor, alpha_bar_prev: Tensor, eta: float, use_clipped_model_output: bool
) -> Columns:
    """DDIM (Song et al., 2021), eq. 12 with sigma of eq. 16.

    epsilon is the output's, or that of the clipped x_0 with ``use_clipped_model_output``.
    """
    prediction = our_prediction(prediction)
    epsilon = rows.epsilon_of_output(prediction, alpha_bar)
    if use_clipped_model_output:
        epsilon = rows.epsilon_of_x0(alpha_bar)
    sigma = rows.ddim_sigma(alpha_bar, alpha_bar_prev, eta)
    columns = rows.x0_columns(prediction, alpha_bar) | rows.ddim_columns(alpha_bar_prev, epsilon, sigma)
    return columns if eta > 0 else columns | {"sigma": 0.0}


def ddim_inverse_columns(prediction: str, alpha_bar: Tensor, alpha_bar_next: Tensor) -> Columns:
    """DDIM backwards, from alpha_bar to alpha_bar_next.

    At alpha_bar = 1 there is no epsilon in x_0 itself (theirs divides by 0 there for "sample"): then
    it is read at alpha_bar_next, the noise level that the model was asked at.
    """
    prediction = our_prediction(prediction)
    level = torch.where(alpha_bar < 1, alpha_bar, alpha_bar_next) if prediction == "x_start" else alpha_bar
    epsilon = rows.epsilon_of_output(prediction, level)
    return rows.x0_columns(prediction, alpha_bar) | rows.ddim_columns(alpha_bar_next, epsilon)


class Threshold(DynamicThreshold):
    """As diffusers clamps: a max_value below 1 wins over 1."""

    def __post_init__(self) -> None:
        pass


def as_table(
    columns: Mapping[str, Any],
    clip: tuple | None,
    learned_variance: bool = False,
    draws: np.ndarray | None = None,
) -> StepTable:
    """The table of these columns; ``clip`` is None, ("clip", range) or ("threshold", ratio, max_value).

    ``draws`` is the coordinate of each row's noise, the row itself if None.
    """
    arrays: dict[str, Any] = {k: v.double().numpy() if isinstance(v, Tensor) else v for k, v in columns.items()}
    threshold = None
    if clip is not None and clip[0] == "threshold":
        threshold = Threshold(*clip[1:])
    elif clip is not None:
        arrays["x0_clip"] = clip[1]
    steps = next(len(v) for v in arrays.values() if isinstance(v, np.ndarray))
    draws = np.arange(steps) if draws is None else draws
    return from_columns(draws, learned_variance=learned_variance, threshold=threshold, **arrays)


def marginal(x: Tensor, y: Tensor) -> MarginalTable:
    """The table of what q_sample multiplies a sample and its noise by, such as the signal and the noise of levels."""
    return MarginalTable(torch.stack((x, y), dim=1).double())
