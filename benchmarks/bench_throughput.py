"""Whole sampling steps (model and update), whole runs of :func:`dd_kernels.sample`, and how their time grows.

"dd_kernels" is our U-Net as a user runs it: on a CPU accelerated by :func:`dd_kernels.accelerate`.
Images/s of a run of S steps follow from the time of one step ("extrapolated" in the tables); a row with ``steps`` is
a whole run. The bytes counted are those of the weights, and of the image in and out: no step moves fewer. Steps are
timed as a program calls them; "CUDA graph" is our step captured and replayed.

Growth: the time of a step of a U-Net like cifar10's against batch, resolution and channels, and that of a run against
its steps. Each time has two lower bounds beside it: moving the weights and images once at the bandwidth of a copy, and
doing the floating-point operations at the rate of a large matrix product. Both rates are measured in the same run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import dd_kernels as dd
from dd_kernels.nn import CONFIGS

from . import machine, models
from .bench_reverse_step import SCHEDULE
from .harness import Case, Plan, Row, Target, dtype_name, reason
from .models import Denoiser

Step = Callable[[Tensor], object]
Peers = dict[str, Step | str]


@dataclass(frozen=True)
class Run:
    """A model, a sampler and a batch.

    Attributes:
        compile: modes of torch.compile to measure, which takes minutes.
        whole: number of steps of a whole run, which is timed instead of one step.
        size: side of the images or latents, where it is not the configuration's.
        reference: measures our reference too.
        profile: counts launches and shares too.
    """

    model: str
    sampler: str
    batch: int
    dtype: torch.dtype = torch.float32
    compile: tuple[str, ...] = ()
    whole: int | None = None
    size: int | None = None
    reference: bool = False
    profile: bool = False

    def __str__(self) -> str:
        steps = f" whole run of {self.whole}" if self.whole else ""
        modes = f" {' '.join(self.compile)}" if self.compile else ""
        return f"{self.model} {self.sampler}{steps}{modes} {self.batch} {dtype_name(self.dtype)}"


BF16 = torch.bfloat16
RUNS = {
    "cuda": [
        *(Run("cifar10", "ddim", n, BF16, reference=n == 256, profile=n in (1, 256)) for n in (256, 1, 64, 16, 512)),
        Run("cifar10", "ddpm", 256, BF16),
        Run("cifar10", "ddpm", 512, BF16),
        Run("cifar10", "ddim", 512, BF16, whole=10),
        *(Run("imagenet64", "ddim", n, BF16, profile=n == 64) for n in (64, 1, 16, 256)),
        *(Run("stable diffusion", "ddim", n, BF16, profile=n == 16) for n in (16, 1, 64)),
        *(Run("digits", sampler, 512) for sampler in ("ddim", "ddpm")),
        *(Run("digits", "ddim", n) for n in (1, 64)),
        Run("imagenet64", "ddpm", 64, BF16),
        Run("stable diffusion", "ddpm", 16, BF16),
        Run("cifar10", "ddim", 256, reference=True),
        Run("imagenet64", "ddim", 512, BF16),
        *(Run("stable diffusion", "ddim", n, BF16) for n in (256, 512)),
        Run("cifar10", "ddim", 256, BF16, compile=("default",)),
        Run("cifar10", "ddim", 1, BF16, compile=("reduce-overhead",)),
        Run("imagenet64", "ddim", 16, BF16, compile=("reduce-overhead",)),
        Run("cifar10", "ddim", 256, BF16, compile=("max-autotune",)),
    ],
    "cpu": [
        *(Run("digits", sampler, 64, reference=True, profile=True) for sampler in ("ddim", "ddpm")),
        *(Run("cifar10", sampler, 1, reference=True, profile=True) for sampler in ("ddim", "ddpm")),
        Run("digits", "ddim", 256),
        Run("digits", "ddim", 64, whole=10),
        Run("cifar10", "ddim", 16),
        Run("stable diffusion", "ddim", 1, size=32),
        Run("imagenet64", "ddim", 1),
        Run("cifar10", "ddim", 1, compile=("default",)),
    ],
}


def _implementations(target: Target, run: Run) -> dict[str, Denoiser | str]:
    """Returns the step of every implementation, or why one is missing."""
    if run.model == "stable diffusion":
        stable = models.stable_diffusion(run.sampler, run.batch, target, run.dtype)
        if isinstance(stable, str):
            raise RuntimeError(stable)
        return dict(stable)
    model = models.unet(run.model, target, run.dtype)
    of = (model, run.sampler, run.batch, target.device)
    fast = model if run.compile else models.by_the_line(model, target)
    found: dict[str, Denoiser | str] = {"dd_kernels": models.ours(fast, *of[1:]), "eager": models.eager(*of)}
    found["diffusers"] = models.diffusers_unet(*of)
    if run.reference:
        found["reference"] = models.ours(*of, backend="reference")
    if len(machine.kernels(target.kind)) > 1 and not run.compile:
        found |= {name: models.ours(*of, backend=name) for name in machine.kernels(target.kind)[1:]}
    return found


def _inspect(target: Target, run: Run, found: dict[str, Denoiser | str], x: Tensor) -> Row:
    """Returns launches, shares and peak memory of every implementation that is not compiled."""
    device = torch.device(target.device).type
    result: dict[str, Row] = {}
    for name, denoiser in found.items():
        if isinstance(denoiser, str) or denoiser.backend != "auto":
            continue
        try:
            one = models.breakdown(denoiser, x, device) if run.profile else {}
            if device == "cuda":
                one["peak_bytes"] = machine.peak_bytes(partial(denoiser, x))
        except Exception as error:
            one = {"not_measured": reason(error)}
        result[name] = one
    return {"breakdown": {name: one for name, one in result.items() if one}}


def _images(target: Target, run: Run) -> Tensor:
    """Returns random images or latents."""
    if run.model == "stable diffusion":
        channels, side = 4, run.size or models.SD_UNET["sample_size"]
    else:
        config: dict[str, Any] = CONFIGS[run.model]
        channels, side = config["in_channels"], config["image_size"]
    return torch.randn(run.batch, channels, side, side, device=target.device)


def _case(target: Target, run: Run, x: Tensor, module: nn.Module, ours: Step, peers: Peers, **options: Any) -> Case:
    """Returns the case of ``ours`` called with images ``x``: one step with ``module``, or a whole run of ``steps``."""
    steps = options.get("extra", {}).get("steps", 1)
    moved = steps * (models.parameter_bytes(module) + 2 * x.nbytes)
    return Case(
        "sample",
        f"{run.model} {run.sampler}",
        x.shape,
        ours,
        [(x,)],
        moved,
        peers,
        dtype_name(run.dtype),
        "channels_last",
        target.device,
        graph=False,
        **options,
    )


def _warm_up(target: Target, step: Denoiser, x: Tensor) -> None:
    """On a CPU makes the calls of which an accelerated model captures the first and records the second."""
    for _ in range(3 if target.kind == "cpu" else 0):
        step(x)


def _step_case(target: Target, run: Run) -> Case:
    """Returns the case of one step."""
    found = _implementations(target, run)
    if run.compile:
        found = models.compiled_beside(found, run.compile)
    x = _images(target, run)
    ours = found["dd_kernels"]
    assert isinstance(ours, Denoiser)
    _warm_up(target, ours, x)
    peers: Peers = dict(list(found.items())[1:])
    if target.kind == "cuda" and not run.compile:
        peers["dd_kernels, CUDA graph"] = models.replayed(target, ours, x)
    inspect = None if run.compile else lambda: _inspect(target, run, found, x)
    return _case(target, run, x, ours.module, ours, peers, inspect=inspect)


def _whole_case(target: Target, run: Run) -> Case:
    """Returns the case of ``dd.sample`` from x_T to x_0, beside the loop of diffusers' pipelines."""
    model = models.unet(run.model, target, run.dtype)
    schedule, steps = SCHEDULE, run.whole or 1
    table = dd.ddim(schedule, steps=steps) if run.sampler == "ddim" else dd.ddpm(schedule, steps=steps)
    y = models.labels(model, run.batch, target.device)
    x_T = _images(target, run)
    kwargs = {} if y is None else {"y": y}

    fast = models.by_the_line(model, target)

    def ours(x: Tensor) -> Tensor:
        return dd.sample(fast, x, table, seed=0, model_kwargs=kwargs)

    theirs = models.diffusers_unet(model, run.sampler, run.batch, target.device)
    peers: Peers = {"diffusers": models.pipeline(theirs, run.sampler, steps, run.batch, target.device)}
    return _case(target, run, x_T, model, ours, peers, extra={"steps": steps})


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
GROWTH_DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}


