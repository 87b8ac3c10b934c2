"""The tables and arguments of the reverse step's tests, and its error budget."""

import numpy as np
import torch
from bounds import assert_within, reverse_step_error

import dd_kernels as dd
from dd_kernels.ops.randn import Stream, noise_key
from dd_kernels.ops.randn.reference import normals
from dd_kernels.ops.reverse_step.table import DynamicThreshold, from_columns
from dd_kernels.ops.reverse_step.threshold import dynamic_threshold

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


def double(value):
    return None if value is None else value.double().cpu()


def errors(table, x, out, step, noise_error, options):
    """How far x_prev and x_0 of :func:`dd_kernels.reverse_step` may be from float64, before they are rounded."""
    x, out, uncond, z = (double(v) for v in (x, out, options.get("uncond"), options.get("noise")))
    steps = torch.as_tensor(step).cpu().expand(len(x)) if not isinstance(step, list) else torch.tensor(step)
    variance = None
    if table.learned_variance:
        out, variance = out.chunk(2, 1)
        uncond = None if uncond is None else uncond.chunk(2, 1)[0]
    scale, threshold = options.get("guidance_scale", 1.0), None
    if table.stochastic and z is None:
        key = noise_key(options["seed"], options.get("first_sample", 0), 0, torch.device("cpu"))
        z = normals(key, x.shape, table.timesteps[steps], Stream.REVERSE_STEP)
    else:
        noise_error = 0.0
    if table.threshold is not None:
        threshold = dynamic_threshold(x, out, uncond, scale, table.rows, steps, table.threshold)
        threshold = threshold.reshape(-1, *[1] * (x.ndim - 1))
    return reverse_step_error(
        *(table, steps, x, out),
        variance=variance,
        uncond=uncond,
        scale=scale,
        z=z,
        noise_error=noise_error,
        threshold=threshold,
    )


def check(kernel, x, out, table, step, **options):
    """x_prev of a kernel; it and x_0 are compared with float64."""
    if table.stochastic and "noise" not in options:
        options.setdefault("seed", 7)
    x, out, step = (v.to(kernel.device) if isinstance(v, torch.Tensor) else v for v in (x, out, step))
    options = {k: v.to(kernel.device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    exact = dd.reverse_step(x.double(), out.double(), table, step, return_x0=True, backend="reference", **wide)
    actual = dd.reverse_step(x, out, table, step, return_x0=True, backend=kernel.name, **options)
    allowed = errors(table, x, out, step, kernel.normal_error(x.dtype), options)
    for a, e, error in zip(actual, exact, allowed, strict=True):
        assert a.dtype == x.dtype
        assert_within(a.cpu(), e.cpu(), error, kernel.truncates(x.dtype))
    alone = dd.reverse_step(x, out, table, step, backend=kernel.name, **options)
    assert alone.equal(actual[0])
    return actual[0]
