"""reverse_step among PyTorch's ops: what it refuses, tracing, and the quantile that thresholds it."""

import importlib

import pytest
import torch
from step_cases import TABLES, tensors

import dd_kernels as dd
from dd_kernels.ops.randn import noise_key

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


def test_float64_and_gradients_go_to_the_reference():
    table = TABLES["ddim"]
    x, out = tensors(table, (2, 3, 4, 4))
    assert dd.reverse_step(x.double(), out, table, 3).dtype == torch.float64
    with pytest.raises(dd.BackendUnavailableError, match=r"reverse_step.*'cpu'.*float64"):
        dd.reverse_step(x, out.double(), table, 3, backend="cpu")
    out.requires_grad_()
    dd.reverse_step(x, out, table, 3).sum().backward()
    assert out.grad.abs().sum() > 0
    with pytest.raises(dd.BackendUnavailableError, match=r"reverse_step.*'cpu'.*gradient"):
        dd.reverse_step(x, out, table, 3, backend="cpu")


X = torch.zeros(2, 3, 4, 4)
LEARNED = TABLES["ddpm, learned_range"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": 1.0}, TypeError, "x must be a torch.Tensor; got float"),
        ({"x": X.int()}, TypeError, "x must be float32.*int32"),
        ({"x": X.sum()}, ValueError, r"x must be \[N, ...\]"),
        ({"x": torch.zeros(2), "table": LEARNED}, ValueError, r"x must be \[N, C, ...\] .* learned variance"),
        ({"out": None}, TypeError, "out must be a torch.Tensor; got NoneType"),
        ({"out": X[:, :2]}, ValueError, r"out must have the shape of x, \[2, 3, 4, 4\]; got \[2, 2, 4, 4\]"),
        ({"table": LEARNED}, ValueError, r"out must have the shape \[2, 6, 4, 4\], .* learned variance"),
        ({"out": X.to("meta")}, ValueError, "out must be on the device of x, cpu; got meta"),
        ({"uncond": X[:, :1]}, ValueError, r"uncond must have the shape of x, \[2, 3, 4, 4\]"),
        ({"uncond": X.int()}, TypeError, "uncond must be float32"),
        ({"seed": None, "noise": X[0]}, ValueError, "noise must have the shape of x"),
        ({"seed": None, "noise": X.bool()}, TypeError, "noise must be float32.*bool"),
        ({"noise": X}, ValueError, "only one of noise and seed may be given; got both"),
        ({"seed": None}, ValueError, "noise or seed must be given for a table that adds noise; got neither"),
        ({"seed": "0"}, TypeError, "seed must be an int; got str"),
        ({"first_sample": -1}, ValueError, "first_sample must be in"),
        ({"step": 20}, ValueError, r"step must be in \[0, 20\); got 20"),
        ({"step": -1}, ValueError, r"step must be in \[0, 20\); got -1"),
        ({"step": torch.tensor([0, 25])}, ValueError, r"step must be in \[0, 20\); got 25"),
        ({"step": torch.tensor([0, 1, 2])}, ValueError, r"step must have the shape \[\] or \[2\]"),
        ({"step": 0.5}, TypeError, "step must be an int or an integer tensor; got float"),
        ({"x_prev": X[:1]}, ValueError, "x_prev must have the shape of x"),
        ({"x_prev": X.half()}, TypeError, "x_prev must have the dtype of x, torch.float32; got torch.float16"),
        ({"backend": "cuda"}, dd.BackendUnavailableError, "reverse_step: backend='cuda' was asked for but cannot run"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        dd.reverse_step(**{"x": X, "out": X, "table": TABLES["ddpm"], "step": 3, "seed": 0, **arguments})


def test_opcheck(kernel):
    if kernel.name == "triton":
        return
    table = TABLES["ddpm"]
    x, out = (v.to(kernel.device) for v in tensors(table, (2, 3, 4, 4)))
    on, key = table.on(x.device), noise_key(1, 0, 0, x.device)
    shared = (on.rows, on.timesteps, on.steps[3])
    op = torch.ops.dd_kernels.reverse_step.default
    torch.library.opcheck(op, (x, out, None, out.clone(), 2.0, None, None, *shared, key, x.clone(), x.clone()))
    threshold = torch.ones(2, device=x.device)
    torch.library.opcheck(op, (x, out, out.clone(), None, 1.0, x.clone(), threshold, *shared, None, x.clone(), None))


@pytest.mark.parametrize("elements", [1, 2, 3, 192, 4097])
def test_quantile_is_that_of_torch(elements):
    """To the bit before torch 2.14, which rounds the rank otherwise: by 2^-23 of it, of values that lie within 8."""
    rank_error = 0.0 if TORCH < (2, 14) else 8 * (elements + 1) * 2.0**-23
    quantile = importlib.import_module("dd_kernels.ops.reverse_step.threshold").quantile
    values = torch.randn(3, elements)
    for ratio in (0.0, 0.3, 0.5, 0.8, 0.995, 1.0):
        torch.testing.assert_close(
            quantile(values, ratio), torch.quantile(values, ratio, dim=1), rtol=0, atol=rank_error
        )
    values[1, 0] = float("nan")
    torch.testing.assert_close(
        quantile(values, 0.8), torch.quantile(values, 0.8, dim=1), equal_nan=True, rtol=0, atol=rank_error
    )


def test_threshold_of_more_elements_than_torch_quantile_takes():
    quantile = importlib.import_module("dd_kernels.ops.reverse_step.threshold").quantile
    assert quantile(torch.ones(1, 2**24 + 1), 0.995).equal(torch.ones(1))


@pytest.mark.parametrize("name", ["ddpm", "ddpm, learned_range", "ddim", "ddpm, dynamic threshold"])
def test_compiles_in_one_graph(name):
    table = TABLES[name]
    x, out = tensors(table, (2, 3, 5, 5))
    run = lambda x, out: dd.reverse_step(x * 2, out, table, 3, seed=4) + 1  # noqa: E731
    assert torch.compile(run, fullgraph=True, backend="aot_eager")(x, out).equal(run(x, out))
