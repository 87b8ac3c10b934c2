"""The memory that a graph keeps: the same bits, nothing of the caller's, within the limit, gone with the model."""

import copy
import gc
import threading

import pytest
import torch
import torch.nn.functional as F
from networks import assert_same_network
from torch import nn

import dd_kernels as dd
from dd_kernels import backend as backends
from dd_kernels.compile import dd_kernels as dynamo_backend
from dd_kernels.compile import memory, workspace
from dd_kernels.compile.concatenation import replace_concatenations

pytestmark = pytest.mark.skipif(backends.unavailable("cpu") is not None, reason="the CPU library is not built")

ONE = 4 * 32 * 64 * 64  # bytes of an image within the model


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch):
    monkeypatch.setattr(memory, "_all", type(memory._all)())


class Model(nn.Module):
    """Residual blocks and a concatenation, whose large results are all of one size but for the last."""

    def __init__(self):
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(32, 32, 3, padding=1) for _ in range(4))
        self.norms = nn.ModuleList(nn.GroupNorm(4, 32) for _ in range(4))
        self.last = nn.Conv2d(64, 1, 1)

    def forward(self, x):
        h = first = F.silu(self.norms[0](self.convolutions[0](x)))
        for norm, convolution in zip(self.norms[1:], self.convolutions[1:], strict=True):
            h = h + convolution(F.silu(norm(h)))
        return self.last(torch.cat([h, first], 1))


class Returning(Model):
    """Returns results within it too: as they are, as a view and in a list that a caller gave."""

    def forward(self, x, seen=None):
        h = self.convolutions[0](x)
        other = self.convolutions[1](h)
        if seen is not None:
            seen.append(self.convolutions[2](other))
        return h, other[:, 1:], self.convolutions[3](other).sum()


def compiled(model):
    return torch.compile(model, backend=dynamo_backend, dynamic=False)


def image(n=1):
    return torch.randn(n, 32, 64, 64)


def allocated(call):
    """Returns the sizes of the large allocations of a call."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    return [e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() >= workspace.LEAST]


@torch.inference_mode()
def test_later_calls_allocate_nothing_large():
    model, x = Model(), image()
    run = compiled(model)
    wanted = model(x)
    assert len(allocated(lambda: model(x))) > 8
    first = run(x)
    assert run(x).equal(first)
    kept = memory.held()
    assert kept >= 3 * ONE
    assert allocated(lambda: run(x)) == []
    assert run(x).equal(first)
    assert memory.held() == kept
    assert_same_network(first, wanted)


@torch.no_grad()
def test_what_is_returned_is_the_callers():
    run, seen = compiled(Returning()), []
    x = image().contiguous(memory_format=torch.channels_last)  # in which results are returned as they are
    returned = [*run(x, seen), *seen]
    copies = [y.clone() for y in returned]
    kept = {one.data_ptr() for each in memory._all for same in each._storages.values() for one in same}
    assert kept
    assert not kept & {y.untyped_storage().data_ptr() for y in returned}
    for _ in range(3):
        run(x + 1, [])
    assert all(y.equal(was) for y, was in zip(returned, copies, strict=True))
    assert not returned[0]._is_view()


@torch.no_grad()
def test_another_size_takes_the_place_of_the_first():
    run = compiled(Model())
    run(image())
    one = memory.held()
    run(image(2))
    torch._dynamo.mark_dynamic(x := image(3), 0)
    run(x)
    dynamic = max(each.held for each in memory._all)
    run(image(5))
    assert max(each.held for each in memory._all) == dynamic // 3 * 5
    assert one * 3 == dynamic


@torch.no_grad()
def test_no_more_than_the_limit(monkeypatch):
    monkeypatch.setattr(memory, "LIMIT", 2 * ONE)
    model, x = Model(), image()
    run = compiled(model)
    for _ in range(2):
        assert_same_network(run(x), model(x))
    assert 0 < memory.held() <= 2 * ONE


def test_a_gradient_is_of_results_that_no_other_call_writes_to():
    model, x = Model(), image().requires_grad_()
    run = compiled(model)
    with torch.no_grad():
        run(x)
    first = run(x)
    with torch.no_grad():
        run(image())
    (found,) = torch.autograd.grad(first.sum(), x)
    (wanted,) = torch.autograd.grad(model(x).sum(), x)
    assert_same_network(found, wanted)


@torch.no_grad()
def test_a_call_that_fails_keeps_nothing_in_use():
    model = Model()
    each = workspace.Workspace()

    def fail(x):
        raise ValueError(str(workspace.empty_like(x).shape))

    with pytest.raises(ValueError, match="64"):
        each.run(fail, (image(),))
    assert not workspace.is_running()
    assert each.run(lambda x: workspace.empty_like(x).fill_(1).sum(), (image(),)) == ONE // 4
    assert compiled(model)(image()).shape == (1, 1, 64, 64)


@torch.no_grad()
def test_threads_have_memory_of_their_own():
    each, x, together = workspace.Workspace(), image(), threading.Barrier(2)
    found = {}

    def call(value):
        y = workspace.empty_like(x).fill_(value)
        together.wait(60)
        return y.unique().tolist()

    def work(value):
        with torch.no_grad():
            found[value] = each.run(call, (value,))

    threads = [threading.Thread(target=work, args=(value,)) for value in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {1: [1], 2: [2]}
    assert each.held == ONE


def test_it_goes_with_the_model_and_the_report_tells():
    model, report = dd.accelerate(Model())
    with torch.no_grad():
        model(image())
        assert "MiB of results within graphs kept, of 1024 at most" in str(report)
        copy.deepcopy(dd.restore(model))(image())
    assert memory.held() > 0
    del model
    gc.collect()
    assert memory.held() == 0


@torch.no_grad()
def test_a_concatenation_of_what_a_call_returns_as_a_list_stays():
    graph, x = torch.fx.Graph(), image()
    joined = graph.call_function(torch.cat, (graph.call_method("split", (graph.placeholder("x"), 1)), 1))
    joined.meta["example_value"] = x
    graph.output(joined)
    module = torch.fx.GraphModule(nn.Module(), graph)
    replace_concatenations(module.graph)
    module.recompile()
    assert module(x).equal(x)
