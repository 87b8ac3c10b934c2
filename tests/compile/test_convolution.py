"""The rewrite of convolutions: where it applies, where it must not; results, layouts and gradients are right."""

from functools import partial

import against_float64
import pytest
import torch
import torch.nn.functional as F
from against_float64 import compiled
from model_checks import assert_within, double
from networks import assert_same_network
from torch import nn

from dd_kernels import backend as backends
from dd_kernels.compile import dd_kernels as dynamo_backend
from dd_kernels.compile.fused_convolution import FLOAT32, channels_last_conv2d
from dd_kernels.ops import conv2d

pytestmark = pytest.mark.skipif(backends.unavailable("cpu") is not None, reason="the CPU library is not built")


class Block(nn.Module):
    """diffusers': a norm, an activation and a convolution, twice, and the sum with a shortcut."""

    def __init__(self, channels=32, outputs=48):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, channels), nn.GroupNorm(8, outputs)
        self.conv1, self.conv2 = nn.Conv2d(channels, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(channels, outputs, 1)

    def forward(self, x):
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return (self.shortcut(x) + h) / 1.0


def convolutions(report):
    return sum(graph.convolutions for graph in report.graphs)


check = partial(against_float64.check, "convolutions")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("accuracy", ["default", "high"])
def test_a_block(layout, accuracy):
    x = torch.randn(2, 32, 11, 10).contiguous(memory_format=layout)
    check(Block(), x, count=3, accuracy=accuracy)


def graph_of(model, *inputs):
    """Returns the rewritten graph's calls by name."""
    calls = []

    def keep(module, example_inputs):
        function = dynamo_backend(module, example_inputs)
        calls.extend(getattr(node.target, "__name__", node.target) for node in module.graph.nodes)
        return function

    torch.compile(model, backend=keep)(*inputs)
    return calls


def test_the_residual_is_added_by_the_convolution():
    calls = graph_of(Block(), torch.randn(2, 32, 8, 8))
    assert calls.count("norm_conv2d") == 2
    assert "add" not in calls


class Embedded(nn.Module):
    """A residual block of guided-diffusion's kind: an embedding before a norm, another's scale and shift after it."""

    def __init__(self, channels=32, activation=F.silu):
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(8, channels) for _ in range(2))
        self.convolutions = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.activation = activation

    def forward(self, x, embedding):
        e = embedding[:, :, None, None]
        h = self.convolutions[0](self.activation(self.norms[0](x + e)))
        return x + self.convolutions[1](self.activation(self.norms[1](h) * (1 + e) + e))


@pytest.mark.parametrize("activation", [F.silu, F.mish, F.gelu])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_norm_is_applied_by_the_convolution(activation, layout):
    model, x = Embedded(activation=activation), torch.randn(2, 32, 9, 7).contiguous(memory_format=layout)
    embedding = torch.randn(2, 32)
    calls = graph_of(model, x, embedding)
    assert calls.count("norm_conv2d") == 2
    assert "checked_norm" not in calls
    torch._dynamo.reset()
    check(model, x, embedding, count=2)


class Read(nn.Module):
    """A norm whose result something else may read, or that a write stands beside."""

    def __init__(self, function):
        super().__init__()
        self.norm, self.convolution = nn.GroupNorm(4, 16), nn.Conv2d(16, 16, 3, padding=1)
        self.function = function

    def forward(self, x):
        return self.function(x * 1.5, self.norm, self.convolution)


def read_twice(x, norm, convolution):
    h = F.silu(norm(x))
    return convolution(h) * 1.5 + h


def used_twice(x, norm, convolution):
    h = F.silu(norm(x))
    return F.conv2d(h, h[:1, :, :3, :3].expand(4, -1, -1, -1), padding=1)


def written_between(x, norm, convolution):
    h = F.silu(norm(x))
    x.mul_(2)
    return convolution(h) * x


@pytest.mark.parametrize("function", [read_twice, used_twice, written_between])
def test_a_norm_that_something_else_needs_stays(function):
    model, x = Read(function), torch.randn(2, 16, 6, 5)
    calls = graph_of(model, x)
    assert "norm_conv2d" not in calls
    assert "checked_norm" in calls
    torch._dynamo.reset()
    check(model, x, count=1)


