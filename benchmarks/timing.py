"""Times a call: by the clock on a CPU, by replays of a CUDA graph or by events on a GPU.

Kernels of a few microseconds end before the host has launched the next one. A CUDA graph of many calls has no such
gaps. Every call in a graph writes an output of its own, and the arguments rotate through more memory than the L2
cache holds, so that data comes from memory. What cannot be captured is timed as it is called, between two events on
the stream, and the row says so.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Call = Callable[..., object]
Arguments = tuple[Any, ...]

CACHE_BYTES = 64 << 20  # more than the last-level cache of a CPU that this runs on
LARGE_CALL = 4 << 20  # a call that moves more bytes finds its data in memory, one that moves fewer in a cache
ROUND_SECONDS = 1e-3
SLOWEST = 1.0  # a call that takes longer than this is warmed up once
SLOW = 0.05  # a call that takes longer than this is called once to learn its time

MAX_COPIES = 64
CACHES = 2  # the arguments of a GPU's calls fill this many L2 caches
GRAPH_SECONDS = 2e-3
GRAPH_CALLS = 512
GRAPH_BYTES = 16 << 30  # limit of the outputs that the calls of one graph keep
STREAM_SECONDS = 2e-3
GPU_SLOW = 0.1  # as SLOW, on a GPU


class UnusableError(RuntimeError):
    """The device no longer answers in this process; what is left to measure needs another process."""


@dataclass
class Timer:
    """An implementation that is ready to be timed.

    Attributes:
        measure: runs one round and returns seconds per call.
        round_seconds: about how long a round takes.
        how: "clock"; "graph" (replays of a CUDA graph: the device's time); or "stream" (calls one after another:
            the device's time or the host's, whichever is longer).
        note: why no graph was captured, where one was wanted.
    """

    measure: Callable[[], float]
    round_seconds: float
    how: str
    note: str | None = None


class Clock(Protocol):
    """The way to time on one kind of device."""

    device: str
    case_seconds: float
    graphs: bool

    def running(self) -> contextlib.AbstractContextManager[object]:
        """Returns the context in which a case is built and timed."""

    def copies(self, bytes_moved: int) -> int:
        """Returns how many sets of arguments a call rotates through, so that its data comes from memory."""

    def timer(self, call: Call, inputs: Sequence[Arguments], bytes_moved: int = 0, graph: bool = True) -> Timer:
        """Warms up and returns the timer; ``graph=False`` times calls as a program makes them."""

    def release(self) -> None:
        """Gives memory back after a case."""

    def usable(self) -> bool:
        """Returns whether the device still answers after an error."""


def _seconds(call: Call, inputs: Iterator[Arguments], calls: int) -> float:
    """Returns seconds per call.

    On one thread this is the thread's own clock, which stands still while another process has the core.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    arguments = list(itertools.islice(inputs, calls))
    start = clock()
    for argument in arguments:
        call(*argument)
    return (clock() - start) / calls


