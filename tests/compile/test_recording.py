"""Recordings of a graph's operators: the same bits, results of the caller's, and as it is wherever that is not so."""

import copy
import gc
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dd_kernels as dd
from dd_kernels import backend as backends
from dd_kernels.compile import memory, recording, workspace
from dd_kernels.compile.places import WRITES
from dd_kernels.compile.recording import FORMS, Recordings

pytestmark = pytest.mark.skipif(backends.unavailable("cpu") is not None, reason="the CPU library is not built")


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch):
    monkeypatch.setattr(memory, "_all", type(memory._all)())


class Recorded:
    """A function of tensors by recordings, whose notes and calls as it is can be looked at."""

    def __init__(self, function, *args):
        graph = fx.Graph()
        given = [graph.placeholder(f"arg{i}") for i in range(len(args))]
        graph.output(graph.call_function(function, tuple(given)))
        self.notes, self.calls = [], 0
        self.recordings = Recordings(fx.GraphModule(nn.Module(), graph), self.notes)
        call = self.recordings._call

        def counted(*values):
            self.calls += 1
            return call(*values)

        self.recordings._call = counted

    def __call__(self, *args):
        return self.recordings.run(*args)


def assert_bits(found, wanted):
    assert len(found) == len(wanted)
    for y, right in zip(found, wanted, strict=True):
        assert (y.dtype, y.shape, y.stride()) == (right.dtype, right.shape, right.stride())
        assert y.requires_grad == right.requires_grad
        assert y.equal(right)


def parameter(*size):
    return nn.Parameter(torch.randn(size))


FUNCTIONS = {
    "sums": lambda x: (x + 1, (x - x.flip(0)) * 2, x.add(x, alpha=3), 1 - x),
    "into itself": lambda x: (x.clone().add_(1).mul_(x),),
    "part of itself": lambda x: ((y := x.clone()), y.narrow(0, 1, 2).zero_())[:1],
    "out": lambda x: (torch.add(x, 1, out=torch.empty_like(x)),),
    "concatenation": lambda x: (torch.cat([x, x + 1], 1), torch.stack([x, x * 2])),
    "parts": lambda x: tuple(part * 2 for part in x.chunk(2, 1)),
    "new": lambda x: (torch.zeros(3) + 1, torch.full((2,), 3.0) + x.new_zeros(2), torch.arange(4.0) * x.new_ones(4)),
    "dtypes": lambda x: (x.to(torch.float64), x.bfloat16() * 2, (x > 0).to(torch.float32), x.to(torch.int64) + 1),
    "layouts": lambda x: (x.contiguous(memory_format=torch.channels_last) + 1, x.permute(0, 3, 1, 2).contiguous()),
    "reductions": lambda x: (x.mean((2, 3)), x.sum(), x.std(1), x.amax(0), x.cumsum(1), x.norm()),
    "several results": lambda x: (*x.max(1), *x.sort(0), *torch.var_mean(x, 1), *x.topk(2, 3)),
    "softmax": lambda x: (x.softmax(-1), F.layer_norm(x, x.shape[-1:]), F.group_norm(x, 2), F.silu(x), F.gelu(x)),
    "products": lambda x: (x @ x.mT, torch.einsum("nchw,ndhw->ncd", x, x), F.linear(x, torch.ones(5, 6))),
    "attention": lambda x: (
        F.scaled_dot_product_attention(x, x, x, attn_mask=torch.ones(6, 6, dtype=torch.bool).tril()),
        F.scaled_dot_product_attention(x, x, x, is_causal=True),
    ),
    "convolutions": lambda x: (F.conv2d(x, torch.ones(3, 4, 3, 3)), F.conv_transpose2d(x, torch.ones(4, 2, 2, 2))),
    "resampling": lambda x: (
        F.interpolate(x, scale_factor=2),
        F.avg_pool2d(x, 2),
        F.pad(x, (1, 0, 2, 1)),
        x.roll(1, 2),
    ),
    "indices": lambda x: (x[torch.tensor([2, 0])], x.gather(0, torch.zeros(1, 4, 6, 6).long()), x[:, ::2] * 1),
    "embedding": lambda x: (F.embedding(torch.tensor([1, 0]), x[0, 0]),),
    "masks": lambda x: (torch.where(x > 0, x, -x), x.masked_fill(x < 0, 0.5), x.clamp(-1, 1), x.nan_to_num()),
    "numbers": lambda x: (x * torch.tensor(2.0), torch.tensor([1.0, 2.0]).sum() + x),
    "complex": lambda x: (torch.fft.ifftn(torch.fft.fftn(x, dim=(2, 3)) * 2, dim=(2, 3)).real + 1,),
    "random": lambda x: (F.dropout(x, 0.5, training=True), torch.randn_like(x), torch.rand(3), torch.randperm(4)),
    "autocast": torch.autocast("cpu")(lambda x: (F.linear(x, torch.ones(5, 6)), x * 2)),
    "lists": lambda x: tuple(torch._foreach_add([x, x * 2], 1)),
    "nothing": lambda x: (x[:0] + 1, x.new_empty(0, 3) * 2),
}


