"""diffusers' UNet2DModel as :class:`dd_kernels.nn.UNet`, and back: configuration and weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers
import torch

from ...nn import UNet
from ..unet_weights import Pairs, StateDict, block_name, blocks, check_keys, converted, layers, renamed

# Our layer -> theirs, inside a residual block.
RESNET = {
    "norm1": "norm1",
    "conv1": "conv1",
    "embedding": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "shortcut": "conv_shortcut",
}


def _blocks(model: UNet) -> Pairs:
    for block in blocks(model):
        side, level, kind, i = block
        stage = "mid_block" if side == "middle" else f"{side}_blocks.{level}"
        yield block_name(*block), f"{stage}.{f'{side}samplers' if kind == 'resample' else kind}.{i}"


def _layers(model: UNet) -> Pairs:
    outer = {
        "time_embedding.0": "time_embedding.linear_1",
        "time_embedding.2": "time_embedding.linear_2",
        "class_embedding": "class_embedding",
        "conv_in": "conv_in",
        "norm_out": "conv_norm_out",
        "conv_out": "conv_out",
    }
    return layers(model, _blocks(model), outer, RESNET, "conv")


def _attention_to_theirs(source: Mapping[str, torch.Tensor], ours: str, theirs: str, heads: int) -> StateDict:
    result = renamed(source, f"{ours}.norm", f"{theirs}.group_norm")
    result |= renamed(source, f"{ours}.proj", f"{theirs}.to_out.0")
    for key in ("weight", "bias"):
        for part, rows in zip("qkv", source[f"{ours}.qkv.{key}"].chunk(3), strict=True):
            result[f"{theirs}.to_{part}.{key}"] = rows
    return result


def _attention_to_ours(source: Mapping[str, torch.Tensor], theirs: str, ours: str, heads: int) -> StateDict:
    result = renamed(source, f"{theirs}.group_norm", f"{ours}.norm")
    result |= renamed(source, f"{theirs}.to_out.0", f"{ours}.proj")
    for key in ("weight", "bias"):
        result[f"{ours}.qkv.{key}"] = torch.cat([source[f"{theirs}.to_{part}.{key}"] for part in "qkv"])
    return result


def _their_state(model: UNet) -> StateDict:
    return converted(model, model.state_dict(), _layers(model), _attention_to_theirs, to_ours=False)


def _our_state(model: UNet, state_dict: Mapping[str, torch.Tensor]) -> StateDict:
    check_keys(state_dict, _their_state(model))
    return converted(model, state_dict, _layers(model), _attention_to_ours, to_ours=True)


def _one(name: str, values: set[Any]) -> Any:
    """Returns the value that all levels share, or raises ``ValueError``."""
    if len(values) != 1:
        raise ValueError(f"{name} must be the same at every level; got {sorted(map(str, values))}")
    return values.pop()


def _our_options(config: Mapping[str, Any], image_size: int | None, learn_variance: bool) -> dict[str, Any]:
    """Returns the options of nn.UNet for a UNet2DModel's configuration."""
    required = {
        "center_input_sample": False,
        "time_embedding_type": "positional",
        "act_fn": "silu",
        "mid_block_type": "UNetMidBlock2D",
        "mid_block_scale_factor": 1,
        "class_embed_type": None,
    }
    for name, value in required.items():
        if config[name] != value:
            raise ValueError(f"{name} must be {value!r} to be loaded into nn.UNet; got {config[name]!r}")
    if config["attn_norm_num_groups"] not in (None, config["norm_num_groups"]):
        raise ValueError(f"attn_norm_num_groups must equal norm_num_groups; got {config['attn_norm_num_groups']}")
    scale_shift = config["resnet_time_scale_shift"] == "scale_shift"
    if scale_shift and config["add_attention"] and config["attn_norm_num_groups"] is None:
        raise ValueError("attn_norm_num_groups must be given with resnet_time_scale_shift='scale_shift'; got None")
    image_size = config["sample_size"] if image_size is None else image_size
    if not isinstance(image_size, int):
        raise ValueError(f"image_size must be given where sample_size is not an int; got {image_size!r}")
    embeddings = {(False, 1): "ddpm", (True, 0): "guided"}
    embedding = embeddings.get((config["flip_sin_to_cos"], config["freq_shift"]))
    if embedding is None:
        raise ValueError("flip_sin_to_cos and freq_shift must be (False, 1) or (True, 0)")
    kinds = list(config["down_block_types"])
    attended = ["Attn" in kind for kind in kinds]
    if [kind.replace("Up", "Down").replace("ups", "downs") for kind in reversed(config["up_block_types"])] != kinds:
        raise ValueError(f"up_block_types must mirror down_block_types; got {config['up_block_types']} and {kinds}")
    resample = "conv" if len(kinds) == 1 else _one("resampling", {_resampling(kind, config) for kind in kinds[:-1]})
    strided = resample == "conv"
    return {
        "image_size": image_size,
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"] // (2 if learn_variance else 1),
        "learn_variance": learn_variance,
        "channels": config["block_out_channels"],
        "num_res_blocks": config["layers_per_block"],
        "attention_resolutions": [image_size >> level for level, has in enumerate(attended) if has],
        "middle_attention": config["add_attention"],
        "head_channels": config["attention_head_dim"],
        "time_channels": config["time_embedding_dim"],
        "timestep_embedding": embedding,
        "scale_shift": scale_shift,
        "resample": resample,
        "downsample_padding": "bottom_right" if strided and config["downsample_padding"] == 0 else "symmetric",
        "dropout": config["dropout"],
        "num_groups": config["norm_num_groups"],
        "eps": config["norm_eps"],
        "num_classes": config["num_class_embeds"],
    }


