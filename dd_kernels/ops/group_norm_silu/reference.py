"""GroupNorm and an activation in plain PyTorch, differentiable by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from ..activation import activate


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    pre_shift: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: int,
) -> Tensor:
    """act(GroupNorm(x + pre_shift) (1 + scale) + shift), computed in float32 (float64 for float64)."""
    dtype = torch.promote_types(x.dtype, torch.float32)

    def per_channel(v: Tensor) -> Tensor:  # [N, C] -> [N, C, 1, ...]
        return v.to(dtype).reshape(*v.shape, *[1] * (x.ndim - 2))

    h = x.to(dtype)
    if pre_shift is not None:
        h = h + per_channel(pre_shift)
    weight, bias = (None if v is None else v.to(dtype) for v in (weight, bias))
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)  # PyTorch's backward pass fails where only the bias is there
    y = torch.group_norm(h, num_groups, weight, bias, eps)  # F.group_norm refuses groups of one element
    if scale is not None:
        y = y * (1 + per_channel(scale))
    if shift is not None:
        y = y + per_channel(shift)
    return activate(y, activation).to(x.dtype)
