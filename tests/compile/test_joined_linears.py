"""The rewrite of linear layers that read the same tokens: where it applies, where it must not; results, gradients."""

from functools import partial

import against_float64
import pytest
import torch
import torch.nn.functional as F
from against_float64 import compiled
from torch import nn

from dd_kernels import backend as backends
from dd_kernels.compile import derived_weights

pytestmark = pytest.mark.skipif(backends.unavailable("cpu") is not None, reason="the CPU library is not built")
check = partial(against_float64.check, "linears")
SIZES = (24, 8, 40, 16)


class Blocks(nn.Module):
    """Layers of different widths, one without a bias, and what reads their results."""

    def __init__(self, sizes=SIZES, inputs=32):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(inputs, size, bias=i > 0) for i, size in enumerate(sizes))

    def read(self, y):
        return torch.tanh(y)

    def forward(self, x):
        return torch.cat([self.read(layer(x)) for layer in self.layers], -1)


class Unet(Blocks):
    """As diffusers' blocks read their time embedding."""

    def read(self, y):
        y = F.group_norm(y[:, :, None, None] + torch.ones(1, 1, 3, 4), 4)
        return y.flatten(1)


class Halves(Blocks):
    def read(self, y):
        scale, shift = y.chunk(2, -1)
        return scale * shift


@pytest.mark.parametrize("kind", [Blocks, Unet, Halves])
@pytest.mark.parametrize("n", [1, 3])
def test_joined(kind, n):
    check(kind(), torch.randn(n, 32), count=4)


def test_tokens_of_more_dimensions():
    check(Blocks(), torch.randn(2, 3, 32), count=4)


class Parts(Blocks):
    def forward(self, x):
        return [layer(x) for layer in self.layers]


@pytest.mark.parametrize("n", [1, 3])
def test_results_of_the_graph_lie_as_those_of_each_layer(n):
    model, x = Parts(), torch.randn(n, 32)
    run, report = compiled(model)
    with torch.no_grad():
        for actual, wanted in zip(run(x), model(x), strict=True):
            torch.testing.assert_close(actual, wanted)
            assert actual.stride() == wanted.stride()
    assert sum(graph.linears for graph in report.graphs) == 4


class OfTwo(Blocks):
    """Of two inputs, three layers of each."""

    def forward(self, x):
        return sum(layer(x).sum() + layer(x * 2).sum() for layer in self.layers)


class WrittenBetween(Blocks):
    def forward(self, x):
        x = x * 1.5
        first = [layer(x) for layer in self.layers[:2]]
        x.add_(1)
        return torch.cat([*first, *(layer(x) for layer in self.layers[2:])], -1)


class Computed(Blocks):
    def forward(self, x):
        return torch.cat([F.linear(x, layer.weight * 2, layer.bias) for layer in self.layers], -1)


@pytest.mark.parametrize("model", [Blocks(SIZES[:3]), OfTwo(SIZES[:3]), WrittenBetween(), Computed()])
def test_left_alone(model):
    check(model, torch.randn(2, 32), count=0)


def test_many_tokens_are_left_to_layers_of_their_own():
    model, held = Blocks(), derived_weights.held()
    check(model, torch.randn(16, 32), count=4)
    assert derived_weights.held() == held


@pytest.mark.parametrize("change", ["autocast", "float64"])
def test_other_dtypes_are_left_alone(change):
    model, x = Blocks(), torch.randn(2, 32)
    if change == "float64":
        model, x = model.double(), x.double()
    run, report = compiled(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
        torch.testing.assert_close(run(x), model(x))
    assert sum(graph.linears for graph in report.graphs) == 0


def test_gradients_are_those_of_each_layer():
    model, x = Blocks(), torch.randn(2, 32)
    run, report = compiled(model)
    _, ours = against_float64.gradients(model, run, x)
    model.float()
    _, plain = against_float64.gradients(model, model, x)
    assert all(a.equal(b) for a, b in zip(ours, plain, strict=True))
    assert sum(graph.linears for graph in report.graphs) == 4 * len(report.graphs)


def test_no_room(monkeypatch):
    """Each layer runs by itself where what is kept has reached its limit."""
    monkeypatch.setattr(derived_weights, "LIMIT", derived_weights.held())
    check(Blocks(), torch.randn(2, 32), count=4)


def test_changes_are_seen():
    model, x = Blocks(), torch.randn(2, 32)
    run, _ = compiled(model)
    with torch.no_grad():
        for change in (lambda p: p.mul_(2), lambda p: p.data.mul_(2), lambda p: p[0, 1].add_(1)):
            for _ in range(3):  # the third call is of the recording
                torch.testing.assert_close(run(x), model(x))
            change(model.layers[2].weight)
            torch.testing.assert_close(run(x), model(x))


@pytest.mark.slow
def test_inductor_compiles_each_layer():
    model, x = Blocks(), torch.randn(2, 32)
    run, _ = compiled(model, inductor=True)
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x))
