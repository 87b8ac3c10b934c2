"""A mixture of Gaussians, whose exact denoiser is known: what solvers are measured on."""

import math
from itertools import pairwise

import numpy as np
import torch

import dd_kernels as dd

SCHEDULE = dd.linear_schedule(1000)
MEANS = torch.tensor([-0.6, 0.1, 0.8], dtype=torch.float64)
DEVIATIONS = torch.tensor([0.15, 0.25, 0.1], dtype=torch.float64)
WEIGHTS = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
LOG_SIGMA = 0.5 * (np.log1p(-SCHEDULE.alpha_bar) - np.log(SCHEDULE.alpha_bar))


def alpha_bar_at(t):
    """Between timesteps log sigma is linear, as the samplers take it."""
    return 1 / (1 + math.exp(2 * np.interp(t, np.arange(1000), LOG_SIGMA)))


def exact_epsilon(x, alpha_bar):
    """-sqrt(1 - alpha_bar) times the score of the noisy mixture, for every element of x on its own."""
    variance = alpha_bar * DEVIATIONS**2 + 1 - alpha_bar
    apart = x[..., None] - alpha_bar**0.5 * MEANS
    share = (WEIGHTS.log() - 0.5 * apart**2 / variance - 0.5 * variance.log()).softmax(-1)
    return (1 - alpha_bar) ** 0.5 * (share * apart / variance).sum(-1)


def solve(table, x):
    """The samples of a table, in float64 and with its times in float64."""
    history = table.history_like(x)
    times = table.timesteps if table.times is None else table.times
    for step, t in enumerate(times.tolist()):
        x = dd.reverse_step(x, exact_epsilon(x, alpha_bar_at(t)), table, step, history=history)
    return x


def start():
    """x_T, 1,024 values."""
    return torch.randn(1, 1, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def errors(sampler, steps, exact):
    """The root mean square distance to ``exact`` at each number of steps."""
    x = start()
    return [(solve(sampler(n), x) - exact).square().mean().sqrt().item() for n in steps]


def slopes(found):
    """By what power of the number of steps the error falls, from one to twice as many."""
    return [math.log2(a / b) for a, b in pairwise(found)]
