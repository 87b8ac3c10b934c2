"""The ops as rows of one table, over which the systematic tests run: to test another op, add a row.

A row holds inputs, a call of the public function and the equation in plain PyTorch, written apart from ours. The way a
call is made (compiled, exported, transformed, differentiated ...) is a column: a function of this file that calls the
op in that way and compares.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import dd_kernels as dd
from dd_kernels.ops.reverse_step.table import COLUMNS

SCHEDULE = dd.linear_schedule(50)
TABLE = dd.ddpm(SCHEDULE, 10, clip=None)
STEPS = torch.tensor([3, 7])
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "strided": lambda x: torch.stack((x, x), -1)[..., 0],
}


@dataclass(frozen=True)
class Row:
    """An op: ``call(backend, *inputs)`` is ours, ``plain(*inputs)`` the equation.

    The inputs are tensors of the shapes, the first of the tested layout; the derivatives of all are tested.
    ``roundings`` times the unit roundoff bounds the error relative to the largest element.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    call: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    roundings: int
    scale: float = 1.0  # of the inputs after the first, so that no derivative overflows float16

    def inputs(self, dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> tuple[Tensor, ...]:
        """Returns the inputs, with the same values at every call."""
        generator = torch.Generator().manual_seed(0)
        drawn = [torch.randn(shape, generator=generator).to(dtype) for shape in self.shapes]
        return LAYOUTS[layout](drawn[0]), *(self.scale * v for v in drawn[1:])

    def tolerance(self, dtype: torch.dtype) -> float:
        """Returns the error allowed, relative to the largest element: of arithmetic in float32, and the rounding."""
        return self.roundings * 2.0**-24 + torch.finfo(dtype).eps


def _q_sample(backend: str, x: Tensor, z: Tensor) -> Tensor:
    return dd.q_sample(x, STEPS, SCHEDULE, z, backend=backend)


def _plain_q_sample(x: Tensor, z: Tensor) -> Tensor:
    alpha_bar = torch.tensor(SCHEDULE.alpha_bar)[STEPS].reshape(-1, 1, 1, 1).to(x.dtype)
    return alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * z


def _reverse_step(backend: str, x: Tensor, out: Tensor, uncond: Tensor, z: Tensor) -> Tensor:
    options = {"uncond": uncond, "guidance_scale": 2.0, "noise": z, "backend": backend}
    return dd.reverse_step(x, out.tanh(), TABLE, STEPS, **options)


def _plain_reverse_step(x: Tensor, out: Tensor, uncond: Tensor, z: Tensor) -> Tensor:
    row = {name: TABLE.rows[STEPS, i].reshape(-1, 1, 1, 1).to(x.dtype) for i, name in enumerate(COLUMNS)}
    out = uncond + 2.0 * (out.tanh() - uncond)
    x0 = (row["x0_num_x"] * x + row["x0_num_out"] * out) / row["x0_den"]
    return row["prev_from_x0"] * x0 + row["prev_from_x"] * x + row["prev_from_out"] * out + row["sigma"] * z


def _randn(backend: str, x: Tensor) -> Tensor:
    return x * dd.randn((2, 6, 4, 4), seed=3, dtype=x.dtype, backend=backend)


def _plain_randn(x: Tensor) -> Tensor:
    return x * dd.randn((2, 6, 4, 4), seed=3, dtype=torch.float64, backend="reference").to(x.dtype)


def _group_norm_silu(backend: str, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return dd.group_norm_silu(x, 3, weight, bias, scale=scale, shift=shift, backend=backend)


def _plain_group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    groups = x.reshape(2, 3, -1)
    centred = groups - groups.mean(-1, keepdim=True)
    normal = (centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()).reshape(x.shape)
    normal = normal * weight.reshape(-1, 1, 1) + bias.reshape(-1, 1, 1)
    scaled = normal * (1 + scale[..., None, None]) + shift[..., None, None]
    return scaled * scaled.sigmoid()


def _conv2d(backend: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return dd.ops.conv2d(x, weight, bias, padding=1, backend=backend)


def _plain_conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    patches = F.unfold(x, 3, padding=1)  # [N, C * 9, H * W]
    return (weight.flatten(1) @ patches).reshape(2, -1, 4, 4) + bias.reshape(-1, 1, 1)


def _attention(backend: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return dd.ops.attention(q, k, v, backend=backend)


def _plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q[..., None, :] * k[..., None, :, :]).sum(-1).div(q.shape[-1] ** 0.5).exp()
    return (weights[..., None] * v[..., None, :, :]).sum(-2) / weights.sum(-1, keepdim=True)


IMAGE = (2, 6, 4, 4)
ROWS = {
    row.name: row
    for row in (
        Row("randn", (IMAGE,), _randn, _plain_randn, 32),
        Row("q_sample", (IMAGE, IMAGE), _q_sample, _plain_q_sample, 8),
        Row("reverse_step", (IMAGE, IMAGE, IMAGE, IMAGE), _reverse_step, _plain_reverse_step, 64),
        Row("group_norm_silu", (IMAGE, (6,), (6,), (2, 6), (2, 6)), _group_norm_silu, _plain_group_norm_silu, 64),
        Row("conv2d", (IMAGE, (5, 6, 3, 3), (5,)), _conv2d, _plain_conv2d, 512, scale=0.25),
        Row("attention", (IMAGE, (2, 6, 5, 4), (2, 6, 5, 3)), _attention, _plain_attention, 64),
    )
}


def double(values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Returns the same values in float64."""
    return tuple(v.detach().double() for v in values)


def assert_near(actual: Tensor, exact: Tensor, tolerance: float) -> None:
    """The error is within the tolerance, relative to the largest element."""
    assert actual.shape == exact.shape
    assert (actual.double() - exact).abs().max() <= tolerance * exact.abs().max()


# The columns: each calls a row in one way.


def eager(row: Row, backend: str, inputs: tuple[Tensor, ...]) -> None:
    y = row.call(backend, *inputs)
    assert y.dtype == inputs[0].dtype
    assert_near(y, row.plain(*double(inputs)), row.tolerance(y.dtype))


def compiled(row: Row, backend: str, inputs: tuple[Tensor, ...]) -> None:
    torch.compiler.reset()
    function = torch.compile(lambda *values: row.call(backend, *values), fullgraph=True, backend="aot_eager")
    assert function(*inputs).equal(row.call(backend, *inputs))


class _Module(torch.nn.Module):
    def __init__(self, row: Row, backend: str) -> None:
        super().__init__()
        self.row, self.backend = row, backend

    def forward(self, *values: Tensor) -> Tensor:
        return self.row.call(self.backend, *values)


def exported(row: Row, backend: str, inputs: tuple[Tensor, ...]) -> None:
    program = torch.export.export(_Module(row, backend), inputs, strict=False)
    assert program.module()(*inputs).equal(row.call(backend, *inputs))


def traced(row: Row, backend: str, inputs: tuple[Tensor, ...]) -> None:
    """Calls the op traced by torch.jit.trace, which warns of every number that it takes for a constant.

    Its own check traces again with copies of the inputs, which have other strides than strided ones.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        function = torch.jit.trace(_Module(row, backend), inputs, check_trace=False)
    assert function(*inputs).equal(row.call(backend, *inputs))


def vmap(row: Row, backend: str, inputs: tuple[Tensor, ...]) -> None:
    stacked = tuple(torch.stack((v, v.flip(0))) for v in inputs)
    together = torch.func.vmap(lambda *values: row.call(backend, *values))(*stacked)
    for i, one in enumerate(together):
        exact = row.plain(*double(tuple(v[i] for v in stacked)))
        assert_near(one, exact, row.tolerance(one.dtype))


def _tangents(row: Row, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(v.flip(0) for v in inputs)


def jvp(row: Row, backend: str, inputs: tuple[Tensor, ...]) -> None:
    tangents = _tangents(row, inputs)
    _, exact = torch.func.jvp(row.plain, double(inputs), double(tangents))
    _, tangent = torch.func.jvp(lambda *values: row.call(backend, *values), inputs, tangents)
    assert_near(tangent, exact, 8 * row.tolerance(tangent.dtype))
    with torch.autograd.forward_ad.dual_level():
        duals = map(torch.autograd.forward_ad.make_dual, inputs, tangents)
        tangent = torch.autograd.forward_ad.unpack_dual(row.call(backend, *duals)).tangent
    assert_near(tangent, exact, 8 * row.tolerance(tangent.dtype))


def grad(row: Row, backend: str, inputs: tuple[Tensor, ...]) -> None:
    """Compares the gradient of the sum of squares, by autograd and by torch.func."""
    exact = torch.func.grad(lambda *v: row.plain(*v).square().sum(), tuple(range(len(inputs))))(*double(inputs))
    leaves = tuple(v.detach().clone().requires_grad_() for v in inputs)
    by_autograd = torch.autograd.grad(row.call(backend, *leaves).double().square().sum(), leaves)
    loss = lambda *values: row.call(backend, *values).double().square().sum()  # noqa: E731
    by_func = torch.func.grad(loss, tuple(range(len(inputs))))(*inputs)
    for g, f, e in zip(by_autograd, by_func, exact, strict=True):
        assert_near(g, e, 16 * row.tolerance(g.dtype))
        assert_near(f, e, 16 * row.tolerance(f.dtype))


def gradgrad(row: Row, backend: str, inputs: tuple[Tensor, ...]) -> None:
    """The gradient of a gradient's norm, as gradient penalties take it, and gradgradcheck in float64."""

    def penalty(call: Callable[..., Tensor], values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        leaves = tuple(v.detach().clone().requires_grad_() for v in values)
        first = torch.autograd.grad(call(*leaves).double().square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.double().square().sum() for g in first), leaves)

    exact = penalty(row.plain, double(inputs))
    found = penalty(lambda *values: row.call(backend, *values), inputs)
    for g, e in zip(found, exact, strict=True):
        assert_near(g, e, 64 * row.tolerance(g.dtype))


def autocast(row: Row, backend: str, inputs: tuple[Tensor, ...]) -> None:
    """The ops compute in the dtypes that they are given."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = row.call(backend, *inputs)
    assert y.dtype == inputs[0].dtype
    assert y.equal(row.call(backend, *inputs))


def inference(row: Row, backend: str, inputs: tuple[Tensor, ...]) -> None:
    with torch.inference_mode():
        y = row.call(backend, *inputs)
    assert y.equal(row.call(backend, *inputs))


def functional(row: Row, backend: str, inputs: tuple[Tensor, ...]) -> None:
    y = torch.func.functionalize(lambda *values: row.call(backend, *values))(*inputs)
    assert_near(y, row.plain(*double(inputs)), row.tolerance(y.dtype))


def meta(row: Row, backend: str, inputs: tuple[Tensor, ...]) -> None:
    """Under fake tensors the shape, dtype and layout are those of the real call."""
    y = row.call(backend, *inputs)
    with torch._subclasses.fake_tensor.FakeTensorMode() as mode:
        fake = row.call(backend, *map(mode.from_tensor, inputs))
    assert (fake.shape, fake.dtype, fake.device) == (y.shape, y.dtype, y.device)


WAYS = (eager, compiled, exported, traced, vmap, jvp, grad, gradgrad, autocast, inference, functional, meta)
BY_REFERENCE = (vmap, jvp, functional)  # ways that a kernel refuses when it is asked for by name
