"""GroupNorm and SiLU in Triton, the forward pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import is_channels_last
from .triton_backward import group_norm_silu_backward
from .triton_tiles import (
    Plan,
    affine,
    centre,
    channel_values,
    combine_options,
    dimensions,
    group_sum,
    place,
    plan,
    split_tile,
    tile_options,
    whole_tile,
    whole_tile_options,
)

__all__ = ["group_norm_silu", "group_norm_silu_backward"]

_PER_CHANNEL = ["weight", "bias", "pre_shift", "scale", "shift", "mean", "rstd"]


@triton.jit
def _activate(v, SILU: tl.constexpr):
    return v * (1.0 / (1.0 + tl.exp(-v))) if SILU else v


@triton.jit
def _reciprocal_deviation(variance, eps):
    return tl.div_rn(1.0, tl.sqrt_rn(variance + eps))


@triton.jit(do_not_specialize_on_alignment=_PER_CHANNEL)
def _whole_groups(
    x,
    weight,
    bias,
    eps,
    pre_shift,
    scale,
    shift,
    y,
    mean,
    rstd,
    pixels,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    FULL: tl.constexpr,
):
    """Everything for the groups of one tile: one read, statistics in registers, one write."""
    n, channel, inside, base, offset, mask = whole_tile(
        pixels, CHANNELS, CHANNELS_LAST, BLOCK_CHANNELS, BLOCK_C, BLOCK_P, FULL
    )
    value = tl.load(x + base + offset, mask=mask, other=0.0).to(tl.float32)
    before = channel_values(pre_shift, n * CHANNELS + channel, inside, 0.0, BLOCK_C)
    count = (pixels * GROUP).to(tl.float32)
    mu = group_sum(tl.sum(value, 1) + pixels * before, GROUP, BLOCK_C) / count
    centred = tl.where(mask, centre(value, pre_shift, n * CHANNELS + channel, inside, mu, BLOCK_C), 0.0)
    # A mean much larger than the deviation is rounded coarsely: what that left is taken out as well.
    rest = group_sum(tl.sum(centred, 1), GROUP, BLOCK_C) / count
    variance = group_sum(tl.sum(centred * centred, 1), GROUP, BLOCK_C) / count - rest * rest
    reciprocal = _reciprocal_deviation(variance, eps)

    gain, end = affine(weight, bias, scale, shift, n, channel, inside, CHANNELS, BLOCK_C)
    gain *= reciprocal
    result = _activate(centred * gain[:, None] + (end - rest * gain)[:, None], SILU)
    tl.store(y + base + offset, result.to(y.dtype.element_ty), mask=mask)
    group = n * (CHANNELS // GROUP) + channel // GROUP
    tl.store(mean + group, mu + rest, mask=inside & (channel % GROUP == 0))
    tl.store(rstd + group, reciprocal, mask=inside & (channel % GROUP == 0))


@triton.jit(do_not_specialize=["splits", "tiles"], do_not_specialize_on_alignment=["pre_shift"])
def _partial_moments(
    x,
    pre_shift,
    partials,
    splits,
    tiles,
    pixels,
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """partials [N, splits, 2, C]: each channel's mean, and sum of squares about it, over ``tiles`` blocks of pixels."""
    n, part, channel, inside, base, offset, left = split_tile(
        splits, tiles * BLOCK_P, pixels, CHANNELS, CHANNELS_LAST, BLOCK_C, BLOCK_P
    )
    before = channel_values(pre_shift, n * CHANNELS + channel, inside, 0.0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    count = 0.0
    mean = tl.zeros((BLOCK_C,), tl.float32)
    squares = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, left, BLOCK_P):
        mask = inside[:, None] & (p < left - start)[None, :]
        here = x + base + place(0, start, pixels, CHANNELS, CHANNELS_LAST)
        value = tl.load(here + offset, mask=mask, other=0.0).to(tl.float32)
        value = tl.where(mask, value + before[:, None], 0.0)
        tile_count = tl.minimum(left - start, BLOCK_P).to(tl.float32)
        tile_mean = tl.sum(value, 1) / tile_count
        centred = tl.where(mask, value - tile_mean[:, None], 0.0)
        # Chan et al. (1979): the moments of two sets from the moments of each.
        away = tile_mean - mean
        total = count + tile_count
        mean += away * (tile_count / total)
        squares += tl.sum(centred * centred, 1) + away * away * (count * tile_count / total)
        count = total
    at = part * 2 * CHANNELS + channel
    tl.store(partials + at, mean, mask=inside)
    tl.store(partials + at + CHANNELS, squares, mask=inside)


