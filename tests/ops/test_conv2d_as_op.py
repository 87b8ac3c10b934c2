"""conv2d among PyTorch's ops: choice of the method, derivatives, tracing, threads, what it writes and refuses."""

import pytest
import torch
import torch.nn.functional as F
from bounds import assert_within, unit
from budget import sentinels_survive, within_sentinels
from conv2d_cases import SAME, Training, bound
from guard_page import guard_page

import dd_kernels as dd
from dd_kernels.ops.activation import Activation
from dd_kernels.ops.conv2d import conv2d, op
from dd_kernels.ops.conv2d.op import Method

METHODS = [Method.DIRECT, Method.WINOGRAD2, Method.WINOGRAD4]
FORWARD, GRADIENT = torch.ops.dd_kernels.conv2d, torch.ops.dd_kernels.conv2d_weight_gradient


@pytest.fixture(autouse=True)
def _on_a_cpu(kernel):
    if kernel.name != "cpu":
        pytest.skip("conv2d has kernels for the CPU alone")


def run(x, weight, method):
    return op.forward(x, weight, None, None, None, 0, None, 1, SAME, method)


def method_that_ran(x, weight, method):
    y = run(x, weight, method)
    return [other for other in METHODS if run(x, weight, other).equal(y)]


def test_the_cost_model_chooses():
    wide = torch.randn(4, 64, 16, 16), torch.randn(64, 64, 3, 3)
    assert method_that_ran(*wide, Method.FASTEST) == [Method.WINOGRAD4]
    assert method_that_ran(*wide, Method.ACCURATE) == [Method.WINOGRAD2]
    pixel = torch.randn(1, 64, 1, 1), torch.randn(64, 64, 3, 3)
    assert method_that_ran(*pixel, Method.FASTEST) == [Method.DIRECT]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bfloat16", [False, True])
def test_kept_filters(kernel, method, bfloat16):
    """The second call reads what the first packed, and packs anew where the weights or the way of packing differ."""
    x, weight = op.channels_last(torch.randn(1, 20, 9, 8)), torch.randn(40, 20, 3, 3)

    def call(weight, kept=None, turned=False):
        y = op.channels_last(torch.empty(1, 40, 9, 8))
        FORWARD(x, weight, None, None, None, 0, None, 1, 1, 1, turned, method, bfloat16, y, kept)
        return y

    size = torch.ops.dd_kernels.conv2d_kept_size(x, weight, 1, 1, 1, False, method, bfloat16, call(weight))
    wide = torch.ops.dd_kernels.conv2d_kept_size(x, weight, 1, 1, 1, False, method, False, call(weight))
    halved = bfloat16 and kernel.isa == "avx512" and torch.cpu._is_avx512_bf16_supported()
    assert size - 64 == (wide - 64) // (1 + halved)  # after the header
    kept = within_sentinels((size,), torch.float32, "cpu")
    assert call(weight, kept).equal(call(weight))
    assert sentinels_survive(kept)
    kept[64:] += 1  # changes the packed filters after the header, which the next call reads
    assert not call(weight, kept).equal(call(weight))
    for other, turned in ((weight * 2, False), (weight.transpose(0, 1).contiguous(), True), (weight, False)):
        assert call(other, kept, turned).equal(call(other, None, turned))
    with pytest.raises(RuntimeError, match=f"conv2d: kept must have {size} elements; got {size - 1}"):
        call(weight, kept[1:])
    with pytest.raises(RuntimeError, match="conv2d: kept must be float32"):
        call(weight, kept.double())
    memory = torch.zeros(size + weight.numel())
    with pytest.raises(RuntimeError, match="conv2d: kept must be apart from weight"):
        call(memory[: weight.numel()].view_as(weight), memory[8 : size + 8])


def test_many_tiles_keep_nothing():
    for method, side in ((Method.WINOGRAD4, 64), (Method.WINOGRAD2, 32), (Method.DIRECT, 24)):
        x = op.channels_last(torch.randn(1, 16, side + 2, side + 2))
        few = op.channels_last(torch.randn(1, 16, side, side))
        weight = torch.randn(16, 16, 3, 3)
        assert torch.ops.dd_kernels.conv2d_kept_size(x, weight, 1, 1, 1, False, method, False, x) == 0
        assert torch.ops.dd_kernels.conv2d_kept_size(few, weight, 1, 1, 1, False, method, False, few) > 0


