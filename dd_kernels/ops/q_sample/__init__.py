"""Diffuse x_0 to x_t in one pass over the data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ... import backend as backends
from .. import checks
from ..randn import noise_key
from . import reference

if TYPE_CHECKING:
    from ...schedules import Schedule

torch.library.define(
    "dd_kernels::q_sample",
    "(Tensor x_start, Tensor? noise, Tensor rows, Tensor t, Tensor? key, Tensor(a!) x_t, Tensor(b!)? noise_out) -> ()",
)


@torch.library.register_fake("dd_kernels::q_sample")
def _(
    x_start: Tensor,
    noise: Tensor | None,
    rows: Tensor,
    t: Tensor,
    key: Tensor | None,
    x_t: Tensor,
    noise_out: Tensor | None,
) -> None:
    return None


_OP = torch.ops.dd_kernels.q_sample.default  # to look it up takes as long as a check


def q_sample(
    x_start: Tensor,
    t: int | Tensor,
    schedule: Schedule,
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

    Args:
        x_start: x_0, [N, ...] (images [N, C, H, W]), float32, bfloat16 or float16; float64 on the reference.
        t: timesteps in [0, T), one int or an integer tensor [N].
        schedule: where alpha_bar comes from.
        noise: z, of x_start's shape. Without it z is drawn from ``seed`` inside the kernel.
        seed, first_sample, draw: coordinates of the noise, see :func:`dd_kernels.randn` (stream 2);
            ``draw`` is the training step, or whatever makes a call differ from the next.
        x_t: where to write the result; may be x_start itself. A new tensor if None.
        return_noise: return (x_t, z) with z of x_start's dtype, as a training target.
        backend: "auto", "cpu", "cuda", "triton" or "reference".

    Returns:
        x_t of x_start's shape, dtype and layout, or (x_t, z).

    Raises:
        ValueError, TypeError: wrong shape, dtype, device or range, or both or neither of noise and seed.
        BackendUnavailableError: a backend asked for by name cannot run.
    """
    checks.check_float("x_start", x_start)
    if x_start.ndim == 0:
        raise ValueError("x_start must be [N, ...], N samples; got a tensor of shape []")
    if (noise is None) == (seed is None):
        raise ValueError(f"one of noise and seed must be given; got {'neither' if noise is None else 'both'}")
    if noise is not None:
        checks.check_like("noise", noise, "x_start", x_start)
    device = x_start.device
    table = schedule.on(device)
    index = checks.timestep_index("t", t, table.steps, x_start)
    chosen = backends.choose("q_sample", backend, device, checks.kernel_obstacle(x_start, noise))
    checks.check_output("x_t", x_t, "x_start", x_start)

    key = None if seed is None else noise_key(seed, first_sample, draw, device)
    if chosen == "reference":
        rows = schedule.marginal.to(device) if x_start.dtype == torch.float64 else table.rows
        result, z = reference.q_sample(x_start, noise, rows, index, key)
        result = result if x_t is None else x_t.copy_(result)
        return (result, z) if return_noise else result

    x_start = checks.dense(x_start)
    noise = checks.laid_out_like(noise, x_start)
    result = checks.room_for_result(x_t, x_start)
    z = torch.empty_like(x_start) if return_noise and noise is None else None
    arguments = (x_start, noise, table.rows, index, key, result, z)
    if chosen == "triton":
        from . import triton

        triton.q_sample(*arguments)
    else:
        _OP(*arguments)
    if x_t is not None and result is not x_t:
        result = x_t.copy_(result)
    if not return_noise:
        return result
    return result, noise.to(x_start.dtype) if z is None else z
