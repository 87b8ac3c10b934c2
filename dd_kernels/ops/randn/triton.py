"""Counter-based normals in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_common import normals, plan, tile_of
from .op import Arguments


@triton.jit(do_not_specialize=["stream"])
def _randn(
    z,
    key,
    stream,
    elements,
    pixels,
    CHANNELS: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    STRADDLES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    n, first, offset, mask, quad = tile_of(pixels, CHANNELS, BY_CHANNEL, STRADDLES, BLOCK_C, BLOCK_P)
    noise = normals(key, n, tl.load(key + 2), stream.to(tl.uint32), quad, z.dtype.element_ty != tl.float32)
    tl.store(z + n.to(tl.int64) * elements + first + offset, noise.to(z.dtype.element_ty), mask=mask)


def randn(call: Arguments) -> None:
    """Fills z [N, ...] with the normals of its key and stream."""
    if call.z.numel() == 0:
        return
    launch = plan("randn", call.z, draws=True)
    _randn[launch.grid](call.z, call.key, call.stream, **launch.geometry)
