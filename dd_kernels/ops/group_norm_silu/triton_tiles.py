"""How GroupNorm is cut into tiles for Triton, and what its forward and backward kernels share.

A tile is [channels, pixels] in either memory format. Where a tile that holds whole groups fits into the
registers of one program, one kernel reads and writes everything once. Above that, the pixels of a channel
are split over programs, whose partial results a second kernel adds in a fixed order for a third.
The cut depends on C, G and the pixels, never on the batch size, so neither do the bits of a result.
"""

from __future__ import annotations

import dataclasses
import math

import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import ASSEMBLY, is_channels_last, power_of_2


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The limits of a plan, in elements; those of tiles are powers of 2, a group may leave some registers free."""

    one_program: int  # the largest group that one program holds
    shared: int  # the largest tile of several groups: sums over each take registers of their own
    least: int  # groups smaller than this share a program
    split_tile: int  # what a program of the split reads at a time
    splits: int  # at most so many programs per channel and sample
    row_bytes: int  # of consecutive channels that a channels_last tile should have, half of it at least
    elements_per_warp: int


# Replace an entry to tune for a device.
SIZES = {
    "forward": Sizes(28672, 16384, 2048, 8192, 256, 64, 1024),
    "backward": Sizes(14336, 8192, 1024, 4096, 256, 64, 512),
}
_MAX_WARPS = 16
_MOST_SHARING = 32  # channels of a tile that holds several groups


@dataclasses.dataclass(frozen=True)
class Plan:
    """One way to cut [N, C, ...] into tiles."""

    one_program: bool
    block_channels: int  # of a tile; those above, up to BLOCK_C, are masked
    block_c: int
    block_p: int
    splits: int  # programs per channel and sample
    tiles: int  # of each program, one after another
    warps: int


def dimensions(x: Tensor) -> tuple[int, int, int]:
    """N, C and the number of pixels."""
    samples, channels = x.shape[:2]
    return samples, channels, math.prod(x.shape[2:])


def _block_of_groups(
    channels: int, group: int, block_p: int, itemsize: int, sizes: Sizes, last: bool
) -> tuple[int, int]:
    """(channels, BLOCK_C) of a tile of whole groups; (0, 0) where none fits.

    The block grows by powers of 2 until groups are no longer tiny and, in channels_last, until a pixel's
    row is long and starts at 16 bytes. The first block that fits is kept where nothing wider does.
    """
    best = (0, 0)
    block_c = power_of_2(group)
    while block_c <= max(_MOST_SHARING, power_of_2(group)):
        held = min(block_c // group * group, channels)
        if held * block_p > sizes.one_program or (held > group and block_c * block_p > sizes.shared):
            break
        row = held * itemsize
        aligned = not last or row % 16 == 0 or held == channels
        long = not last or row >= sizes.row_bytes // 2 or held == channels
        if best == (0, 0) or aligned:
            best = (held, block_c)
        if held == channels or (aligned and long and block_c * block_p >= sizes.least):
            break
        block_c *= 2
    return best


def plan(x: Tensor, num_groups: int, kind: str) -> Plan:
    """The tiles of a dense x; ``kind`` is "forward" or "backward"."""
    sizes, last = SIZES[kind], is_channels_last(x)
    _, channels, pixels = dimensions(x)
    block_p = power_of_2(pixels)
    held, block_c = _block_of_groups(channels, channels // num_groups, block_p, x.element_size(), sizes, last)
    one_program = held > 0
    if not one_program:
        widest = 2 * sizes.row_bytes // x.element_size() if last else max(1, sizes.split_tile // block_p)
        held = block_c = min(power_of_2(channels), widest)
        block_p = min(block_p, sizes.split_tile // block_c)
    tiles = triton.cdiv(triton.cdiv(pixels, block_p), sizes.splits)
    splits = triton.cdiv(pixels, tiles * block_p)
    warps = max(1, min(_MAX_WARPS, block_c * block_p // sizes.elements_per_warp))
    return Plan(one_program, held, block_c, block_p, splits, tiles, warps)


def tile_options(x: Tensor, num_groups: int, silu: bool, cut: Plan) -> dict[str, int]:
    """What the kernels that read x are compiled for."""
    channels = x.shape[1]
    return {
        "CHANNELS": channels,
        "GROUP": channels // num_groups,
        "CHANNELS_LAST": is_channels_last(x),
        "SILU": silu,
        "BLOCK_C": cut.block_c,
        "BLOCK_P": cut.block_p,
        "num_warps": cut.warps,
    }


def whole_tile_options(x: Tensor, cut: Plan) -> dict[str, int]:
    """What the kernels of one program per tile are compiled for beside that."""
    return {"BLOCK_CHANNELS": cut.block_channels, "FULL": dimensions(x)[2] == cut.block_p}


def combine_options(channels: int, group: int, cut: Plan) -> dict[str, int]:
    """What the kernels that add up a group's partial results are compiled for; their tile is [splits, channels]."""
    block_c = power_of_2(group)
    block_s = max(1, min(1024 // block_c, power_of_2(cut.splits)))
    return {"CHANNELS": channels, "GROUP": group, "BLOCK_S": block_s, "BLOCK_C": block_c, "num_warps": 4}


@triton.jit
def place(channel, pixel, pixels, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Where an element lies in its sample."""
    return pixel * CHANNELS + channel if CHANNELS_LAST else channel * pixels + pixel


@triton.jit
def whole_tile(
    pixels,
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    FULL: tl.constexpr,
):
    """(n, channel, inside, base, offset, mask) of this program's groups, all their pixels.

    channel and inside are [BLOCK_C]; the elements [BLOCK_C, BLOCK_P] lie at base, a 64-bit scalar, + offset.
    FULL says that there are BLOCK_P pixels: the mask is then [BLOCK_C, 1], and costs no registers.
    """
    blocks: tl.constexpr = tl.cdiv(CHANNELS, BLOCK_CHANNELS)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * BLOCK_CHANNELS
    c = tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    inside = (c < BLOCK_CHANNELS) & (first + c < CHANNELS)
    base = n * CHANNELS * pixels + place(first, 0, pixels, CHANNELS, CHANNELS_LAST)
    offset = place(c[:, None], p[None, :], pixels, CHANNELS, CHANNELS_LAST)
    mask = inside[:, None] if FULL else inside[:, None] & (p < pixels)[None, :]
    return n, first + c, inside, base, offset, mask


@triton.jit
def split_tile(
    parts,
    span,
    pixels,
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """(n, part, channel, inside, base, offset, left) of this program, one of ``parts`` of ``span`` pixels.

    part counts over the samples too; the tile at base is the first of the part's, and ``left`` its pixels.
    """
    blocks: tl.constexpr = tl.cdiv(CHANNELS, BLOCK_C)
    part = tl.program_id(0) // blocks
    n = (part // parts).to(tl.int64)
    first_c = tl.program_id(0) % blocks * BLOCK_C
    first_p = (part % parts).to(tl.int64) * span
    c = tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    base = n * CHANNELS * pixels + place(first_c, first_p, pixels, CHANNELS, CHANNELS_LAST)
    offset = place(c[:, None], p[None, :], pixels, CHANNELS, CHANNELS_LAST)
    left = tl.minimum(pixels - first_p, span).to(tl.int32)
    return n, part.to(tl.int64), first_c + c, first_c + c < CHANNELS, base, offset, left


@triton.jit
def group_sum(v, GROUP: tl.constexpr, BLOCK_C: tl.constexpr):
    """For each channel [BLOCK_C] the sum of v over its group; a tile starts at the first channel of a group."""
    if BLOCK_C < 2 * GROUP:
        total = tl.zeros_like(v) + tl.sum(v, 0)
    else:
        group = tl.arange(0, BLOCK_C) // GROUP
        total = tl.sum(tl.where(group[:, None] == group[None, :], v[None, :], 0.0), 1)
    return total


@triton.jit
def channel_values(v, at, mask, default: tl.constexpr, BLOCK_C: tl.constexpr):
    """v at ``at`` [BLOCK_C], or the default for an argument that was not given."""
    return tl.full((BLOCK_C,), default, tl.float32) if v is None else tl.load(v + at, mask=mask, other=default)


@triton.jit
def group_values(v, n, channel, inside, CHANNELS: tl.constexpr, GROUP: tl.constexpr):
    """v [N, G] of each channel's group [BLOCK_C]."""
    return tl.load(v + n * (CHANNELS // GROUP) + channel // GROUP, mask=inside, other=0.0)


@triton.jit
def centre(value, pre_shift, at, inside, mu, BLOCK_C: tl.constexpr):
    """value + pre_shift - mu of a tile; at and mu are [BLOCK_C].

    The two small ones first, so that nothing is lost where value is small beside them; and what the rounding of
    their difference takes (Knuth) after it, so that nothing is lost where value cancels pre_shift.
    """
    if pre_shift is None:
        result = value - mu[:, None]
    else:
        before = channel_values(pre_shift, at, inside, 0.0, BLOCK_C)
        difference = before - mu
        back = difference - before
        lost = (before - (difference - back)) - (mu + back)
        result = value + difference[:, None] + lost[:, None]
    return result


@triton.jit
def affine(weight, bias, scale, shift, n, channel, mask, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr):
    """(gain, end) [BLOCK_C] of y = act(gain * normalised + end)."""
    row = n * CHANNELS + channel
    modulation = 1.0 + channel_values(scale, row, mask, 0.0, BLOCK_C)
    gain = channel_values(weight, channel, mask, 1.0, BLOCK_C) * modulation
    end = channel_values(bias, channel, mask, 0.0, BLOCK_C) * modulation
    return gain, end + channel_values(shift, row, mask, 0.0, BLOCK_C)


@triton.jit
def inverse(v):
    """1 / v for v >= 1, by NVIDIA's instruction (1 ulp): a division minds the range as well, and some kernels spill."""
    if ASSEMBLY:
        result = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [v], tl.float32, is_pure=True, pack=1)
    else:
        result = 1.0 / v
    return result


@triton.jit
def sigmoid(v):
    """1 / (1 + exp(-v))."""
    return inverse(1.0 + tl.exp(-v))
