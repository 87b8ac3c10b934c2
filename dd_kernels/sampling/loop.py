"""Draws samples: a loop of (model, reverse_step) over the rows of a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..ops.reverse_step.table import StepTable
from .captured import steps
from .guidance import Interval, Model
from .requests import Noise, Request, Step

__all__ = ["Step", "sample", "sample_progressive"]


def progress_bar(steps: int, progress: bool) -> tqdm:
    """Returns a progress bar of so many steps, which shows nothing unless ``progress`` is true."""
    return tqdm(total=steps, desc="sampling", unit="step", disable=not progress)


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
    guidance_rescale: float = 0.0,
    guidance_interval: Interval | None = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    callback: Callable[[Step], None] | None = None,
    progress: bool = False,
    backend: str = "auto",
    cuda_graph: bool | str = "auto",
) -> Tensor:
    """Draws samples from a diffusion model with the sampler that ``table`` is.

    Args:
        model: model(x, t, **model_kwargs) -> output; x [N, C, H, W] in the model's dtype, t [N] int64,
            or float32 where a sampler visits noise levels between timesteps.
            A tensor, a tuple that starts with one, or an object with ``.sample`` (diffusers) may come back.
            Where ``model.self_conditioning`` is True it is also called with ``x_self``, x_0 of the step before as the
            step took it: guided and clipped; at first that of ``model_kwargs``, or zeros.
        shape_or_x: the shape [N, C, H, W] of what to draw, or x_T (or x_0, for an inversion) itself.
        table: what a sampler gives, such as :func:`dd_kernels.ddpm` or :func:`dd_kernels.dpm_solver`.
        seed: images depend on (seed, first_sample + n) alone, not on the batch, device or backend's
            scheduling. Where noise has to be drawn and there is no source of it, the seed is drawn from torch's
            global generator, which is left alone otherwise.
        first_sample: index of sample 0 in the whole job, for ranks and resumed jobs.
        noise: the steps' noise instead: a tensor [S, N, ...], a sequence of S tensors, or step -> tensor.
        generator: a torch.Generator that x_T (if a shape was given) and every noisy step's noise come from.
        model_kwargs: passed to the model; tensors of N rows are cut into batches with the samples.
        uncond_kwargs, guidance_scale: classifier-free guidance, out = uncond + scale (cond - uncond). It is
            (1 + w) cond - w uncond, eq. 6 of Ho & Salimans (2022), with scale = 1 + w: 1 is the condition alone.
        guidance_rescale: in [0, 1], how far the guided output is brought back to the conditional one's standard
            deviation (Lin et al., 2023, section 3.4).
        guidance_interval: (low, high), the timesteps within which steps are guided, both included (Kynkäänniemi et al.,
            2024); outside the model is called once, with the condition. None guides every step.
        batch_size: samples per model call; all at once if None.
        device, dtype: of x_T where a shape is given; the model's device and float32 by default.
        callback: called with a :class:`Step` after every step, x0 included.
        progress: show a tqdm bar.
        backend: "auto", "cpu", "cuda", "triton" or "reference".
        cuda_graph: on CUDA, "auto" captures a module and its step as one CUDA graph at the first call and replays it
            for every step, also with other seeds, conditions and tables of one length; a module that has changed is
            captured anew. What cannot be captured, hooks and functions run as they are, and the log says why. True
            captures functions too, whose Python code then runs at the capture alone; False captures nothing.

    Returns:
        The samples, of the shape and dtype of x_T. Neither ``shape_or_x`` nor an x that the model saw is written to.

    Raises:
        ValueError, TypeError: an argument that does not fit; the message names it.
        BackendUnavailableError: a backend asked for by name cannot run.
    """
    request = Request(
        model, shape_or_x, table, seed, first_sample, noise, generator,
        model_kwargs, uncond_kwargs, guidance_scale, guidance_rescale, guidance_interval,
        device, dtype, backend, cuda_graph,
    )  # fmt: skip
    batches = request.batches(batch_size)
    results = []
    with progress_bar(len(table) * len(batches), progress) as bar:
        for batch in batches:
            x = request.start(batch)
            for step in steps(request, x, batch, return_x0=callback is not None):
                bar.update()
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
    guidance_rescale: float = 0.0,
    guidance_interval: Interval | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
    backend: str = "auto",
    cuda_graph: bool | str = "auto",
) -> Iterator[Step]:
    """As :func:`sample`, in one batch, but yields a :class:`Step` (index, timestep, x, x0) after every step."""
    request = Request(
        model, shape_or_x, table, seed, first_sample, noise, generator,
        model_kwargs, uncond_kwargs, guidance_scale, guidance_rescale, guidance_interval,
        device, dtype, backend, cuda_graph,
    )  # fmt: skip
    (batch,) = request.batches(None)
    with progress_bar(len(table), progress) as bar:
        for step in steps(request, request.start(batch), batch, return_x0=True):
            bar.update()
            yield step
