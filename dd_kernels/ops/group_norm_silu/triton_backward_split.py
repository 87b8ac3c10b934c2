"""GroupNorm and its activation in Triton, the backward pass of groups too large for one program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_gradients import GRADIENTS, PER_CHANNEL, channel_gradients, input_gradient, sum_rows, through_activation
from .triton_tiles import Plan, affine, combine_options, dimensions, element_offset, group_values, split_tile


@triton.jit(do_not_specialize=["splits", "tiles"], do_not_specialize_on_alignment=PER_CHANNEL)
def _partial_sums(
    dy,
    x,
    mean,
    rstd,
    weight,
    bias,
    pre_shift,
    scale,
    shift,
    partials,
    splits,
    tiles,
    pixels,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Stores in partials [N, splits, 3, C] by_dz, by_product and by_xhat over ``tiles`` blocks of pixels."""
    n, part, channel, inside, base, offset, left = split_tile(
        splits, tiles * BLOCK_P, pixels, CHANNELS, CHANNELS_LAST, BLOCK_C, BLOCK_P
    )
    mu = group_values(mean, n, channel, inside, CHANNELS, GROUP)
    reciprocal = group_values(rstd, n, channel, inside, CHANNELS, GROUP)
    by_dz = tl.zeros((BLOCK_C,), tl.float32)
    by_product = tl.zeros((BLOCK_C,), tl.float32)
    by_xhat = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, left, BLOCK_P):
        mask = inside[:, None] & (tl.arange(0, BLOCK_P) < left - start)[None, :]
        tile = base + element_offset(0, start, pixels, CHANNELS, CHANNELS_LAST)
        value = tl.load(x + tile + offset, mask=mask, other=0.0)
        upstream = tl.load(dy + tile + offset, mask=mask, other=0.0)  # dz is 0, too, where the mask is off
        xhat, dz, _ = through_activation(
            upstream, value, mu, reciprocal, weight, bias, pre_shift, scale, shift,
            n, channel, inside, CHANNELS, ACTIVATION, BLOCK_C,
        )  # fmt: skip
        by_dz += tl.sum(dz, 1)
        by_product += tl.sum(dz * xhat, 1)
        by_xhat += tl.sum(tl.where(mask, xhat, 0.0), 1)
    row = part * 3 * CHANNELS + channel
    tl.store(partials + row, by_dz, mask=inside)
    tl.store(partials + row + CHANNELS, by_product, mask=inside)
    tl.store(partials + row + 2 * CHANNELS, by_xhat, mask=inside)


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=PER_CHANNEL + GRADIENTS)
def _combine_sums(
    partials,
    rstd,
    weight,
    bias,
    scale,
    shift,
    means,
    dpre_shift,
    dscale,
    dshift,
    per_sample,
    splits,
    pixels,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Stores m1 and m2 of one group in means [N, G, 2], and the gradients of its channels."""
    groups: tl.constexpr = CHANNELS // GROUP
    row: tl.constexpr = 3 * CHANNELS
    n = (tl.program_id(0) // groups).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    channel = tl.program_id(0) % groups * GROUP + c
    inside = c < GROUP
    at = partials + n * splits * row + channel
    by_dz = sum_rows(at, splits, inside, row, BLOCK_S, BLOCK_C)
    by_product = sum_rows(at + CHANNELS, splits, inside, row, BLOCK_S, BLOCK_C)
    by_xhat = sum_rows(at + 2 * CHANNELS, splits, inside, row, BLOCK_S, BLOCK_C)

    gain, _ = affine(weight, bias, scale, shift, n, channel, inside, CHANNELS, BLOCK_C)
    pixel_count = tl.cast(pixels, tl.float32)
    m1 = tl.sum(gain * by_dz) / (pixel_count * GROUP)
    m2 = tl.sum(gain * by_product) / (pixel_count * GROUP)
    tl.store(means + 2 * tl.program_id(0), m1)
    tl.store(means + 2 * tl.program_id(0) + 1, m2)
    channel_gradients(
        by_dz, by_product, by_xhat, m1, m2, gain, tl.load(rstd + tl.program_id(0)), weight, bias, scale,
        dpre_shift, dscale, dshift, per_sample, n, channel, inside, pixel_count, CHANNELS, BLOCK_C,
    )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=PER_CHANNEL)
def _apply_backward(
    dy,
    x,
    mean,
    rstd,
    weight,
    bias,
    pre_shift,
    scale,
    shift,
    means,
    dx,
    pixels,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Computes dx of one tile, given the means of its groups."""
    n, _, channel, inside, base, offset, left = split_tile(
        tl.cdiv(pixels, BLOCK_P), BLOCK_P, pixels, CHANNELS, CHANNELS_LAST, BLOCK_C, BLOCK_P
    )
    mask = inside[:, None] & (tl.arange(0, BLOCK_P) < left)[None, :]
    value = tl.load(x + base + offset, mask=mask, other=0.0)
    upstream = tl.load(dy + base + offset, mask=mask, other=0.0)
    mu = group_values(mean, n, channel, inside, CHANNELS, GROUP)
    reciprocal = group_values(rstd, n, channel, inside, CHANNELS, GROUP)
    xhat, dz, gain = through_activation(
        upstream, value, mu, reciprocal, weight, bias, pre_shift, scale, shift,
        n, channel, inside, CHANNELS, ACTIVATION, BLOCK_C,
    )  # fmt: skip
    at = means + 2 * (n * (CHANNELS // GROUP) + channel // GROUP)
    m1 = tl.load(at, mask=inside, other=0.0)
    m2 = tl.load(at + 1, mask=inside, other=0.0)
    result = input_gradient(xhat, dz, gain, reciprocal, m1, m2)
    tl.store(dx + base + offset, result.to(dx.dtype.element_ty), mask=mask)


def split_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    options: tuple[Tensor | None, ...],
    dx: Tensor,
    gradients: tuple[Tensor | None, ...],
    shape: dict[str, int],
    tiling: Plan,
) -> None:
    """Writes dx and the gradients; ``options`` are weight, bias, pre_shift, scale and shift."""
    samples, channels, pixels = dimensions(x)
    combine = combine_options(channels, shape["GROUP"], tiling)
    weight, bias, _, scale, shift = options
    partials = torch.empty((samples, tiling.splits, 3, channels), dtype=torch.float32, device=x.device)
    means = torch.empty((*mean.shape, 2), dtype=torch.float32, device=x.device)
    blocks = samples * triton.cdiv(channels, tiling.block_c)
    _partial_sums[(blocks * tiling.splits,)](
        dy, x, mean, rstd, *options, partials, tiling.splits, tiling.tiles, pixels, **shape
    )
    _combine_sums[(mean.numel(),)](
        partials, rstd, weight, bias, scale, shift, means, *gradients, tiling.splits, pixels, **combine
    )
    grid = (blocks * triton.cdiv(pixels, tiling.block_p),)
    _apply_backward[grid](dy, x, mean, rstd, *options, means, dx, pixels, **shape)
