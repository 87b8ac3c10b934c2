"""A stand-in for CUDA graphs on the CPU: a capture notes the operators that run, a replay runs them again.

As on a GPU, a replay reads and writes the tensors of the capture, and nothing of Python runs in it; a value that is
read back while capturing, or that comes from the host, is an error. A capture leaves no results: what it made is NaN
until the first replay, and what it wrote to is put back.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dd_kernels.ops import checks, cuda_graph

_FROM_HOST = {"aten::_local_scalar_dense", "aten::lift_fresh", "aten::equal", "aten::is_nonzero"}


def storages(value: Any) -> set[int]:
    """Returns which memory the tensors in a value lie in."""
    return {x.untyped_storage()._cdata for x in tree_leaves(value) if isinstance(x, Tensor)}


class Recorder(TorchDispatchMode):
    """Notes each operator, what it was given and what it gave."""

    def __init__(self, refused: set[str]) -> None:
        super().__init__()
        self.refused = refused
        self.calls: list[tuple[Any, tuple, dict, Any]] = []
        self.before: list[tuple[Tensor, Tensor]] = []
        self.made: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.name in self.refused:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor):
                self.before.append((value, value.detach().clone()))
        out = func(*args, **kwargs)
        if not storages(out) & storages((args, kwargs)):
            self.made += [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.calls.append((func, args, kwargs, out))
        return out

    def end(self) -> None:
        """Leaves what a capture on a GPU leaves."""
        for x in self.made:
            x.fill_(float("nan") if x.is_floating_point() else 77)
        for x, old in reversed(self.before):
            x.copy_(old)

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            new = func(*args, **kwargs)
            if storages(out) & storages((args, kwargs)):
                continue  # the result is a view, or was written in place
            for old, value in zip(tree_leaves(out), tree_leaves(new), strict=True):
                if isinstance(old, Tensor):
                    old.copy_(value)


class Graph:
    recorder: Recorder

    def __init__(self, fake: FakeCuda) -> None:
        self.fake = fake

    def replay(self) -> None:
        self.fake.replays += 1
        with torch.inference_mode():  # inference mode allows writes to the tensors that were made in it
            self.recorder.replay()


class FakeCuda:
    """What :mod:`dd_kernels.ops.cuda_graph` asks of torch.cuda; a capture takes ``bytes_each``."""

    def __init__(self) -> None:
        self.captures = self.replays = self.reserved = 0
        self.capturing = False
        self.refused = set(_FROM_HOST)  # operators that make a capture fail
        self.bytes_each, self.total = 1 << 20, 1 << 40

    def Stream(self, device: Any) -> Any:
        return self

    def current_stream(self, device: Any) -> Any:
        return self

    def wait_stream(self, other: Any) -> None:
        assert other is self

    def stream(self, stream: Any) -> Any:
        return contextlib.nullcontext()

    def is_current_stream_capturing(self) -> bool:
        return self.capturing

    def memory_reserved(self, device: Any) -> int:
        return self.reserved

    def mem_get_info(self, device: Any) -> tuple[int, int]:
        return self.total, self.total

    def CUDAGraph(self) -> Graph:
        return Graph(self)

    @contextlib.contextmanager
    def graph(self, graph: Graph, capture_error_mode: str) -> Any:
        graph.recorder, self.capturing = Recorder(self.refused), True
        try:
            with torch.random.fork_rng([]), graph.recorder:  # nothing is drawn while capturing
                yield
        finally:
            self.capturing = False
        with torch.inference_mode():
            graph.recorder.end()
        self.captures += 1
        self.reserved += self.bytes_each


def install(patch: pytest.MonkeyPatch) -> FakeCuda:
    """Lets the CPU be a device with CUDA graphs, whose values are not read."""
    fake = FakeCuda()
    patch.setattr(cuda_graph, "cuda", fake)
    patch.setattr(cuda_graph, "DEVICE_TYPE", "cpu")
    patch.setattr(checks, "_can_be_read", lambda index: False)
    return fake
