"""One DDPM or DDIM step against diffusers' scheduler.step, from x_t and the model's output to x_{t-1}."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import dd_kernels as dd

from .harness import Case, rotated

try:
    from diffusers import DDIMScheduler, DDPMScheduler
except ImportError:
    DDIMScheduler = DDPMScheduler = None

SHAPES = [(1, 3, 32, 32), (16, 3, 32, 32), (64, 3, 32, 32), (64, 3, 64, 64)]
SCHEDULE = dd.linear_schedule()
TABLES = {"ddpm": dd.ddpm(SCHEDULE), "ddim": dd.ddim(SCHEDULE, steps=50)}
SEEDS = {"ddpm": 0, "ddim": None}


def _peer(sampler: str) -> dict[str, Any]:
    if DDPMScheduler is None:
        return {"diffusers": "diffusers is not installed"}
    scheduler = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}[sampler]()
    scheduler.set_timesteps(len(TABLES[sampler]))
    t = scheduler.timesteps[len(scheduler.timesteps) // 2]  # a tensor, as pipelines pass it
    return {"diffusers": lambda x, out: scheduler.step(out, t, x, return_dict=False)[0]}


def _case(
    sampler: str,
    shape: tuple[int, ...],
    out_dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    in_place: bool = False,
) -> Case:
    table, seed = TABLES[sampler], SEEDS[sampler]
    step = len(table) // 2
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

    def make() -> tuple[Tensor, Tensor]:
        x, out = (torch.randn(shape).contiguous(memory_format=formats[layout]) for _ in range(2))
        return x, out.to(out_dtype)

    size = (4 + out_dtype.itemsize + 4) * torch.Size(shape).numel()
    return Case(
        "reverse_step",
        f"{sampler} in place" if in_place else sampler,
        shape,
        lambda x, out: dd.reverse_step(x, out, table, step, seed=seed, x_prev=x if in_place else None),
        rotated(make, size),
        size,
        _peer(sampler),
        dtype="float32" if out_dtype == torch.float32 else "float32 and " + str(out_dtype).removeprefix("torch."),
        layout=layout,
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sampler", TABLES)
def test_step(compare: Callable[[Case], dict[str, Any]], sampler: str, shape: tuple[int, ...]) -> None:
    compare(_case(sampler, shape))


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
@pytest.mark.parametrize("sampler", TABLES)
def test_in_place(compare: Callable[[Case], dict[str, Any]], sampler: str, shape: tuple[int, ...]) -> None:
    """As :func:`dd_kernels.sample` runs it, where a new tensor's pages would cost more than the step."""
    compare(_case(sampler, shape, in_place=True))


@pytest.mark.parametrize("sampler", TABLES)
def test_channels_last(compare: Callable[[Case], dict[str, Any]], sampler: str) -> None:
    compare(_case(sampler, (64, 3, 32, 32), layout="channels_last"))


@pytest.mark.parametrize("sampler", TABLES)
def test_bfloat16_model(compare: Callable[[Case], dict[str, Any]], sampler: str) -> None:
    compare(_case(sampler, (64, 3, 32, 32), torch.bfloat16))
