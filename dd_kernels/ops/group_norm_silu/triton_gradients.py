"""What the backward kernels of GroupNorm and its activation in Triton share.

With xhat the normalised input, z = gain xhat + offset and dz = dy act'(z), every gradient follows from three
sums over the pixels of a channel:

    by_dz = sum dz,      by_product = sum dz xhat,      by_xhat = sum xhat

and two means over a group, m1 of gain dz and m2 of gain dz xhat: dx = rstd (gain dz - m1 - xhat m2).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_activations import activate
from .triton_tiles import affine, channel_values

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
    ACTIVATION: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Returns xhat, dz and gain of a tile; gain, mu and reciprocal (each channel's mean and rstd) are [BLOCK_C]."""
    centre = channel_values(pre_shift, n * CHANNELS + channel, inside, 0.0, BLOCK_C) - mu
    xhat = (value.to(tl.float32) + centre[:, None]) * reciprocal[:, None]
    gain, offset = affine(weight, bias, scale, shift, n, channel, inside, CHANNELS, BLOCK_C)
    dy = dy.to(tl.float32)
    dz = activate(xhat * gain[:, None] + offset[:, None], dy, ACTIVATION)
    return xhat, dz, gain


@triton.jit
def input_gradient(xhat, dz, gain, reciprocal, m1, m2):
    """Returns dx of a tile, in float32."""
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
    """Stores the gradients [N, C], and in per_sample [N, 2, C] what the sample adds to dweight and dbias."""
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
    """Returns the sum [BLOCK_C] of ``count`` rows, STRIDE elements apart, added in a fixed order."""
    s = tl.arange(0, BLOCK_S)
    total = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for first in range(0, count, BLOCK_S):
        mask = inside[None, :] & (first + s < count)[:, None]
        at = (first + s).to(tl.int64)[:, None] * STRIDE
        total += tl.load(rows[None, :] + at, mask=mask, other=0.0)
    return tl.sum(total, 0)
