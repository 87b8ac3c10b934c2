"""conv2d and its gradients against float64, for every method, layout, dtype and option."""

import pytest
import torch
import torch.nn.functional as F
from bounds import assert_within
from conv2d_cases import SAME, TILE, bound, gradient_bound, matrices, winograd
from draws import for_draws
from hypothesis import strategies as st

from dd_kernels.ops.activation import Activation, activate
from dd_kernels.ops.conv2d import conv2d, op, reference
from dd_kernels.ops.conv2d.op import Method

METHODS = [Method.DIRECT, Method.WINOGRAD2, Method.WINOGRAD4]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
# Fewer channels than a vector, one chunk, several with a rest; odd sizes; one pixel; one row; several panels.
SHAPES = [
    (2, 3, 5, 9, 7),
    (1, 64, 64, 8, 8),
    (1, 70, 33, 4, 4),
    (3, 8, 40, 1, 1),
    (1, 130, 20, 1, 13),
    (2, 20, 16, 6, 5),
]


@pytest.fixture(autouse=True)
def _on_a_cpu(kernel):
    if kernel.name != "cpu":
        pytest.skip("conv2d has kernels for the CPU alone")


def sizes(n, c, k, h, w):
    return (n, c, h, w), (k, c, 3, 3), (n, k, h, w)


@pytest.mark.parametrize("m", [2, 4])
def test_matrices_make_a_convolution(m):
    """The matrices that the kernels and the bound are made from give a convolution in exact arithmetic."""
    x, weight = torch.randn(2, 3, 9, 7, dtype=torch.float64), torch.randn(4, 3, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(winograd(x, weight, m, SAME, False), F.conv2d(x, weight, padding=1))
    a, g, b = matrices(m)
    assert (a.shape, g.shape, b.shape) == ((m, m + 2), (m + 2, 3), (m + 2, m + 2))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(kernel, shape, method, layout):
    x_size, w_size, y_size = sizes(*shape)
    x, residual, bias = torch.randn(x_size), torch.randn(y_size), torch.randn(shape[2])
    weight = torch.randn(w_size).contiguous(memory_format=layout)
    actual = op.forward(x, weight, bias, None, None, 0, residual, 1, SAME, method)
    exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=1) + residual.double()
    added = bias.double().abs()[:, None, None] + residual.double().abs()
    assert_within(actual, exact, bound(x.double(), weight.double(), method, kernel.isa, added=added))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("activation", Activation)
def test_prologue(kernel, method, activation):
    """Zeros of the padding stay zeros, whatever the shift."""
    x, weight = torch.randn(2, 70, 7, 6), torch.randn(20, 70, 3, 3)
    scale, shift = torch.randn(2, 70), 3 * torch.randn(2, 70)
    actual = op.forward(x, weight, None, scale, shift, activation, None, 1, SAME, method)
    z = x.double() * scale.double()[:, :, None, None] + shift.double()[:, :, None, None]
    magnitude = (x * scale[:, :, None, None]).double().abs() + shift.double().abs()[:, :, None, None]
    exact = F.conv2d(activate(z, activation), weight.double(), padding=1)
    # One rounding of the affine map; activations magnify it by 1.13 at most, and are within 4e-7 of themselves or z.
    assert_within(actual, exact, bound(magnitude, weight.double(), method, kernel.isa, prologue=16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_16_bits(kernel, method, dtype):
    x, weight, residual = torch.randn(2, 75, 9, 6), torch.randn(36, 75, 3, 3) / 26, torch.randn(2, 36, 9, 6)
    x, weight, residual = (v.to(dtype) for v in (x, weight, residual))
    actual = op.forward(x, weight, None, None, None, 0, residual, 1, SAME, method)
    assert actual.dtype == dtype
    exact = F.conv2d(x.double(), weight.double(), padding=1) + residual.double()
    limit = bound(x.double(), weight.double(), method, kernel.isa, added=residual.double().abs())
    assert_within(actual, exact, limit)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 3])
