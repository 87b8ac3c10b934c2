"""What a caller of a multistep solver hands in: the x_0 of earlier steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..checks import bytes_spanned, check_each_element_apart, check_float, check_not_leaf


def _check_apart(slot: Tensor, others: Iterable[Tensor | None]) -> None:
    """Raises if ``slot``, which is written, shares memory with another tensor of the call."""
    begin, end = slot.data_ptr(), slot.data_ptr() + bytes_spanned(slot)
    for y in others:
        if y is not None and y.data_ptr() < end and begin < y.data_ptr() + bytes_spanned(y):
            raise ValueError("history must share no memory with another tensor of the call; got a part of one")


def checked_history(
    history: Sequence[Tensor] | Tensor | None, count: int, x: Tensor, others: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """Returns ``history`` as ``count`` tensors; raises unless a step can write each, of the shape of x.

    ``others`` are the other tensors of the call, read and written.
    """
    slots = () if history is None else tuple(history)
    if len(slots) != count:
        came = "None" if history is None else len(slots)
        raise ValueError(f"history must hold {count} tensors for this table, as its history_like(x) does; got {came}")
    for name, y in (("x", x), *(("history", slot) for slot in slots)):
        check_float(name, y)
    for i, slot in enumerate(slots):
        if slot.shape != x.shape:
            raise ValueError(f"history must have the shape of x, {list(x.shape)}; got {list(slot.shape)}")
        if slot.device != x.device:
            raise ValueError(f"history must be on the device of x, {x.device}; got {slot.device}")
        if slot.dtype is not slots[0].dtype:
            raise TypeError(f"history must be of one dtype; got {slots[0].dtype} and {slot.dtype}")
        check_each_element_apart("history", slot)
        if torch.is_grad_enabled() and slot.requires_grad:
            check_not_leaf("history", slot)
        apart = (x, *others, *slots[:i])
        if not is_compiling() and not slot.is_meta and all(y is None or type(y) is Tensor for y in (slot, *apart)):
            _check_apart(slot, apart)
    return slots
