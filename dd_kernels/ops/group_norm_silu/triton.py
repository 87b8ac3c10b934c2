"""GroupNorm and its activation in Triton, the forward pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import is_channels_last
from .triton_activations import activate
from .triton_backward import group_norm_silu_backward
from .triton_tiles import (
    Plan,
    affine,
    centre,
    channel_values,
    combine_options,
    dimensions,
    element_offset,
    group_sum,
    plan,
    split_tile,
    tile_options,
    whole_tile,
    whole_tile_options,
)

__all__ = ["group_norm_silu", "group_norm_silu_backward"]

_PER_CHANNEL = ["weight", "bias", "pre_shift", "scale", "shift", "mean", "rstd"]


@triton.jit
def _reciprocal_deviation(variance, eps):
    """1 / sqrt(variance + eps), or NaN for a variance of squares beyond float32, where 0 would make y the bias."""
    return tl.div_rn(1.0, tl.sqrt_rn(variance + eps)) + (variance - variance)


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
    ACTIVATION: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    FULL: tl.constexpr,
):
    """Normalises the groups of one tile: reads x once, keeps it in registers for the statistics, writes y once."""
    n, channel, inside, base, place, mask = whole_tile(
        pixels, CHANNELS, CHANNELS_LAST, BLOCK_CHANNELS, BLOCK_C, BLOCK_P, FULL
    )
    value = tl.load(x + base + place, mask=mask, other=0.0).to(tl.float32)
    added = channel_values(pre_shift, n * CHANNELS + channel, inside, 0.0, BLOCK_C)
    count = tl.cast(pixels * GROUP, tl.float32)
    mu = group_sum(tl.sum(value, 1) + pixels * added, GROUP, BLOCK_C) / count
    centred = tl.where(mask, centre(value, pre_shift, n * CHANNELS + channel, inside, mu, BLOCK_C), 0.0)
    # The mean of what is centred is the rounding error of mu, which matters where mu is much larger than the deviation.
    rounding = group_sum(tl.sum(centred, 1), GROUP, BLOCK_C) / count
    variance = group_sum(tl.sum(centred * centred, 1), GROUP, BLOCK_C) / count - rounding * rounding
    reciprocal = _reciprocal_deviation(variance, eps)

    gain, offset = affine(weight, bias, scale, shift, n, channel, inside, CHANNELS, BLOCK_C)
    gain *= reciprocal
    result = activate(centred * gain[:, None] + (offset - rounding * gain)[:, None], None, ACTIVATION)
    tl.store(y + base + place, result.to(y.dtype.element_ty), mask=mask)
    group = n * (CHANNELS // GROUP) + channel // GROUP
    tl.store(mean + group, mu + rounding, mask=inside & (channel % GROUP == 0))
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
    """Stores in partials [N, splits, 2, C] each channel's mean and squared deviations over ``tiles`` blocks."""
    n, part, channel, inside, base, place, left = split_tile(
        splits, tiles * BLOCK_P, pixels, CHANNELS, CHANNELS_LAST, BLOCK_C, BLOCK_P
    )
    added = channel_values(pre_shift, n * CHANNELS + channel, inside, 0.0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    count = 0.0
    mean = tl.zeros((BLOCK_C,), tl.float32)
    squares = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, left, BLOCK_P):
        mask = inside[:, None] & (p < left - start)[None, :]
        tile = x + base + element_offset(0, start, pixels, CHANNELS, CHANNELS_LAST)
        value = tl.load(tile + place, mask=mask, other=0.0).to(tl.float32)
        value = tl.where(mask, value + added[:, None], 0.0)
        tile_count = tl.minimum(left - start, BLOCK_P).to(tl.float32)
        tile_mean = tl.sum(value, 1) / tile_count
        centred = tl.where(mask, value - tile_mean[:, None], 0.0)
        # Combines the moments of two sets (Chan et al., 1979).
        delta = tile_mean - mean
        total = count + tile_count
        mean += delta * (tile_count / total)
        squares += tl.sum(centred * centred, 1) + delta * delta * (count * tile_count / total)
        count = total
    row = part * 2 * CHANNELS + channel
    tl.store(partials + row, mean, mask=inside)
    tl.store(partials + row + CHANNELS, squares, mask=inside)


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
    """Computes mean and rstd of one group from the moments of its channels over each span of pixels."""
    groups: tl.constexpr = CHANNELS // GROUP
    n = (tl.program_id(0) // groups).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    channel = tl.program_id(0) % groups * GROUP + c
    inside = c < GROUP
    s = tl.arange(0, BLOCK_S)
    partials += n * splits * 2 * CHANNELS
    pivot = tl.load(partials + tl.program_id(0) % groups * GROUP)  # close to every mean, so that the sums stay small
    partials += channel[None, :] + s[:, None] * (2 * CHANNELS)

    total = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for first in range(0, splits, BLOCK_S):
        mask = inside[None, :] & (first + s < splits)[:, None]
        count = tl.minimum(pixels - (first + s).to(tl.int64) * span, span).to(tl.float32)[:, None]
        part = tl.load(partials + first * 2 * CHANNELS, mask=mask, other=0.0)
        total += tl.where(mask, count * (part - pivot), 0.0)
    elements = tl.cast(pixels, tl.float32) * GROUP
    mu = pivot + tl.sum(total) / elements

    total = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for first in range(0, splits, BLOCK_S):
        mask = inside[None, :] & (first + s < splits)[:, None]
        count = tl.minimum(pixels - (first + s).to(tl.int64) * span, span).to(tl.float32)[:, None]
        delta = tl.load(partials + first * 2 * CHANNELS, mask=mask, other=0.0) - mu
        squares = tl.load(partials + (first * 2 + 1) * CHANNELS, mask=mask, other=0.0)
        total += tl.where(mask, squares + count * delta * delta, 0.0)
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
    ACTIVATION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Normalises one tile, given the mean and rstd of its groups."""
    n, _, channel, inside, base, place, left = split_tile(
        tl.cdiv(pixels, BLOCK_P), BLOCK_P, pixels, CHANNELS, CHANNELS_LAST, BLOCK_C, BLOCK_P
    )
    mask = inside[:, None] & (tl.arange(0, BLOCK_P) < left)[None, :]
    value = tl.load(x + base + place, mask=mask, other=0.0).to(tl.float32)
    group = n * (CHANNELS // GROUP) + channel // GROUP
    mu = tl.load(mean + group, mask=inside, other=0.0)
    centred = centre(value, pre_shift, n * CHANNELS + channel, inside, mu, BLOCK_C)
    gain, offset = affine(weight, bias, scale, shift, n, channel, inside, CHANNELS, BLOCK_C)
    gain *= tl.load(rstd + group, mask=inside, other=0.0)
    result = activate(centred * gain[:, None] + offset[:, None], None, ACTIVATION)
    tl.store(y + base + place, result.to(y.dtype.element_ty), mask=mask)


def _statistics(
    x: Tensor, group: int, eps: float, pre_shift: Tensor | None, mean: Tensor, rstd: Tensor, tiling: Plan
) -> None:
    """Computes mean and rstd [N, G] of groups too large for one program."""
    samples, channels, pixels = dimensions(x)
    partials = torch.empty((samples, tiling.splits, 2, channels), dtype=torch.float32, device=x.device)
    tile = {"BLOCK_C": tiling.block_c, "BLOCK_P": tiling.block_p, "num_warps": tiling.warps}
    grid = (samples * tiling.splits * triton.cdiv(channels, tiling.block_c),)
    _partial_moments[grid](
        x,
        pre_shift,
        partials,
        tiling.splits,
        tiling.tiles,
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
        tiling.splits,
        tiling.tiles * tiling.block_p,
        pixels,
        **combine_options(channels, group, tiling),
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
    activation: int,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> None:
    """Writes y, and mean and rstd [N, G]; ``activation`` is a number of ``Activation``."""
    if x.numel() == 0:
        return
    tiling = plan(x, num_groups, "forward")
    samples, channels, pixels = dimensions(x)
    shape = tile_options(x, num_groups, activation, tiling)
    blocks = samples * triton.cdiv(channels, tiling.block_channels)
    if tiling.one_program:
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
            **whole_tile_options(x, tiling),
        )
    else:
        _statistics(x, channels // num_groups, float(eps), pre_shift, mean, rstd, tiling)
        grid = (blocks * triton.cdiv(pixels, tiling.block_p),)
        _apply[grid](x, weight, bias, pre_shift, scale, shift, mean, rstd, y, pixels, **shape)
