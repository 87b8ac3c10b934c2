"""Runs a rewritten graph as a CUDA graph, captured once per shape of its inputs; only in inference.

A number on the host, such as the timestep of a pipeline that leaves its timesteps there, is read on the device: it
travels with the launch that writes it, so that no step waits for the device.
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
from .places import WRITES, copied_out, form, place_for, reason_against_results, write, writes_to_an_input

_log = logging.getLogger(__name__)


def devices_of(values: Sequence[Any]) -> set[torch.device]:
    """Returns the devices of the tensors among ``values``."""
    return {value.device for value in values if isinstance(value, Tensor)}


def _name(value: Any) -> Hashable:
    """Returns what a capture is bound to: a parameter's place, another tensor's form, or a number."""
    if not isinstance(value, Tensor):
        return value
    return (value.data_ptr(), form(value)) if isinstance(value, nn.Parameter) else form(value)


def _is_on_host(value: Any) -> bool:
    """Returns whether a value is a tensor [] on the CPU, which what runs on a GPU takes as a number."""
    return isinstance(value, Tensor) and value.ndim == 0 and value.is_cpu and not cuda_graph.serves(value.device)


class CudaGraphs:
    """Calls a graph; by a CUDA graph where that is right, and otherwise as it is, with one note that says why."""

    def __init__(self, module: fx.GraphModule, notes: list[str]) -> None:
        self._call: Callable[..., Any] = module.forward
        self._notes, self._captures = notes, Captures()
        self._reason: str | None = None
        results = [tensor(node) for node in module.graph.output_node().all_input_nodes]
        if writes_to_an_input(module.graph):
            self._give_up(WRITES)
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
            inputs = [place_for(value, device) for value in args]
            capture = Capture(lambda: self._call(*inputs), device, inputs)
        except Exception as error:
            self._give_up(first_line(error))
            return None
        reason = reason_against_results(inputs, capture.result)
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
                write(place, value)
        return copied_out(capture.replay())