def test_accuracy_names_the_method():
    x, weight = torch.randn(4, 64, 16, 16), torch.randn(64, 64, 3, 3)
    assert conv2d(x, weight, padding=1).equal(run(x, weight, Method.WINOGRAD4))
    assert conv2d(x, weight, padding=1, accuracy="high").equal(run(x, weight, Method.WINOGRAD2))
    small = [op.forward(x, weight, None, None, None, 0, None, 1, SAME, method, True) for method in METHODS]
    assert conv2d(x, weight, padding=1, products="bfloat16").equal(small[1])
    assert conv2d(x, weight, padding=1, products="bfloat16", accuracy="fast").equal(small[2])
    x.requires_grad_()
    assert conv2d(x, weight, padding=1, products="bfloat16").equal(small[1])


@pytest.mark.parametrize("method", METHODS)
def test_same_bits_on_any_number_of_threads(method):
    x, weight, dy = torch.randn(3, 70, 17, 18), torch.randn(40, 70, 3, 3), torch.randn(3, 40, 17, 18)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            runs.append([run(x, weight, method), op.input_gradient(dy, x, weight, 1, SAME, method)])
            runs[-1].append(op.weight_gradient(dy, x, weight, 1, SAME, method))
    finally:
        torch.set_num_threads(before)
    assert all(a.equal(b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


def leaves(*tensors):
    return [v.detach().clone().requires_grad_() for v in tensors]


@pytest.mark.parametrize(
    ("size", "stride", "padding"), [(3, 1, SAME), (3, 2, (0, 1, 0, 1)), (1, 1, (0, 0, 0, 0)), (5, 1, (1, 0, 3, 2))]
)
def test_gradients(size, stride, padding, kernel):
    """The result and its gradients through the public function, with prologue and residual."""
    x, weight, bias = torch.randn(2, 20, 9, 8), torch.randn(18, 20, size, size), torch.randn(18)
    scale, shift = torch.randn(2, 20), torch.randn(2, 20)
    residual = torch.randn(2, 18, *op.out_size(x, weight, stride, padding))
    tensors, dy = (x, weight, bias, scale, shift, residual), torch.linspace(-1, 1, residual.numel()).view_as(residual)
    found = []
    for dtype, backend in ((torch.float64, "reference"), (torch.float32, "cpu")):
        given = leaves(*(v.to(dtype) for v in tensors))
        x_, weight_, bias_, scale_, shift_, residual_ = given
        options = {"input_scale": scale_, "input_shift": shift_, "input_activation": "mish"}
        y = conv2d(x_, weight_, bias_, stride, padding, residual=residual_, backend=backend, **options)
        found.append([y.detach(), *torch.autograd.grad(y, given, dy.to(dtype))])
    wide = tuple(v.double() for v in tensors)
    limits = Training(wide, dy.double(), stride, padding, Activation.MISH, kernel.isa).by_name()
    for exact, actual, limit in zip(*found, limits.values(), strict=True):
        assert actual.dtype == torch.float32
        assert_within(actual, exact, limit)


def test_gradients_of_a_doubled_input_are_those_of_an_up_sampled_one():
    x, weight, scale, shift = (
        torch.randn(2, 20, 5, 4),
        torch.randn(18, 20, 3, 3),
        torch.randn(2, 20),
        torch.randn(2, 20),
    )
    found = []
    for doubled in (True, False):
        x_, weight_, scale_, shift_ = given = leaves(x, weight, scale, shift)
        options = {"input_scale": scale_, "input_shift": shift_, "input_activation": "silu", "input_doubled": True}
        if not doubled:
            z = F.interpolate(F.silu(x_ * scale_[:, :, None, None] + shift_[:, :, None, None]), scale_factor=2.0)
        y = conv2d(x_, weight_, padding=1, **options) if doubled else conv2d(z, weight_, padding=1)
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), given)])
    assert all(a.equal(b) for a, b in zip(*found, strict=True))


def second_derivative(one, other, first, backend):
    """Returns the derivative by ``other`` of the squared norm of the gradient by ``one``, the image or the filters."""
    y = conv2d(*((one, other) if first == "x" else (other, one)), padding=1, backend=backend)
    (gradient,) = torch.autograd.grad(y.square().sum(), one, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), other)[0]