def _resampling(kind: str, config: Mapping[str, Any]) -> str:
    if kind == "ResnetDownsampleBlock2D":
        return "resblock"
    if kind == "DownBlock2D":
        return "conv"
    if kind == "AttnDownBlock2D" and config["downsample_type"] == config["upsample_type"]:
        return {"conv": "conv", "resnet": "resblock"}.get(config["downsample_type"], "none")
    raise ValueError(f"down_block_types must be of blocks that nn.UNet has; got {kind!r}")


def _their_options(model: UNet) -> dict[str, Any]:
    """Returns a UNet2DModel's configuration for the options of nn.UNet."""
    options = model.config
    if options["resample"] == "plain":
        raise ValueError("resample must be 'conv' or 'resblock' for a UNet2DModel; got 'plain'")
    if options["self_conditioning"]:
        raise ValueError("self_conditioning must be false for a UNet2DModel, which reads x alone; got True")
    if options["embedding_channels"] not in (None, options["channels"][0]):
        raise ValueError(
            f"embedding_channels must be channels[0] for a UNet2DModel; got {options['embedding_channels']}"
        )
    stages: list[Any] = list(model.down)
    attended = [len(stage.attentions) > 0 for stage in stages]
    heads = {x for x, has in zip(options["channels"], attended, strict=True) if has}
    heads |= {options["channels"][-1]} if options["middle_attention"] else set()
    plain = "Resnet{}sampleBlock2D" if options["resample"] == "resblock" else "{}Block2D"
    kinds = ["Attn{}Block2D" if has else plain for has in attended]
    kind = {"conv": "conv", "resblock": "resnet"}[options["resample"]]
    guided = options["timestep_embedding"] == "guided"
    head_channels = options["head_channels"]
    if head_channels is None and heads:
        head_channels = _one("channels of a head", {channels // options["num_heads"] for channels in heads})
    return {
        "sample_size": options["image_size"],
        "in_channels": options["in_channels"],
        "out_channels": model.conv_out.out_channels,
        "block_out_channels": tuple(options["channels"]),
        "layers_per_block": options["num_res_blocks"],
        "down_block_types": tuple(kind.format("Down") for kind in kinds),
        "up_block_types": tuple(kind.format("Up") for kind in reversed(kinds)),
        "add_attention": options["middle_attention"],
        "attention_head_dim": head_channels,
        "time_embedding_dim": options["time_channels"],
        "flip_sin_to_cos": guided,
        "freq_shift": 0 if guided else 1,
        "resnet_time_scale_shift": "scale_shift" if options["scale_shift"] else "default",
        "downsample_type": kind,
        "upsample_type": kind,
        "downsample_padding": 0 if options["downsample_padding"] == "bottom_right" else 1,
        "dropout": options["dropout"],
        "norm_num_groups": options["num_groups"],
        # Where it is None, UNet2DModel's middle attention has no norm with scale_shift.
        "attn_norm_num_groups": options["num_groups"] if options["scale_shift"] else None,
        "norm_eps": options["eps"],
        "num_class_embeds": None if model.class_embedding is None else model.class_embedding.num_embeddings,
    }


def from_diffusers(source: Any, *, image_size: int | None = None, learn_variance: bool = False) -> UNet:
    """Returns a :class:`dd_kernels.nn.UNet` with the configuration and weights of diffusers' UNet2DModel.

    Args:
        source: a UNet2DModel, or the folder of one (``config.json`` and its weights), or of a pipeline's ``unet``.
        image_size: side of the images, where the configuration's ``sample_size`` does not say it.
        learn_variance: half of the output channels are the variance.

    Raises:
        ValueError: a part of the configuration that nn.UNet does not have; the message names it.
    """
    if not isinstance(source, diffusers.UNet2DModel):
        source = diffusers.UNet2DModel.from_pretrained(source)
    model = UNet(**_our_options(source.config, image_size, learn_variance))
    model.load_state_dict(_our_state(model, source.state_dict()))
    return model.to(source.dtype).train(source.training)


def to_diffusers(model: UNet) -> Any:
    """Returns diffusers' UNet2DModel with the model's configuration and weights; ``save_pretrained`` writes its folder.

    A null class becomes one class more. The attention's head width must be the same at every level.
    """
    result: Any = diffusers.UNet2DModel(**_their_options(model))
    result.load_state_dict(_their_state(model))
    dtype = next(model.parameters()).dtype
    return (result if result.dtype == dtype else result.to(dtype)).train(model.training)
