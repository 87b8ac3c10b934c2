"""The rewrite of linear layers: where it applies, where it must not; results, gradients and changes of the weights."""

from functools import partial

import against_float64
import pytest
import torch
import torch.nn.functional as F
from against_float64 import compiled
from bounds import assert_within, gamma
from torch import nn

from dd_kernels import backend as backends
from dd_kernels.compile import dd_kernels as dynamo_backend
from dd_kernels.compile import kept_filters
from dd_kernels.ops import conv2d

pytestmark = pytest.mark.skipif(backends.unavailable("cpu") is not None, reason="the CPU library is not built")


class Attention(nn.Module):
    """diffusers', of two heads: tokens of a normalised map, projected, attended to, projected again and added to it."""

    def __init__(self, channels=32):
        super().__init__()
        self.norm = nn.GroupNorm(4, channels)
        self.q, self.k, self.v = (nn.Linear(channels, channels, bias=i > 0) for i in range(3))
        self.out = nn.Linear(channels, channels)

    def forward(self, x):
        tokens = self.norm(x.flatten(2)).transpose(1, 2)
        q, k, v = (project(tokens).unflatten(2, (2, -1)).transpose(1, 2) for project in (self.q, self.k, self.v))
        h = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return h.transpose(1, 2).reshape(x.shape) + x


class Function(nn.Module):
    def __init__(self, function, outputs=24, inputs=20):
        super().__init__()
        self.function = function
        self.weight, self.bias = nn.Parameter(torch.randn(outputs, inputs) / 4), nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return self.function(x, self.weight, self.bias)


def linears(report):
    return sum(graph.linears for graph in report.graphs)


check = partial(against_float64.check, "linears")


@pytest.mark.parametrize("accuracy", ["default", "high"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_attention(layout, accuracy):
    x = torch.randn(2, 32, 6, 5).contiguous(memory_format=layout)
    check(Attention(), x, count=4, accuracy=accuracy)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w, b: F.linear(x, w),
        lambda x, w, b: F.linear(x, w, b) + 1,
        lambda x, w, b: F.linear(input=x, weight=w, bias=b),
        lambda x, w, b: F.linear(x[0], w, b),
        lambda x, w, b: F.linear(x[:, None], w, b),
        lambda x, w, b: F.linear(x.transpose(0, 1), w, b).sum(1),
        lambda x, w, b: F.linear(x[..., ::2], w[:, :10], b),
        lambda x, w, b: F.linear(x, w * 1.5, b),
    ],
)
def test_shapes_and_strides(function):
    check(Function(function), torch.randn(3, 17, 20), count=1)


def read_twice(x, w, b):
    y = F.linear(x, w, b)
    return (y + x.mean()) * y


def written_between(x, w, b):
    x = x * 1.5
    y = F.linear(x, w, b)
    x.mul_(2)
    return y + x[..., :1].expand_as(y)


@pytest.mark.parametrize(
    ("function", "added"),
    [
        (lambda x, w, b: F.linear(x, w, b) + F.gelu(x), False),
        (lambda x, w, b: torch.add(x.sin(), F.linear(x, w, b)), False),
        (lambda x, w, b: F.linear(x, w, b) + x[:1], True),
        (lambda x, w, b: x.mT.contiguous().mT + F.linear(x, w, b), True),
        (read_twice, True),
        (written_between, True),
    ],
)
def test_the_sum_after_it(function, added):
    """A sum of one shape and order is the kernel's; another stays where it is."""
    model, x, calls = Function(function, 20), torch.randn(2, 17, 20), []

    def keep(module, example_inputs):
        run = dynamo_backend(module, example_inputs)
        calls.extend(getattr(node.target, "__name__", node.target) for node in module.graph.nodes)
        return run

    torch.compile(model, backend=keep)(x)
    assert ("add" in calls) == added
    torch._dynamo.reset()
    check(model, x, count=1)