def test_a_norm_of_another_dtype_stays():
    """What the norm reads is then not what the convolution would."""
    model, x = Read(lambda x, norm, convolution: convolution(F.silu(norm(x)))), torch.randn(2, 16, 6, 5)
    model.norm.double()
    model.function = lambda x, norm, convolution: convolution(F.silu(norm(x.double())).float())
    assert "norm_conv2d" not in graph_of(model, x)


def test_a_norm_and_convolution_under_other_backends_and_transforms():
    model, x = Embedded(), torch.randn(2, 32, 9, 7)
    run, embedding = compiled(model)[0], torch.randn(2, 32)
    with torch.no_grad():
        wanted = run(x, embedding)
        with backends.use_backend("reference"):
            other = run(x, embedding)
    # Only the kernels agree in every bit.
    assert_same_network(other, wanted)
    assert not other.equal(wanted)


class Function(nn.Module):
    def __init__(self, function, *shape):
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.randn(shape or (16, 16, 3, 3)) / 12)

    def forward(self, x):
        return self.function(x, self.weight)


def in_place(x, w):
    y = F.conv2d(x, w, padding=1)
    y += x
    return y


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: F.conv2d(x, w, padding=1) + x[:, :, :1, :1],  # the summand is broadcast
        lambda x, w: (y := F.conv2d(x, w, padding=1)) + y,
        lambda x, w: (y := F.conv2d(x, w, padding=1)) + x + y,  # the convolution's result is read twice
        in_place,
        lambda x, w: torch.add(F.conv2d(x, w, padding=1), x, alpha=2),
        lambda x, w: F.conv2d(x, w, padding=1) + 1,
        lambda x, w: F.conv2d(x, w, padding=1) + x.double(),
    ],
)
def test_a_sum_that_is_no_residual_stays(function):
    model, x = Function(function), torch.randn(2, 16, 6, 5)
    assert any(name in graph_of(model, x) for name in ("add", "iadd"))
    check(model, x, count=1) if function(x, model.weight).dtype == torch.float32 else None


def test_nothing_moves_past_a_write():
    """The residual and the weight are read where the convolution stands if they change before the sum."""

    def function(x, w):
        x = x * 1.5
        y = F.conv2d(x, w, padding=1)
        x.mul_(2)
        return y + x

    check(Function(function), torch.randn(2, 16, 6, 5), count=1)


@pytest.mark.parametrize("accuracy", ["default", "high"])
@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda x, w: F.conv2d(x, w, stride=2, padding=1), (16, 16, 3, 3)),
        (lambda x, w: F.conv2d(x, w), (24, 16, 1, 1)),
        (lambda x, w: F.conv2d(x, w, padding=(0, 2)), (8, 16, 3, 5)),
        (lambda x, w: F.conv2d(x[:, :3], w), (16, 3, 3, 3)),
        (lambda x, w: F.conv2d(x[:, :4, 4:8, 4:8], w, stride=3), (5, 4, 1, 1)),
    ],
)
def test_without_winograd(function, shape, accuracy):
    check(Function(function, *shape), torch.randn(2, 16, 9, 8), count=1, accuracy=accuracy)


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda x, w: F.conv2d(x, w, stride=(1, 2)), (8, 16, 3, 3)),
        (lambda x, w: F.conv2d(x, w, padding="same"), (16, 16, 3, 3)),
        (lambda x, w: F.conv2d(x, w, dilation=2), (16, 16, 3, 3)),
        (lambda x, w: F.conv2d(x, w, groups=4), (16, 4, 3, 3)),
        (lambda x, w: F.conv2d(x[0], w), (16, 16, 3, 3)),
        (lambda x, w: F.conv2d(x[:, :0], w[:, :0]), (16, 16, 3, 3)),
        (lambda x, w: F.conv2d(x.double(), w.double()).float(), (16, 16, 3, 3)),
    ],
)
def test_what_pytorch_keeps(function, shape):
    model, x = Function(function, *shape), torch.randn(2, 16, 9, 8)
    run, report = compiled(model)
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x), rtol=0, atol=0)
    assert convolutions(report) == 0


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: F.conv2d(F.pad(x, (0, 1, 0, 1)), w, stride=2),
        lambda x, w: F.conv2d(F.pad(x, (3, 0, 1, 2), "constant", 0.0), w, padding=1),
        lambda x, w: F.conv2d(F.pad(F.silu(F.group_norm(x, 4)), (0, 1, 2, 0)), w, stride=2, padding=(0, 1)),
        lambda x, w: F.conv2d(F.pad(x, (0, 1, 0, 1)), w) + x[:, :, 1:, 1:],
    ],
)
def test_zeros_around_the_input_are_the_convolutions(function, layout):
    model, x = Function(function), torch.randn(2, 16, 9, 8).contiguous(memory_format=layout)
    calls = graph_of(model, x)
    assert "pad" not in calls
    assert "checked_norm" not in calls
    torch._dynamo.reset()
    check(model, x, count=1)


