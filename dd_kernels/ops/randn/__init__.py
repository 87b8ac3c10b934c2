"""Noise as a function of (seed; element, sample, draw, stream): no state, no tensor to keep."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ... import backend as backends
from . import reference

STREAM_X_T, STREAM_REVERSE_STEP, STREAM_Q_SAMPLE, STREAM_TIMESTEPS = range(4)

torch.library.define("dd_kernels::randn", "(Tensor(a!) z, Tensor key, int stream) -> ()")


@torch.library.register_fake("dd_kernels::randn")
def _(z: Tensor, key: Tensor, stream: int) -> None:
    return None


_OP = torch.ops.dd_kernels.randn.default  # to look it up takes as long as a check

_keys: dict[tuple, Tensor] = {}


def _check_word(name: str, value: int, bits: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int; got {type(value).__name__}")
    if not 0 <= value < 1 << bits:
        raise ValueError(f"{name} must be in [0, 2^{bits}); got {value}")
    return value


def noise_key(seed: int | Tensor, first_sample: int, draw: int, device: torch.device) -> Tensor:
    """(seed, first_sample, draw) as an int64 tensor [3] on ``device``, where the kernels read it.

    Recent keys are kept, so that a sampling loop uploads its key once. A ``seed`` that is such a
    tensor already (to be changed between two replays of a CUDA graph) is taken as it is.
    """
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.shape != (3,) or seed.device != device:
            raise ValueError(
                f"seed must be an int, or an int64 tensor [3] (seed, first_sample, draw) on {device}; "
                f"got {seed.dtype} {list(seed.shape)} on {seed.device}"
            )
        return seed
    name = (seed, first_sample, draw, device)
    keeps = type(seed) is type(first_sample) is type(draw) is int and not torch.compiler.is_compiling()
    key = _keys.get(name) if keeps else None  # 1.0 and True would find the key of 1
    if key is None:
        signed_seed = _check_word("seed", seed, 64)
        signed_seed -= (signed_seed >> 63) << 64
        values = (signed_seed, _check_word("first_sample", first_sample, 32), _check_word("draw", draw, 32))
        key = torch.tensor(values, dtype=torch.int64, device=device)
        if keeps:
            if len(_keys) >= 64:
                _keys.clear()
            _keys[name] = key
    return key


def randn(
    shape: Sequence[int],
    *,
    seed: int | Tensor,
    first_sample: int = 0,
    draw: int = 0,
    stream: int = STREAM_X_T,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    backend: str = "auto",
) -> Tensor:
    r"""Standard normal noise that depends on nothing but its coordinates.

    Element ``i`` (in logical [C, H, W] order) of sample ``n`` comes from Philox4x32-10 (Salmon et
    al., "Parallel random numbers: as easy as 1, 2, 3", 2011) with

    .. math:: key = seed, \qquad counter = (i \div 4,\ first\_sample + n,\ draw,\ stream)

    whose four words give four normals by Box-Muller, pairwise: u = (w_even + 1) 2^-32,
    v = w_odd 2^-32, r = sqrt(-2 ln u), (r cos 2 pi v, r sin 2 pi v). So an image's noise is the
    same alone, in any batch, on any rank and on every backend (words to the bit, normals to a few
    ulp of float32; where Triton rounds them to 16 bits, to 3.4e-6 before that).

    Args:
        shape: [N, ...]; the first dimension counts samples.
        seed: in [0, 2^64).
        first_sample: index of sample 0 of this tensor in the whole job, in [0, 2^32).
        draw: in [0, 2^32); the timestep for a reverse step, the training step for q_sample.
        stream: 0 x_T, 1 reverse step, 2 q_sample, 3 timesteps; 4 and up are free.
        device: where to draw; the CPU if None.
        dtype: float32, bfloat16, float16 (float64 on the reference, of the same values unrounded).
        memory_format: layout of the result; the values do not depend on it.
        backend: "auto", "cpu", "cuda", "triton" or "reference".

    Returns:
        A tensor of ``shape`` and ``dtype``, values N(0, 1).

    Raises:
        ValueError, TypeError: an argument out of its range or of another type.
        BackendUnavailableError: a backend asked for by name cannot run.
    """
    device = torch.device("cpu" if device is None else device)
    shape = torch.Size(shape)
    if len(shape) == 0:
        raise ValueError("shape must be [N, ...], N samples; got []")
    if math.prod(shape[1:]) > 1 << 34:
        raise ValueError(f"shape must have at most 2^34 elements per sample; got {list(shape)}")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"dtype must be float32, bfloat16, float16 or float64; got {dtype}")
    _check_word("stream", stream, 32)
    obstacle = "the kernels draw 32- and 16-bit floats, and dtype is float64" if dtype == torch.float64 else None
    chosen = backends.choose("randn", backend, device, obstacle)
    z = torch.empty(shape, dtype=dtype, device=device, memory_format=memory_format)
    key = noise_key(seed, first_sample, draw, z.device)
    if chosen == "reference":
        return z.copy_(reference.randn(key, shape, stream))
    if chosen == "triton":
        from . import triton

        triton.randn(z, key, stream)
    else:
        _OP(z, key, stream)
    return z