@pytest.mark.parametrize("first", ["x", "weight"])
def test_second_derivatives_are_torchs(first, kernel):
    """Each entry is a polynomial of x and weight, which at |x| and |weight| is the sum of its terms' magnitudes.

    A term takes two convolutions by the kernel at most, whose transforms add terms, and six sums by PyTorch: over
    the taps, the channels out and their taps, and the pixels.
    """
    x, weight = torch.randn(1, 4, 5, 6), torch.randn(3, 4, 3, 3)
    pair = (x, weight) if first == "x" else (weight, x)
    actual = second_derivative(*leaves(*pair), first, "cpu")
    exact = second_derivative(*leaves(*(v.double() for v in pair)), first, "reference")
    terms = second_derivative(*leaves(*(v.double().abs() for v in pair)), first, "reference")
    wide = x.double(), weight.double()
    by_kernel = (bound(*wide, Method.WINOGRAD4, kernel.isa) / F.conv2d(wide[0].abs(), wide[1].abs(), padding=1)).max()
    by_sums = unit(2 * (weight[0].numel() + weight[:, 0].numel() + x[:, 0].numel()) + 6, kernel.isa)
    assert ((actual.double() - exact).abs() <= (2 * by_kernel + by_sums) * terms).all()


def test_transforms_and_forward_mode_take_the_reference():
    x, weight = torch.randn(2, 4, 5, 6), torch.randn(3, 4, 3, 3)
    tangent = torch.randn_like(x)
    _, actual = torch.func.jvp(lambda v: conv2d(v, weight, padding=1), (x,), (tangent,))
    assert actual.equal(F.conv2d(tangent, weight, padding=1))
    gradient = torch.func.grad(lambda w: conv2d(x, w, padding=1).sum())(weight)
    assert gradient.equal(torch.func.grad(lambda w: F.conv2d(x, w, padding=1).sum())(weight))
    many = torch.func.vmap(lambda v: conv2d(v[None], weight, padding=1)[0])(x)
    assert many.equal(F.conv2d(x, weight, padding=1))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        found = torch.autograd.forward_ad.unpack_dual(conv2d(dual, weight, padding=1)).tangent
    assert found.equal(F.conv2d(tangent, weight, padding=1))


def channels_last_within_sentinels(shape):
    """A channels_last tensor of NaN in the middle of a storage of sentinels."""
    n, c, h, w = shape
    size = n * c * h * w
    storage = torch.full((size + 34,), 7.0)
    view = storage[17 : 17 + size].view(n, h, w, c).permute(0, 3, 1, 2)
    return view.fill_(float("nan"))


@pytest.mark.parametrize("method", METHODS)
def test_writes_all_of_its_outputs_and_nothing_else(method):
    x, weight = op.channels_last(torch.randn(2, 5, 6, 7)), torch.randn(19, 5, 3, 3)
    y = channels_last_within_sentinels((2, 19, 6, 7))
    FORWARD(x, weight, None, None, None, 0, None, 1, 1, 1, False, method, False, y)
    assert sentinels_survive(y)
    assert y.equal(run(x, weight, method))
    if method != Method.DIRECT:
        dweight = torch.full((19 * 45 + 34,), 7.0)[17:-17].view(19, 5, 3, 3).fill_(float("nan"))
        GRADIENT(y, x, 1, 1, method, dweight)
        assert sentinels_survive(dweight)
        assert not dweight.isnan().any()


@pytest.mark.parametrize("doubled", [False, True])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("method", METHODS)
def test_reads_nothing_beyond_its_inputs(method, layout, turned, doubled):
    x, weight = torch.randn(1, 5, 3, 4), torch.randn(7, 5, 3, 3)
    size = (1, 7, 6, 8) if doubled else (1, 7, 3, 4)
    if turned:
        weight = weight.transpose(0, 1).contiguous()
    weight = weight.contiguous(memory_format=layout)
    bias, scale, shift, residual = torch.randn(7), torch.randn(1, 5), torch.randn(1, 5), torch.randn(size)
    with guard_page() as at_the_end:

        def placed(v):
            strided = at_the_end(v.permute(0, 2, 3, 1).contiguous())
            return strided.permute(0, 3, 1, 2)

        w = placed(weight) if layout == torch.channels_last else at_the_end(weight)
        small = (at_the_end(bias), at_the_end(scale), at_the_end(shift))
        y = placed(torch.zeros(size))
        FORWARD(placed(x), w, *small, 1, placed(residual), 1, 1, 1, turned, method, False, y, None, doubled)
        plain = torch.empty_like(y)
        given = (op.channels_last(x), weight, bias, scale, shift, 1, op.channels_last(residual))
        FORWARD(*given, 1, 1, 1, turned, method, False, plain, None, doubled)
        assert y.equal(plain)
        del w, small, y


