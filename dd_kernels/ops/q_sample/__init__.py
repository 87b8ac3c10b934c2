"""Diffuse x_0 to x_t in one pass over the data."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..checks import deliver, timestep_index, visit
from ..randn.key import noise_key
from ..tracing import as_traced
from . import reference
from .op import OP, UNTRACED, Arguments
from .table import MarginalTable

_NAMES = ("x_start", "noise", "x_t")


@overload
def q_sample(
    x_start: Tensor,
    t: Any,
    schedule: MarginalTable,
    noise: Tensor | None = None,
    *,
    seed: int | Tensor | None = None,
    first_sample: int = 0,
    draw: int = 0,
    x_t: Tensor | None = None,
    return_noise: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def q_sample(
    x_start: Tensor,
    t: Any,
    schedule: MarginalTable,
    noise: Tensor | None = None,
    *,
    seed: int | Tensor | None = None,
    first_sample: int = 0,
    draw: int = 0,
    x_t: Tensor | None = None,
    return_noise: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def q_sample(
    x_start: Tensor,
    t: Any,
    schedule: MarginalTable,
    noise: Tensor | None = None,
    *,
    seed: int | Tensor | None = None,
    first_sample: int = 0,
    draw: int = 0,
    x_t: Tensor | None = None,
    return_noise: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""A sample of the forward process q(x_t | x_0), eq. 4 of DDPM (Ho et al., 2020).

    .. math:: x_t = \sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\, z, \qquad z \sim N(0, I)

    Finite wherever float32 holds the result, whatever finite x_0 and z are.

    Args:
        x_start: x_0, [N, ...] (images [N, C, H, W]), float32, bfloat16 or float16; float64 on the reference.
        t: timesteps in [0, T): one integer, or an integer tensor, array or list [N] or [1].
        schedule: a :class:`dd_kernels.Schedule`, where alpha_bar comes from.
        noise: z, of x_start's shape, or one sample [1, ...] for all. Without it z is drawn from ``seed`` inside
            the kernel.
        seed, first_sample, draw: coordinates of the noise, see :func:`dd_kernels.randn` (stream 2);
            ``draw`` is the training step, or whatever makes a call differ from the next.
        x_t: where to write the result; may be x_start itself. A new tensor if None.
        return_noise: return (x_t, z) with z of x_start's dtype, as a training target.
        backend: "auto", "cpu", "cuda", "triton" or "reference".

    Returns:
        x_t of x_start's shape, dtype and layout, or (x_t, z). Derivatives of any order, forward and backward, and
        transforms of ``torch.func`` are those of the reference, which runs where they are asked for.

    Raises:
        ValueError, TypeError: wrong shape, dtype, device or range, both or neither of noise and seed, or an x_t that
            shares memory with an input other than x_start itself.
        BackendUnavailableError: a backend asked for by name cannot run.
    """
    if (noise is None) == (seed is None):
        raise ValueError(f"one of noise and seed must be given; got {'neither' if noise is None else 'both'}")
    tensors: list[Any] = [x_start, noise]
    chosen, result, ordinary = visit("q_sample", backend, _NAMES, tensors, x_t)
    x_start, noise = tensors
    device = x_start.device
    table = schedule.on(device)
    index = timestep_index("t", t, table.steps, x_start)
    key = None if seed is None else noise_key(seed, first_sample, draw, device, x_start.size(0))
    rows = schedule.marginal.to(device) if x_start.dtype is torch.float64 else table.rows
    z = torch.empty_like(x_start) if return_noise and noise is None and result is not None else None
    call = (x_start, noise, rows, index, key, result, z)
    if not ordinary:
        call = as_traced(call)
    if result is None:
        result, z = reference.q_sample(Arguments(*call))
    elif chosen == "triton":
        from . import triton

        triton.q_sample(Arguments(*call))
    else:
        (OP if is_compiling() else UNTRACED)(*call)
    if x_t is not None:
        result = deliver(result, x_t)
    if not return_noise:
        return result
    return result, noise.to(x_start.dtype) if z is None else z
