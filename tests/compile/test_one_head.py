"""The rewrite of attention of one head: where it applies, where it must not; results, gradients and layouts."""

from functools import partial

import against_float64
import pytest
import torch
import torch.nn.functional as F
from against_float64 import compiled
from torch import nn

import dd_kernels as dd
from dd_kernels import backend as backends
from dd_kernels.compile import capture, derived_weights

pytestmark = pytest.mark.skipif(backends.unavailable("cpu") is not None, reason="the CPU library is not built")
check = partial(against_float64.check, "one_heads")
TOKENS, CONTEXT = torch.randn(2, 20, 32), torch.randn(2, 17, 24)


class Attention(nn.Module):
    """Attention of ``heads`` heads from x to a context, x itself unless another is given."""

    def __init__(self, channels=32, of=None, inner=32, heads=1, bias=True, scale=None):
        super().__init__()
        of = channels if of is None else of
        self.heads, self.scale = heads, scale
        self.q = nn.Linear(channels, inner, bias=bias)
        self.k, self.v = (nn.Linear(of, inner, bias=bias) for _ in range(2))
        self.out = nn.Linear(inner, channels, bias=bias)

    def split(self, tokens):
        return tokens.view(tokens.shape[0], -1, self.heads, tokens.shape[2] // self.heads).transpose(1, 2)

    def joined(self, heads):
        return heads.transpose(1, 2).reshape(heads.shape[0], -1, heads.shape[1] * heads.shape[3])

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, scale=self.scale)

    def forward(self, x, context=None):
        context = x if context is None else context
        q, k, v = self.split(self.q(x)), self.split(self.k(context)), self.split(self.v(context))
        return self.out(self.joined(self.attend(q, k, v)))


class Residual(Attention):
    def forward(self, x):
        return super().forward(x) + x


class OfAMap(Attention):
    """diffusers': tokens of a normalised map."""

    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(4, 32)

    def forward(self, x):
        tokens = self.norm(x.flatten(2)).transpose(1, 2)
        return super().forward(tokens).transpose(1, 2).reshape(x.shape) + x


class Unsqueezed(Attention):
    def split(self, tokens):
        return tokens[:, None]

    def joined(self, heads):
        return heads[:, 0]


@pytest.mark.parametrize("kind", [Attention, Residual, Unsqueezed])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"scale": 0.3}, {"inner": 48}])
def test_replaced(kind, options):
    check(kind(**options), TOKENS, count=1)


def test_high_accuracy():
    check(Residual(), TOKENS, count=1, accuracy="high")


def test_to_a_context():
    check(Attention(of=24), TOKENS, CONTEXT, count=1)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_of_a_map(layout):
    check(OfAMap(), torch.randn(2, 32, 6, 5).contiguous(memory_format=layout), count=1)


def test_keys_that_are_shifted_alike_count_for_nothing():
    """A bias of keys adds the same to all scores of a query, which softmax does not see."""
    model = Attention()
    run, _ = compiled(model)
    with torch.no_grad():
        before = run(TOKENS)
        model.k.bias.add_(3)
        assert run(TOKENS).equal(before)


class TwoContexts(Attention):
    def forward(self, x):
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x + 1))
        return self.out(self.joined(self.attend(q, k, v)))


class Scrambled(Attention):
    """Reads a layer's result as tokens in another order."""

    def split(self, tokens):
        return tokens.transpose(1, 2).reshape(tokens.shape[0], 1, -1, tokens.shape[2])


class ScrambledAfter(Attention):
    def joined(self, heads):
        return heads[:, 0].transpose(1, 2).reshape(heads.shape[0], -1, heads.shape[3])


class Transposed(Attention):
    """Reads the channels of as many tokens as tokens."""

    def split(self, tokens):
        return tokens.mT[:, None]


class Activated(Attention):
    def joined(self, heads):
        return super().joined(F.silu(heads))


