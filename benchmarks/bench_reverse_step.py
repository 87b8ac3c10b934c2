"""One DDPM or DDIM step, x_t and the model's output to x_{t-1}, beside plain PyTorch, compiled or not, and diffusers.

The steps of few-step samplers are those of the drop-in schedulers, beside diffusers' own.
:func:`dd_kernels.sample` runs the step in place. The pages of a new tensor can cost more than the step.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import dd_kernels as dd
from dd_kernels import backend as backends
from dd_kernels.ops.randn import noise_key
from dd_kernels.ops.reverse_step.table import COLUMNS

from . import machine, variants
from .harness import Case, Plan, Row, Target, dtype_name, rotated

SHAPES = {
    "cpu": [(16, 3, 32, 32), (64, 3, 32, 32), (1, 3, 32, 32), (64, 3, 64, 64)],
    "cuda": [(256, 3, 32, 32), (1, 3, 32, 32), (64, 3, 256, 256), (16, 4, 64, 64)],
}
MAIN = {"cpu": (64, 3, 32, 32), "cuda": (256, 3, 32, 32)}  # measured in every variant and beside every peer
SCHEDULE = dd.linear_schedule()
TABLES = {"ddpm": dd.ddpm(SCHEDULE), "ddim": dd.ddim(SCHEDULE, steps=50)}
SEEDS = {"ddpm": 0, "ddim": None}
# Drop-ins for diffusers' classes, by the name of the sampler, with their options.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {"noise": "philox"}),
    "lcm": ("LCMScheduler", {"noise": "philox"}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "dpm++sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "noise": "philox"}),
    "flow": ("FlowMatchEulerDiscreteScheduler", {}),
}
Step = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Variant(variants.Variant):
    """A step; ``dtype`` is that of the model's output, the state is float32."""

    sampler: str = variants.option("ddpm", "whose step", (*TABLES, *SCHEDULERS))
    in_place: bool = variants.option(False, "write x_{t-1} over x_t")
    alone: bool = variants.option(False, "call the op without its public function, in place (CPU)")

    def __str__(self) -> str:
        return f"reverse_step {self.name} {super().__str__()}"

    @property
    def name(self) -> str:
        """The name of the case."""
        return f"{self.sampler}{' in place' if self.in_place else ''}{', op alone' if self.alone else ''}"


def eager_step(table: dd.StepTable, index: int) -> Step:
    """Returns the step in plain PyTorch, with its coefficients as numbers on the host."""
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


