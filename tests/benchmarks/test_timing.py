"""Tests the clocks: what they time, over which arguments, and what happens where a capture fails."""

import pytest
import torch

from benchmarks import harness, timing
from benchmarks.timing import Timer, UnusableError


def test_a_graph_holds_many_calls_and_its_time_is_divided_by_them(cuda, gpu_clock):
    seen = []

    def call(i):
        seen.append(i)
        cuda.tick(0.02 * (1 + i))  # the third argument takes three times as long as the first

    timer = gpu_clock.timer(call, [(0,), (1,), (2,)])
    assert (timer.how, timer.note, cuda.captures) == ("graph", None, 1)
    seen.clear()
    assert timer.measure() == pytest.approx(0.04e-3, rel=0.02)
    assert not seen  # a replay calls nothing on the host
    assert timer.round_seconds == pytest.approx(timing.GRAPH_SECONDS, rel=1)


def test_a_graph_never_keeps_more_outputs_than_fit(cuda, gpu_clock, monkeypatch):
    calls = []
    monkeypatch.setattr(timing, "GRAPH_BYTES", 3000)
    timer = gpu_clock.timer(lambda: calls.append(cuda.tick(1e-3)), [()], bytes_moved=1000)
    assert len(calls) == 1 + 3 + 3  # warm-up, first look, captured
    assert timer.measure() == pytest.approx(1e-6)


def test_what_is_called_as_a_program_calls_it_is_not_captured(cuda, gpu_clock):
    timer = gpu_clock.timer(lambda: cuda.tick(0.5), [()], graph=False)
    assert (timer.how, timer.note, cuda.captures) == ("stream", None, 0)
    assert timer.measure() == pytest.approx(0.5e-3)


@pytest.mark.parametrize(("milliseconds", "calls"), [(50.0, 4), (500.0, 2)])
def test_a_slow_call_is_not_repeated_to_find_out_how_long_it_takes(milliseconds, calls, cuda, gpu_clock):
    gpu_clock.timer(lambda: cuda.tick(milliseconds), [()], graph=False)
    assert cuda.now == calls * milliseconds


def test_where_the_capture_fails_the_stream_is_timed_and_the_row_says_so(cuda, gpu_clock):
    def waits():
        cuda.synchronize()
        cuda.tick(0.25)

    timer = gpu_clock.timer(waits, [()])
    assert timer.how == "stream"
    assert "not permitted" in timer.note
    assert cuda.capturing is None
    assert timer.measure() == pytest.approx(0.25e-3)


def test_a_device_that_a_failed_capture_took_away_is_given_up(cuda, gpu_clock, monkeypatch):
    monkeypatch.setattr(gpu_clock, "usable", lambda: False)
    with pytest.raises(UnusableError, match="not captured: operation not permitted"):
        gpu_clock.timer(cuda.synchronize, [()])


def test_usable_asks_the_device_and_its_random_numbers(cuda, gpu_clock, monkeypatch):
    assert gpu_clock.usable()
    monkeypatch.setattr(torch, "randn", lambda *_, **__: pytest.fail("must not be drawn"))
    cuda.capturing = object()
    assert not gpu_clock.usable()
    cuda.capturing = None
    monkeypatch.setattr(torch, "randn", lambda *_, **__: 1 / 0)
    assert not gpu_clock.usable()


def test_no_graphs_where_none_are_wanted(cuda):
    clock = timing.GpuClock(cuda, graphs=False)
    assert clock.timer(lambda: cuda.tick(1.0), [()]).how == "stream"
    assert cuda.captures == 0


def test_the_collector_rests_during_a_capture_and_only_then(cuda):
    import gc

    states = []
    timing.captured(lambda: states.append(gc.isenabled()), cuda)
    assert states == [False]
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        timing.captured(lambda: 1 / 0, cuda)
    assert gc.isenabled()


def test_arguments_are_as_many_as_fall_out_of_the_cache(gpu_clock):
    assert gpu_clock.copies(1 << 19) == 5
    assert gpu_clock.copies(1) == timing.MAX_COPIES
    assert gpu_clock.copies(1 << 30) == 1
    assert timing.CpuClock().copies(1 << 10) == 1
    assert timing.CpuClock().copies(16 << 20) == 5


