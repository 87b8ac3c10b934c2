"""group_norm_silu among PyTorch's ops: autograd, tracing, autocast, threads, what it writes, and what it refuses."""

import pytest
import torch
from budget import DTYPES, sentinels_survive, within_sentinels
from group_norm_cases import NAMES, ROWS, call, make, op, results

import dd_kernels as dd
from dd_kernels.ops.activation import Activation


@pytest.mark.parametrize("channels_last", [0, 1])
def test_only_the_gradients_that_are_wanted(kernel, channels_last):
    row = (1, 1, 1, 1, 1, 1, channels_last)
    x, dy, options, activation = make((2, 8, 5, 6), torch.float32, row, device=kernel.device)
    everything = results(x, dy, 4, options, activation, kernel.name)
    for name in NAMES:
        leaf = options[name].clone().requires_grad_()
        y = dd.group_norm_silu(x, 4, activation=activation, backend=kernel.name, **{**options, name: leaf})
        assert torch.autograd.grad(y, leaf, dy)[0].equal(everything[f"d{name}"])
    x.requires_grad_()
    y = dd.group_norm_silu(x, 4, activation=activation, backend=kernel.name, **options)
    assert torch.autograd.grad(y, x, dy)[0].equal(everything["dx"])


@pytest.mark.parametrize("channels_last", [0, 1])
@pytest.mark.parametrize("samples", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_on_any_number_of_threads(kernel, dtype, samples, channels_last):
    """The work is divided in both ways: by samples or groups, and by parts of them."""
    size = 50 if kernel.name == "cpu" else 6
    for groups in (1, 4):
        shape, row = (samples, 12, size, size), (1, 1, 1, 1, 1, 1, channels_last)
        x, dy, options, activation = make(shape, dtype, row, device=kernel.device)
        before = torch.get_num_threads()
        runs = []
        try:
            for threads in (1, 2, 5, 2):
                torch.set_num_threads(threads)
                runs.append(results(x, dy, groups, options, activation, kernel.name))
        finally:
            torch.set_num_threads(before)
        assert all(other[name].equal(value) for other in runs[1:] for name, value in runs[0].items())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pixels", [1, 7, 35])
def test_writes_all_of_its_outputs_and_nothing_else(kernel, pixels, dtype):
    shape, device = (2, 6, pixels), kernel.device
    x, dy = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    weight, bias, *rows = (torch.randn(s, device=device) for s in ((6,), (6,), (2, 6), (2, 6), (2, 6)))
    y, dx = within_sentinels(shape, dtype, device), within_sentinels(shape, dtype, device)
    mean, rstd = (within_sentinels((2, 3), torch.float32, device) for _ in range(2))
    small = [within_sentinels(tuple(v.shape), torch.float32, device) for v in (weight, bias, *rows)]
    workspaces = op.forward_workspace(kernel.name, y, 3), op.backward_workspace(kernel.name, dy)
    partials = [None if v is None else within_sentinels(tuple(v.shape), v.dtype, device) for v in workspaces]
    options = dict(zip(NAMES, (weight, bias, *rows), strict=True))
    arguments = call(x, 3, options)
    op.run(kernel.name, arguments, y, mean, rstd, partials[0])
    op.run_backward(kernel.name, dy, arguments, (mean, rstd), (dx, *small), partials[1])
    for output in (y, dx, mean, rstd, *small):
        assert not output.isnan().any()
        assert sentinels_survive(output)
    assert all(v is None or sentinels_survive(v) for v in partials)
    wanted = results(x, dy, 3, options, "silu", kernel.name)
    assert all(wanted[name].equal(v) for name, v in zip(wanted, (y, dx, *small), strict=True))


def operators(name, device):
    """The arguments of the forward and of the backward operator, all of them there."""
    x, dy, options, _ = make((2, 8, 5, 6), torch.float32, ROWS[0], device=device)
    given_ = call(x, 4, options)
    mean, rstd = torch.zeros(2, 4, device=device), torch.ones(2, 4, device=device)
    forward = (*given_[:9], torch.empty_like(x), mean, rstd, op.forward_workspace(name, x, 4))
    small = [torch.empty_like(options[name]) for name in NAMES]
    gradients = (torch.empty_like(x), *small, op.backward_workspace(name, dy))
    return forward, (dy, x, mean, rstd, *given_[1:9], *gradients)


def test_opcheck(kernel):
    if kernel.name not in ("cpu", "cuda"):
        pytest.skip("Triton's kernels stand behind no operator")
    forward, backward = operators(kernel.name, kernel.device)
    torch.library.opcheck(torch.ops.dd_kernels.group_norm_silu.default, forward)
    torch.library.opcheck(torch.ops.dd_kernels.group_norm_silu_backward.default, backward)


def test_compiles_in_one_graph(kernel):
    if kernel.name not in ("cpu", "cuda"):
        pytest.skip("the interpreter runs Python, which a graph cannot hold")
    x, dy, options, activation = make((2, 8, 5, 6), torch.float32, ROWS[0], device=kernel.device)

    def compute(x, options):
        return dd.group_norm_silu(x * 2, 4, activation=activation, backend=kernel.name, **options) + 1

    torch._dynamo.reset()
    compiled = torch.compile(compute, fullgraph=True, backend="aot_eager")
    wanted = []
    for function in (compute, compiled):
        leaves = [v.clone().requires_grad_() for v in (x, *options.values())]
        y = function(leaves[0], dict(zip(options, leaves[1:], strict=True)))
        wanted.append([y.detach(), *torch.autograd.grad(y, leaves, dy)])
    assert all(a.equal(b) for a, b in zip(*wanted, strict=True))


UPSTREAM = {
    "as the result": lambda y, dy: (y * dy).sum(),
    "channels_last": lambda y, dy: (y * dy.contiguous(memory_format=torch.channels_last)).sum(),
    "one value": lambda y, dy: y.sum(),
    "transposed": lambda y, dy: (y.transpose(2, 3) * dy.transpose(2, 3).contiguous()).sum(),
}


@pytest.mark.parametrize("upstream", UPSTREAM)
def test_a_traced_gradient_comes_in_any_layout(kernel, upstream):
    """The graph is captured before it is known in which order its gradient comes."""
    if kernel.name not in ("cpu", "cuda"):
        pytest.skip("the interpreter runs Python, which a graph cannot hold")
    x, dy, options, activation = make((2, 8, 5, 6), torch.float32, ROWS[0], device=kernel.device)

    def compute(x):
        return dd.group_norm_silu(x * 2, 4, activation=activation, backend=kernel.name, **options)

    torch._dynamo.reset()
    wanted = []
    for function in (compute, torch.compile(compute, fullgraph=True, backend="eager")):
        leaf = x.clone().requires_grad_()
        wanted.append(torch.autograd.grad(UPSTREAM[upstream](function(leaf), dy), leaf)[0])
    assert wanted[0].equal(wanted[1])


def test_under_autocast(kernel):
    x, dy, options, activation = make((2, 8, 5, 6), torch.float32, ROWS[0], device=kernel.device)
    plain = results(x, dy, 4, options, activation, kernel.name)
    with torch.autocast(kernel.device, torch.bfloat16):
        actual = results(x, dy, 4, options, activation, kernel.name)
    assert all(actual[name].equal(v) for name, v in plain.items())


def penalty_gradients(x, options, dtype, activation, backend, **more):
    """Gradients of a penalty on the gradients of every input, in which scale is a function of x."""
    leaves = [v.detach().to(dtype).requires_grad_() for v in (x, *options.values())]
    small = dict(zip(options, leaves[1:], strict=True))
    small["scale"] = small["scale"] * leaves[0].mean((2, 3))
    more = {name: v.to(dtype) for name, v in more.items()}
    y = dd.group_norm_silu(leaves[0], 4, activation=activation, backend=backend, **small, **more)
    y = y if isinstance(y, torch.Tensor) else y[0] + y[1].square()
    first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
    return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)]


