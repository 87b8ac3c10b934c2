"""The Sequential that :func:`dd_kernels.fuse` puts into a model."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import group_norm_silu

_LEAST = 1 << 14  # elements; on smaller maps a CPU runs PyTorch's norm and activation as fast


def is_watched(module: nn.Module) -> bool:
    """Returns whether something sees the module's calls, or replaces them: hooks, a forward or a call of its own."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in vars(module) or module._compiled_call_impl is not None


class FusedSequential(nn.Sequential):
    """``nn.Sequential`` whose GroupNorms compute the activation that follows them in their own pass.

    A pair is fused while it is the one that :func:`dd_kernels.fuse` found: where one of the two was replaced later, or
    is watched by hooks, both run as they are. Layers called alone, and slices, are those of ``nn.Sequential``.
    """

    _unfused_class: type[nn.Module]
    _pairs: list[tuple[nn.GroupNorm, nn.Module, str]]

    def _activation(self, norm: nn.Module, follower: nn.Module | None, x: Tensor) -> str | None:
        """Returns the activation to fuse with ``norm``, or None."""
        if x.device.type == "cpu" and x.numel() < _LEAST and not torch.compiler.is_compiling():
            return None
        name = next((name for n, act, name in self.__dict__.get("_pairs", ()) if n is norm and act is follower), None)
        watched = name is not None and (is_watched(norm) or (follower is not None and is_watched(follower)))
        return None if watched else name

    def forward(self, x: Any) -> Any:
        """Calls the layers one after another, a fused pair as one."""
        layers: list[Any] = [*self, None]
        skipped = None
        for layer, follower in itertools.pairwise(layers):
            if layer is skipped:
                skipped = None
                continue
            name = self._activation(layer, follower, x) if isinstance(layer, nn.GroupNorm) else None
            if name is None:
                x = layer(x)
            else:
                x = group_norm_silu(x, layer.num_groups, layer.weight, layer.bias, layer.eps, activation=name)
                skipped = follower
        return x
