"""What :func:`dd_kernels.accelerate` knows of diffusers' pipelines: their networks, and the schedulers to replace."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import diffusers
from torch import nn

from . import SCHEDULERS

_SCHEDULERS = {getattr(diffusers, ours.__name__): ours for ours in SCHEDULERS}


def _networks(pipeline: Any) -> Iterator[tuple[str, Any]]:
    """Yields the networks by name: diffusers' models, and of an autoencoder its encoder and decoder."""
    for name, component in pipeline.components.items():
        if not isinstance(component, diffusers.ModelMixin):
            continue
        parts = {part: getattr(component, part, None) for part in ("encoder", "decoder")}
        halves = {part: module for part, module in parts.items() if isinstance(module, nn.Module)}
        if hasattr(component, "decode") and halves:
            yield from ((f"{name}.{part}", module) for part, module in halves.items())
        else:
            yield name, component


def _put_back(pipeline: weakref.ref[Any], name: str, component: Any, ours: Any) -> None:
    """Puts a component back where the pipeline still has ours, and not another that the user has put in."""
    owner = pipeline()
    if owner is not None and getattr(owner, name) is ours:
        setattr(owner, name, component)


def _note(name: str, scheduler: str) -> str:
    """Returns what the report says of a scheduler that was replaced."""
    line = f"pipe.{name} = {scheduler}.from_config(pipe.{name}.config)"
    return (
        f"{name}: dd_kernels' {scheduler} (a pipeline's constructor may put diffusers' class back, as DDIMPipeline's"
        f" does: after it write {line}, or accelerate the pipeline)"
    )


def _ours_of(scheduler: Any, ours: Any) -> Any:
    """Returns our scheduler with the options of diffusers' one.

    A pipeline's constructor may change an option (Stable Diffusion's sets ``steps_offset``) that the configuration goes
    on to list as a default, which from_config would take for one.
    """
    result = ours.from_config(scheduler.config)
    kept = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    changed = {key: value for key, value in kept.items() if result.config.get(key) != value}
    return ours.from_config(scheduler.config, **changed) if changed else result


def _swap_schedulers(pipeline: Any) -> Iterator[tuple[Callable[[], None], str]]:
    """Puts this package's schedulers in; yields for each what undoes it, and a note."""
    for name, component in list(pipeline.components.items()):
        ours = _SCHEDULERS.get(type(component))
        if ours is not None:
            replacement = _ours_of(component, ours)
            setattr(pipeline, name, replacement)
            yield partial(_put_back, weakref.ref(pipeline), name, component, replacement), _note(name, ours.__name__)
        elif isinstance(component, diffusers.SchedulerMixin) and not isinstance(component, tuple(_SCHEDULERS.values())):
            yield lambda: None, f"{name}: {type(component).__name__} stays, there is no kernel for it"


def take_apart(pipeline: Any) -> tuple[list[tuple[str, nn.Module]], list[Callable[[], None]], list[str]]:
    """Swaps the schedulers of a pipeline; returns its networks by name, what undoes the swaps, and notes.

    Raises:
        TypeError: an object of diffusers that is no pipeline.
    """
    if not isinstance(pipeline, diffusers.DiffusionPipeline):
        raise TypeError(f"model_or_pipeline must be a module or a pipeline; got {type(pipeline).__name__}")
    swaps = list(_swap_schedulers(pipeline))
    return list(_networks(pipeline)), [undo for undo, _ in swaps], [note for _, note in swaps]
