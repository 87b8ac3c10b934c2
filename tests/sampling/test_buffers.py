"""Memory of a loop that is written again: only where nobody holds it, in whatever way."""

import weakref

import pytest
import torch
from torch import nn

import dd_kernels as dd
from dd_kernels import backend
from dd_kernels.sampling import buffers

SCHEDULE = dd.linear_schedule(100)
TABLE = dd.ddpm(SCHEDULE, 8)
SHAPE = (2, 3, 4, 4)

pytestmark = pytest.mark.skipif(backend.unavailable("cpu") is not None, reason="the pool serves the CPU library")


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch):
    monkeypatch.setattr(buffers, "_FEWEST_BYTES", 0)


class Keeper(nn.Module):
    """A model that keeps something of every x that it sees, and what its values were."""

    def __init__(self, keep):
        super().__init__()
        self.keep, self.kept, self.values, self.places = keep, [], [], []

    def forward(self, x, t):
        self.places.append(x.data_ptr())
        if self.keep is not None:
            self.kept.append(self.keep(x))
            self.values.append(x.clone())
        return torch.sin(x)


class Saves(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x)
        return w * 2

    @staticmethod
    def backward(ctx, dy):
        return None, dy


def in_a_graph(x):
    with torch.enable_grad():
        return Saves.apply(x.detach(), torch.ones(1, requires_grad=True))


# how a model keeps x, and how its values are read from what was kept
WAYS = {
    "the tensor": (lambda x: x, lambda k: k),
    "a view": (lambda x: x[:, :], lambda k: k),
    "a detached one": (lambda x: x.detach(), lambda k: k),
    "an array": (lambda x: x.numpy(), torch.from_numpy),
    "its storage": (lambda x: x.untyped_storage(), lambda k: torch.tensor([]).set_(k).view(SHAPE)),
    "a capsule": (torch.utils.dlpack.to_dlpack, torch.utils.dlpack.from_dlpack),
    "a weak reference": (weakref.ref, lambda k: k()),
    "a closure": (lambda x: lambda: x, lambda k: k()),
    "autograd's graph": (in_a_graph, lambda k: k.grad_fn.saved_tensors[0]),
    "an iterator": (lambda x: iter([x]), next),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_a_model_keeps_is_not_written_to(way):
    keep, read = WAYS[way]
    model = Keeper(keep)
    dd.sample(model, SHAPE, TABLE, seed=0)
    for kept, value in zip(model.kept, model.values, strict=True):
        found = read(kept)
        assert found is None if way == "a weak reference" and found is None else torch.equal(found, value)


def test_a_weak_reference_that_is_alive_counts():
    pool, x = buffers.Buffers(), torch.randn(SHAPE)
    pool.keep(torch.randn(SHAPE))
    name = weakref.ref(pool._kept[0])
    assert pool.free(x) is None
    del name
    assert pool.free(x) is not None


@pytest.mark.parametrize("progressive", [False, True])
def test_what_a_caller_keeps_is_not_written_to(progressive):
    steps, values = [], []

    def see(step):
        steps.append(step)
        values.append((step.x.clone(), step.x0.clone()))

    if progressive:
        for step in dd.sample_progressive(Keeper(None), SHAPE, TABLE, seed=0):
            see(step)
    else:
        dd.sample(Keeper(None), SHAPE, TABLE, seed=0, callback=see)
    for step, (x, x0) in zip(steps, values, strict=True):
        assert torch.equal(step.x, x)
        assert torch.equal(step.x0, x0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_what_nobody_keeps_is_written_again(mode, layout):
    """The start and two more places, with the same result as in fresh memory, and the start as it was."""
    with mode():
        start = torch.randn(SHAPE).to(memory_format=layout)
        before, model = start.clone(), Keeper(None)
        y = dd.sample(model, start, TABLE, seed=0)
        assert len(set(model.places)) == 3
        assert torch.equal(start, before)
        assert y.is_contiguous(memory_format=layout)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(buffers, "_FEWEST_BYTES", 1 << 60)
            assert torch.equal(y, dd.sample(model, start, TABLE, seed=0))


def test_two_loops_at_once():
    wanted = [[s.x for s in dd.sample_progressive(Keeper(None), SHAPE, TABLE, seed=n)] for n in (0, 1)]
    loops = [dd.sample_progressive(Keeper(None), SHAPE, TABLE, seed=n) for n in (0, 1)]
    for first, second, *x in zip(*loops, *wanted, strict=True):
        assert torch.equal(first.x, x[0])
        assert torch.equal(second.x, x[1])


@pytest.mark.parametrize(
    "other",
    [
        torch.empty(3, 3, 4, 4),
        torch.empty(SHAPE).bfloat16(),
        torch.empty(SHAPE, device="meta"),
        torch.empty(SHAPE).double(),
    ],
)
def test_only_what_has_the_form(other):
    pool = buffers.Buffers()
    pool.keep(torch.randn(SHAPE))
    assert pool.free(other) is None


def test_not_under_transforms_and_not_what_is_small(monkeypatch):
    x = torch.randn(SHAPE)
    pool = buffers.Buffers()
    pool.keep(torch.randn(SHAPE))
    found = []
    torch.func.vmap(lambda y: found.append(pool.free(x)) or y)(x)
    assert found == [None]
    monkeypatch.setattr(buffers, "_FEWEST_BYTES", 1 << 20)
    assert pool.free(x) is None


def test_a_tensor_of_inference_mode_stays_there():
    pool, x = buffers.Buffers(), torch.randn(SHAPE)
    with torch.inference_mode():
        pool.keep(torch.randn(SHAPE))
    assert pool.free(x) is None