class ReadTwice(Attention):
    def attend(self, q, k, v):
        y = super().attend(q, k, v)
        return y * y.mean()


class WrittenTo(Attention):
    """Writes to x after the layers have read it."""

    def forward(self, x):
        x = x * 1.5
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        x.add_(1)
        return self.out(self.joined(self.attend(q, k, v))) + x.mean()


class Masked(Attention):
    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize("kind", [TwoContexts, Scrambled, ScrambledAfter, Activated, ReadTwice, WrittenTo, Masked])
def test_left_alone(kind):
    check(kind(), TOKENS, count=0)


def test_tokens_that_are_channels_are_left_alone():
    check(Transposed(), torch.randn(2, 32, 32), count=0)


@pytest.mark.parametrize("options", [{"heads": 2}, {"inner": 16}])
def test_heads_that_are_narrower_are_left_alone(options):
    check(Attention(**options), TOKENS, count=0)


def test_a_layer_that_others_read_stays():
    class Model(Attention):
        def forward(self, x):
            return super().forward(x) + self.k(x)

    check(Model(), TOKENS, count=1)


def test_gradients_are_those_of_each_layer(monkeypatch):
    model = Attention()
    run, report = compiled(model)
    _, folded = against_float64.check_gradients(model, run, TOKENS)
    assert sum(graph.one_heads for graph in report.graphs) == len(report.graphs)
    monkeypatch.setattr(capture, "fold_one_heads", lambda graph, numbers: 0)
    torch._dynamo.reset()
    run, report = compiled(model.float())
    _, apart = against_float64.check_gradients(model, run, TOKENS)
    assert sum(graph.one_heads for graph in report.graphs) == 0
    assert all(a.equal(b) for a, b in zip(folded, apart, strict=True))
    assert len(folded) == 8


def test_weights_that_are_computed_are_multiplied_in_turn():
    model = Attention()
    held = derived_weights.held()
    run, report = compiled(lambda x, scale: torch.func.functional_call(model, {"q.weight": model.q.weight * scale}, x))
    with torch.no_grad():
        wanted = model(TOKENS)
        model.q.weight.mul_(2)
        torch.testing.assert_close(run(TOKENS, torch.tensor(0.5)), wanted)
    assert sum(graph.one_heads for graph in report.graphs) == 1
    assert derived_weights.held() == held


def test_no_room(monkeypatch):
    """The layers are multiplied in turn where what is kept has reached its limit."""
    monkeypatch.setattr(derived_weights, "LIMIT", derived_weights.held())
    check(Attention(), TOKENS, count=1)


def test_products_of_bfloat16():
    """One weight is rounded in place of two."""
    model = Attention()
    run, report = compiled(model, dtype="bfloat16")
    with torch.no_grad():
        exact = model.double()(TOKENS.double())
        model.float()
        actual = run(TOKENS)
        half = model.bfloat16()(TOKENS.bfloat16())
    assert sum(graph.one_heads for graph in report.graphs) == 1
    assert (actual - exact).square().mean() < (half - exact).square().mean()


def test_any_number_of_samples_and_tokens():
    model = Attention()
    run, report = compiled(model, dynamic=True)
    with torch.no_grad():
        for n, tokens in ((2, 20), (3, 40), (5, 17)):
            x = torch.randn(n, tokens, 32)
            torch.testing.assert_close(run(x), model(x))
    assert [graph.one_heads for graph in report.graphs] == [1]


@pytest.mark.slow
def test_inductor_compiles_each_layer():
    model = Attention()
    run, _ = compiled(model, inductor=True)
    with torch.no_grad():
        torch.testing.assert_close(run(TOKENS), model(TOKENS))


def test_the_report_tells():
    model, report = dd.accelerate(Attention(channels=640, inner=640))
    with torch.no_grad():
        model(torch.randn(1, 20, 640))
    assert "1 attentions of one head by our kernel, two linear layers in place of four" in str(report)
    assert "3 MiB of derived weights kept, of 64 at most" in str(report)
