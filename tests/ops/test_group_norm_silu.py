"""group_norm_silu and its gradients against float64, for every layout, dtype and option."""

import importlib

import pytest
import torch
from budget import DTYPES, assert_within_budget, sentinels_survive, within_sentinels
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dd_kernels as dd

run = importlib.import_module("dd_kernels.ops.group_norm_silu.kernels").run
NAMES = ("weight", "bias", "pre_shift", "scale", "shift")
# Presence of weight, bias, pre_shift, scale and shift, SiLU, channels_last: every pair of choices is in some row.
ROWS = (
    (1, 1, 1, 1, 1, 1, 1),
    (0, 1, 0, 1, 0, 1, 0),
    (1, 0, 0, 1, 1, 0, 0),
    (0, 0, 1, 1, 0, 0, 1),
    (1, 1, 1, 0, 0, 0, 0),
    (0, 1, 0, 0, 1, 0, 1),
    (1, 0, 0, 0, 0, 1, 1),
    (0, 0, 1, 0, 1, 1, 0),
)
# 1, 3, 10, 12 and 40 channels per group; one pixel, fewer than a vector, odd, several pieces.
SHAPES = [
    ((2, 12, 5, 5), 4),
    ((3, 40, 4, 4), 4),
    ((2, 9, 3, 11), 9),
    ((2, 24, 1, 7), 2),
    ((2, 40, 33), 1),
    ((3, 20), 2),
    ((2, 80, 1, 1), 8),
    ((1, 4, 50, 70), 2),
]


