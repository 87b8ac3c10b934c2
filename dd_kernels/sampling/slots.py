"""The images of a running batch, each at its own step of its own table, and a step of all of them together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..ops.randn import Stream, randn
from ..ops.reverse_step import reverse_step
from ..ops.reverse_step.table import COLUMNS, StepTable
from .guidance import (
    Interval,
    Model,
    as_model_takes,
    check_guidance,
    guided_steps,
    is_self_conditioned,
    predict,
    rescaled,
)
from .requests import hand_on

_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True, eq=False)
class SampleRequest:
    """One image to draw: the arguments of :func:`dd_kernels.sample` for a batch of one.

    Args:
        table: what a sampler gives, such as :func:`dd_kernels.ddim`.
        seed, first_sample: of the noise, and the index of the image in the whole job.
        model_kwargs: passed to the model; tensors [1, ...], and numbers, strings, booleans and None.
        uncond_kwargs, guidance_scale, guidance_rescale, guidance_interval: classifier-free guidance.

    Raises:
        ValueError, TypeError: an argument that does not fit; the message names it.
    """

    table: StepTable
    seed: int
    first_sample: int = 0
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    uncond_kwargs: Mapping[str, Any] | None = None
    guidance_scale: float = 1.0
    guidance_rescale: float = 0.0
    guidance_interval: Interval | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.table, StepTable):
            raise TypeError(f"table must be a StepTable, as ddpm() and ddim() make it; got {type(self.table).__name__}")
        check_guidance(self.guidance_rescale, self.guidance_interval)
        for name, kwargs in (("model_kwargs", self.model_kwargs), ("uncond_kwargs", self.uncond_kwargs or {})):
            for key, value in kwargs.items():
                if isinstance(value, Tensor) and (value.ndim == 0 or value.shape[0] != 1):
                    raise ValueError(f"{name}[{key!r}] must be a tensor [1, ...]; got {list(value.shape)}")
                if not isinstance(value, (Tensor, *_PLAIN)):
                    wanted = "a tensor [1, ...], a number, a string or None"
                    raise TypeError(f"{name}[{key!r}] must be {wanted}; got {type(value).__name__}")


def _form(kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Returns names, and of tensors shape, dtype and device, of other values themselves."""
    return tuple(
        (key, value.shape, value.dtype, value.device) if isinstance(value, Tensor) else (key, type(value), value)
        for key, value in sorted(kwargs.items())
    )


@dataclass(eq=False)
class Slot:
    """An image in flight: its x_t [1, C, H, W], its next step, and x_0 of the last even and of the last odd step.

    A table of one x_0 keeps the last step's, whatever its number; one of two keeps them by even and odd. The tables
    that a slot's step is joined with change from step to step, so that both are kept here by even and odd.
    """

    request: SampleRequest
    future: Future[Tensor]
    x: Tensor
    index: int = 0
    error: BaseException | None = None
    history: list[Tensor] = field(init=False)
    x_self: Tensor = field(init=False)  # what a model with self-conditioning reads, x_0 of the step before
    guided: list[bool] = field(init=False)

    def __post_init__(self) -> None:
        self.history = [self.x, self.x]  # a solver's first steps read none
        given = self.request.model_kwargs.get("x_self")
        self.x_self = torch.zeros_like(self.x) if given is None else given
        self.guided = guided_steps(self.request.table, self.request.guidance_interval)

    @property
    def uncond_kwargs(self) -> Mapping[str, Any] | None:
        """Returns the model's arguments without the condition; None at a step that is not guided."""
        return self.request.uncond_kwargs if self.guided[self.index] else None

    @property
    def company(self) -> tuple[Any, ...]:
        """Returns what two images must have in common to share a call of the model at their next step."""
        table, uncond_kwargs = self.request.table, self.uncond_kwargs
        parts = (_form(self.request.model_kwargs), None if uncond_kwargs is None else _form(uncond_kwargs))
        return (*parts, table.learned_variance, table.threshold)

    def kept(self, count: int) -> list[Tensor]:
        """Returns what a table that keeps ``count`` x_0 reads at this step."""
        return self.history if count == 2 else [self.history[(self.index - 1) % 2]][:count]

    def keep(self, written: Sequence[Tensor]) -> None:
        """Takes what such a table has written at this step."""
        if len(written) == 2:
            self.history = list(written)
        elif written:
            self.history[self.index % 2] = written[0]

    @property
    def finished(self) -> bool:
        """Returns whether the image is ready, or has failed."""
        return self.error is not None or self.index == len(self.request.table)

    def deliver(self) -> None:
        """Gives the future the image or the error, unless it was cancelled."""
        if self.future.set_running_or_notify_cancel():
            if self.error is not None:
                self.future.set_exception(self.error)
            else:
                self.future.set_result(self.x)


def advance(model: Model, slots: Sequence[Slot], backend: str, most: int) -> int:
    """Takes a step of every slot; those that may share a call of the model do, ``most`` at a time.

    Returns:
        How many may share a call, which is fewer than ``most`` where the device's memory was too small.
    """
    groups: dict[tuple[Any, ...], list[Slot]] = {}
    for slot in slots:
        if not slot.finished:
            groups.setdefault(slot.company, []).append(slot)
    for group in groups.values():
        most = _in_parts(model, group, backend, most)
    return most


