"""One step of any DDPM or DDIM sampler, in one pass over the data."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ... import backend as backends
from .. import checks
from ..randn import noise_key
from . import reference

if TYPE_CHECKING:
    from .table import DynamicThreshold, StepTable

torch.library.define(
    "dd_kernels::reverse_step",
    "(Tensor x, Tensor out, Tensor? variance, Tensor? uncond, float guidance_scale, Tensor? noise, "
    "Tensor? threshold, Tensor rows, Tensor timesteps, Tensor step, Tensor? key, "
    "Tensor(a!) x_prev, Tensor(b!)? x0) -> ()",
)


@torch.library.register_fake("dd_kernels::reverse_step")
def _(
    x: Tensor,
    out: Tensor,
    variance: Tensor | None,
    uncond: Tensor | None,
    guidance_scale: float,
    noise: Tensor | None,
    threshold: Tensor | None,
    rows: Tensor,
    timesteps: Tensor,
    step: Tensor,
    key: Tensor | None,
    x_prev: Tensor,
    x0: Tensor | None,
) -> None:
    return None


_OP = torch.ops.dd_kernels.reverse_step.default  # to look it up takes as long as a check


def _split_out(out: Tensor, x: Tensor, learned: bool, name: str) -> tuple[Tensor, Tensor | None]:
    """(prediction, variance values): a model with learned variance gives [N, 2 C, ...]."""
    if not learned:
        checks.check_like(name, out, "x", x)
        return out, None
    checks.check_float(name, out)
    if x.ndim < 2:
        raise ValueError(f"x must be [N, C, ...] for a table with learned variance; got {list(x.shape)}")
    wanted = [x.shape[0], 2 * x.shape[1], *x.shape[2:]]
    if list(out.shape) != wanted:
        why = "[N, 2 C, ...], for a table with learned variance"
        raise ValueError(f"{name} must have the shape {wanted}, {why}; got {list(out.shape)}")
    if out.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}; got {out.device}")
    return out.chunk(2, dim=1)


def _quantile(values: Tensor, ratio: float) -> Tensor:
    """torch.quantile of each row, to the bit: that refuses 2^24 elements, and torch 2.11 does not trace it."""
    # torch's rank is a float32 too.
    rank = float(np.float32(ratio) * np.float32(values.shape[1] - 1))
    ordered, below = values.sort(dim=1).values, math.floor(rank)
    quantile = torch.lerp(ordered[:, below], ordered[:, math.ceil(rank)], rank - below)
    return torch.where(ordered[:, -1].isnan(), torch.nan, quantile)


def _dynamic_threshold(x: Tensor, out: Tensor, row: dict[str, Tensor], rule: DynamicThreshold) -> Tensor:
    """s [N] of Imagen's dynamic thresholding (Saharia et al., 2022, section 2.3)."""
    x0 = reference.predict_x0(x.to(torch.float32), out, row).abs().flatten(1)
    return _quantile(x0, rule.ratio).clamp(min=1.0, max=rule.max_value)


def reverse_step(
    x: Tensor,
    out: Tensor,
    table: StepTable,
    step: int | Tensor,
    *,
    uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    first_sample: int = 0,
    x_prev: Tensor | None = None,
    return_x0: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""x_{t-1} from x_t and the model's output, by row ``step`` of a table (DDPM, DDIM, inversion).

    .. math::
        x_0 &= clip\big((a\, x_t + b\, out) / d\big) \\
        x_{t-1} &= p_{x_0}\, x_0 + p_x\, x_t + p_{out}\, out + \sigma z, \qquad z \sim N(0, I)

    With the rows of :func:`dd_kernels.ddpm` this is eq. 7 and 11 of DDPM (Ho et al., 2020); with
    those of :func:`dd_kernels.ddim` eq. 12 and 16 of DDIM (Song et al., 2021). A term whose
    coefficient is 0 is left out, so that the last step draws no noise.

    Args:
        x: x_t, [N, ...] (images [N, C, H, W]), contiguous and channels_last are kept, any strides are right.
        out: what the model predicts, of x's shape; [N, 2 C, ...] for a table with learned variance. May be
            of another dtype than x: float32 state with bfloat16 or float16 output is usual.
        table: the sampler's coefficients.
        step: row of the table, 0 for the first (noisiest); an int, or an integer tensor [] or [N] on
            x's device, one row per sample.
        uncond, guidance_scale: classifier-free guidance (Ho & Salimans, 2022):
            out becomes uncond + guidance_scale (out - uncond), in the same pass.
        noise: z, of x's shape. Without it z is drawn inside the kernel from ``seed`` at
            draw = the row's timestep, stream 1 (see :func:`dd_kernels.randn`).
        seed, first_sample: coordinates of the noise; not needed for a table without noise.
        x_prev: where to write the result; may be x itself. A new tensor if None.
        return_x0: return (x_prev, x_0), x_0 as predicted and clipped.
        backend: "auto", "cpu", "cuda", "triton" or "reference".

    Returns:
        x_{t-1} of x's shape, dtype and layout, or (x_{t-1}, x_0).

    Raises:
        ValueError, TypeError: wrong shape, dtype, device or range; a table with noise and neither
            noise nor seed, or both.
        BackendUnavailableError: a backend asked for by name cannot run.
    """
    checks.check_float("x", x)
    if x.ndim == 0:
        raise ValueError("x must be [N, ...], N samples; got a tensor of shape []")
    out, variance = _split_out(out, x, table.learned_variance, "out")
    if uncond is not None:
        uncond, _ = _split_out(uncond, x, table.learned_variance, "uncond")
    if noise is not None:
        checks.check_like("noise", noise, "x", x)
    if noise is not None and seed is not None:
        raise ValueError("only one of noise and seed may be given; got both")
    if table.stochastic and noise is None and seed is None:
        raise ValueError("noise or seed must be given for a table that adds noise; got neither")
    device = x.device
    on_device = table.on(device)
    index = checks.timestep_index("step", step, on_device.steps, x)
    obstacle = checks.kernel_obstacle(x, out, uncond, noise)
    chosen = backends.choose("reverse_step", backend, device, obstacle)
    checks.check_output("x_prev", x_prev, "x", x)

    key = None
    if noise is None and seed is not None and table.stochastic:
        key = noise_key(seed, first_sample, 0, device)
    rows = table.rows.to(device) if x.dtype == torch.float64 else on_device.rows
    threshold = None
    if table.threshold is not None:
        guided = reference.guide(out.float(), None if uncond is None else uncond.float(), guidance_scale)
        row = reference.columns(rows, index, x, torch.float32)
        threshold = _dynamic_threshold(x, guided, row, table.threshold)

    if chosen == "reference":
        result, x0 = reference.reverse_step(
            x, out, variance, uncond, guidance_scale, noise, threshold, rows, on_device.timesteps, index, key
        )
        result = result if x_prev is None else x_prev.copy_(result)
        return (result, x0) if return_x0 else result

    x = checks.dense(x)
    result = checks.room_for_result(x_prev, x)
    x0 = torch.empty_like(x) if return_x0 else None
    arguments = (
        x,
        checks.laid_out_like(out, x),
        checks.laid_out_like(variance, x),
        checks.laid_out_like(uncond, x),
        guidance_scale,
        checks.laid_out_like(noise, x),
        threshold,
        rows,
        on_device.timesteps,
        index,
        key,
        result,
        x0,
    )
    if chosen == "triton":
        from . import triton

        triton.reverse_step(*arguments)
    else:
        _OP(*arguments)
    if x_prev is not None and result is not x_prev:
        result = x_prev.copy_(result)
    return (result, x0) if return_x0 else result
