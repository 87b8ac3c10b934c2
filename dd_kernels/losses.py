r"""The losses of diffusion models, of any model and schedule: simple, the variational bound, and both together.

The bound of DDPM (Ho et al., 2020, eq. 5) has a term for each timestep and one that no training changes:

.. math:: L = D_{KL}(q(x_T | x_0) \| p(x_T)) + \sum_{t \ge 1} D_{KL}(q(x_{t-1} | x_t, x_0) \| p(x_{t-1} | x_t))
    - \log p(x_0 | x_1)

Terms are in bits per dimension; a loss is [N], one number per sample.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .ops.reverse_step import reverse_step
from .ops.reverse_step.table import StepTable, from_columns
from .samplers import rows
from .schedules import Gaussian, Schedule

# Grey levels of 8-bit images. A pixel's bin goes half the way to the levels beside it: 1 / 255 on the scale of [-1, 1].
LEVELS = 256
# lambda of L_hybrid, section 3.1 of Nichol & Dhariwal (2021).
VLB_WEIGHT = 1e-3


def mean_flat(x: Tensor) -> Tensor:
    """Returns the mean of each sample, [N, ...] -> [N]."""
    return x.flatten(1).mean(dim=1)


def normal_kl(mean1: Tensor | float, logvar1: Tensor | float, mean2: Tensor | float, logvar2: Tensor | float) -> Tensor:
    r"""Returns KL(N(mean1, exp(logvar1)) || N(mean2, exp(logvar2))) per element, in nats; the four broadcast.

    .. math:: \tfrac12 \big(l_2 - l_1 - 1 + e^{l_1 - l_2} + (m_1 - m_2)^2 e^{-l_2}\big)

    Raises:
        TypeError: none of the four is a tensor.
    """
    like = next((v for v in (mean1, logvar1, mean2, logvar2) if isinstance(v, Tensor)), None)
    if like is None:
        raise TypeError("at least one of mean1, logvar1, mean2 and logvar2 must be a tensor; got numbers")
    log1, log2 = (v if isinstance(v, Tensor) else torch.full_like(like, v) for v in (logvar1, logvar2))
    squared = (mean1 - mean2) ** 2
    return 0.5 * (log2 - log1 - 1.0 + torch.exp(log1 - log2) + squared * torch.exp(-log2))


def approx_standard_normal_cdf(x: Tensor) -> Tensor:
    """Returns the normal distribution function by tanh, to 3e-4 (Page, 1977), as DDPM's and guided-diffusion's code."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(
    x: Tensor, *, means: Tensor, log_scales: Tensor, levels: int = LEVELS
) -> Tensor:
    """Returns log p(x) in nats of images under a Gaussian cut into one bin for each grey level, eq. 13 of DDPM.

    Args:
        x: images, grey levels 0..levels - 1 scaled to [-1, 1].
        means, log_scales: mean and log of the standard deviation, of x's shape.
        levels: how many grey levels there are, at most 1,024.
    """
    if not 2 <= levels <= 1024:
        raise ValueError(f"levels must be in [2, 1024]; got {levels}")
    if not x.shape == means.shape == log_scales.shape:
        raise ValueError(
            f"means and log_scales must have the shape of x, {list(x.shape)}; "
            f"got {list(means.shape)} and {list(log_scales.shape)}"
        )
    centred, inverse_scale, half_bin = x - means, torch.exp(-log_scales), 1.0 / (levels - 1)
    below = approx_standard_normal_cdf(inverse_scale * (centred - half_bin))
    upto = approx_standard_normal_cdf(inverse_scale * (centred + half_bin))
    # The first and the last bin reach to infinity.
    probability = torch.where(x < -0.999, upto, torch.where(x > 0.999, 1.0 - below, upto - below))
    return torch.log(probability.clamp(min=1e-12))


