"""Where a captured graph reads its inputs and leaves its results: CUDA graphs, and recordings of a CPU.

Parameters are read where they lie, so that changed weights count. Every other tensor is copied to a place of its form,
and results are copied out of the capture's memory: the caller keeps what it was given.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from .identity import written_roots

WRITES = "the graph writes to an input"


def writes_to_an_input(graph: fx.Graph) -> bool:
    """Returns whether a call of the graph may write to what it is given."""
    return any(node.op == "placeholder" for node in written_roots(graph))


def form(value: Tensor) -> Hashable:
    """Returns all that is known of a tensor but its values."""
    return value.dtype, value.shape, value.stride()


def place_for(value: Any, device: torch.device) -> Any:
    """Returns where a capture reads an input: a parameter itself, a tensor of another's form, or the number."""
    if not isinstance(value, Tensor) or isinstance(value, nn.Parameter):
        return value
    with torch.inference_mode(False):  # a tensor of inference mode cannot be written to outside of it
        place = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    write(place, value)
    return place


def write(place: Tensor, value: Tensor) -> None:
    """Copies an input to its place; elements that share their memory, as after ``expand``, once."""
    if value.ndim == 0 and value.device != place.device:  # a number on the host travels with the launch
        place.fill_(value)
        return
    for dim, stride in enumerate(value.stride()):
        if stride == 0 and value.shape[dim] > 1:
            place, value = place.narrow(dim, 0, 1), value.narrow(dim, 0, 1)
    place.copy_(value)


def _storage(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


def reason_against_results(inputs: Sequence[Any], results: Sequence[Any]) -> str | None:
    """Returns why results cannot be handed out as copies: they share memory with an input or with one another."""
    given = {_storage(value) for value in inputs if isinstance(value, Tensor) and value.numel()}
    found = [_storage(value) for value in results if isinstance(value, Tensor) and value.numel()]
    if given & set(found):
        return "a result is a view of an input"
    return "two results share their memory" if len(set(found)) < len(found) else None


def copied_out(results: Sequence[Any]) -> tuple[Any, ...]:
    """Returns the results of a capture as the caller's own tensors."""
    return tuple(y.clone() if isinstance(y, Tensor) else y for y in results)
