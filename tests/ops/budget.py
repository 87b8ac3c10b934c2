"""How far a kernel may be from the truth, and tensors that notice being written where they should not."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NORMAL_ERROR = 1e-6  # absolute error of a kernel's normals against float64; 6.6e-7 is the largest measured
FAST_SINE_ERROR = 2.0**-20.9  # of sin.approx and cos.approx in [-pi, pi] (PTX ISA)
FAST_NORMAL_ERROR = NORMAL_ERROR + 6.67 * FAST_SINE_ERROR  # sqrt(2 ln 2^32) is the largest radius
SENTINEL = 7.0


def within_sentinels(shape: tuple[int, ...], dtype: torch.dtype, device: str, fill: float = float("nan")) -> Tensor:
    """A contiguous tensor of ``fill`` in the middle of a storage of sentinels, off any alignment."""
    size = torch.Size(shape).numel()
    storage = torch.full((size + 34,), SENTINEL, dtype=dtype, device=device)
    view = storage[17 : 17 + size].view(shape)
    return view.fill_(fill)


def sentinels_survive(view: Tensor) -> bool:
    """Returns whether all that :func:`within_sentinels` put around a tensor is still there."""
    storage = torch.empty(0, dtype=view.dtype, device=view.device).set_(view.untyped_storage())
    return bool((storage[:17] == SENTINEL).all() and (storage[-17:] == SENTINEL).all())
