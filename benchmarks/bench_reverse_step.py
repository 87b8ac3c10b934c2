"""One DDPM or DDIM step, from x_t and the model's output to x_{t-1}: plain PyTorch, compiled or not, and diffusers.

"In place" is how :func:`dd_kernels.sample` runs it; a new tensor's pages can cost more than the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import dd_kernels as dd
from dd_kernels.ops.reverse_step.table import COLUMNS

from . import machine
from .harness import Case, Plan, Row, Target, dtype_name, on_threads, rotated

SHAPES = {
    "cpu": [(16, 3, 32, 32), (64, 3, 32, 32), (1, 3, 32, 32), (64, 3, 64, 64)],
    "cuda": [(256, 3, 32, 32), (1, 3, 32, 32), (64, 3, 256, 256), (16, 4, 64, 64)],
}
MAIN = {"cpu": (64, 3, 32, 32), "cuda": (256, 3, 32, 32)}  # with every variant and peer
SCHEDULE = dd.linear_schedule()
TABLES = {"ddpm": dd.ddpm(SCHEDULE), "ddim": dd.ddim(SCHEDULE, steps=50)}
SEEDS = {"ddpm": 0, "ddim": None}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
Step = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Variant:
    """What is varied beside the shape."""

    sampler: str
    shape: tuple[int, ...]
    in_place: bool = False
    out_dtype: torch.dtype = torch.float32
    layout: str = "contiguous"

    def __str__(self) -> str:
        place = " in place" if self.in_place else ""
        return f"reverse_step {self.sampler}{place} {self.shape} {dtype_name(self.out_dtype)} {self.layout}"


def eager_step(table: dd.StepTable, index: int) -> Step:
    """The step as one writes it in PyTorch, its coefficients numbers on the host."""
    row = dict(zip(COLUMNS, table.rows[index].tolist(), strict=True))

    def step(x: Tensor, out: Tensor) -> Tensor:
        x0 = (row["x0_num_x"] * x + row["x0_num_out"] * out) / row["x0_den"]
        if math.isfinite(row["x0_clip"]):
            x0 = x0.clamp(-row["x0_clip"], row["x0_clip"])
        x_prev = row["prev_from_x0"] * x0 + row["prev_from_x"] * x
        if row["prev_from_out"]:
            x_prev = x_prev + row["prev_from_out"] * out
        return x_prev + row["sigma"] * torch.randn_like(x) if row["sigma"] else x_prev

    return step


def diffusers_step(sampler: str) -> Step | str:
    """Its scheduler's step, or why there is none."""
    try:
        from diffusers import DDIMScheduler, DDPMScheduler
    except ImportError:
        return "diffusers is not installed"
    scheduler = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}[sampler]()
    scheduler.set_timesteps(len(TABLES[sampler]))
    t = scheduler.timesteps[len(scheduler.timesteps) // 2]  # on the host: on a device every step would wait for it
    return lambda x, out: scheduler.step(out, t, x, return_dict=False)[0]


def _case(target: Target, variant: Variant) -> Case:
    table, shape, device = TABLES[variant.sampler], variant.shape, target.device
    index, seed = len(table) // 2, SEEDS[variant.sampler]

    def ours(backend: str) -> Step:
        def step(x: Tensor, out: Tensor) -> Tensor:
            x_prev = x if variant.in_place else None
            return dd.reverse_step(x, out, table, index, seed=seed, x_prev=x_prev, backend=backend)

        return step

    def make() -> tuple[Tensor, Tensor]:
        memory_format = LAYOUTS[variant.layout]
        x, out = (torch.randn(shape, device=device).contiguous(memory_format=memory_format) for _ in range(2))
        return x, out.to(variant.out_dtype)

    size = (4 + variant.out_dtype.itemsize + 4) * torch.Size(shape).numel()
    eager = eager_step(table, index)
    peers = {"diffusers": diffusers_step(variant.sampler), "eager": eager}
    peers |= {name: ours(name) for name in machine.kernels(target.kind)[1:]}
    if variant == Variant(variant.sampler, MAIN[target.kind]):
        torch._dynamo.reset()
        peers |= {"torch.compile": torch.compile(eager, dynamic=False), "reference": ours("reference")}
    name = f"{variant.sampler} in place" if variant.in_place else variant.sampler
    dtype = "float32" if variant.out_dtype == torch.float32 else f"float32 and {dtype_name(variant.out_dtype)}"
    inputs = rotated(target, make, size)
    return Case("reverse_step", name, shape, ours("auto"), inputs, size, peers, dtype, variant.layout, device)


def _variants(kind: str) -> list[Variant]:
    main, samplers = MAIN[kind], tuple(TABLES)
    found = [Variant(sampler, main) for sampler in samplers]
    found += [Variant(sampler, main, in_place=True, out_dtype=torch.bfloat16) for sampler in samplers]
    found += [Variant(sampler, main, out_dtype=torch.bfloat16) for sampler in samplers]
    found += [Variant(sampler, shape, in_place=True) for shape in SHAPES[kind] for sampler in samplers]
    found += [Variant(sampler, main, layout="channels_last") for sampler in samplers]
    return found + [Variant(sampler, shape) for shape in SHAPES[kind] if shape != main for sampler in samplers]


def plans(target: Target) -> list[Plan]:
    """Every variant at one size, and other sizes with a new tensor and in place."""
    return [
        plan
        for variant in _variants(target.kind)
        for plan in on_threads(target, str(variant), lambda variant=variant: _case(target, variant))
    ]


def test_reverse_step(compare: Callable[[Plan], Row], plan: Plan) -> None:
    compare(plan)
