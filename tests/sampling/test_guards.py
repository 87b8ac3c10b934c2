"""A loop over an accelerated model: guards are left out where nothing changes it, and every change is seen."""

import copy
import threading

import pytest
import torch
from networks import assert_same_network, is_same_network
from torch import nn

import dd_kernels as dd
from dd_kernels import backend as backends

pytestmark = pytest.mark.skipif(backends.unavailable("cpu") is not None, reason="the CPU library is not built")
STEPS = 12
COUNT = {"steps": 0}
CALLS = 0


def begin():
    """Sets what models count outside of themselves to 0."""
    global CALLS
    COUNT["steps"] = CALLS = 0


class Net(nn.Module):
    """A model whose Python code looks at an attribute, a module and the training mode."""

    def __init__(self):
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(4, 16), nn.Conv2d(16, 16, 3, padding=1)
        self.activation, self.scale = nn.SiLU(), 1.0

    def forward(self, x, t):
        h = self.conv(self.activation(self.norm(x)))
        return h * self.scale + (0.5 * x if self.training else x * torch.cos(t)[:, None, None, None])


class Counting(Net):
    """A model that changes an attribute of its own in every call."""

    def forward(self, x, t):
        self.scale = self.scale + 0.125
        return super().forward(x, t)


class CountingOutside(Net):
    """A model that changes what is none of its attributes in every call."""

    def forward(self, x, t):
        COUNT["steps"] += 1
        return super().forward(x, t) * (1 if COUNT["steps"] % 4 else 0.5)


class CountingGlobal(Net):
    """A model that changes a variable of its module's in every call."""

    def forward(self, x, t):
        global CALLS
        CALLS += 1
        return super().forward(x, t) * (1 if CALLS % 4 else 0.5)


class Broken(Net):
    """A model with a break of its graph."""

    def forward(self, x, t):
        h = self.norm(x)
        torch._dynamo.graph_break()
        return super().forward(h, t)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    # Threads that other tests have left, such as Inductor's, are none of a loop's.
    there = set(threading.enumerate())
    enumerate_threads = threading.enumerate
    me = threading.current_thread()
    monkeypatch.setattr(threading, "enumerate", lambda: [me, *(t for t in enumerate_threads() if t not in there)])
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def left_out(monkeypatch):
    """Counts the calls without guards."""
    calls, stance = [], torch.compiler.set_stance

    def counted(*args, **kwargs):
        calls.append(kwargs)
        return stance(*args, **kwargs)

    monkeypatch.setattr(torch.compiler, "set_stance", counted)
    return calls


TABLE = dd.ddim(dd.linear_schedule(100), steps=STEPS)


def draw(model, **options):
    return dd.sample(model, (2, 16, 8, 8), TABLE, seed=3, **options)


def pair(kind=Net):
    """Returns a model and the same accelerated."""
    model = kind().eval()
    return model, dd.accelerate(copy.deepcopy(model))[0]


def assert_same(fast, model, **options):
    begin()
    wanted = draw(model, **options)
    begin()
    assert_same_network(draw(fast, **options), wanted)


def test_guards_are_evaluated_in_two_steps(left_out):
    model, fast = pair()
    assert_same(fast, model)
    assert left_out == [{"skip_guard_eval_unsafe": True}] * (STEPS - 2)


def test_two_batches_and_two_sizes(left_out):
    model, fast = pair()
    for size in (8, 10, 8):
        shape = (3, 16, size, size)
        wanted = dd.sample(model, shape, TABLE, seed=1, batch_size=2)
        assert_same_network(dd.sample(fast, shape, TABLE, seed=1, batch_size=2), wanted)
    assert len(left_out) >= 4 * (STEPS - 2)


@pytest.mark.parametrize("kind", [Counting, CountingOutside, CountingGlobal, Broken])
def test_a_model_that_may_change_itself(kind, left_out):
    model, fast = pair(kind)
    for _ in range(2):
        assert_same(fast, model)
    assert left_out == []


def replace_parameter(model):
    model.conv.weight = nn.Parameter(torch.full_like(model.conv.weight, 0.01))


def change_parameter(model):
    model.conv.weight.data.mul_(0.5)


def replace_module(model):
    model.activation = nn.ReLU()


def change_attribute(model):
    model.scale = 0.25


CHANGES = [replace_parameter, change_parameter, replace_module, change_attribute, nn.Module.train]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_two_loops(change):
    model, fast = pair()
    assert_same(fast, model)
    before = draw(fast)
    change(model)
    change(fast)
    assert_same(fast, model)
    assert not is_same_network(draw(fast), before)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("by", ["callback", "noise"])
def test_a_change_within_a_loop(change, by, left_out):
    """By what the caller gave: guards are evaluated in every step."""
    table = dd.ddim(dd.linear_schedule(100), steps=STEPS, eta=1.0)

    def run(model):
        def change_at(index):
            if index == 5:
                change(model)

        def noise(index):
            change_at(index)
            return torch.zeros(2, 16, 8, 8)

        options = {"noise": noise} if by == "noise" else {"callback": lambda step: change_at(step.index)}
        return dd.sample(model, (2, 16, 8, 8), table, seed=3, **options)

    model, fast = pair()
    assert_same_network(run(fast), run(model))
    assert left_out == []


def test_guidance_in_an_interval_calls_the_model_in_two_ways(left_out):
    model, fast = pair()
    assert_same(fast, model, uncond_kwargs={}, guidance_scale=2.0, guidance_interval=(20, 70))
    assert left_out == []


def test_hooks_are_called_in_every_step(left_out):
    _, fast = pair()
    calls = []
    fast.norm.register_forward_hook(lambda *_: calls.append(1))
    draw(fast)
    assert len(calls) == STEPS
    assert left_out == []


def test_another_thread(left_out):
    """The switch holds for all threads: it is left alone while another runs."""
    model, fast = pair()
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        assert_same(fast, model)
    finally:
        done.set()
        thread.join()
    assert left_out == []


def test_models_that_are_not_accelerated_and_short_loops(left_out):
    model, fast = pair()
    draw(model)
    draw(lambda x, t: fast(x, t))
    dd.sample(fast, (2, 16, 8, 8), dd.ddim(dd.linear_schedule(100), steps=2), seed=0)
    draw(dd.restore(fast))
    assert left_out == []


def test_a_stance_that_forbids_compiled_graphs(left_out):
    model, fast = pair()
    draw(fast)
    left_out.clear()
    with torch.compiler.set_stance("force_eager"):
        assert_same(fast, model)
    assert left_out == [{}]