@pytest.mark.parametrize(
    ("function", "x"),
    [
        (lambda x, w, b: F.linear(x, w, b), torch.randn(3, 5, 20)),
        (lambda x, w, b: F.linear(x[0], w, b), torch.randn(16, 20)),
        (lambda x, w, b: F.linear(x.double(), w.double()).float(), torch.randn(64, 20)),
        (lambda x, w, b: F.linear(x, w[0]), torch.randn(64, 20)),
        (lambda x, w, b: F.linear(x, w[:0]), torch.randn(64, 20)),
        (lambda x, w, b: F.linear(x[:, :0], w[:, :0], b), torch.randn(64, 20)),
    ],
)
def test_what_pytorch_keeps(function, x):
    """Few tokens read the weights once; another dtype, and weights of no matrix, are not the kernel's."""
    model = Function(function)
    run, report = compiled(model)
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x), rtol=0, atol=0)
    assert linears(report) == 0


def test_autocast_keeps_pytorchs():
    model, x = Attention(), torch.randn(2, 32, 8, 8)
    run, report = compiled(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert run(x).dtype == model(x).dtype
    assert linears(report) == 0


def test_training_and_weights_that_change():
    model, x = Attention(), torch.randn(2, 32, 9, 8)
    run, report = compiled(model)
    for _ in range(2):
        against_float64.check_gradients(model, run, x)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
    assert linears(report) >= 4


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_in_training_the_kernel_multiplies_in_float32(dtype):
    model, x = Function(lambda x, w, b: F.linear(x, w, b) + x[..., :24], inputs=200), torch.randn(2, 32, 200)
    y = compiled(model, dtype=dtype)[0](x)
    image, filters = x.reshape(1, 64, 1, 200).permute(0, 3, 1, 2), model.weight[:, :, None, None]
    wanted = conv2d(image, filters, model.bias, residual=image[:, :24])
    assert y.equal(wanted.permute(0, 2, 3, 1).reshape(2, 32, 24))


def test_any_number_of_tokens():
    model = Function(lambda x, w, b: F.linear(x, w, b))
    run, report = compiled(model, dynamic=True)
    with torch.no_grad():
        for tokens in (33, 1, 200, 0):
            x = torch.randn(2, tokens, 20)
            given = [x.double(), *(p.double() for p in model.parameters())]
            exact, size = F.linear(*given), F.linear(*(v.abs() for v in given))
            assert_within(run(x), exact, gamma(24) * size)  # a product, 20 sums, and the joining of chunks
    assert linears(report) >= 1


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.mul_(2),
        lambda weight: weight.data.mul_(2),
        lambda weight: setattr(weight, "data", weight.data * 2),
    ],
)
def test_a_change_of_the_kept_weights_is_seen(change):
    model, x = Function(lambda x, w, b: F.linear(x, w)), torch.randn(2, 32, 20)
    run = compiled(model)[0]
    with torch.no_grad():
        first = run(x)
        assert id(model.weight) in kept_filters._kept
        change(model.weight)
        assert run(x).equal(2 * first)


def test_other_backends_run_pytorchs():
    model, x = Function(lambda x, w, b: F.linear(x, w, b)), torch.randn(2, 32, 20)
    run, report = compiled(model)
    with torch.no_grad(), backends.use_backend("reference"):
        assert run(x).equal(model(x))
    assert linears(report) == 1


def test_products_of_bfloat16():
    model, x = Function(lambda x, w, b: F.linear(x, w, b)), torch.randn(2, 32, 20)
    run, report = compiled(model, dtype="bfloat16")
    with torch.no_grad():
        image, filters = x.reshape(1, 64, 1, 20).permute(0, 3, 1, 2), model.weight[:, :, None, None]
        wanted = conv2d(image, filters, model.bias, products="bfloat16")
        assert run(x).equal(wanted.permute(0, 2, 3, 1).reshape(2, 32, 24))
    assert linears(report) == 1


def test_the_report_tells():
    run, report = compiled(Attention())
    with torch.no_grad():
        run(torch.randn(1, 32, 4, 4))
    assert "4 linear layers by the convolutions' kernel" in str(report)
