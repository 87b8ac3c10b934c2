"""GroupNorm and SiLU in Triton, the backward pass.

With xhat the normalised input, z = gain xhat + offset and dz = dy act'(z), every gradient follows from
three sums over the pixels of a channel:

    by_dz = sum dz,      by_product = sum dz xhat,      by_xhat = sum xhat

and two means over a group, m1 of gain dz and m2 of gain dz xhat: dx = rstd (gain dz - m1 - xhat m2).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import is_channels_last, power_of_2
from .triton_tiles import Plan, affine, channel_values, dimensions, group_sum, place, plan

_PER_CHANNEL = ["mean", "rstd", "weight", "bias", "pre_shift", "scale", "shift"]
_GRADIENTS = ["dpre_shift", "dscale", "dshift", "per_sample"]


@triton.jit
def _normalised(value, pre_shift, mean, rstd, at, group, inside, BLOCK_C: tl.constexpr):
    """(xhat of a tile, rstd [BLOCK_C])."""
    centre = channel_values(pre_shift, at, inside, 0.0, BLOCK_C) - tl.load(mean + group, mask=inside, other=0.0)
    reciprocal = tl.load(rstd + group, mask=inside, other=0.0)
    return (value.to(tl.float32) + centre[:, None]) * reciprocal[:, None], reciprocal


@triton.jit
def _through_activation(dy, xhat, gain, offset, SILU: tl.constexpr):
    """dz = dy act'(z)."""
    dy = dy.to(tl.float32)
    if SILU:
        z = xhat * gain[:, None] + offset[:, None]
        s = tl.sigmoid(z)
        return dy * (s * (1.0 + z * (1.0 - s)))
    else:
        return dy


