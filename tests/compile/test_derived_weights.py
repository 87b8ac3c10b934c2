"""Linear layers as one: the weights, changes of either, inference mode, and when memory is given back."""

import gc

import pytest
import torch
from torch import nn

from dd_kernels import backend as backends
from dd_kernels.compile import dd_kernels as dynamo_backend
from dd_kernels.compile import derived_weights, kept_filters
from dd_kernels.compile.derived_weights import Layer, folded, stacked

pytestmark = pytest.mark.skipif(backends.unavailable("cpu") is not None, reason="the CPU library is not built")


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch):
    monkeypatch.setattr(derived_weights, "_derived", {})


def layers(inputs=5, inner=7, outputs=6, bias=True):
    return nn.Linear(inputs, inner, bias=bias), nn.Linear(inner, outputs, bias=bias)


def fold(first, second):
    with torch.no_grad():
        return folded(Layer(first.weight, first.bias), Layer(second.weight, second.bias))


def exact(first, second):
    """Returns the weight and bias of both layers in float64."""
    weight, bias = second.weight.double() @ first.weight.double(), torch.zeros(second.out_features).double()
    if first.bias is not None:
        bias = second.weight.double() @ first.bias.double() + second.bias
    return weight.detach(), bias.detach()


def assert_folded(first, second):
    """Both are the exact ones rounded once."""
    for actual, wanted in zip(fold(first, second), exact(first, second), strict=True):
        assert ((actual - wanted).abs() <= 2**-24 * 1.001 * wanted.abs() + 2**-149).all()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(5, 7, 6), (9, 4, 6), (4, 4, 4), (1, 3, 1)])
def test_weights(sizes, bias):
    assert_folded(*layers(*sizes, bias=bias))


def test_a_transposed_second_layer():
    first, second = nn.Linear(5, 7), nn.Linear(6, 7, bias=False)
    with torch.no_grad():
        weight, bias = folded(Layer(first.weight, first.bias), Layer(second.weight, None), transposed=True)
        torch.testing.assert_close(weight, second.weight.t() @ first.weight)
        torch.testing.assert_close(bias, second.weight.t() @ first.bias)


CHANGES = {
    "in place": lambda p: p.mul_(2),
    "one element": lambda p: p.view(-1)[1].add_(1),  # which no diagonal has
    "through .data": lambda p: p.data.mul_(2),
    ".data replaced": lambda p: setattr(p, "data", p.data * 2),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_change_is_seen(name, index, change):
    both = layers()
    before = [value.clone() for value in fold(*both)]
    with torch.no_grad():
        CHANGES[change](getattr(both[index], name))
    assert_folded(*both)
    assert not all(a.equal(b) for a, b in zip(before, fold(*both), strict=True))
    assert len(derived_weights._derived) == 1


def test_a_recorded_graph_sees_changes_through_data():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))

        def forward(self, x):
            q, k, v = (layer(x)[:, None] for layer in (self.q, self.k, self.v))
            return self.out(nn.functional.scaled_dot_product_attention(q, k, v)[:, 0])

    model, x = Attention(), torch.randn(2, 20, 32)
    run = torch.compile(model, backend=dynamo_backend)
    with torch.no_grad():
        for layer in (model.q, model.k, model.v, model.out):
            for _ in range(3):
                torch.testing.assert_close(run(x), model(x))
            layer.weight.data.mul_(1.5)
            torch.testing.assert_close(run(x), model(x))


def test_weights_that_are_nan():
    first, second = layers()
    with torch.no_grad():
        first.weight[0, 0] = torch.nan
        weight, _ = fold(first, second)
        assert weight[:, 0].isnan().all()
        first.weight.data[0, 0] = 1
        assert_folded(first, second)


def test_another_shape_of_the_same_parameter():
    first, second = layers()
    fold(first, second)
    first.weight.data = torch.randn(7, 8)
    assert_folded(first, second)
    assert len(derived_weights._derived) == 1


def test_made_in_inference_mode_and_changed_out_of_it():
    first, second = layers()
    with torch.inference_mode():
        fold(first, second)
    with torch.no_grad():
        first.weight.mul_(2)
    assert_folded(first, second)