def make(shape, dtype, row, seed=0, mean=0.5):
    """x, dy, the options present in ``row`` and the activation."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(size, generator=generator)

    x, dy = (mean + 2 * draw(*shape)).to(dtype), draw(*shape).to(dtype)
    if row[6] and x.ndim == 4:
        x, dy = (v.contiguous(memory_format=torch.channels_last) for v in (x, dy))
    sizes = (shape[1:2],) * 2 + (shape[:2],) * 3
    options = {name: draw(*size) for name, size, there in zip(NAMES, sizes, row, strict=False) if there}
    return x, dy, options, "silu" if row[5] else "none"


def results(x, dy, groups, options, activation, backend, eps=1e-5):
    """y and the gradients of x and of each option, by name."""
    leaves = {name: v.detach().requires_grad_() for name, v in {"x": x, **options}.items()}
    small = {name: leaves[name] for name in options}
    y = dd.group_norm_silu(leaves["x"], groups, eps=eps, activation=activation, backend=backend, **small)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach(), **{f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}}


def check(kernel, x, dy, groups, options, activation):
    """Everything against float64; y and dx keep the layout."""
    x, dy = x.to(kernel.device), dy.to(kernel.device)
    options = {name: v.to(kernel.device) for name, v in options.items()}
    wide = {name: v.double() for name, v in options.items()}
    exact = results(x.double(), dy.double(), groups, wide, activation, "reference")
    plain = results(x, dy, groups, options, activation, "reference")
    actual = results(x, dy, groups, options, activation, kernel.name)
    # The interpreter has no fma: it rounds each product that the compiled kernel, and plain PyTorch, add unrounded.
    rounds_more = kernel.truncates(x.dtype) or kernel.interpreted
    for name in ("y", "dx"):
        assert_within_budget(actual[name], exact[name], plain[name], truncated=rounds_more)
        if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
            assert actual[name].stride() == x.stride()
    assert_sums_within_budget(actual, exact, plain, [f"d{name}" for name in options])


def assert_sums_within_budget(actual, exact, plain, names):
    """The same budget for gradients that are sums, as one set: each alone has too few elements for a fair maximum."""
    if not names or actual["y"].numel() == 0:
        return
    scale = {name: exact[name].abs().max() for name in names}
    error, plain_error = (
        max((r[n].double() - exact[n]).abs().max() / scale[n] for n in names) for r in (actual, plain)
    )
    assert error <= 2 * plain_error + 2 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_forward_and_backward(kernel, shape, groups, dtype):
    for seed, row in enumerate(ROWS):
        x, dy, options, activation = make(shape, dtype, row, seed)
        check(kernel, x, dy, groups, options, activation)


@pytest.mark.parametrize("channels_last", [0, 1])
def test_empty_batch(kernel, channels_last):
    """Its sums are zeros; y and dx have nothing to hold."""
    x, dy, options, activation = make((0, 8, 4, 4), torch.float32, (1, 1, 1, 1, 1, 1, channels_last))
    x, dy = x.to(kernel.device), dy.to(kernel.device)
    options = {name: v.to(kernel.device) for name, v in options.items()}
    actual = results(x, dy, 4, options, activation, kernel.name)
    for name, v in {"y": x, "dx": x, **{f"d{name}": v for name, v in options.items()}}.items():
        assert actual[name].equal(torch.zeros_like(v))


@pytest.mark.parametrize("channels_last", [0, 1])
@pytest.mark.parametrize("offset", [1e3, 1e4])
def test_large_mean(kernel, offset, channels_last):
    """The deviation survives a mean far above it, where E[x^2] - mean^2 in float32 would not."""
    x, _, _, _ = make((2, 12, 9, 11), torch.float32, (0,) * 6 + (channels_last,), mean=offset)
    x = x.to(kernel.device)
    exact = dd.group_norm_silu(x.double(), 3)
    actual = dd.group_norm_silu(x, 3, backend=kernel.name)
    # The input itself is exact, so only the statistics and the arithmetic on x - mean round.
    assert (actual.double() - exact).abs().max() <= offset * torch.finfo(torch.float32).eps


def test_a_first_value_far_from_the_rest(kernel):
    """Statistics must not hang on a shift read from the data."""
    for channels_last in (0, 1):
        x, dy, options, activation = make((2, 8, 12, 12), torch.float32, (1, 1, 0, 0, 0, 0, channels_last))
        x[:, ::2, 0, 0] = 1e4
        check(kernel, x, dy, 4, options, activation)


def test_large_groups_keep_their_accuracy(kernel):
    if kernel.name != "cpu":
        pytest.skip("too slow for an interpreter; each kernel's long sums are tested where it runs")
    for channels_last in (0, 1):
        x, dy, options, activation = make((1, 4, 700, 400), torch.float32, (1, 1, 0, 0, 0, 1, channels_last))
        check(kernel, x, dy, 1, options, activation)


@pytest.mark.parametrize("mean_of", ["x", "pre_shift"])
def test_statistics_are_of_the_shifted_input(kernel, mean_of):
    for row in ((0, 0, 1, 0, 0, 0, 0), (0, 0, 1, 0, 0, 0, 1)):
        x, _, options, _ = make((2, 12, 6, 5), torch.float32, row)
        x, shift = x.to(kernel.device), options["pre_shift"].to(kernel.device) * (1 if mean_of == "x" else 50)
        y, mean, rstd = (v.to(kernel.device) for v in (torch.empty_like(x), torch.empty(2, 3), torch.empty(2, 3)))
        run(kernel.name, "group_norm_silu", (x, 3, None, None, 0.5, shift, None, None, False, y, mean, rstd))
        h = (x.double() + shift.double()[:, :, None, None]).contiguous().view(2, 3, -1)
        torch.testing.assert_close(mean.double(), h.mean(2), rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(rstd.double(), (h.var(2, unbiased=False) + 0.5).rsqrt(), rtol=2e-6, atol=0)


def test_any_strides(kernel):
    base = torch.randn(4, 12, 9, 10, generator=torch.Generator().manual_seed(0))
    views = [
        base[::2, 4:],
        base.mT,
        base.flip(0),
        base[:, :, ::2],
        base[:, :8].permute(0, 2, 1, 3),
        base[1:2, :, :1, :1],
    ]
    for x in views:
        groups = x.shape[1] // 2 if x.shape[1] % 2 == 0 else x.shape[1]
        _, dy, options, _ = make(tuple(x.shape), x.dtype, ROWS[0], seed=1)
        check(kernel, x, dy, groups, options, "silu")
        check(kernel, x, dy.mT.contiguous().mT, groups, options, "silu")
    expanded = torch.randn(2, 1, 5, 5).expand(2, 6, 5, 5)
    x, _, _, _ = make((2, 6, 5, 5), torch.float32, (0,) * 7)
    check(kernel, x, expanded, 2, {}, "silu")


def test_options_of_any_dtype_and_strides(kernel):
    x, dy, options, activation = make((3, 8, 5, 6), torch.bfloat16, ROWS[0])
    options = {name: v.bfloat16() for name, v in options.items()}
    options["scale"] = options["scale"].T.contiguous().T
    actual = results(
        *(v.to(kernel.device) for v in (x, dy)),
        4,
        {k: v.to(kernel.device) for k, v in options.items()},
        activation,
        kernel.name,
    )
    exact = results(x.double(), dy.double(), 4, {k: v.double() for k, v in options.items()}, activation, "reference")
    for name, v in actual.items():
        assert v.dtype == torch.bfloat16
        assert (v.cpu().double() - exact[name]).abs().max() <= exact[name].abs().max() * 2**-7


@pytest.mark.parametrize("channels_last", [0, 1])
def test_only_the_gradients_that_are_wanted(kernel, channels_last):
    x, dy, options, activation = make((2, 8, 5, 6), torch.float32, (1, 1, 1, 1, 1, 1, channels_last))
    x, dy = x.to(kernel.device), dy.to(kernel.device)
    options = {name: v.to(kernel.device) for name, v in options.items()}
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
def test_same_bits_on_any_number_of_threads(kernel, samples, channels_last):
    """Both ways of dividing the work: by samples or groups, and by pieces of them."""
    size = 50 if kernel.name == "cpu" else 6
    for groups in (1, 4):
        case = make((samples, 12, size, size), torch.float32, (1, 1, 1, 1, 1, 1, channels_last))
        x, dy, options, activation = case[0].to(kernel.device), case[1].to(kernel.device), case[2], case[3]
        options = {name: v.to(kernel.device) for name, v in options.items()}
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
    options = (3, weight, bias, 1e-5, *rows, True)
    y, dx = within_sentinels(shape, dtype, device), within_sentinels(shape, dtype, device)
    mean, rstd = (within_sentinels((2, 3), torch.float32, device) for _ in range(2))
    small = [within_sentinels(tuple(v.shape), torch.float32, device) for v in (weight, bias, *rows)]
    run(kernel.name, "group_norm_silu", (x, *options, y, mean, rstd))
    run(kernel.name, "group_norm_silu_backward", (dy, x, mean, rstd, *options, dx, *small))
    for output in (y, dx, mean, rstd, *small):
        assert not output.isnan().any()
        assert sentinels_survive(output)
    wanted = results(x, dy, 3, dict(zip(NAMES, (weight, bias, *rows), strict=True)), "silu", kernel.name)
    assert all(wanted[name].equal(v) for name, v in zip(wanted, (y, dx, *small), strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("channels_last", [0, 1])
def test_nan_and_inf_stay_in_their_group(kernel, channels_last, value):
    x, dy, options, activation = make((2, 12, 5, 5), torch.float32, (1, 1, 0, 0, 1, 1, channels_last))
    x[1, 4, 2, 3] = value
    actual, plain = (
        results(
            x.to(kernel.device),
            dy.to(kernel.device),
            4,
            {k: v.to(kernel.device) for k, v in options.items()},
            activation,
            name,
        )
        for name in (kernel.name, "reference")
    )
    for name in ("y", "dx", "dshift"):
        assert actual[name].isnan().equal(plain[name].isnan())
    x, dy, options, activation = make((2, 12, 5, 5), torch.float32, (1, 1, 0, 0, 1, 1, channels_last))
    options["shift"][0, 5] = value
    actual, plain = (
        dd.group_norm_silu(x.to(kernel.device), 4, backend=name, **{k: v.to(kernel.device) for k, v in options.items()})
        for name in (kernel.name, "reference")
    )
    torch.testing.assert_close(actual, plain, equal_nan=True)


def test_silu_far_from_zero(kernel):
    """silu(z) -> 0 and z, silu'(z) -> 0 and 1, with nothing in between that is not finite."""
    shift = torch.tensor([[-3e38, -1e30, -104.0, -89.0, -88.0, -40.0, 0.0, 40.0, 88.0, 104.0, 1e30, 3e38]])
    x = torch.zeros(1, 12, 2, 2)
    shift, x = shift.to(kernel.device), x.to(kernel.device)
    actual, plain = (
        results(x, torch.ones_like(x), 12, {"shift": shift}, "silu", b) for b in (kernel.name, "reference")
    )
    for name in ("y", "dshift"):
        torch.testing.assert_close(actual[name], plain[name], rtol=1e-5, atol=1e-36)


