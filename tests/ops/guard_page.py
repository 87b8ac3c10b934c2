"""Tensors that end where the process's memory does: reading one element more ends the process."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor


@contextlib.contextmanager
def guard_page() -> Iterator[Callable[[Tensor], Tensor]]:
    """Gives a function that copies a small tensor to the end of a page, before one that nobody may touch."""
    page, libc = mmap.PAGESIZE, ctypes.CDLL(None, use_errno=True)
    pages = []

    def protect(memory: mmap.mmap, allowed: int) -> None:
        guard = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + page
        if libc.mprotect(ctypes.c_void_p(guard), page, allowed) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")

    def at_the_end(values: Tensor) -> Tensor:
        memory = mmap.mmap(-1, 2 * page)
        protect(memory, 0)
        pages.append(memory)
        size = values.numel() * values.element_size()
        array = np.frombuffer(memory, dtype=np.uint8)[page - size : page]
        return torch.from_numpy(array).view(values.dtype).view(values.shape).copy_(values)

    yield at_the_end
    for memory in pages:
        protect(memory, mmap.PROT_READ | mmap.PROT_WRITE)
