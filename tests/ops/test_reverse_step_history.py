"""The x_0 of earlier steps that a multistep solver keeps: where they lie, who touches them, what is refused."""

import pickle

import numpy as np
import pytest
import torch
from budget import DTYPES, sentinels_survive, within_sentinels
from step_cases import TABLES, check, tensors

import dd_kernels as dd
from dd_kernels.ops.randn import noise_key
from dd_kernels.ops.reverse_step.table import StepTable, from_columns

ONE, TWO = TABLES["one x_0 kept"], TABLES["two x_0 kept"]
BOTH = pytest.mark.parametrize("table", [ONE, TWO], ids=["one", "two"])


def run(table, x, outs, backend, history=None, **options):
    """The steps of a table, from the first on; their x_0 too."""
    history = table.history_like(x) if history is None else history
    x0s = []
    for step, out in enumerate(outs):
        x, x0 = dd.reverse_step(
            x, out, table, step, history=history, return_x0=True, seed=3, backend=backend, **options
        )
        x0s.append(x0)
    return x, x0s


def test_a_table_tells_how_many_it_keeps():
    assert [t.history for t in (TABLES["ddpm"], TABLES["ddim"], ONE, TWO)] == [0, 0, 1, 2]
    last = torch.channels_last
    history = TWO.history_like(torch.zeros(2, 3, 4, 5, dtype=torch.bfloat16).contiguous(memory_format=last))
    assert [(v.shape, v.dtype, v.is_contiguous(memory_format=last)) for v in history] == [
        ((2, 3, 4, 5), torch.bfloat16, True)
    ] * 2
    assert TABLES["ddim"].history_like(torch.zeros(2)) == ()


@BOTH
def test_steps_in_order_read_the_x0_of_the_steps_before(kernel, table):
    """Each step equals its equation with x_0 of earlier steps; what the history held first is not read."""
    x = torch.randn(2, 3, 4, 5, device=kernel.device)
    outs = [torch.randn_like(x) for _ in range(5)]
    history = [torch.full_like(x, float("nan")) for _ in range(table.history)]
    x_prev, x0s = run(table, x, outs, kernel.name, history)
    state = x.double()
    for step, out in enumerate(outs):
        row = {name: float(table.column(name)[step]) for name in ("prev_from_x0", "prev_from_x", "prev_from_out")}
        state = row["prev_from_x0"] * x0s[step].double() + row["prev_from_x"] * state
        state += row["prev_from_out"] * out.double()
        for name, back in (("prev_from_last", 1), ("prev_from_older", 2)):
            if table.column(name)[step] != 0:
                state += float(table.column(name)[step]) * x0s[step - back].double()
    # Five steps of at most eight roundings, of terms below 16, each multiplied by at most 1 afterwards.
    assert table.column("prev_from_x")[:5].max() <= 1
    assert (x_prev - state).abs().max() <= 5 * 8 * 16 * 2.0**-24


@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
def test_of_another_dtype_than_x(kernel, table, dtype):
    shape = (2, 3, 5, 7)
    x, out = (torch.randn(shape, device=kernel.device) for _ in range(2))
    history = [torch.randn(shape, device=kernel.device).to(dtype) for _ in range(table.history)]
    expected = dd.reverse_step(x, out, table, 4, history=[v.clone().float() for v in history], backend=kernel.name)
    assert dd.reverse_step(x, out, table, 4, history=history, backend=kernel.name).equal(expected)


