"""A mixture of Gaussians, whose exact denoiser is known: what solvers are measured on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

import dd_kernels as dd

SCHEDULE = dd.linear_schedule(1000)
MEANS = torch.tensor([-0.6, 0.1, 0.8], dtype=torch.float64)
DEVIATIONS = torch.tensor([0.15, 0.25, 0.1], dtype=torch.float64)
WEIGHTS = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
LOG_SIGMA = 0.5 * (np.log1p(-SCHEDULE.alpha_bar) - np.log(SCHEDULE.alpha_bar))

Sampler = Callable[[int], dd.StepTable]

FREE: dict[str, Any] = {"clip": None, "spacing": "logsnr"}
HIGH: dict[str, Any] = {**FREE, "lower_order_final": False}
# Each solver of a number of steps, and the order of its global error.
SOLVERS: dict[str, tuple[Sampler, int]] = {
    "euler": (partial(dd.euler, SCHEDULE, **FREE), 1),
    "dpm_solver, order 1": (partial(dd.dpm_solver, SCHEDULE, order=1, **HIGH), 1),
    "dpm_solver, order 2": (partial(dd.dpm_solver, SCHEDULE, **HIGH), 2),
    "dpm_solver, order 2, heun": (partial(dd.dpm_solver, SCHEDULE, solver="heun", **HIGH), 2),
    "dpm_solver, order 3": (partial(dd.dpm_solver, SCHEDULE, order=3, **HIGH), 3),
    "heun": (partial(dd.heun, SCHEDULE, **FREE), 2),
    "unipc, order 1": (partial(dd.unipc, SCHEDULE, order=1, **HIGH), 2),
    "unipc, order 2, bh2": (partial(dd.unipc, SCHEDULE, **HIGH), 3),
    "unipc, order 2, bh1": (partial(dd.unipc, SCHEDULE, variant="bh1", **HIGH), 3),
}


def alpha_bar_at(t: float) -> float:
    """Between timesteps log sigma is linear, as the samplers take it."""
    return 1 / (1 + math.exp(2 * np.interp(t, np.arange(1000), LOG_SIGMA)))


def exact_epsilon(x: Tensor, alpha_bar: float) -> Tensor:
    """-sqrt(1 - alpha_bar) times the score of the noisy mixture, for every element of x on its own."""
    variance = alpha_bar * DEVIATIONS**2 + 1 - alpha_bar
    apart = x[..., None] - alpha_bar**0.5 * MEANS
    share = (WEIGHTS.log() - 0.5 * apart**2 / variance - 0.5 * variance.log()).softmax(-1)
    return (1 - alpha_bar) ** 0.5 * (share * apart / variance).sum(-1)


def solve(table: dd.StepTable, x: Tensor) -> Tensor:
    """The samples of a table, in float64 and with its times in float64."""
    history = table.history_like(x)
    times = table.model_times
    for step, t in enumerate(times.tolist()):
        x = dd.reverse_step(x, exact_epsilon(x, alpha_bar_at(t)), table, step, history=history)
    return x


def start() -> Tensor:
    """x_T, 1,024 values."""
    return torch.randn(1, 1, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@cache
def exact() -> Tensor:
    """Returns a solution some hundred times nearer than every solver at 80 steps: third order, at 640 steps."""
    return solve(dd.dpm_solver(SCHEDULE, 640, order=3, **HIGH), start())


def errors(sampler: Sampler, steps: Sequence[int]) -> list[float]:
    """The root mean square distance to the exact solution at each number of steps."""
    x = start()
    return [(solve(sampler(n), x) - exact()).square().mean().sqrt().item() for n in steps]


def slopes(found: Sequence[float]) -> list[float]:
    """Returns the power of the number of steps by which the error falls, from one to twice as many."""
    return [math.log2(a / b) for a, b in pairwise(found)]
