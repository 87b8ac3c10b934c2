"""3-D convolutions as sums of 2-D ones: where they are, where they must not be; results, layouts and gradients."""

import copy

import pytest
import torch
import torch.nn.functional as F
from networks import assert_same_network
from torch import nn

from dd_kernels import backend as backends
from dd_kernels.compile import Report
from dd_kernels.ops import conv2d

pytestmark = pytest.mark.skipif(backends.unavailable("cpu") is not None, reason="the CPU library is not built")


class Video(nn.Module):
    """A norm, an activation and a convolution, as video autoencoders have them, and the sum with the input."""

    def __init__(self, channels=16, outputs=16, **options):
        super().__init__()
        options = {"kernel_size": 3, "padding": 1, **options}
        self.norm, self.conv = nn.GroupNorm(4, channels), nn.Conv3d(channels, outputs, **options)

    def forward(self, x):
        return self.conv(F.silu(self.norm(x))) * 1.5


def run(model, x, **options):
    """Returns the results of the compiled model, of the model and in float64, and the report."""
    report = Report()
    fast = torch.compile(model, backend="dd_kernels", options={"report": report, **options}, dynamic=False)
    with torch.no_grad():
        return fast(x), model(x), copy.deepcopy(model).double()(x.double()), report.graphs[0]


SERVED = {
    "padded": {},
    "causal": {"padding": (0, 1, 1)},
    "unpadded": {"padding": 0},
    "frames alone": {"kernel_size": (1, 3, 3), "padding": (0, 1, 1)},
    "five frames": {"kernel_size": (5, 3, 3), "padding": (2, 0, 1)},
    "no bias, few results": {"bias": False, "outputs": 3},
}
OTHERS = {
    "stride": {"stride": 2},
    "stride of frames": {"stride": (2, 1, 1)},
    "dilation": {"dilation": (1, 2, 2)},
    "groups": {"groups": 2},
    "other pixels": {"kernel_size": 1, "padding": 0},
    "few channels": {"channels": 8},
    "padding by name": {"padding": "same"},
    "reflected": {"padding_mode": "replicate", "stride": 2},
}


@pytest.mark.parametrize("case", [*SERVED, *OTHERS])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("batch", [1, 2])
def test_convolutions(case, layout, batch):
    model = Video(**{**SERVED, **OTHERS}[case])
    x = torch.randn(batch, model.norm.num_channels, 5, 7, 6).contiguous(memory_format=layout)
    actual, plain, exact, graph = run(model, x)
    assert graph.convolutions == (case in SERVED)
    assert actual.shape == plain.shape
    assert case in OTHERS or actual.stride() == plain.stride()
    assert_same_network(actual, exact)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_pytorchs(dtype):
    _, _, _, graph = run(Video().to(dtype), torch.randn(1, 16, 4, 5, 6, dtype=dtype))
    assert graph.convolutions == 0


@pytest.mark.parametrize("numbers", [{}, {"accuracy": "high"}, {"dtype": "bfloat16"}])
def test_numbers(numbers):
    """The options are the 2-D convolutions'."""
    model, x = nn.Conv3d(64, 64, 3), torch.randn(1, 64, 5, 12, 12)
    actual, *_ = run(model, x, **numbers)
    options = {"accuracy": numbers.get("accuracy", "default"), "products": numbers.get("dtype", "float32")}
    frames, bias, wanted = x[0].transpose(0, 1).contiguous(memory_format=torch.channels_last), model.bias, None
    with torch.no_grad():
        for i, weight in enumerate(model.weight.unbind(2)):
            wanted, bias = conv2d(frames[i : i + 3], weight.contiguous(), bias, residual=wanted, **options), None
    assert actual[0].transpose(0, 1).equal(wanted)


def test_gradients():
    model, x = Video(), torch.randn(2, 16, 4, 5, 6)
    fast = torch.compile(model, backend="dd_kernels")
    found = []
    for call, dtype in ((fast, torch.float32), (copy.deepcopy(model).double(), torch.float64)):
        given = x.to(dtype).requires_grad_()
        parameters = list((model if call is fast else call).parameters())
        found.append(torch.autograd.grad(call(given).square().mean(), [given, *parameters]))
    assert_same_network(*found)


def test_a_weight_changed_between_calls():
    model, x = Video(), torch.randn(1, 16, 4, 5, 6)
    fast = torch.compile(model, backend="dd_kernels")
    with torch.no_grad():
        fast(x)
        model.conv.weight.data.mul_(0.5)
        assert_same_network(fast(x), model(x))


@pytest.mark.parametrize("padding", [1, (0, 1, 1)])
def test_large_videos_are_convolved_one_by_one(padding):
    model, x = Video(padding=padding), torch.randn(2, 16, 4, 20, 16)
    actual, plain, exact, graph = run(model, x)
    assert graph.convolutions == 1
    assert actual.stride() == plain.stride()
    assert_same_network(actual, exact)
