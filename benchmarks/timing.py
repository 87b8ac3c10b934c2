"""What times a call: a clock on the CPU (timing_cpu), graph replay or events on a GPU (timing_gpu)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

Call = Callable[..., object]


class UnusableError(RuntimeError):
    """The device answers no more in this process: what is left needs another one."""


@dataclass
class Timer:
    """One implementation, ready to be timed.

    Attributes:
        measure: one round: seconds per call.
        round_seconds: how long a round takes, about.
        how: "clock", "graph" (replays of a CUDA graph: the device's time) or "stream" (calls one after
            another: the device's time or the host's, whichever is longer).
        note: why not by graph, where that was wanted.
    """

    measure: Callable[[], float]
    round_seconds: float
    how: str
    note: str | None = None


class Clock(Protocol):
    """A device's way to time; what :mod:`benchmarks.harness` knows of it."""

    device: str
    case_seconds: float

    def running(self) -> contextlib.AbstractContextManager[object]:
        """Around building and timing a case."""

    def copies(self, bytes_moved: int) -> int:
        """How many sets of a call's arguments are used in turn, so that its data comes from memory."""

    def timer(self, call: Call, inputs: Sequence[tuple], bytes_moved: int = 0, graph: bool = True) -> Timer:
        """Warms up and returns the timer; ``graph=False`` times calls as a program makes them."""

    def release(self) -> None:
        """After a case: gives memory back."""

    def usable(self) -> bool:
        """Whether the device still answers after an error."""


def clock_of(device: str, graphs: bool = True) -> Clock:
    """The clock of "cpu" or "cuda"."""
    if device == "cuda":
        from .timing_gpu import GpuClock

        return GpuClock(graphs=graphs)
    from .timing_cpu import CpuClock

    return CpuClock()
