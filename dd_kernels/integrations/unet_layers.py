"""What the U-Net of this package and those of other projects have in common: the same layers under other names.

Only an attention's projections are laid out differently. So a format is a table of names, and what it
does to an attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from ..nn import UNet

Pairs = Iterator[tuple[str, str]]
StateDict = dict[str, Tensor]


def layers(model: UNet, blocks: Pairs, outer: Mapping[str, str], resnet: Mapping[str, str], down: str) -> Pairs:
    """(our layer, theirs) but for attentions, (our block, theirs); ``down`` is the name of a strided convolution."""
    yield from outer.items()
    for ours, theirs in blocks:
        block = model.get_submodule(ours)
        if hasattr(block, "qkv"):
            yield ours, theirs
        elif hasattr(block, "norm1"):
            yield from ((f"{ours}.{mine}", f"{theirs}.{peer}") for mine, peer in resnet.items())
        else:
            yield f"{ours}.conv", f"{theirs}.{down if ours.startswith('down') else 'conv'}"


def attentions(model: UNet) -> dict[str, int]:
    """The number of heads of each attention, by its name."""
    return {name: module.heads for name, module in model.named_modules() if hasattr(module, "qkv")}


def renamed(source: Mapping[str, Tensor], old: str, new: str) -> StateDict:
    return {f"{new}.{key}": source[f"{old}.{key}"] for key in ("weight", "bias") if f"{old}.{key}" in source}


def check_keys(state_dict: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    missing, unexpected = wanted.keys() - state_dict.keys(), state_dict.keys() - wanted.keys()
    if missing or unexpected:
        raise ValueError(
            "state_dict must hold the weights of the model's configuration: "
            f"missing {sorted(missing)[:4]}{'...' if len(missing) > 4 else ''}, "
            f"unexpected {sorted(unexpected)[:4]}{'...' if len(unexpected) > 4 else ''}"
        )
    for key, value in wanted.items():
        if state_dict[key].shape != value.shape:
            got = list(state_dict[key].shape)
            raise ValueError(f"state_dict[{key!r}] must have the shape {list(value.shape)}; got {got}")