@torch.no_grad()
@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_recorded_computes_the_same_bits(name):
    function, x = FUNCTIONS[name], torch.randn(3, 4, 6, 6)
    recorded = Recorded(function, x)
    for i in range(5):
        images = torch.randn(3, 4, 6, 6)
        torch.manual_seed(i)
        wanted = function(images)
        torch.manual_seed(i)
        assert_bits(recorded(images), wanted)
        after = torch.rand(1)
        torch.manual_seed(i)
        function(images)
        assert after == torch.rand(1)
    assert recorded.notes == []
    assert recorded.calls == 2  # as it is, and recorded


def _adds_to_its_input(x):
    return (x.add_(1),)


def _keeps_a_result(x):
    _kept.append(x + 1)
    return (_kept[-1] * 2,)


def _counts(x):
    return (x.nonzero() + 0,)


def _reads_a_number(x):
    return (x * x.sum().item(),)


def _asks_for_a_gradient(x):
    with torch.enable_grad():
        return (x * torch.ones(5, requires_grad=True),)


@torch.library.custom_op("dd_kernels_tests::with_gaps", mutates_args=())
def _with_gaps(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(*x.shape[:-1], 2 * x.shape[-1])[..., ::2].copy_(x)


# Its schema promises a new tensor.
_library = torch.library.Library("dd_kernels_tests", "FRAGMENT")
_library.define("same(Tensor x) -> Tensor")
_library.impl("same", lambda x: x, "CPU")


def _turns_in_place(x):
    return ((x + 1).t_() * 2,)


_kept = []
REFUSED = {
    "a result is a view of an input": lambda x: (x[:1], x * 2),
    "two results share their memory": lambda x: ((y := x * 2)[:1], y[1:]),
    "something keeps a tensor of the graph": _keeps_a_result,
    "nonzero.default looks at a value": _counts,
    "dense.default looks at a value": _reads_a_number,
    "index.Tensor looks at a value": lambda x: (x[x > 0],),
    "t_": _turns_in_place,
    "same.default may return its input": lambda x: (torch.ops.dd_kernels_tests.same(x + 1) * 2,),
    "in another form than dense tensors": lambda x: (_with_gaps(x),),
    "a result carries a gradient": _asks_for_a_gradient,
}


@torch.no_grad()
@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_recorded_runs_as_it_is(reason):
    function, x = REFUSED[reason], torch.randn(3, 5)
    recorded = Recorded(function, x)
    for i in range(4):
        x = torch.randn(3, 5)
        assert_bits(recorded(x), function(x))
        assert len(recorded.notes) == (i > 0)
    assert "not recorded: " in recorded.notes[0]
    assert reason in recorded.notes[0]
    _kept.clear()


@torch.no_grad()
def test_a_refused_recording_draws_no_numbers():
    def function(x):
        return torch.rand(3) + x.sum().item(), x[:1]

    x = torch.randn(3)
    recorded = Recorded(function, x)
    for seed in range(4):
        torch.manual_seed(seed)
        wanted = *function(x), torch.rand(2)
        torch.manual_seed(seed)
        assert_bits((*recorded(x), torch.rand(2)), wanted)
    assert len(recorded.notes) == 1


@torch.no_grad()
def test_an_input_that_is_written_to_is_the_callers():
    graph, x = fx.Graph(), torch.zeros(3)
    given = graph.placeholder("x")
    given.meta["example_value"] = x
    graph.output((graph.call_method("add_", (given, 1)),))
    notes = []
    recordings = Recordings(fx.GraphModule(nn.Module(), graph), notes)
    for _ in range(4):
        recordings.run(x)
    assert x.tolist() == [4, 4, 4]
    assert notes == [f"not recorded: {WRITES}"]
    # A function that hides what it writes to is seen as it is recorded, before it has written.
    recorded = Recorded(_adds_to_its_input, x)
    for _ in range(4):
        recorded(x)
    assert x.tolist() == [8, 8, 8]
    assert recorded.notes == [f"not recorded: {WRITES}"]


@torch.no_grad()
def test_results_are_the_callers():
    x = torch.randn(3, 5)
    recorded = Recorded(lambda x: (x * 2, x + 1), x)
    wanted = (x * 2, x + 1)
    for _ in range(5):
        found = recorded(x)
        assert_bits(found, wanted)
        assert not found[0]._is_view()
        for y in found:
            y.zero_()
    x.zero_()
    assert recorded(x)[1].equal(torch.ones(3, 5))


@torch.no_grad()
def test_parameters_are_read_where_they_lie():
    weight, x = parameter(5, 3), torch.randn(2, 3)
    recorded = Recorded(lambda x, w: (F.linear(x, w),), x, weight)

    def calls():
        before = recorded.calls
        for _ in range(3):
            assert_bits(recorded(x, weight), (F.linear(x, weight),))
        return recorded.calls - before

    assert calls() == 2
    weight.data.mul_(2)  # which counts no version
    assert calls() == 0
    weight.mul_(2)
    assert calls() == 2
    weight.data = torch.randn(5, 3)
    assert calls() == 2


@torch.no_grad()
def test_packed_filters_follow_their_weights():
    model = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.SiLU(), nn.Conv2d(32, 8, 3))
    fast = dd.accelerate(copy.deepcopy(model))[0]
    x = torch.randn(1, 32, 16, 16)
    for change in (lambda w: None, lambda w: w.mul_(2), lambda w: w.data.neg_()):
        change(model[0].weight)
        change(fast[0].weight)
        wanted = dd.accelerate(copy.deepcopy(model))[0](x)
        for _ in range(4):
            assert fast(x).equal(wanted)


