"""The reverse step in Triton: one read of each input, one write, noise made in registers."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..randn.streams import Stream
from ..triton_common import coefficient, normals, plan, sample_index, tile_of
from .op import Arguments
from .table import COLUMNS

_SHARED = ["threshold", "rows", "timesteps", "step", "key"]  # read as scalars, wherever they lie


@triton.jit
def _load(base, stride, n, offset, mask):
    """A tile as float32, of a tensor whose samples lie ``stride`` elements apart."""
    return tl.load(base + n * stride + offset, mask=mask).to(tl.float32)


@triton.jit
def _clip(value, limit):
    """value within [-limit, limit]; NaN stays NaN."""
    return tl.clamp(value, -limit, limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _guided(out, stride, uncond, uncond_stride, guidance_scale, n, offset, mask):
    """The model's output, moved away from the unconditional one where that is given."""
    model = _load(out, stride, n, offset, mask)
    if uncond is not None:
        unconditional = _load(uncond, uncond_stride, n, offset, mask)
        model = unconditional + guidance_scale * (model - unconditional)
    return model


@triton.jit
def _predicted(row, inside, x_t, model, threshold, n):
    """x_0 from x_t and the model's output, within the row's limit; or within a threshold, divided by it."""
    start = coefficient(row, 0, inside) * x_t + coefficient(row, 1, inside) * model
    start = start * tl.div_rn(1.0, coefficient(row, 2, inside))
    if threshold is None:
        start = _clip(start, coefficient(row, 3, inside))
    else:
        limit = tl.load(threshold + n).to(tl.float32)
        start = _clip(start, limit) * tl.div_rn(1.0, limit)
    return start


@triton.jit
def _with_history(result, row, inside, index, start, even, odd, even_stride, odd_stride, n, offset, mask):
    """Adds the x_0 of earlier steps to the result, then keeps this step's x_0 in the place of the oldest."""
    kept, before = even + n * even_stride, even + n * even_stride
    if odd is not None:
        # x_0 of odd steps lies apart from that of even ones.
        is_odd, oldest = index % 2 == 1, odd + n * odd_stride
        kept, before = tl.where(is_odd, oldest, kept), tl.where(is_odd, kept, oldest)
    from_last, from_older = coefficient(row, 10, inside), coefficient(row, 11, inside)
    if from_last != 0:
        result += from_last * tl.load(before + offset, mask=mask).to(tl.float32)
    if from_older != 0:
        result += from_older * tl.load(kept + offset, mask=mask).to(tl.float32)
    tl.store(kept + offset, start.to(even.dtype.element_ty), mask=mask)
    return result


@triton.jit
def _deviation(z, row, inside, variance, stride, n, offset, mask):
    """z times the standard deviation that the model interpolates between two log-variances.

    Nichol & Dhariwal (2021), eq. 15.
    """
    low, high = coefficient(row, 8, inside), coefficient(row, 9, inside)
    fraction = (_load(variance, stride, n, offset, mask) + 1.0) * 0.5
    return z * tl.exp(0.5 * (low + fraction * (high - low)))


@triton.jit(do_not_specialize=["step_stride", "num_steps"], do_not_specialize_on_alignment=_SHARED)
def _reverse_step(
    x,
    out,
    variance,
    uncond,
    guidance_scale,
    noise,
    threshold,
    rows,
    timesteps,
    step,
    key,
    x_prev,
    x0,
    even,
    odd,
    out_stride,
    variance_stride,
    uncond_stride,
    noise_stride,
    even_stride,
    odd_stride,
    step_stride,
    num_steps,
    elements,
    pixels,
    COLUMNS: tl.constexpr,
    STREAM: tl.constexpr,
    CHANNELS: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    STRADDLES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    n, first, tile, mask, quad = tile_of(pixels, CHANNELS, BY_CHANNEL, STRADDLES, BLOCK_C, BLOCK_P)
    n = n.to(tl.int64)
    offset = first + tile
    index, inside = sample_index(step, step_stride, n, num_steps)
    row = rows + index * COLUMNS

    x_t = _load(x, elements, n, offset, mask)
    model = _guided(out, out_stride, uncond, uncond_stride, guidance_scale, n, offset, mask)
    start = _predicted(row, inside, x_t, model, threshold, n)
    # A term whose coefficient is 0 is left out, whatever it would multiply (an infinity, a NaN).
    result = coefficient(row, 4, inside) * start
    from_x, from_out = coefficient(row, 5, inside), coefficient(row, 6, inside)
    if from_x != 0:
        result += from_x * x_t
    if from_out != 0:
        result += from_out * model

    if even is not None:
        result = _with_history(result, row, inside, index, start, even, odd, even_stride, odd_stride, n, offset, mask)

    sigma = coefficient(row, 7, inside)
    draws: tl.constexpr = (noise is not None) or (key is not None)
    if draws and sigma != 0:
        if noise is not None:
            z = _load(noise, noise_stride, n, offset, mask)
        else:
            z = normals(key, n, tl.load(timesteps + index), STREAM, quad, x_prev.dtype.element_ty != tl.float32)
        if variance is not None:
            z = _deviation(z, row, inside, variance, variance_stride, n, offset, mask)
        result += sigma * z

    tl.store(x_prev + n * elements + offset, result.to(x_prev.dtype.element_ty), mask=mask)
    if x0 is not None:
        tl.store(x0 + n * elements + offset, start.to(x0.dtype.element_ty), mask=mask)


def _sample_stride(y: Tensor | None) -> int:
    return 0 if y is None else y.stride(0)


def reverse_step(call: Arguments) -> None:
    """Writes x_prev, which may be x, and x0 where it is asked for."""
    if call.x.numel() == 0:
        return
    launch = plan("reverse_step", call.x, draws=call.noise is None and call.key is not None)
    _reverse_step[launch.grid](
        *call._replace(guidance_scale=float(call.guidance_scale)),  # an int would be compiled in
        call.out.stride(0),
        _sample_stride(call.variance),
        _sample_stride(call.uncond),
        _sample_stride(call.noise),
        _sample_stride(call.even),
        _sample_stride(call.odd),
        int(call.step.numel() > 1),
        call.rows.shape[0],
        COLUMNS=len(COLUMNS),
        STREAM=int(Stream.REVERSE_STEP),
        **launch.geometry,
    )
