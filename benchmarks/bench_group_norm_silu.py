"""group_norm_silu, forward and backward, against PyTorch's GroupNorm then SiLU, compiled or not, and apex's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor

import dd_kernels as dd

from . import machine
from .harness import Case, Plan, Row, Target, dtype_name, on_threads, rotated
from .shapes import GROUPS

# (batch, channels, side): with every peer, in both directions.
MAIN = {
    "cpu": [(8, 128, 32), (8, 256, 16), (8, 512, 8)],
    "cuda": [(256, 128, 32), (256, 256, 16), (256, 256, 8), (16, 320, 64), (2, 320, 64), (1, 512, 256), (8, 128, 512)],
}
COMPILED = {"cpu": [(8, 128, 32), (8, 512, 8)], "cuda": [(256, 128, 32), (16, 320, 64)]}
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16, torch.float32)}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
EPS = 1e-6
Function = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Variant:
    """One case; ``peers``: beside eager, those that take long to prepare."""

    size: tuple[int, int, int]
    dtype: torch.dtype
    layout: str
    model: str | None = None
    backward: bool = False
    peers: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (*self.size, self.size[2])

    def __str__(self) -> str:
        way = "backward" if self.backward else "forward"
        return f"group_norm_silu {way} {self.shape} {dtype_name(self.dtype)} {self.layout}"


def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Two calls, as models have them."""
    return F.silu(F.group_norm(x, GROUPS, weight, bias, EPS))


def _ours(backend: str) -> Function:
    return lambda x, weight, bias: dd.group_norm_silu(x, GROUPS, weight, bias, EPS, backend=backend)


def _apex(variant: Variant) -> Function | str:
    """apex.contrib.group_norm: channels_last only, and its module holds its parameters."""
    try:
        from apex.contrib.group_norm import GroupNorm
    except ImportError:
        return "apex is not installed"
    norm = GroupNorm(GROUPS, variant.size[1], eps=EPS, act="silu", device="cuda", dtype=variant.dtype)
    return lambda x, weight, bias: torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x,))


def _functions(target: Target, variant: Variant) -> dict[str, Function | str]:
    found: dict[str, Function | str] = {"ours": _ours("auto"), "eager": eager}
    found |= {name: _ours(name) for name in machine.kernels(target.kind)[1:]}
    if "torch.compile" in variant.peers:
        torch._dynamo.reset()
        with contextlib.suppress(AttributeError):  # else its backward pass runs but once
            torch._functorch.config.donated_buffer = False
        found["torch.compile"] = torch.compile(eager, dynamic=False)
    if "reference" in variant.peers:
        found["reference"] = _ours("reference")
    if target.kind == "cuda" and variant.layout == "channels_last":
        found["apex"] = _apex(variant)
    return found


def gradients(forward: Function, arguments: tuple[Tensor, ...], dy: Tensor) -> Callable[[], object]:
    """Runs the backward pass of one forward pass as often as wanted."""
    with torch.enable_grad():
        leaves = tuple(v.detach().requires_grad_() for v in arguments)
        y = forward(*leaves)
    return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)


def _case(target: Target, variant: Variant) -> Case:
    functions, device, dtype = _functions(target, variant), target.device, variant.dtype
    passes = 3 if variant.backward else 2  # x and dy to dx; x to y
    size = passes * dtype.itemsize * torch.Size(variant.shape).numel()
    weight, bias = (torch.randn(variant.size[1], device=device, dtype=dtype) for _ in range(2))

    def random() -> Tensor:
        return torch.randn(variant.shape, device=device).to(dtype).contiguous(memory_format=LAYOUTS[variant.layout])

    case = Case("group_norm_silu", "forward", variant.shape, functions.pop("ours"), [], size, functions)
    case.dtype, case.layout, case.device = dtype_name(dtype), variant.layout, device
    case.extra = {} if variant.model is None else {"model": variant.model}
    if variant.backward:
        _take_backward(case, target, lambda: ((random(), weight, bias), random()))
    else:
        case.inputs = rotated(target, lambda: (random(), weight, bias), size)
    return case


def _take_backward(case: Case, target: Target, make: Callable[[], tuple[tuple[Tensor, ...], Tensor]]) -> None:
    """Turns the forward case into its backward; the forward passes are made in ``make``, untimed."""
    forwards = {"ours": case.ours, **{name: peer for name, peer in case.peers.items() if callable(peer)}}
    sets = rotated(target, make, case.bytes_moved)
    prepared: dict[str, list[Callable[[], object]]] = {}

    def run_of(name: str) -> Callable[[int], object]:
        def run(i: int) -> object:  # the first call of each makes the forward pass
            if name not in prepared:
                prepared[name] = [gradients(forwards[name], *arguments) for arguments in sets]
            return prepared[name][i]()

        return run

    case.name, case.inputs = "backward", [(i,) for i in range(len(sets))]
    case.ours = run_of("ours")
    case.peers = {name: run_of(name) if name in forwards else peer for name, peer in case.peers.items()}


def plans_of(target: Target, variants: Sequence[Variant]) -> list[Plan]:
    """A plan, or one for each number of threads, for every variant."""
    return [
        plan
        for variant in variants
        for plan in on_threads(target, str(variant), lambda variant=variant: _case(target, variant))
    ]


def main_variants(kind: str) -> list[Variant]:
    """The main sizes in both directions; the first dtype of the device with every peer, others with fewer sizes."""
    first = DTYPES[kind][0]
    found = []
    for dtype in DTYPES[kind]:
        for backward in (False, True):
            for size in MAIN[kind] if dtype == first else MAIN[kind][:2]:
                peers = ("torch.compile", "reference") if dtype == first and size in COMPILED[kind] else ()
                found += [Variant(size, dtype, layout, None, backward, peers) for layout in LAYOUTS]
    return found


def plans(target: Target) -> list[Plan]:
    """The main sizes; all shapes of whole models are in bench_model_norms."""
    return plans_of(target, main_variants(target.kind))


def test_group_norm_silu(compare: Callable[[Plan], Row], plan: Plan) -> None:
    compare(plan)
