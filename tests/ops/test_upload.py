"""What is kept: real tensors of its own, whatever holds around the first call; and what is pickled."""

import contextlib
import copy
import pickle
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import dd_kernels as dd
from dd_kernels.ops.randn import key
from dd_kernels.ops.upload import real

X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
SEED = 123456789


def tables():
    schedule = dd.linear_schedule(100)
    return schedule, dd.ddpm(schedule, 10)


def all_ops(x, schedule, table):
    x_t = dd.q_sample(x, 5, schedule, seed=SEED)
    return dd.reverse_step(x_t, x, table, 2, seed=SEED) + dd.randn((2, 3, 4, 4), seed=SEED)


def in_fake_mode(run, x):
    with FakeTensorMode() as mode:
        run(mode.from_tensor(x))


def in_device_context(run, x):
    with torch.device("meta"):
        assert run(x).device.type == "cpu"


def in_inference_mode(run, x):
    with torch.inference_mode():
        run(x)


class Module(torch.nn.Module):
    def __init__(self, run):
        super().__init__()
        self.run = run

    def forward(self, x):
        return self.run(x)


FIRST_CALLS = {
    "fake tensors": in_fake_mode,
    "device context": in_device_context,
    "inference mode": in_inference_mode,
    "export": lambda run, x: torch.export.export(Module(run), (x,), strict=False),
    "strict export": lambda run, x: torch.export.export(Module(run), (x,), strict=True),
    "make_fx": lambda run, x: make_fx(run)(x),
    "functionalize": lambda run, x: torch.func.functionalize(run)(x),
    "vmap": lambda run, x: torch.func.vmap(run)(x[None]),
    "jvp": lambda run, x: torch.func.jvp(run, (x,), (x,)),
    "grad": lambda run, x: torch.func.grad(lambda v: run(v).sum())(x),
    "compile": lambda run, x: torch.compile(run, fullgraph=True, backend="aot_eager")(x),
    "trace": lambda run, x: torch.jit.trace(run, (x,), check_trace=False),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("tables_too", [False, True], ids=["first call", "tables too"])
@pytest.mark.parametrize("first", FIRST_CALLS)
def test_what_is_first_made_in_a_mode_serves_eager_calls(first, tables_too):
    """Under the mode the tables are uploaded, or they are also computed there."""
    key._keys.clear()
    expected = all_ops(X, *tables())
    key._keys.clear()
    made = [] if tables_too else [tables()]

    def run(x):
        if not made:
            made.append(tables())
        return all_ops(x, *made[0])

    if not (tables_too and first in ("compile", "strict export")):  # Dynamo traces no class definition's instances
        FIRST_CALLS[first](run, X)
    assert all_ops(X, *made[0] if made else tables()).equal(expected)
    kept = [*key._keys.values(), made[0][0].on(X.device).rows, made[0][1].on(X.device).rows] if made else []
    assert all(type(v) is torch.Tensor and v.device == X.device and not v.is_inference() for v in kept)


def test_real_passes_errors_on_and_needs_no_thread_in_plain_calls():
    def fails():
        raise KeyError("inside")

    for mode in (contextlib.nullcontext(), torch.inference_mode()):
        with mode, pytest.raises(KeyError, match="inside"):
            real(fails)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))])
def test_copies_are_whole_and_carry_no_upload(copied):
    schedule, table = tables()
    expected = all_ops(X, schedule, table)
    again = copied(schedule), copied(table)
    assert not again[0]._copies
    assert not again[1]._copies
    assert all_ops(X, *again).equal(expected)
    with pytest.raises(ValueError, match="read-only"):
        again[0].beta[0] = 0.5


def test_a_used_schedule_is_pickled_small():
    schedule = dd.linear_schedule(1000)
    dd.q_sample(X, 5, schedule, seed=1)
    assert len(pickle.dumps(schedule)) < 10_000


@pytest.mark.skipif(torch.cuda.is_available(), reason="here there is a CUDA device")
def test_where_a_device_is_faked_what_is_kept_is_faked_too():
    with FakeTensorMode():
        makers = [real(threading.get_ident, device) for device in (None, torch.device("cpu"), torch.device("cuda"))]
    assert [maker == threading.get_ident() for maker in makers] == [False, False, True]
