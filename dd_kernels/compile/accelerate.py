"""Compiles a model, or the networks of a pipeline, and puts this package's schedulers in, by one call; undoes both."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import nn

from .fused_convolution import numbers_of
from .in_place import compile_in_place
from .layout import convert_weights
from .report import AccelerateReport, Report

Target = TypeVar("Target")
Undo = Callable[[], None]
_Parts = tuple[list[tuple[str, nn.Module]], list[Undo], list[str]]

# The integration that takes a library's pipelines apart, by the package of their class; imported when one is met.
_PIPELINES = {"diffusers": "dd_kernels.integrations.diffusers.accelerate"}

# What undoes a change holds its owner weakly: an accelerated model is freed like any other.
_accelerated: weakref.WeakKeyDictionary[Any, tuple[AccelerateReport, list[Undo]]] = weakref.WeakKeyDictionary()


def _take_apart(target: Any) -> _Parts:
    """Returns the networks of a model or a pipeline by name, what undoes the changes made to it, and notes on them."""
    if isinstance(target, nn.Module):
        return [(type(target).__name__, target)], [], []
    for base in type(target).__mro__:
        integration = _PIPELINES.get(base.__module__.partition(".")[0])
        if integration is not None:
            parts: _Parts = import_module(integration).take_apart(target)
            return parts
    raise TypeError(f"model_or_pipeline must be a torch.nn.Module or a diffusers pipeline; got {type(target).__name__}")


def accelerate(
    model_or_pipeline: Target,
    *,
    accuracy: str = "default",
    dtype: str | torch.dtype | None = None,
    inductor: bool = False,
    cuda_graphs: bool = True,
) -> tuple[Target, AccelerateReport]:
    """Makes a model, or the networks and the scheduler of a pipeline, faster in place; :func:`restore` undoes it.

    A module is compiled as by ``module.compile(backend="dd_kernels")``: its class, parameters, state_dict and files
    stay what they are. However many are accelerated, each has graphs of its own; where Dynamo gives up on a call, the
    report says so. Of a diffusers pipeline each network of diffusers is compiled (U-Net, ControlNet, a VAE's encoder
    and decoder; text encoders are not), and a scheduler that this package has is replaced by ours with the same
    configuration. A pipeline saved afterwards names diffusers' classes and loads where this package is not installed.

    A pipeline whose constructor makes a scheduler of its own class (``DDIMPipeline(unet, scheduler)`` does) undoes a
    replacement made before: accelerate the finished pipeline.

    Args:
        model_or_pipeline: a ``torch.nn.Module`` or a ``diffusers.DiffusionPipeline``.
        accuracy: "high" makes convolutions on a CPU at least as exact as eager's; see :func:`dd_kernels.ops.conv2d`.
        dtype: "bfloat16" lets convolutions and, in inference, linear layers of float32 on a CPU multiply in bfloat16
            and add in float32, where the processor has AVX-512 BF16; elsewhere it changes nothing. 3 x 3 convolutions
            are by F(2x2), less far from exact than a model in bfloat16, or with ``accuracy="fast"`` by F(4x4), faster,
            at almost three times the error. Without it a model in 16 bits multiplies its 3 x 3 convolutions in float32,
            which is faster than PyTorch's in 16 bits where the processor has no AMX.
        inductor: hands the rewritten graphs on to Inductor.
        cuda_graphs: on CUDA, where no gradient is asked for, captures each graph once per shape and replays it.

    Returns:
        The same object, and a report. The report is filled at the first call, when Dynamo captures the graphs: for
        each network its graphs, its norms, what was fused with each and why something was not. A second call returns
        the report of the first.

    Raises:
        TypeError: neither a module nor a pipeline.
        ValueError: another accuracy or dtype.
    """
    target: Any = model_or_pipeline
    numbers_of(accuracy, dtype)
    if target in _accelerated:
        return model_or_pipeline, _accelerated[target][0]
    networks, undo, notes = _take_apart(target)
    report = AccelerateReport([Report(name) for name, _ in networks], notes)
    options = {"accuracy": accuracy, "dtype": dtype, "inductor": inductor, "cuda_graphs": cuda_graphs}
    for (_, module), entry in zip(networks, report.networks, strict=True):
        undo += [compile_in_place(module, entry, options), convert_weights(module)]
    _accelerated[target] = report, undo
    return model_or_pipeline, report


def restore(model_or_pipeline: Target) -> Target:
    """Undoes :func:`accelerate` exactly and returns the same object; one that was never accelerated stays as it is."""
    _, undo = _accelerated.pop(model_or_pipeline, (None, []))
    for step in reversed(undo):
        step()
    return model_or_pipeline
