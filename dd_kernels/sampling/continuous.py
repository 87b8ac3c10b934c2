"""Serves requests for single images in one running batch, where the next request takes a finished image's place."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import queue
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..ops.randn import randn
from .guidance import Model, device_of
from .slots import SampleRequest, Slot, advance


@dataclass(order=True)
class _Waiting:
    """A request in the queue: of the highest priority first, of equal ones the oldest."""

    rank: tuple[int, int]
    request: SampleRequest = field(compare=False)
    future: Future[Tensor] = field(compare=False)


class Sampler:
    """Draws images for requests that come at any time, each with its own sampler, number of steps, seed and condition.

    All requests in flight share the model's calls, since a step of any sampler is a row of a table. An image
    is the one that :func:`dd_kernels.sample` draws alone with the same arguments: its noise is the same to the bit, and
    the model's rounding may depend on the batch. A request that fails, or that alone exceeds the device's memory, does
    not harm the others.

    Args:
        model: as :func:`dd_kernels.sample` takes it.
        shape: [C, H, W] of one image.
        max_batch: images in flight.
        max_queue: requests that may wait besides; without a bound if None.
        device, dtype: of the images; the model's device and float32 by default.
        backend: "auto", "cpu", "cuda", "triton" or "reference".

    Raises:
        ValueError, TypeError: an argument that does not fit.
    """

    def __init__(
        self,
        model: Model,
        shape: Iterable[int],
        *,
        max_batch: int = 16,
        max_queue: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        backend: str = "auto",
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be callable as model(x, t, **model_kwargs); got {type(model).__name__}")
        for name, value in (("max_batch", max_batch), ("max_queue", 1 if max_queue is None else max_queue)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        self.model, self.shape, self.max_batch, self.max_queue = model, tuple(shape), max_batch, max_queue
        self.device = device_of(model) if device is None else torch.device(device)
        self.dtype, self.backend = dtype, backend
        self._waiting: list[_Waiting] = []
        self._slots: list[Slot] = []
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._fits = max_batch  # images that the device's memory holds in one call of the model
        self._closed = False

    def submit(self, request: SampleRequest, priority: int = 0) -> Future[Tensor]:
        """Queues a request, from any thread; its future gives the image [1, C, H, W].

        Args:
            request: what to draw.
            priority: of waiting requests the highest goes first, of equal ones the oldest.

        Returns:
            A future, which is cancelled by ``cancel()`` as long as the image is not ready: its place is free at the
            next step.

        Raises:
            queue.Full: ``max_queue`` requests wait already.
            TypeError: no :class:`SampleRequest`.
            RuntimeError: the sampler is closed.
        """
        if not isinstance(request, SampleRequest):
            raise TypeError(f"request must be a SampleRequest; got {type(request).__name__}")
        future: Future[Tensor] = Future()
        with self._changed:
            if self._closed:
                raise RuntimeError("the sampler is closed")
            if self.max_queue is not None and len(self._waiting) >= self.max_queue:
                self._waiting = [entry for entry in self._waiting if not entry.future.cancelled()]
                heapq.heapify(self._waiting)
            if self.max_queue is not None and len(self._waiting) >= self.max_queue:
                raise queue.Full(f"max_queue={self.max_queue} requests wait already")
            heapq.heappush(self._waiting, _Waiting((-priority, next(self._numbers)), request, future))
            self._changed.notify_all()
        return future

    @property
    def busy(self) -> bool:
        """Returns whether any request waits or is in flight."""
        return bool(self._waiting or self._slots)

    @torch.no_grad()
    def step(self) -> bool:
        """Takes one step of every image in flight, after free places are filled; returns False where there is none."""
        with self._changed:
            self._slots = [slot for slot in self._slots if not slot.future.cancelled()]
            while self._waiting and len(self._slots) < self.max_batch:
                entry = heapq.heappop(self._waiting)
                if not entry.future.cancelled():
                    self._slots.append(self._started(entry))
        self._fits = min(self._fits, advance(self.model, self._slots, self.backend, self._fits))
        finished = [slot for slot in self._slots if slot.finished]
        self._slots = [slot for slot in self._slots if not slot.finished]
        for slot in finished:
            slot.deliver()
        return bool(self._slots or finished)

    def _started(self, entry: _Waiting) -> Slot:
        request = entry.request
        x = randn(
            (1, *self.shape),
            seed=request.seed,
            first_sample=request.first_sample,
            device=self.device,
            dtype=self.dtype,
            backend=self.backend,
        )
        return Slot(request, entry.future, x)

    def generate(self, requests: Iterable[SampleRequest]) -> Iterator[tuple[int, Tensor]]:
        """Draws requests, of which only as many are taken from the iterable as there are places.

        Yields:
            (number of the request, its image [1, C, H, W]) as soon as an image is ready.

        Raises:
            Exception: that of the first request that failed.
        """
        numbered, running = iter(enumerate(requests)), dict[Future[Tensor], int]()
        while True:
            for number, request in itertools.islice(numbered, self.max_batch - len(running)):
                running[self.submit(request)] = number
            if not running:
                return
            self.step()
            for future in [future for future in running if future.done()]:
                yield running.pop(future), future.result()

    @contextlib.contextmanager
    def serving(self) -> Iterator[Sampler]:
        """Takes steps in a thread of its own while the block runs; requests still there at its end are cancelled."""
        thread = threading.Thread(target=self._serve, name="dd_kernels.Sampler", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            with self._changed:
                self._closed = True
                self._changed.notify_all()
            thread.join()
            for future in [entry.future for entry in self._waiting] + [slot.future for slot in self._slots]:
                future.cancel()

    def _serve(self) -> None:
        while not self._closed:
            if not self.step():
                with self._changed:
                    self._changed.wait_for(lambda: self._waiting or self._closed)
