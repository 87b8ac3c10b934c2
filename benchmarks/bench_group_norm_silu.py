"""group_norm_silu, forward and backward, against PyTorch's GroupNorm then SiLU, eager and compiled.

The shapes are those of the cifar10 DDPM U-Net's norms, 32 groups each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dd_kernels as dd

from .harness import Case, rotated

FORWARD = [(1, 256, 4), (1, 512, 16), (8, 128, 32), (8, 384, 32), (8, 256, 16), (8, 512, 8)]
BACKWARD = [(8, 128, 32), (8, 256, 16), (8, 512, 8)]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
GROUPS, EPS = 32, 1e-6


def _eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, GROUPS, weight, bias, EPS))


def _ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return dd.group_norm_silu(x, GROUPS, weight, bias, EPS)


def _compiled() -> Callable[..., Tensor]:
    torch._dynamo.reset()
    return torch.compile(_eager, dynamic=False)


def _shape(size: tuple[int, int, int]) -> tuple[int, int, int, int]:
    return (*size, size[2])


def _random(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=LAYOUTS[layout])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


CASES = [(size, torch.float32) for size in FORWARD] + [((8, 256, 16), torch.bfloat16)]
BACKWARD_CASES = [(size, torch.float32) for size in BACKWARD] + [((8, 256, 16), torch.bfloat16)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("size", "dtype"), CASES, ids=str)
def test_forward(
    compare: Callable[[Case], dict[str, Any]], size: tuple[int, int, int], dtype: torch.dtype, layout: str
) -> None:
    shape = _shape(size)
    weight, bias = torch.randn(shape[1], dtype=dtype), torch.randn(shape[1], dtype=dtype)
    moved = 2 * dtype.itemsize * torch.Size(shape).numel()  # read x, write y
    inputs = rotated(lambda: (_random(shape, dtype, layout), weight, bias), moved)
    peers = {"eager": _eager, "torch.compile": _compiled()}
    compare(Case("group_norm_silu", "forward", shape, _ours, inputs, moved, peers, _name(dtype), layout))


def _gradients(forward: Callable[..., Tensor], arguments: tuple[Tensor, ...], dy: Tensor) -> Callable[[], object]:
    """Runs the backward pass of one forward pass as often as wanted."""
    with torch.enable_grad():
        leaves = tuple(v.detach().requires_grad_() for v in arguments)
        y = forward(*leaves)
    return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("size", "dtype"), BACKWARD_CASES, ids=str)
def test_backward(
    compare: Callable[[Case], dict[str, Any]], size: tuple[int, int, int], dtype: torch.dtype, layout: str
) -> None:
    shape, compiled = _shape(size), _compiled()
    weight, bias = torch.randn(shape[1], dtype=dtype), torch.randn(shape[1], dtype=dtype)
    moved = 3 * dtype.itemsize * torch.Size(shape).numel()  # read x and dy, write dx

    def make() -> tuple[dict[str, Callable[[], object]]]:
        arguments, dy = (_random(shape, dtype, layout), weight, bias), _random(shape, dtype, layout)
        functions = {"ours": _ours, "eager": _eager, "torch.compile": compiled}
        return ({name: _gradients(function, arguments, dy) for name, function in functions.items()},)

    peers = {name: lambda calls, name=name: calls[name]() for name in ("eager", "torch.compile")}
    case = Case("group_norm_silu", "backward", shape, lambda calls: calls["ours"](), rotated(make, moved), moved, peers)
    case.dtype, case.layout = _name(dtype), layout
    compare(case)
