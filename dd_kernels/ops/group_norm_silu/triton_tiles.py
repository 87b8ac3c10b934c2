"""The tiling of GroupNorm in Triton, and what its forward and backward kernels share.

A tile is [channels, pixels] in either memory format. Where a tile that holds whole groups fits into the
registers of one program, one kernel reads and writes everything once. For larger groups the pixels of a channel
are split over programs: a first kernel reduces each part, a second adds the partial results in a fixed order, and a
third reads the input again and writes the output.
The tiling depends on C, G and the pixels but not on the batch size, so a result's bits do not depend on it either.
"""

from __future__ import annotations

import dataclasses
import math

import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import is_channels_last, power_of_2


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The limits of a tiling, in elements; limits of tiles are powers of 2, the limit of a group need not be."""

    one_program: int  # the largest group that one program holds
    shared: int  # the largest tile of several groups, smaller since the sum over each group takes registers
    least: int  # the smallest tile wanted: groups share a program until they fill it
    split_tile: int  # the tile that a program reads at a time where groups are split
    splits: int  # the most programs per channel and sample
    row_bytes: int  # of consecutive channels in a channels_last tile: wanted, and at least half of it
    elements_per_warp: int


# Replace an entry to tune for a device.
SIZES = {
    "forward": Sizes(28672, 16384, 2048, 8192, 256, 64, 1024),
    "backward": Sizes(14336, 8192, 1024, 4096, 256, 64, 512),
}
_MAX_WARPS = 16
_MAX_SHARED_CHANNELS = 32  # of a tile that holds several groups


@dataclasses.dataclass(frozen=True)
class Plan:
    """A tiling of [N, C, ...]."""

    one_program: bool
    block_channels: int  # channels of a tile; the tile is masked from there up to block_c
    block_c: int
    block_p: int
    splits: int  # programs per channel and sample
    tiles: int  # that each of those programs reads, one after another
    warps: int


def dimensions(x: Tensor) -> tuple[int, int, int]:
    """Returns N, C and the number of pixels."""
    samples, channels = x.shape[:2]
    return samples, channels, math.prod(x.shape[2:])


def _block_of_groups(
    channels: int, group: int, block_p: int, itemsize: int, sizes: Sizes, last: bool
) -> tuple[int, int]:
    """Returns the channels and BLOCK_C of a tile of whole groups; (0, 0) where none fits.

    The block grows by powers of 2 until groups are no longer tiny and, in channels_last, until a pixel's
    row is long and aligned to 16 bytes. Where no such block fits, the first that fits is taken.
    """
    best = (0, 0)
    block_c = power_of_2(group)
    while block_c <= max(_MAX_SHARED_CHANNELS, power_of_2(group)):
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
    """Returns the tiling of a dense x; ``kind`` is "forward" or "backward"."""
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


def tile_options(x: Tensor, num_groups: int, activation: int, tiling: Plan) -> dict[str, int]:
    """Returns the constants that every kernel that reads x is compiled for."""
    channels = x.shape[1]
    return {
        "CHANNELS": channels,
        "GROUP": channels // num_groups,
        "CHANNELS_LAST": is_channels_last(x),
        "ACTIVATION": int(activation),
        "BLOCK_C": tiling.block_c,
        "BLOCK_P": tiling.block_p,
        "num_warps": tiling.warps,
    }


def whole_tile_options(x: Tensor, tiling: Plan) -> dict[str, int]:
    """Returns the further constants of the kernels that hold whole groups."""
    return {"BLOCK_CHANNELS": tiling.block_channels, "FULL": dimensions(x)[2] == tiling.block_p}


def combine_options(channels: int, group: int, tiling: Plan) -> dict[str, int]:
    """Returns the constants of the kernels that add up a group's partial results; their tile is [splits, channels]."""
    block_c = power_of_2(group)
    block_s = max(1, min(1024 // block_c, power_of_2(tiling.splits)))
    return {"CHANNELS": channels, "GROUP": group, "BLOCK_S": block_s, "BLOCK_C": block_c, "num_warps": 4}


@triton.jit
def element_offset(channel, pixel, pixels, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Returns the offset of an element in its sample."""
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
    """Locates this program's groups with all their pixels: returns (n, channel, inside, base, offset, mask).

    channel and inside are [BLOCK_C]; the elements lie at base, a 64-bit scalar, + offset [BLOCK_C, BLOCK_P].
    FULL says that there are exactly BLOCK_P pixels: the mask is then [BLOCK_C, 1] and takes no registers.
    """
    blocks: tl.constexpr = tl.cdiv(CHANNELS, BLOCK_CHANNELS)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * BLOCK_CHANNELS
    c = tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    inside = (c < BLOCK_CHANNELS) & (first + c < CHANNELS)
    base = n * CHANNELS * pixels + element_offset(first, 0, pixels, CHANNELS, CHANNELS_LAST)
    offset = element_offset(c[:, None], p[None, :], pixels, CHANNELS, CHANNELS_LAST)
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
    """Locates this program's part of a sample: returns (n, part, channel, inside, base, offset, left).

    A sample has ``parts`` parts of ``span`` pixels, and ``part`` numbers them over all samples. base + offset
    [BLOCK_C, BLOCK_P] is the part's first tile, ``left`` the number of pixels in the part.
    """
    blocks: tl.constexpr = tl.cdiv(CHANNELS, BLOCK_C)
    part = tl.program_id(0) // blocks
    n = (part // parts).to(tl.int64)
    first_c = tl.program_id(0) % blocks * BLOCK_C
    first_p = (part % parts).to(tl.int64) * span
    c = tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    base = n * CHANNELS * pixels + element_offset(first_c, first_p, pixels, CHANNELS, CHANNELS_LAST)
    offset = element_offset(c[:, None], p[None, :], pixels, CHANNELS, CHANNELS_LAST)
    left = tl.minimum(pixels - first_p, span).to(tl.int32)
    return n, part.to(tl.int64), first_c + c, first_c + c < CHANNELS, base, offset, left


@triton.jit
def group_sum(v, GROUP: tl.constexpr, BLOCK_C: tl.constexpr):
    """Returns for each channel [BLOCK_C] the sum of v over its group; the tile starts at a group's first channel."""
    if BLOCK_C < 2 * GROUP:
        total = tl.zeros_like(v) + tl.sum(v, 0)
    else:
        group = tl.arange(0, BLOCK_C) // GROUP
        total = tl.sum(tl.where(group[:, None] == group[None, :], v[None, :], 0.0), 1)
    return total


@triton.jit
def channel_values(v, at, mask, default: tl.constexpr, BLOCK_C: tl.constexpr):
    """Loads v at the offsets ``at`` [BLOCK_C]; returns the default where the argument v was not given."""
    return tl.full((BLOCK_C,), default, tl.float32) if v is None else tl.load(v + at, mask=mask, other=default)


@triton.jit
def group_values(v, n, channel, inside, CHANNELS: tl.constexpr, GROUP: tl.constexpr):
    """Loads for each channel [BLOCK_C] the value of its group in v [N, G]."""
    return tl.load(v + n * (CHANNELS // GROUP) + channel // GROUP, mask=inside, other=0.0)


@triton.jit
def centre(value, pre_shift, at, inside, mu, BLOCK_C: tl.constexpr):
    """Returns value + pre_shift - mu of a tile; ``at`` and mu are [BLOCK_C].

    Adds pre_shift - mu, rounded once, so that little is lost where value is small beside both; and then the rounding
    error of that difference (Knuth's two-sum), so that little is lost where value cancels pre_shift.
    """
    if pre_shift is None:
        result = value - mu[:, None]
    else:
        added = channel_values(pre_shift, at, inside, 0.0, BLOCK_C)
        difference = added - mu
        back = difference - added
        error = (added - (difference - back)) - (mu + back)
        result = value + difference[:, None] + error[:, None]
    return result


@triton.jit
def affine(weight, bias, scale, shift, n, channel, mask, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Returns (gain, offset) [BLOCK_C] of y = act(gain * normalised + offset)."""
    row = n * CHANNELS + channel
    modulation = 1.0 + channel_values(scale, row, mask, 0.0, BLOCK_C)
    gain = channel_values(weight, channel, mask, 1.0, BLOCK_C) * modulation
    offset = channel_values(bias, channel, mask, 0.0, BLOCK_C) * modulation
    return gain, offset + channel_values(shift, row, mask, 0.0, BLOCK_C)
