"""The reverse step in plain PyTorch: the one update that every sampler is."""

from __future__ import annotations

import torch
from torch import Tensor

from ..randn.reference import normals
from ..randn.streams import Stream
from .op import Arguments
from .table import COLUMNS


def wide_dtype(x: Tensor, out: Tensor) -> torch.dtype:
    """The dtype that the reference computes in."""
    return torch.promote_types(torch.promote_types(x.dtype, out.dtype), torch.float32)


def predict_x0(x: Tensor, out: Tensor, row: dict[str, Tensor]) -> Tensor:
    """x0 = (x0_num_x * x + x0_num_out * out) / x0_den, before any clipping."""
    return (row["x0_num_x"] * x + row["x0_num_out"] * out) / row["x0_den"]


def clip_x0(x0: Tensor, row: dict[str, Tensor], threshold: Tensor | None) -> Tensor:
    """x0 within the row's range, or divided into [-1, 1] by a per-sample threshold [N, 1, ...]."""
    if threshold is None:
        return torch.clamp(x0, -row["x0_clip"], row["x0_clip"])
    return torch.clamp(x0, -threshold, threshold) / threshold


def guide(out: Tensor, uncond: Tensor | None, guidance_scale: float) -> Tensor:
    """Classifier-free guidance: out = uncond + scale * (cond - uncond)."""
    return out if uncond is None else uncond + guidance_scale * (out - uncond)


def columns(rows: Tensor, step: Tensor, like: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The coefficients of each sample's row, by name, shaped [N or 1, 1, ...] to multiply ``like``."""
    picked = rows.index_select(0, step).to(dtype).reshape(-1, len(COLUMNS), *[1] * (like.ndim - 1))
    return {name: picked[:, i] for i, name in enumerate(COLUMNS)}


def _is_odd(call: Arguments) -> Tensor:
    """Returns whether each sample's step is odd, as booleans [N or 1, 1, ...]."""
    return (call.step % 2 == 1).reshape(-1, *[1] * (call.x.ndim - 1))


def _earlier(call: Arguments, row: dict[str, Tensor], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Returns the coefficients and the x_0 of the last step, and of the one before it where it is kept too."""
    if call.even is None:
        return []
    even = call.even.to(dtype)
    if call.odd is None:
        return [(row["prev_from_last"], even)]
    odd, is_odd = call.odd.to(dtype), _is_odd(call)
    last, older = torch.where(is_odd, even, odd), torch.where(is_odd, odd, even)
    return [(row["prev_from_last"], last), (row["prev_from_older"], older)]


def _remember(call: Arguments, x0: Tensor) -> None:
    """Keeps x_0 for the steps to come, in place of the oldest that is kept."""
    if call.even is None:
        return
    x0 = x0.to(call.even.dtype)
    if call.odd is None:
        call.even.copy_(x0)
        return
    is_odd = _is_odd(call)
    call.even.copy_(torch.where(is_odd, call.even, x0))
    call.odd.copy_(torch.where(is_odd, x0, call.odd))


def reverse_step(call: Arguments) -> tuple[Tensor, Tensor]:
    """(x_prev, x0). A term whose coefficient is 0 is left out, whatever it would multiply.

    Computed in float32, or in float64 where x or the model's output is float64.
    """
    x, variance, noise = call.x, call.variance, call.noise
    dtype = wide_dtype(x, call.out)
    row = columns(call.rows, call.step, x, dtype)
    x_wide = x.to(dtype)
    out = guide(call.out.to(dtype), None if call.uncond is None else call.uncond.to(dtype), call.guidance_scale)

    threshold = None if call.threshold is None else call.threshold.to(dtype).reshape(-1, *[1] * (x.ndim - 1))
    x0 = clip_x0(predict_x0(x_wide, out, row), row, threshold)
    x_prev = row["prev_from_x0"] * x0
    terms = [(row["prev_from_x"], x_wide), (row["prev_from_out"], out), *_earlier(call, row, dtype)]
    for coefficient, term in terms:
        x_prev = x_prev + torch.where(coefficient == 0, 0.0, coefficient * term)

    if noise is None and call.key is not None:
        noise = normals(call.key, x.shape, call.timesteps.index_select(0, call.step), Stream.REVERSE_STEP)
    if noise is not None:
        sigma = row["sigma"]
        if variance is not None:
            # Nichol & Dhariwal (2021), eq. 15: the model interpolates between two log-variances.
            fraction = (variance.to(dtype) + 1) / 2
            log_variance = row["log_var_min"] + fraction * (row["log_var_max"] - row["log_var_min"])
            sigma = sigma * torch.exp(0.5 * log_variance)
        x_prev = x_prev + torch.where(row["sigma"] == 0, 0.0, sigma * noise.to(dtype))
    _remember(call, x0)
    return x_prev.to(x.dtype), x0.to(x.dtype)
