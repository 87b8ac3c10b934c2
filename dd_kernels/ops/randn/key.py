"""The key of the noise, in device memory so that a captured CUDA graph reads what it is at each replay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..upload import real

_keys: dict[tuple[int, int, int, torch.device], Tensor] = {}


def check_word(name: str, value: Any, bits: int) -> int:
    """Returns an integer as an int in [0, 2^bits); raises for a bool and for what is not an integer."""
    if type(value) is not int:
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"{name} must be an int; got {type(value).__name__}")
        value = int(value)  # Dynamo does not trace operator.index of an enumeration's member
    if not 0 <= value < 1 << bits:
        raise ValueError(f"{name} must be in [0, 2^{bits}); got {value}")
    return value


def noise_key(seed: int | Tensor, first_sample: int, draw: int, device: torch.device, samples: int = 1) -> Tensor:
    """Returns (seed, first_sample, draw) as an int64 tensor [3] on ``device``, where the kernels read it.

    ``samples`` are drawn from ``first_sample`` on, and the last must have an index below 2^32. Recent keys are
    kept, so that a sampling loop uploads its key once. A ``seed`` that is such a tensor already (to be changed
    between two replays of a CUDA graph) is taken as it is.
    """
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.shape != (3,) or seed.device != device or not seed.is_contiguous():
            raise ValueError(
                f"seed must be an int, or a dense int64 tensor [3] (seed, first_sample, draw) on {device}; "
                f"got {seed.dtype} {list(seed.shape)} of strides {list(seed.stride())} on {seed.device}"
            )
        return seed
    name = (seed, first_sample, draw, device)
    keeps = type(seed) is type(first_sample) is type(draw) is int and not is_compiling()
    key = _keys.get(name) if keeps else None  # 1.0 and True would find the key of 1
    if key is None:
        signed_seed = check_word("seed", seed, 64)
        signed_seed -= (signed_seed >> 63) << 64
        first_sample = check_word("first_sample", first_sample, 32)
        values = (signed_seed, first_sample, check_word("draw", draw, 32))
        if not keeps:
            key = torch.tensor(values, dtype=torch.int64, device=device)
        else:
            key = real(lambda: torch.tensor(values, dtype=torch.int64, device=device), device)
            if len(_keys) >= 64:
                _keys.clear()
            _keys[name] = key
    if first_sample + samples > 1 << 32:
        raise ValueError(f"first_sample + {samples} samples must be at most 2^32; got first_sample = {first_sample}")
    return key
