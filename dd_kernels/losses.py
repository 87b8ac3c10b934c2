"""The terms of the variational bound of DDPM, in nats per element."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The width of one grey level of 255 on the scale of [-1, 1] is 2 / 255: a pixel's bin is its value +- half of that.
HALF_BIN = 1.0 / 255.0


def mean_flat(x: Tensor) -> Tensor:
    """The mean of each sample, [N, ...] -> [N]."""
    return x.flatten(1).mean(dim=1)


def normal_kl(mean1: Tensor | float, logvar1: Tensor | float, mean2: Tensor | float, logvar2: Tensor | float) -> Tensor:
    r"""KL(N(mean1, exp(logvar1)) || N(mean2, exp(logvar2))) per element, in nats; the four broadcast.

    .. math:: \tfrac12 \big(l_2 - l_1 - 1 + e^{l_1 - l_2} + (m_1 - m_2)^2 e^{-l_2}\big)

    Raises:
        TypeError: none of the four is a tensor.
    """
    like = next((v for v in (mean1, logvar1, mean2, logvar2) if isinstance(v, Tensor)), None)
    if like is None:
        raise TypeError("at least one of mean1, logvar1, mean2 and logvar2 must be a tensor; got numbers")
    logvar1, logvar2 = (v if isinstance(v, Tensor) else torch.full_like(like, v) for v in (logvar1, logvar2))
    squared = (mean1 - mean2) ** 2
    return 0.5 * (logvar2 - logvar1 - 1.0 + torch.exp(logvar1 - logvar2) + squared * torch.exp(-logvar2))


def approx_standard_normal_cdf(x: Tensor) -> Tensor:
    """The normal distribution function by tanh, to 3e-4 (Page, 1977), as in DDPM's and guided-diffusion's code."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x: Tensor, *, means: Tensor, log_scales: Tensor) -> Tensor:
    """log p(x) in nats of 8-bit images under a Gaussian cut into 256 bins, eq. 13 of DDPM (Ho et al., 2020).

    Args:
        x: images, grey levels 0..255 scaled to [-1, 1].
        means, log_scales: mean and log of the standard deviation, of x's shape.
    """
    if not x.shape == means.shape == log_scales.shape:
        raise ValueError(
            f"means and log_scales must have the shape of x, {list(x.shape)}; "
            f"got {list(means.shape)} and {list(log_scales.shape)}"
        )
    centred, inverse_scale = x - means, torch.exp(-log_scales)
    below = approx_standard_normal_cdf(inverse_scale * (centred - HALF_BIN))
    upto = approx_standard_normal_cdf(inverse_scale * (centred + HALF_BIN))
    # The first and the last bin reach to infinity.
    probability = torch.where(x < -0.999, upto, torch.where(x > 0.999, 1.0 - below, upto - below))
    return torch.log(probability.clamp(min=1e-12))
