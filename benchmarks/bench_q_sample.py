"""q_sample against plain PyTorch, compiled or not, and diffusers' add_noise, which wants its noise drawn before."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import dd_kernels as dd

from . import machine
from .harness import Case, Plan, Row, Target, on_threads, rotated

SHAPES = {
    "cpu": [(1, 3, 32, 32), (16, 3, 32, 32), (64, 3, 32, 32), (64, 3, 64, 64)],
    "cuda": [(256, 3, 32, 32), (64, 3, 256, 256)],
}
COMPILED = {"cpu": (64, 3, 32, 32), "cuda": (256, 3, 32, 32)}
SCHEDULE = dd.linear_schedule()
Function = Callable[..., Tensor]


def timesteps(samples: int) -> Tensor:
    """One for each sample, the same every time."""
    return torch.randint(len(SCHEDULE), (samples,), generator=torch.Generator().manual_seed(0))


def _eager(rows: Tensor, t: Tensor, drawn: bool) -> Function:
    """Equation 4 of DDPM (Ho et al., 2020) as one writes it in PyTorch; rows [T, 2]."""
    a, b = rows[:, 0], rows[:, 1]

    def run(x: Tensor, z: Tensor | None = None) -> Tensor:
        z = torch.randn_like(x) if drawn else z
        return a[t].view(-1, 1, 1, 1) * x + b[t].view(-1, 1, 1, 1) * z

    return run


def diffusers_add_noise(t: Tensor, drawn: bool) -> Function | str:
    """Its function, with noise drawn before where it is not given; or why there is none."""
    try:
        from diffusers import DDPMScheduler
    except ImportError:
        return "diffusers is not installed"
    scheduler = DDPMScheduler()
    if drawn:
        return lambda x: scheduler.add_noise(x, torch.randn_like(x), t)
    return lambda x, z: scheduler.add_noise(x, z, t)


def _case(target: Target, shape: tuple[int, ...], drawn: bool) -> Case:
    device = target.device
    t = timesteps(shape[0]).to(device)
    size = (2 if drawn else 3) * 4 * torch.Size(shape).numel()
    inputs = rotated(target, lambda: tuple(torch.randn(shape, device=device) for _ in range(1 if drawn else 2)), size)

    def ours(backend: str) -> Function:
        if drawn:
            return lambda x: dd.q_sample(x, t, SCHEDULE, seed=0, backend=backend)
        return lambda x, z: dd.q_sample(x, t, SCHEDULE, z, backend=backend)

    eager = _eager(SCHEDULE.on(torch.device(device)).rows, t, drawn)
    peers = {"diffusers": diffusers_add_noise(t, drawn), "eager": eager}
    peers |= {name: ours(name) for name in machine.kernels(target.kind)[1:]}
    if shape == COMPILED[target.kind]:
        torch._dynamo.reset()
        peers |= {"torch.compile": torch.compile(eager, dynamic=False), "reference": ours("reference")}
    name = "noise drawn" if drawn else "noise given"
    return Case("q_sample", name, shape, ours("auto"), inputs, size, peers, device=device)


def plans(target: Target) -> list[Plan]:
    """Some sizes, with the noise given and drawn."""
    return [
        plan
        for drawn in (False, True)
        for shape in SHAPES[target.kind]
        for plan in on_threads(
            target,
            f"q_sample {'drawn' if drawn else 'given'} {shape}",
            lambda shape=shape, drawn=drawn: _case(target, shape, drawn),
        )
    ]


def test_q_sample(compare: Callable[[Plan], Row], plan: Plan) -> None:
    compare(plan)
