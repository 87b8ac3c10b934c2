"""Weights of guided-diffusion's and improved-diffusion's UNetModel in :class:`dd_kernels.nn.UNet`, and back."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..nn import UNet
from .unet_layers import Pairs, StateDict, attentions, check_keys, layers, renamed

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
    """(our block, theirs): guided-diffusion counts blocks through all levels."""
    place = 1
    for level, stage in enumerate(model.down):
        for i in range(len(stage.resnets)):
            yield f"down.{level}.resnets.{i}", f"input_blocks.{place}.0"
            if len(stage.attentions):
                yield f"down.{level}.attentions.{i}", f"input_blocks.{place}.1"
            place += 1
        if stage.resample is not None:
            yield f"down.{level}.resample", f"input_blocks.{place}.0"
            place += 1
    yield "middle.resnets.0", "middle_block.0"
    if len(model.middle.attentions):
        yield "middle.attentions.0", "middle_block.1"
    yield "middle.resnets.1", f"middle_block.{1 + len(model.middle.attentions)}"
    place = 0
    for level, stage in enumerate(model.up):
        for i in range(len(stage.resnets)):
            yield f"up.{level}.resnets.{i}", f"output_blocks.{place}.0"
            if len(stage.attentions):
                yield f"up.{level}.attentions.{i}", f"output_blocks.{place}.1"
            place += 1
        if stage.resample is not None:
            last = 2 if len(stage.attentions) else 1
            yield f"up.{level}.resample", f"output_blocks.{place - 1}.{last}"


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
    """Rows ordered by (group, part, channel) brought into the order (part, group, channel)."""
    rows = qkv.reshape(groups, parts, -1, *qkv.shape[1:])
    return rows.transpose(0, 1).reshape(qkv.shape)


def to_guided_diffusion(model: UNet, *, new_attention_order: bool = False) -> StateDict:
    """The model's weights under the names of guided-diffusion's and improved-diffusion's UNetModel.

    ``new_attention_order`` is the option of that name that their model is built with.
    """
    source, heads = model.state_dict(), attentions(model)
    result: StateDict = {}
    for ours, theirs in _layers(model):
        if ours not in heads:
            result |= renamed(source, ours, theirs)
            continue
        result |= renamed(source, f"{ours}.norm", f"{theirs}.norm")
        for key in ("weight", "bias"):
            qkv, proj = source[f"{ours}.qkv.{key}"], source[f"{ours}.proj.{key}"]
            # Ours is (q, k, v; head); the old order of theirs is (head; q, k, v).
            qkv = qkv if new_attention_order else _regrouped(qkv, 3, heads[ours])
            one_dimensional = (..., None) if key == "weight" else ...  # their projections are Conv1d
            result[f"{theirs}.qkv.{key}"] = qkv[one_dimensional]
            result[f"{theirs}.proj_out.{key}"] = proj[one_dimensional]
    return result


def load_guided_diffusion(model: UNet, state_dict: Mapping[str, Tensor], *, new_attention_order: bool = False) -> UNet:
    """Loads the state_dict of guided-diffusion's or improved-diffusion's UNetModel into a model of its configuration.

    >>> model = load_guided_diffusion(UNet.from_config("imagenet64"), torch.load(path, weights_only=True))

    Raises:
        ValueError: a name or a shape does not fit the model's configuration.
    """
    check_keys(state_dict, to_guided_diffusion(model))
    heads = attentions(model)
    result: StateDict = {}
    for ours, theirs in _layers(model):
        if ours not in heads:
            result |= renamed(state_dict, theirs, ours)
            continue
        result |= renamed(state_dict, f"{theirs}.norm", f"{ours}.norm")
        for key in ("weight", "bias"):
            qkv, proj = (state_dict[f"{theirs}.{layer}.{key}"] for layer in ("qkv", "proj_out"))
            qkv, proj = (x.squeeze(-1) if key == "weight" else x for x in (qkv, proj))
            result[f"{ours}.qkv.{key}"] = qkv if new_attention_order else _regrouped(qkv, heads[ours], 3)
            result[f"{ours}.proj.{key}"] = proj
    model.load_state_dict(result)
    return model
