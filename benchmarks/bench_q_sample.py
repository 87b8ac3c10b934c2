"""q_sample beside plain PyTorch, compiled or not, and diffusers' add_noise, which takes noise that was drawn before."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import dd_kernels as dd
from dd_kernels import backend as backends
from dd_kernels.ops.randn import noise_key

from . import machine, variants
from .harness import Case, Plan, Row, Target, dtype_name, rotated

SHAPES = {
    "cpu": [(1, 3, 32, 32), (16, 3, 32, 32), (64, 3, 32, 32), (64, 3, 64, 64)],
    "cuda": [(256, 3, 32, 32), (64, 3, 256, 256)],
}
EVERY_PEER = {"cpu": (64, 3, 32, 32), "cuda": (256, 3, 32, 32)}
SCHEDULE = dd.linear_schedule()
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Variant(variants.Variant):
    """A call of q_sample."""

    noise: str = variants.option("given", "whether the caller gives the noise", ("given", "drawn"))
    alone: bool = variants.option(False, "call the op without its public function, into a given tensor (CPU)")

    def __str__(self) -> str:
        return f"q_sample {self.noise}{', op alone' if self.alone else ''} {super().__str__()}"


def _timesteps(samples: int) -> Tensor:
    """Returns a timestep for each sample, the same at every call."""
    return torch.randint(len(SCHEDULE), (samples,), generator=torch.Generator().manual_seed(0))


def _eager(rows: Tensor, t: Tensor) -> Function:
    """Returns equation 4 of DDPM (Ho et al., 2020) in plain PyTorch; ``rows`` [T, 2] holds its coefficients."""
    a, b = rows[:, 0], rows[:, 1]

    def run(x: Tensor, z: Tensor | None = None) -> Tensor:
        noise = torch.randn_like(x) if z is None else z
        return (a[t].view(-1, 1, 1, 1) * x + b[t].view(-1, 1, 1, 1) * noise).to(x.dtype)

    return run


def _diffusers(t: Tensor, drawn: bool) -> Function | str:
    """Returns diffusers' add_noise, with the noise drawn where it is not given; or why it is missing."""
    try:
        from diffusers import DDPMScheduler
    except ImportError:
        return "diffusers is not installed"
    scheduler: Any = DDPMScheduler()
    if drawn:
        return lambda x: scheduler.add_noise(x, torch.randn_like(x), t)
    return lambda x, z: scheduler.add_noise(x, z, t)


def _ours(t: Tensor, drawn: bool, backend: str) -> Function:
    """Returns our call by one backend."""
    if drawn:
        return lambda x: dd.q_sample(x, t, SCHEDULE, seed=0, backend=backend)
    return lambda x, z: dd.q_sample(x, t, SCHEDULE, z, backend=backend)


def _alone(variant: Variant, t: Tensor) -> Callable[..., None]:
    """Returns the CPU op with its arguments prepared and its output given."""
    cpu = torch.device("cpu")
    key = noise_key(0, 0, 0, cpu) if variant.noise == "drawn" else None
    x_t = torch.empty(variant.shape, dtype=variant.dtype).contiguous(memory_format=variants.LAYOUTS[variant.layout])
    rows, op = SCHEDULE.on(cpu).rows, torch.ops.dd_kernels.q_sample.default

    def run(x: Tensor, z: Tensor | None = None) -> None:
        op(x, z, rows, t, key, x_t, None)

    return run


def _case(target: Target, variant: Variant) -> Case:
    """Returns the case of a variant."""
    device, drawn, shape = target.device, variant.noise == "drawn", variant.shape
    t = _timesteps(shape[0]).to(device)
    tensors = 1 if drawn else 2
    size = (tensors + 1) * variant.dtype.itemsize * math.prod(shape)

    def make() -> tuple[Tensor, ...]:
        memory_format = variants.LAYOUTS[variant.layout]
        drawn = (torch.randn(shape, device=device).to(variant.dtype) for _ in range(tensors))
        return tuple(x.contiguous(memory_format=memory_format) for x in drawn)

    peers: dict[str, Function | str] = {"diffusers": _diffusers(t, drawn)}
    if not variant.alone:
        eager = _eager(SCHEDULE.on(torch.device(device)).rows, t)
        peers |= {"eager": eager, **{name: _ours(t, drawn, name) for name in machine.kernels(target.kind)[1:]}}
        if variant.every_peer:
            torch._dynamo.reset()
            peers |= {"torch.compile": torch.compile(eager, dynamic=False), "reference": _ours(t, drawn, "reference")}
    return Case(
        "q_sample",
        f"noise {variant.noise}{', op alone' if variant.alone else ''}",
        shape,
        _alone(variant, t) if variant.alone else _ours(t, drawn, "auto"),
        [make()] if variant.alone else rotated(target, make, size),
        size,
        peers,
        dtype_name(variant.dtype),
        variant.layout,
        device,
        hot=variant.alone,
    )


def plans(target: Target) -> list[Plan]:
    """Returns plans for a few sizes with the noise given and drawn; on a CPU also of the op alone."""
    alone = (False, True) if target.kind == "cpu" and not backends.unavailable("cpu") else (False,)
    chosen = [
        Variant(shape, every_peer=shape == EVERY_PEER[target.kind], noise=noise, alone=op_alone)
        for op_alone in alone
        for noise in ("given", "drawn")
        for shape in SHAPES[target.kind]
    ]
    return variants.plans_of(target, chosen, _case)


def test_q_sample(compare: Callable[[Plan], Row], plan: Plan) -> None:
    compare(plan)


if __name__ == "__main__":
    variants.main(Variant, _case, __doc__)
