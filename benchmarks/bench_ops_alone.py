"""The ops alone, as PyTorch's own are called: arguments prepared, outputs given, the same tensors every time.

What the public functions add, their checks, a new tensor with its pages, autograd, is in the rows of the other files.
There a GPU replays a graph, in which none of that is: only a CPU is measured here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from dd_kernels import backend as backends
from dd_kernels.ops.randn import noise_key

from . import bench_group_norm_silu as norms
from . import bench_q_sample, bench_reverse_step
from .harness import Case, Plan, Row, Target, on_threads

CPU = torch.device("cpu")


def _step(sampler: str, shape: tuple[int, ...]) -> Case:
    """In place, as :func:`dd_kernels.sample` does it."""
    table, seed = bench_reverse_step.TABLES[sampler], bench_reverse_step.SEEDS[sampler]
    on, index = table.on(CPU), len(table) // 2
    key = None if seed is None else noise_key(seed, 0, 0, CPU)
    op = torch.ops.dd_kernels.reverse_step.default

    def ours(x: Tensor, out: Tensor) -> None:
        op(x, out, None, None, 1.0, None, None, on.rows, on.timesteps, on.steps[index], key, x, None)

    x, out = torch.randn(2, *shape)
    peers = {"diffusers": bench_reverse_step.diffusers_step(sampler)}
    return Case("reverse_step", f"{sampler}, op alone", shape, ours, [(x, out)], 3 * 4 * x.numel(), peers)


def _q_sample(drawn: bool, shape: tuple[int, ...]) -> Case:
    rows, t = bench_q_sample.SCHEDULE.on(CPU).rows, bench_q_sample.timesteps(shape[0])
    key, x_t = noise_key(0, 0, 0, CPU) if drawn else None, torch.empty(shape)
    op = torch.ops.dd_kernels.q_sample.default

    def ours(x: Tensor, z: Tensor | None = None) -> None:
        op(x, z, rows, t, key, x_t, None)

    inputs = tuple(torch.randn(1 if drawn else 2, *shape))
    name, size = f"noise {'drawn' if drawn else 'given'}, op alone", (len(inputs) + 1) * 4 * x_t.numel()
    peers = {"diffusers": bench_q_sample.diffusers_add_noise(t, drawn)}
    return Case("q_sample", name, shape, ours, [inputs], size, peers)


def _norm(backward: bool, layout: str, size: tuple[int, int, int]) -> Case:
    shape = (*size, size[2])
    x, dy = (v.contiguous(memory_format=norms.LAYOUTS[layout]) for v in torch.randn(2, *shape))
    weight, bias, dweight, dbias = torch.randn(4, shape[1])
    y, (mean, rstd) = torch.empty_like(x), torch.empty(2, shape[0], norms.GROUPS)
    options = (norms.GROUPS, weight, bias, norms.EPS, None, None, None, True)
    forward = torch.ops.dd_kernels.group_norm_silu.default
    forward(x, *options, y, mean, rstd)
    if backward:
        gradients = (torch.empty_like(x), dweight, dbias, None, None, None)
        ours = functools.partial(
            torch.ops.dd_kernels.group_norm_silu_backward.default, dy, x, mean, rstd, *options, *gradients
        )
        eager = norms.gradients(norms.eager, (x, weight, bias), dy)
    else:
        ours = functools.partial(forward, x, *options, y, mean, rstd)
        eager = functools.partial(norms.eager, x, weight, bias)
    name, size_in_bytes = f"{'backward' if backward else 'forward'}, op alone", (2 + backward) * 4 * x.numel()
    return Case("group_norm_silu", name, shape, ours, [()], size_in_bytes, {"eager": eager}, layout=layout)


def plans(target: Target) -> list[Plan]:
    """Steps, q_sample and the norm at the sizes of their own files."""
    if target.kind != "cpu" or backends.unavailable("cpu"):
        return []
    steps = [(_step, (sampler, shape)) for sampler in ("ddpm", "ddim") for shape in bench_reverse_step.SHAPES["cpu"]]
    samples = [(_q_sample, (drawn, shape)) for drawn in (False, True) for shape in bench_q_sample.SHAPES["cpu"]]
    directions = [(backward, layout) for backward in (False, True) for layout in norms.LAYOUTS]
    cases = [*steps, *samples, *((_norm, (*way, size)) for way in directions for size in norms.MAIN["cpu"])]
    return [
        plan
        for build, options in cases
        for plan in on_threads(
            target,
            f"op alone {build.__name__[1:]} {' '.join(map(str, options))}",
            lambda build=build, options=options: dataclasses.replace(build(*options), hot=True),
        )
    ]


def test_op_alone(compare: Callable[[Plan], Row], plan: Plan) -> None:
    compare(plan)
