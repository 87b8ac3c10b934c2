"""The operator behind attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..tracing import operator

_ATTENTION = operator(
    "attention", "(Tensor q, Tensor k, Tensor v, float scale, bool bfloat16, Tensor(a!) y) -> ()"
)  # y: [N, queries, heads, D]


def scale_of(q: Tensor, scale: float | None) -> float:
    """Returns the scale of the scores of q [..., D]: as it is given, or 1 / sqrt(D)."""
    return 1 / math.sqrt(q.shape[-1]) if scale is None else scale


def _with_dense_vectors(x: Tensor) -> Tensor:
    """Returns x, whose last dimension is dense."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, bfloat16: bool = False, y: Tensor | None = None) -> Tensor:
    """Runs the kernel; the result [N, heads, queries, D] is a view of ``y`` [N, queries, heads, D], given or new."""
    if y is None:
        n, heads, queries, _ = q.shape
        y = torch.empty((n, queries, heads, v.shape[3]), dtype=q.dtype, device=q.device)
    _ATTENTION(_with_dense_vectors(q), _with_dense_vectors(k), _with_dense_vectors(v), scale, bfloat16, y)
    return y.transpose(1, 2)
