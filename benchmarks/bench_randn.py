"""randn beside torch's own normals."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import dd_kernels as dd

from . import machine, variants
from .harness import Case, Plan, Row, Target, dtype_name

SHAPES = {
    "cpu": [(1, 3, 32, 32), (64, 3, 32, 32), (64, 3, 64, 64)],
    "cuda": [(1, 3, 32, 32), (256, 3, 32, 32), (64, 3, 256, 256)],
}
REFERENCE_ELEMENTS = 1 << 20  # the reference is measured below this size


@dataclass(frozen=True)
class Variant(variants.Variant):
    """A tensor of normals."""

    def __str__(self) -> str:
        return f"randn {super().__str__()}"


def _case(target: Target, variant: Variant) -> Case:
    """Returns the case of a variant."""
    shape, dtype, device = variant.shape, variant.dtype, target.device
    memory_format, elements = variants.LAYOUTS[variant.layout], math.prod(variant.shape)

    def ours(backend: str) -> Callable[[], Tensor]:
        return lambda: dd.randn(shape, seed=0, device=device, dtype=dtype, memory_format=memory_format, backend=backend)

    def theirs() -> Tensor:
        if variant.layout == "contiguous":
            return torch.randn(shape, device=device, dtype=dtype)
        return torch.empty(shape, device=device, dtype=dtype, memory_format=memory_format).normal_()

    peers = {"torch.randn": theirs, **{name: ours(name) for name in machine.kernels(target.kind)[1:]}}
    if elements < REFERENCE_ELEMENTS:
        peers["reference"] = ours("reference")
    return Case(
        "randn",
        "normals",
        shape,
        ours("auto"),
        [()],
        elements * dtype.itemsize,
        peers,
        dtype_name(dtype),
        variant.layout,
        device,
    )


def plans(target: Target) -> list[Plan]:
    """Returns plans for a few sizes, and for one of them in channels_last."""
    shapes = SHAPES[target.kind]
    chosen = [*(Variant(shape) for shape in shapes), Variant(shapes[1], layout="channels_last")]
    return variants.plans_of(target, chosen, _case)


def test_randn(compare: Callable[[Plan], Row], plan: Plan) -> None:
    compare(plan)


if __name__ == "__main__":
    variants.main(Variant, _case, __doc__)
