"""q_sample in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..randn.reference import normals
from ..randn.streams import Stream
from .op import Arguments


def q_sample(call: Arguments) -> tuple[Tensor, Tensor]:
    """(x_t, noise): x_t = sqrt_alpha_bar[t] * x_start + sqrt_one_minus_alpha_bar[t] * noise.

    Computed in float32, or in float64 where x_start or the noise is float64.
    """
    x_start, noise = call.x_start, call.noise
    dtype = torch.promote_types(x_start.dtype, torch.float32)
    if noise is None:
        assert call.key is not None
        noise = normals(call.key, x_start.shape, call.key[2:3], Stream.Q_SAMPLE)
    else:
        dtype = torch.promote_types(dtype, noise.dtype)
    scale = call.rows.index_select(0, call.t).to(dtype).reshape(-1, 2, *[1] * (x_start.ndim - 1))  # [N or 1, 2, 1, ...]
    x_t = scale[:, 0] * x_start.to(dtype) + scale[:, 1] * noise.to(dtype)
    return x_t.to(x_start.dtype), noise.to(x_start.dtype)
