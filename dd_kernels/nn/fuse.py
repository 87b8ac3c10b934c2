"""GroupNorm+SiLU put into a model that exists already, and taken out again.

A module changes its class and nothing else: parameters, buffers, hooks and state_dict keys stay, and a
fused norm called by code that knows nothing of it is still a GroupNorm.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator

from torch import nn

from .fused import FusedGroupNorm, FusedModule, FusedSequential, is_silu


def _is_group_norm(module: nn.Module) -> bool:
    """PyTorch's GroupNorm, and guided-diffusion's: in float32 whatever the input, as the op is."""
    return type(module) is nn.GroupNorm or (isinstance(module, nn.GroupNorm) and type(module).__name__ == "GroupNorm32")


def _fuse_sequentials(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for module in list(model.modules()):
        if type(module) is not nn.Sequential:
            continue
        layers = list(module)
        norms = [
            norm for i, norm in enumerate(layers) if isinstance(norm, FusedGroupNorm) and is_silu(layers[i + 1 : i + 2])
        ]
        if norms:
            FusedSequential.take(module)
            yield from ((norm, "GroupNorm, SiLU") for norm in norms)


def fuse(model: nn.Module) -> dict[str, str]:
    """Lets the norms of ``model`` run through :func:`dd_kernels.group_norm_silu`, in place.

    Found, and folded into the norm's one pass over memory:

    - every ``nn.GroupNorm`` (and guided-diffusion's ``GroupNorm32``): the norm;
    - ``nn.Sequential`` in which a SiLU follows the norm: norm, SiLU;
    - diffusers' ``ResnetBlock2D`` with SiLU (UNet2DModel, UNet2DConditionModel, AutoencoderKL,
      ControlNet ...): the first convolution's bias and the time embedding's addition, norm, the
      embedding's scale and shift, SiLU;
    - diffusers' ``conv_norm_out`` with ``conv_act``: norm, SiLU.

    Not found: a SiLU that the forward of a module of its own calls after the norm (there only the norm
    is fused), another activation, subclasses of GroupNorm or Sequential with a forward of their own,
    and norms that wrap a GroupNorm in more than a shift and a scale per channel (diffusers'
    ``SpatialNorm``: its inner norm is fused; ``AdaGroupNorm`` calls the functional form: untouched).

    Parameters, buffers, hooks, ``state_dict`` keys and the module tree stay; training works. Call it
    before ``torch.compile``. A second call changes nothing. Hooks on a SiLU that was folded are not called.

    Args:
        model: any module, in any dtype, on any device.

    Returns:
        For each norm that was replaced its name in ``model.named_modules()`` and what is computed in
        its one pass. Empty, with a warning, where nothing was found.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    names = {module: name for name, module in model.named_modules()}
    done: dict[nn.Module, str] = {}
    for module in names:
        if _is_group_norm(module):
            FusedGroupNorm.take(module)
            done[module] = "GroupNorm"
    done.update(_fuse_sequentials(model))
    # A model that holds one of diffusers' modules has imported diffusers.
    if "diffusers" in sys.modules:
        from .fuse_diffusers import fuse_diffusers

        done.update(fuse_diffusers(model))
    if not any(isinstance(module, FusedModule) for module in names):
        warnings.warn(f"fuse: {type(model).__name__} has no GroupNorm that can be replaced", stacklevel=2)
    return {names[module]: what for module, what in done.items()}


def unfuse(model: nn.Module) -> list[str]:
    """Undoes :func:`fuse`, in place and exactly; returns the names of the modules restored.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    fused = {name: module for name, module in model.named_modules() if isinstance(module, FusedModule)}
    for module in fused.values():
        module.give_back()
    return list(fused)
