"""Noise as a function of (seed; element, sample, draw, stream): no state, no tensor to keep."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ... import backend as backends
from ..checks import FLOAT_DTYPES, TRANSFORM, transforms_active
from ..tracing import as_traced
from . import reference
from .key import check_word, noise_key
from .op import OP, Arguments
from .streams import Stream

__all__ = ["Stream", "noise_key", "randn"]


def randn(
    shape: Sequence[int],
    *,
    seed: int | Tensor,
    first_sample: int = 0,
    draw: int = 0,
    stream: int = int(Stream.X_T),
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
        first_sample: index of sample 0 of this tensor in the whole job, in [0, 2^32 - N].
        draw: in [0, 2^32); the timestep for a reverse step, the training step for q_sample.
        stream: in [0, 2^32); what the noise is for, see :class:`dd_kernels.ops.randn.Stream`, whose numbers
            below 256 this package keeps for its own uses.
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
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype must be float32, bfloat16, float16 or float64; got {dtype}")
    stream = check_word("stream", stream, 32)
    reason = TRANSFORM if transforms_active() else None
    if dtype is torch.float64:
        reason = "the kernels draw 32- and 16-bit floats, and dtype is float64"
    chosen = backends.choose("randn", backend, device, reason)
    z = torch.empty(shape, dtype=dtype, device=device, memory_format=memory_format)
    key = noise_key(seed, first_sample, draw, z.device, shape[0])
    call = (z, key, stream)
    if type(z) is not Tensor:
        call = as_traced(call)
    if chosen == "reference":
        return z.copy_(reference.randn(Arguments(*call)))
    if chosen == "triton":
        from . import triton

        triton.randn(Arguments(*call))
    else:
        OP(*call)
    return z
