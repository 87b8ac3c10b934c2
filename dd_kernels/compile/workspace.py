"""Memory for the results within a rewritten graph, which the next call of the graph writes to again.

So it is where a graph runs as it is, in inference on a CPU; a recording has memory of its own. What a call returns is
the caller's: the graph keeps none of it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

from .memory import Memory, Owner, owner_of

LEAST = 1 << 17
"""Bytes below which the C library keeps what is freed."""

_local = threading.local()  # .active is the workspace of the graph that this thread runs


def is_running() -> bool:
    """Returns whether this thread runs a graph that has a workspace."""
    return getattr(_local, "active", None) is not None


def _empty(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    active: Workspace | None = getattr(_local, "active", None)
    y = None if active is None else active.empty(size, stride, dtype)
    return torch.empty_strided(size, stride, dtype=dtype) if y is None else y


def empty_image(n: int, c: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """Returns a tensor [N, C, H, W] in channels_last on the CPU, for a result of the graph that runs, if one does."""
    row = width * c
    return _empty((n, c, height, width), (height * row, 1, row, c), dtype)


def empty_tokens(n: int, tokens: int, heads: int, depth: int, dtype: torch.dtype) -> Tensor:
    """Returns a contiguous tensor [N, tokens, heads, depth] on the CPU, for a result of the graph that runs."""
    return _empty((n, tokens, heads, depth), (tokens * heads * depth, heads * depth, depth, 1), dtype)


def empty_like(x: Tensor) -> Tensor:
    """Returns a tensor of the form of x, which is dense and on the CPU, for a result of the graph that runs."""
    return _empty(x.shape, x.stride(), x.dtype)


def in_channels_last(x: Tensor) -> Tensor:
    """Returns images [N, C, H, W] in channels_last, x itself where it is."""
    if x.is_contiguous(memory_format=torch.channels_last) or not is_running():
        return x.contiguous(memory_format=torch.channels_last)
    n, c, height, width = x.shape
    return empty_image(n, c, height, width, x.dtype).copy_(x)


class Workspace:
    """The memory that one graph keeps, while the first parameter that it was called with lives."""

    def __init__(self) -> None:
        self._memory = Memory()
        self._taken: set[int] = set()  # the addresses of what this call has taken
        self._lock = threading.Lock()
        self._owner: Owner = None

    @property
    def held(self) -> int:
        """Returns the bytes that are kept."""
        return self._memory.held

    def clear(self, _: Any = None) -> None:
        """Drops all memory."""
        self._memory.clear()

    def empty(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor | None:
        """Returns a dense tensor in memory that nothing refers to; None where it is small, or there is no room."""
        if math.prod(size) * dtype.itemsize < LEAST:
            return None
        y = self._memory.empty(size, stride, dtype)
        if y is not None:
            self._taken.add(y.untyped_storage()._cdata)
        return y

    def _keep(self, returned: Any) -> None:
        """Keeps what this call has taken and does not return."""
        gone = {leaf.untyped_storage()._cdata for leaf in tree_leaves(returned) if isinstance(leaf, Tensor)}
        self._memory.keep_only(self._taken - gone)
        self._taken = set()

    def run(self, call: Callable[..., Any], args: Sequence[Any]) -> Any:
        """Calls the graph; what another thread runs at this time, or records a gradient, has its own memory."""
        recorded = torch.is_grad_enabled() or _get_current_dispatch_mode() is not None
        if recorded or not self._lock.acquire(blocking=False):
            return call(*args)
        before, _local.active, returned = getattr(_local, "active", None), self, ()
        try:
            self._owner = owner_of(args, self.clear, self._owner)
            returned = call(*args)
        finally:
            _local.active = before
            self._keep(returned)
            self._lock.release()
        return returned