@triton.jit
def _store_channel_gradients(
    by_dz,
    by_product,
    by_xhat,
    m1,
    m2,
    reciprocal,
    gain,
    weight,
    bias,
    scale,
    dpre_shift,
    dscale,
    dshift,
    per_sample,
    n,
    channel,
    inside,
    pixels,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gradients [N, C], and per_sample [N, 2, C]: one sample's share of dweight and dbias."""
    at = n * CHANNELS + channel
    if dpre_shift is not None:
        tl.store(dpre_shift + at, reciprocal * (gain * by_dz - pixels * m1 - m2 * by_xhat), mask=inside)
    if dscale is not None:
        w = channel_values(weight, channel, inside, 1.0, BLOCK_C)
        b = channel_values(bias, channel, inside, 0.0, BLOCK_C)
        tl.store(dscale + at, w * by_product + b * by_dz, mask=inside)
    if dshift is not None:
        tl.store(dshift + at, by_dz, mask=inside)
    if per_sample is not None:
        modulation = 1.0 + channel_values(scale, at, inside, 0.0, BLOCK_C)
        tl.store(per_sample + at + n * CHANNELS, modulation * by_product, mask=inside)
        tl.store(per_sample + at + (n + 1) * CHANNELS, modulation * by_dz, mask=inside)


@triton.jit(do_not_specialize_on_alignment=_PER_CHANNEL + _GRADIENTS)
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
    SILU: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Everything for the groups of one tile: dy and x are read once, dx is written once."""
    blocks: tl.constexpr = tl.cdiv(CHANNELS, BLOCK_CHANNELS)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * BLOCK_CHANNELS
    c = tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    channel = first + c
    inside = (c < BLOCK_CHANNELS) & (channel < CHANNELS)
    mask = inside[:, None] & (p < pixels)[None, :]
    at = n * CHANNELS * pixels + place(first, 0, pixels, CHANNELS, CHANNELS_LAST)
    at += place(c[:, None], p[None, :], pixels, CHANNELS, CHANNELS_LAST)

    value = tl.load(x + at, mask=mask, other=0.0)
    upstream = tl.load(dy + at, mask=mask, other=0.0)
    group = n * (CHANNELS // GROUP) + channel // GROUP
    row = n * CHANNELS + channel
    xhat, reciprocal = _normalised(value, pre_shift, mean, rstd, row, group, inside, BLOCK_C)
    gain, offset = affine(weight, bias, scale, shift, n, channel, inside, CHANNELS, BLOCK_C)
    dz = _through_activation(upstream, xhat, gain, offset, SILU)

    by_dz = tl.sum(dz, 1)  # dy is 0 where masked
    by_product = tl.sum(dz * xhat, 1)
    by_xhat = tl.sum(tl.where(mask, xhat, 0.0), 1)
    count = pixels * GROUP
    m1 = group_sum(gain * by_dz, GROUP, BLOCK_C) / count
    m2 = group_sum(gain * by_product, GROUP, BLOCK_C) / count
    result = reciprocal[:, None] * (gain[:, None] * dz - m1[:, None] - xhat * m2[:, None])
    tl.store(dx + at, result.to(dx.dtype.element_ty), mask=mask)
    _store_channel_gradients(
        by_dz, by_product, by_xhat, m1, m2, reciprocal, gain, weight, bias, scale,
        dpre_shift, dscale, dshift, per_sample, n, channel, inside, pixels, CHANNELS, BLOCK_C,
    )  # fmt: skip


@triton.jit(do_not_specialize=["splits", "tiles"], do_not_specialize_on_alignment=_PER_CHANNEL)
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
    SILU: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """partials [N, splits, 3, C]: by_dz, by_product and by_xhat over ``tiles`` blocks of pixels."""
    blocks: tl.constexpr = tl.cdiv(CHANNELS, BLOCK_C)
    part = tl.program_id(0) // blocks
    n = (part // splits).to(tl.int64)
    first_c = tl.program_id(0) % blocks * BLOCK_C
    first_p = (part % splits * tiles).to(tl.int64) * BLOCK_P
    c = tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    channel = first_c + c
    inside = channel < CHANNELS
    at = n * CHANNELS * pixels + place(first_c, first_p, pixels, CHANNELS, CHANNELS_LAST)
    offset = place(c[:, None], p[None, :], pixels, CHANNELS, CHANNELS_LAST)
    group = n * (CHANNELS // GROUP) + channel // GROUP
    gain, to = affine(weight, bias, scale, shift, n, channel, inside, CHANNELS, BLOCK_C)

    left = tl.minimum(pixels - first_p, tiles * BLOCK_P).to(tl.int32)
    by_dz = tl.zeros((BLOCK_C,), tl.float32)
    by_product = tl.zeros((BLOCK_C,), tl.float32)
    by_xhat = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, left, BLOCK_P):
        mask = inside[:, None] & (p < left - start)[None, :]
        here = at + place(0, start, pixels, CHANNELS, CHANNELS_LAST)
        value = tl.load(x + here + offset, mask=mask, other=0.0)
        upstream = tl.load(dy + here + offset, mask=mask, other=0.0)
        xhat, _ = _normalised(value, pre_shift, mean, rstd, n * CHANNELS + channel, group, inside, BLOCK_C)
        dz = _through_activation(upstream, xhat, gain, to, SILU)
        by_dz += tl.sum(dz, 1)
        by_product += tl.sum(dz * xhat, 1)
        by_xhat += tl.sum(tl.where(mask, xhat, 0.0), 1)
    row = part.to(tl.int64) * 3 * CHANNELS + channel
    tl.store(partials + row, by_dz, mask=inside)
    tl.store(partials + row + CHANNELS, by_product, mask=inside)
    tl.store(partials + row + 2 * CHANNELS, by_xhat, mask=inside)


@triton.jit
def _sum_over(partials, splits, inside, ROW: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    """The sum [BLOCK_C] of ``splits`` rows, ROW elements apart, always in the same order."""
    s = tl.arange(0, BLOCK_S)
    total = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for first in range(0, splits, BLOCK_S):
        mask = inside[None, :] & (first + s < splits)[:, None]
        at = (first + s).to(tl.int64)[:, None] * ROW
        total += tl.load(partials[None, :] + at, mask=mask, other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=_PER_CHANNEL + _GRADIENTS)
def _combine_sums(
    partials,
    rstd,
    weight,
    bias,
    pre_shift,
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
    """m1 and m2 of one group into means [N, G, 2], and the gradients of its channels."""
    groups: tl.constexpr = CHANNELS // GROUP
    n = (tl.program_id(0) // groups).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    channel = tl.program_id(0) % groups * GROUP + c
    inside = c < GROUP
    at = partials + n * splits * 3 * CHANNELS + channel
    by_dz = _sum_over(at, splits, inside, 3 * CHANNELS, BLOCK_S, BLOCK_C)
    by_product = _sum_over(at + CHANNELS, splits, inside, 3 * CHANNELS, BLOCK_S, BLOCK_C)
    by_xhat = _sum_over(at + 2 * CHANNELS, splits, inside, 3 * CHANNELS, BLOCK_S, BLOCK_C)

    gain, _ = affine(weight, bias, scale, shift, n, channel, inside, CHANNELS, BLOCK_C)
    elements = pixels.to(tl.float32) * GROUP
    m1 = tl.sum(gain * by_dz) / elements
    m2 = tl.sum(gain * by_product) / elements
    tl.store(means + 2 * tl.program_id(0), m1)
    tl.store(means + 2 * tl.program_id(0) + 1, m2)
    _store_channel_gradients(
        by_dz, by_product, by_xhat, m1, m2, tl.load(rstd + tl.program_id(0)), gain, weight, bias, scale,
        dpre_shift, dscale, dshift, per_sample, n, channel, inside, pixels.to(tl.float32), CHANNELS, BLOCK_C,
    )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=_PER_CHANNEL)
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
    SILU: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """dx of one tile, the means of its groups being known."""
    blocks: tl.constexpr = tl.cdiv(CHANNELS, BLOCK_C)
    part = tl.program_id(0) // blocks
    parts = tl.cdiv(pixels, BLOCK_P)
    n = (part // parts).to(tl.int64)
    first_c = tl.program_id(0) % blocks * BLOCK_C
    first_p = (part % parts).to(tl.int64) * BLOCK_P
    c = tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    channel = first_c + c
    inside = channel < CHANNELS
    mask = inside[:, None] & (p < tl.minimum(pixels - first_p, BLOCK_P).to(tl.int32))[None, :]
    at = n * CHANNELS * pixels + place(first_c, first_p, pixels, CHANNELS, CHANNELS_LAST)
    at += place(c[:, None], p[None, :], pixels, CHANNELS, CHANNELS_LAST)

    value = tl.load(x + at, mask=mask, other=0.0)
    upstream = tl.load(dy + at, mask=mask, other=0.0)
    group = n * (CHANNELS // GROUP) + channel // GROUP
    row = n * CHANNELS + channel
    xhat, reciprocal = _normalised(value, pre_shift, mean, rstd, row, group, inside, BLOCK_C)
    gain, offset = affine(weight, bias, scale, shift, n, channel, inside, CHANNELS, BLOCK_C)
    dz = _through_activation(upstream, xhat, gain, offset, SILU)
    m1 = tl.load(means + 2 * group, mask=inside, other=0.0)
    m2 = tl.load(means + 2 * group + 1, mask=inside, other=0.0)
    result = reciprocal[:, None] * (gain[:, None] * dz - m1[:, None] - xhat * m2[:, None])
    tl.store(dx + at, result.to(dx.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["samples"], do_not_specialize_on_alignment=["dweight", "dbias"])
def _parameter_gradients(
    per_sample, dweight, dbias, samples, CHANNELS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr
):
    """dweight and dbias [C]: the sums of per_sample [N, 2, C] over the samples."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < CHANNELS
    if dweight is not None:
        total = _sum_over(per_sample + channel, samples, inside, 2 * CHANNELS, BLOCK_S, BLOCK_C)
        tl.store(dweight + channel, total, mask=inside)
    if dbias is not None:
        total = _sum_over(per_sample + CHANNELS + channel, samples, inside, 2 * CHANNELS, BLOCK_S, BLOCK_C)
        tl.store(dbias + channel, total, mask=inside)


def _split_backward(
    dy: Tensor, x: Tensor, statistics: tuple, options: tuple, dx: Tensor, gradients: tuple, shape: dict, cut: Plan
) -> None:
    """The backward pass of groups too large for one program."""
    (samples, channels, pixels), group = dimensions(x), shape["GROUP"]
    mean, rstd = statistics
    partials = torch.empty((samples, cut.splits, 3, channels), dtype=torch.float32, device=x.device)
    means = torch.empty((*mean.shape, 2), dtype=torch.float32, device=x.device)
    blocks = samples * triton.cdiv(channels, cut.block_c)
    _partial_sums[(blocks * cut.splits,)](
        dy, x, mean, rstd, *options, partials, cut.splits, cut.tiles, pixels, **shape
    )
    block_c = power_of_2(group)
    _combine_sums[(mean.numel(),)](
        partials,
        rstd,
        *options,
        means,
        *gradients,
        cut.splits,
        pixels,
        CHANNELS=channels,
        GROUP=group,
        BLOCK_S=max(1, min(1024 // block_c, power_of_2(cut.splits))),
        BLOCK_C=block_c,
        num_warps=4,
    )
    grid = (blocks * triton.cdiv(pixels, cut.block_p),)
    _apply_backward[grid](dy, x, mean, rstd, *options, means, dx, pixels, **shape)


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
    silu: bool,
    dx: Tensor,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dpre_shift: Tensor | None,
    dscale: Tensor | None,
    dshift: Tensor | None,
) -> None:
    """Writes dx, and those of the other gradients that are given."""
    samples, channels, pixels = dimensions(x)
    per_sample = None
    if dweight is not None or dbias is not None:
        per_sample = torch.empty((samples, 2, channels), dtype=torch.float32, device=x.device)
    if samples > 0:
        cut = plan(x, num_groups, "backward")
        shape = {
            "CHANNELS": channels,
            "GROUP": channels // num_groups,
            "CHANNELS_LAST": is_channels_last(x),
            "SILU": silu,
            "BLOCK_C": cut.block_c,
            "BLOCK_P": cut.block_p,
            "num_warps": cut.warps,
        }
        options = (weight, bias, pre_shift, scale, shift)
        gradients = (dpre_shift, dscale, dshift, per_sample)
        if cut.one_program:
            _whole_groups_backward[(samples * triton.cdiv(channels, cut.block_channels),)](
                dy, x, mean, rstd, *options, dx, *gradients, pixels, BLOCK_CHANNELS=cut.block_channels, **shape
            )
        else:
            _split_backward(dy, x, (mean, rstd), options, dx, gradients, shape, cut)
    if per_sample is not None:
        _parameter_gradients[(triton.cdiv(channels, 32),)](
            per_sample, dweight, dbias, samples, CHANNELS=channels, BLOCK_S=32, BLOCK_C=32, num_warps=4
        )