def padded_twice(x, w):
    z = F.pad(x, (0, 1, 0, 1))
    return F.conv2d(z, w, stride=2) * z.mean()


def normalised_and_padded_twice(x, w):
    z = F.pad(F.silu(F.group_norm(x, 4)), (0, 1, 0, 1))
    return F.conv2d(z, w, stride=2) * z.mean()


def written_after_the_padding(x, w):
    x = x * 1.5
    z = F.pad(x, (0, 1, 0, 1))
    x.mul_(2)
    return F.conv2d(z, w, stride=2) * x.mean()


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: F.conv2d(F.pad(x, (1, 1, 1, 1), value=0.5), w),
        lambda x, w: F.conv2d(F.pad(x, (1, 1, 1, 1), "reflect"), w),
        lambda x, w: F.conv2d(F.pad(x, (-1, 1, 0, 1)), w),
        lambda x, w: F.conv2d(F.pad(x, (0, 1)), w),
        padded_twice,
        normalised_and_padded_twice,
        written_after_the_padding,
    ],
)
def test_a_padding_that_is_more_or_something_else_needs_stays(function):
    model, x = Function(function), torch.randn(2, 16, 9, 8)
    calls = graph_of(model, x)
    assert "pad" in calls
    assert "norm_conv2d" not in calls
    torch._dynamo.reset()
    check(model, x, count=1)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("function", "left"),
    [
        (lambda x, w: F.conv2d(F.interpolate(x, scale_factor=2.0), w, padding=1), 0),
        (lambda x, w: F.conv2d(F.interpolate(x, size=(18, 16), mode="nearest-exact"), w), 0),
        (lambda x, w: F.conv2d(F.pad(F.interpolate(F.silu(F.group_norm(x, 4)), None, (2, 2)), (0, 1, 2, 0)), w), 0),
        (lambda x, w: F.conv2d(F.interpolate(x, scale_factor=2), w, padding=1) + F.interpolate(2 * x, (18, 16)), 1),
        (lambda x, w: F.conv2d(z := F.interpolate(x, scale_factor=2), w, padding=1) * z, 1),
    ],
)
def test_the_convolution_doubles_its_input(function, left, layout):
    model, x = Function(function), torch.randn(2, 16, 9, 8).contiguous(memory_format=layout)
    calls = graph_of(model, x)
    assert calls.count("interpolate") == left
    assert "checked_norm" not in calls
    torch._dynamo.reset()
    check(model, x, count=1)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: F.conv2d(x.contiguous(), w, padding=1),
        lambda x, w: F.conv2d(F.silu(F.group_norm(x, 4)).contiguous(), w, padding=1),
        lambda x, w: F.conv2d(F.pad(x.contiguous(), (0, 1, 0, 1)).contiguous(), w, stride=2),
        lambda x, w: F.conv2d(F.interpolate(x.contiguous(), scale_factor=2).contiguous(), w, padding=1),
        lambda x, w: F.conv2d(x.contiguous(memory_format=torch.contiguous_format), w, padding=1),
    ],
)
def test_copies_in_another_layout_are_not_made_for_a_convolution(function):
    """A single one is left: the result's, which is contiguous without the rewrite."""
    model, x = Function(function), torch.randn(2, 16, 9, 8).contiguous(memory_format=torch.channels_last)
    calls = graph_of(model, x)
    assert calls.count("contiguous") == 1
    assert not {"checked_norm", "pad", "interpolate"} & set(calls)
    torch._dynamo.reset()
    check(model, x, count=1)


