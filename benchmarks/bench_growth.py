"""How the time of a step grows with batch, resolution and channels, and that of a run with its steps.

The model is a U-Net like cifar10's. Each time has two lower bounds beside it: moving the weights and images once at
the bandwidth of a copy, and doing the floating-point operations at the rate of a large matrix product. Both rates
are measured in the same run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import dd_kernels as dd

from . import inspect_step, machine, models
from .bench_reverse_step import SCHEDULE
from .harness import Case, Plan, Row, Target, dtype_name
from .models import Denoiser


@dataclass(frozen=True)
class Point:
    """A value on one axis; everything else has the device's base value."""

    axis: str
    value: int


BASE = {
    "cuda": {"steps": 1, "batch": 64, "resolution": 32, "channels": 128},
    "cpu": {"steps": 1, "batch": 2, "resolution": 32, "channels": 64},
}
AXES = {  # measured in this order, since whole runs take longest
    "cuda": {
        "batch": (1, 4, 16, 64, 256, 512),
        "resolution": (16, 32, 64, 128),
        "channels": (32, 64, 128, 256),
        "steps": (10, 20, 50, 100),
    },
    "cpu": {"batch": (1, 2, 4, 8), "resolution": (16, 32, 64), "channels": (32, 64, 128), "steps": (2, 5, 10, 20)},
}
DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}


def _model(target: Target, sizes: dict[str, int]) -> Any:
    """Returns a U-Net like cifar10's of the given sizes."""
    channels, side = sizes["channels"], sizes["resolution"]
    options = {"channels": (channels, *[2 * channels] * 3), "image_size": side, "attention_resolutions": (side // 2,)}
    return models.unet("cifar10", target, DTYPE[target.kind], **options)


def _loop(denoiser: Denoiser, steps: int) -> Callable[[Tensor], Tensor]:
    """Returns a run of ``steps`` steps."""

    def run(x: Tensor) -> Tensor:
        for _ in range(steps):
            x = denoiser(x)
        return x

    return run


def _floors(target: Target, denoiser: Denoiser, x: Tensor, moved: int, steps: int) -> Row:
    """Returns the lower bounds of the time, with the rates they follow from."""
    limits = machine.limits(target.clock, target.device, DTYPE[target.kind])
    operations = steps * inspect_step.flops(lambda: denoiser.model(x))
    return {
        "flops": operations,
        **limits,
        "floor_bytes_us": moved / limits["copy_gb_per_s"] / 1e3,
        "floor_flops_us": operations / limits["matmul_gflop_per_s"] / 1e3,
    }


def _case(target: Target, point: Point) -> Case:
    """Returns the case of one point: a step, or on the axis of steps a whole run."""
    sizes = {**BASE[target.kind], point.axis: point.value}
    model = _model(target, sizes)
    batch, side, steps = sizes["batch"], sizes["resolution"], sizes["steps"]
    ours, plain = (of(model, "ddim", batch, target.device) for of in (models.ours, models.eager))
    x = torch.randn(batch, 3, side, side, device=target.device)
    moved = steps * (models.parameter_bytes(model) + 2 * x.nbytes)
    table = dd.ddim(SCHEDULE, steps=steps)
    return Case(
        "growth",
        point.axis,
        x.shape,
        (lambda x: dd.sample(model, x, table, seed=0)) if point.axis == "steps" else ours,
        [(x,)],
        moved,
        {"eager": _loop(plain, steps)},
        dtype_name(DTYPE[target.kind]),
        "channels_last",
        target.device,
        graph=False,
        extra={"value": point.value, "sizes": sizes},
        inspect=lambda: _floors(target, ours, x, moved, steps),
    )


def plans(target: Target) -> list[Plan]:
    """Returns plans for every axis, on a CPU with all its threads."""
    threads = machine.THREADS[-1] if target.kind == "cpu" else None
    points = [Point(axis, value) for axis, values in AXES[target.kind].items() for value in values]
    return [
        Plan(f"growth {point.axis} {point.value}", partial(_case, target, point), threads, "growth") for point in points
    ]


def test_growth(compare: Callable[[Plan], Row], plan: Plan) -> None:
    compare(plan)
