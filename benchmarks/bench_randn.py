"""randn against torch's own normals."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import dd_kernels as dd

from . import machine
from .harness import Case, Plan, Row, Target, on_threads

SHAPES = {
    "cpu": [(1, 3, 32, 32), (64, 3, 32, 32), (64, 3, 64, 64)],
    "cuda": [(1, 3, 32, 32), (256, 3, 32, 32), (64, 3, 256, 256)],
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def _case(target: Target, shape: tuple[int, ...], layout: str) -> Case:
    device, memory_format = target.device, LAYOUTS[layout]

    def drawn(backend: str) -> Callable[[], Tensor]:
        return lambda: dd.randn(shape, seed=0, device=device, memory_format=memory_format, backend=backend)

    def theirs() -> Tensor:
        if layout == "contiguous":
            return torch.randn(shape, device=device)
        return torch.empty(shape, device=device, memory_format=memory_format).normal_()

    peers = {"torch.randn": theirs, **{name: drawn(name) for name in machine.kernels(target.kind)[1:]}}
    if torch.Size(shape).numel() < 1 << 20:
        peers["reference"] = drawn("reference")
    size = 4 * torch.Size(shape).numel()
    return Case("randn", "normals", shape, drawn("auto"), [()], size, peers, layout=layout, device=device)


def plans(target: Target) -> list[Plan]:
    """Some sizes, and one of them in channels_last."""
    chosen = [(shape, "contiguous") for shape in SHAPES[target.kind]] + [(SHAPES[target.kind][1], "channels_last")]
    return [
        plan
        for shape, layout in chosen
        for plan in on_threads(
            target, f"randn {shape} {layout}", lambda shape=shape, layout=layout: _case(target, shape, layout)
        )
    ]


def test_randn(compare: Callable[[Plan], Row], plan: Plan) -> None:
    compare(plan)