@BOTH
def test_layouts(kernel, table):
    """channels_last, samples that lie apart, strides that no kernel takes, one tensor of all: the same bits."""
    shape, last = (2, 4, 5, 6), torch.channels_last
    x, out = (torch.randn(shape, device=kernel.device) for _ in range(2))
    values = torch.randn(table.history, *shape, device=kernel.device)
    given = list(values.clone())
    expected = dd.reverse_step(x, out, table, 5, history=given, backend=kernel.name)
    wide = torch.zeros(table.history, 2, 8, 5, 6, device=kernel.device)
    layouts = (
        values.clone(),
        [v.contiguous(memory_format=last) for v in values],
        [v.mT.contiguous().mT for v in values],
        [half.copy_(v) for half, v in zip(wide[:, :, 4:], values, strict=True)],
    )
    for history in layouts:
        for now in (x, x.contiguous(memory_format=last)):
            start = [torch.empty_like(h).copy_(v) for h, v in zip(history, values, strict=True)]
            if isinstance(history, torch.Tensor):
                start = history.clone()
            assert dd.reverse_step(now, out, table, 5, history=start, backend=kernel.name).equal(expected)
            assert all(a.equal(b) for a, b in zip(start, given, strict=True))
    half = list(wide[:, :, 4:])
    assert dd.reverse_step(x, out, table, 5, history=half, backend=kernel.name).equal(expected)
    assert all(a.equal(b) for a, b in zip(half, given, strict=True))
    assert (wide[:, :, :4] == 0).all()


def test_a_step_per_sample(kernel):
    """An even and an odd step in one batch keep x_0 in different places."""
    x, out = tensors(TWO, (3, 3, 4, 7))
    steps = torch.tensor([5, 2, 8])
    history = [torch.randn(x.shape, device=kernel.device) for _ in range(2)]
    before = [v.clone() for v in history]
    together = check(kernel, x, out, TWO, steps, history=[v.clone() for v in history])
    for i, step in enumerate(steps.tolist()):
        one = [v[i : i + 1] for v in history]
        alone = dd.reverse_step(
            x[i : i + 1].to(kernel.device),
            out[i : i + 1].to(kernel.device),
            TWO,
            step,
            history=one,
            backend=kernel.name,
        )
        assert alone.equal(together[i : i + 1])
        assert history[1 - step % 2][i].equal(before[1 - step % 2][i])
        assert not history[step % 2][i].equal(before[step % 2][i])


def test_a_table_that_keeps_none_leaves_it_alone(kernel):
    x, out = (v.to(kernel.device) for v in tensors(TABLES["ddim"], (2, 3, 4, 4)))
    history = [torch.full_like(x, float("nan"))]
    expected = dd.reverse_step(x, out, TABLES["ddim"], 3, backend=kernel.name)
    assert dd.reverse_step(x, out, TABLES["ddim"], 3, history=history, backend=kernel.name).equal(expected)
    assert history[0].isnan().all()


@BOTH
def test_version_counters_tell_of_the_change(kernel, table):
    x, out = (torch.randn(2, 3, 4, 4, device=kernel.device) for _ in range(2))
    history = table.history_like(x)
    before = [v._version for v in history]
    dd.reverse_step(x, out, table, 0, history=history, backend=kernel.name)
    assert all(v._version > b for v, b in zip(history, before, strict=True))


@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
def test_writes_all_of_it_and_nothing_else(kernel, table, dtype):
    shape = (3, 3, 5, 7)
    x, out = (within_sentinels(shape, dtype, kernel.device).normal_() for _ in range(2))
    x_prev = within_sentinels(shape, dtype, kernel.device)
    kept = [within_sentinels(shape, dtype, kernel.device) for _ in range(table.history)]
    on = table.on(x.device)
    arguments = (x, out, None, None, 1.0, None, None, on.rows, on.timesteps, on.steps[0], None, x_prev, None)
    kernel.op("reverse_step")(*arguments, *kept)
    assert all(map(sentinels_survive, (x, out, x_prev, *kept)))
    expected = dd.reverse_step(x, out, table, 0, history=table.history_like(x), return_x0=True, backend=kernel.name)
    assert x_prev.equal(expected[0])
    assert kept[0].equal(expected[1])
    assert all(v.isnan().all() for v in kept[1:])


def test_gradients_reach_the_x0_of_earlier_steps():
    """Gradients through three steps agree with finite differences in float64."""

    def last_of_three(x, *outs):
        return run(TWO, x, outs, "auto")[0]

    inputs = [torch.randn(1, 1, 2, 2, dtype=torch.float64, requires_grad=True) * 0.1 for _ in range(4)]
    assert torch.autograd.gradcheck(last_of_three, [v.detach().requires_grad_() for v in inputs])


