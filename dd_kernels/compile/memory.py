"""Memory that compiled graphs keep on a CPU for the results within them, at most LIMIT bytes of the process.

The steps of a sampler need the same tensors. The C library gives large ones back to the system when they are freed,
and the system clears each page when it is next written to: up to a fifth of a U-Net's time.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

LIMIT = 1 << 30
Owner: TypeAlias = "weakref.ref[torch.nn.Parameter] | None"

_users = torch._C._storage_Use_Count  # counts the tensors and storages of Python that refer to the memory
_all: weakref.WeakSet[Memory] = weakref.WeakSet()
_all_lock = threading.Lock()


def held() -> int:
    """Returns the bytes that are kept."""
    with _all_lock:
        return sum(memory.held for memory in _all)


def owner_of(args: Sequence[Any], drop: Callable[[Any], None], before: Owner = None) -> Owner:
    """Returns what memory lives as long as: the owner ``before`` while it lives, else the first parameter of a call.

    At its end ``drop`` is called: the memory goes with the model. Without a parameter there is no owner.
    """
    if before is not None and before() is not None:
        return before
    return next((weakref.ref(value, drop) for value in args if isinstance(value, torch.nn.Parameter)), None)


def state_of(parameter: Tensor) -> tuple[int, int]:
    """Returns what tells whether a parameter has changed or moved; those of inference mode count no versions."""
    return parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version


class Memory:
    """Storages by their size, each of which is given out again once no tensor refers to it."""

    def __init__(self) -> None:
        self.held = 0
        self._storages: dict[int, list[torch.UntypedStorage]] = {}  # by their bytes
        with _all_lock:
            _all.add(self)

    def clear(self) -> None:
        """Drops all memory."""
        self._storages, self.held = {}, 0

    def empty(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor | None:
        """Returns a dense tensor in memory that nothing refers to; None where there is no room."""
        number = math.prod(size) * dtype.itemsize
        same = self._storages.setdefault(number, [])
        storage = next((one for one in same if _users(one._cdata) == 1), None)
        if storage is None:
            if held() + number > LIMIT:
                return None
            storage = torch.UntypedStorage(number)
            same.append(storage)
            self.held += number
        return torch.empty(0, dtype=dtype).set_(storage, 0, size, stride)

    def keep_only(self, addresses: set[int]) -> None:
        """Drops all but the storages with these ``_cdata``."""
        kept = {number: [one for one in same if one._cdata in addresses] for number, same in self._storages.items()}
        self._storages = {number: same for number, same in kept.items() if same}
        self.held = sum(number * len(same) for number, same in self._storages.items())

    def in_use(self) -> int:
        """Returns how many storages some tensor refers to."""
        return sum(_users(one._cdata) > 1 for same in self._storages.values() for one in same)
