"""What the Triton kernels share: the noise contract, tiles of an elementwise op, and their sizes.

An elementwise op sees a sample as one run of elements in memory order, except where it draws noise for
a channels_last image: noise is counted in logical (C, H, W) order, so a tile there is channels by pixels.
"""

from __future__ import annotations

import dataclasses
import math

import triton
import triton.language as tl
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much of an elementwise op one program takes."""

    elements: int  # per program; a power of 2, at least 4
    elements_per_warp: int


# Replace an entry to tune an op for a device. Eight elements per thread are two 128-bit loads of float32.
SIZES = {
    "randn": Sizes(1024, 256),
    "q_sample": Sizes(1024, 256),
    "reverse_step": Sizes(1024, 256),
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """The grid of an elementwise op, and the arguments that tell a program its tile (see :func:`tile_of`)."""

    grid: tuple[int]
    geometry: dict[str, int | bool]


def is_channels_last(x: Tensor) -> bool:
    """Whether a dense tensor (contiguous or channels_last) is not contiguous."""
    return not x.is_contiguous()


def power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least ``n``."""
    return 1 << (n - 1).bit_length()


def plan(op: str, x: Tensor, draws: bool) -> Launch:
    """Cuts a dense tensor into tiles; ``draws`` says whether noise is drawn."""
    sizes = SIZES[op]
    elements = math.prod(x.shape[1:])
    channels, pixels = 1, elements
    by_channel = draws and is_channels_last(x)
    if by_channel:
        channels, pixels = x.shape[1], elements // x.shape[1]
    straddles = by_channel and pixels % 4 != 0
    block_c = min(power_of_2(channels), 32)
    block_p = max(4, min(sizes.elements // block_c, power_of_2(pixels + 3 * straddles)))
    tiles = triton.cdiv(channels, block_c) * triton.cdiv(pixels + 3 * straddles, block_p)
    geometry = {
        "elements": elements,
        "pixels": pixels,
        "CHANNELS": channels,
        "BY_CHANNEL": by_channel,
        "STRADDLES": straddles,
        "BLOCK_C": block_c,
        "BLOCK_P": block_p,
        "num_warps": max(1, min(8, block_c * block_p // sizes.elements_per_warp)),
    }
    return Launch((x.shape[0] * tiles,), geometry)


@triton.jit
def tile_of(
    pixels,
    CHANNELS: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    STRADDLES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """(sample, first, offset, mask, quad) of this program's tile [BLOCK_C, BLOCK_P].

    The tile's elements lie at first + offset of their sample, first a 64-bit scalar. quad holds the noise
    counters [BLOCK_C, BLOCK_P // 4], four elements each. Where the pixels of a channel are no multiple of 4,
    quads straddle channels, and each channel starts its tile at the beginning of its first quad.
    """
    tile = tl.program_id(0)
    p = tl.arange(0, BLOCK_P)[None, :]
    q = tl.arange(0, BLOCK_P // 4)[None, :]
    tiles_p = tl.cdiv(pixels + 3 if STRADDLES else pixels, BLOCK_P)
    first_p = (tile % tiles_p).to(tl.int64) * BLOCK_P
    left = tl.minimum(pixels - first_p, BLOCK_P).to(tl.int32)
    if BY_CHANNEL:
        tiles_c: tl.constexpr = tl.cdiv(CHANNELS, BLOCK_C)
        n = tile // (tiles_p * tiles_c)
        first_c = tile // tiles_p % tiles_c * BLOCK_C
        c = tl.arange(0, BLOCK_C)[:, None]
        start = (first_c + c).to(tl.int64) * pixels  # of each channel, in elements
        if STRADDLES:
            p = p - (start % 4).to(tl.int32)
        first = first_p * CHANNELS + first_c
        offset = p * CHANNELS + c
        mask = (p < left) & (first_c + c < CHANNELS)
        if STRADDLES:
            mask = mask & (p + first_p >= 0)
        quad = (start // 4 + first_p // 4).to(tl.int32) + q
    else:
        n = tile // tiles_p
        first = first_p
        offset = p
        mask = p < left
        quad = (first_p // 4).to(tl.int32) + q
    return n, first, offset, mask, quad


@triton.jit
def sample_index(index, index_stride, n, count):
    """(index of sample n clamped into [0, count), whether it was inside); index_stride 0 shares one index."""
    i = tl.load(index + n * index_stride)
    inside = (i >= 0) & (i < count)
    return tl.where(inside, i, 0), inside


@triton.jit
def coefficient(row, column: tl.constexpr, inside):
    """A column of a table's row; NaN, which makes the whole sample NaN, where the index was out of range."""
    return tl.load(row + column, mask=inside, other=float("nan"))


@triton.jit
def sine_cosine(word):
    """sin and cos of 2 pi word / 2^32 to 1.5 ulp, without the branches that an unreduced angle would need.

    The quadrant is in the top bits, so the reduction is exact; the polynomials are Cephes' sinf and cosf.
    """
    quadrant = (word + 0x20000000) >> 30
    angle = (word - (quadrant << 30)).to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-9  # pi / 2^31
    a2 = angle * angle
    s = ((-1.9515295891e-4 * a2 + 8.3321608736e-3) * a2 - 1.6666654611e-1) * (a2 * angle) + angle
    c = ((2.443315711809948e-5 * a2 - 1.388731625493765e-3) * a2 + 4.166664568298827e-2) * (a2 * a2) - 0.5 * a2 + 1.0
    swap = (quadrant & 1) != 0
    sine, cosine = tl.where(swap, c, s), tl.where(swap, s, c)
    return tl.where((quadrant & 2) != 0, -sine, sine), tl.where(((quadrant + 1) & 2) != 0, -cosine, cosine)


@triton.jit
def box_muller(even, odd):
    """Two normals from two words: r cos 2 pi v and r sin 2 pi v, with r = sqrt(-2 ln u)."""
    u = (even.to(tl.float32) + 1.0) * 2.3283064365386963e-10  # 2^-32
    radius = tl.sqrt(-2.0 * tl.log(u))
    sine, cosine = sine_cosine(odd)
    return radius * cosine, radius * sine


@triton.jit
def words(key, n, draw, stream, quad):
    """The four Philox4x32-10 words of each quad; key points to (seed, first_sample, draw)."""
    sample = (tl.load(key + 1) + n).to(tl.int32)
    return tl.philox(tl.load(key), quad, sample, draw.to(tl.int32), stream, 10)


@triton.jit
def normals(key, n, draw, stream, quad):
    """N(0, 1) for the elements [BLOCK_C, BLOCK_P] of the quads [BLOCK_C, BLOCK_P // 4]."""
    w0, w1, w2, w3 = words(key, n, draw, stream, quad)
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    z = tl.join(tl.join(z0, z2), tl.join(z1, z3))  # [..., 2, 2], in the order z0 z1 z2 z3
    return tl.reshape(z, (quad.shape[0], quad.shape[1] * 4))
