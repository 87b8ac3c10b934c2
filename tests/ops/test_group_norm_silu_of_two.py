"""group_norm_silu with a residual and with a skip: what adding and concatenating first would give."""

import pytest
import torch
from bounds import UNIT, assert_within, rounded
from budget import DTYPES
from draws import for_draws
from group_norm_cases import ACTIVATIONS, NAMES, ROWS, call, errors, make, op
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd
from unrun import unrun

import dd_kernels as dd
from dd_kernels import backend as backends

OPERATORS = ("group_norm_silu", "group_norm_silu_backward")
# x's shape, skip's channels, groups: groups of one tensor, groups that straddle both, no channels of a vector's length.
SHAPES = [
    ((2, 16, 4, 4), 16, 4),
    ((2, 16, 4, 6), 8, 2),
    ((3, 24, 2, 4), 16, 1),
    ((2, 5, 3, 3), 4, 3),
    ((4, 16, 1, 1), 16, 2),
    ((8, 6, 7), 2, 2),
    ((8, 24), 8, 4),
    ((1, 12, 24, 40), 20, 4),
]


def parts(shape, skip_channels, dtype, row, seed=0):
    """x, dy, residual, dsum, skip and the options, of which the norm's are of as many channels as it sees."""
    x, _, _, _ = make(shape, dtype, row, seed, mean=1.5)
    residual, dsum, _, _ = make(shape, dtype, row, seed + 100)
    _, _, options, activation = make((shape[0], shape[1] + skip_channels, *shape[2:]), dtype, row, seed + 200)
    _, dy, _, _ = make((shape[0], shape[1] + skip_channels, *shape[2:]), dtype, row, seed + 300)
    skip, _, _, _ = make((shape[0], skip_channels, *shape[2:]), dtype, row, seed + 400)
    return x, residual, skip if skip_channels else None, dy, dsum, options, activation


def results(x, residual, skip, dy, dsum, groups, options, activation, backend, first=None):
    """y, sum and all gradients by name; ``first`` (a dtype) adds and concatenates beforehand, in that dtype."""
    leaves = {"x": x, "residual": residual, "skip": skip, **options}
    leaves = {name: v.detach().requires_grad_() for name, v in leaves.items() if v is not None}
    small = {name: leaves[name] for name in options}
    x, residual, skip = (leaves.get(name) for name in ("x", "residual", "skip"))
    given_ = {"activation": activation, "backend": backend, **small}
    if first is None:
        out = dd.group_norm_silu(x, groups, residual=residual, skip=skip, **given_)
        y, total = out if residual is not None else (out, None)
    else:
        # The sum is rounded to x's dtype on its way to the norm, and its gradient is not.
        total = None if residual is None else x + residual + ((x + residual).to(first) - (x + residual)).detach()
        h = x if total is None else total
        y = dd.group_norm_silu(h if skip is None else torch.cat([h, skip], 1), groups, **given_)
    outputs, gradients = ([y], [dy]) if residual is None else ([y, total], [dy, dsum.to(total.dtype)])
    gradients = torch.autograd.grad(outputs, list(leaves.values()), gradients)
    named = {"y": y.detach(), **{f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}}
    return named if residual is None else {"sum": total.detach(), **named}


def check(kernel, x, residual, skip, dy, dsum, groups, options, activation):
    """Compares every result with float64 and the sum to the bit, and checks that layouts are kept."""
    x, residual, skip, dy, dsum = (v if v is None else v.to(kernel.device) for v in (x, residual, skip, dy, dsum))
    options = {name: v.to(kernel.device) for name, v in options.items()}
    tensors = (x, residual, skip, dy, dsum)
    wide = [v if v is None else v.double() for v in tensors]
    wide_options = {name: v.double() for name, v in options.items()}
    exact = results(*wide, groups, wide_options, activation, "reference", first=x.dtype)
    actual = results(*tensors, groups, options, activation, kernel.name)
    total = x if residual is None else x + residual
    joined = total if skip is None else torch.cat([total, skip], 1)
    allowed = errors(kernel, joined, dy, groups, options, activation)
    of_x, of_skip = allowed.pop("dx").split([x.shape[1], joined.shape[1] - x.shape[1]], 1)
    if residual is not None:  # autograd rounds the norm's part to x's dtype before it adds dsum
        of_x = rounded(exact["dx"] - wide[4], of_x, x.dtype, kernel.truncates(x.dtype)) + UNIT * exact["dx"].abs()
    allowed |= {"dx": of_x, "dresidual": of_x, "dskip": of_skip, "sum": torch.zeros_like(of_x)}
    for name, v in actual.items():
        assert_within(v, exact[name], allowed[name], kernel.truncates(v.dtype))
    if residual is not None:
        assert actual["sum"].equal(x + residual)
        assert actual["sum"].stride() == x.stride()
    # A skip of one channel or one pixel is in both layouts, and torch.cat then takes the contiguous one.
    formats = (torch.contiguous_format, *([torch.channels_last] if x.ndim == 4 else []))
    layouts = [layout for layout in formats if any(v.is_contiguous(memory_format=layout) for v in (x, joined))]
    assert any(actual["y"].is_contiguous(memory_format=layout) for layout in layouts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "skip_channels", "groups"), SHAPES, ids=str)
