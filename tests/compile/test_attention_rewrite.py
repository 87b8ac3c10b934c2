"""The rewrite of attention: where it applies, where it must not; results, gradients, layout of the result."""

from functools import partial

import against_float64
import pytest
import torch
import torch.nn.functional as F
from against_float64 import compiled
from torch import nn

from dd_kernels import backend as backends
from dd_kernels.compile import memory
from dd_kernels.ops import attention

pytestmark = pytest.mark.skipif(backends.unavailable("cpu") is not None, reason="the CPU library is not built")
Q, K, V = (torch.randn(2, n, 3, 8).transpose(1, 2) for n in (10, 7, 7))
MASK = torch.ones(10, 7, dtype=torch.bool)


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def attentions(report):
    return sum(graph.attentions for graph in report.graphs)


check = partial(against_float64.check, "attentions")


@pytest.mark.parametrize(
    "function",
    [
        F.scaled_dot_product_attention,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, None, 0.0, False, scale=0.3),
        lambda q, k, v: F.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=None, dropout_p=0.0) * 2,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 10, 24) + 1,
        lambda q, k, v: F.scaled_dot_product_attention(q[:, :, 1:], k[:, :, ::2], v[:, :, ::2]),
        lambda q, k, v: F.scaled_dot_product_attention(q[:, :1], k[:, :1], v[:, :1]),
    ],
)
def test_replaced(function):
    check(Function(function), Q, K, V, count=1)


@pytest.mark.parametrize(
    "function",
    [
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, MASK),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True),
        lambda q, k, v: F.scaled_dot_product_attention(q, k[:1], v[:1]),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=-0.3),
        lambda q, k, v: F.scaled_dot_product_attention(q[0], k[0], v[0]),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v.mT.contiguous().mT),  # its result lies otherwise
    ],
)
def test_left_alone(function):
    check(Function(function), Q, K, V, count=0)


def test_dropout_is_left_alone():
    run, report = compiled(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.5))
    run(Q, K, V)
    assert attentions(report) == 0


def test_the_kernel_runs_where_no_gradient_is_asked_for():
    run, report = compiled(F.scaled_dot_product_attention)
    leaves = [x.detach().clone().requires_grad_() for x in (Q, K, V)]
    gradients = torch.autograd.grad(run(*leaves).square().sum(), leaves)
    plain = torch.autograd.grad(F.scaled_dot_product_attention(*leaves).square().sum(), leaves)
    assert all(a.equal(b) for a, b in zip(gradients, plain, strict=True))
    with torch.no_grad():
        assert run(Q, K, V).equal(attention(Q, K, V))
    assert attentions(report) == len(report.graphs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_16_bits(dtype):
    """A model in bfloat16 multiplies in it; others multiply in float32, unless told so."""
    small = [x.to(dtype) for x in (Q, K, V)]
    with torch.no_grad():
        run, report = compiled(F.scaled_dot_product_attention)
        products = "bfloat16" if dtype == torch.bfloat16 else "float32"
        assert run(*small).equal(attention(*small, products=products))
        run, report = compiled(F.scaled_dot_product_attention, dtype="bfloat16")
        assert run(Q, K, V).equal(attention(Q, K, V, products="bfloat16"))
        assert attentions(report) == 1


def test_autocast_is_left_alone():
    run, report = compiled(F.scaled_dot_product_attention)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert run(Q, K, V).dtype == torch.bfloat16
    assert attentions(report) == 0


def test_any_number_of_samples_and_tokens():
    run, report = compiled(F.scaled_dot_product_attention, dynamic=True)
    with torch.no_grad():
        for n, tokens in ((2, 10), (3, 40), (5, 7)):
            q, k, v = (torch.randn(n, tokens, 3, 8).transpose(1, 2) for _ in range(3))
            assert run(q, k, v).equal(attention(q, k, v))
    assert len(report.graphs) == 1
    assert attentions(report) == 1


def test_large_results_within_a_graph_are_written_to_kept_memory():
    q, k, v = (torch.randn(2, 512, 4, 32).transpose(1, 2) for _ in range(3))
    before = memory.held()
    run, _ = compiled(lambda q, k, v: F.scaled_dot_product_attention(q, k, v).sum())
    with torch.no_grad():
        run(q, k, v)
    assert memory.held() - before == q.nbytes
