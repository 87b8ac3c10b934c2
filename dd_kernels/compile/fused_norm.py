"""What a rewritten graph calls for a norm: the public op, or its kernel at once where the rewrite has checked the call.

A norm of a small map takes 6 us on a CPU; the public function's checks take as long again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..ops import group_norm_silu
from ..ops.activation import name_of
from ..ops.checks import KERNEL_DTYPES, is_dense, transform_reason
from ..ops.group_norm_silu.op import FORWARD
from . import workspace


def per_sample(x: Tensor, *values: Tensor | None) -> Tensor:
    """Returns the sum of values [N or 1, C, 1, ...] and [C] as [N, C]."""
    total = None
    for value in values:
        if value is not None:
            row = value if value.ndim == 1 else value.flatten(1)
            total = row if total is None else total + row
    assert total is not None
    return total.expand(x.shape[0], -1)


def may_skip_checks(x: Tensor, *small: Tensor | None) -> bool:
    """Returns whether the rewrite knows of these fake tensors what the checks of a call on a CPU would find."""
    if x.device.type != "cpu" or x.dtype not in KERNEL_DTYPES or backend.unavailable("cpu") is not None:
        return False
    return all(v is None or (v.dtype in KERNEL_DTYPES and v.is_contiguous()) for v in small)


def checked_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: int,
    pre_shift: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Any:
    """Does what :func:`dd_kernels.group_norm_silu` does, without its checks if nothing is recorded.

    :func:`may_skip_checks` must have held. Strides, grad mode, transforms and a backend asked for are what only the
    call knows.
    """
    if torch.is_grad_enabled() or not is_dense(x) or not backend.is_free() or transform_reason() is not None:
        options: dict[str, Any] = {
            "activation": name_of(activation),
            "pre_shift": pre_shift,
            "scale": scale,
            "shift": shift,
        }
        return group_norm_silu(x, num_groups, weight, bias, eps, **options)
    if pre_shift is not None:
        pre_shift = pre_shift.contiguous()
    if scale is not None and shift is not None:
        scale, shift = scale.contiguous(), shift.contiguous()
    y = workspace.empty_like(x)
    FORWARD(x, num_groups, weight, bias, eps, pre_shift, scale, shift, activation, y)
    return y
