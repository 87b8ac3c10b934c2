"""Time on a CPU: a clock around a few calls.

On one thread it is the thread's own clock, which does not run while another process has the core.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator, Sequence

import torch

from .timing import Call, Timer

CACHE_BYTES = 64 << 20  # more than a last-level cache of the machines this runs on
LARGE_CALL = 4 << 20  # a call that moves more finds its data in memory, one that moves less in a cache
ROUND_SECONDS = 1e-3
SLOWEST = 1.0  # one call is warm-up enough
SLOW = 0.05  # a call that takes longer is not repeated to find out how long it takes


def _seconds(call: Call, inputs: Iterator[tuple], calls: int) -> float:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    arguments = list(itertools.islice(inputs, calls))
    start = clock()
    for argument in arguments:
        call(*argument)
    return (clock() - start) / calls


class CpuClock:
    """A :class:`~benchmarks.timing.Clock`."""

    device = "cpu"
    case_seconds = 0.6

    def running(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def copies(self, bytes_moved: int) -> int:
        return 1 if bytes_moved < LARGE_CALL else 1 + -(-CACHE_BYTES // bytes_moved)

    def timer(self, call: Call, inputs: Sequence[tuple], bytes_moved: int = 0, graph: bool = True) -> Timer:
        turn = itertools.cycle(inputs)
        once = _seconds(call, turn, 1)  # which also compiles and fills caches
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