@BOTH
def test_compiles_in_one_graph(table):
    x, out = torch.randn(2, 3, 5, 5), torch.randn(2, 3, 5, 5)

    def two_steps(x, out):
        history = table.history_like(x)
        x = dd.reverse_step(x * 2, out, table, 0, history=history)
        return dd.reverse_step(x, out, table, 1, history=history) + 1

    assert torch.compile(two_steps, fullgraph=True, backend="aot_eager")(x, out).equal(two_steps(x, out))


@BOTH
def test_opcheck(kernel, table):
    if kernel.name == "triton":
        return
    x, out = (torch.randn(2, 3, 4, 4, device=kernel.device) for _ in range(2))
    on, key = table.on(x.device), noise_key(1, 0, 0, x.device)
    shared = (on.rows, on.timesteps, on.steps[3], key, x.clone(), x.clone())
    kept = [torch.randn_like(x) for _ in range(table.history)]
    op = torch.ops.dd_kernels.reverse_step.default
    torch.library.opcheck(op, (x, out, None, None, 1.0, None, None, *shared, *kept))


X = torch.zeros(2, 3, 4, 4)
WIDE = torch.zeros(3, 3, 4, 4)


@pytest.mark.parametrize(
    ("history", "error", "message"),
    [
        (None, ValueError, "history must hold 2 tensors for this table.*; got None"),
        ([X.clone()], ValueError, "history must hold 2 tensors .*; got 1"),
        ([X.clone(), 1.0], TypeError, "history must be a torch.Tensor; got float"),
        ([X.clone(), X.int()], TypeError, "history must be float32.*int32"),
        ([X.clone(), X.half()], TypeError, "history must be of one dtype; got torch.float32 and torch.float16"),
        (
            [X.clone(), X[:1].clone()],
            ValueError,
            r"history must have the shape of x, \[2, 3, 4, 4\]; got \[1, 3, 4, 4\]",
        ),
        ([X.clone(), X[:1].expand(X.shape)], ValueError, "history must not overlap itself"),
        ([X.clone(), X], ValueError, "history must share no memory with another tensor"),
        ([WIDE[:2], WIDE[1:]], ValueError, "history must share no memory with another tensor"),
        ([X.to("meta"), X.to("meta")], ValueError, "history must be on the device of x, cpu; got meta"),
        ([X.clone().requires_grad_(), X.clone()], ValueError, "history must not be a leaf that requires grad"),
    ],
)
def test_errors(history, error, message):
    with pytest.raises(error, match=message):
        dd.reverse_step(X, X + 1, TWO, 3, history=history)


def test_apart_from_the_output_too():
    x_prev = X.clone()
    with pytest.raises(ValueError, match="history must share no memory"):
        dd.reverse_step(X, X + 1, ONE, 3, history=[x_prev], x_prev=x_prev)


def test_tables_without_these_columns_are_taken():
    """A table pickled by a version without multistep solvers lacks their columns, and works."""
    table = TABLES["ddpm"]
    old = StepTable(table.rows[:, :10], table.timesteps)
    assert old.rows.equal(table.rows)
    assert old.history == 0
    with pytest.raises(ValueError, match=r"rows must have the shape \[S, 12\]; got \[20, 11\]"):
        StepTable(table.rows[:, :11], table.timesteps)


def test_times_between_timesteps():
    table = from_columns(np.arange(3)[::-1], times=np.array([2.5, 1.0, 0.25]))
    again = pickle.loads(pickle.dumps(table))
    assert again.times.tolist() == [2.5, 1.0, 0.25]
    on = again.on(torch.device("cpu"))
    assert on.times.equal(torch.tensor([2.5, 1.0, 0.25]))
    assert TABLES["ddpm"].on(torch.device("cpu")).times.dtype is torch.int64
    rows = table.rows
    for times, error, message in (
        (torch.arange(3), TypeError, "times must be a floating torch.Tensor; got torch.int64"),
        ([1.0, 2.0, 3.0], TypeError, "times must be a floating torch.Tensor; got list"),
        (torch.zeros(2), ValueError, r"times must have the shape \[3\]; got \[2\]"),
        (torch.tensor([1.0, float("nan"), 0.0]), ValueError, "times must be finite"),
    ):
        with pytest.raises(error, match=message):
            StepTable(rows, table.timesteps, times=times)