@torch.no_grad()
def test_each_form_has_a_recording_and_the_last_ones_stay():
    recorded = Recorded(lambda x: (x * 2,), torch.randn(1))
    forms = [torch.randn(n, 3) for n in range(1, FORMS)] + [torch.randn(3, 1).expand(3, 3)]
    for _ in range(4):
        for x in forms:
            assert_bits(recorded(x), (x * 2,))
    assert recorded.calls == 2 * FORMS
    recorded(forms[0])
    recorded(torch.randn(9, 3))
    assert recorded.calls == 2 * FORMS + 1
    recorded(forms[0])
    assert recorded.calls == 2 * FORMS + 1
    recorded(forms[1])  # the one used longest ago has gone
    assert recorded.calls == 2 * FORMS + 2


@torch.no_grad()
def test_numbers_and_threads_are_part_of_the_form():
    recorded = Recorded(lambda x, n: (x * n,), torch.randn(1), 2)
    x, threads = torch.randn(4), torch.get_num_threads()
    for n in (2, 3):
        for _ in range(3):
            assert_bits(recorded(x, n), (x * n,))
    assert recorded.calls == 4
    try:
        torch.set_num_threads(threads + 1)
        recorded(x, 2)
    finally:
        torch.set_num_threads(threads)
    assert recorded.calls == 5
    recorded(x, 2)
    assert recorded.calls == 5


