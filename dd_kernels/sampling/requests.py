"""Holds what a call of ``sample`` asks for, and takes its steps: the model, then the kernel, row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.randn import randn
from ..ops.reverse_step import reverse_step
from ..ops.reverse_step.table import StepTable
from .buffers import Buffers
from .guards import Guards
from .guidance import (
    Interval,
    Model,
    as_model_takes,
    check_guidance,
    device_of,
    guided_steps,
    is_self_conditioned,
    predict,
    rescaled,
)

Noise = Tensor | Sequence[Tensor] | Callable[[int], Tensor]


class Step(NamedTuple):
    """What one step of a sampler gives: its row, its timestep, x_{t-1}, and x_0 where it was asked for.

    Nobody writes to ``x`` or ``x0`` afterwards.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index
    timestep: int
    x: Tensor
    x0: Tensor | None


@dataclass(frozen=True)
class _Source:
    """Where x_T and the noise of the steps come from: the caller's tensors, a generator, or a seed."""

    noise: Noise | None
    generator: torch.Generator | None
    seed: int  # 0 where nothing is drawn from it

    @staticmethod
    def checked(table: StepTable, noise: Noise | None, generator: object, seed: int | None, draws_x_T: bool) -> _Source:
        """Returns the source, or raises where the arguments clash; draws a seed only where one is needed."""
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator; got {type(generator).__name__}")
        for name, other in (("seed", seed), ("noise", noise)):
            if other is not None and generator is not None:
                raise ValueError(f"only one of {name} and generator may be given; got both")
        if noise is not None and not callable(noise) and len(noise) != len(table):
            raise ValueError(f"noise must hold one tensor per step, {len(table)}; got {len(noise)}")
        if seed is None:
            needed = generator is None and (draws_x_T or (table.stochastic and noise is None))
            seed = drawn_seed() if needed else 0
        return _Source(noise, generator, seed)

    def x_T(self, shape: Sequence[int], first_sample: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Draws x_T."""
        if self.generator is not None:
            return _drawn(self.generator, shape, device, dtype)
        return randn(shape, seed=self.seed, first_sample=first_sample, device=device, dtype=dtype)

    def of_step(self, index: int, x: Tensor, batch: slice) -> Tensor | None:
        """Returns the noise of step ``index``, or None where the kernel draws it from the seed."""
        if self.generator is not None:
            return _drawn(self.generator, x.shape, x.device, x.dtype)
        if self.noise is None:
            return None
        return (self.noise(index) if callable(self.noise) else self.noise[index])[batch]


def hand_on(x0: Tensor | None, kwargs: dict[str, Any], uncond_kwargs: dict[str, Any] | None) -> None:
    """Makes x_0 of a step an argument of the model at the next one, with the condition and without."""
    kwargs["x_self"] = x0
    if uncond_kwargs is not None:
        uncond_kwargs["x_self"] = x0


def drawn_seed() -> int:
    """Returns a seed from torch's global generator, so that torch.manual_seed decides it."""
    return int(torch.randint(2**63 - 1, ()))


def _drawn(generator: torch.Generator, shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Draws normal noise from the generator, on its own device, and returns it on ``device``."""
    return torch.randn(tuple(shape), generator=generator, device=generator.device, dtype=dtype).to(device)


@dataclass(frozen=True, eq=False)
class Request:
    """The arguments that ``sample`` and ``sample_progressive`` share, checked; see :func:`dd_kernels.sample`."""

    model: Model
    shape_or_x: Sequence[int] | Tensor
    table: StepTable
    seed: int | None
    first_sample: int
    noise: Noise | None
    generator: torch.Generator | None
    model_kwargs: Mapping[str, Any] | None
    uncond_kwargs: Mapping[str, Any] | None
    guidance_scale: float
    guidance_rescale: float
    guidance_interval: Interval | None
    device: torch.device | str | None
    dtype: torch.dtype
    backend: str
    cuda_graph: bool | str = "auto"
    source: _Source = field(init=False)

    def __post_init__(self) -> None:
        if not callable(self.model):
            raise TypeError(f"model must be callable as model(x, t, **model_kwargs); got {type(self.model).__name__}")
        check_guidance(self.guidance_rescale, self.guidance_interval)
        if not isinstance(self.table, StepTable):
            raise TypeError(f"table must be a StepTable, as ddpm() and ddim() make it; got {type(self.table).__name__}")
        if self.cuda_graph not in (True, False, "auto"):
            raise ValueError(f"cuda_graph must be True, False or 'auto'; got {self.cuda_graph!r}")
        given = isinstance(self.shape_or_x, Tensor)
        source = _Source.checked(self.table, self.noise, self.generator, self.seed, draws_x_T=not given)
        object.__setattr__(self, "source", source)
        shape = tuple(self.shape_or_x.shape if isinstance(self.shape_or_x, Tensor) else self.shape_or_x)
        if not shape or any(not isinstance(size, int) or size < 0 for size in shape):
            wanted = "a tensor or the shape [N, C, H, W] of the samples"
            raise ValueError(f"shape_or_x must be {wanted}; got {self.shape_or_x!r}")

    @property
    def total(self) -> int:
        """Returns the number of samples."""
        return self.shape_or_x.shape[0] if isinstance(self.shape_or_x, Tensor) else self.shape_or_x[0]

    def batches(self, batch_size: int | None) -> list[slice]:
        """Cuts the samples into batches; returns one empty batch where there are none."""
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}")
        size = batch_size or max(self.total, 1)
        return [slice(start, min(start + size, self.total)) for start in range(0, max(self.total, 1), size)]

    def start(self, batch: slice) -> Tensor:
        """Returns the x that a batch starts from: cut from the tensor given, or drawn."""
        if isinstance(self.shape_or_x, Tensor):
            return self.shape_or_x[batch]
        device = device_of(self.model) if self.device is None else torch.device(self.device)
        shape = (batch.stop - batch.start, *self.shape_or_x[1:])
        return self.source.x_T(shape, self.first_sample + batch.start, device, self.dtype)

    def _of_batch(self, kwargs: Mapping[str, Any], batch: slice) -> dict[str, Any]:
        """Returns the batch's share of the model's arguments: tensors of one row per sample are cut."""
        cut = {k for k, v in kwargs.items() if isinstance(v, Tensor) and v.ndim and len(v) == self.total}
        return {k: v[batch] if k in cut else v for k, v in kwargs.items()}

    @property
    def keeps_x0(self) -> bool:
        """Returns whether x_0 of each step is an argument of the model at the next one."""
        return is_self_conditioned(self.model)

    def arguments(self, x: Tensor, batch: slice) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Returns the model's arguments for a batch that starts from ``x``, and those without the condition.

        Both hold ``x_self`` for a model with self-conditioning: what ``model_kwargs`` say, or zeros.
        """
        kwargs = self._of_batch(self.model_kwargs or {}, batch)
        uncond_kwargs = None if self.uncond_kwargs is None else self._of_batch(self.uncond_kwargs, batch)
        if self.keeps_x0:
            given = kwargs.get("x_self")
            hand_on(torch.zeros_like(x) if given is None else given, kwargs, uncond_kwargs)
        return kwargs, uncond_kwargs

    def predict(
        self, x: Tensor, t: Tensor, kwargs: Mapping[str, Any], uncond_kwargs: Mapping[str, Any] | None
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the model's output with the condition, or with the guidance applied, and that without, if any."""
        out, uncond = predict(self.model, as_model_takes(self.model, x), t, kwargs, uncond_kwargs)
        if uncond is not None and self.guidance_rescale:
            return rescaled(out, uncond, self.guidance_scale, self.guidance_rescale, x.shape[1]), None
        return out, uncond

    def steps(
        self,
        x: Tensor,
        batch: slice,
        return_x0: bool,
        first: int = 0,
        history: Sequence[Tensor] | None = None,
        x_self: Tensor | None = None,
    ) -> Iterator[Step]:
        """Runs the rows in order, from ``x`` at row ``first``, with that row's history; yields after every step.

        A model with self-conditioning is given ``x_self``, x_0 of the step before row ``first``, where there was one.

        No x is written to while anybody holds it: the model, the callback and the caller may have kept the one before.
        """
        kwargs, uncond_kwargs = self.arguments(x, batch)
        if x_self is not None:
            hand_on(x_self, kwargs, uncond_kwargs)
        times = self.table.on(x.device).times
        sigmas = self.table.column("sigma").tolist()
        options: dict[str, Any] = {"return_x0": return_x0 or self.keeps_x0, "backend": self.backend}
        options["history"] = self.table.history_like(x) if history is None else history
        guided, keeps_x0 = guided_steps(self.table, self.guidance_interval), self.keeps_x0
        buffers, is_seen = Buffers(), return_x0 or callable(self.source.noise)
        guards = Guards(self.model, len(self.table) - first, is_seen or not all(guided))
        for index, timestep in enumerate(self.table.timesteps[first:].tolist(), first):
            t = times[index].expand(x.shape[0])
            without = uncond_kwargs if guided[index] else None
            out, uncond = guards.call(x, partial(self.predict, x, t, kwargs, without))
            noise = self.source.of_step(index, x, batch) if sigmas[index] != 0 else None
            result = reverse_step(
                x,
                out,
                self.table,
                index,
                uncond=uncond,
                guidance_scale=self.guidance_scale,
                noise=noise,
                seed=self.source.seed if noise is None else None,
                first_sample=self.first_sample + batch.start,
                x_prev=buffers.free(x),
                **options,
            )
            x, x0 = result if isinstance(result, tuple) else (result, None)
            buffers.keep(x)
            if keeps_x0:
                hand_on(x0, kwargs, uncond_kwargs)
            yield Step(index, timestep, x, x0 if return_x0 else None)
