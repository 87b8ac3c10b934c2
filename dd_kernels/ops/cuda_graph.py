"""CUDA graphs: what a function does on a GPU, captured once and run again by one call of the driver.

Captures are kept in one ring for the process: those used least recently go where all would take more than a quarter of
the device's memory. Their owner's are dropped with it.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")

cuda: Any = torch.cuda  # a test puts a stand-in here
DEVICE_TYPE = "cuda"
_SHARE = 4  # of the device's memory, one part in so many
_ring: OrderedDict[tuple[int, Hashable], Capture[Any]] = OrderedDict()
_owners = itertools.count()
_trials = threading.local()


def serves(device: torch.device) -> bool:
    """Returns whether a device has CUDA graphs."""
    return device.type == DEVICE_TYPE


def unavailable(device: torch.device) -> str | None:
    """Returns why nothing can be captured on a device now, or None."""
    if not serves(device):
        return f"there are no CUDA graphs on {device.type}"
    within = getattr(_trials, "are_running", False) or cuda.is_current_stream_capturing()
    return "another CUDA graph is being captured" if within else None


@contextlib.contextmanager
def _trial() -> Iterator[None]:
    """Lets what runs before a capture capture nothing itself, which the capture around it would never replay."""
    before = getattr(_trials, "are_running", False)
    _trials.are_running = True
    try:
        yield
    finally:
        _trials.are_running = before


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, for a reason."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


class Capture(Generic[T]):
    """A captured function: ``inputs`` is what it reads, ``result`` what each replay writes anew, ``bytes`` its memory.

    The function runs twice before it is captured, as PyTorch asks; the state of random generators is then put back.
    """

    def __init__(self, run: Callable[[], T], device: torch.device, inputs: Any) -> None:
        self.inputs = inputs
        stream = cuda.Stream(device)
        stream.wait_stream(cuda.current_stream(device))
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices), cuda.stream(stream), _trial():
            run()
            run()
        cuda.current_stream(device).wait_stream(stream)
        self._graph = cuda.CUDAGraph()
        with cuda.graph(self._graph, capture_error_mode="thread_local"):
            before = cuda.memory_reserved(device)
            self.result = run()
        self.bytes = max(cuda.memory_reserved(device) - before, 0)

    def replay(self) -> T:
        """Runs it again on what its inputs hold now."""
        self._graph.replay()
        return self.result


def _drop(owner: int) -> None:
    for key in [key for key in _ring if key[0] == owner]:
        del _ring[key]


class Captures:
    """The captures of one owner, in the ring of all."""

    def __init__(self) -> None:
        self._owner = next(_owners)
        weakref.finalize(self, _drop, self._owner)

    def get(self, key: Hashable) -> Capture[Any] | None:
        """Returns the capture of ``key``, which then is the one used last."""
        found = _ring.get((self._owner, key))
        if found is not None:
            _ring.move_to_end((self._owner, key))
        return found

    def add(self, key: Hashable, capture: Capture[T], device: torch.device) -> Capture[T]:
        """Keeps a capture, and drops those used least recently where memory asks for it."""
        _ring[self._owner, key] = capture
        limit = cuda.mem_get_info(device)[1] // _SHARE
        while len(_ring) > 1 and sum(kept.bytes for kept in _ring.values()) > limit:
            _ring.popitem(last=False)
        return capture

    def clear(self) -> None:
        """Drops them all."""
        _drop(self._owner)