def test_opcheck():
    x, weight = op.channels_last(torch.randn(1, 5, 6, 7)), torch.randn(6, 5, 3, 3)
    y, dweight = op.channels_last(torch.empty(1, 6, 6, 7)), torch.empty_like(weight)
    arguments = (x, weight, torch.randn(6), None, None, 0, None, 1, 1, 1, False, 0, False, y)
    torch.library.opcheck(FORWARD.default, arguments)
    large = op.channels_last(torch.empty(1, 6, 12, 14))
    torch.library.opcheck(FORWARD.default, (*arguments[:-1], large, None, True))
    torch.library.opcheck(GRADIENT.default, (op.channels_last(torch.randn(1, 6, 6, 7)), x, 1, 1, 0, dweight))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph(dynamic):
    x, weight, bias = torch.randn(2, 8, 6, 7), torch.randn(6, 8, 3, 3), torch.randn(6)

    def compute(x, weight, bias):
        return conv2d(x * 2, weight, bias, padding=1) + 1

    torch._dynamo.reset()
    compiled = torch.compile(compute, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    found = []
    for function in (compute, compiled):
        given = leaves(x, weight, bias)
        y = function(*given)
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), given)])
    assert all(a.equal(b) for a, b in zip(*found, strict=True))
    with torch.no_grad():
        assert compiled(x, weight, bias).equal(compute(x, weight, bias))


def test_exports():
    class Layer(torch.nn.Module):
        def forward(self, x, weight):
            return conv2d(x, weight, padding=1)

    x, weight = torch.randn(2, 8, 6, 7), torch.randn(6, 8, 3, 3)
    with torch.no_grad():
        program = torch.export.export(Layer(), (x, weight))
        assert program.module()(x, weight).equal(conv2d(x, weight, padding=1))


def test_empty_batch():
    x, weight = torch.zeros(0, 4, 5, 6, requires_grad=True), torch.randn(3, 4, 3, 3, requires_grad=True)
    y = conv2d(x, weight, padding=1)
    assert y.shape == (0, 3, 5, 6)
    dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
    assert dx.shape == x.shape
    assert dweight.equal(torch.zeros_like(weight))


def test_other_devices_and_float64_are_the_references():
    x, weight = torch.randn(1, 4, 5, 6, dtype=torch.float64), torch.randn(3, 4, 3, 3, dtype=torch.float64)
    assert conv2d(x, weight).equal(F.conv2d(x, weight))
    assert conv2d(x.to("meta"), weight.to("meta")).shape == (1, 3, 3, 4)
    with pytest.raises(dd.BackendUnavailableError, match="an input is float64"):
        conv2d(x, weight, backend="cpu")


X, W = torch.zeros(2, 8, 5, 6), torch.zeros(4, 8, 3, 3)


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (TypeError, r"x must be a torch\.Tensor; got list", ([1.0], W), {}),
        (TypeError, r"weight must be float32, .* got torch\.int64", (X, W.long()), {}),
        (ValueError, r"x must be \[N, C, H, W\]; got \[8, 5, 6\]", (X[0], W), {}),
        (ValueError, r"weight must be \[K, 8, height, width\]; got \[4, 7, 3, 3\]", (X, W[:, :7]), {}),
        (TypeError, r"weight must have the dtype of x, .*bfloat16, or float32; got .*16", (X.bfloat16(), W.half()), {}),
        (ValueError, "weight must be on the device of x, cpu; got meta", (X, W.to("meta")), {}),
        (ValueError, r"bias must have the shape \[4\]; got \[8\]", (X, W, torch.zeros(8)), {}),
        (ValueError, "stride must be an int of at least 1; got 0", (X, W), {"stride": 0}),
        (ValueError, "padding must be an int, .* got -1", (X, W), {"padding": -1}),
        (ValueError, r"padding must be an int, .* got \(1, 1, 1\)", (X, W), {"padding": (1, 1, 1)}),
        (ValueError, "x must be at least as large as weight after padding", (X[:, :, :2], W), {}),
        (ValueError, "input_scale and input_shift must be given", (X, W), {"input_scale": torch.ones(2, 8)}),
        (
            ValueError,
            r"residual must have the shape \[2, 4, 3, 4\]; got \[2, 4, 5, 6\]",
            (X, W),
            {"residual": X[:, :4]},
        ),
        (ValueError, "input_doubled must be a bool; got 2", (X, W), {"input_doubled": 2}),
        (TypeError, "residual must have the dtype of x", (X, W), {"residual": torch.zeros(2, 4, 3, 4).half()}),
        (ValueError, "activation must be one of", (X, W), {"input_activation": "relu"}),
        (ValueError, "accuracy must be 'default', 'high' or 'fast'; got 'low'", (X, W), {"accuracy": "low"}),
        (ValueError, "products must be 'float32' or 'bfloat16'; got 'half'", (X, W), {"products": "half"}),
        (ValueError, "backend must be one of auto, .* got 'fast'", (X, W), {"backend": "fast"}),
    ],
)
def test_bad_input(error, message, arguments, options):
    with pytest.raises(error, match=message):
        conv2d(*arguments, **options)


