"""The rewrite of repeated calls: where they are made once, and where they must not be."""

import pytest
import torch
import torch.nn.functional as F

from dd_kernels.compile import Report


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
    torch.testing.assert_close(actual, wanted)
    assert report.graphs[0].identities == removed
    if isinstance(actual, tuple):
        assert actual[0].data_ptr() != actual[1].data_ptr()


def test_gradients_of_a_shared_call():
    x, e = torch.randn(4, 5), torch.randn(4, 5, requires_grad=True)
    (wanted,) = torch.autograd.grad(blocks(x, e).sum(), e)
    (actual,) = torch.autograd.grad(torch.compile(blocks, backend="dd_kernels")(x, e).sum(), e)
    torch.testing.assert_close(actual, wanted)


def test_a_call_without_gradient_is_not_shared():
    def function(e):
        with torch.no_grad():
            first = F.silu(e)
        return first * F.silu(e)

    e = torch.randn(4, 5, requires_grad=True)
    (wanted,) = torch.autograd.grad(function(e).sum(), e)
    (actual,) = torch.autograd.grad(torch.compile(function, backend="dd_kernels")(e).sum(), e)
    torch.testing.assert_close(actual, wanted)
