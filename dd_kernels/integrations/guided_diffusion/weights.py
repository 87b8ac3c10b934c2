"""Weights of guided-diffusion's and improved-diffusion's UNetModel in :class:`dd_kernels.nn.UNet`, and back."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from ...nn import UNet
from ..unet_weights import Pairs, StateDict, block_name, blocks, check_keys, converted, layers, renamed

# Our layer -> theirs, inside a residual block.
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "embedding": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "shortcut": "skip_connection",
}


def _blocks(model: UNet) -> Pairs:
    """Yields (our block, theirs): guided-diffusion counts places through all levels, and blocks within a place."""
    stages = {"down": "input_blocks", "middle": "middle_block", "up": "output_blocks"}
    place = {"down": 0, "up": -1}  # input_blocks.0 is the first convolution
    within = -1
    for block in blocks(model):
        side, _, kind, _ = block
        within += 1
        if side != "middle" and (kind == "resnets" or (side, kind) == ("down", "resample")):
            place[side] += 1
            within = 0
        elif block == ("middle", 0, "resnets", 0):
            within = 0
        name = stages[side] if side == "middle" else f"{stages[side]}.{place[side]}"
        yield block_name(*block), f"{name}.{within}"


def _layers(model: UNet) -> Pairs:
    outer = {
        "time_embedding.0": "time_embed.0",
        "time_embedding.2": "time_embed.2",
        "class_embedding": "label_emb",
        "conv_in": "input_blocks.0.0",
        "norm_out": "out.0",
        "conv_out": "out.2",
    }
    return layers(model, _blocks(model), outer, RESNET, "op")


def _regrouped(qkv: Tensor, groups: int, parts: int) -> Tensor:
    """Brings rows from the order (group, part, channel) into (part, group, channel)."""
    rows = qkv.reshape(groups, parts, -1, *qkv.shape[1:])
    return rows.transpose(0, 1).reshape(qkv.shape)


def _attention_to_theirs(
    new_order: bool, source: Mapping[str, Tensor], ours: str, theirs: str, heads: int
) -> StateDict:
    result = renamed(source, f"{ours}.norm", f"{theirs}.norm")
    for key in ("weight", "bias"):
        qkv, proj = source[f"{ours}.qkv.{key}"], source[f"{ours}.proj.{key}"]
        # Ours is (q, k, v; head); the old order of theirs is (head; q, k, v).
        qkv = qkv if new_order else _regrouped(qkv, 3, heads)
        one_dimensional = (..., None) if key == "weight" else ...  # their projections are Conv1d
        result[f"{theirs}.qkv.{key}"] = qkv[one_dimensional]
        result[f"{theirs}.proj_out.{key}"] = proj[one_dimensional]
    return result


def _attention_to_ours(new_order: bool, source: Mapping[str, Tensor], theirs: str, ours: str, heads: int) -> StateDict:
    result = renamed(source, f"{theirs}.norm", f"{ours}.norm")
    for key in ("weight", "bias"):
        qkv, proj = (source[f"{theirs}.{layer}.{key}"] for layer in ("qkv", "proj_out"))
        qkv, proj = (x.squeeze(-1) if key == "weight" else x for x in (qkv, proj))
        result[f"{ours}.qkv.{key}"] = qkv if new_order else _regrouped(qkv, heads, 3)
        result[f"{ours}.proj.{key}"] = proj
    return result


def to_guided_diffusion(model: UNet, *, new_attention_order: bool = False) -> StateDict:
    """Returns the model's weights under the names of guided-diffusion's and improved-diffusion's UNetModel.

    ``new_attention_order`` is the option of that name that their model is built with.
    """
    attention = partial(_attention_to_theirs, new_attention_order)
    return converted(model, model.state_dict(), _layers(model), attention, to_ours=False)


def load_guided_diffusion(model: UNet, state_dict: Mapping[str, Tensor], *, new_attention_order: bool = False) -> UNet:
    """Loads the state_dict of guided-diffusion's or improved-diffusion's UNetModel into a model of its configuration.

    >>> model = load_guided_diffusion(UNet.from_config("imagenet64"), torch.load(path, weights_only=True))

    Raises:
        ValueError: a name or a shape does not fit the model's configuration.
    """
    check_keys(state_dict, to_guided_diffusion(model))
    attention = partial(_attention_to_ours, new_attention_order)
    model.load_state_dict(converted(model, state_dict, _layers(model), attention, to_ours=True))
    return model
