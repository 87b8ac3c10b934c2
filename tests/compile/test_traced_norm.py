"""Our own norm and U-Net in a compiled graph: by the same rewrites as any other model's."""

import copy

import pytest
import torch
import torch.nn.functional as F
from bounds import UNIT, assert_within
from group_norm_bounds import Errors
from model_checks import assert_all_within
from networks import assert_same_network
from torch import nn

import dd_kernels as dd
from dd_kernels import backend as backends
from dd_kernels.compile import Report, capture
from dd_kernels.nn import GroupNormSiLU, UNet
from dd_kernels.ops.activation import Activation

pytestmark = pytest.mark.skipif(backends.unavailable("cpu") is not None, reason="the CPU library is not built")


class Block(nn.Module):
    """This package's norm, with all that it computes, before a convolution."""

    def __init__(self, activation="silu"):
        super().__init__()
        self.norm = GroupNormSiLU(4, 32, activation=activation)
        self.convolution = nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, x, e=None, scale=None, shift=None):
        return self.convolution(self.norm(x * 2, pre_shift=e, scale=scale, shift=shift))


def graph_of(model, *inputs):
    """Returns the compiled model's result, the names of the graph's calls, and the report."""
    calls, report = [], Report()

    def keep(module, example_inputs):
        function = capture.dd_kernels(module, example_inputs, options={"report": report})
        calls.extend(getattr(node.target, "__name__", str(node.target)) for node in module.graph.nodes)
        return function

    return torch.compile(model, backend=keep)(*inputs), calls, report


@pytest.mark.parametrize(
    ("options", "fused"), [(0, ("silu",)), (1, ("embedding", "silu")), (3, ("embedding", "scale-shift", "silu"))]
)
def test_the_convolution_applies_our_norm(options, fused):
    model, inputs = Block(), (torch.randn(2, 32, 7, 6), *(torch.randn(2, 32) for _ in range(options)))
    with torch.no_grad():
        actual, calls, report = graph_of(model, *inputs)
        exact = copy.deepcopy(model).double()(*(v.double() for v in inputs))
    assert calls.count("norm_conv2d") == 1
    assert not [name for name in calls if "group_norm_silu" in name or "empty_like" in name or "functorch" in name]
    assert [(norm.name, norm.fused, norm.kept) for norm in report.norms] == [("norm", fused, None)]
    assert_same_network(actual, exact)


class Given(nn.Module):
    """The operator itself, which writes to a tensor that something else made or reads before."""

    def __init__(self, read_before):
        super().__init__()
        self.read_before = read_before

    def forward(self, x):
        y = torch.empty_like(x)
        before = y.zero_() + 1 if self.read_before else x
        torch.ops.dd_kernels.group_norm_silu.default(x, 4, None, None, 1e-5, None, None, None, 1, y)
        return y + before


@pytest.mark.parametrize("read_before", [False, True])
def test_a_result_that_is_read_before_stays(read_before):
    x = torch.randn(2, 8, 5, 5)
    with torch.no_grad():
        actual, calls, report = graph_of(Given(read_before), x)
    before = torch.ones(()) if read_before else x.double()
    bounds = Errors(x.double(), x.double(), 4, {}, Activation.SILU, False).by_name()
    exact = F.silu(F.group_norm(x.double(), 4)) + before
    assert_within(actual, exact, bounds["y"] + UNIT * (exact - before).abs())
    assert len(report.norms) == (not read_before)
    assert ("checked_norm" in calls) is not read_before


