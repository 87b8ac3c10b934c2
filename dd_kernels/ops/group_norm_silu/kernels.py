"""The ops behind :func:`dd_kernels.group_norm_silu`, and their gradients."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import function

from .. import checks

_OPTIONS = "int num_groups, Tensor? weight, Tensor? bias, float eps, Tensor? pre_shift, Tensor? scale, Tensor? shift"
_SCHEMAS = {
    # On the CPU mean and rstd may be empty, where nobody will read them. partials is room for the CUDA library's blocks
    # to leave one another their sums: no op allocates on the GPU.
    "group_norm_silu": (
        f"(Tensor x, {_OPTIONS}, int activation, "
        "Tensor(a!) y, Tensor(b!) mean, Tensor(c!) rstd, Tensor(d!)? partials=None) -> ()"
    ),
    "group_norm_silu_backward": (
        f"(Tensor dy, Tensor x, Tensor mean, Tensor rstd, {_OPTIONS}, int activation, "
        "Tensor(a!) dx, Tensor(b!)? dweight, Tensor(c!)? dbias, Tensor(d!)? dpre_shift, "
        "Tensor(e!)? dscale, Tensor(f!)? dshift, Tensor(g!)? partials=None) -> ()"
    ),
    # Of x + residual, which is written to sum, followed by skip along the channels, which nobody joins: the CUDA
    # library's alone. dsum is added to dx.
    "join_group_norm_silu": (
        f"(Tensor x, Tensor? residual, Tensor? skip, {_OPTIONS}, int activation, "
        "Tensor(a!) y, Tensor(b!)? sum, Tensor(c!) mean, Tensor(d!) rstd, Tensor(e!)? partials=None) -> ()"
    ),
    "join_group_norm_silu_backward": (
        f"(Tensor dy, Tensor? dsum, Tensor x, Tensor? skip, Tensor mean, Tensor rstd, {_OPTIONS}, int activation, "
        "Tensor(a!) dx, Tensor(b!)? dskip, Tensor(c!)? dweight, Tensor(d!)? dbias, Tensor(e!)? dpre_shift, "
        "Tensor(f!)? dscale, Tensor(g!)? dshift, Tensor(h!)? partials=None) -> ()"
    ),
}


def _outputs_are_arguments(*args: Any) -> None:
    return None


for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"dd_kernels::{_name}", _schema)
    torch.library.register_fake(f"dd_kernels::{_name}", _outputs_are_arguments)

# The overloads themselves: choosing one costs a microsecond per call.
_OPS = {name: getattr(torch.ops.dd_kernels, name).default for name in _SCHEMAS}


def run(chosen: str, name: str, arguments: tuple) -> None:
    """Calls the op ``name`` of the backend; outputs are among the arguments."""
    if chosen == "triton":
        from . import triton

        getattr(triton, name)(*arguments)
    else:
        _OPS[name](*arguments)


def _statistics(x: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Room for mean and rstd [N, G] (float32), which the backward pass reads."""
    mean = torch.empty(x.shape[0], num_groups, dtype=torch.float32, device=x.device)
    return mean, torch.empty_like(mean)