def test_what_is_not_kept():
    (first, second), held = layers(), derived_weights.held()
    with torch.no_grad():
        assert folded(Layer(first.weight * 2, first.bias), Layer(second.weight, None)) is None
        assert folded(Layer(first.weight, first.bias), Layer(second.weight * 2, None)) is None
        assert stacked([Layer(first.weight, None), Layer(first.weight * 2, None)]) is None
    with torch.inference_mode():  # parameters that are made in it count no versions
        assert fold(*layers()) is None
    assert derived_weights.held() == held == 0


def test_no_more_than_the_limit(monkeypatch):
    first, second = layers()
    assert fold(first, second) is not None
    monkeypatch.setattr(derived_weights, "LIMIT", 2 * derived_weights.held() - 1)
    assert fold(*layers()) is None
    assert fold(first, second) is not None


@pytest.mark.parametrize("index", [0, 1])
def test_it_goes_with_either_layer(index):
    both = list(layers())
    fold(*both)
    assert derived_weights.held() == 4 * (6 * 5 + 6 + 5 + 6 + 7 + 6)
    del both[index]
    gc.collect()
    assert derived_weights.held() == 0


def test_parameters_that_take_the_ids_of_others_are_not_forgotten():
    both, gone = layers(), layers()
    fold(*both)
    (key,) = derived_weights._derived
    fold(*gone)
    stale = next(one for one in derived_weights._derived.values() if one.owners[0]() is gone[0].weight)
    derived_weights._derived[key] = stale
    assert_folded(*both)
    for owner in stale.owners:
        derived_weights._forget(key, owner)
    assert derived_weights._derived[key].owners[0]() is both[0].weight


def of(linears):
    return [Layer(linear.weight, linear.bias) for linear in linears]


def side_by_side():
    return [nn.Linear(5, 7), nn.Linear(5, 3, bias=False), nn.Linear(5, 5)]


def assert_stacked(linears):
    with torch.no_grad():
        weight, bias = stacked(of(linears))
    assert weight.equal(torch.cat([linear.weight for linear in linears]))
    biases = [torch.zeros(linear.out_features) if linear.bias is None else linear.bias for linear in linears]
    assert bias.equal(torch.cat(biases))


def test_layers_side_by_side():
    linears = side_by_side()
    assert_stacked(linears)
    assert_stacked(linears[:2])
    assert_stacked(linears[::-1])
    assert derived_weights.held() == 4 * (2 * (75 + 15 + 25) + 50 + 10 + 15)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_change_of_one_side_by_side_is_seen(name, index, change):
    linears = side_by_side()
    assert_stacked(linears)
    with torch.no_grad():
        if (changed := getattr(linears[index], name)) is not None:
            CHANGES[change](changed)
    assert_stacked(linears)


def test_none_side_by_side_that_could_not_be_kept_packed(monkeypatch):
    linears, others = side_by_side(), side_by_side()
    assert_stacked(linears)
    monkeypatch.setattr(kept_filters, "LIMIT", kept_filters.held() + 4 * 15 * 5 - 1)
    assert stacked(of(others)) is None
    assert_stacked(linears)
    monkeypatch.setattr(kept_filters, "LIMIT", kept_filters.LIMIT + 1)
    assert_stacked(others)


@pytest.mark.parametrize("bias", [True, False])
def test_the_operators(bias):
    first, second = layers(bias=bias)
    given = [v if v is None else v.detach() for v in (first.weight, first.bias, second.weight, second.bias)]
    made = torch.full((5 + 6 + 13 * bias,), torch.nan), torch.zeros(6, 5), torch.zeros(6)
    torch.library.opcheck(torch.ops.dd_kernels.fold.default, (*given, *made))
    linears = [Layer(*given[:2]), Layer(torch.randn(2, 5), None)]
    made = torch.full((5 + 2 + 7 * bias,), torch.nan), torch.zeros(9, 5), torch.zeros(9)
    torch.library.opcheck(torch.ops.dd_kernels.stack.default, (*map(list, zip(*linears, strict=True)), *made))
