"""Weights of guided-diffusion's and diffusers' U-Nets: the same forward in ours, and back unchanged."""

from __future__ import annotations

import copy
from typing import Any

import guided_unets
import numpy as np
import pytest
import torch

from dd_kernels.integrations.guided_diffusion import load_guided_diffusion, to_guided_diffusion
from dd_kernels.nn import UNet

EPS = 2.0**-23


def _assert_near(ours: UNet, theirs: torch.Tensor, *inputs: torch.Tensor) -> None:
    """Ours is as near to float64 as theirs in float32: twice its error and a rounding; and the same to 2e-5.

    The bound of a whole model, a product over its layers, is larger than what it returns: theirs says what is usual.
    """
    with torch.no_grad():
        value = ours.eval()(*inputs)
        exact = copy.deepcopy(ours).double()(inputs[0].double(), *inputs[1:])
    size = exact.abs().max()
    assert (value - theirs).abs().max() <= 2e-5 * size
    their_error = (theirs.double() - exact).abs().max()
    assert (value.double() - exact).abs().max() <= 2 * their_error + 4 * EPS * size


@pytest.mark.parametrize("name", guided_unets.MODELS)
def test_guided_diffusion_weights(name: str) -> None:
    with np.load(guided_unets.DATA) as data:
        names, shapes, output = (data[f"{name}/{part}"] for part in ("names", "shapes", "output"))
    state = {
        key: guided_unets.weight(key, [int(size) for size in shape.split(",")])
        for key, shape in zip(names.tolist(), shapes.tolist(), strict=True)
    }
    options = {"image_size": 8, "in_channels": 3, "timestep_embedding": "guided", **guided_unets.MODELS[name][1]}
    order = {"new_attention_order": name == "new_order"}
    model = load_guided_diffusion(UNet(**options), state, **order)
    _assert_near(model, torch.from_numpy(output), *guided_unets.inputs("num_classes" in options))

    back = to_guided_diffusion(model, **order)
    assert list(back.keys() - state.keys()) == list(state.keys() - back.keys()) == []
    for key, value in state.items():
        assert torch.equal(back[key], value), key
    # The order of the attention's rows matters.
    if name != "new_order":
        swapped = load_guided_diffusion(UNet(**options), state, new_attention_order=True)
        assert any(not torch.equal(a, b) for a, b in zip(swapped.parameters(), model.parameters(), strict=True))


def test_other_weights_are_refused() -> None:
    model = UNet(image_size=8, in_channels=3, channels=(32, 64), num_res_blocks=1)
    state = to_guided_diffusion(model)
    with pytest.raises(ValueError, match=r"missing \['time_embed.0.weight'\], unexpected \['extra'\]"):
        load_guided_diffusion(
            model, {**{k: v for k, v in state.items() if k != "time_embed.0.weight"}, "extra": torch.ones(1)}
        )
    with pytest.raises(ValueError, match=r"state_dict\['out.2.bias'\] must have the shape \[3\]; got \[6\]"):
        load_guided_diffusion(model, {**state, "out.2.bias": torch.zeros(6)})


DIFFUSERS: dict[str, dict[str, Any]] = {
    "ddpm": {
        "sample_size": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "attention_head_dim": None,
        "norm_eps": 1e-6,
        "dropout": 0.1,
    },
    "adm": {
        "sample_size": 8,
        "out_channels": 6,
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "num_class_embeds": 5,
        "attention_head_dim": 16,
        "attn_norm_num_groups": 8,
    },
    "plain": {
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "add_attention": False,
        "time_embedding_dim": 48,
    },
}


def _theirs(name: str, **options: Any) -> Any:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    options = {
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        **DIFFUSERS[name],
        **options,
    }
    model = diffusers.UNet2DModel(**options).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("name", DIFFUSERS)
def test_a_diffusers_folder_and_back(name: str, tmp_path: Any) -> None:
    from dd_kernels.integrations.diffusers.unet import from_diffusers, to_diffusers

    theirs = _theirs(name)
    theirs.save_pretrained(tmp_path)
    model = from_diffusers(tmp_path, image_size=8, learn_variance=name == "adm")
    assert not model.training
    inputs = [torch.randn(2, 3, 8, 8), torch.tensor([3, 801])] + [torch.tensor([4, 1])] * (name == "adm")
    with torch.no_grad():
        output = theirs(*inputs).sample
    _assert_near(model, output, *inputs)

    back = to_diffusers(model)
    back.save_pretrained(tmp_path / "back")
    with torch.no_grad():
        assert torch.equal(type(back).from_pretrained(tmp_path / "back")(*inputs).sample, output)
    again = from_diffusers(back, learn_variance=name == "adm")
    assert {**again.config, "num_heads": 1} == {**model.config, "num_heads": 1} | {
        "head_channels": again.config["head_channels"]
    }
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"act_fn": "relu"}, "act_fn must be 'silu'"),
        ({"center_input_sample": True}, "center_input_sample must be False"),
        ({"attn_norm_num_groups": 4}, "attn_norm_num_groups must equal"),
        ({"sample_size": 8, "freq_shift": 1}, "flip_sin_to_cos and freq_shift"),
        ({}, "image_size must be given"),
        ({"resnet_time_scale_shift": "scale_shift", "add_attention": True}, "attn_norm_num_groups must be given"),
        (
            {
                "sample_size": 8,
                "block_out_channels": (16, 16, 16),
                "down_block_types": ("DownBlock2D", "ResnetDownsampleBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "ResnetUpsampleBlock2D", "UpBlock2D"),
            },
            "resampling must be the same at every level",
        ),
        ({"sample_size": 8, "up_block_types": ("UpBlock2D", "AttnUpBlock2D")}, "up_block_types must mirror"),
        (
            {
                "sample_size": 8,
                "down_block_types": ("SkipDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "SkipUpBlock2D"),
            },
            "down_block_types must be of blocks",
        ),
    ],
)
def test_what_the_unet_does_not_have_is_named(options: dict[str, Any], message: str) -> None:
    from dd_kernels.integrations.diffusers.unet import from_diffusers

    with pytest.raises(ValueError, match=message):
        from_diffusers(_theirs("plain", **options))


def test_what_diffusers_does_not_have_is_named() -> None:
    pytest.importorskip("diffusers")
    from dd_kernels.integrations.diffusers.unet import to_diffusers

    small = {"image_size": 8, "in_channels": 3, "channels": (32, 64), "num_res_blocks": 1}
    for options, message in (
        ({"resample": "plain"}, "resample must be"),
        ({"self_conditioning": True}, "self_conditioning must be false"),
        ({"embedding_channels": 16}, "embedding_channels must be"),
        ({"num_heads": 2, "attention_resolutions": (8, 4)}, "channels of a head must be the same"),
    ):
        with pytest.raises(ValueError, match=message):
            to_diffusers(UNet(**small, **options))
