"""Interleaved comparison of an op with its peers, in one process and on the same data.

A machine drifts (clocks, neighbours, caches), so times of two runs do not compare. Here every round
times ours and each peer one after another, in an order that changes from round to round, and what is
reported is the median over the rounds of the ratio within a round, with its quartiles. A plain copy of
as many bytes is timed in the same rounds: it is what "% of copy" means. On one CPU thread the clock is
the thread's own, which does not run while another process has the core.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

import dd_kernels

THREADS = tuple(n for n in (1, 2) if n <= len(os.sched_getaffinity(0)))
CACHE_BYTES = 64 << 20  # more than a last-level cache of the machines this runs on
LARGE_CALL = 4 << 20  # a call that moves more finds its data in memory, one that moves less in a cache
ROUND_SECONDS = 1e-3
CASE_SECONDS = 1.0
MIN_ROUNDS, MAX_ROUNDS = 9, 200

Call = Callable[..., object]


@dataclass
class Case:
    """One row of the table.

    Attributes:
        op: name of the op.
        name: which of its cases, e.g. "ddpm".
        shape, dtype, layout: of its main tensor.
        ours: called with one of ``inputs``.
        inputs: argument tuples, used in turn; see :func:`rotated`.
        bytes_moved: read and written by the op if every tensor is touched once.
        peers: by name, what is called with the same arguments; or a string: why it was not measured.
        device: where the tensors are.
    """

    op: str
    name: str
    shape: Sequence[int]
    ours: Call
    inputs: Sequence[tuple]
    bytes_moved: int
    peers: dict[str, Call | str] = field(default_factory=dict)
    dtype: str = "float32"
    layout: str = "contiguous"
    device: str = "cpu"


def rotated(make: Callable[[], tuple], bytes_moved: int) -> list[tuple]:
    """Argument tuples from ``make``: one where a call's data fits a cache, else enough to fall out of it."""
    copies = 1 if bytes_moved < LARGE_CALL else 1 + -(-CACHE_BYTES // bytes_moved)
    return [make() for _ in range(copies)]


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _seconds(call: Call, inputs: Iterator[tuple], calls: int, device: str) -> float:
    """Seconds per call."""
    clock = time.thread_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    arguments = list(itertools.islice(inputs, calls))
    _synchronize(device)
    start = clock()
    for argument in arguments:
        call(*argument)
    _synchronize(device)
    return (clock() - start) / calls


def _copy_case(case: Case) -> tuple[Call, list[tuple]]:
    """A copy that reads and writes case.bytes_moved in all, rotated like the case."""

    def make() -> tuple:
        source = torch.ones(max(1, case.bytes_moved // 8), device=case.device)
        return torch.empty_like(source), source

    return torch.Tensor.copy_, rotated(make, case.bytes_moved)


def interleave(case: Case) -> dict[str, list[float]]:
    """Seconds per call in every round: of ours, of each peer that can run, and of a copy."""
    copy, copy_inputs = _copy_case(case)
    calls = {"ours": case.ours, **{name: peer for name, peer in case.peers.items() if callable(peer)}, "copy": copy}
    inputs = {name: itertools.cycle(copy_inputs if name == "copy" else case.inputs) for name in calls}
    repeats, round_seconds = {}, 0.0
    for name, call in calls.items():
        _seconds(call, inputs[name], 2, case.device)
        once = min(_seconds(call, inputs[name], 1, case.device) for _ in range(3))
        repeats[name] = max(1, round(ROUND_SECONDS / max(once, 1e-7)))
        round_seconds += repeats[name] * once
    rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, round(CASE_SECONDS / round_seconds)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for _ in range(rounds):
        for name in order:
            times[name].append(_seconds(calls[name], inputs[name], repeats[name], case.device))
        order = order[1:] + order[:1]
    return times


def _ratio(peer: list[float], ours: list[float]) -> dict[str, float]:
    ratios = [p / o for p, o in zip(peer, ours, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    return {"us": statistics.median(peer) * 1e6, "ratio": median, "ratio_q1": low, "ratio_q3": high}


@cache
def cpu_isa() -> str | None:
    """The instruction set that the CPU library chose; None where it was not built."""
    found = sorted(Path(dd_kernels.__file__).parent.glob("_cpu.*so"))
    if not found:
        return None
    function = ctypes.CDLL(str(found[0])).dd_kernels_cpu_isa
    function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_char_p
    return function(None).decode()


@cache
def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    return {"device": name, "torch": torch.__version__, "isa": cpu_isa() if device == "cpu" else None}


def record(case: Case, threads: int, times: dict[str, list[float]]) -> dict[str, Any]:
    """One row of the results, ready for JSON."""
    seconds = statistics.median(times["ours"])
    copied = _ratio(times["copy"], times["ours"])
    elements = 1
    for size in case.shape:
        elements *= size
    return {
        "op": case.op,
        "case": case.name,
        "shape": list(case.shape),
        "dtype": case.dtype,
        "layout": case.layout,
        "threads": threads,
        **machine(case.device),
        "us": seconds * 1e6,
        "ns_per_element": seconds * 1e9 / elements,
        "bytes": case.bytes_moved,
        "gb_per_s": case.bytes_moved / seconds / 1e9,
        "copy_gb_per_s": case.bytes_moved / copied["us"] / 1e3,
        "percent_of_copy": copied["ratio"] * 100,
        "peers": {
            name: {"not_measured": peer} if isinstance(peer, str) else _ratio(times[name], times["ours"])
            for name, peer in case.peers.items()
        },
        "rounds": len(times["ours"]),
    }


def compare(case: Case, threads: int, benchmark: Any) -> dict[str, Any]:
    """Measures a case, hands its record to pytest-benchmark as ``extra_info["record"]`` and returns it."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            row = record(case, threads, interleave(case))
            inputs = itertools.cycle(case.inputs)
            benchmark.pedantic(case.ours, setup=lambda: (next(inputs), {}), rounds=MIN_ROUNDS)
    finally:
        torch.set_num_threads(before)
    benchmark.extra_info["record"] = row
    return row


def _peer_text(peers: dict[str, dict[str, Any]]) -> str:
    texts = []
    for name, peer in peers.items():
        if "not_measured" in peer:
            texts.append(f"{name}: not measured ({peer['not_measured']})")
        else:
            texts.append(f"{name} {peer['ratio']:.1f}x ({peer['ratio_q1']:.1f} to {peer['ratio_q3']:.1f})")
    return "; ".join(texts)


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The records as lines of text, aligned; ratios are peer's time / ours, median (quartiles)."""
    heads = ("op", "case", "shape", "dtype", "layout", "threads", "us", "ns/elt", "MB", "GB/s", "% copy", "peers")
    cells = [heads]
    for row in rows:
        cells.append(
            (
                row["op"],
                row["case"],
                "x".join(map(str, row["shape"])),
                row["dtype"],
                row["layout"],
                str(row["threads"]),
                f"{row['us']:.1f}",
                f"{row['ns_per_element']:.2f}",
                f"{row['bytes'] / 1e6:.2f}",
                f"{row['gb_per_s']:.1f}",
                f"{row['percent_of_copy']:.0f}",
                _peer_text(row["peers"]),
            )
        )
    widths = [max(len(line[i]) for line in cells) for i in range(len(heads))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