class Trained(nn.Module):
    """What stands in a U-Net between our norms: a residual, dropout, and a concatenation."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(GroupNormSiLU(4, channels) for channels in (16, 16, 32))
        self.convolutions = nn.ModuleList(nn.Conv2d(*sizes, 3, padding=1) for sizes in ((16, 16), (16, 16), (32, 8)))
        self.dropout = nn.Dropout(0.1)

    def forward(self, x, e):
        h = self.convolutions[0](self.norms[0](x))
        h = x + self.convolutions[1](self.dropout(self.norms[1](h, pre_shift=e)))
        h, total = dd.group_norm_silu(h, 4, residual=x, skip=h)
        return self.convolutions[2](self.norms[2](h)) + total[:, ::2]


def gradients_of(model, function, dtype, inputs):
    """Returns the output and gradients of a sum of it, weighted in contiguous order, all by name.

    Runs under autocast where dtype has 16 bits.
    """
    torch.manual_seed(1)  # of the dropout
    leaves = [v.requires_grad_() for v in inputs]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = function(*leaves)
    weights = torch.linspace(-1, 1, y.numel()).view(y.shape)
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad((y * weights.to(y)).sum(), [*leaves, *parameters.values()])
    return {"output": y.detach(), **dict(zip(["x", "embedding", *parameters], found, strict=True))}


@pytest.mark.parametrize("compiler", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow), "dd_kernels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_training(compiler, dtype, memory_format):
    torch.manual_seed(0)
    model, report = Trained(), Report()
    given = torch.randn(2, 16, 6, 5).contiguous(memory_format=memory_format), torch.randn(2, 16)

    def copies(dtype):
        return [v.to(dtype, copy=True) for v in given]

    exact_model = copy.deepcopy(model).double()
    exact = gradients_of(exact_model, exact_model, torch.float64, copies(torch.float64))
    options = {"report": report} if compiler == "dd_kernels" else None
    compiled = torch.compile(model, backend=compiler, options=options)
    actual = gradients_of(model, compiled, dtype, copies(torch.float32))
    assert_all_within(actual, exact, model, dtype)
    assert len(report.norms) == (4 if compiler == "dd_kernels" else 0)


@pytest.mark.parametrize(("factor", "order"), [(2, (0, 1, 2)), (1, (0, 2, 1))])
def test_another_gradient_than_the_norms_stays(factor, order):
    """An autograd function that calls both operators and returns other gradients is not the norm."""
    operators, options = torch.ops.dd_kernels, (1e-5, None, None, None, 1)

    class Another(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias):
            y, mean = torch.empty_like(x), torch.empty(2, 4)
            rstd = torch.empty_like(mean)
            operators.group_norm_silu.default(x, 4, weight, bias, *options, y, mean, rstd)
            ctx.save_for_backward(x, weight, bias, mean, rstd)
            return y

        @staticmethod
        def backward(ctx, dy):
            x, weight, bias, mean, rstd = ctx.saved_tensors
            gradients = [torch.empty_like(v) for v in (x, weight, bias)]
            dy = dy if factor == 1 else dy * factor
            operators.group_norm_silu_backward.default(dy, x, mean, rstd, 4, weight, bias, *options, *gradients)
            return tuple(gradients[i] for i in order)

    x, *parameters = (torch.randn(s, requires_grad=True) for s in ((2, 8, 5, 5), (8,), (8,)))
    compiled, calls, report = graph_of(lambda x: Another.apply(x * 1, *parameters), x)
    plain = Another.apply(x * 1, *parameters)
    wanted, actual = (torch.autograd.grad(y.square().sum(), [x, *parameters]) for y in (plain, compiled))
    assert all(a.equal(b) for a, b in zip(wanted, actual, strict=True))
    assert report.norms == []
    assert "checked_norm" not in calls


def test_our_unet_takes_the_way_of_every_model():
    torch.manual_seed(0)
    model = UNet(image_size=16, in_channels=3, out_channels=3, channels=(32, 64), num_res_blocks=1).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 7])
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double(), t)
        _, report = dd.accelerate(model)
        assert_same_network(model(x, t), exact)
    (network,) = report.networks
    assert len(network.norms) == len([m for m in model.modules() if isinstance(m, GroupNormSiLU)])
    assert report.share == 1
