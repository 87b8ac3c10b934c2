"""Filters that convolutions have transformed and packed, kept from one call to the next where there are few tiles.

At 4 to 64 tiles to transform the filters takes a fifth to a half of a convolution; F(4x4)'s are four times the weights.
They are kept of parameters alone, in inference, at most LIMIT bytes of the process, as long as their parameter lives.
A change in place is seen by the version counter, one through ``.data`` by sixty weights that the kernel compares. What
is computed is the same in every bit.
"""

from __future__ import annotations

import contextlib
import mmap
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.weak import WeakTensorKeyDictionary

LIMIT = 512 << 20
_HUGE_PAGE = 2 << 20


@dataclass
class _Kept:
    """Of one parameter, as it was at the version ``of``: how many floats which calls keep, and where."""

    of: tuple[int, int]
    floats: dict[tuple[Any, ...], int] = field(default_factory=dict)
    memory: dict[tuple[int, bool], Tensor | None] = field(default_factory=dict)  # None: there was no room


_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def held() -> int:
    """Returns the bytes that kept filters take."""
    return sum(v.nbytes for kept in _kept.values() for v in kept.memory.values() if v is not None)


def _memory(floats: int) -> Tensor:
    """Returns zeros, on Linux in huge pages where they fill some: a core reads these 1.7 times as fast from memory."""
    whole = 4 * floats // _HUGE_PAGE * _HUGE_PAGE
    if sys.platform != "linux" or whole == 0:
        return torch.zeros(floats, dtype=torch.float32)
    region = mmap.mmap(-1, 4 * floats + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = torch.frombuffer(region, dtype=torch.float32)
    first = -memory.data_ptr() % _HUGE_PAGE
    with contextlib.suppress(OSError):  # of a kernel without huge pages
        region.madvise(mmap.MADV_HUGEPAGE, first, whole)
    return memory[first // 4 : first // 4 + floats]


def keep(weight: Tensor, call: tuple[Any, ...], bfloat16: bool, size: Callable[[], int]) -> Tensor | None:
    """Returns the memory for the filters of a parameter in calls of one kind; None where they are not to be kept.

    Args:
        weight: the filters.
        call: what tells calls of one plan from others: shapes, options, threads.
        bfloat16: whether they are packed in bfloat16.
        size: returns how many floats they take, 0 where that does not pay.
    """
    if type(weight) is not Parameter:
        return None
    now = weight._version, weight.data_ptr()
    kept: _Kept | None = _kept.get(weight)
    if kept is None or kept.of != now:
        kept = _kept[weight] = _Kept(now)
    floats = kept.floats.get(call)
    if floats is None:
        floats = kept.floats[call] = size()
    if floats == 0:
        return None
    key = floats, bfloat16  # the number of floats tells the methods apart
    if key not in kept.memory:
        room = held() + 4 * floats <= LIMIT
        kept.memory[key] = _memory(floats) if room else None
    return kept.memory[key]
