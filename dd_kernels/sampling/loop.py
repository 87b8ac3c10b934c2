"""Draws samples: a loop of (model, reverse_step) over the rows of a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ..ops.randn import randn
from ..ops.reverse_step import reverse_step
from ..ops.reverse_step.table import StepTable
from .guidance import Model, device_of, float_parameter, predict

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
            # torch.manual_seed decides, as for any other random function of torch.
            seed = int(torch.randint(2**63 - 1, ())) if needed else 0
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


def _drawn(generator: torch.Generator, shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(tuple(shape), generator=generator, device=generator.device, dtype=dtype).to(device)


@dataclass(frozen=True)
class _Loop:
    """One model, one table, one source of noise; run for one batch at a time."""

    model: Model
    table: StepTable
    source: _Source
    model_kwargs: Mapping[str, Any]
    uncond_kwargs: Mapping[str, Any] | None
    guidance_scale: float
    first_sample: int
    backend: str

    def steps(self, x: Tensor, total: int, batch: slice, bar: tqdm, return_x0: bool) -> Iterator[Step]:
        """Runs the rows in order, from ``x``; yields after every step.

        Every x is a new tensor: the model, the callback and the caller may have kept the one before.
        """
        parameter = float_parameter(self.model)
        model_dtype = x.dtype if parameter is None else parameter.dtype
        kwargs = _of_batch(self.model_kwargs, total, batch)
        uncond_kwargs = None if self.uncond_kwargs is None else _of_batch(self.uncond_kwargs, total, batch)
        timesteps = self.table.on(x.device).timesteps
        sigmas = self.table.column("sigma").tolist()
        options: dict[str, Any] = {"return_x0": return_x0, "backend": self.backend}
        for index, timestep in enumerate(self.table.timesteps.tolist()):
            t = timesteps[index].expand(x.shape[0])
            out, uncond = predict(self.model, x.to(model_dtype), t, kwargs, uncond_kwargs)
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
                **options,
            )
            x, x0 = result if isinstance(result, tuple) else (result, None)
            bar.update()
            yield Step(index, timestep, x, x0)


def _of_batch(kwargs: Mapping[str, Any], total: int, batch: slice) -> dict[str, Any]:
    """Returns the batch's share of the model's arguments: tensors of one row per sample are cut."""
    return {k: v[batch] if isinstance(v, Tensor) and v.ndim and len(v) == total else v for k, v in kwargs.items()}


def _slices(total: int, batch_size: int | None) -> list[slice]:
    """Cuts the samples 0..total into batches; returns one empty batch where there are none."""
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}")
    size = batch_size or max(total, 1)
    return [slice(start, min(start + size, total)) for start in range(0, max(total, 1), size)]


def _start(
    loop: _Loop,
    shape_or_x: Sequence[int] | Tensor,
    batch: slice,
    device: torch.device | str | None,
    dtype: torch.dtype,
) -> Tensor:
    """Returns the x that a batch starts from: cut from the tensor given, or drawn."""
    if isinstance(shape_or_x, Tensor):
        return shape_or_x[batch]
    device = device_of(loop.model) if device is None else torch.device(device)
    shape = (batch.stop - batch.start, *shape_or_x[1:])
    return loop.source.x_T(shape, loop.first_sample + batch.start, device, dtype)


def _sample_count(shape_or_x: Sequence[int] | Tensor) -> int:
    shape = tuple(shape_or_x.shape if isinstance(shape_or_x, Tensor) else shape_or_x)
    if not shape or any(not isinstance(size, int) or size < 0 for size in shape):
        raise ValueError(f"shape_or_x must be a tensor or the shape [N, C, H, W] of the samples; got {shape_or_x!r}")
    return shape[0]


def _loop(
    model: Model,
    shape_or_x: Sequence[int] | Tensor,
    table: StepTable,
    seed: int | None,
    first_sample: int,
    noise: Noise | None,
    generator: torch.Generator | None,
    model_kwargs: Mapping[str, Any] | None,
    uncond_kwargs: Mapping[str, Any] | None,
    guidance_scale: float,
    backend: str,
) -> _Loop:
    if not callable(model):
        raise TypeError(f"model must be callable as model(x, t, **model_kwargs); got {type(model).__name__}")
    if not isinstance(table, StepTable):
        raise TypeError(f"table must be a StepTable, as ddpm() and ddim() make it; got {type(table).__name__}")
    source = _Source.checked(table, noise, generator, seed, draws_x_T=not isinstance(shape_or_x, Tensor))
    return _Loop(model, table, source, model_kwargs or {}, uncond_kwargs, guidance_scale, first_sample, backend)


@torch.no_grad()
def sample(
    model: Model,
    shape_or_x: Sequence[int] | Tensor,
    table: StepTable,
    *,
    seed: int | None = None,
    first_sample: int = 0,
    noise: Noise | None = None,
    generator: torch.Generator | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    uncond_kwargs: Mapping[str, Any] | None = None,
    guidance_scale: float = 1.0,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    callback: Callable[[Step], None] | None = None,
    progress: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Draws samples from a diffusion model with the sampler that ``table`` is.

    Args:
        model: model(x, t, **model_kwargs) -> output; x [N, C, H, W] in the model's dtype, t [N] int64.
            A tensor, a tuple that starts with one, or an object with ``.sample`` (diffusers) may come back.
        shape_or_x: the shape [N, C, H, W] of what to draw, or x_T (or x_0, for an inversion) itself.
        table: :func:`dd_kernels.ddpm`, :func:`dd_kernels.ddim` or :func:`dd_kernels.ddim_inversion`.
        seed: images depend on (seed, first_sample + n) alone, not on the batch, device or backend's
            scheduling. Where noise has to be drawn and there is no source of it, the seed is drawn from torch's
            global generator, which is left alone otherwise.
        first_sample: index of sample 0 in the whole job, for ranks and resumed jobs.
        noise: the steps' noise instead: a tensor [S, N, ...], a sequence of S tensors, or step -> tensor.
        generator: a torch.Generator that x_T (if a shape was given) and every noisy step's noise come from.
        model_kwargs: passed to the model; tensors of N rows are cut into batches with the samples.
        uncond_kwargs, guidance_scale: classifier-free guidance, out = uncond + scale (cond - uncond).
        batch_size: samples per model call; all at once if None.
        device, dtype: of x_T where a shape is given; the model's device and float32 by default.
        callback: called with a :class:`Step` after every step, x0 included.
        progress: show a tqdm bar.
        backend: "auto", "cpu", "cuda", "triton" or "reference".

    Returns:
        The samples, of the shape and dtype of x_T. Neither ``shape_or_x`` nor an x that the model saw is written to.

    Raises:
        ValueError, TypeError: an argument that does not fit; the message names it.
        BackendUnavailableError: a backend asked for by name cannot run.
    """
    loop = _loop(
        model,
        shape_or_x,
        table,
        seed,
        first_sample,
        noise,
        generator,
        model_kwargs,
        uncond_kwargs,
        guidance_scale,
        backend,
    )
    total = _sample_count(shape_or_x)
    batches = _slices(total, batch_size)
    results = []
    with tqdm(total=len(table) * len(batches), desc="sampling", unit="step", disable=not progress) as bar:
        for batch in batches:
            x = _start(loop, shape_or_x, batch, device, dtype)
            for step in loop.steps(x, total, batch, bar, return_x0=callback is not None):
                x = step.x
                if callback is not None:
                    callback(step)
            results.append(x)
    return results[0] if len(results) == 1 else torch.cat(results)


@torch.no_grad()
def sample_progressive(
    model: Model,
    shape_or_x: Sequence[int] | Tensor,
    table: StepTable,
    *,
    seed: int | None = None,
    first_sample: int = 0,
    noise: Noise | None = None,
    generator: torch.Generator | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    uncond_kwargs: Mapping[str, Any] | None = None,
    guidance_scale: float = 1.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
    backend: str = "auto",
) -> Iterator[Step]:
    """As :func:`sample`, in one batch, but yields a :class:`Step` (index, timestep, x, x0) after every step."""
    loop = _loop(
        model,
        shape_or_x,
        table,
        seed,
        first_sample,
        noise,
        generator,
        model_kwargs,
        uncond_kwargs,
        guidance_scale,
        backend,
    )
    total = _sample_count(shape_or_x)
    batch = slice(0, total)
    with tqdm(total=len(table), desc="sampling", unit="step", disable=not progress) as bar:
        x = _start(loop, shape_or_x, batch, device, dtype)
        yield from loop.steps(x, total, batch, bar, return_x0=True)
