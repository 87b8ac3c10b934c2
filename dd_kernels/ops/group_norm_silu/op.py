"""The ops behind :func:`dd_kernels.group_norm_silu`: schemas, fakes, the calls of their kernels, and autograd."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import checks
from ..tracing import operator, untraced
from . import reference
from .arguments import Arguments

_OPTIONS = (
    "int num_groups, Tensor? weight, Tensor? bias, float eps, Tensor? pre_shift, Tensor? scale, Tensor? shift, "
    "int activation"
)
# Arguments that most calls leave out come last and have a default: to convert one costs 0.2 us.
_SCHEMAS = {
    # mean and rstd [N, G] are what the backward pass reads; the CUDA library writes them always. partials is workspace
    # in which its blocks leave one another their sums: no op allocates on the GPU.
    "group_norm_silu": (
        f"(Tensor x, {_OPTIONS}, Tensor(a!) y, Tensor(b!)? mean=None, Tensor(c!)? rstd=None, "
        "Tensor(d!)? partials=None, Tensor? residual=None, Tensor? skip=None, Tensor(e!)? sum=None) -> ()"
    ),
    # dsum, the gradient of sum, is added to dx.
    "group_norm_silu_backward": (
        f"(Tensor dy, Tensor x, Tensor mean, Tensor rstd, {_OPTIONS}, Tensor(a!) dx, Tensor(b!)? dweight=None, "
        "Tensor(c!)? dbias=None, Tensor(d!)? dpre_shift=None, Tensor(e!)? dscale=None, Tensor(f!)? dshift=None, "
        "Tensor(g!)? partials=None, Tensor? skip=None, Tensor? dsum=None, Tensor(h!)? dskip=None) -> ()"
    ),
    # The norm as a map of each channel of a sample, factor * x + term, for what reads x next; on a CPU.
    "group_norm_affine": (
        "(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, Tensor? pre_shift, Tensor? scale, "
        "Tensor? shift, Tensor(a!) factor, Tensor(b!) term) -> ()"
    ),
}
_OPTION_COUNT = 9  # x and the options, as both schemas and Arguments begin
_DIFFERENTIABLE = ("x", "weight", "bias", "pre_shift", "scale", "shift", "skip")
READ_TWO = ("cuda",)  # the backends whose kernels take a residual and a skip

FORWARD = operator("group_norm_silu", _SCHEMAS["group_norm_silu"])
AFFINE = operator("group_norm_affine", _SCHEMAS["group_norm_affine"])
_UNTRACED = untraced(FORWARD)
BACKWARD = operator("group_norm_silu_backward", _SCHEMAS["group_norm_silu_backward"])


def run(
    chosen: str,
    a: Arguments,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    partials: Tensor | None = None,
    total: Tensor | None = None,
) -> None:
    """Calls the forward op of a backend, which writes y, mean, rstd and, with a residual, x + residual."""
    if chosen == "triton":
        from . import triton

        arguments: tuple[Any, ...] = (*a[:_OPTION_COUNT], y, mean, rstd)
        triton.group_norm_silu(*arguments)
    else:
        FORWARD(*a[:_OPTION_COUNT], y, mean, rstd, partials, a.residual, a.skip, total)


def run_backward(
    chosen: str,
    dy: Tensor,
    a: Arguments,
    statistics: tuple[Tensor, Tensor],
    gradients: Sequence[Tensor | None],
    partials: Tensor | None = None,
    dsum: Tensor | None = None,
    dskip: Tensor | None = None,
) -> None:
    """Calls the backward op of a backend, which writes those ``gradients`` that are there.

    They are of x, weight, bias, pre_shift, scale and shift, in this order.
    """
    options: tuple[Any, ...] = a[1:_OPTION_COUNT]
    if chosen == "triton":
        from . import triton

        arguments: tuple[Any, ...] = (dy, a.x, *statistics, *options, *gradients)
        triton.group_norm_silu_backward(*arguments)
    else:
        BACKWARD(dy, a.x, *statistics, *options, *gradients, partials, a.skip, dsum, dskip)


def _most_splits(y: Tensor, tile_channels: int, limit: int) -> int:
    """Returns the largest number of blocks that csrc/group_norm_silu/cuda_plan.h splits such a tile over."""
    tile_bytes = tile_channels * math.prod(y.shape[2:]) * y.element_size()
    return min(-(-tile_bytes // (64 << 10)), limit)


def forward_workspace(chosen: str, y: Tensor, num_groups: int) -> Tensor | None:
    """Allocates ``partials`` of the forward op: a mean and a square sum of each part of each group."""
    if chosen != "cuda":
        return None
    tile_channels = y.shape[1] // num_groups if y.is_contiguous() else y.shape[1]
    splits = _most_splits(y, tile_channels, 512)
    return torch.empty(2 * y.shape[0] * num_groups * splits, dtype=torch.float32, device=y.device)


def backward_workspace(chosen: str, dy: Tensor) -> Tensor | None:
    """Allocates ``partials`` of the backward op: two sums per channel of a sample, and three of each of its parts."""
    if chosen != "cuda":
        return None
    splits = _most_splits(dy, 1 if dy.is_contiguous() else dy.shape[1], 128)
    return torch.empty(dy.shape[0] * dy.shape[1] * (2 + 3 * splits), dtype=torch.float32, device=dy.device)


def _laid_out_like(v: Tensor, x: Tensor) -> Tensor:
    """Returns ``v``, of x's shape or another number of channels, in the layout of a dense x."""
    return v if v.shape == x.shape and v.stride() == x.stride() else v.contiguous(memory_format=checks.memory_format(x))


