"""Attention on a CPU, by blocks of keys."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import backend as backends
from .. import checks
from . import op, reference


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.check_float(name, x)
        if x.ndim != 4:
            raise ValueError(f"{name} must be [N, heads, tokens, D]; got {list(x.shape)}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}; got {x.device}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}; got {x.dtype}")
    n, heads, _, depth = q.shape
    if k.shape != (n, heads, k.shape[2], depth) or k.shape[2] == 0 or depth == 0:
        raise ValueError(f"k must be [{n}, {heads}, keys, {depth}], none of the last two 0; got {list(k.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v must be [{n}, {heads}, {k.shape[2]}, D]; got {list(v.shape)}")


def _unsupported_reason(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    if q.device.type != "cpu":
        return f"attention's kernels take CPU tensors, and q is on {q.device}"
    if q.dtype == torch.float64:
        return "the kernels take float32, bfloat16 and float16, and q is float64"
    if checks.needs_grad(q, k, v):
        return "a gradient is asked for, which only the reference gives (call under torch.no_grad())"
    return checks.transform_reason()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    *,
    products: str = "float32",
    backend: str = "auto",
) -> Tensor:
    r"""Scaled dot-product attention, without mask.

    .. math::
        y_i = \sum_j p_{ij} v_j, \qquad p_{ij} = \frac{\exp(s\, q_i \cdot k_j)}{\sum_l \exp(s\, q_i \cdot k_l)}

    for each head of each sample (Vaswani et al. 2017, eq. 1). The CPU kernel reads the keys by blocks with a running
    maximum and running sums (Milakov & Gimelshein 2018; Dao et al. 2022), so that it never holds all p. It computes in
    float32, by sums of 64 products that are then added up, the same on any number of threads and whatever the batch.

    Differentiable any number of times by the reference, which ``"auto"`` takes where a gradient is asked for.

    Args:
        q: [N, heads, queries, D], float32, bfloat16 or float16 (float64 on the reference). The strides are free where
            the last dimension is dense; else it is copied.
        k: [N, heads, keys, D], of q's dtype.
        v: [N, heads, keys, any D], of q's dtype.
        scale: s, at least 0; 1 / sqrt(D) unless given.
        products: "float32" or "bfloat16". With the latter, on processors with AVX-512 BF16 and nowhere else, the
            kernel rounds what it multiplies, p too, to bfloat16 and adds in float32, at twice the speed.
        backend: "auto", "cpu" or "reference".

    Returns:
        y [N, heads, queries, D of v] of q's dtype; in memory [N, queries, heads, D].

    Raises:
        ValueError, TypeError: wrong shape, dtype, device or option.
        BackendUnavailableError: a backend asked for by name cannot run.
    """
    _check(q, k, v)
    if products not in ("float32", "bfloat16"):
        raise ValueError(f"products must be 'float32' or 'bfloat16'; got {products!r}")
    scale = op.scale_of(q, scale)
    if not scale >= 0:
        raise ValueError(f"scale must be at least 0; got {scale!r}")
    if backends.choose("attention", backend, q.device, _unsupported_reason(q, k, v)) == "reference":
        y = reference.attention(q, k, v, scale)
        return y.transpose(1, 2).contiguous().transpose(1, 2)
    return op.forward(q, k, v, scale, products == "bfloat16")
