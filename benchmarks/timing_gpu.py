"""Time on a GPU: replays of a CUDA graph that holds many calls, over arguments that do not fit the L2 cache.

Kernels of a few microseconds end before the host has launched the next; a graph has no such gaps. Every
call of a graph keeps an output of its own, so that what is written does not stay in the cache either.
What cannot be captured is timed as it is called, by events on the stream, and the note says so.

Everything runs on one stream of its own: PyTorch's backward pass runs where its forward pass ran, and
the default stream cannot be captured.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .timing import Call, Timer, UnusableError

MAX_COPIES = 64
CACHES = 2  # rotate over this many times the L2 cache
GRAPH_SECONDS = 2e-3
GRAPH_CALLS = 512
GRAPH_BYTES = 16 << 30  # outputs that the calls of a graph may keep
STREAM_SECONDS = 2e-3
SLOW = 0.1  # a call that takes longer is not repeated to find out how long it takes


class GpuClock:
    """A :class:`~benchmarks.timing.Clock`. ``cuda`` is torch.cuda, or what stands for it in a test."""

    device = "cuda"
    case_seconds = 0.12

    def __init__(self, cuda: Any = torch.cuda, graphs: bool = True) -> None:
        self.cuda, self.graphs = cuda, graphs
        self.stream = cuda.Stream()
        self.l2_bytes = getattr(cuda.get_device_properties(0), "L2_cache_size", 64 << 20)

    def running(self) -> contextlib.AbstractContextManager[object]:
        return self.cuda.stream(self.stream)

    def copies(self, bytes_moved: int) -> int:
        return min(MAX_COPIES, 1 + CACHES * self.l2_bytes // max(bytes_moved, 1))

    def timer(self, call: Call, inputs: Sequence[tuple], bytes_moved: int = 0, graph: bool = True) -> Timer:
        for arguments in inputs[:3]:  # compiles, tunes, uploads tables
            call(*arguments)
        turn = itertools.cycle(inputs)
        once = self._elapsed(lambda: call(*next(turn)))
        if once < SLOW:
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
        """Also whether random numbers can still be drawn: a capture that failed can leave the generator captured."""
        try:
            self.cuda.synchronize()
            torch.randn(8, device=self.device).sum().item()
        except Exception:
            return False
        return True

    def _elapsed(self, run: Callable[[], object]) -> float:
        """Seconds between two events around ``run``."""
        start, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
        self.cuda.synchronize()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    def _graph_timer(self, call: Call, inputs: Sequence[tuple], bytes_moved: int, once: float) -> Timer:
        wanted = max(len(inputs), round(GRAPH_SECONDS / max(once, 1e-6)))
        calls = max(1, min(wanted, GRAPH_CALLS, GRAPH_BYTES // max(bytes_moved, 1)))
        turn = itertools.cycle(inputs)

        def run() -> list[object]:
            return [call(*next(turn)) for _ in range(calls)]

        replay = captured(run, self.cuda)
        self._elapsed(replay)
        seconds = self._elapsed(replay)
        return Timer(lambda: self._elapsed(replay) / calls, seconds, "graph")

    def _stream_timer(self, call: Call, turn: Any, once: float, note: str | None) -> Timer:
        repeats = max(1, min(GRAPH_CALLS, round(STREAM_SECONDS / max(once, 1e-6))))

        def run() -> None:
            for _ in range(repeats):
                call(*next(turn))

        return Timer(lambda: self._elapsed(run) / repeats, repeats * once, "stream", note)


def captured(run: Callable[[], object], cuda: Any = torch.cuda) -> Callable[[], None]:
    """``run`` as a CUDA graph on the current stream, which must not be the default one: its replay.

    Not ``torch.cuda.graph``: that collects garbage and empties the cache before each capture, a tenth
    of a second; here the collector only rests meanwhile, for it could free what a capture may not.
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
    return graph.replay


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