@triton.jit(do_not_specialize=["splits", "span"], do_not_specialize_on_alignment=["mean", "rstd"])
def _combine_moments(
    partials,
    eps,
    mean,
    rstd,
    splits,
    span,
    pixels,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """mean and rstd of one group from the moments of its channels over each span."""
    groups: tl.constexpr = CHANNELS // GROUP
    n = (tl.program_id(0) // groups).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    channel = tl.program_id(0) % groups * GROUP + c
    inside = c < GROUP
    s = tl.arange(0, BLOCK_S)
    partials += n * splits * 2 * CHANNELS
    pivot = tl.load(partials + tl.program_id(0) % groups * GROUP)  # near all the means, so that little is summed
    partials += channel[None, :] + s[:, None] * (2 * CHANNELS)

    total = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for first in range(0, splits, BLOCK_S):
        mask = inside[None, :] & (first + s < splits)[:, None]
        count = tl.minimum(pixels - (first + s).to(tl.int64) * span, span).to(tl.float32)[:, None]
        part = tl.load(partials + first * 2 * CHANNELS, mask=mask, other=0.0)
        total += tl.where(mask, count * (part - pivot), 0.0)
    elements = pixels.to(tl.float32) * GROUP
    mu = pivot + tl.sum(total) / elements

    total = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for first in range(0, splits, BLOCK_S):
        mask = inside[None, :] & (first + s < splits)[:, None]
        count = tl.minimum(pixels - (first + s).to(tl.int64) * span, span).to(tl.float32)[:, None]
        away = tl.load(partials + first * 2 * CHANNELS, mask=mask, other=0.0) - mu
        squares = tl.load(partials + (first * 2 + 1) * CHANNELS, mask=mask, other=0.0)
        total += tl.where(mask, squares + count * away * away, 0.0)
    tl.store(mean + tl.program_id(0), mu)
    tl.store(rstd + tl.program_id(0), _reciprocal_deviation(tl.sum(total) / elements, eps))


@triton.jit(do_not_specialize_on_alignment=_PER_CHANNEL)
def _apply(
    x,
    weight,
    bias,
    pre_shift,
    scale,
    shift,
    mean,
    rstd,
    y,
    pixels,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """y of one tile, the statistics being known."""
    n, _, channel, inside, base, offset, left = split_tile(
        tl.cdiv(pixels, BLOCK_P), BLOCK_P, pixels, CHANNELS, CHANNELS_LAST, BLOCK_C, BLOCK_P
    )
    mask = inside[:, None] & (tl.arange(0, BLOCK_P) < left)[None, :]
    value = tl.load(x + base + offset, mask=mask, other=0.0).to(tl.float32)
    group = n * (CHANNELS // GROUP) + channel // GROUP
    mu = tl.load(mean + group, mask=inside, other=0.0)
    centred = centre(value, pre_shift, n * CHANNELS + channel, inside, mu, BLOCK_C)
    gain, end = affine(weight, bias, scale, shift, n, channel, inside, CHANNELS, BLOCK_C)
    gain *= tl.load(rstd + group, mask=inside, other=0.0)
    result = _activate(centred * gain[:, None] + end[:, None], SILU)
    tl.store(y + base + offset, result.to(y.dtype.element_ty), mask=mask)


def _statistics(
    x: Tensor, group: int, eps: float, pre_shift: Tensor | None, mean: Tensor, rstd: Tensor, cut: Plan
) -> None:
    """mean and rstd [N, G] of groups too large for one program."""
    samples, channels, pixels = dimensions(x)
    partials = torch.empty((samples, cut.splits, 2, channels), dtype=torch.float32, device=x.device)
    tile = {"BLOCK_C": cut.block_c, "BLOCK_P": cut.block_p, "num_warps": cut.warps}
    grid = (samples * cut.splits * triton.cdiv(channels, cut.block_c),)
    _partial_moments[grid](
        x,
        pre_shift,
        partials,
        cut.splits,
        cut.tiles,
        pixels,
        CHANNELS=channels,
        CHANNELS_LAST=is_channels_last(x),
        **tile,
    )
    _combine_moments[(mean.numel(),)](
        partials,
        eps,
        mean,
        rstd,
        cut.splits,
        cut.tiles * cut.block_p,
        pixels,
        **combine_options(channels, group, cut),
    )


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    pre_shift: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> None:
    """Writes y, mean and rstd [N, G]."""
    if x.numel() == 0:
        return
    cut = plan(x, num_groups, "forward")
    samples, channels, pixels = dimensions(x)
    shape = tile_options(x, num_groups, silu, cut)
    blocks = samples * triton.cdiv(channels, cut.block_channels)
    if cut.one_program:
        _whole_groups[(blocks,)](
            x,
            weight,
            bias,
            float(eps),
            pre_shift,
            scale,
            shift,
            y,
            mean,
            rstd,
            pixels,
            **shape,
            **whole_tile_options(x, cut),
        )
    else:
        _statistics(x, channels // num_groups, float(eps), pre_shift, mean, rstd, cut)
        grid = (blocks * triton.cdiv(pixels, cut.block_p),)
        _apply[grid](x, weight, bias, pre_shift, scale, shift, mean, rstd, y, pixels, **shape)
