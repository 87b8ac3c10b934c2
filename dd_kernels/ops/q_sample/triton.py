"""The forward process in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from ..randn.streams import Stream
from ..triton_common import coefficient, normals, plan, sample_index, tile_of
from .op import Arguments

_SHARED = ["rows", "t", "key"]  # read as scalars: where they happen to lie must not compile the kernel again


@triton.jit(do_not_specialize=["t_stride", "num_timesteps"], do_not_specialize_on_alignment=_SHARED)
def _q_sample(
    x_start,
    noise,
    rows,
    t,
    key,
    x_t,
    noise_out,
    noise_stride,
    t_stride,
    num_timesteps,
    elements,
    pixels,
    STREAM: tl.constexpr,
    CHANNELS: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    STRADDLES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    n, first, offset, mask, quad = tile_of(pixels, CHANNELS, BY_CHANNEL, STRADDLES, BLOCK_C, BLOCK_P)
    n = n.to(tl.int64)
    timestep, inside = sample_index(t, t_stride, n, num_timesteps)
    row = rows + timestep * 2
    sqrt_alpha_bar = coefficient(row, 0, inside)
    sqrt_one_minus_alpha_bar = coefficient(row, 1, inside)

    at = n * elements + first
    x = tl.load(x_start + at + offset, mask=mask).to(tl.float32)
    if noise is None:
        fast: tl.constexpr = x_t.dtype.element_ty != tl.float32  # noise_out has the same dtype
        z = normals(key, n, tl.load(key + 2), STREAM, quad, fast)
    else:
        z = tl.load(noise + n * noise_stride + first + offset, mask=mask).to(tl.float32)
    result = sqrt_alpha_bar * x + sqrt_one_minus_alpha_bar * z
    tl.store(x_t + at + offset, result.to(x_t.dtype.element_ty), mask=mask)
    if noise_out is not None:
        tl.store(noise_out + at + offset, z.to(noise_out.dtype.element_ty), mask=mask)


def q_sample(call: Arguments) -> None:
    """Writes x_t and, where it is asked for, the noise drawn."""
    x_start, noise = call.x_start, call.noise
    if x_start.numel() == 0:
        return
    launch = plan("q_sample", x_start, draws=noise is None)
    _q_sample[launch.grid](
        *call,
        0 if noise is None else noise.stride(0),
        int(call.t.numel() > 1),
        call.rows.shape[0],
        STREAM=int(Stream.Q_SAMPLE),
        **launch.geometry,
    )