class Watching(TorchDispatchMode):
    """Sees every operator."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **kwargs or {})


@torch.no_grad()
@pytest.mark.parametrize(
    "watched",
    [torch.enable_grad, Watching, lambda: torch.autocast("cpu"), lambda: dd.use_backend("reference")],
    ids=["gradients", "a mode", "autocast", "a backend"],
)
def test_what_sees_more_than_operators_takes_the_graph_as_it_is(watched):
    x, recorded = torch.randn(2, 3), Recorded(lambda x: (x * 2,), torch.randn(1))
    for _ in range(3):
        recorded(x)
    with watched():
        recorded(x)
    assert recorded.calls == 3
    recorded(x)
    assert recorded.calls == 3


def test_a_gradient_goes_through_the_graph():
    weight = parameter(3)
    recorded = Recorded(lambda x, w: (x * w,), torch.randn(1), weight)
    with torch.no_grad():
        for _ in range(3):
            recorded(torch.randn(3), weight)
    x = torch.randn(3)
    recorded(x, weight)[0].sum().backward()
    assert weight.grad.equal(x)


def test_inference_mode_and_back():
    x, recorded = torch.randn(3), Recorded(lambda x: (x * 2,), torch.randn(1))
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode, torch.no_grad):
        with mode():
            (y,) = recorded(x.clone())
            assert y.is_inference() == torch.is_inference_mode_enabled()
            assert y.equal(x * 2)
    assert recorded.calls == 2
    assert recorded.notes == []


def test_parameters_of_inference_mode():
    with torch.inference_mode():
        weight, x = parameter(3), torch.randn(3)
        recorded = Recorded(lambda x, w: (x * w,), torch.randn(1), weight)
        for _ in range(3):
            assert_bits(recorded(x, weight), (x * weight,))
    assert recorded.calls == 2


@torch.no_grad()
def test_memory_within_the_limit(monkeypatch):
    monkeypatch.setattr(memory, "LIMIT", 4000)
    recorded = Recorded(lambda x: (x * 2,), torch.randn(1))
    large, small = torch.randn(2000), torch.randn(20)
    for _ in range(4):
        assert_bits(recorded(large), (large * 2,))
        assert_bits(recorded(small), (small * 2,))
    assert recorded.notes == ["not recorded: there is no room for its results"]
    assert recorded.calls == 5 + 2  # one call was given up
    assert memory.held() == small.nbytes


@torch.no_grad()
def test_large_inputs_are_not_copied_in_every_call(monkeypatch):
    x, weight, half = torch.randn(100), parameter(100), parameter(50)
    monkeypatch.setattr(recording, "MOST_COPIED", x.nbytes)
    recorded = Recorded(lambda x, y, w: (x * w + y,), x, x, weight)
    for _ in range(3):
        recorded(x[:50], x[50:], half)
        recorded(x, x, weight)
    assert recorded.notes == ["not recorded: its inputs beside parameters take too long to copy"]
    assert recorded.calls == 2 + 3


@torch.no_grad()
def test_memory_is_used_again_within_a_recording():
    def function(x):
        for _ in range(10):
            x = x + 1
        return (x,)

    x, recorded = torch.randn(500), Recorded(function, torch.randn(1))
    for _ in range(3):
        assert_bits(recorded(x), function(x))
    assert memory.held() == 2 * x.nbytes


@torch.no_grad()
def test_a_recording_takes_the_place_of_what_the_graph_kept_before():
    x = torch.randn(1 << 16)
    recorded = Recorded(lambda x: (workspace.empty_like(x).copy_(x).sum(),), x)
    recorded(x)
    assert memory.held() == x.nbytes
    for _ in range(3):
        recorded(x)
    assert memory.held() == x.nbytes + 4


@torch.no_grad()
def test_a_recording_goes_with_its_first_parameter():
    weight, x = parameter(3), torch.randn(3)
    recorded = Recorded(lambda x, w: (x * w,), torch.randn(1), weight)
    for _ in range(3):
        recorded(x, weight)
    assert memory.held() == x.nbytes
    del weight
    gc.collect()
    assert memory.held() == 0
    other = parameter(3)
    for _ in range(3):
        assert_bits(recorded(x, other), (x * other,))


@torch.no_grad()
def test_a_thread_takes_the_graph_as_it_is_while_another_runs_it():
    together, x = threading.Barrier(2), torch.randn(3)

    def function(x):
        if slow:
            together.wait(60)
            together.wait(60)
        return (x * 2,)

    slow = False
    recorded = Recorded(function, torch.randn(1))
    recorded(x)
    slow, found = True, []
    thread = threading.Thread(target=lambda: found.append(torch.no_grad()(recorded)(x + 1)))
    thread.start()
    together.wait(60)  # the other is being recorded
    slow = False
    assert_bits(recorded(x), (x * 2,))
    together.wait(60)
    thread.join()
    assert_bits(found[0], ((x + 1) * 2,))
    assert_bits(recorded(x), (x * 2,))
    assert recorded.calls == 3
    assert recorded.notes == []
