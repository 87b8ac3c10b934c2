r"""The variational bound of images under a model: every term, and the same bound written in another way.

.. math:: -\log p(x_0) \le \underbrace{-\log p(x_0 | x_1)}_{L_0} + \sum_{t \ge 1}
    \underbrace{D_{KL}(q(x_{t-1} | x_t, x_0) \| p(x_{t-1} | x_t))}_{L_{t-1}}
    + \underbrace{D_{KL}(q(x_T | x_0) \| N(0, I))}_{L_T}

Eq. 5 of DDPM (Ho et al., 2020), in expectation over q(x_t | x_0). Timesteps count from 0, as everywhere: the model is
asked at 0 for L_0. All terms are in bits per dimension; one draw of noise estimates each, a function of (seed, sample,
timestep), so that a figure does not depend on the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .losses import (
    LEVELS,
    consistency_term,
    discretized_gaussian_log_likelihood,
    mean_flat,
    model_gaussian,
    prior_term,
    variational_bound,
)
from .ops import q_sample, randn
from .ops.randn import Stream
from .samplers import rows
from .sampling.guidance import Model, model_output
from .schedules import Gaussian, Schedule


class Split(NamedTuple):
    """The bound as L_0, L_{t-1} and L_T.

    Attributes:
        terms: [N, T]: L_0, and L_{t-1} at timestep t from 1 on.
        prior: L_T, [N].
    """

    terms: Tensor
    prior: Tensor

    @property
    def total(self) -> Tensor:
        """The bound of each sample, [N]."""
        return self.terms.sum(dim=1) + self.prior


class ThreeTerms(NamedTuple):
    """The bound as reconstruction, consistency and prior matching.

    Attributes:
        reconstruction: -log p(x_0 | x_1), [N].
        consistency: [N, T - 1], at timestep t from 0 on.
        prior: [N].
    """

    reconstruction: Tensor
    consistency: Tensor
    prior: Tensor

    @property
    def total(self) -> Tensor:
        """The bound of each sample, [N]."""
        return self.reconstruction + self.consistency.sum(dim=1) + self.prior


class Process(NamedTuple):
    """A model as the distributions p(x_{t-1} | x_t) that it stands for.

    Attributes:
        model: model(x, t, **kwargs) -> output, [N, C, ...], or [N, 2 C, ...] where it learns its variance. With
            self-conditioning it reads no estimate of x_0, since p(x_{t-1} | x_t) depends on x_t alone.
        schedule: the forward process.
        prediction: "epsilon", "x_start" or "v".
        variance: "fixed_small", "fixed_large", "learned_range" or "learned", see :func:`dd_kernels.ddpm`.
        clip: x_0 is clipped to [-clip, clip]; None: not at all.
        levels: grey levels of x_0, for the decoder.
        kwargs: passed to the model.
    """

    model: Model
    schedule: Schedule
    prediction: str = "epsilon"
    variance: str = "fixed_small"
    clip: float | None = 1.0
    levels: int = LEVELS
    kwargs: Mapping[str, Any] = {}

    def reverse(self, x_t: Tensor, t: Tensor) -> Gaussian:
        """Returns p(x_{t-1} | x_t), of x_t's shape."""
        out = model_output(self.model(x_t, t, **self.kwargs))
        return model_gaussian(
            out, x_t, t, self.schedule, prediction=self.prediction, variance=self.variance, clip=self.clip
        )

    def check(self) -> None:
        """Raises ``ValueError`` for an option that is none."""
        rows.check_choice("prediction", self.prediction, rows.PREDICTIONS)
        rows.check_choice("variance", self.variance, rows.VARIANCES)
        rows.clip_columns(self.clip)


def _noise(x: Tensor, seed: int, first_sample: int, t: int) -> Tensor:
    return randn(x.shape, seed=seed, first_sample=first_sample, draw=t, stream=Stream.LIKELIHOOD, device=x.device).to(x)


def _at(t: int, x: Tensor) -> Tensor:
    return torch.full((x.shape[0],), t, device=x.device)


@torch.no_grad()
def split_bound(
    process: Process,
    x_start: Tensor,
    *,
    seed: int = 0,
    first_sample: int = 0,
    callback: Callable[[int], object] | None = None,
) -> Split:
    """Returns L_0, L_{t-1} and L_T of images, each L_{t-1} at one x_t from q(x_t | x_0).

    Args:
        process: the model.
        x_start: x_0, [N, C, ...], grey levels scaled to [-1, 1].
        seed, first_sample: of the noise, whose draw is the timestep.
        callback: called with N after every timestep.

    Raises:
        ValueError, TypeError: an argument that does not fit.
    """
    process.check()
    schedule, terms = process.schedule, []
    for step in range(len(schedule)):
        t = _at(step, x_start)
        x_t = q_sample(x_start, t, schedule, _noise(x_start, seed, first_sample, step))
        p = process.reverse(x_t, t)
        terms.append(variational_bound(x_start, x_t, t, p.mean, p.log_variance, schedule, process.levels))
        if callback is not None:
            callback(len(x_start))
    q = schedule.q_mean_variance(x_start, _at(len(schedule) - 1, x_start))
    return Split(torch.stack(terms, dim=1), prior_term(q.mean, q.log_variance.expand(x_start.shape)))


@torch.no_grad()
def three_term_bound(process: Process, x_start: Tensor, *, seed: int = 0, first_sample: int = 0) -> ThreeTerms:
    r"""Returns reconstruction, consistency and prior matching of images, at one chain x_1, x_2, ... of q.

    Luo, "Understanding diffusion models: a unified perspective" (2022), eq. 45; its expectation is that of
    :func:`split_bound`, its variance is larger:

    .. math:: -\log p(x_0 | x_1) + \sum_t \log \frac{q(x_t | x_{t-1})}{p(x_t | x_{t+1})}
        + D_{KL}(q(x_T | x_{T-1}) \| N(0, I))

    There the middle is written as a KL divergence at (x_{t-1}, x_{t+1}), which would draw x_t without regard to
    x_{t+1}; the ratio along one chain is what both bounds have in common.

    Args: as those of :func:`split_bound`.
    """
    process.check()
    schedule, consistency = process.schedule, []
    before, x = x_start, _step(schedule, x_start, 0, seed, first_sample)
    p = process.reverse(x, _at(0, x))
    log_p = discretized_gaussian_log_likelihood(
        x_start, means=p.mean, log_scales=0.5 * p.log_variance, levels=process.levels
    )
    for step in range(1, len(schedule)):
        after = _step(schedule, x, step, seed, first_sample)
        p = process.reverse(after, _at(step, x))
        consistency.append(consistency_term(before, x, _at(step - 1, x), p.mean, p.log_variance, schedule))
        before, x = x, after
    q = schedule.q_step(before, _at(len(schedule) - 1, x))
    middle = torch.stack(consistency, dim=1) if consistency else x_start.new_zeros(len(x_start), 0)
    prior = prior_term(q.mean, q.log_variance.expand(x.shape))
    return ThreeTerms(-mean_flat(log_p) / math.log(2.0), middle, prior)


def _step(schedule: Schedule, x: Tensor, t: int, seed: int, first_sample: int) -> Tensor:
    """Draws x_t from q(x_t | x_{t-1})."""
    q = schedule.q_step(x, _at(t, x))
    return q.mean + q.variance**0.5 * _noise(x, seed, first_sample, t)