# In a graph it looks at strides when it runs: those of a gradient are not known at capture, since whatever reads y may
# come to be computed in another layout.
torch.library.define("dd_kernels::laid_out_like", "(Tensor(a) v, Tensor x) -> Tensor(a)")
torch.library.impl("dd_kernels::laid_out_like", "CompositeImplicitAutograd", _laid_out_like)
LAID_OUT_LIKE = torch.ops.dd_kernels.laid_out_like.default


def _in_layout_of(x: Tensor, v: Tensor) -> Tensor:
    """Returns ``v`` laid out like x: now, or in a graph that is being traced, as a call of it."""
    return (LAID_OUT_LIKE if is_compiling() else _laid_out_like)(v, x)


def _empty_result(a: Arguments) -> Tensor:
    """Allocates y, in the layout of x."""
    x, skip = a.x, a.skip
    if skip is None:
        return torch.empty_like(x)
    shape = (x.shape[0], x.shape[1] + skip.shape[1], *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=checks.memory_format(x))


def forward(chosen: str, a: Arguments) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Returns y, x + residual (None without one), and mean and rstd [N, G], which the backward pass reads."""
    x = a.x
    y = _empty_result(a)
    total = None if a.residual is None else torch.empty_like(x)
    mean = torch.empty(x.shape[0], a.num_groups, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    run(chosen, a, y, mean, rstd, forward_workspace(chosen, y, a.num_groups), total)
    return y, total, mean, rstd


class _GroupNormSiLU(torch.autograd.Function):
    """Keeps what the norm has read and the statistics, and recomputes the rest: 2 reads and 1 write going back."""

    @staticmethod
    def forward(ctx: Any, chosen: str, *arguments: Any) -> Tensor | tuple[Tensor, Tensor]:
        a = Arguments(*arguments)
        y, total, mean, rstd = forward(chosen, a)
        tensors = (a.weight, a.bias, a.pre_shift, a.scale, a.shift, a.skip)
        ctx.save_for_backward(a.x if total is None else total, *tensors, mean, rstd)
        ctx.options = (chosen, a.num_groups, a.eps, a.activation)
        return y if total is None else (y, total)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dsum: Tensor | None = None) -> tuple[Tensor | None, ...]:
        x, weight, bias, pre_shift, scale, shift, skip, mean, rstd = ctx.saved_tensors
        chosen, num_groups, eps, activation = ctx.options
        a = Arguments(x, num_groups, weight, bias, eps, pre_shift, scale, shift, activation, None, skip)
        wanted = _Wanted(ctx.needs_input_grad[1:])
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph
            gradients = _differentiable_gradients(dy, dsum, a, wanted)
        else:
            gradients = _gradients(chosen, dy, dsum, a, (mean, rstd), wanted)
        dx, dweight, dbias, dpre_shift, dscale, dshift, dskip = gradients
        dresidual = dx if wanted.residual else None
        dx = dx if wanted.x else None
        return None, dx, None, dweight, dbias, None, dpre_shift, dscale, dshift, None, dresidual, dskip


class _Wanted:
    """Which inputs need a gradient."""

    def __init__(self, needed: tuple[bool, ...]) -> None:
        by_name = dict(zip(Arguments._fields, needed, strict=True))
        self.x, self.residual = by_name["x"], by_name["residual"]
        # dx is the gradient of x and of the residual.
        self.gradients = (self.x or self.residual, *(by_name[name] for name in _DIFFERENTIABLE[1:]))


def _differentiable(a: Arguments) -> tuple[Tensor | None, ...]:
    return a.x, a.weight, a.bias, a.pre_shift, a.scale, a.shift, a.skip


def _gradients(
    chosen: str,
    dy: Tensor,
    dsum: Tensor | None,
    a: Arguments,
    statistics: tuple[Tensor, Tensor],
    wanted: _Wanted,
) -> list[Tensor | None]:
    """Returns the gradients of the differentiable arguments by the kernels of a backend, None where not wanted."""
    dy = _in_layout_of(a.x, dy)
    dsum = None if dsum is None else _in_layout_of(a.x, dsum)
    # The kernels always write dx and, where there is a skip, dskip.
    written = (True, *wanted.gradients[1:6], a.skip is not None)
    tensors = [v if w else None for v, w in zip(_differentiable(a), written, strict=True)]
    if dy.numel() == 0:  # there is nothing to sum
        return [None if v is None else torch.zeros_like(v) for v in tensors]
    gradients = [None if v is None else torch.empty_like(v) for v in tensors]
    run_backward(chosen, dy, a, statistics, gradients[:6], backward_workspace(chosen, dy), dsum, gradients[6])
    return [v if w else None for v, w in zip(gradients, wanted.gradients, strict=True)]


def _differentiable_gradients(dy: Tensor, dsum: Tensor | None, a: Arguments, wanted: _Wanted) -> list[Tensor | None]:
    """Returns the same gradients as functions that autograd can differentiate again, by the reference."""
    # One input may be computed from another: aliases keep the gradient of each apart.
    aliases = [None if v is None else v.view_as(v) for v in _differentiable(a)]
    x, weight, bias, pre_shift, scale, shift, skip = aliases
    assert x is not None
    y = reference.group_norm_silu(
        Arguments(x, a.num_groups, weight, bias, a.eps, pre_shift, scale, shift, a.activation, None, skip)
    )
    inputs = [v if w else None for v, w in zip(aliases, wanted.gradients, strict=True)]
    found = iter(torch.autograd.grad(y, [v for v in inputs if v is not None], dy, create_graph=True))
    gradients = [None if v is None else next(found) for v in inputs]
    if dsum is not None and gradients[0] is not None:
        gradients[0] = gradients[0] + dsum
    return gradients


def _prepared(chosen: str, a: Arguments) -> Arguments:
    """Returns the arguments as kernels read them: dense, and the small tensors as contiguous float32.

    The CPU's kernels convert the small ones themselves; for the others autograd casts their gradients back.
    """
    x = checks.dense(a.x)
    dtype = None if chosen == "cpu" else torch.float32
    weight, bias, pre_shift, scale, shift = (
        None if v is None else (v if dtype is None else v.to(dtype)).contiguous()
        for v in (a.weight, a.bias, a.pre_shift, a.scale, a.shift)
    )
    residual, skip = (None if v is None else _in_layout_of(x, v) for v in (a.residual, a.skip))
    return Arguments(x, a.num_groups, weight, bias, a.eps, pre_shift, scale, shift, a.activation, residual, skip)


def _joined(chosen: str, a: Arguments, ready: bool, needs_grad: bool) -> Tensor | tuple[Tensor, Tensor]:
    """Adds the residual and concatenates the skip first, for a backend whose kernels do not."""
    total = a.x if a.residual is None else a.x + a.residual
    joined = total if a.skip is None else torch.cat([total, a.skip], 1)
    y = group_norm_silu(chosen, a._replace(x=joined, residual=None, skip=None), ready, needs_grad)
    return y if a.residual is None else (y, total)  # type: ignore[return-value]


def group_norm_silu(chosen: str, a: Arguments, ready: bool, needs_grad: bool) -> Tensor | tuple[Tensor, Tensor]:
    """Returns y, or (y, x + residual), of the kernels of a backend; ``ready`` and ``needs_grad`` are from check()."""
    is_single = a.residual is None and a.skip is None
    if not is_single and chosen not in READ_TWO:
        return _joined(chosen, a, ready, needs_grad)
    if not (ready and is_single and checks.is_dense(a.x)):
        a = _prepared(chosen, a)
    if needs_grad:
        return _GroupNormSiLU.apply(chosen, *a)
    if chosen == "cpu":  # nobody will read the statistics
        y = torch.empty_like(a.x)
        (FORWARD if is_compiling() else _UNTRACED)(*a[:_OPTION_COUNT], y)
        return y
    y, total, _, _ = forward(chosen, a)
    return y if total is None else (y, total)