def test_the_cpu_clock_takes_the_arguments_in_turn():
    seen = []
    timer = timing.CpuClock().timer(seen.append, [(0,), (1,), (2,)])
    assert timer.how == "clock"
    assert timer.measure() > 0
    assert seen[:6] == [0, 1, 2, 0, 1, 2]


def _timers(**milliseconds):
    return {name: Timer(lambda ms=ms: ms * 1e-3, ms * 1e-3, "clock") for name, ms in milliseconds.items()}


def test_rounds_are_interleaved_in_changing_order_and_end_in_time(monkeypatch):
    order = []
    timers = {n: Timer(lambda n=n: order.append(n) or 1.0, 0.001, "clock") for n in "abc"}
    times = harness.interleave(timers, 0.01)
    assert {len(t) for t in times.values()} == {harness.MIN_ROUNDS}
    assert "".join(order[:9]) == "abcbcacab"
    order.clear()
    clock = iter(range(0, 10_000, 5))
    monkeypatch.setattr(harness.time, "monotonic", lambda: next(clock))
    harness.interleave(timers, 0.01)
    assert len(order) == 3 * harness.SLOW_ROUNDS


@pytest.mark.parametrize(("seconds", "rounds"), [(0.5, "MIN_ROUNDS"), (2.0, "SLOW_ROUNDS"), (11.0, "SLOWEST_ROUNDS")])
def test_what_takes_long_gets_fewer_rounds(seconds, rounds):
    times = harness.interleave({"ours": Timer(lambda: 1.0, seconds, "clock")}, 0.6)
    assert len(times["ours"]) == getattr(harness, rounds)


def test_rounds_are_as_many_as_wanted_and_wait_before_each(monkeypatch):
    calls, waited = [], []
    monkeypatch.setattr(harness.time, "sleep", waited.append)
    times = harness.interleave({"ours": Timer(lambda: calls.append(1) or 1.0, 50.0, "clock")}, 0.01, 7, settle=0.03)
    assert len(times["ours"]) == 7
    assert len(calls) == 14  # an untimed call after each wait
    assert waited == [0.03] * 7


def test_ratios_are_taken_within_a_round():
    found = harness.ratio_of([2.0, 30.0, 2.2], [1.0, 10.0, 1.0])
    assert found["ratio"] == pytest.approx(2.2)
    assert found["us"] == pytest.approx(2.2e6)


def test_a_peer_that_cannot_be_captured_is_compared_with_ours_called_alike(cuda, gpu_clock):
    def waits(x):
        cuda.synchronize()
        cuda.tick(0.2)

    peers = {"waits": waits, "alike": lambda x: cuda.tick(0.1), "broken": lambda x: 1 / 0, "absent": "not installed"}
    case = harness.Case("op", "case", (2, 3), lambda x: cuda.tick(0.01), [(1,)], 800, peers)
    timers, missing = harness._timers(case, gpu_clock)
    assert missing == {"broken": "ZeroDivisionError: division by zero", "absent": "not installed"}
    assert {name: timer.how for name, timer in timers.items()}["ours called"] == "stream"
    times = harness.interleave(timers, 0.01)
    times["ours called"] = [2 * t for t in times["ours"]]
    times["copy"] = times["ours"]  # the fake device's copy takes no time
    row = harness.record(case, timers, missing, times)
    assert row["peers"]["alike"]["ratio"] == pytest.approx(10, rel=0.01)
    assert row["peers"]["waits"]["ratio"] == pytest.approx(10, rel=0.01)  # 0.2 ms against 0.02 ms
    assert "not permitted" in row["peers"]["waits"]["note"]
    assert row["peers"]["absent"] == {"not_measured": "not installed"}
    assert row["how"] == "graph"


def test_a_peer_that_takes_the_device_away_ends_the_case(cuda, gpu_clock, monkeypatch):
    case = harness.Case("op", "case", (1,), lambda: cuda.tick(1.0), [()], 8, {"illegal": lambda: 1 / 0})
    monkeypatch.setattr(gpu_clock, "usable", lambda: False)
    with pytest.raises(UnusableError, match="illegal: ZeroDivisionError"):
        harness._timers(case, gpu_clock)