def raw(**changes):
    values = {
        "x": op.channels_last(torch.zeros(2, 8, 5, 6)),
        "weight": torch.zeros(4, 8, 3, 3),
        "bias": None,
        "scale": None,
        "shift": None,
        "activation": 0,
        "residual": None,
        "stride": 1,
        "top": 1,
        "left": 1,
        "turned": False,
        "method": 0,
        "bfloat16": False,
        "y": op.channels_last(torch.zeros(2, 4, 5, 6)),
    }
    return tuple((values | changes).values())


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("x must be", {"x": torch.zeros(2, 8, 5, 6)}),
        ("x must be", {"x": torch.zeros(2, 8, 30)}),
        ("float32, bfloat16 or float16", {"x": op.channels_last(torch.zeros(2, 8, 5, 6, dtype=torch.float64))}),
        ("y must be", {"y": torch.zeros(2, 4, 5, 6)}),
        ("y must be of the dtype of x", {"y": op.channels_last(torch.zeros(2, 4, 5, 6)).half()}),
        ("y must be of the shape", {"y": op.channels_last(torch.zeros(1, 4, 5, 6))}),
        ("weight must be of the shape", {"y": op.channels_last(torch.zeros(2, 3, 5, 6))}),
        ("weight must be", {"weight": torch.zeros(4, 8, 3, 3).double()}),
        ("weight must be", {"weight": torch.zeros(8, 4, 3, 3).transpose(0, 1)}),
        ("weight must be of the shape", {"weight": torch.zeros(4, 8, 3, 3), "turned": True}),
        ("bias", {"bias": torch.zeros(3)}),
        ("bias", {"bias": torch.zeros(8)[::2]}),
        ("scale", {"scale": torch.zeros(2, 7), "shift": torch.zeros(2, 8)}),
        ("scale must be given with shift", {"scale": torch.zeros(2, 8)}),
        ("activation", {"activation": 7}),
        ("residual", {"residual": torch.zeros(2, 4, 5, 6)}),
        ("residual", {"residual": op.channels_last(torch.zeros(2, 4, 5, 5))}),
        ("stride", {"stride": 0}),
        ("method", {"method": 5}),
        ("3 x 3", {"method": 4, "stride": 2}),
    ],
)
def test_the_operator_refuses_what_would_leave_its_tensors(message, changes):
    with pytest.raises(RuntimeError, match=message):
        FORWARD(*raw(**changes))


def test_the_operators_refuse_to_write_what_they_read():
    x, weight = op.channels_last(torch.zeros(2, 8, 5, 6)), torch.zeros(8, 8, 3, 3)
    memory = torch.zeros(2 * 8 * 5 * 6 + 1000)
    y = memory[:480].view(2, 5, 6, 8).permute(0, 3, 1, 2)
    overlapping = {"x": y, "residual": y, "weight": memory[479 : 479 + 576].view(8, 8, 3, 3), "bias": memory[472:480]}
    for name, other in overlapping.items():
        with pytest.raises(RuntimeError, match="must be apart from"):
            FORWARD(*raw(**{"x": x, "weight": weight, "y": y, name: other}))
    for images in ((y, x), (x, y)):
        with pytest.raises(RuntimeError, match="must be apart from"):
            GRADIENT(*images, 1, 1, 0, overlapping["weight"])
    FORWARD(*raw(x=x, y=y, weight=memory[480 : 480 + 576].view(8, 8, 3, 3)))
