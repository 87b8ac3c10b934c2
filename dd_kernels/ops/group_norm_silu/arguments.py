"""The arguments of a call of group_norm_silu: checked in one visit, then handed to a backend as they are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks

SMALL = ("weight", "bias", "pre_shift", "scale", "shift")
_FLOAT64 = "the kernels take float32, bfloat16 and float16, and an input is float64"


class Arguments(NamedTuple):
    """The inputs of a call; the first nine stand first in the op's schema too."""

    x: Tensor  # [N, C1, ...]
    num_groups: int
    weight: Tensor | None  # [C]
    bias: Tensor | None
    eps: float
    pre_shift: Tensor | None  # [N, C]
    scale: Tensor | None
    shift: Tensor | None
    activation: int  # a member of Activation as a plain int
    residual: Tensor | None  # as x
    skip: Tensor | None  # [N, C2, ...]; C = C1 + C2


def check(a: Arguments) -> tuple[str | None, bool, bool]:
    """Raises unless the arguments are a call.

    Returns:
        Why only the reference serves the call, or None; whether the small tensors are contiguous float32, as kernels
        read them; and whether a gradient is needed. (A plain tuple: a named one costs 0.3 us.)

    Raises:
        ValueError, TypeError: wrong shape, dtype, device or option.
    """
    x, num_groups, weight, bias, eps, pre_shift, scale, shift, _, residual, skip = a
    checks.check_float("x", x)
    shape, device, dtype, needs_grad = x.shape, x.device, x.dtype, x.requires_grad
    if len(shape) < 2:
        raise ValueError(f"x must be [N, C, ...]; got {list(shape)}")
    channels = shape[1]
    if skip is not None:
        channels += _channels_of_skip(x, skip)
        needs_grad = needs_grad or skip.requires_grad
    if residual is not None:
        _check_alike("residual", residual, x, shape)
        needs_grad = needs_grad or residual.requires_grad
    if num_groups < 1 or channels % num_groups != 0:
        of = "x" if skip is None else "x and skip"
        raise ValueError(f"num_groups must divide the {channels} channels of {of}; got {num_groups}")
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0; got {eps}")
    reason, ready = _FLOAT64 if dtype is torch.float64 else None, True
    for i, v in enumerate((weight, bias, pre_shift, scale, shift)):
        if v is None:
            continue
        wanted = (channels,) if i < 2 else (shape[0], channels)
        if not isinstance(v, Tensor) or v.dtype is not torch.float32 or v.shape != wanted or v.device != device:
            checks.check_shape(SMALL[i], v, wanted, device)
            ready = ready and v.dtype is torch.float32
            if v.dtype is torch.float64:
                reason = _FLOAT64
        ready = ready and v.is_contiguous()
        needs_grad = needs_grad or v.requires_grad
    if reason is None:
        reason = checks.transform_reason()
    return reason, ready, needs_grad and torch.is_grad_enabled()


def _channels_of_skip(x: Tensor, skip: Tensor) -> int:
    checks.check_float("skip", skip)
    if skip.ndim != x.ndim:
        raise ValueError(f"skip must have the {x.ndim} dimensions of x; got {list(skip.shape)}")
    _check_alike("skip", skip, x, (x.shape[0], skip.shape[1], *x.shape[2:]))
    return skip.shape[1]


def _check_alike(name: str, v: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
    checks.check_shape(name, v, shape, x.device)
    if v.dtype != x.dtype:
        raise TypeError(f"{name} must have the dtype of x, {x.dtype}; got {v.dtype}")