def _sized_model(target: Target, sizes: dict[str, int]) -> Any:
    """Returns a U-Net like cifar10's of the given sizes."""
    channels, side = sizes["channels"], sizes["resolution"]
    options = {"channels": (channels, *[2 * channels] * 3), "image_size": side, "attention_resolutions": (side // 2,)}
    return models.unet("cifar10", target, GROWTH_DTYPE[target.kind], **options)


def _loop(denoiser: Denoiser, steps: int) -> Callable[[Tensor], Tensor]:
    """Returns a run of ``steps`` steps."""

    def run(x: Tensor) -> Tensor:
        for _ in range(steps):
            x = denoiser(x)
        return x

    return run


def _floors(target: Target, denoiser: Denoiser, x: Tensor, moved: int, steps: int) -> Row:
    """Returns the lower bounds of the time, with the rates they follow from."""
    limits = machine.limits(target.clock, target.device, GROWTH_DTYPE[target.kind])
    operations = steps * machine.flops(lambda: denoiser.model(x))
    return {
        "flops": operations,
        **limits,
        "floor_bytes_us": moved / limits["copy_gb_per_s"] / 1e3,
        "floor_flops_us": operations / limits["matmul_gflop_per_s"] / 1e3,
    }


def _point_case(target: Target, point: Point) -> Case:
    """Returns the case of one point: a step, or on the axis of steps a whole run."""
    sizes = {**BASE[target.kind], point.axis: point.value}
    model = _sized_model(target, sizes)
    batch, side, steps = sizes["batch"], sizes["resolution"], sizes["steps"]
    fast = models.by_the_line(model, target)
    ours, plain = models.ours(fast, "ddim", batch, target.device), models.eager(model, "ddim", batch, target.device)
    x = torch.randn(batch, 3, side, side, device=target.device)
    _warm_up(target, ours, x)
    moved = steps * (models.parameter_bytes(model) + 2 * x.nbytes)
    table = dd.ddim(SCHEDULE, steps=steps)
    return Case(
        "growth",
        point.axis,
        x.shape,
        (lambda x: dd.sample(fast, x, table, seed=0)) if point.axis == "steps" else ours,
        [(x,)],
        moved,
        {"eager": _loop(plain, steps)},
        dtype_name(GROWTH_DTYPE[target.kind]),
        "channels_last",
        target.device,
        graph=False,
        extra={"value": point.value, "sizes": sizes},
        inspect=lambda: _floors(target, plain, x, moved, steps),
    )


def plans(target: Target) -> list[Plan]:
    """Returns a plan for every run and every point of growth, on a CPU with all its threads."""
    threads = machine.THREADS[-1] if target.kind == "cpu" else None
    points = [Point(axis, value) for axis, values in AXES[target.kind].items() for value in values]
    grown = [Plan(f"growth {p.axis} {p.value}", partial(_point_case, target, p), threads, "growth") for p in points]
    return grown + [
        Plan(
            f"sample {run}",
            partial(_whole_case if run.whole else _step_case, target, run),
            threads,
            "compiled" if run.compile else "end_to_end",
            tunes="max-autotune" in run.compile,
        )
        for run in RUNS[target.kind]
    ]


def test_throughput(compare: Callable[[Plan], Row], plan: Plan) -> None:
    compare(plan)
