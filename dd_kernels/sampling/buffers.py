"""Tensors of a loop that are written again once nobody else holds them: fresh memory costs more than a step on a CPU.

The C library gives large tensors back to the system and gets their pages anew, zeroed one by one. A tensor is written
again only where its Python object, its memory and its storage have no holder but this pool, not even a weak one: a
model, a callback or a caller that keeps a tensor, a view, an array or a capsule of it keeps its values.
"""

from __future__ import annotations

import sys
import weakref
from functools import cache

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..ops.checks import KERNEL_DTYPES, transform_reason

_FEWEST_BYTES = 1 << 20  # smaller ones come from memory that the C library keeps
_MOST = 3


def _holders(kept: list[Tensor], i: int) -> tuple[int, ...]:
    """Counts who holds a tensor of a list, its storage and weak references to it."""
    storage = kept[i].untyped_storage()
    counts = (kept[i]._use_count(), torch._C._storage_Use_Count(storage._cdata))  # type: ignore[attr-defined]
    return (*counts, sys.getrefcount(kept[i]), sys.getrefcount(storage), weakref.getweakrefcount(kept[i]))


@cache
def _alone() -> tuple[int, ...]:
    """Returns what :func:`_holders` counts of a tensor that is only in the list."""
    return _holders([torch.empty(1, device="cpu")], 0)


class Buffers:
    """The results of one loop's steps."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    def free(self, x: Tensor) -> Tensor | None:
        """Returns a tensor of the form of ``x`` that nobody holds, or None where there is none or it does not pay."""
        if is_compiling() or not x.is_cpu or x.nbytes < _FEWEST_BYTES or x.dtype not in KERNEL_DTYPES:
            return None
        if transform_reason() is not None:
            return None
        for i in range(len(self._kept)):
            if _holders(self._kept, i) == _alone():
                found = self._kept.pop(i)
                alike = (found.shape, found.stride(), found.dtype) == (x.shape, x.stride(), x.dtype)
                return found if alike and found.is_inference() == torch.is_inference_mode_enabled() else None
        return None

    def keep(self, x: Tensor) -> None:
        """Takes the result of a step into the pool."""
        if not is_compiling() and type(x) is Tensor:
            self._kept = [*self._kept[1 - _MOST :], x]