def test_forward_and_backward(kernel, shape, skip_channels, groups, dtype):
    if kernel.interpreted and dtype is torch.float16:
        pytest.skip("too slow; it has no kernel of two inputs")
    for seed, row in enumerate(ROWS[:1] if kernel.interpreted else ROWS):
        x, residual, skip, dy, dsum, options, activation = parts(shape, skip_channels, dtype, row, seed)
        check(kernel, x, None, skip, dy, dsum, groups, options, activation)
        if seed == 0:
            check(kernel, x, residual, skip, dy, dsum, groups, options, activation)
        if shape[1] % groups == 0:
            x, residual, skip, dy, dsum, options, activation = parts(shape, 0, dtype, row, seed)
            check(kernel, x, residual, None, dy, dsum, groups, options, activation)


@pytest.mark.parametrize("channels_last", [0, 1])
def test_no_gradient_is_the_same(kernel, channels_last):
    row = (1, 1, 1, 1, 1, 1, channels_last)
    x, residual, skip, dy, dsum, options, activation = parts((2, 8, 4, 6), 8, torch.bfloat16, row)
    tensors = [v.to(kernel.device) for v in (x, residual, skip, dy, dsum)]
    options = {name: v.to(kernel.device) for name, v in options.items()}
    x, residual, skip, *_ = tensors
    for one, other in ((None, skip), (residual, skip)):
        wanted = results(x, one, other, *tensors[3:], 2, options, activation, kernel.name)
        with torch.no_grad():
            out = dd.group_norm_silu(
                x, 2, residual=one, skip=other, activation=activation, backend=kernel.name, **options
            )
        y, total = (out, None) if one is None else out
        assert y.equal(wanted["y"])
        assert total is None or total.equal(wanted["sum"])


def test_only_one_result_is_used(kernel):
    """The gradient of a sum that nobody reads is none, and so is that of a y that nobody reads."""
    x, residual = (torch.randn(2, 8, 4, 4, device=kernel.device, requires_grad=True) for _ in range(2))
    y, total = dd.group_norm_silu(x, 4, residual=residual, backend=kernel.name)
    dx, dresidual = torch.autograd.grad(y.sum(), (x, residual), retain_graph=True)
    assert dx.equal(dresidual)
    assert all(g.equal(torch.ones_like(g)) for g in torch.autograd.grad(total.sum(), (x, residual)))


def assert_norm_of(kernel, x, y):
    """Compares y with the norm of x in 4 groups, in float64."""
    exact = dd.group_norm_silu(x.double(), 4, backend="reference")
    assert_within(y, exact, errors(kernel, x, x, 4, {}, "silu")["y"])


def test_other_layouts(kernel):
    """A residual or skip of other strides than those of x is copied; the result has the layout of x."""
    base = torch.randn(2, 16, 6, 8, generator=torch.Generator().manual_seed(0)).to(kernel.device)
    last = base.contiguous(memory_format=torch.channels_last)
    for x, other in ((base, last), (last, base), (base[:, ::2], last[:, ::2]), (last[:, :8], base.mT.contiguous().mT)):
        assert_norm_of(kernel, torch.cat([x, other], 1), dd.group_norm_silu(x, 4, skip=other, backend=kernel.name))
        if x.shape == other.shape:
            y, total = dd.group_norm_silu(x, 4, residual=other, backend=kernel.name)
            assert total.equal(x + other)
            assert_norm_of(kernel, x + other, y)


def test_empty_batch(kernel):
    x = torch.zeros(0, 8, 4, 4, device=kernel.device, requires_grad=True)
    y, total = dd.group_norm_silu(x, 4, residual=x, backend=kernel.name)
    both = dd.group_norm_silu(x, 4, skip=x, backend=kernel.name)
    assert y.shape == total.shape == x.shape
    assert both.shape == (0, 16, 4, 4)
    (both.sum() + y.sum() + total.sum()).backward()
    assert x.grad.shape == x.shape


