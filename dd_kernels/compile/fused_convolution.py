"""What a rewritten graph calls for a convolution on a CPU: in channels_last, with the norm before it if there is one.

A norm and its activation are applied as the convolution reads its input,

    conv2d(activation(norm(x)))  =  conv2d(activation(factor x + term)),

with factor and term [N, C] from the moments of x: the normalised tensor is neither written nor read. Factor and term
are rounded once each, which is off by an ulp of term, the mean of x in standard deviations: what x's own rounding is
worth. Where a gradient is asked for, the norm is a pass of its own, because the backward pass reads its result, and so
is nearest up-sampling, which the kernel otherwise does as it reads.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from .. import backend
from ..ops import conv2d
from ..ops.checks import transform_reason
from ..ops.conv2d import ACCURACIES, method_of, op
from ..ops.conv2d.reference import Padding, double
from ..ops.group_norm_silu.op import AFFINE
from . import workspace
from .fused_norm import checked_norm
from .kept_filters import keep


class Numbers(NamedTuple):
    """How exact convolutions are: see ``accuracy`` and ``products`` of :func:`dd_kernels.ops.conv2d`."""

    accuracy: str = "default"
    products: str = "float32"


FLOAT32 = Numbers()


def numbers_of(accuracy: str, dtype: str | torch.dtype | None) -> Numbers:
    """Returns the numbers that the options ``accuracy`` and ``dtype`` of a compiled model ask for.

    Raises:
        ValueError: another accuracy or dtype.
    """
    if accuracy not in ACCURACIES:
        raise ValueError(f"accuracy must be one of {', '.join(map(repr, ACCURACIES))}; got {accuracy!r}")
    if dtype not in (None, "bfloat16", torch.bfloat16):
        raise ValueError(f"dtype must be None or 'bfloat16'; got {dtype!r}")
    return Numbers(accuracy, "float32" if dtype is None else "bfloat16")


def _is_asked_for() -> bool:
    """Returns whether a backend is asked for, or the call is transformed."""
    return not backend.is_free() or transform_reason() is not None


def records() -> bool:
    """Returns whether a call must go by the public functions: it is recorded, transformed, or a backend is asked for.

    What else these check, the rewrite has checked.
    """
    return torch.is_grad_enabled() or _is_asked_for()


def _run(
    x: Tensor,
    before: tuple[Tensor | None, Tensor | None, int],
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: Padding,
    residual: Tensor | None,
    numbers: Numbers,
    doubled: bool = False,
    parameter: Tensor | None = None,
) -> Tensor:
    """Calls the kernel; ``before`` is what x passes first, ``parameter`` what the weight is a view of, if it is one."""
    numbers = Numbers(*numbers)
    method = method_of(*numbers)
    bfloat16 = numbers.products == "bfloat16"
    call = (*x.shape, stride, padding, method, bfloat16, doubled, torch.get_num_threads())
    filters = (x, weight, bias, *before, residual, stride, padding, method, bfloat16)
    if is_compiling():
        return op.forward(*filters, doubled=doubled)
    memory = partial(keep, weight if parameter is None else parameter, call, bfloat16)
    size = op.out_size(x, weight, stride, padding, doubled)
    y = workspace.empty_image(x.shape[0], weight.shape[0], *size, x.dtype)
    return op.forward(*filters, memory, y, doubled)


def channels_last_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: Padding,
    residual: Tensor | None,
    numbers: Numbers,
    doubled: bool = False,
) -> Tensor:
    """Convolves x in channels_last, and leaves the result so; the padding is of left, right, top and bottom.

    Each pixel of an x to be ``doubled`` is repeated 2 x 2 times first.
    """
    x, numbers = workspace.in_channels_last(x), Numbers(*numbers)
    if not records():
        return _run(x, (None, None, 0), weight, bias, stride, padding, residual, numbers, doubled)
    x = double(x) if doubled else x
    if _is_asked_for():
        return conv2d(x, weight, bias, stride, padding, residual=residual, **numbers._asdict())
    # The public function would give the result of a single channel back in the other layout, which that has too.
    options = method_of(*numbers), numbers.products == "bfloat16"
    y: Tensor = op.Conv2d.apply(x, weight, bias, residual, stride, padding, *options)
    return y


def norm_conv2d(norm: tuple[Any, ...], options: dict[str, Any], *convolution: Any) -> Tensor:
    """Does what :func:`channels_last_conv2d` does with the result of ``checked_norm(*norm, **options)`` as its x."""
    x, num_groups, weight, bias, eps, activation = norm
    x = workspace.in_channels_last(x)
    if records():
        return channels_last_conv2d(checked_norm(x, *norm[1:], **options), *convolution)
    small = [None if (v := options.get(name)) is None else v.contiguous() for name in ("pre_shift", "scale", "shift")]
    factor = torch.empty(x.shape[0], x.shape[1], dtype=torch.float32)
    term = torch.empty_like(factor)
    AFFINE(x, num_groups, weight, bias, eps, *small, factor, term)
    return _run(x, (factor, term, activation), *convolution)


def _as_image(tokens: Tensor) -> Tensor:
    """Returns tokens [..., C] as an image [1, C, tokens, 1] in channels_last, a view of contiguous ones."""
    return tokens.reshape(1, -1, 1, tokens.shape[-1]).permute(0, 3, 1, 2)


def tokens_linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, numbers: Numbers) -> Tensor:
    """Returns ``F.linear(x, weight, bias)``, plus the residual: by the kernel of 1 x 1 convolutions.

    Where a gradient may be asked for, it multiplies in float32, as PyTorch's.
    """
    if _is_asked_for():
        y = F.linear(x, weight, bias)
        return y if residual is None else y + residual
    image, filters, sides = _as_image(x), weight[:, :, None, None], (0, 0, 0, 0)
    beside = None if residual is None else _as_image(residual)
    if torch.is_grad_enabled():
        y = op.Conv2d.apply(image, filters, bias, beside, 1, sides, op.Method.DIRECT, False)
    else:
        y = _run(image, (None, None, 0), filters, bias, 1, sides, beside, numbers, parameter=weight)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])
