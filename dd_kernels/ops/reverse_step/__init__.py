"""One step of any sampler, in one pass over the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..checks import check_float, deliver, timestep_index, visit
from ..randn.key import noise_key
from ..tracing import as_traced
from . import reference
from .history import checked_history
from .op import OP, UNTRACED, Arguments
from .table import StepTable
from .threshold import dynamic_threshold

_NAMES = ("x", "out", "out", "uncond", "noise", "x_prev")


def _split(out: Tensor, x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Returns (prediction, variance values) of a model with learned variance, which gives [N, 2 C, ...]."""
    check_float(name, out)
    check_float("x", x)
    if x.ndim < 2:
        raise ValueError(f"x must be [N, C, ...] for a table with learned variance; got {list(x.shape)}")
    wanted = [x.shape[0], 2 * x.shape[1], *x.shape[2:]]
    if list(out.shape) not in (wanted, [1, *wanted[1:]]):
        why = "[N, 2 C, ...], for a table with learned variance"
        raise ValueError(f"{name} must have the shape {wanted}, {why}; got {list(out.shape)}")
    prediction, variance = out.chunk(2, dim=1)
    return prediction, variance


@overload
def reverse_step(
    x: Tensor,
    out: Tensor,
    table: StepTable,
    step: Any,
    *,
    uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    first_sample: int = 0,
    history: Sequence[Tensor] | Tensor | None = None,
    x_prev: Tensor | None = None,
    return_x0: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def reverse_step(
    x: Tensor,
    out: Tensor,
    table: StepTable,
    step: Any,
    *,
    uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    first_sample: int = 0,
    history: Sequence[Tensor] | Tensor | None = None,
    x_prev: Tensor | None = None,
    return_x0: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


@overload
def reverse_step(
    x: Tensor,
    out: Tensor,
    table: StepTable,
    step: Any,
    *,
    uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    first_sample: int = 0,
    history: Sequence[Tensor] | Tensor | None = None,
    x_prev: Tensor | None = None,
    return_x0: bool,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]: ...


def reverse_step(
    x: Tensor,
    out: Tensor,
    table: StepTable,
    step: Any,
    *,
    uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    first_sample: int = 0,
    history: Sequence[Tensor] | Tensor | None = None,
    x_prev: Tensor | None = None,
    return_x0: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""x_{t-1} from x_t and the model's output, by row ``step`` of a table (DDPM, DDIM, DPM-Solver++, ...).

    .. math::
        x_0 &= clip\big((a\, x_t + b\, out) / d\big) \\
        x_{t-1} &= p_{x_0}\, x_0 + p_x\, x_t + p_{out}\, out + p_{last}\, x_0^{last} + p_{older}\, x_0^{older}
            + \sigma z, \qquad z \sim N(0, I)

    With the rows of :func:`dd_kernels.ddpm` this is eq. 7 and 11 of DDPM (Ho et al., 2020); with
    those of :func:`dd_kernels.ddim` eq. 12 and 16 of DDIM (Song et al., 2021); x_0^{last} and x_0^{older}, x_0 of the
    last step and of the one before, serve the multistep solvers, such as :func:`dd_kernels.dpm_solver`. A term whose
    coefficient is 0 is left out, so that the last step draws no noise. With a clip x_{t-1} is finite wherever float32
    holds it. Without one the guided output and x_0, which is up to 1 / d times x_t, must be numbers of float32 too:
    where they are +-inf, x_{t-1} is no number, though its terms might cancel.

    Args:
        x: x_t, [N, ...] (images [N, C, H, W]), contiguous and channels_last are kept, any strides are right.
        out: what the model predicts, of x's shape; [N, 2 C, ...] for a table with learned variance; one
            sample [1, ...] serves all. May be of another dtype than x: float32 state with bfloat16 or float16
            output is usual.
        table: the sampler's coefficients.
        step: row of the table, 0 for the first (noisiest): one integer, or an integer tensor, array or list [N],
            one row per sample.
        uncond, guidance_scale: classifier-free guidance (Ho & Salimans, 2022):
            out becomes uncond + guidance_scale (out - uncond), in the same pass.
        noise: z, of x's shape. Without it z is drawn inside the kernel from ``seed`` at
            draw = the row's timestep, stream 1 (see :func:`dd_kernels.randn`).
        seed, first_sample: coordinates of the noise; not needed for a table without noise.
        history: where a multistep solver keeps x_0 of earlier steps, ``table.history`` tensors of x's shape, as
            ``table.history_like(x)`` makes them: read, and then x_0 of this step written in place of the oldest. The
            steps of a table are taken in order with the same tensors; their first contents are not read. A table
            that needs none leaves it alone.
        x_prev: where to write the result; may be x itself. A new tensor if None.
        return_x0: return (x_prev, x_0), x_0 as predicted and clipped.
        backend: "auto", "cpu", "cuda", "triton" or "reference".

    Returns:
        x_{t-1} of x's shape, dtype and layout, or (x_{t-1}, x_0). Derivatives of any order, forward and backward, and
        transforms of ``torch.func`` are those of the reference, which runs where they are asked for.

    Raises:
        ValueError, TypeError: wrong shape, dtype, device or range; a table with noise and neither
            noise nor seed, or both; a table of a multistep solver without its history; an x_prev that shares memory
            with an input other than x itself, or a history that shares memory with anything.
        BackendUnavailableError: a backend asked for by name cannot run.
    """
    variance = None
    if table.learned_variance:
        out, variance = _split(out, x, "out")
        uncond = None if uncond is None else _split(uncond, x, "uncond")[0]
    if noise is not None and seed is not None:
        raise ValueError("only one of noise and seed may be given; got both")
    draws = noise is None and table.stochastic
    if draws and seed is None:
        raise ValueError("noise or seed must be given for a table that adds noise; got neither")
    tensors: list[Any] = [x, out, variance, uncond, noise]
    if tensors[1] is None:  # which visit() takes for a tensor that is left out
        check_float("out", out)
    names: tuple[str, ...] = _NAMES
    slots: tuple[Tensor, ...] = ()
    if table.history:
        slots = checked_history(history, table.history, x, (*tensors[1:], x_prev))
        tensors += slots
        names = (*_NAMES[:-1], *("history",) * len(slots), "x_prev")
    chosen, result, ordinary = visit("reverse_step", backend, names, tensors, x_prev)
    kept: Sequence[Tensor] = slots
    if slots:
        kept = tensors[5:]
        del tensors[5:]
    x, out, variance, uncond, noise = tensors

    device = x.device
    on_device = table.on(device)
    index = timestep_index("step", step, on_device.steps, x)
    key = noise_key(seed, first_sample, 0, device, x.size(0)) if draws and seed is not None else None
    rows = on_device.rows
    if result is None and x.dtype is torch.float64:
        rows = table.rows.to(device)
    threshold = None
    if table.threshold is not None:
        threshold = dynamic_threshold(x, out, uncond, guidance_scale, rows, index, table.threshold)
    x0 = torch.empty_like(x) if return_x0 and result is not None else None
    step_at = (rows, on_device.timesteps, index, key)
    call: tuple[Any, ...] = (x, out, variance, uncond, guidance_scale, noise, threshold, *step_at, result)
    if x0 is not None or slots:  # an argument that is left out costs the op 0.1 us less than None
        call += (x0, *kept)
    if not ordinary:
        call = as_traced(call)
    if result is None:
        result, x0 = reference.reverse_step(Arguments(*call))
    else:
        if chosen == "triton":
            from . import triton

            triton.reverse_step(Arguments(*call))
        else:
            (OP if is_compiling() else UNTRACED)(*call)
        if slots:
            for written, slot in zip(kept, slots, strict=True):
                deliver(written, slot)
    if x_prev is not None:
        result = deliver(result, x_prev)
    if not return_x0:
        return result
    assert x0 is not None
    return result, x0
