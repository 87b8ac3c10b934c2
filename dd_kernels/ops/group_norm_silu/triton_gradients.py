"""What the backward kernels of GroupNorm and SiLU in Triton share.

With xhat the normalised input, z = gain xhat + end and dz = dy act'(z), every gradient follows from three
sums over the pixels of a channel:

    by_dz = sum dz,      by_product = sum dz xhat,      by_xhat = sum xhat

and two means over a group, m1 of gain dz and m2 of gain dz xhat: dx = rstd (gain dz - m1 - xhat m2).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import affine, channel_values, sigmoid

PER_CHANNEL = ["mean", "rstd", "weight", "bias", "pre_shift", "scale", "shift"]
GRADIENTS = ["dpre_shift", "dscale", "dshift", "per_sample"]


@triton.jit
def through_activation(
    dy,
    value,
    mu,
    reciprocal,
    weight,
    bias,
    pre_shift,
    scale,
    shift,
    n,
    channel,
    inside,
    CHANNELS: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """(xhat, dz) of a tile and gain [BLOCK_C]; mu and reciprocal [BLOCK_C] are the mean and rstd of each channel."""
    centre = channel_values(pre_shift, n * CHANNELS + channel, inside, 0.0, BLOCK_C) - mu
    xhat = (value.to(tl.float32) + centre[:, None]) * reciprocal[:, None]
    gain, end = affine(weight, bias, scale, shift, n, channel, inside, CHANNELS, BLOCK_C)
    dz = dy.to(tl.float32)
    if SILU:
        z = xhat * gain[:, None] + end[:, None]
        s = sigmoid(z)
        dz = dz * s * (1.0 + z * (1.0 - s))
    return xhat, dz, gain


@triton.jit
def input_gradient(xhat, dz, gain, reciprocal, m1, m2):
    """dx of a tile, in float32."""
    return reciprocal[:, None] * (gain[:, None] * dz - m1[:, None] - xhat * m2[:, None])


@triton.jit
def channel_gradients(
    by_dz,
    by_product,
    by_xhat,
    m1,
    m2,
    gain,
    reciprocal,
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
    """Stores the gradients [N, C], and into per_sample [N, 2, C] a sample's share of dweight and dbias."""
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


@triton.jit
def sum_rows(rows, count, inside, STRIDE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    """The sum [BLOCK_C] of ``count`` rows, STRIDE elements apart, always in the same order."""
    s = tl.arange(0, BLOCK_S)
    total = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for first in range(0, count, BLOCK_S):
        mask = inside[None, :] & (first + s < count)[:, None]
        at = (first + s).to(tl.int64)[:, None] * STRIDE
        total += tl.load(rows[None, :] + at, mask=mask, other=0.0)
    return tl.sum(total, 0)
