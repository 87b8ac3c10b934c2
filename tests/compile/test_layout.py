"""The layout of a graph: what is converted to channels_last, and where, in 2-D and 3-D, as on CUDA.

CUDA's condition is switched on for the CPU here, and this package's own convolutions off: PyTorch's run in the graph
that a GPU would run.
"""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from networks import assert_same_network
from torch import fx, nn

import dd_kernels as dd
from dd_kernels.compile import Report, capture, layout

DIMENSIONS = {2: (nn.Conv2d, torch.channels_last), 3: (nn.Conv3d, torch.channels_last_3d)}


class Net(nn.Module):
    """A residual block between convolutions, with a skip connection around it."""

    def __init__(self, dimensions):
        super().__init__()
        convolution = partial(DIMENSIONS[dimensions][0], kernel_size=3, padding=1)
        self.conv_in, self.conv, self.conv_out = convolution(3, 16), convolution(16, 16), convolution(32, 3)
        self.norm = nn.GroupNorm(4, 16)

    def forward(self, x):
        first = self.conv_in(x)
        h = first + self.conv(F.silu(self.norm(first)))
        return self.conv_out(torch.cat([h, first], 1))


class Tokens(Net):
    """The same with attention's way to tokens and back between the block and the last convolution."""

    def __init__(self, dimensions):
        super().__init__(dimensions)
        self.mix = nn.Linear(32, 32)

    def forward(self, x):
        first = self.conv_in(x)
        h = torch.cat([first, first], 1)
        tokens = self.mix(h.flatten(2).transpose(1, 2))
        return self.conv_out(tokens.transpose(1, 2).reshape(h.shape) + h)


@pytest.fixture
def _as_on_cuda(monkeypatch):
    monkeypatch.setattr(layout, "in_channels_last", lambda device, dtype: True)
    monkeypatch.setattr(capture, "find_convolutions3d", lambda graph: [])
    monkeypatch.setattr(capture, "find_convolutions", lambda graph: [])


def run(model, *inputs):
    """Returns the compiled model's result, what each convolution read, and the report."""
    read, report = [], Report()

    class Noting(fx.Interpreter):
        def run_node(self, node):
            if node in layout._THEIRS:
                read.append(self.fetch_args_kwargs_from_env(node)[0][0])
            return super().run_node(node)

    def keep(module, example_inputs):
        capture.dd_kernels(module, example_inputs, options={"report": report})
        return Noting(module).run

    with torch.no_grad():
        return torch.compile(model, backend=keep, dynamic=False)(*inputs), read, report


def image(dimensions):
    return torch.randn(2, 3, *[6] * dimensions)


@pytest.mark.parametrize("dimensions", DIMENSIONS)
@pytest.mark.usefixtures("_as_on_cuda")
def test_one_conversion_at_each_end(dimensions):
    model, x = Net(dimensions), image(dimensions)
    y, read, report = run(model, x)
    assert len(read) == 3
    assert all(v.is_contiguous(memory_format=DIMENSIONS[dimensions][1]) for v in read)
    assert report.graphs[0].layout_copies == 2
    assert y.is_contiguous()
    assert_same_network(y, model(x))


@pytest.mark.parametrize("dimensions", DIMENSIONS)
@pytest.mark.usefixtures("_as_on_cuda")
def test_tokens_are_views(dimensions):
    """The map made of tokens is in channels_last already: its conversion returns it."""
    model, x = Tokens(dimensions), image(dimensions)
    y, read, _ = run(model, x)
    assert len(read) == 2
    assert all(v.is_contiguous(memory_format=DIMENSIONS[dimensions][1]) for v in read)
    assert_same_network(y, model(x))


class Written(nn.Module):
    """Two convolutions of a tensor that is written to between them."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        h = x.flatten(1).reshape(x.shape) * 1.5
        first = self.conv(h)
        h.mul_(2)
        return first + self.conv(h)


@pytest.mark.usefixtures("_as_on_cuda")
def test_a_tensor_written_to_is_converted_again():
    model, x = Written(), image(2)
    y, _, report = run(model, x)
    assert_same_network(y, model(x))
    assert report.graphs[0].layout_copies == 3


def test_where_pytorch_computes_on_a_cpu_nothing_is_converted(monkeypatch):
    monkeypatch.setattr(capture, "find_convolutions3d", lambda graph: [])
    y, read, report = run(Net(3), image(3))
    assert len(read) == 3
    assert all(v.is_contiguous() for v in read)
    assert report.graphs[0].layout_copies == 0
    assert y.is_contiguous()


@pytest.mark.parametrize(
    ("device", "dtype", "tf32", "expected"),
    [
        ("cuda", torch.bfloat16, False, True),
        ("cuda", torch.float16, False, True),
        ("cuda", torch.float32, True, True),
        ("cuda", torch.float32, False, False),
        ("cuda", torch.float64, True, False),
        ("cpu", torch.bfloat16, True, False),
    ],
)
def test_when_pytorch_is_faster_in_channels_last(device, dtype, tf32, expected, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    assert layout.in_channels_last(torch.device(device), dtype) is expected


@pytest.mark.parametrize("dimensions", DIMENSIONS)
@pytest.mark.usefixtures("_as_on_cuda")
def test_weights_are_converted_once_and_restored(dimensions):
    model = Net(dimensions)
    weight, bias, state = model.conv.weight, model.conv.bias, copy.deepcopy(model.state_dict())
    strides = weight.stride()
    dd.accelerate(model)
    assert model.conv.weight is weight
    assert weight.is_contiguous(memory_format=DIMENSIONS[dimensions][1])
    assert weight.stride() != strides
    assert bias.is_contiguous()
    assert all(torch.equal(v, state[name]) for name, v in model.state_dict().items())
    dd.restore(model)
    assert weight.stride() == strides
    assert all(torch.equal(v, state[name]) for name, v in model.state_dict().items())
