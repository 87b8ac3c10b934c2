"""q_sample against diffusers' add_noise, which wants its noise drawn before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import dd_kernels as dd

from .harness import Case, rotated

try:
    from diffusers import DDPMScheduler
except ImportError:
    DDPMScheduler = None

SHAPES = [(1, 3, 32, 32), (16, 3, 32, 32), (64, 3, 32, 32), (64, 3, 64, 64)]
SCHEDULE = dd.linear_schedule()


def _timesteps(shape: tuple[int, ...]) -> Tensor:
    return torch.randint(len(SCHEDULE), shape[:1], generator=torch.Generator().manual_seed(0))


def _peer(run: Callable[..., Any]) -> dict[str, Any]:
    if DDPMScheduler is None:
        return {"diffusers": "diffusers is not installed"}
    scheduler = DDPMScheduler()
    return {"diffusers": lambda *arguments: run(scheduler, *arguments)}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_noise_given(compare: Callable[[Case], dict[str, Any]], shape: tuple[int, ...]) -> None:
    t, size = _timesteps(shape), 3 * 4 * torch.Size(shape).numel()
    inputs = rotated(lambda: (torch.randn(shape), torch.randn(shape)), size)
    peer = _peer(lambda scheduler, x, z: scheduler.add_noise(x, z, t))
    compare(Case("q_sample", "noise given", shape, lambda x, z: dd.q_sample(x, t, SCHEDULE, z), inputs, size, peer))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_noise_drawn(compare: Callable[[Case], dict[str, Any]], shape: tuple[int, ...]) -> None:
    t, size = _timesteps(shape), 2 * 4 * torch.Size(shape).numel()
    inputs = rotated(lambda: (torch.randn(shape),), size)
    peer = _peer(lambda scheduler, x: scheduler.add_noise(x, torch.randn_like(x), t))
    compare(Case("q_sample", "noise drawn", shape, lambda x: dd.q_sample(x, t, SCHEDULE, seed=0), inputs, size, peer))
