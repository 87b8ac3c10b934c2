"""Weights of the U-Net of this package under the names of other projects, and back.

Their layers are the same under other names, but for the layout of an attention's projections. So a format is a
table of names, and a function that converts an attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from ..nn import UNet

Pairs = Iterator[tuple[str, str]]
StateDict = dict[str, Tensor]
ConvertAttention = Callable[[Mapping[str, Tensor], str, str, int], StateDict]


def blocks(model: UNet) -> Iterator[tuple[str, int, str, int]]:
    """Yields (side, level, kind, index) of every block, in the order in which the model calls them."""
    sides: tuple[tuple[str, Iterable[Any]], ...] = (
        ("down", model.down),
        ("middle", [model.middle]),
        ("up", model.up),
    )
    for side, stages in sides:
        for level, stage in enumerate(stages):
            for i in range(len(stage.resnets)):
                yield side, level, "resnets", i
                if i < len(stage.attentions):
                    yield side, level, "attentions", i
            if getattr(stage, "resample", None) is not None:
                yield side, level, "resample", 0


def block_name(side: str, level: int, kind: str, i: int) -> str:
    """Returns a block's name in our U-Net."""
    stage = side if side == "middle" else f"{side}.{level}"
    return f"{stage}.{kind}" if kind == "resample" else f"{stage}.{kind}.{i}"


def layers(model: UNet, blocks: Pairs, outer: Mapping[str, str], resnet: Mapping[str, str], down: str) -> Pairs:
    """Yields (our layer, theirs), for an attention (our block, theirs); ``down`` names a strided convolution."""
    yield from outer.items()
    for ours, theirs in blocks:
        block = model.get_submodule(ours)
        if hasattr(block, "qkv"):
            yield ours, theirs
        elif hasattr(block, "norm1"):
            yield from ((f"{ours}.{mine}", f"{theirs}.{peer}") for mine, peer in resnet.items())
        else:
            yield f"{ours}.conv", f"{theirs}.{down if ours.startswith('down') else 'conv'}"


def converted(
    model: UNet, source: Mapping[str, Tensor], pairs: Pairs, attention: ConvertAttention, to_ours: bool
) -> StateDict:
    """Returns ``source`` under our names or under theirs; ``pairs`` come from :func:`layers`.

    ``attention`` is called with ``source``, the old name and the new, and the number of heads.
    """
    heads = {name: module.heads for name, module in model.named_modules() if hasattr(module, "qkv")}
    result: StateDict = {}
    for ours, theirs in pairs:
        old, new = (theirs, ours) if to_ours else (ours, theirs)
        result |= attention(source, old, new, heads[ours]) if ours in heads else renamed(source, old, new)
    return result


def renamed(source: Mapping[str, Tensor], old: str, new: str) -> StateDict:
    """Returns weight and bias of the layer ``old``, where it has them, under the name ``new``."""
    return {f"{new}.{key}": source[f"{old}.{key}"] for key in ("weight", "bias") if f"{old}.{key}" in source}


def check_keys(state_dict: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raises ``ValueError`` unless ``state_dict`` has the names and shapes of ``wanted``."""
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