@pytest.mark.parametrize("shape", [(7, 9), (7, 9, 3), (7, 9, 3, 1)])
def test_constant_shifted_input_leaves_nothing(kernel, shape):
    """A group of one value twice is its own mean, however x + pre_shift rounds; 1 / sqrt(eps) would show the rest."""
    if kernel.name != "cpu":
        pytest.skip("only the CPU's kernel carries the mean in double")
    shift = torch.randn(shape[:2], generator=torch.Generator().manual_seed(0))
    x = torch.randn((*shape[:2], *(1 for _ in shape[2:])), generator=torch.Generator().manual_seed(1)).expand(shape)
    y = dd.group_norm_silu(x, 9, pre_shift=shift, activation="none", backend=kernel.name)
    assert y.abs().max() <= 1e-9 * 1e-5**-0.5


def test_constant_input(kernel):
    x = torch.full((2, 8, 5, 5), 3.7, device=kernel.device)
    bias = torch.arange(8.0, device=kernel.device)
    y = dd.group_norm_silu(x, 4, None, bias, activation="none", backend=kernel.name)
    assert (y - bias[:, None, None]).abs().max() <= 3.7 * 2**-23 * 1e-5**-0.5


def arguments(device):
    x, dy, options, _ = make((2, 8, 5, 6), torch.float32, ROWS[0])
    x, dy, small = x.to(device), dy.to(device), [options[name].to(device) for name in NAMES]
    mean, rstd = torch.zeros(2, 4, device=device), torch.ones(2, 4, device=device)
    given_ = (4, small[0], small[1], 1e-5, *small[2:], True)
    forward = (x, *given_, torch.empty_like(x), mean, rstd)
    return forward, (dy, x, mean, rstd, *given_, torch.empty_like(x), *(torch.empty_like(v) for v in small))


