"""What the tests of convolutions and of linear layers share: a compiled model beside itself in float64."""

from __future__ import annotations

from typing import Any

import torch
from networks import assert_same_network
from torch import Tensor, nn

from dd_kernels.compile import Report
from dd_kernels.compile import dd_kernels as dynamo_backend


def compiled(model: Any, dynamic: bool | None = None, **options: Any) -> tuple[Any, Report]:
    """Returns the compiled model and its report."""
    report = Report()
    return torch.compile(model, backend=dynamo_backend, options={"report": report, **options}, dynamic=dynamic), report


def check(kind: str, model: nn.Module, *inputs: Tensor, count: int, **options: Any) -> Tensor:
    """Compares the compiled model with the same in float64, and with the model itself in shape and layout.

    Args:
        kind: what the report counts, "convolutions" or "linears".
        count: how many of them are ours.
    """
    run, report = compiled(model, **options)
    with torch.no_grad():
        plain, actual = model(*inputs), run(*inputs)
        exact = model.double()(*(x.double() for x in inputs))
    model.float()
    assert sum(getattr(graph, kind) for graph in report.graphs) == count
    assert actual.stride() == plain.stride()
    assert_same_network(actual, exact)
    result: Tensor = actual
    return result


def gradients(model, run, x):
    """Returns the gradients of a weighted sum by every parameter: in float64, and of the compiled model as x is.

    Those in float64 are of a contiguous x: PyTorch's norm crashes on float64 in channels_last.
    """
    found = []
    for function, given in ((model, x.double().contiguous()), (run, x)):
        model.to(given.dtype)
        model.zero_grad()
        y = function(given)
        (y * torch.linspace(-1, 1, y.numel(), dtype=x.dtype).view_as(y)).sum().backward()
        found.append([p.grad.double() for p in model.parameters()])
    return found


def check_gradients(model, run, x):
    """Compares what :func:`gradients` returns, by the largest of all, as that of an attention's keys' bias is 0."""
    exact, actual = gradients(model, run, x)
    largest = max(one.abs().max() for one in exact)
    for one, other in zip(exact, actual, strict=True):
        assert (other - one).abs().max() <= 1e-5 * largest
    return exact, actual
