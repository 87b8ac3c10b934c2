"""Attention in plain PyTorch, differentiable by autograd any number of times."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Returns softmax(scale q k^T) v in q's dtype, computed in float32 (float64 for float64), under autocast too."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    device = q.device.type if torch.amp.is_autocast_available(q.device.type) else "cpu"
    with torch.autocast(device, enabled=False):
        scores = scale * (q.to(dtype) @ k.to(dtype).transpose(-1, -2))
        return (scores.softmax(-1) @ v.to(dtype)).to(q.dtype)
