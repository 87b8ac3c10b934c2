"""The tables and arguments of the reverse step's tests, and its error budget."""

import numpy as np
import torch
from budget import assert_within_budget

import dd_kernels as dd
from dd_kernels.ops.reverse_step.table import DynamicThreshold, from_columns

SCHEDULE = dd.linear_schedule(1000)
THRESHOLD = DynamicThreshold(0.9, 3.0)
TABLES = {
    "ddpm": dd.ddpm(SCHEDULE, steps=20),
    "ddpm, no clip, fixed_large, v": dd.ddpm(SCHEDULE, 20, variance="fixed_large", prediction="v", clip=None),
    "ddpm, learned_range": dd.ddpm(SCHEDULE, 20, variance="learned_range"),
    "ddpm, dynamic threshold": dd.ddpm(SCHEDULE, 20, clip=THRESHOLD),
    "ddim": dd.ddim(SCHEDULE, steps=20),
    "ddim, eta 0.7, x_start": dd.ddim(SCHEDULE, steps=20, eta=0.7, prediction="x_start"),
    "ddim inversion": dd.ddim_inversion(SCHEDULE, steps=20),
    "prev_from_out": from_columns(
        np.arange(3), x0_num_x=1.1, x0_num_out=-0.4, x0_den=0.9, prev_from_x0=0.5, prev_from_out=0.3, sigma=0.2
    ),
    "negative terms": from_columns(
        np.arange(3), x0_num_out=-1.0, prev_from_x0=-0.5, prev_from_x=-0.7, prev_from_out=-0.3, sigma=0.4
    ),
}


def tensors(table, shape, dtype=torch.float32, out_dtype=torch.float32):
    """x and a model output that moves x_0 to both sides of the clip."""
    wide = [shape[0], shape[1] * (1 + table.learned_variance), *shape[2:]]
    return torch.randn(shape).to(dtype), torch.randn(wide).to(out_dtype)


def double(options):
    return {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in options.items()}


def largest_sigma(table):
    return 0.0 if not table.stochastic else float(table.column("sigma").max())


def check(kernel, x, out, table, step, **options):
    """(x_prev, x0) of a kernel against float64 and plain PyTorch."""
    if table.stochastic and "noise" not in options:
        options.setdefault("seed", 7)
    x, out, step = (v.to(kernel.device) if isinstance(v, torch.Tensor) else v for v in (x, out, step))
    options = {k: v.to(kernel.device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    wide = double(options)
    exact = dd.reverse_step(x.double(), out.double(), table, step, return_x0=True, backend="reference", **wide)
    plain = dd.reverse_step(x, out, table, step, return_x0=True, backend="reference", **options)
    actual = dd.reverse_step(x, out, table, step, return_x0=True, backend=kernel.name, **options)
    drawn = largest_sigma(table) if "noise" not in options else 0.0
    for a, e, p in zip(actual, exact, plain, strict=True):
        assert_within_budget(a, e, p, drawn, kernel.truncates(x.dtype), kernel.normal_error(x.dtype))
    alone = dd.reverse_step(x, out, table, step, backend=kernel.name, **options)
    assert alone.equal(actual[0])
    return actual[0]