def written_after_the_copy(x, w):
    x = x * 1.5
    z = x.contiguous()
    x.mul_(2)
    return F.conv2d(z, w) * x.mean()


def copied_for_a_product_too(x, w):
    z = x.contiguous()
    return F.conv2d(z, w, padding=1) * z


@pytest.mark.parametrize("function", [written_after_the_copy, copied_for_a_product_too])
def test_a_copy_that_something_else_needs_stays(function):
    model, x = Function(function), torch.randn(2, 16, 9, 8).contiguous(memory_format=torch.channels_last)
    assert graph_of(model, x).count("contiguous") == 2
    torch._dynamo.reset()
    check(model, x, count=1)


def written_after_doubling(x, w):
    x = x * 1.5
    z = F.interpolate(x, scale_factor=2)
    x.mul_(2)
    return F.conv2d(z, w) * x.mean()


def normalised_and_doubled_twice(x, w):
    z = F.interpolate(F.silu(F.group_norm(x, 4)), scale_factor=2)
    return F.conv2d(z, w, padding=1) * z


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda x, w: F.conv2d(F.interpolate(x, scale_factor=2.1), w), ()),  # makes 18 x 16 pixels of 9 x 8 too
        (lambda x, w: F.conv2d(F.interpolate(x, size=(18, 24)), w), ()),
        (lambda x, w: F.conv2d(F.interpolate(x, scale_factor=2, mode="bilinear"), w), ()),
        (lambda x, w: F.conv2d(F.interpolate(x, scale_factor=2), w), (16, 16, 1, 1)),
        (written_after_doubling, ()),
        (normalised_and_doubled_twice, ()),
    ],
)
def test_what_else_makes_larger_images_stays(function, shape):
    model, x = Function(function, *shape), torch.randn(2, 16, 9, 8)
    calls = graph_of(model, x)
    assert "interpolate" in calls
    assert "norm_conv2d" not in calls
    torch._dynamo.reset()
    check(model, x, count=1)


