"""The operators behind conv2d: their schemas, and the gradients by kernels."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..tracing import operator
from . import reference
from .reference import Padding

Keep = Callable[[Callable[[], int]], Tensor | None]


class Method(enum.IntEnum):
    """The algorithms as the ops carry them, ``int method``; csrc/conv2d/arguments.h has the same numbers."""

    FASTEST = 0  # the cost model chooses among all
    ACCURATE = 1  # the cost model chooses among those that round no more than a direct sum
    DIRECT = 2
    WINOGRAD2 = 3  # F(2x2, 3x3)
    WINOGRAD4 = 4  # F(4x4, 3x3)


_FORWARD = operator(
    "conv2d",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor? shift, int activation, Tensor? residual, "
    "int stride, int top, int left, bool turned, int method, bool bfloat16, Tensor(a!) y, Tensor(b!)? kept=None, "
    "bool doubled=False) -> ()",
)
_WEIGHT_GRADIENT = operator(
    "conv2d_weight_gradient", "(Tensor dy, Tensor x, int top, int left, int method, Tensor(a!) dweight) -> ()"
)
# The elements of ``kept``, in which a call leaves its packed filters to the next one; 0 where that does not pay.
torch.library.define(
    "dd_kernels::conv2d_kept_size",
    "(Tensor x, Tensor weight, int stride, int top, int left, bool turned, int method, bool bfloat16, Tensor y) -> int",
)
_KEPT_SIZE = torch.ops.dd_kernels.conv2d_kept_size.default


def channels_last(x: Tensor) -> Tensor:
    """Returns x in channels_last, x itself where it is."""
    return x.contiguous(memory_format=torch.channels_last)


def _weight_for_kernels(weight: Tensor) -> Tensor:
    """Returns the weight contiguous or in channels_last."""
    dense = weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)
    return weight if dense else weight.contiguous()


def _float32(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.to(torch.float32).contiguous()


def out_size(x: Tensor, weight: Tensor, stride: int, padding: Padding, doubled: bool = False) -> tuple[int, int]:
    """Returns the height and width of the result."""
    left, right, top, bottom = padding
    height, width = (2 * size if doubled else size for size in x.shape[2:])
    height, width = height + top + bottom - weight.shape[2], width + left + right - weight.shape[3]
    return height // stride + 1, width // stride + 1


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: int,
    residual: Tensor | None,
    stride: int,
    padding: Padding,
    method: int,
    bfloat16: bool = False,
    keep: Keep | None = None,
    y: Tensor | None = None,
    doubled: bool = False,
) -> Tensor:
    """Runs the kernel, on request with products of bfloat16; the result is channels_last, in ``y`` if that is given.

    ``keep`` returns the memory in which packed filters stay for the next call, given their size. Each pixel of an x to
    be ``doubled`` is 2 x 2 pixels of what is convolved.
    """
    if y is None:
        size = (x.shape[0], weight.shape[0], *out_size(x, weight, stride, padding, doubled))
        y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    residual = None if residual is None else channels_last(residual)
    small = (_float32(scale), _float32(shift), activation, residual, stride, padding[2], padding[0])
    x, filters = channels_last(x), _weight_for_kernels(weight)
    kept = None
    if keep is not None and filters is weight:
        kept = keep(lambda: _KEPT_SIZE(x, weight, stride, padding[2], padding[0], False, method, bfloat16, y))
    _FORWARD(x, filters, _float32(bias), *small, False, method, bfloat16, y, kept, doubled)
    return y


def input_gradient(
    dy: Tensor, x: Tensor, weight: Tensor, stride: int, padding: Padding, method: int, bfloat16: bool = False
) -> Tensor:
    """Returns dL/dx: for stride 1 a convolution of dy with the turned weights, by the forward kernel; else torch's."""
    if stride != 1:
        return reference.input_gradient(dy, x, weight, stride, padding)
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    top, left = weight.shape[2] - 1 - padding[2], weight.shape[3] - 1 - padding[0]
    weight = _weight_for_kernels(weight)
    _FORWARD(channels_last(dy), weight, None, None, None, 0, None, 1, top, left, True, method, bfloat16, dx)
    return dx


def weight_gradient(dy: Tensor, x: Tensor, weight: Tensor, stride: int, padding: Padding, method: int) -> Tensor:
    """Returns dL/dweight: of a 3 x 3 convolution of stride 1 by the adjoint of Winograd's; else torch's."""
    if stride != 1 or weight.shape[2:] != (3, 3) or dy.numel() == 0:
        return reference.weight_gradient(dy, x, weight, stride, padding)
    dweight = torch.empty_like(_weight_for_kernels(weight), dtype=torch.float32)
    _WEIGHT_GRADIENT(channels_last(dy), channels_last(x), padding[2], padding[0], method, dweight)
    return dweight.to(weight.dtype)


class Conv2d(torch.autograd.Function):
    """The kernel with its first derivatives; a derivative of these is torch's."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        stride: int,
        padding: Padding,
        method: int,
        bfloat16: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options = stride, padding, method, bfloat16
        ctx.bias_dtype = None if bias is None else bias.dtype
        return forward(x, weight, bias, None, None, 0, residual, stride, padding, method, bfloat16)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding, method, bfloat16 = ctx.options
        wants_x, wants_weight, wants_bias, wants_residual = ctx.needs_input_grad[:4]
        dx = dweight = dbias = None
        create_graph = torch.is_grad_enabled()  # what follows is differentiated itself
        if not create_graph:
            dy = channels_last(dy)  # once for all that read it
        if wants_x:
            arguments = dy, x, weight, stride, padding
            dx = reference.input_gradient(*arguments) if create_graph else input_gradient(*arguments, method, bfloat16)
        if wants_weight:
            arguments = dy, x, weight, stride, padding
            dweight = reference.weight_gradient(*arguments) if create_graph else weight_gradient(*arguments, method)
        if wants_bias:
            dbias = dy.sum((0, 2, 3), dtype=torch.promote_types(dy.dtype, torch.float32)).to(ctx.bias_dtype)
        return dx, dweight, dbias, dy if wants_residual else None, None, None, None, None