class CpuClock:
    """Times on a CPU, by a clock around a few calls."""

    device = "cpu"
    case_seconds = 0.6
    graphs = False

    def running(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def copies(self, bytes_moved: int) -> int:
        return 1 if bytes_moved < LARGE_CALL else 1 + -(-CACHE_BYTES // bytes_moved)

    def timer(self, call: Call, inputs: Sequence[Arguments], bytes_moved: int = 0, graph: bool = True) -> Timer:
        turn = itertools.cycle(inputs)
        once = _seconds(call, turn, 1)  # the first call also compiles and fills caches
        if once < SLOWEST:
            once = _seconds(call, turn, 1)
        if once < SLOW:
            once = min(_seconds(call, turn, 1) for _ in range(3))
        repeats = max(1, round(ROUND_SECONDS / max(once, 1e-7)))
        return Timer(lambda: _seconds(call, turn, repeats), repeats * once, "clock")

    def release(self) -> None:
        pass

    def usable(self) -> bool:
        return True


class GpuClock:
    """Times on a GPU. ``cuda`` is torch.cuda, or its replacement in a test.

    Everything runs on one stream of its own, because the default stream cannot be captured and PyTorch's backward
    pass runs on the stream of its forward pass.
    """

    device = "cuda"
    case_seconds = 0.12

    def __init__(self, cuda: Any = torch.cuda, graphs: bool = True) -> None:
        self.cuda, self.graphs = cuda, graphs
        self.stream = cuda.Stream()
        self.l2_bytes = getattr(cuda.get_device_properties(0), "L2_cache_size", 64 << 20)

    def running(self) -> contextlib.AbstractContextManager[object]:
        context: contextlib.AbstractContextManager[object] = self.cuda.stream(self.stream)
        return context

    def copies(self, bytes_moved: int) -> int:
        return int(min(MAX_COPIES, 1 + CACHES * self.l2_bytes // max(bytes_moved, 1)))

    def timer(self, call: Call, inputs: Sequence[Arguments], bytes_moved: int = 0, graph: bool = True) -> Timer:
        for arguments in inputs[:3]:  # these calls compile, tune and upload tables
            call(*arguments)
        turn = itertools.cycle(inputs)
        once = self._elapsed(lambda: call(*next(turn)))
        if once < GPU_SLOW:
            once = min(once, *(self._elapsed(lambda: call(*next(turn))) for _ in range(2)))
        note = None
        if graph and self.graphs:
            try:
                return self._graph_timer(call, inputs, bytes_moved, once)
            except Exception as error:
                note = f"not captured: {_first_line(error)}"
                if not self.usable():
                    raise UnusableError(note) from error
        return self._stream_timer(call, turn, once, note)

    def release(self) -> None:
        gc.collect()
        self.cuda.empty_cache()

    def usable(self) -> bool:
        """Also checks that random numbers can be drawn, because a failed capture can leave the generator captured."""
        try:
            self.cuda.synchronize()
            torch.randn(8, device=self.device).sum().item()
        except Exception:
            return False
        return True

    def _elapsed(self, run: Callable[[], object]) -> float:
        """Returns seconds between two events around ``run``."""
        start, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
        self.cuda.synchronize()
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3

    def _graph_timer(self, call: Call, inputs: Sequence[Arguments], bytes_moved: int, once: float) -> Timer:
        """Returns a timer of replays of a graph of many calls."""
        wanted = max(len(inputs), round(GRAPH_SECONDS / max(once, 1e-6)))
        calls = max(1, min(wanted, GRAPH_CALLS, GRAPH_BYTES // max(bytes_moved, 1)))
        turn = itertools.cycle(inputs)

        def run() -> list[object]:
            return [call(*next(turn)) for _ in range(calls)]

        replay = captured(run, self.cuda)
        self._elapsed(replay)
        seconds = self._elapsed(replay)
        return Timer(lambda: self._elapsed(replay) / calls, seconds, "graph")

    def _stream_timer(self, call: Call, turn: Iterator[Arguments], once: float, note: str | None) -> Timer:
        """Returns a timer of calls one after another."""
        repeats = max(1, min(GRAPH_CALLS, round(STREAM_SECONDS / max(once, 1e-6))))

        def run() -> None:
            for _ in range(repeats):
                call(*next(turn))

        return Timer(lambda: self._elapsed(run) / repeats, repeats * once, "stream", note)


def captured(run: Callable[[], object], cuda: Any = torch.cuda) -> Callable[[], None]:
    """Captures ``run`` as a CUDA graph on the current stream, which must not be the default one; returns the replay.

    ``torch.cuda.graph`` collects garbage and empties the cache before each capture, which takes a tenth of a second.
    Here the collector is only disabled meanwhile, because it could free what a capture may not.
    """
    graph = cuda.CUDAGraph()
    cuda.synchronize()
    collects = gc.isenabled()
    gc.disable()
    try:
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            kept = run()
        except Exception:
            with contextlib.suppress(Exception):
                graph.capture_end()
            raise
        graph.capture_end()
        del kept
    finally:
        if collects:
            gc.enable()
    replay: Callable[[], None] = graph.replay
    return replay


def _first_line(error: Exception) -> str:
    """Returns the first line of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def clock_of(device: str, graphs: bool = True) -> Clock:
    """Returns the clock of "cpu" or "cuda"."""
    return GpuClock(graphs=graphs) if device == "cuda" else CpuClock()
