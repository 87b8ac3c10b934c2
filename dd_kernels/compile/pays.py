"""Where a rewrite is faster than what it replaces, by measurement (median of pairs, one thread, torch 2.13).

On a CPU, PyTorch's norm alone is faster on small maps (0.44 to 0.88 of its speed below 2^15 elements) and in
channels_last (0.6 to 0.9 where the map is large); a norm with its activation, or with an embedding, saves passes over
the data (1.06 to 1.6 with SiLU, 1.5 to 7 with Mish; an exact GELU 1.1 to 1.6 on small maps, 0.85 to 1.05 on large
ones). A convolution adds its bias at no cost on a CPU, and in a pass of its own on a GPU.

On a CPU with AVX-512 our convolutions that are not by Winograd's algorithm, and linear layers of 16 tokens and more,
take 0.3 to 1.06 of PyTorch's time (one thread); of a linear layer of few tokens both read the weights once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .graph import elements

_FEWEST_TOKENS = 16
_NORM_ALONE = 1 << 16  # elements of the batch
_GELU, _GELU_CHANNELS_LAST = 1 << 15, 1 << 12


def norm_alone(x: Tensor, channels_last: bool) -> str | None:
    """Returns why PyTorch's norm is kept where nothing is fused with it, or None."""
    if x.device.type != "cpu":
        return None
    if channels_last:  # of tokens PyTorch's makes a copy before and after
        return None if x.ndim == 3 else "alone, in channels_last on a CPU, PyTorch's is as fast"
    return "alone, on a small map, PyTorch's is as fast" if elements(x) < _NORM_ALONE else None


def activation(name: str, x: Tensor, channels_last: bool) -> str | None:
    """Returns why an activation is left to PyTorch, or None."""
    if name != "gelu" or x.device.type != "cpu" or elements(x) < (_GELU_CHANNELS_LAST if channels_last else _GELU):
        return None
    return "on a CPU, an exact GELU on its own is as fast"


def convolution_bias(device: torch.device) -> bool:
    """Returns whether a norm should add the bias of the convolution before it."""
    return device.type != "cpu"


def linear(x: Tensor, weight: Tensor) -> bool:
    """Returns whether our kernel should compute a linear layer of x [..., C]."""
    return elements(weight) > 0 and elements(x) >= _FEWEST_TOKENS * int(weight.shape[1])


def two_inputs(device: torch.device) -> bool:
    """Returns whether a norm should read a residual or a skip connection: where the CUDA library runs."""
    from .. import backend

    return device.type == "cuda" and backend.unavailable("cuda", "cuda") is None
