"""GroupNorm and its activation fused in the Sequentials of a model that exists, for eager use, and taken out again.

``torch.compile(model, backend="dd_kernels")`` and :func:`dd_kernels.accelerate` find every norm of a model, whatever
calls it; this finds what ``nn.Sequential`` alone decides, and needs no compilation.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from typing import Any

import torch
from torch import nn

from ..ops import group_norm_silu
from ..ops.activation import Activation
from .fused import FusedSequential, is_watched

_ACTIVATIONS = [activation.name.lower() for activation in Activation if activation != Activation.NONE]


def _activation_of(norm: nn.Module, act: nn.Module) -> str | None:
    """Returns the activation for which the op computes what ``act(norm(x))`` does on random input; None if for none.

    Classes and their names do not count: a norm that casts is a norm, one that scales its result is not.
    """
    if not isinstance(norm, nn.GroupNorm) or is_watched(norm) or is_watched(act):
        return None
    if any(True for _ in act.parameters()) or any(True for _ in act.buffers()):
        return None  # what agrees now need not agree later
    x = 3 * torch.randn(2, norm.num_channels, 5, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        try:
            norm, act = copy.deepcopy(norm).to("cpu", torch.float32), copy.deepcopy(act).to("cpu", torch.float32)
            y = act(norm(x))
        except Exception:  # whatever it is, it is no function of one tensor
            return None
        for name in _ACTIVATIONS:
            expected: Any = group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps, activation=name)
            if isinstance(y, torch.Tensor) and y.shape == x.shape and torch.allclose(y, expected, 1e-5, 1e-5):
                return name
    return None


def _pairs_of(module: nn.Sequential) -> list[tuple[nn.GroupNorm, nn.Module, str]]:
    layers = list(module)
    pairs = []
    for norm, act in itertools.pairwise(layers):
        name = _activation_of(norm, act)
        if name is not None and isinstance(norm, nn.GroupNorm):
            pairs.append((norm, act, name))
    return pairs


def fuse(model: nn.Module) -> dict[str, str]:
    """Lets every GroupNorm compute the activation that follows it in an ``nn.Sequential``, in place.

    A pair is fused if :func:`dd_kernels.group_norm_silu` gives what both give on random input: SiLU, Mish and GELU, by
    whatever class. A norm without an activation stays, since PyTorch's alone is as fast on small maps. Parameters,
    ``state_dict`` keys, hooks and the module tree stay; training works. A second call changes nothing.

    Args:
        model: any module, in any dtype, on any device.

    Returns:
        For each norm that was fused its name in ``model.named_modules()`` and its activation. Empty, with a warning,
        where nothing was found.

    Raises:
        TypeError: ``model`` is no module.
    """
    _check(model)
    names = {module: name for name, module in model.named_modules()}
    done: dict[str, str] = {}
    for module in names:
        pairs = _pairs_of(module) if type(module) is nn.Sequential else []
        if pairs:
            vars(module).update(_unfused_class=nn.Sequential, _pairs=pairs)
            module.__class__ = FusedSequential
            done.update({names[norm]: name for norm, _, name in pairs})
    if not any(isinstance(module, FusedSequential) for module in names):
        message = "has no nn.Sequential with a GroupNorm and an activation; dd_kernels.accelerate finds every norm"
        warnings.warn(f"fuse: {type(model).__name__} {message}", stacklevel=2)
    return done


def unfuse(model: nn.Module) -> list[str]:
    """Undoes :func:`fuse`, in place and exactly; returns the names of the modules restored.

    Raises:
        TypeError: ``model`` is no module.
    """
    _check(model)
    fused = {name: module for name, module in model.named_modules() if isinstance(module, FusedSequential)}
    for module in fused.values():
        del vars(module)["_pairs"]
        module.__class__ = vars(module).pop("_unfused_class")
    return list(fused)


def _check(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
