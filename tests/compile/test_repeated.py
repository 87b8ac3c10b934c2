"""The rewrite of repeated calls: where they are made once, and where they must not be."""

import pytest
import torch
import torch.nn.functional as F
from bounds import assert_within, gamma
from group_norm_bounds import activation_errors
from running_error import FUNCTION

from dd_kernels.compile import Report
from dd_kernels.ops.activation import Activation


def blocks(x, e):
    return x * F.silu(e) + F.silu(e).cos()


def written_out(x, e):
    return x * (e * torch.sigmoid(e)) + (e * torch.sigmoid(e)).cos()


def of_others(x, e):
    return F.silu(x) + F.silu(e) + F.gelu(e) + F.gelu(e, approximate="tanh")


def source_written(x, e):
    e = e * 2
    first = F.silu(e)
    e.add_(1)
    return first + F.silu(e)


def view_of_source_written(x, e):
    e = e * 2
    first = F.silu(e)
    e.view(-1).add_(1)
    return first + F.silu(e)


def result_written(x, e):
    first, second = F.silu(e), F.silu(e)
    first.add_(1)
    return first + second


def in_place(x, e):
    e = e * 2
    return F.silu(e, inplace=True) + F.silu(e, inplace=True)


def returned(x, e):
    return F.silu(e), F.silu(e)


def of_another_precision(x, e):
    with torch.autocast("cpu", torch.bfloat16):
        low = torch.mm(e, e.T)
        first = F.silu(low)
    return first.float() + F.silu(low.float())


CASES = {
    "silu in each block": (blocks, 1),
    "written out": (written_out, 2),
    "other arguments": (of_others, 0),
    "source written": (source_written, 0),
    "view of the source written": (view_of_source_written, 0),
    "result written": (result_written, 0),
    "in place": (in_place, 0),
    "returned": (returned, 0),
    "another precision": (of_another_precision, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_repeated(case):
    function, removed = CASES[case]
    report = Report()
    x, e = torch.randn(4, 5), torch.randn(4, 5)
    fast = torch.compile(function, backend="dd_kernels", options={"report": report})
    actual, wanted = fast(x, e), function(x, e)
    assert all(map(torch.equal, *((v if isinstance(v, tuple) else (v,)) for v in (actual, wanted))))
    assert report.graphs[0].identities == removed
    if isinstance(actual, tuple):
        assert actual[0].data_ptr() != actual[1].data_ptr()


def test_gradients_of_a_shared_call():
    x, e = torch.randn(4, 5), torch.randn(4, 5, requires_grad=True)
    wide, x64 = e.detach().double().requires_grad_(), x.double()
    (exact,) = torch.autograd.grad(blocks(x64, wide).sum(), wide)
    silu = F.silu(wide).detach()
    (slope,) = torch.autograd.grad(F.silu(wide).sum(), wide)
    e_silu, e_slope = activation_errors(wide.detach(), Activation.SILU, False)
    # (x - sin(silu(e))) silu'(e), as one product or two, of which three operations round, and the sine.
    size = x64.abs() + silu.sin().abs()
    error = size * e_slope + (gamma(3) * size + FUNCTION * silu.sin().abs() + e_silu) * (slope.abs() + e_slope)
    for function in (blocks, torch.compile(blocks, backend="dd_kernels")):
        (gradient,) = torch.autograd.grad(function(x, e).sum(), e)
        assert_within(gradient, exact, error)


def test_a_call_without_gradient_is_not_shared():
    def function(e):
        with torch.no_grad():
            first = F.silu(e)
        return first * F.silu(e)

    e = torch.randn(4, 5, requires_grad=True)
    (wanted,) = torch.autograd.grad(function(e).sum(), e)
    (actual,) = torch.autograd.grad(torch.compile(function, backend="dd_kernels")(e).sum(), e)
    assert torch.equal(actual, wanted)
