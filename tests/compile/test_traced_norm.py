"""Our own norm and U-Net in a compiled graph: by the same rewrites as any other model's."""

import copy

import pytest
import torch
from torch import nn

import dd_kernels as dd
from dd_kernels import backend as backends
from dd_kernels.compile import Report, capture
from dd_kernels.nn import GroupNormSiLU, UNet

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
    assert (actual.double() - exact).abs().max() <= 4e-6 * exact.abs().max()


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
        torch.testing.assert_close(actual, Given(read_before)(x))
    assert len(report.norms) == (not read_before)
    assert ("checked_norm" in calls) is not read_before


def test_our_unet_takes_the_way_of_every_model():
    torch.manual_seed(0)
    model = UNet(image_size=16, in_channels=3, out_channels=3, channels=(32, 64), num_res_blocks=1).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 7])
    with torch.no_grad():
        plain, exact = model(x, t), copy.deepcopy(model).double()(x.double(), t)
        _, report = dd.accelerate(model)
        error, plain_error = ((y - exact).abs().max() for y in (model(x, t), plain))
    (network,) = report.networks
    assert len(network.norms) == len([m for m in model.modules() if isinstance(m, GroupNormSiLU)])
    assert report.share == 1
    assert error <= 2 * plain_error + 16 * torch.finfo(torch.float32).eps * exact.abs().max()
