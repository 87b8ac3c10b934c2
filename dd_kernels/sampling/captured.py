"""Takes a sampler's steps by one CUDA graph: model and ``reverse_step``, captured once, replayed for every step.

The step's row, the seed, the first sample, the table, the noise and the model's arguments lie on the device and are
written there before a replay, so that other seeds, conditions and tables of one length need no other capture. A replay
runs nothing of the model's Python code: what that code looks at is compared before each use, and the model is captured
anew where it has changed.
"""

from __future__ import annotations

import copy
import logging
import threading
import weakref
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from .. import backend as backends
from ..ops import cuda_graph
from ..ops.checks import KERNEL_DTYPES
from ..ops.cuda_graph import Capture, Captures, first_line
from ..ops.randn.key import noise_key
from ..ops.reverse_step import reverse_step
from ..ops.reverse_step.table import StepTable
from .fingerprint import fingerprint
from .guidance import guided_steps
from .requests import Request, Step

_log = logging.getLogger(__name__)
_FEWEST_STEPS = 3  # a capture costs three calls of the model


@dataclass(eq=False)
class _Places:
    """What a captured step reads on the device, and x, which it advances."""

    x: Tensor
    row: Tensor
    key: Tensor
    table: StepTable
    arguments: list[Any]
    noise: Tensor | None
    history: tuple[Tensor, ...]  # what a multistep solver keeps; its first contents are not read
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(eq=False)
class _Known:
    """What is known of a model: its captures, and why some were refused."""

    fingerprint: Hashable = None
    captures: Captures = field(default_factory=Captures)
    refused: dict[Hashable, str] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)

    def at(self, now: Hashable) -> _Known:
        """Forgets what was captured of another state of the model."""
        if now != self.fingerprint:
            self.captures.clear()
            self.refused.clear()
            self.fingerprint = now
        return self

    def tell(self, reason: str) -> None:
        """Logs a reason once."""
        if reason not in self.told:
            self.told.add(reason)
            _log.info("sampling without a CUDA graph: %s", reason)


_models: weakref.WeakKeyDictionary[Any, _Known] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class _Run:
    """One batch of a request."""

    request: Request
    x: Tensor
    batch: slice
    return_x0: bool
    noise_dtypes: set[torch.dtype]  # of the noise that the caller gives
    leaves: list[Any]
    spec: TreeSpec

    @staticmethod
    def of(request: Request, x: Tensor, batch: slice, return_x0: bool) -> _Run:
        """Returns the batch with its arguments of the model as a flat list."""
        leaves, spec = tree_flatten(request.arguments(x, batch))
        noisy, source, dtypes = request.table.stochastic, request.source, set()
        if noisy and source.generator is not None:
            dtypes = {x.dtype}
        elif noisy and source.noise is not None and not callable(source.noise):
            dtypes = {noise.dtype for noise in source.noise}
        return _Run(request, x, batch, return_x0, dtypes, leaves, spec)

    @property
    def seed(self) -> Tensor:
        """Returns the key of the noise on the device."""
        first = self.request.first_sample + self.batch.start
        return noise_key(self.request.source.seed, first, 0, self.x.device, self.x.shape[0])

    def name(self) -> Hashable:
        """Returns everything that a capture is bound to."""
        request, table = self.request, self.request.table
        device = self.x.device
        on_device = [_form(v) for v in table.on(device) if isinstance(v, Tensor)]
        kernel = backends.choose("reverse_step", request.backend, device)
        autocast = (torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type))
        modes = (backends.is_free(), *autocast, torch.get_float32_matmul_precision())
        form = (_form(self.x), *self.noise_dtypes, tuple(on_device), repr(self.spec), *map(_form, self.leaves))
        solver = (table.learned_variance, table.stochastic, table.threshold, table.history)
        guidance = (request.guidance_scale, request.guidance_rescale)
        return (form, solver, guidance, self.return_x0, kernel, modes)

    def capture(self) -> Capture[Tensor | None]:
        """Captures one step."""
        request, places = self.request, self._places()
        arguments, estimates = self._arguments(places), self._estimates(places)
        batch = self.x.shape[0]
        options: dict[str, Any] = {"noise": places.noise} if places.noise is not None else {"seed": places.key}
        options |= {"guidance_scale": request.guidance_scale, "backend": request.backend, "x_prev": places.x}
        options["history"] = places.history

        def step() -> Tensor | None:
            x, table, row = places.x, places.table, places.row
            t = table.on(x.device).times.index_select(0, row).expand(batch)
            out, uncond = request.predict(x, t, *arguments)
            keeps_x0 = self.return_x0 or request.keeps_x0
            result = reverse_step(x, out, table, row, uncond=uncond, return_x0=keeps_x0, **options)
            row.add_(1)
            if not isinstance(result, tuple):
                return None
            for estimate in estimates:
                estimate.copy_(result[1])
            return result[1] if self.return_x0 else None

        return Capture(step, self.x.device, places)

    def _arguments(self, places: _Places) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Returns the model's arguments on the device, with the condition and without."""
        arguments: tuple[dict[str, Any], dict[str, Any] | None] = tree_unflatten(places.arguments, self.spec)
        return arguments

    def _estimates(self, places: _Places) -> list[Tensor]:
        """Returns those of the arguments that are x_0 of the step before."""
        arguments = self._arguments(places) if self.request.keeps_x0 else ()
        return [own["x_self"] for own in arguments if own is not None]

    def _places(self) -> _Places:
        with torch.inference_mode(False):  # a tensor of inference mode cannot be written to outside of it
            x = torch.empty_like(self.x).copy_(self.x)
            noise = torch.zeros_like(x, dtype=next(iter(self.noise_dtypes))) if self.noise_dtypes else None
            arguments = [torch.empty_like(v).copy_(v) if isinstance(v, Tensor) else v for v in self.leaves]
            row = torch.zeros(1, dtype=torch.int64, device=x.device)
            table = copy.deepcopy(self.request.table)
            return _Places(x, row, self.seed.clone(), table, arguments, noise, table.history_like(x))

    def begin(self, places: _Places) -> None:
        """Writes what this batch starts from."""
        places.x.copy_(self.x)
        places.row.zero_()
        places.key.copy_(self.seed)
        device = self.x.device
        for place, value in zip(places.table.on(device), self.request.table.on(device), strict=True):
            if isinstance(place, Tensor) and isinstance(value, Tensor):
                place.copy_(value)
        for place, value in zip(places.arguments, self.leaves, strict=True):
            if isinstance(place, Tensor):
                place.copy_(value)

    def replay(self, capture: Capture[Tensor | None], known: _Known) -> Iterator[Step]:
        """Yields the steps; goes on without the capture where the model is changed by who sees them."""
        request, places, now = self.request, capture.inputs, known.fingerprint
        self.begin(places)
        sigmas, timesteps = request.table.column("sigma").tolist(), request.table.timesteps.tolist()
        for index, timestep in enumerate(timesteps):
            if self.return_x0 and index > 0 and fingerprint(request.model) != now:
                history = [kept.clone() for kept in places.history]
                x_self = next((estimate.clone() for estimate in self._estimates(places)), None)
                yield from request.steps(places.x.clone(), self.batch, self.return_x0, index, history, x_self)
                return
            if places.noise is not None and sigmas[index] != 0:
                noise = request.source.of_step(index, places.x, self.batch)
                assert noise is not None
                places.noise.copy_(noise)
            x0 = capture.replay()
            seen = self.return_x0 or index == len(timesteps) - 1
            x = places.x.clone() if seen else places.x
            yield Step(index, timestep, x, None if x0 is None else x0.clone())


