"""The tables and arguments of the reverse step's tests, and its error budget."""

import numpy as np
import torch
from bounds import assert_within, reverse_step_error

import dd_kernels as dd
from dd_kernels.ops.randn import Stream, noise_key
from dd_kernels.ops.randn.reference import normals
from dd_kernels.ops.reverse_step.table import COLUMNS, DynamicThreshold, from_columns
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
    "one x_0 kept": dd.dpm_solver(SCHEDULE, steps=20, clip=0.7),
    "one x_0 kept, noise": dd.dpm_solver(SCHEDULE, steps=20, stochastic=True, spacing="trailing"),
    "two x_0 kept": dd.dpm_solver(SCHEDULE, steps=20, order=3, prediction="v"),
    "two x_0 kept, learned": from_columns(
        np.arange(20)[::-1],
        learned_variance=True,
        **{name: 0.1 * (i + 1) for i, name in enumerate(COLUMNS) if not name.startswith("log_var")},
        log_var_min=-2.0,
        log_var_max=-1.0,
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
        earlier=earlier(steps, [double(v) for v in options.get("history", ())]),
    )


def earlier(steps, history):
    """x_0 of the last step and of the one before: kept by parity where there are two."""
    if len(history) < 2:
        return tuple(history)
    is_odd = (steps % 2 == 1).reshape(-1, *[1] * (history[0].ndim - 1))
    even, odd = history
    return torch.where(is_odd, even, odd), torch.where(is_odd, odd, even)


def kept(steps, history, x0):
    """Returns the history as the step leaves it."""
    if len(history) < 2:
        return [x0] * len(history)
    is_odd = (steps % 2 == 1).reshape(-1, *[1] * (x0.ndim - 1))
    return [torch.where(is_odd, history[0], x0), torch.where(is_odd, x0, history[1])]


def check(kernel, x, out, table, step, **options):
    """x_prev of a kernel; it and x_0 are compared with float64."""
    if table.stochastic and "noise" not in options:
        options.setdefault("seed", 7)
    x, out, step = (v.to(kernel.device) if isinstance(v, torch.Tensor) else v for v in (x, out, step))
    options = {k: v.to(kernel.device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    if table.history and "history" not in options:
        options["history"] = [torch.randn(x.shape).to(x) for _ in range(table.history)]
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    if table.history:
        wide["history"] = [v.double() for v in options["history"]]
    history = [[v.clone() for v in options.get("history", ())] for _ in range(2)]
    exact = dd.reverse_step(x.double(), out.double(), table, step, return_x0=True, backend="reference", **wide)
    actual = reverse_step(x, out, table, step, options, history[0], return_x0=True, backend=kernel.name)
    allowed = errors(table, x, out, step, kernel.normal_error(x.dtype), options)
    for a, e, error in zip(actual, exact, allowed, strict=True):
        assert a.dtype == x.dtype
        assert_within(a.cpu(), e.cpu(), error, kernel.truncates(x.dtype))
    alone = reverse_step(x, out, table, step, options, history[1], backend=kernel.name)
    assert alone.equal(actual[0])
    steps = torch.as_tensor(step, device=x.device).expand(len(x))
    for after in history:
        for a, e in zip(after, kept(steps, options.get("history", ()), actual[1]), strict=True):
            assert a.equal(e.to(a.dtype))
    return actual[0]


def reverse_step(x, out, table, step, options, history, **more):
    """dd.reverse_step with this history, where the table keeps one."""
    return dd.reverse_step(x, out, table, step, **{**options, "history": history or None}, **more)