def _in_parts(model: Model, slots: Sequence[Slot], backend: str, most: int) -> int:
    """Takes a step of slots, ``most`` at a time or as many as fit; returns how many did."""
    while slots:
        part, slots = slots[:most], slots[most:]
        most = _advance(model, part, backend, most)
    return most


def _advance(model: Model, slots: Sequence[Slot], backend: str, most: int) -> int:
    """Takes a step of slots in one batch; where that fails, in halves, down to the request that makes it fail."""
    try:
        _step(model, slots, backend)
    except Exception as error:  # a model may raise anything, also that memory is too small
        if len(slots) == 1:
            slots[0].error = error
            return most
        half = (len(slots) + 1) // 2
        fits = _in_parts(model, slots, backend, half)
        return fits if fits < half or isinstance(error, torch.OutOfMemoryError) else most
    return most


def _step(model: Model, slots: Sequence[Slot], backend: str) -> None:
    """Takes a step of slots in one batch. Nothing of a slot changes where it raises."""
    table, firsts = _joined(tuple(sorted({slot.request.table for slot in slots}, key=id)))
    index = [firsts[slot.request.table] + slot.index for slot in slots]
    x = torch.cat([slot.x for slot in slots])
    rows = torch.tensor(index, device=x.device)
    out = _predicted(model, slots, x, table.on(x.device).times[rows])
    history = [torch.cat(kept) for kept in zip(*(slot.kept(table.history) for slot in slots), strict=True)]
    noise = _noise(slots, x, backend) if table.stochastic else None
    keeps_x0 = is_self_conditioned(model)
    result = reverse_step(x, out, table, rows, noise=noise, history=history, return_x0=keeps_x0, backend=backend)
    x, x0 = result if isinstance(result, tuple) else (result, None)
    for i, slot in enumerate(slots):
        slot.x = x[i : i + 1]
        slot.x_self = slot.x_self if x0 is None else x0[i : i + 1]
        slot.keep([kept[i : i + 1] for kept in history])
        slot.index += 1


@lru_cache(maxsize=8)
def _joined(tables: tuple[StepTable, ...]) -> tuple[StepTable, dict[StepTable, int]]:
    """Returns one table of the rows of all, and by table where its rows begin.

    Each begins at an even row, because the kernel keeps the x_0 of even and of odd steps apart.
    """
    rows, timesteps, times, firsts, count = [], [], [], dict[StepTable, int](), 0
    floats = any(table.times is not None for table in tables)
    for table in tables:
        firsts[table] = count
        odd = len(table) % 2
        padding = torch.zeros(odd, len(COLUMNS), dtype=torch.float64)
        padding[:, COLUMNS.index("x0_den")] = 1
        rows += [table.rows, padding]
        timesteps.append(torch.nn.functional.pad(table.timesteps, (0, odd)))
        times.append(torch.nn.functional.pad(table.model_times.double(), (0, odd)))
        count += len(table) + odd
    joined = StepTable(
        torch.cat(rows),
        torch.cat(timesteps),
        tables[0].learned_variance,
        tables[0].threshold,
        torch.cat(times) if floats else None,
    )
    return joined, firsts


def _predicted(model: Model, slots: Sequence[Slot], x: Tensor, t: Tensor) -> Tensor:
    """Returns the model's output, guided where the requests are."""
    requests = [slot.request for slot in slots]
    given = as_model_takes(model, x)
    kwargs, uncond_kwargs = _batched([request.model_kwargs for request in requests]), None
    if slots[0].uncond_kwargs is not None:
        uncond_kwargs = _batched([request.uncond_kwargs or {} for request in requests])
    if is_self_conditioned(model):
        hand_on(torch.cat([slot.x_self for slot in slots]), kwargs, uncond_kwargs)
    out, uncond = predict(model, given, t, kwargs, uncond_kwargs)
    if uncond is None:
        return out
    per_sample = torch.tensor([(r.guidance_scale, r.guidance_rescale) for r in requests], device=x.device)
    scale, amount = per_sample.view(len(slots), 2, *[1] * (x.ndim - 1)).unbind(1)
    return rescaled(out, uncond, scale, amount, x.shape[1])


def _batched(every: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the arguments of one call; tensors are joined, other values are equal in all."""
    first = every[0]
    joined = (
        torch.cat([kwargs[key] for kwargs in every]) if isinstance(first[key], Tensor) else first[key] for key in first
    )
    return dict(zip(first, joined, strict=True))


def _noise(slots: Sequence[Slot], x: Tensor, backend: str) -> Tensor:
    """Returns the noise of each slot's step, which depends on its own seed; zeros where the step adds none."""
    drawn = []
    for slot in slots:
        request, table = slot.request, slot.request.table
        if table.column("sigma")[slot.index] == 0:
            drawn.append(torch.zeros_like(slot.x))
            continue
        drawn.append(
            randn(
                slot.x.shape,
                seed=request.seed,
                first_sample=request.first_sample,
                draw=int(table.timesteps[slot.index]),
                stream=int(Stream.REVERSE_STEP),
                device=x.device,
                dtype=x.dtype,
                backend=backend,
            )
        )
    return torch.cat(drawn)