def _form(value: Any) -> Hashable:
    """Returns the form of a tensor, whose values may change, or another value itself."""
    return (value.dtype, value.device, value.shape, value.stride()) if isinstance(value, Tensor) else value


def _reason_against(run: _Run) -> str | None:
    """Returns why a batch runs without a capture, if anything speaks against one."""
    request = run.request
    if not isinstance(request.model, torch.nn.Module) and request.cuda_graph == "auto":
        return "the model is a function, of which a replay would not run the Python code (cuda_graph=True captures it)"
    if request.uncond_kwargs is not None and not all(guided_steps(request.table, request.guidance_interval)):
        return "the guidance has an interval, outside of which the model is called otherwise"
    if request.table.stochastic and callable(request.source.noise):
        return "the noise is a function"
    if len(run.noise_dtypes) > 1 or not {run.x.dtype, *run.noise_dtypes} <= set(KERNEL_DTYPES):
        return "x or the noise is float64, or the noise is of several dtypes"
    try:
        hash(run.name())
    except TypeError as error:
        return f"an argument of the model is no part of a key: {error}"
    return None


def _captured(run: _Run, known: _Known) -> Capture[Tensor | None] | None:
    """Returns the capture that serves a batch; None where there cannot be one, which is logged."""
    reason = _reason_against(run)
    if reason is not None:
        known.tell(reason)
        return None
    now, name = fingerprint(run.request.model), run.name()
    if now is None:
        known.tell("the model has hooks, which a replay would not call")
        return None
    found = known.at(now).captures.get(name)
    if found is None and name not in known.refused:
        try:
            found = known.captures.add(name, run.capture(), run.x.device)
        except Exception as error:
            known.refused[name] = first_line(error)
    if found is None:
        known.tell(known.refused[name])
    return found


def steps(request: Request, x: Tensor, batch: slice, return_x0: bool) -> Iterator[Step]:
    """Yields a batch's steps, by a CUDA graph where there can be one."""
    few = len(request.table) < _FEWEST_STEPS or x.numel() == 0
    if request.cuda_graph is False or few or cuda_graph.unavailable(x.device) is not None:
        yield from request.steps(x, batch, return_x0)
        return
    known = _models.setdefault(request.model, _Known())
    run = _Run.of(request, x, batch, return_x0)
    capture = _captured(run, known)
    if capture is None or not capture.inputs.lock.acquire(blocking=False):  # another loop stands between two steps
        yield from request.steps(x, batch, return_x0)
        return
    try:
        yield from run.replay(capture, known)
    finally:
        capture.inputs.lock.release()