def test_doubling_in_training_and_under_another_backend():
    """Where a gradient or another backend is asked for, the larger image is made."""
    model, x = Function(lambda x, w: F.conv2d(F.interpolate(x, scale_factor=2), w, padding=1)), torch.randn(2, 16, 5, 4)
    run = compiled(model)[0]
    for exact, actual in zip(*against_float64.gradients(model, run, x), strict=True):
        assert_same_network(actual, exact)
    with torch.no_grad(), backends.use_backend("reference"):
        assert run(x).equal(model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_block_in_16_bits(layout, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    model, x = Block().to(dtype), torch.randn(2, 32, 11, 10).to(dtype).contiguous(memory_format=layout)
    run, report = compiled(model)
    with torch.no_grad():
        actual, plain = run(x), model(x)
    assert convolutions(report) == 2
    assert actual.dtype == dtype
    assert actual.stride() == plain.stride()
    assert_within(actual, double(model)(x.double()), model)
    exact, actual = map(torch.cat, ([g.flatten() for g in v] for v in against_float64.gradients(model, run, x)))
    assert_within(actual, exact, model, "gradients", passes=2, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("size", "stride", "avx2", "amx", "count"),
    [
        (3, 1, True, False, 1),
        (3, 1, True, True, 0),
        (3, 1, False, False, 0),
        (3, 2, True, False, 0),
        (1, 1, True, False, 0),
    ],
)
def test_16_bits_are_ours_where_winograd_gains(size, stride, avx2, amx, count, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: avx2)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    model = Function(lambda x, w: F.conv2d(x, w, None, stride), 16, 16, size, size).to(dtype)
    x = torch.randn(2, 16, 9, 7, dtype=dtype)
    run, report = compiled(model)
    with torch.no_grad():
        actual = run(x)
        assert actual.equal(conv2d(x, model.weight) if count else model(x))
    assert convolutions(report) == count


def test_autocast_keeps_pytorchs():
    model, x = Block(), torch.randn(2, 32, 8, 8)
    run, report = compiled(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert run(x).dtype == model(x).dtype
    assert convolutions(report) == 0


def test_views_and_outputs_are_as_without_it():
    """A view that would mix the dimensions of channels_last is a copy; what leaves the graph is contiguous."""

    def function(x, w):
        y = F.conv2d(x, w, padding=1)
        return y.view(y.shape[0], -1) * 2, y, F.conv2d(y, w, padding=1).view(2, 4, -1)

    model, x = Function(function), torch.randn(2, 16, 6, 5)
    run, report = compiled(model)
    with torch.no_grad():
        for actual, wanted in zip(run(x), model(x), strict=True):
            assert actual.stride() == wanted.stride()
            assert_same_network(actual, wanted)
    assert convolutions(report) == 2


def test_an_image_of_one_channel_becomes_channels_last_in_training_too():
    weight = nn.Parameter(torch.randn(8, 1, 3, 3))
    y = channels_last_conv2d(torch.randn(2, 1, 6, 5), weight, None, 1, (1, 1, 1, 1), None, FLOAT32)
    assert y.requires_grad
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_training_and_weights_that_change():
    model, x = Block(), torch.randn(2, 32, 9, 8)
    run, report = compiled(model)
    for _ in range(2):
        for exact, actual in zip(*against_float64.gradients(model, run, x), strict=True):
            assert_same_network(actual, exact)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
    assert convolutions(report) >= 2


def test_accuracy_reaches_the_kernel():
    model, x = Function(lambda x, w: F.conv2d(x, w, padding=1)), torch.randn(2, 16, 16, 16)
    results = [check(model, x, count=1)]
    torch._dynamo.reset()
    results.append(check(model, x, count=1, accuracy="high"))
    assert not results[0].equal(results[1])
    with pytest.raises(Exception, match="accuracy must be one of 'default', 'high', 'fast'; got 'low'"):
        compiled(model, accuracy="low")[0](x[:1])


@pytest.mark.parametrize("accuracy", ["default", "high", "fast"])
@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("recorded", [False, True])
def test_products_of_bfloat16(accuracy, dtype, size, recorded):
    """The compiled model is the op with the same options, also without Winograd."""
    model = Function(lambda x, w: F.conv2d(x, w, padding=size // 2), 16, 16, size, size)
    x = torch.randn(2, 16, 16, 16)
    run, report = compiled(model, accuracy=accuracy, dtype=dtype)
    with torch.set_grad_enabled(recorded):
        actual = run(x)
    assert convolutions(report) == 1
    assert actual.equal(conv2d(x, model.weight, padding=size // 2, accuracy=accuracy, products="bfloat16"))


def test_a_norm_before_products_of_bfloat16():
    model, x, embedding = Embedded(), torch.randn(2, 32, 16, 16), torch.randn(2, 32)
    run, report = compiled(model, dtype="bfloat16")
    with torch.no_grad():
        e = embedding[:, :, None, None]
        h = conv2d(F.silu(model.norms[0](x + e)), model.convolutions[0].weight, padding=1, products="bfloat16")
        h = h + model.convolutions[0].bias[:, None, None]
        z = F.silu(model.norms[1](h) * (1 + e) + e)
        wanted = x + conv2d(z, model.convolutions[1].weight, model.convolutions[1].bias, padding=1, products="bfloat16")
        actual = run(x, embedding)
    assert convolutions(report) == 2
    # A rounding to bfloat16 that falls on the other side moves a product by 2^-8 of itself.
    assert (actual - wanted).abs().max() <= 2**-8 * wanted.abs().max()


def test_another_dtype_is_refused():
    model, x = Function(lambda x, w: F.conv2d(x, w, padding=1)), torch.randn(2, 16, 6, 5)
    with pytest.raises(Exception, match="dtype must be None or 'bfloat16'; got 'float16'"):
        compiled(model, dtype="float16")[0](x)
