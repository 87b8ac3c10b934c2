"""GroupNorm and an activation in plain PyTorch, differentiable by autograd any number of times."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..activation import activate
from .arguments import Arguments


def group_norm_silu(a: Arguments) -> Tensor | tuple[Tensor, Tensor]:
    """Returns y, or (y, x + residual): act(GroupNorm(x + pre_shift) (1 + scale) + shift).

    Computes in float32, and in float64 where x is that.
    """
    x = a.x if a.residual is None else a.x + a.residual
    joined = x if a.skip is None else torch.cat([x, a.skip], 1)
    y = _normalised_and_activated(joined, a)
    return y if a.residual is None else (y, x)


def _normalised_and_activated(x: Tensor, a: Arguments) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)

    def per_channel(v: Tensor) -> Tensor:  # [N, C] or [C] -> [N, C, 1, ...]
        return v.to(dtype).reshape(*v.shape, *[1] * (x.ndim - 2))

    h = x.to(dtype)
    if a.pre_shift is not None:
        h = h + per_channel(a.pre_shift)
    y = _group_norm(h, a.num_groups, a.eps)
    if a.weight is not None:
        y = y * per_channel(a.weight)
    if a.bias is not None:
        y = y + per_channel(a.bias)
    if a.scale is not None:
        y = y * (1 + per_channel(a.scale))
    if a.shift is not None:
        y = y + per_channel(a.shift)
    return activate(y, a.activation).to(x.dtype)


def _group_norm(h: Tensor, num_groups: int, eps: float) -> Tensor:
    if h.numel() == 0:  # torch.group_norm's gradients would be NaN
        return h
    # Where channels are last, torch sums squares in float32 unshifted, and its float64 gradients crash.
    y = torch.group_norm(h.contiguous(), num_groups, None, None, eps)  # F.group_norm refuses groups of one element
    if checks.transforms_active():  # vmap does not tell a layout
        return y
    return y.contiguous(memory_format=checks.memory_format(h))