def _diffusers(sampler: str) -> Step | str:
    """Returns the step of diffusers' scheduler, or why it is missing."""
    try:
        from diffusers import DDIMScheduler, DDPMScheduler
    except ImportError:
        return "diffusers is not installed"
    scheduler: Any = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}[sampler]()
    scheduler.set_timesteps(len(TABLES[sampler]))
    # The timestep stays on the host. On the device, every step would wait for it.
    t = scheduler.timesteps[len(scheduler.timesteps) // 2]
    return lambda x, out: scheduler.step(out, t, x, return_dict=False)[0]


def _scheduler_step(sampler: str, module: Any) -> Step:
    """Returns the step in the middle of a loop of a scheduler, of second order where it keeps earlier outputs."""
    name, options = SCHEDULERS[sampler]
    if not module.__name__.startswith("dd_kernels"):
        options = {key: value for key, value in options.items() if key != "noise"}
    scheduler = getattr(module, name)(**options)
    scheduler.set_timesteps(20)
    scheduler.is_scale_input_called = True  # by the pipeline, before the model
    middle = len(scheduler.timesteps) // 2
    t = scheduler.timesteps[middle]

    def step(x: Tensor, out: Tensor) -> Tensor:
        scheduler._step_index = middle
        return scheduler.step(out, t, x, return_dict=False)[0]

    return step


def _drop_in(target: Target, variant: Variant) -> Case:
    """Returns the case of a drop-in scheduler beside diffusers' own."""
    import diffusers

    from dd_kernels.integrations import diffusers as ours

    size = 12 * math.prod(variant.shape)
    return Case(
        "reverse_step",
        f"{variant.sampler}, scheduler",
        variant.shape,
        _scheduler_step(variant.sampler, ours),
        rotated(target, lambda: _inputs(target, variant), size),
        size,
        {"diffusers": _scheduler_step(variant.sampler, diffusers)},
        layout=variant.layout,
        device=target.device,
    )


def _ours(variant: Variant, backend: str) -> Step:
    """Returns our step by one backend."""
    table, seed = TABLES[variant.sampler], SEEDS[variant.sampler]
    index = len(table) // 2

    def step(x: Tensor, out: Tensor) -> Tensor:
        x_prev = x if variant.in_place else None
        return dd.reverse_step(x, out, table, index, seed=seed, x_prev=x_prev, backend=backend)

    return step


def _alone(sampler: str) -> Callable[[Tensor, Tensor], None]:
    """Returns the CPU op in place, with its arguments prepared."""
    cpu, table, seed = torch.device("cpu"), TABLES[sampler], SEEDS[sampler]
    on, index = table.on(cpu), len(table) // 2
    key = None if seed is None else noise_key(seed, 0, 0, cpu)
    op = torch.ops.dd_kernels.reverse_step.default

    def run(x: Tensor, out: Tensor) -> None:
        op(x, out, None, None, 1.0, None, None, on.rows, on.timesteps, on.steps[index], key, x, None)

    return run


def _peers(target: Target, variant: Variant) -> dict[str, Step | str]:
    """Returns the peers' steps, or why one is missing."""
    found: dict[str, Step | str] = {"diffusers": _diffusers(variant.sampler)}
    if variant.alone:
        return found
    table = TABLES[variant.sampler]
    found["eager"] = eager = eager_step(table, len(table) // 2)
    found |= {name: _ours(variant, name) for name in machine.kernels(target.kind)[1:]}
    if variant.every_peer:
        torch._dynamo.reset()
        found |= {"torch.compile": torch.compile(eager, dynamic=False), "reference": _ours(variant, "reference")}
    return found


def _inputs(target: Target, variant: Variant) -> tuple[Tensor, Tensor]:
    memory_format = variants.LAYOUTS[variant.layout]
    x, out = (
        torch.randn(variant.shape, device=target.device).contiguous(memory_format=memory_format) for _ in range(2)
    )
    return x, out.to(variant.dtype)


def _case(target: Target, variant: Variant) -> Case:
    """Returns the case of a variant."""
    if variant.sampler in SCHEDULERS:
        return _drop_in(target, variant)
    size = (4 + variant.dtype.itemsize + 4) * math.prod(variant.shape)
    dtype = "float32" if variant.dtype == torch.float32 else f"float32 and {dtype_name(variant.dtype)}"
    return Case(
        "reverse_step",
        variant.name,
        variant.shape,
        _alone(variant.sampler) if variant.alone else _ours(variant, "auto"),
        [_inputs(target, variant)] if variant.alone else rotated(target, lambda: _inputs(target, variant), size),
        size,
        _peers(target, variant),
        dtype,
        variant.layout,
        target.device,
        hot=variant.alone,
    )


def _variants(kind: str) -> list[Variant]:
    """Lists the variants of a device."""
    main, half = MAIN[kind], torch.bfloat16
    both = [Variant(main, sampler=sampler) for sampler in TABLES]
    found = [replace(v, every_peer=True) for v in both]
    found += [replace(v, in_place=True, dtype=half) for v in both] + [replace(v, dtype=half) for v in both]
    found += [replace(v, in_place=True, shape=shape) for shape in SHAPES[kind] for v in both]
    found += [replace(v, layout="channels_last") for v in both]
    found += [replace(v, shape=shape) for shape in SHAPES[kind] if shape != main for v in both]
    if kind == "cpu" and not backends.unavailable("cpu"):
        found += [replace(v, alone=True, shape=shape) for v in both for shape in SHAPES[kind]]
    if importlib.util.find_spec("diffusers") is not None:
        found += [Variant(main, sampler=sampler) for sampler in SCHEDULERS]
    return found


def plans(target: Target) -> list[Plan]:
    """Returns plans for every variant at one size, and for other sizes with a new tensor, in place and alone (CPU)."""
    return variants.plans_of(target, _variants(target.kind), _case)


def test_reverse_step(compare: Callable[[Plan], Row], plan: Plan) -> None:
    compare(plan)


if __name__ == "__main__":
    variants.main(Variant, _case, __doc__)
