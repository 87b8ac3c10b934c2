"""Calls every op on one backend while compute-sanitizer watches: ``python -m tools.sanitize cuda``.

The shapes are small, one for each way in which a kernel partitions its work. Inputs are made on the host, so
that the ops' own kernels are the only ones that run.
"""

from __future__ import annotations

import itertools
import sys

import torch

import dd_kernels as dd
from dd_kernels import backend as backends

NORMS = [(2, 32, 4, 4), (2, 64, 16, 16), (3, 96, 7, 5), (1, 64, 64, 64), (1, 32, 160, 160)]
PAIRS = [(2, 32, 8, 8), (1, 64, 32, 32)]
IMAGES = [(2, 3, 8, 8), (3, 3, 7, 5)]
LAYOUTS = (torch.contiguous_format, torch.channels_last)
DTYPES = (torch.float32, torch.bfloat16)


def _tensor(shape: tuple[int, ...], device: str, dtype: torch.dtype, layout: torch.memory_format) -> torch.Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=layout).to(device)


def norms(device: str, backend: str) -> int:
    """Runs group_norm_silu forward and backward with pre_shift, scale and shift; returns the number of cases."""
    done = 0
    for shape, layout, dtype in itertools.product(NORMS, LAYOUTS, DTYPES):
        x = _tensor(shape, device, dtype, layout).requires_grad_()
        weight, bias = (torch.randn(shape[1]).to(device).requires_grad_() for _ in range(2))
        pre_shift, scale, shift = (torch.randn(shape[:2]).to(device).requires_grad_() for _ in range(3))
        y = dd.group_norm_silu(x, 32, weight, bias, pre_shift=pre_shift, scale=scale, shift=shift, backend=backend)
        y.backward(torch.ones_like(y))
        done += 1
    return done


def norms_of_pairs(device: str, backend: str) -> int:
    """Runs group_norm_silu forward and backward with a residual and with a skip; returns the number of cases."""
    done = 0
    for shape, layout, dtype in itertools.product(PAIRS, LAYOUTS, DTYPES):
        x, other = (_tensor(shape, device, dtype, layout).requires_grad_() for _ in range(2))
        y, total = dd.group_norm_silu(x, 32, residual=other, backend=backend)
        torch.autograd.backward([y, total], [torch.ones_like(y), torch.ones_like(total)])
        y = dd.group_norm_silu(x, 32, skip=other, backend=backend)
        y.backward(torch.ones_like(y))
        done += 1
    return done


def steps(device: str, backend: str) -> int:
    """Runs randn, q_sample and reverse_step, noise drawn and given, in place and not; returns the number of cases."""
    schedule, done = dd.linear_schedule(), 0
    table, solver = dd.ddpm(schedule), dd.dpm_solver(schedule, order=3)
    for shape, layout, dtype in itertools.product(IMAGES, LAYOUTS, DTYPES):
        x, out = (_tensor(shape, device, d, layout) for d in (torch.float32, dtype))
        t = torch.arange(shape[0]).to(device)
        z = dd.randn(shape, seed=1, device=device, dtype=dtype, memory_format=layout, backend=backend)
        dd.q_sample(x, t, schedule, seed=1, return_noise=True, backend=backend)
        dd.q_sample(x, t, schedule, z, backend=backend)
        dd.reverse_step(x, out, table, 500, seed=1, return_x0=True, backend=backend)
        dd.reverse_step(x, out, table, t, noise=z, uncond=out, guidance_scale=2.0, x_prev=x, backend=backend)
        history = [torch.zeros_like(v) for v in (out, out)]
        dd.reverse_step(x, out, solver, t % 10, history=history, backend=backend)
        done += 1
    return done


def main(backend: str, device: str) -> None:
    """Runs all cases on one backend and prints a line for each group; ``tools.checks`` counts the lines."""
    reason = backends.unavailable(backend, device)
    if reason is not None:
        print(f"not available: {reason}")
        return
    torch.manual_seed(0)
    for run in (steps, norms, norms_of_pairs):
        number = run(device, backend)
        if device == "cuda":
            torch.cuda.synchronize()
        print(f"sanitized {run.__name__} on {backend}: {number} cases", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], "cuda" if torch.cuda.is_available() else "cpu")
