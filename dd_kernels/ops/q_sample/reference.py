"""q_sample in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..randn import STREAM_Q_SAMPLE
from ..randn.reference import normals


def q_sample(
    x_start: Tensor, noise: Tensor | None, rows: Tensor, t: Tensor, key: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(x_t, noise): x_t = sqrt_alpha_bar[t] * x_start + sqrt_one_minus_alpha_bar[t] * noise.

    ``rows`` is [T, 2]; ``t`` is [1] or [N]. Computed in float32, or float64 for a float64 input.
    """
    dtype = torch.promote_types(x_start.dtype, torch.float32)
    if noise is None:
        noise = normals(key, x_start.shape, key[2:3], STREAM_Q_SAMPLE)
    scale = rows[t].to(dtype).reshape(-1, 2, *[1] * (x_start.ndim - 1))  # [N or 1, 2, 1, ...]
    x_t = scale[:, 0] * x_start.to(dtype) + scale[:, 1] * noise.to(dtype)
    return x_t.to(x_start.dtype), noise.to(x_start.dtype)