def test_filters_of_16_bits_are_read_as_they_are(kernel, size, layout, method, dtype):
    """The bits of the same filters in float32, in every order in which the kernel reads them."""
    if size == 1 and method != Method.DIRECT:
        pytest.skip("Winograd's methods are for 3 x 3 filters")
    sides = (size // 2,) * 4
    for channels, outputs in ((3, 40), (64, 33), (70, 5)):
        weight = torch.randn(outputs, channels, size, size).to(dtype).contiguous(memory_format=layout)
        x = torch.randn(2, channels, 6, 5)
        y, wanted = (op.forward(x, w, None, None, None, 0, None, 1, sides, method) for w in (weight, weight.float()))
        assert y.equal(wanted)
        dx, wanted = (op.input_gradient(y, x, w, 1, sides, method) for w in (weight, weight.float()))
        assert dx.equal(wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("channels", [5, 75])
def test_products_of_bfloat16(kernel, channels, method, dtype):
    """In float32 where the processor has no others; odd numbers of channels, whose pairs straddle the taps."""
    x, weight = torch.randn(2, channels, 9, 6).to(dtype), torch.randn(36, channels, 3, 3)
    actual = op.forward(x, weight, None, None, None, 0, None, 1, SAME, method, True)
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    assert_within(actual, exact, bound(x.double(), weight.double(), method, kernel.isa, bfloat16=True))
    dx = op.input_gradient(actual, x, weight, 1, SAME, method, True)
    turned = weight.double().flip(2, 3).transpose(0, 1)
    exact = F.conv_transpose2d(actual.double(), weight.double(), padding=1)
    assert_within(dx, exact, bound(actual.double(), turned, method, kernel.isa, bfloat16=True))


@pytest.mark.parametrize("method", METHODS)
def test_root_mean_square_error_of_bfloat16(kernel, method):
    """What the docstring says; products that are not of bfloat16 would be more exact by orders of magnitude."""
    x, weight = torch.randn(2, 256, 16, 16), torch.randn(64, 256, 3, 3)
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    y = op.forward(x, weight, None, None, None, 0, None, 1, SAME, method, True)
    error = ((y.double() - exact).square().mean() / exact.square().mean()).sqrt()
    assert error < {Method.DIRECT: 3e-3, Method.WINOGRAD2: 4.5e-3, Method.WINOGRAD4: 1.3e-2}[method]
    has_bfloat16 = kernel.isa == "avx512" and torch.cpu._is_avx512_bf16_supported()
    assert (error > 1e-3) == has_bfloat16


@pytest.mark.parametrize("padding", [(0, 0, 0, 0), (0, 1, 0, 1), (1, 0, 2, 0), (2, 2, 1, 3)])
@pytest.mark.parametrize("method", METHODS)
def test_padding(kernel, method, padding):
    x, weight = torch.randn(2, 19, 8, 11), torch.randn(18, 19, 3, 3)
    actual = op.forward(x, weight, None, None, None, 0, None, 1, padding, method)
    exact = F.conv2d(F.pad(x.double(), padding), weight.double())
    assert_within(actual, exact, bound(x.double(), weight.double(), method, kernel.isa, padding))


@pytest.mark.parametrize("channels", [3, 64, 100])
@pytest.mark.parametrize(
    ("size", "stride", "padding"),
    [((1, 1), 1, 0), ((1, 1), 2, 0), ((3, 3), 2, (0, 1, 0, 1)), ((3, 3), 2, 1), ((5, 2), 1, (2, 1)), ((7, 7), 3, 3)],
)
def test_direct(kernel, size, stride, padding, channels):
    """Any kernel size and stride, through the public function, which keeps the layout of x."""
    weight = torch.randn(21, channels, *size)
    for layout in LAYOUTS:
        x = torch.randn(2, channels, 9, 10).contiguous(memory_format=layout)
        actual = conv2d(x, weight, None, stride, padding, backend="cpu")
        assert actual.is_contiguous(memory_format=layout)
        sides = (padding,) * 4 if isinstance(padding, int) else padding
        sides = (sides[1], sides[1], sides[0], sides[0]) if len(sides) == 2 else sides
        exact = F.conv2d(F.pad(x.double(), sides), weight.double(), stride=stride)
        limit = bound(x.double(), weight.double(), Method.DIRECT, kernel.isa, sides, stride)
        assert_within(actual, exact, limit)


@pytest.mark.parametrize("products", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("channels", [16, 20, 144])
@pytest.mark.parametrize("side", [1, 3, 14])
def test_pixels_are_multiplied_where_they_lie(kernel, side, channels, affine, dtype, products):
    """1 x 1 filters with nothing around have the bits of those with a row of zeros below, which packs the pixels."""
    x = torch.randn(3, channels, side, side, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(40, channels, 1, 1), torch.randn(40)
    options = {"products": products}
    if affine:
        scale, shift = torch.randn(2, 3, channels)
        options |= {"input_scale": scale, "input_shift": shift, "input_activation": "silu"}
    actual = conv2d(x, weight, bias, **options)
    padded = conv2d(x, weight, bias, padding=(0, 0, 0, 1), **options)
    assert actual.equal(padded[:, :, :-1])
    residual = torch.randn_like(actual)
    assert conv2d(x, weight, residual=residual, **options).equal(
        conv2d(x, weight, padding=(0, 0, 0, 1), residual=F.pad(residual, (0, 0, 0, 1)), **options)[:, :, :-1]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_doubled_input_has_the_bits_of_an_up_sampled_one(kernel, shape, method, dtype):
    x_size, w_size, _ = sizes(*shape)
    x, weight = torch.randn(x_size, dtype=dtype), torch.randn(w_size)
    large = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    for padding in (SAME, (1, 2, 2, 1), (0, 1, 0, 3), (4, 3, 1, 0)):
        for before in ((None, None, 0), (*torch.randn(2, *x_size[:2]), Activation.SILU)):
            actual = op.forward(x, weight, None, *before, None, 1, padding, method, doubled=True)
            assert actual.equal(op.forward(large, weight, None, *before, None, 1, padding, method))


@pytest.mark.parametrize(("size", "stride", "padding"), [(1, 1, 0), (2, 1, 0), (3, 2, (0, 1, 0, 1)), (5, 3, 4)])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_doubled_input_of_other_filters(kernel, backend, size, stride, padding):
    x, weight = torch.randn(2, 70, 5, 4), torch.randn(21, 70, size, size)
    large = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    actual = conv2d(x, weight, None, stride, padding, input_doubled=True, backend=backend)
    assert actual.equal(conv2d(large, weight, None, stride, padding, backend=backend))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_input_gradient(kernel, shape, method, layout):
    x_size, w_size, y_size = sizes(*shape)
    x, dy, weight = torch.randn(x_size), torch.randn(y_size), torch.randn(w_size).contiguous(memory_format=layout)
    actual = op.input_gradient(dy, x, weight, 1, SAME, method)
    exact = F.conv_transpose2d(dy.double(), weight.double(), padding=1)
    turned = weight.double().flip(2, 3).transpose(0, 1)
    assert_within(actual, exact, bound(dy.double(), turned, method, kernel.isa))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", [Method.WINOGRAD2, Method.WINOGRAD4])
@pytest.mark.parametrize("shape", [*SHAPES, (3, 40, 36, 33, 31)], ids=str)
def test_weight_gradient(kernel, shape, method, layout):
    x_size, w_size, y_size = sizes(*shape)
    x, dy, weight = torch.randn(x_size), torch.randn(y_size), torch.empty(w_size).contiguous(memory_format=layout)
    actual = op.weight_gradient(dy, x, weight, 1, SAME, method)
    assert actual.stride() == weight.stride()
    exact = reference.weight_gradient(dy.double(), x.double(), weight.double(), 1, SAME)
    assert_within(actual, exact, gradient_bound(x.double(), dy.double(), method, kernel.isa, SAME))


def test_weight_gradient_of_several_blocks(kernel):
    """Blocks of tiles are added up: 2 x 33 x 33 tiles are more than one."""
    x, dy, weight = torch.randn(2, 12, 131, 130), torch.randn(2, 9, 131, 130), torch.empty(9, 12, 3, 3)
    exact = reference.weight_gradient(dy.double(), x.double(), weight.double(), 1, SAME)
    for method in TILE:
        actual = op.weight_gradient(dy, x, weight, 1, SAME, method)
        assert_within(actual, exact, gradient_bound(x.double(), dy.double(), method, kernel.isa, SAME))


def test_several_blocks_of_tiles(kernel):
    """More tiles than one block holds, whose last rows of tiles are cut anywhere."""
    x, weight = torch.randn(1, 40, 150, 149), torch.randn(20, 40, 3, 3)
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    for method in METHODS:
        actual = op.forward(x, weight, None, None, None, 0, None, 1, SAME, method)
        assert_within(actual, exact, bound(x.double(), weight.double(), method, kernel.isa))


def test_blocks_that_threads_share(kernel):
    """Filters of so many channels that threads share each block of tiles, of which 36 x 36 pixels are two."""
    x, weight = torch.randn(1, 512, 36, 36), torch.randn(480, 512, 3, 3) / 64
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    actual = op.forward(x, weight, None, None, None, 0, None, 1, SAME, Method.WINOGRAD4)
    assert_within(actual, exact, bound(x.double(), weight.double(), Method.WINOGRAD4, kernel.isa))


def test_any_shape(kernel):
    def test(data):
        size = st.integers(1, 14)
        n, c, k = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 140)), data.draw(st.integers(1, 70))
        padding = tuple(data.draw(st.integers(0, 3)) for _ in range(4))
        h = data.draw(size.filter(lambda v: v + padding[2] + padding[3] >= 3))
        w = data.draw(size.filter(lambda v: v + padding[0] + padding[1] >= 3))
        method, layout = data.draw(st.sampled_from(METHODS)), data.draw(st.sampled_from(LAYOUTS))
        x, weight = torch.randn(n, c, h, w), torch.randn(k, c, 3, 3).contiguous(memory_format=layout)
        exact = F.conv2d(F.pad(x.double(), padding), weight.double())
        actual = op.forward(x, weight, None, None, None, 0, None, 1, padding, method)
        assert_within(actual, exact, bound(x.double(), weight.double(), method, kernel.isa, padding))
        dy = torch.randn(actual.shape)
        dx = op.input_gradient(dy, x, weight, 1, padding, method)
        exact_dx = reference.input_gradient(dy.double(), x.double(), weight.double(), 1, padding)
        turned = weight.double().flip(2, 3).transpose(0, 1)
        back = tuple(2 - side for side in padding)
        assert_within(dx, exact_dx, bound(dy.double(), turned, method, kernel.isa, back))
        if method != Method.DIRECT:
            dweight = op.weight_gradient(dy, x, weight, 1, padding, method)
            exact_dw = reference.weight_gradient(dy.double(), x.double(), weight.double(), 1, padding)
            assert_within(dweight, exact_dw, gradient_bound(x.double(), dy.double(), method, kernel.isa, padding))

    for_draws(kernel, test)


@pytest.mark.parametrize("method", [Method.DIRECT, Method.WINOGRAD2])
def test_sums_of_64_channels_are_added_up(kernel, method):
    """A value of 2^24 absorbs the ones of its own chunk one by one, but not the other chunk's sum of ones."""
    x = torch.ones(1, 128, 8, 8)
    x[:, 0] = 2.0**24
    weight = torch.zeros(1, 128, 3, 3)
    weight[:, :, 1, 1] = 1
    if method == Method.WINOGRAD2:  # the transforms of constant images and filters of equal taps are exact
        weight[:] = 0
        weight[:, :, 0, 0] = 1
    y = op.forward(x, weight, None, None, None, 0, None, 1, (0, 0, 0, 0), method)
    assert y.eq(2.0**24 + 64).all()


@pytest.mark.parametrize("method", [Method.WINOGRAD2, Method.WINOGRAD4])
def test_root_mean_square_error(kernel, method):
    """What README says of a layer of 256 channels."""
    x, weight = torch.randn(2, 256, 16, 16), torch.randn(256, 256, 3, 3)
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    y = op.forward(x, weight, None, None, None, 0, None, 1, SAME, method)
    error = ((y.double() - exact).square().mean() / exact.square().mean()).sqrt()
    assert error < {Method.WINOGRAD2: 4e-7, Method.WINOGRAD4: 1.3e-6}[method]
