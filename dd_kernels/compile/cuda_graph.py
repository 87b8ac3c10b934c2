"""Runs a rewritten graph as a CUDA graph, captured once per shape of its inputs; only in inference.

Parameters are read where they lie, so that changed weights count. Every other tensor is copied to where the capture
reads it, and results are copied out of the capture's memory: the caller keeps what it was given. A number on the host,
such as the timestep of a pipeline that leaves its timesteps there, is read on the device: it travels with the launch
that writes it, so that no step waits for the device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..ops import cuda_graph
from ..ops.cuda_graph import Capture, Captures, first_line
from .graph import tensor
from .identity import written_roots

_log = logging.getLogger(__name__)


def devices_of(values: Sequence[Any]) -> set[torch.device]:
    """Returns the devices of the tensors among ``values``."""
    return {value.device for value in values if isinstance(value, Tensor)}


def _name(value: Any) -> Hashable:
    """Returns what a capture is bound to: a parameter's place, another tensor's form, or a number."""
    if not isinstance(value, Tensor):
        return value
    form = (value.dtype, value.shape, value.stride())
    return (value.data_ptr(), *form) if isinstance(value, nn.Parameter) else form


def _is_on_host(value: Any) -> bool:
    """Returns whether a value is a tensor [] on the CPU, which what runs on a GPU takes as a number."""
    return isinstance(value, Tensor) and value.ndim == 0 and value.is_cpu and not cuda_graph.serves(value.device)


def _place_for(value: Any, device: torch.device) -> Any:
    """Returns where a capture reads an input: a parameter itself, a tensor of another's form, or the number."""
    if not isinstance(value, Tensor) or isinstance(value, nn.Parameter):
        return value
    with torch.inference_mode(False):  # a tensor of inference mode cannot be written to outside of it
        place = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    _write(place, value)
    return place


def _write(place: Tensor, value: Tensor) -> None:
    """Copies an input to its place; elements that share their memory, as after ``expand``, once."""
    if _is_on_host(value):
        place.fill_(value)
        return
    for dim, stride in enumerate(value.stride()):
        if stride == 0 and value.shape[dim] > 1:
            place, value = place.narrow(dim, 0, 1), value.narrow(dim, 0, 1)
    place.copy_(value)


def _storage(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


def _reason_against_results(inputs: Sequence[Any], results: Sequence[Any]) -> str | None:
    """Returns why results cannot be handed out as copies: they share memory with an input or with one another."""
    given = {_storage(value) for value in inputs if isinstance(value, Tensor) and value.numel()}
    found = [_storage(value) for value in results if isinstance(value, Tensor) and value.numel()]
    if given & set(found):
        return "a result is a view of an input"
    return "two results share their memory" if len(set(found)) < len(found) else None


class CudaGraphs:
    """Calls a graph; by a CUDA graph where that is right, and otherwise as it is, with one note that says why."""

    def __init__(self, module: fx.GraphModule, notes: list[str]) -> None:
        self._call: Callable[..., Any] = module.forward
        self._notes, self._captures = notes, Captures()
        self._reason: str | None = None
        results = [tensor(node) for node in module.graph.output_node().all_input_nodes]
        if any(node.op == "placeholder" for node in written_roots(module.graph)):
            self._give_up("the graph writes to an input")
        elif any(result is not None and not cuda_graph.serves(result.device) for result in results):
            self._give_up("a result is on the CPU")

    def of(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Returns what runs ``call``, the graph as it is or as it was compiled further, by CUDA graphs."""
        self._call = call
        return self.run

    def _give_up(self, reason: str) -> None:
        self._reason = reason
        self._captures.clear()
        self._notes.append(f"no CUDA graph: {reason}")
        _log.info("no CUDA graph: %s", reason)

    def _capture(self, key: Hashable, args: Sequence[Any], device: torch.device) -> Capture[Any] | None:
        try:
            inputs = [_place_for(value, device) for value in args]
            capture = Capture(lambda: self._call(*inputs), device, inputs)
        except Exception as error:
            self._give_up(first_line(error))
            return None
        reason = _reason_against_results(inputs, capture.result)
        if reason is not None:
            self._give_up(reason)
            return None
        return self._captures.add(key, capture, device)

    def run(self, *args: Any) -> Any:
        """Calls the graph."""
        devices = devices_of([value for value in args if not _is_on_host(value)])
        usable = [device for device in devices if cuda_graph.unavailable(device) is None]
        if self._reason is not None or torch.is_grad_enabled() or not usable:
            return self._call(*args)
        if len(devices) > 1:
            self._give_up(f"its inputs are on {', '.join(sorted(map(str, devices)))}")
            return self._call(*args)
        (device,) = usable
        key = tuple(map(_name, args))
        capture = self._captures.get(key) or self._capture(key, args, device)
        if capture is None:
            return self._call(*args)
        for place, value in zip(capture.inputs, args, strict=True):
            if place is not value and isinstance(value, Tensor):
                _write(place, value)
        return tuple(y.clone() if isinstance(y, Tensor) else y for y in capture.replay())
