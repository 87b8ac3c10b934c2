"""Results written where the caller wants them: what autograd is told, and what is refused."""

import pytest
import torch

import dd_kernels as dd
from dd_kernels import backend as backends

SCHEDULE = dd.linear_schedule(50)
TABLE = dd.ddim(SCHEDULE, 10)


def q_sample(x, output, other=None, **options):
    other = torch.ones_like(x) if other is None else other
    return dd.q_sample(x, 5, SCHEDULE, other, x_t=output, **options)


def reverse_step(x, output, other=None, **options):
    return dd.reverse_step(x, torch.ones_like(x) if other is None else other, TABLE, 3, x_prev=output, **options)


OPS = pytest.mark.parametrize("op", [q_sample, reverse_step])
BACKENDS = pytest.mark.parametrize("backend", ["auto", "reference"])


@OPS
@BACKENDS
def test_a_value_that_autograd_saved_and_we_overwrote_is_an_error(op, backend):
    weight, x = torch.ones(2, 3, requires_grad=True), torch.randn(2, 3)
    loss = (weight * x).sum()
    with torch.no_grad():
        op(x, x, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@OPS
@BACKENDS
def test_another_output_is_counted_too(op, backend):
    x, output = torch.randn(2, 3), torch.empty(2, 3)
    assert op(x, output, backend=backend) is output
    assert output._version == 1
    strided = torch.empty(3, 2).mT
    assert op(x, strided, backend=backend).equal(output)
    assert strided._version == 1


@OPS
def test_in_inference_mode_there_is_nothing_to_count(op):
    with torch.inference_mode():
        x = torch.randn(2, 3)
        assert op(x, x) is x


@OPS
def test_kernels_write_a_leaf_where_no_gradient_is_recorded(op):
    """And any other output where one is; a backend that is asked for by name runs or raises."""
    if backends.unavailable("cpu") is not None:
        pytest.skip("the CPU library was not built")
    x, leaf = torch.randn(2, 3), torch.empty(2, 3, requires_grad=True)
    with torch.no_grad():
        assert op(x, leaf, backend="cpu") is leaf
    output = torch.empty(2, 3)
    assert op(x, output, backend="cpu") is output
    assert output.equal(leaf)


@OPS
@BACKENDS
def test_a_leaf_that_requires_grad_is_refused(op, backend):
    leaf = torch.randn(2, 3, requires_grad=True)
    before = leaf.detach().clone()
    for x in (leaf, torch.randn(2, 3)):
        with pytest.raises(ValueError, match=r"x_(t|prev) must not be a leaf that requires grad"):
            op(x, leaf, backend=backend)
    assert leaf.equal(before)
    with torch.no_grad():
        assert op(leaf, leaf, backend=backend) is leaf


@OPS
def test_in_place_of_a_graph_keeps_the_derivative(op):
    leaf = torch.randn(2, 3, requires_grad=True)
    expected = torch.autograd.grad(op(leaf * 2, None).sum(), leaf)
    x = leaf * 2
    assert torch.autograd.grad(op(x, x).sum(), leaf)[0].equal(expected[0])


@OPS
def test_outputs_that_overlap(op):
    storage = torch.randn(4, 3)
    x, shifted = storage[:3], storage[1:]
    before = storage.clone()
    with pytest.raises(ValueError, match=r"x_(t|prev) must be x(_start)? itself, or share no memory with the inputs"):
        op(x, shifted)
    with pytest.raises(ValueError, match="share no memory"):
        op(torch.randn(3, 3), shifted, shifted)
    with pytest.raises(ValueError, match="must not overlap itself"):
        op(torch.randn(3, 3), torch.empty(1, 3).expand(3, 3))
    with pytest.raises(ValueError, match="must not overlap itself"):
        op(torch.randn(3, 3), torch.empty(5).unfold(0, 3, 1))
    assert storage.equal(before)
    beside = torch.randn(3, 6)
    expected = op(beside[:, :3].clone(), None)
    assert op(beside[:, :3], beside[:, 3:]).equal(expected)
    same = x.view(3, 3)
    assert op(x, same).equal(op(before[:3], None))


@OPS
def test_one_sample_serves_a_batch(op):
    x, one = torch.randn(4, 3, 2, 2), torch.randn(1, 3, 2, 2)
    assert op(x, None, one).equal(op(x, None, one.expand(4, 3, 2, 2).clone()))
    assert op(x, None, one, backend="reference").equal(op(x, None, one.expand(4, 3, 2, 2).clone(), backend="reference"))