@pytest.mark.parametrize("activation", [activation.name.lower() for activation in Activation])
def test_second_derivatives(kernel, activation):
    x, residual, options, _ = make((2, 8, 5, 6), torch.float32, ROWS[0], device=kernel.device)
    for more in ({}, {"residual": residual}):
        exact = penalty_gradients(x, options, torch.float64, activation, "reference", **more)
        actual = penalty_gradients(x, options, torch.float32, activation, kernel.name, **more)
        for g, e in zip(actual, exact, strict=True):
            assert (g - e).abs().max() <= 1e-5 * e.abs().max()


def test_in_place_change_of_a_saved_input_is_noticed(kernel):
    x = torch.randn(2, 4, 3, device=kernel.device)
    weight = torch.ones(4, device=kernel.device, requires_grad=True)
    y = dd.group_norm_silu(x, 2, weight, backend=kernel.name)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


X = torch.zeros(2, 8, 3, 3)


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (TypeError, r"x must be a torch\.Tensor; got list", ([1.0], 1), {}),
        (TypeError, r"x must be float32, .* got torch\.int64", (X.long(), 1), {}),
        (ValueError, r"x must be \[N, C, \.\.\.\]; got \[8\]", (X[0, :, 0, 0], 1), {}),
        (ValueError, "num_groups must divide the 8 channels of x; got 3", (X, 3), {}),
        (ValueError, "num_groups must divide the 8 channels of x; got 0", (X, 0), {}),
        (ValueError, "eps must be at least 0; got -1", (X, 2), {"eps": -1.0}),
        (ValueError, "eps must be at least 0; got nan", (X, 2), {"eps": float("nan")}),
        (
            ValueError,
            "activation must be one of 'none', 'silu', .*; got 'relu'",
            (X, 2),
            {"activation": "relu"},
        ),
        (ValueError, r"weight must have the shape \[8\]; got \[4\]", (X, 2, torch.ones(4)), {}),
        (ValueError, r"bias must have the shape \[8\]; got \[2, 8\]", (X, 2, None, torch.ones(2, 8)), {}),
        (TypeError, "bias must be a torch.Tensor; got float", (X, 2, None, 1.0), {}),
        (ValueError, r"pre_shift must have the shape \[2, 8\]; got \[8\]", (X, 2), {"pre_shift": torch.ones(8)}),
        (ValueError, r"scale must have the shape \[2, 8\]; got \[1, 8\]", (X, 2), {"scale": torch.ones(1, 8)}),
        (TypeError, r"shift must be float32, .* got torch\.int32", (X, 2), {"shift": torch.ones(2, 8).int()}),
        (ValueError, "shift must be on cpu; got meta", (X, 2), {"shift": torch.ones(2, 8, device="meta")}),
        (ValueError, "backend must be one of auto, .* got 'fast'", (X, 2), {"backend": "fast"}),
    ],
)
def test_bad_input(error, message, arguments, options):
    with pytest.raises(error, match=message):
        dd.group_norm_silu(*arguments, **options)


def test_float64_is_the_references(kernel):
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    assert dd.group_norm_silu(x, 2).dtype == torch.float64
    with pytest.raises(dd.BackendUnavailableError, match="an input is float64"):
        dd.group_norm_silu(x.to(kernel.device), 2, backend=kernel.name)
