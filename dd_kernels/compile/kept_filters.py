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
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .memory import state_of

LIMIT = 512 << 20
_HUGE_PAGE = 2 << 20


@dataclass
class _Kept:
    """Of one parameter, as it was at the version ``of``: how many floats which calls keep, and where."""

    owner: weakref.ref[Tensor]
    of: tuple[int, int]
    floats: dict[tuple[Any, ...], int] = field(default_factory=dict)
    memory: dict[tuple[int, bool], Tensor | None] = field(default_factory=dict)  # None: there was no room


# By the parameter's id. torch's WeakTensorKeyDictionary compares keys in three nested Python calls, which below the
# frame of a whole graph may cross the end of the interpreter's block of stack. Each such call maps and unmaps a block:
# a U-Net lost 60 us in each convolution.
_kept: dict[int, _Kept] = {}


def held() -> int:
    """Returns the bytes that kept filters take."""
    every = [list(kept.memory.values()) for kept in list(_kept.values())]  # which a collected parameter may change
    return sum(value.nbytes for values in every for value in values if value is not None)


def _forget(number: int, owner: weakref.ref[Tensor]) -> None:
    """Drops what is kept of a parameter that is gone, unless another one has taken its id."""
    kept = _kept.get(number)
    if kept is not None and kept.owner is owner:
        del _kept[number]


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
    if type(weight) is not Parameter or weight.is_inference():  # which counts no versions
        return None
    now = state_of(weight)
    kept = _kept.get(number := id(weight))
    if kept is None or kept.of != now or kept.owner() is not weight:
        kept = _kept[number] = _Kept(weakref.ref(weight, partial(_forget, number)), now)
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
