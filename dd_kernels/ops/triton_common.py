"""What the Triton kernels share: the noise contract, tiles of an elementwise op, and their sizes.

An elementwise op sees a sample as one run of elements in memory order, except where it draws noise for
a channels_last image: noise is counted in logical (C, H, W) order, so a tile there is channels by pixels.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import interpreting_triton

# Whether kernels may use NVIDIA's instructions: the interpreter has no assembly.
ASSEMBLY = tl.constexpr(torch.version.hip is None and not interpreting_triton())


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much of an elementwise op one program takes."""

    elements: int  # per program; a power of 2, at least 4
    elements_per_warp: int


# Replace an entry to tune an op for a device. Sixteen elements per thread share what is computed once per sample.
SIZES = {
    "randn": Sizes(1024, 512),
    "q_sample": Sizes(1024, 512),
    "reverse_step": Sizes(1024, 512),
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """The grid of an elementwise op, and the arguments that tell a program its tile (see :func:`tile_of`)."""

    grid: tuple[int]
    geometry: dict[str, int | bool]


def is_channels_last(x: Tensor) -> bool:
    """Returns whether a dense tensor (contiguous or channels_last) is not contiguous."""
    return not x.is_contiguous()


def power_of_2(n: int) -> int:
    """Returns the smallest power of 2 that is at least ``n``."""
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
def philox(key, c0, c1, c2, c3):
    """Philox4x32-10 of a counter, by products of 64 bits: one instruction for what takes ``tl.philox`` two."""
    seed = tl.load(key)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        product0, product1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c2 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0, (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = product1.to(tl.uint32), product0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def words(key, n, draw, stream, quad):
    """The four Philox words of each quad; key points to (seed, first_sample, draw)."""
    sample = (tl.load(key + 1) + n).to(tl.uint32)
    return philox(key, quad.to(tl.uint32), sample, draw.to(tl.uint32), stream)


@triton.jit
def minus_two_log(w):
    """-2 ln v of w = -2 v, normal v > 0, exactly 0 at v = 1; csrc/common/vec_math.h has it and the sine's too."""
    bits = w.to(tl.uint32, bitcast=True)
    exponent = (bits - 0xBFB504F3) & 0xFF800000  # e 2^23: v = 2^e (1 - g / 2), 1 - g / 2 in [sqrt(1/2), sqrt(2))
    g = (bits - exponent).to(tl.float32, bitcast=True) + 2.0
    g2 = g * g
    p01, p23 = g * 8.333482593e-2 + 2.499999106e-1, g * 1.247720886e-2 + 3.125322610e-2
    p45, p67 = g * 2.325498965e-3 + 5.172455218e-3, g * 3.507945512e-4 + 1.127061318e-3
    p = (g2 * p67 + p45) * (g2 * g2) + (g2 * p23 + p01)
    return exponent.to(tl.int32, bitcast=True).to(tl.float32) * -1.652591664e-7 + (p * g2 + g)


@triton.jit
def sine_cosine(word):
    """sin and cos of 2 pi word / 2^32 to 2^-22; the reduction to half a circle is of the integer, so exact."""
    sign = (word + 0x40000000) & 0x80000000  # the other half of the circle changes both signs
    angle = (word << 1).to(tl.int32, bitcast=True).to(tl.float32) * 7.31459055e-10  # pi / 2^32
    z = angle * angle
    s = (z * 2.608932662e-6 - 1.981111275e-4) * (z * z) + (z * 8.333088167e-3 - 1.666666046e-1)
    c = (z * -2.619381514e-7 + 2.476930424e-5) * (z * z) + (z * -1.388856916e-3 + 4.166665577e-2)
    sine, cosine = s * (angle * z) + angle, c * (z * z) + (1.0 - 0.5 * z)
    sine = (sine.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
    return sine, (cosine.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)


@triton.jit
def fast_sine_cosine(word):
    """Returns sin and cos of 2 pi word / 2^32, to 2^-20.9 (PTX ISA) where NVIDIA has instructions for them."""
    if ASSEMBLY:
        angle = word.to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-9  # pi / 2^31
        sine = tl.inline_asm_elementwise("sin.approx.f32 $0, $1;", "=f,f", [angle], tl.float32, is_pure=True, pack=1)
        cosine = tl.inline_asm_elementwise("cos.approx.f32 $0, $1;", "=f,f", [angle], tl.float32, is_pure=True, pack=1)
    else:
        sine, cosine = sine_cosine(word)
    return sine, cosine


@triton.jit
def box_muller(even, odd, FAST: tl.constexpr):
    """Two normals from two words: r cos 2 pi v and r sin 2 pi v, with r = sqrt(-2 ln u)."""
    minus_two_u = even.to(tl.float32) * -4.656612873077393e-10 - 4.656612873077393e-10  # u = (even + 1) 2^-32
    radius = tl.sqrt(minus_two_log(minus_two_u))
    sine, cosine = fast_sine_cosine(odd) if FAST else sine_cosine(odd)
    return radius * cosine, radius * sine


@triton.jit
def normals(key, n, draw, stream, quad, FAST: tl.constexpr):
    """N(0, 1) for the elements [BLOCK_C, BLOCK_P] of the quads [BLOCK_C, BLOCK_P // 4].

    FAST: what is made of them has 16 bits. A step of those moves so little that its arithmetic is the cost, and
    their rounding hides the error of faster sines, at most 3.4e-6. Those of float32 are as on every backend.
    """
    w0, w1, w2, w3 = words(key, n, draw, stream, quad)
    z0, z1 = box_muller(w0, w1, FAST)
    z2, z3 = box_muller(w2, w3, FAST)
    z = tl.join(tl.join(z0, z2), tl.join(z1, z3))  # [..., 2, 2], in the order z0 z1 z2 z3
    return tl.reshape(z, (quad.shape[0], quad.shape[1] * 4))