def learned_log_variance(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Returns the log-variance of a model whose values -1 to 1 lie between two, eq. 15 of Nichol & Dhariwal (2021)."""
    fraction = (values + 1) / 2
    return fraction * high + (1 - fraction) * low


def simple_loss(out: Tensor, target: Tensor) -> Tensor:
    """Returns the mean squared error of each sample, [N], eq. 14 of DDPM; target is epsilon, x_0, v ..."""
    return mean_flat((target - out) ** 2)


def min_snr_weight(t: Tensor, schedule: Schedule, gamma: float = 5.0, prediction: str = "epsilon") -> Tensor:
    r"""Returns the min-SNR weight of L_simple at each timestep, [N] float32 (Hang et al., 2023, section 3.4).

    .. math:: w_t = \min(SNR_t, \gamma) \cdot \{1,\ 1 / SNR_t,\ 1 / (SNR_t + 1)\}

    for a model of x_0, epsilon and v: each time the same weight of the error in x_0.
    """
    rows.check_choice("prediction", prediction, rows.PREDICTIONS)
    snr = schedule.snr
    with np.errstate(divide="ignore"):  # at zero SNR the weight of epsilon is 1
        of_epsilon = np.minimum(1.0, gamma / snr)
    weights = {"x_start": np.minimum(snr, gamma), "epsilon": of_epsilon, "v": np.minimum(snr, gamma) / (snr + 1)}
    return torch.from_numpy(weights[prediction]).to(torch.float32).to(t.device)[t]


def prior_term(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Returns KL(q(x_T | x_0) || N(0, I)), [N], given q's mean and log-variance."""
    return mean_flat(normal_kl(mean, log_variance, 0.0, 0.0)) / math.log(2.0)


def bound_term(
    x_start: Tensor,
    t: Tensor,
    posterior_mean: Tensor,
    posterior_log_variance: Tensor,
    mean: Tensor,
    log_variance: Tensor,
    levels: int = LEVELS,
) -> Tensor:
    """Returns one term of the bound for each sample, [N].

    Args:
        x_start: x_0, [N, ...], images of ``levels`` grey levels scaled to [-1, 1].
        t: timesteps [N]; at 0 the term is the decoder's negative log-likelihood, elsewhere the KL divergence.
        posterior_mean, posterior_log_variance: of q(x_{t-1} | x_t, x_0), of x_start's shape.
        mean, log_variance: of the model's p(x_{t-1} | x_t), of x_start's shape.
    """
    divergence = mean_flat(normal_kl(posterior_mean, posterior_log_variance, mean, log_variance))
    scales = 0.5 * log_variance
    likelihood = discretized_gaussian_log_likelihood(x_start, means=mean, log_scales=scales, levels=levels)
    return torch.where(t == 0, -mean_flat(likelihood), divergence) / math.log(2.0)


def variational_bound(
    x_start: Tensor,
    x_t: Tensor,
    t: Tensor,
    mean: Tensor,
    log_variance: Tensor,
    schedule: Schedule,
    levels: int = LEVELS,
) -> Tensor:
    """Returns :func:`bound_term` with the posterior of ``schedule``; x_t is a sample of q(x_t | x_0)."""
    q = schedule.q_posterior(x_start, x_t, t)
    return bound_term(x_start, t, q.mean, q.log_variance.expand(x_start.shape), mean, log_variance, levels)


def consistency_term(
    x_before: Tensor, x_t: Tensor, t: Tensor, mean: Tensor, log_variance: Tensor, schedule: Schedule
) -> Tensor:
    r"""Returns \log q(x_t | x_{t-1}) - \log p(x_t | x_{t+1}) of each sample, [N], in bits per dimension.

    Args:
        x_before, x_t: x_{t-1} (x_0 itself at t = 0) and x_t, of one chain of q.
        t: timesteps [N].
        mean, log_variance: of the model's p(x_t | x_{t+1}), of x_t's shape.
    """
    q = schedule.q_step(x_before, t)
    log_q = q.log_variance + (x_t - q.mean) ** 2 * torch.exp(-q.log_variance)
    log_p = log_variance + (x_t - mean) ** 2 * torch.exp(-log_variance)
    return 0.5 * mean_flat(log_p - log_q) / math.log(2.0)


@lru_cache(maxsize=32)
def _mean_table(schedule: Schedule, prediction: str, clip: float | None) -> StepTable:
    """Row t gives the mean of p(x_{t-1} | x_t) of the model's output."""
    step = rows.Transition.of(schedule)
    columns = rows.x0_columns(prediction, step.alpha_bar) | rows.posterior_columns(step) | rows.clip_columns(clip)
    return from_columns(np.arange(len(schedule)), **columns)


def predicted_x_start(
    out: Tensor, x_t: Tensor, t: Tensor, schedule: Schedule, *, prediction: str = "epsilon", clip: float | None = None
) -> Tensor:
    """Returns x_0 as a model predicts it at timesteps t [N], of x_t's shape, clipped to [-clip, clip].

    Args:
        out: the model's output, [N, C, ...], or [N, 2 C, ...] where it learns its variance.
        x_t, t, schedule, prediction, clip: see :func:`model_gaussian`.
    """
    rows.check_choice("prediction", prediction, rows.PREDICTIONS)
    table = _mean_table(schedule, prediction, clip)
    return reverse_step(x_t, out[:, : x_t.shape[1]], table, t, return_x0=True)[1]


def model_gaussian(
    out: Tensor,
    x_t: Tensor,
    t: Tensor,
    schedule: Schedule,
    *,
    prediction: str = "epsilon",
    variance: str = "fixed_small",
    clip: float | None = None,
) -> Gaussian:
    """Returns the model's p(x_{t-1} | x_t), whose mean is eq. 7 of DDPM at the x_0 that it predicts.

    At t = 0 it is the decoder's Gaussian, whose fixed variances are both that of the posterior at 1, as in DDPM's code.

    Args:
        out: the model's output, [N, C, ...], or [N, 2 C, ...] where it learns its variance.
        x_t, t: [N, C, ...] and timesteps [N].
        prediction: "epsilon", "x_start" or "v".
        variance: "fixed_small", "fixed_large", "learned_range" or "learned", see :func:`dd_kernels.ddpm`.
        clip: x_0 is clipped to [-clip, clip]; None: not at all.
    """
    rows.check_choice("prediction", prediction, rows.PREDICTIONS)
    rows.check_choice("variance", variance, rows.VARIANCES)
    learned = variance.startswith("learned")
    wanted = x_t.shape[1] * (2 if learned else 1)
    if out.shape[1] != wanted:
        twice = ", twice those of x_t" if learned else ""
        raise ValueError(f"out must have {wanted} channels{twice}; got {out.shape[1]}")
    predicted, values = out.chunk(2, dim=1) if learned else (out, None)
    mean = reverse_step(x_t, predicted, _mean_table(schedule, prediction, clip), t)
    small, log_beta = schedule.posterior_log_variance_clipped, np.log(schedule.beta)
    if values is None:
        fixed = small if variance == "fixed_small" else np.append(small[:1], log_beta[1:])
        log_variance = schedule.gather(fixed, t, x_t).expand(mean.shape)
    elif variance == "learned":
        log_variance = values
    else:
        log_variance = learned_log_variance(values, schedule.gather(small, t, x_t), schedule.gather(log_beta, t, x_t))
    return Gaussian(mean, log_variance.exp(), log_variance)


def variance_bound(
    out: Tensor,
    x_start: Tensor,
    x_t: Tensor,
    t: Tensor,
    schedule: Schedule,
    *,
    prediction: str = "epsilon",
    levels: int = LEVELS,
) -> Tensor:
    """Returns the bound's term at t of a model that learns its variance, [N]; the mean is detached in it.

    The variance is in the range of eq. 15 of Nichol & Dhariwal (2021).

    Args:
        out: [N, 2 C, ...], the model's prediction and, as its second half, the values of its learned variance.
        x_start, x_t, t: x_0, x_t [N, C, ...] and timesteps [N].
        prediction: "epsilon", "x_start" or "v".
        levels: grey levels of x_0.
    """
    predicted, values = out[:, : x_t.shape[1]], out[:, x_t.shape[1] :]
    frozen = torch.cat((predicted.detach(), values), dim=1)
    p = model_gaussian(frozen, x_t, t, schedule, prediction=prediction, variance="learned_range")
    return variational_bound(x_start, x_t, t, p.mean, p.log_variance, schedule, levels)


def hybrid_loss(
    out: Tensor,
    target: Tensor,
    x_start: Tensor,
    x_t: Tensor,
    t: Tensor,
    schedule: Schedule,
    *,
    prediction: str = "epsilon",
    weight: float = VLB_WEIGHT,
    levels: int = LEVELS,
) -> Tensor:
    r"""Returns L_hybrid = L_simple + weight L_vlb, [N], eq. 16 of Improved DDPM (Nichol & Dhariwal, 2021).

    L_vlb is estimated by T times :func:`variance_bound`, which trains the variance alone.

    Args:
        out, x_start, x_t, t, prediction, levels: see :func:`variance_bound`.
        target: what the first half of out is to be, [N, C, ...].
    """
    bound = variance_bound(out, x_start, x_t, t, schedule, prediction=prediction, levels=levels)
    return simple_loss(out.chunk(2, dim=1)[0], target) + weight * len(schedule) * bound