def test_opcheck(kernel):
    if kernel.name not in ("cpu", "cuda"):
        pytest.skip("Triton's kernels stand behind no operator")
    forward, backward = arguments(kernel.device)
    torch.library.opcheck(torch.ops.dd_kernels.group_norm_silu.default, forward)
    torch.library.opcheck(torch.ops.dd_kernels.group_norm_silu_backward.default, backward)


def test_compiles_in_one_graph(kernel):
    if kernel.name not in ("cpu", "cuda"):
        pytest.skip("the interpreter runs Python, which a graph cannot hold")
    x, dy, options, activation = make((2, 8, 5, 6), torch.float32, ROWS[0])
    x, dy = x.to(kernel.device), dy.to(kernel.device)
    options = {name: v.to(kernel.device) for name, v in options.items()}

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


def test_under_autocast(kernel):
    x, dy, options, activation = make((2, 8, 5, 6), torch.float32, ROWS[0])
    x, dy = x.to(kernel.device), dy.to(kernel.device)
    options = {name: v.to(kernel.device) for name, v in options.items()}
    plain = results(x, dy, 4, options, activation, kernel.name)
    with torch.autocast(kernel.device, torch.bfloat16):
        actual = results(x, dy, 4, options, activation, kernel.name)
    assert all(actual[name].equal(v) for name, v in plain.items())


def test_no_second_derivative(kernel):
    x = torch.randn(2, 4, 3, device=kernel.device, requires_grad=True)
    y = dd.group_norm_silu(x, 2, backend=kernel.name)
    (dx,) = torch.autograd.grad((y * y).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


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
        (
            ValueError,
            r"x must have at least one element per sample; got the shape \[2, 8, 0, 3\]",
            (X[:, :, :0], 2),
            {},
        ),
        (ValueError, "eps must be at least 0; got -1", (X, 2), {"eps": -1.0}),
        (ValueError, "eps must be at least 0; got nan", (X, 2), {"eps": float("nan")}),
        (ValueError, "activation must be 'silu' or 'none'; got 'relu'", (X, 2), {"activation": "relu"}),
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


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_and_options(kernel, data):
    width, groups = data.draw(st.integers(1, 13)), data.draw(st.integers(1, 5))
    # Samples enough that plain PyTorch's largest error is not small by luck.
    samples, spatial = data.draw(st.integers(24, 26)), data.draw(st.lists(st.integers(1, 5), max_size=3))
    row = data.draw(st.tuples(*[st.integers(0, 1)] * 7))
    dtype = data.draw(st.sampled_from(DTYPES))
    x, _, options, activation = make((samples, width * groups, *spatial), dtype, row, data.draw(st.integers(0, 99)))
    x, options = x.to(kernel.device), {name: v.to(kernel.device) for name, v in options.items()}
    exact = dd.group_norm_silu(
        x.double(), groups, activation=activation, **{name: v.double() for name, v in options.items()}
    )
    plain, actual = (
        dd.group_norm_silu(x, groups, activation=activation, backend=name, **options)
        for name in ("reference", kernel.name)
    )
    assert_within_budget(actual, exact, plain, truncated=kernel.truncates(dtype))
