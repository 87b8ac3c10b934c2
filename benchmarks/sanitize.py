"""A short run of every op on one backend, for compute-sanitizer to watch: ``python -m benchmarks.sanitize cuda``.

Small shapes, one for each way in which a kernel cuts its work. Inputs come from the host: what is
watched is the ops' own kernels.
"""

from __future__ import annotations

import itertools
import sys

import torch

import dd_kernels as dd
from dd_kernels import backend as backends

from . import machine

NORMS = [(2, 32, 4, 4), (2, 64, 16, 16), (3, 96, 7, 5), (1, 64, 64, 64), (1, 32, 160, 160)]
OF_TWO = [(2, 32, 8, 8), (1, 64, 32, 32)]
IMAGES = [(2, 3, 8, 8), (3, 3, 7, 5)]
LAYOUTS = (torch.contiguous_format, torch.channels_last)
DTYPES = (torch.float32, torch.bfloat16)


def _tensor(shape: tuple[int, ...], device: str, dtype: torch.dtype, layout: torch.memory_format) -> torch.Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=layout).to(device)


def norms(device: str, backend: str) -> int:
    """group_norm_silu, forward and backward, with all that is folded into it."""
    done = 0
    for shape, layout, dtype in itertools.product(NORMS, LAYOUTS, DTYPES):
        x = _tensor(shape, device, dtype, layout).requires_grad_()
        weight, bias = (torch.randn(shape[1]).to(device).requires_grad_() for _ in range(2))
        per_sample = [torch.randn(shape[:2]).to(device).requires_grad_() for _ in range(3)]
        names = dict(zip(("pre_shift", "scale", "shift"), per_sample, strict=True))
        y = dd.group_norm_silu(x, 32, weight, bias, backend=backend, **names)
        y.backward(torch.ones_like(y))
        done += 1
    return done


def norms_of_two(device: str, backend: str) -> int:
    """group_norm_silu, forward and backward, of a sum and of two tensors side by side."""
    done = 0
    for shape, layout, dtype in itertools.product(OF_TWO, LAYOUTS, DTYPES):
        x, other = (_tensor(shape, device, dtype, layout).requires_grad_() for _ in range(2))
        y, total = dd.group_norm_silu(x, 32, residual=other, backend=backend)
        torch.autograd.backward([y, total], [torch.ones_like(y), torch.ones_like(total)])
        y = dd.group_norm_silu(x, 32, skip=other, backend=backend)
        y.backward(torch.ones_like(y))
        done += 1
    return done


def steps(device: str, backend: str) -> int:
    """randn, q_sample and reverse_step, with the noise drawn and given, in place and not."""
    schedule, done = dd.linear_schedule(), 0
    table = dd.ddpm(schedule)
    for shape, layout, dtype in itertools.product(IMAGES, LAYOUTS, DTYPES):
        x, out = (_tensor(shape, device, d, layout) for d in (torch.float32, dtype))
        t = torch.arange(shape[0]).to(device)
        z = dd.randn(shape, seed=1, device=device, dtype=dtype, memory_format=layout, backend=backend)
        dd.q_sample(x, t, schedule, seed=1, return_noise=True, backend=backend)
        dd.q_sample(x, t, schedule, z, backend=backend)
        dd.reverse_step(x, out, table, 500, seed=1, return_x0=True, backend=backend)
        dd.reverse_step(x, out, table, t, noise=z, uncond=out, guidance_scale=2.0, x_prev=x, backend=backend)
        done += 1
    return done


def main(backend: str, device: str = machine.DEVICE) -> None:
    """Runs all on one backend, and says so: the report counts the lines."""
    obstacle = backends.unavailable(backend, device)
    if obstacle is not None:
        print(f"not available: {obstacle}")
        return
    torch.manual_seed(0)
    for run in (steps, norms, norms_of_two):
        number = run(device, backend)
        if device == "cuda":
            torch.cuda.synchronize()
        print(f"sanitized {run.__name__} on {backend}: {number} cases", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
