"""GroupNorm and its activation in Triton, the backward pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_backward_split import split_backward
from .triton_gradients import GRADIENTS, PER_CHANNEL, channel_gradients, input_gradient, sum_rows, through_activation
from .triton_tiles import dimensions, group_sum, group_values, plan, tile_options, whole_tile, whole_tile_options


@triton.jit(do_not_specialize_on_alignment=PER_CHANNEL + GRADIENTS)
def _whole_groups_backward(
    dy,
    x,
    mean,
    rstd,
    weight,
    bias,
    pre_shift,
    scale,
    shift,
    dx,
    dpre_shift,
    dscale,
    dshift,
    per_sample,
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
    """Computes every gradient for the groups of one tile: reads dy and x once, writes dx once."""
    n, channel, inside, base, offset, mask = whole_tile(
        pixels, CHANNELS, CHANNELS_LAST, BLOCK_CHANNELS, BLOCK_C, BLOCK_P, FULL
    )
    value = tl.load(x + base + offset, mask=mask, other=0.0)
    upstream = tl.load(dy + base + offset, mask=mask, other=0.0)  # dz is 0, too, where the mask is off
    if BLOCK_CHANNELS == GROUP:  # program i has group i: one scalar instead of a register per channel
        mu = tl.full((BLOCK_C,), tl.load(mean + tl.program_id(0)), tl.float32)
        reciprocal = tl.full((BLOCK_C,), tl.load(rstd + tl.program_id(0)), tl.float32)
    else:
        mu = group_values(mean, n, channel, inside, CHANNELS, GROUP)
        reciprocal = group_values(rstd, n, channel, inside, CHANNELS, GROUP)
    xhat, dz, gain = through_activation(
        upstream, value, mu, reciprocal, weight, bias, pre_shift, scale, shift,
        n, channel, inside, CHANNELS, ACTIVATION, BLOCK_C,
    )  # fmt: skip
    by_dz = tl.sum(dz, 1)
    by_product = tl.sum(dz * xhat, 1)
    by_xhat = tl.sum(xhat if FULL else tl.where(mask, xhat, 0.0), 1)  # rows beyond the last channel are never stored
    count = tl.cast(pixels * GROUP, tl.float32)
    m1 = group_sum(gain * by_dz, GROUP, BLOCK_C) / count
    m2 = group_sum(gain * by_product, GROUP, BLOCK_C) / count
    result = input_gradient(xhat, dz, gain, reciprocal, m1, m2)
    tl.store(dx + base + offset, result.to(dx.dtype.element_ty), mask=mask)
    channel_gradients(
        by_dz, by_product, by_xhat, m1, m2, gain, reciprocal, weight, bias, scale,
        dpre_shift, dscale, dshift, per_sample, n, channel, inside, pixels, CHANNELS, BLOCK_C,
    )  # fmt: skip


@triton.jit(do_not_specialize=["samples"], do_not_specialize_on_alignment=["dweight", "dbias"])
def _parameter_gradients(
    per_sample, dweight, dbias, samples, CHANNELS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Sums per_sample [N, 2, C] over the samples into dweight and dbias [C]."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < CHANNELS
    row: tl.constexpr = 2 * CHANNELS
    if dweight is not None:
        total = sum_rows(per_sample + channel, samples, inside, row, BLOCK_S, BLOCK_C)
        tl.store(dweight + channel, total, mask=inside)
    if dbias is not None:
        total = sum_rows(per_sample + CHANNELS + channel, samples, inside, row, BLOCK_S, BLOCK_C)
        tl.store(dbias + channel, total, mask=inside)


def group_norm_silu_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    pre_shift: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: int,
    dx: Tensor,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dpre_shift: Tensor | None,
    dscale: Tensor | None,
    dshift: Tensor | None,
) -> None:
    """Writes dx, and every other gradient that is not None; ``activation`` is a number of ``Activation``."""
    samples, channels, pixels = dimensions(x)
    per_sample = None
    if dweight is not None or dbias is not None:
        per_sample = torch.empty((samples, 2, channels), dtype=torch.float32, device=x.device)
    if samples > 0:
        tiling = plan(x, num_groups, "backward")
        shape = tile_options(x, num_groups, activation, tiling)
        options = (weight, bias, pre_shift, scale, shift)
        gradients = (dpre_shift, dscale, dshift, per_sample)
        if tiling.one_program:
            _whole_groups_backward[(samples * triton.cdiv(channels, tiling.block_channels),)](
                dy, x, mean, rstd, *options, dx, *gradients, pixels, **shape, **whole_tile_options(x, tiling)
            )
        else:
            split_backward(dy, x, mean, rstd, options, dx, gradients, shape, tiling)
    if per_sample is not None:
        _parameter_gradients[(triton.cdiv(channels, 32),)](
            per_sample, dweight, dbias, samples, CHANNELS=channels, BLOCK_S=32, BLOCK_C=32, num_warps=4
        )
