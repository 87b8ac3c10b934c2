"""Compares an op with its peers, interleaved, in one process and on the same data.

A machine drifts (clocks, neighbours, caches), so times of two runs do not compare. Every round times ours and each
peer one after another, in an order that changes from round to round. A ratio is the median over the rounds of the
ratio within a round, with its quartiles; both sides have the same shape, batch and dtype. A plain copy of as many
bytes is timed in the same rounds and defines "% of copy".
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from . import machine
from .timing import Arguments, Call, Clock, Timer, UnusableError

MIN_ROUNDS, MAX_ROUNDS = 9, 200
SLOW_ROUNDS = 5  # least number where a round takes more than twice a case's time
SLOWEST_ROUNDS = 3  # least number where it takes more than 16 times a case's time
PATIENCE = 3  # a case ends after this many times its time, however many rounds are left
Row = dict[str, Any]
A = TypeVar("A", bound=Arguments)


@dataclass
class Case:
    """One row of the results.

    Attributes:
        op: name of the op; "sample", "training" and "growth" are whole steps.
        name: which of its cases, e.g. "ddpm".
        shape, dtype, layout: of its main tensor.
        ours: called with one of ``inputs``.
        inputs: argument tuples that calls rotate through; see :func:`rotated`.
        bytes_moved: bytes that the op reads and writes if it touches every tensor once.
        peers: by name the function that is called with the same arguments, or in words why it is not measured.
        device: where the tensors are.
        graph: a GPU replays the calls from a graph; where False, they are timed as a program makes them.
        rounds: number of rounds (None: as many as fit a case's time).
        settle: seconds to wait before each measurement, which then starts with an untimed call; for implementations
            whose threads go on spinning after a call.
        hot: ``inputs`` is a single tuple on purpose, whatever its size; the copy then has a single one too.
        extra: further entries of the row.
        inspect: called after the timing, returns further entries that are not timed.
    """

    op: str
    name: str
    shape: Sequence[int]
    ours: Call
    inputs: Sequence[Arguments]
    bytes_moved: int
    peers: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    layout: str = "contiguous"
    device: torch.device | str = "cpu"
    graph: bool = True
    rounds: int | None = None
    settle: float = 0.0
    hot: bool = False
    extra: Row = field(default_factory=dict)
    inspect: Callable[[], Row] | None = None


@dataclass(frozen=True)
class Target:
    """Where to measure: ``kind`` ("cpu" or "cuda") selects the cases, ``device`` holds their tensors."""

    kind: str
    device: torch.device | str
    clock: Clock


@dataclass(frozen=True)
class Plan:
    """A case that is not built yet.

    Attributes:
        name: of the plan; unique among those of a device, together with the threads.
        build: returns the case.
        threads: number of torch's threads (None: as it is).
        part: part of the report that measures it; "compiled" holds what takes minutes to prepare.
        tunes: what is compiled is chosen by timing it, which needs the device for itself.
    """

    name: str
    build: Callable[[], Case]
    threads: int | None = None
    part: str = "ops"
    tunes: bool = False

    def __str__(self) -> str:
        return self.name if self.threads is None else f"{self.name} {self.threads}T"


def rotated(target: Target, make: Callable[[], A], bytes_moved: int) -> list[A]:
    """Returns argument tuples from ``make``, enough of them to exceed the cache where that is possible."""
    return [make() for _ in range(target.clock.copies(bytes_moved))]


def rms_error(out: torch.Tensor, exact: torch.Tensor) -> float:
    """Returns the root mean square of the error, relative to that of the exact values."""
    return float((out.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def dtype_name(dtype: torch.dtype) -> str:
    """Returns "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def reason(error: BaseException) -> str:
    """Returns an exception in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}".rstrip(": ")


def _copy_inputs(case: Case, clock: Clock) -> list[Arguments]:
    """Returns pairs (target, source) whose copy moves as many bytes as the case."""
    sources = [
        torch.ones(max(1, case.bytes_moved // 8), device=case.device)
        for _ in range(1 if case.hot else clock.copies(case.bytes_moved))
    ]
    return [(torch.empty_like(source), source) for source in sources]


def _timers(case: Case, clock: Clock) -> tuple[dict[str, Timer], dict[str, str]]:
    """Returns a timer for ours, each peer and a copy; and for each peer without a timer the reason."""
    timers = {
        "ours": clock.timer(case.ours, case.inputs, case.bytes_moved, case.graph),
        "copy": clock.timer(torch.Tensor.copy_, _copy_inputs(case, clock), case.bytes_moved, case.graph),
    }
    missing = {}
    for name, peer in case.peers.items():
        if isinstance(peer, str):
            missing[name] = peer
            continue
        try:
            timers[name] = clock.timer(peer, case.inputs, case.bytes_moved, case.graph)
        except UnusableError:
            raise
        except Exception as error:
            if not clock.usable():
                raise UnusableError(f"{name}: {reason(error)}") from error
            missing[name] = reason(error)
    if any(timer.how != timers["ours"].how for timer in timers.values()):
        # A peer that cannot be captured is compared with ours timed the same way.
        timers["ours called"] = clock.timer(case.ours, case.inputs, case.bytes_moved, graph=False)
    return timers, missing


def number_of_rounds(round_seconds: float, case_seconds: float) -> int:
    """Returns as many rounds as fit a case's time, with a least number that is smaller for slow cases."""
    least = MIN_ROUNDS
    if round_seconds > 2 * case_seconds:
        least = SLOW_ROUNDS if round_seconds < 16 * case_seconds else SLOWEST_ROUNDS
    return min(MAX_ROUNDS, max(least, round(case_seconds / max(round_seconds, 1e-9))))


def interleave(
    timers: dict[str, Timer], case_seconds: float, rounds: int | None = None, settle: float = 0.0
) -> dict[str, list[float]]:
    """Returns seconds per call of each timer in every round; see ``rounds`` and ``settle`` of :class:`Case`."""
    wanted = rounds or number_of_rounds(sum(timer.round_seconds for timer in timers.values()), case_seconds)
    times: dict[str, list[float]] = {name: [] for name in timers}
    order = list(timers)
    end = time.monotonic() + PATIENCE * case_seconds
    for done in range(wanted):
        if rounds is None and done >= SLOW_ROUNDS and time.monotonic() > end:
            break
        for name in order:
            if settle:
                time.sleep(settle)
                timers[name].measure()
            times[name].append(timers[name].measure())
        order = order[1:] + order[:1]
    return times


def ratio_of(peer: Sequence[float], ours: Sequence[float]) -> Row:
    """Returns the peer's median time, and the median and quartiles of its ratio to ours within a round."""
    ratios = [p / o for p, o in zip(peer, ours, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    return {"us": statistics.median(peer) * 1e6, "ratio": median, "ratio_q1": low, "ratio_q3": high}


def record(case: Case, timers: dict[str, Timer], missing: dict[str, str], times: dict[str, list[float]]) -> Row:
    """Returns the row of what was timed, ready for JSON."""
    seconds = statistics.median(times["ours"])
    peers: Row = {}
    for name in case.peers:
        if name in missing:
            peers[name] = {"not_measured": missing[name]}
            continue
        alike = timers[name].how == timers["ours"].how
        peers[name] = {**ratio_of(times[name], times["ours" if alike else "ours called"]), "how": timers[name].how}
        if timers[name].note:
            peers[name]["note"] = timers[name].note
    copied = ratio_of(times["copy"], times["ours"])
    return {
        "op": case.op,
        "case": case.name,
        "shape": list(case.shape),
        "dtype": case.dtype,
        "layout": case.layout,
        "how": timers["ours"].how,
        **({"note": timers["ours"].note} if timers["ours"].note else {}),
        "us": seconds * 1e6,
        "ns_per_element": seconds * 1e9 / max(1, math.prod(case.shape)),
        "bytes": case.bytes_moved,
        "gb_per_s": case.bytes_moved / seconds / 1e9,
        "copy_gb_per_s": case.bytes_moved / copied["us"] / 1e3,
        "percent_of_copy": copied["ratio"] * 100,
        "peers": peers,
        "rounds": len(times["ours"]),
        **case.extra,
    }


@contextlib.contextmanager
def on_threads(number: int | None) -> Iterator[None]:
    """Sets the number of torch's threads within the block; None leaves it."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _inspected(case: Case, clock: Clock) -> Row:
    """Returns the entries of ``case.inspect``, or the reason why there are none."""
    if case.inspect is None:
        return {}
    try:
        return case.inspect()
    except Exception as error:
        if not clock.usable():
            raise UnusableError(reason(error)) from error
        return {"not_inspected": reason(error)}


def measure(plan: Plan, target: Target) -> Row:
    """Builds a case, times it and returns its row.

    Raises:
        UnusableError: the device no longer answers.
        Exception: whatever the case itself raises.
    """
    clock = target.clock
    with on_threads(plan.threads), clock.running(), torch.no_grad():
        try:
            case = plan.build()
            timers, missing = _timers(case, clock)
            times = interleave(timers, clock.case_seconds, case.rounds, case.settle)
            row = record(case, timers, missing, times)
            bandwidth = machine.limits(clock, target.device, torch.float32)["copy_gb_per_s"]
            row |= {"threads": plan.threads, "percent_of_bandwidth": 100 * row["gb_per_s"] / bandwidth}
            row["backend"] = machine.backend(target.kind)
            return {**row, **machine.described(target.kind), **_inspected(case, clock)}
        finally:
            clock.release()
