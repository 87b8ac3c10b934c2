"""Every op in every way that PyTorch calls an op."""

import contextlib

import pytest
import torch
from op_table import BY_REFERENCE, LAYOUTS, ROWS, SCHEDULE, TABLE, WAYS, double, grad, gradgrad
from torch._dynamo.testing import CompileCounter

import dd_kernels as dd
from dd_kernels import backend as backends

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DERIVATIVES = (*BY_REFERENCE, grad, gradgrad)


def run(row, backend, dtype, layout, way):
    way(ROWS[row], backend, ROWS[row].inputs(dtype, layout))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("row", ROWS)
def test_ways(row, way):
    """Runs every way in float32 and the usual layout, on the backend that auto takes."""
    run(row, "auto", torch.float32, "contiguous", way)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row", ROWS)
def test_dtypes_and_layouts(row, dtype, layout):
    run(row, "auto", dtype, layout, WAYS[0])


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("row", ROWS)
def test_all(row, backend, dtype, layout, way):
    """The whole product. A kernel that is asked for by name runs, or says why the reference is what serves."""
    by_reference = backend == "cpu" and (dtype == torch.float64 or way in DERIVATIVES)
    refusals = (dd.BackendUnavailableError, torch._dynamo.exc.Unsupported) if by_reference else ()
    with contextlib.suppress(*refusals):
        run(row, backend, dtype, layout, way)


@pytest.mark.parametrize("row", [name for name in ROWS if name != "conv2d"])
def test_second_derivatives_by_finite_differences(row):
    row = ROWS[row]
    leaves = tuple(v.requires_grad_() for v in double(row.inputs()))
    assert torch.autograd.gradcheck(lambda *v: row.call("auto", *v), leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *v: row.call("auto", *v), leaves, fast_mode=True)


@pytest.mark.parametrize("row", ["q_sample", "reverse_step"])
@pytest.mark.parametrize("way", BY_REFERENCE, ids=lambda way: way.__name__)
def test_kernels_asked_for_by_name_refuse_transforms(row, way):
    if backends.unavailable("cpu") is not None:
        pytest.skip(backends.unavailable("cpu"))
    with pytest.raises(dd.BackendUnavailableError, match=r"transform|forward-mode"):
        run(row, "cpu", torch.float32, "contiguous", way)


DRAWN = {
    "q_sample": lambda x: dd.q_sample(x, 5, SCHEDULE, seed=1),
    "reverse_step": lambda x: dd.reverse_step(x, x, TABLE, 3, seed=1),
    "randn": lambda x: x + dd.randn(x.shape, seed=1),
}


@pytest.mark.parametrize("op", DRAWN)
def test_batches_of_any_size_are_compiled_once(op):
    counter = CompileCounter()
    torch.compiler.reset()
    function = torch.compile(DRAWN[op], fullgraph=True, backend=counter, dynamic=True)
    for size in (7, 5, 9):  # a first size equal to another dimension would be taken for the same number
        x = torch.randn(size, 3, 4, 4)
        assert function(x).equal(DRAWN[op](x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("op", ["q_sample", "reverse_step"])
def test_a_symbolic_trace_is_refused_in_one_line(op):
    with pytest.raises(TypeError, match=r"(x_start|x) must be a torch.Tensor; got Proxy"):
        torch.fx.symbolic_trace(DRAWN[op])