def _most_splits(y: Tensor, tile_channels: int, limit: int) -> int:
    """Of a tile of so many channels in split_plan of csrc/group_norm_silu/cuda_plan.h, whatever the chip."""
    tile_bytes = tile_channels * math.prod(y.shape[2:]) * y.element_size()
    return min(-(-tile_bytes // (64 << 10)), limit)


def forward_partials(chosen: str, y: Tensor, num_groups: int) -> tuple[Tensor, ...]:
    """The room that the forward op of a backend takes, as its last argument: a mean and a square sum of every part."""
    if chosen != "cuda":
        return ()
    tile_channels = y.shape[1] // num_groups if y.is_contiguous() else y.shape[1]
    splits = _most_splits(y, tile_channels, 512)
    return (torch.empty(2 * y.shape[0] * num_groups * splits, dtype=torch.float32, device=y.device),)


def backward_partials(chosen: str, dy: Tensor) -> tuple[Tensor, ...]:
    """The same of the backward op: two sums of every channel of a sample, and three of each of its parts."""
    if chosen != "cuda":
        return ()
    splits = _most_splits(dy, 1 if dy.is_contiguous() else dy.shape[1], 128)
    return (torch.empty(dy.shape[0] * dy.shape[1] * (2 + 3 * splits), dtype=torch.float32, device=dy.device),)


# To make two small tensors costs as much as the norm of a small map.
_UNREAD = torch.empty(0), torch.empty(0)


def inference(chosen: str, x: Tensor, options: tuple) -> Tensor:
    """y alone."""
    if chosen != "cpu" or type(x) is not Tensor or torch.compiler.is_compiling():
        return forward(chosen, x, options)[0]
    y = torch.empty_like(x)
    run(chosen, "group_norm_silu", (x, *options, y, *_UNREAD))
    return y


def forward(chosen: str, x: Tensor, options: tuple) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and rstd."""
    y = torch.empty_like(x)
    mean, rstd = _statistics(x, options[0])
    run(chosen, "group_norm_silu", (x, *options, y, mean, rstd, *forward_partials(chosen, y, options[0])))
    return y, mean, rstd


def join_forward(
    x: Tensor, residual: Tensor | None, skip: Tensor | None, options: tuple
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """y of x + residual and then skip, the sum, mean and rstd."""
    total = None if residual is None else torch.empty_like(x)
    if skip is None:
        y = torch.empty_like(x)
    else:
        layout = checks.memory_format(x)
        skip = skip.contiguous(memory_format=layout)
        shape = (x.shape[0], x.shape[1] + skip.shape[1], *x.shape[2:])
        y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    mean, rstd = _statistics(x, options[0])
    residual = None if residual is None else _as_laid_out(residual, x)
    written = (y, total, mean, rstd, *forward_partials("cuda", y, options[0]))
    run("cuda", "join_group_norm_silu", (x, residual, skip, *options, *written))
    return y, total, mean, rstd


def _as_laid_out(v: Tensor, x: Tensor) -> Tensor:
    """``v`` with the strides of a dense x of its shape."""
    return v if v.stride() == x.stride() else v.contiguous(memory_format=checks.memory_format(x))


def _room_for_gradients(small: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor | None]:
    """Of those that are there and needed."""
    return [torch.empty_like(v) if wanted and v is not None else None for v, wanted in zip(small, needed, strict=True)]


def _backward(ctx: Any, dy: Tensor, saved: tuple, needed: tuple[bool, ...]) -> tuple[Tensor, list[Tensor | None]]:
    """dx, and the gradients of weight, bias, pre_shift, scale and shift that are needed."""
    x, mean, rstd, weight, bias, pre_shift, scale, shift = saved
    num_groups, eps, activation, chosen = ctx.options
    gradients = _room_for_gradients(saved[3:], needed)
    dx = torch.empty_like(x)
    options = (num_groups, weight, bias, eps, pre_shift, scale, shift, activation)
    dy = _as_laid_out(dy, x)
    written = (dx, *gradients, *backward_partials(chosen, dy))
    run(chosen, "group_norm_silu_backward", (dy, x, mean, rstd, *options, *written))
    return dx, gradients


def _once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's own, whose block of ``no_grad`` takes as long as a small kernel, where gradients are recorded at all."""
    checked = function.once_differentiable(backward)

    @functools.wraps(backward)
    def either(ctx: Any, *gradients: Tensor) -> Any:
        return (checked if torch.is_grad_enabled() else backward)(ctx, *gradients)

    return either


class GroupNormSiLU(torch.autograd.Function):
    """Keeps x and the statistics, and recomputes the rest: 2 reads and 1 write in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        pre_shift: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        num_groups: int,
        eps: float,
        activation: int,
        chosen: str,
    ) -> Tensor:
        y, mean, rstd = forward(chosen, x, (num_groups, weight, bias, eps, pre_shift, scale, shift, activation))
        ctx.save_for_backward(x, mean, rstd, weight, bias, pre_shift, scale, shift)
        ctx.options = (num_groups, eps, activation, chosen)
        return y

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx, gradients = _backward(ctx, dy, ctx.saved_tensors, ctx.needs_input_grad[1:6])
        return (dx if ctx.needs_input_grad[0] else None, *gradients, None, None, None, None)


class JoinGroupNormSiLU(torch.autograd.Function):
    """y of x + residual and then skip, and the sum. Keeps what the norm has read; dx is both results'."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        skip: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        pre_shift: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        num_groups: int,
        eps: float,
        activation: int,
    ) -> Tensor | tuple[Tensor, Tensor]:
        options = (num_groups, weight, bias, eps, pre_shift, scale, shift, activation)
        y, total, mean, rstd = join_forward(x, residual, skip, options)
        ctx.save_for_backward(x if total is None else total, skip, mean, rstd, weight, bias, pre_shift, scale, shift)
        ctx.options = (num_groups, eps, activation)
        return y if total is None else (y, total)

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, dy: Tensor, dtotal: Tensor | None = None) -> tuple[Tensor | None, ...]:
        x, skip, mean, rstd, *small = ctx.saved_tensors
        num_groups, eps, activation = ctx.options
        needed = ctx.needs_input_grad
        gradients = _room_for_gradients(small, needed[3:8])
        dx, dskip, layout = torch.empty_like(x), None, checks.memory_format(x)
        if skip is not None:
            skip = skip.contiguous(memory_format=layout)
            dskip = torch.empty_like(skip)
        if dtotal is not None:
            dtotal = _as_laid_out(dtotal, x)
        options = (num_groups, *small[:2], eps, *small[2:], activation)
        dy = dy.contiguous(memory_format=layout)
        written = (dx, dskip, *gradients, *backward_partials("cuda", dy))
        run("cuda", "join_group_norm_silu_backward", (dy, dtotal, x, skip, mean, rstd, *options, *written))
        terms = (v if wanted else None for v, wanted in zip((dx, dx, dskip), needed, strict=False))
        return (*terms, *gradients, None, None, None)