def test_compiles_in_one_graph(kernel):
    if kernel.name not in ("cpu", "cuda"):
        pytest.skip("the interpreter runs Python, which a graph cannot hold")
    x, skip = torch.randn(2, 8, 4, 6, device=kernel.device), torch.randn(2, 4, 4, 6, device=kernel.device)

    def compute(x, skip):
        y, total = dd.group_norm_silu(x, 2, residual=x * 2, backend=kernel.name)
        return dd.group_norm_silu(y, 2, skip=skip, backend=kernel.name).sum() + total.square().sum()

    torch._dynamo.reset()
    wanted = []
    for function in (compute, torch.compile(compute, fullgraph=True, backend="aot_eager")):
        leaves = [v.clone().requires_grad_() for v in (x, skip)]
        wanted.append(torch.autograd.grad(function(*leaves), leaves))
    assert all(a.equal(b) for a, b in zip(*wanted, strict=True))


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_cuda_library_is_one_graph_forward_and_one_backward(dynamic, monkeypatch):
    """The graphs hold the ops' workspace, for any batch too; the ops are traced here, not run."""
    monkeypatch.setattr(backends, "choose", lambda *arguments: "cuda")
    graphs = []

    def compute(x, residual, skip, weight):
        y, total = dd.group_norm_silu(x * 2, 4, weight, residual=residual)
        return dd.group_norm_silu(y, 4, skip=skip).sum() + dd.group_norm_silu(total, 4).sum()

    torch._dynamo.reset()
    leaves = [torch.randn(s, requires_grad=True) for s in (*[(2, 8, 4, 4)] * 3, (8,))]

    def count(nodes):
        graphs.append(sum("group_norm_silu" in str((node.target, node.args)) for node in nodes if node.args))

    backend = aot_autograd(fw_compiler=unrun(count), bw_compiler=unrun(count))
    torch.compile(compute, fullgraph=True, dynamic=dynamic, backend=backend)(*leaves).backward()
    assert graphs == [3, 3]


def operators(device):
    """The arguments of the forward and of the backward operator with a residual and a skip."""
    x, residual, skip, dy, dsum, options, _ = parts((2, 8, 4, 6), 8, torch.float32, ROWS[0])
    given_ = call(x, 4, options, residual=residual, skip=skip)
    mean, rstd = torch.zeros(2, 4), torch.ones(2, 4)
    workspace = op.forward_workspace("cuda", dy, 4)
    written = (torch.empty_like(dy), mean.clone(), rstd.clone(), workspace, residual, skip, torch.empty_like(x))
    forward = (*given_[:9], *written)
    gradients = [torch.empty_like(v) for v in (x, *(options[name] for name in NAMES))]
    last = (op.backward_workspace("cuda", dy), skip, dsum, torch.empty_like(skip))
    backward = (dy, x, mean, rstd, *given_[1:9], *gradients, *last)
    return [tuple(v.to(device) if isinstance(v, torch.Tensor) else v for v in a) for a in (forward, backward)]


def test_opcheck(kernel):
    if kernel.name != "cuda":
        pytest.skip("only the CUDA library's operators take a residual and a skip")
    for name, arguments in zip(OPERATORS, operators(kernel.device), strict=True):
        torch.library.opcheck(getattr(torch.ops.dd_kernels, name).default, arguments)


X = torch.zeros(2, 8, 3, 3)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, r"residual must be a torch\.Tensor; got float", {"residual": 1.0}),
        (ValueError, r"residual must have the shape \[2, 8, 3, 3\]; got \[2, 8, 3\]", {"residual": X[..., 0]}),
        (TypeError, r"residual must have the dtype of x, torch\.float32; got torch\.float16", {"residual": X.half()}),
        (ValueError, "residual must be on cpu; got meta", {"residual": X.to("meta")}),
        (TypeError, r"skip must be a torch\.Tensor; got int", {"skip": 0}),
        (ValueError, r"skip must have the 4 dimensions of x; got \[2, 8, 3\]", {"skip": X[..., 0]}),
        (ValueError, r"skip must have the shape \[2, 4, 3, 3\]; got \[2, 4, 3, 2\]", {"skip": X[:, :4, :, :2]}),
        (TypeError, r"skip must have the dtype of x, torch\.float32; got torch\.float64", {"skip": X.double()}),
        (ValueError, "num_groups must divide the 9 channels of x and skip; got 2", {"skip": X[:, :1]}),
        (ValueError, r"weight must have the shape \[10\]; got \[8\]", {"skip": X[:, :2], "weight": torch.ones(8)}),
    ],
)
def test_bad_input(error, message, options):
    with pytest.raises(error, match=message):
        dd.group_norm_silu(X, 2, **options)


def test_float64_is_the_references(kernel):
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    y, total = dd.group_norm_silu(x, 2, residual=x)
    assert y.dtype == total.dtype == torch.float64
    with pytest.raises(dd.BackendUnavailableError, match="an input is float64"):
        dd.group_norm_silu(x.to(kernel.device), 2, skip=x.to(kernel.device), backend=kernel.name)


def test_any_shape_and_options(kernel):
    if kernel.interpreted:
        pytest.skip("it has no kernel of two inputs")

    def test(data):
        groups, channels = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 9))
        channels *= groups
        skip_channels, samples = data.draw(st.integers(0, channels - 1)), data.draw(st.integers(1, 4))
        spatial = data.draw(st.lists(st.integers(1, 5), max_size=3))
        row, dtype = data.draw(st.tuples(*[st.integers(0, 1)] * 7)), data.draw(st.sampled_from(DTYPES))
        shape, seed = (samples, channels - skip_channels, *spatial), data.draw(st.integers(0, 999))
        x, residual, skip, dy, dsum, options, _ = parts(shape, skip_channels, dtype, row, seed)
        adds = skip_channels == 0 or data.draw(st.booleans())
        activation = data.draw(st.sampled_from(ACTIVATIONS))
        check(kernel, x, residual if adds else None, skip, dy, dsum, groups, options, activation)

    for_draws(kernel, test)
