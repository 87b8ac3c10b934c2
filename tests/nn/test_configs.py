"""The options of the U-Net: what is refused, and the configurations that have a name."""

import json

import pytest
import torch

from dd_kernels.nn import CONFIGS, UNet, UNetConfig

SMALL = {"image_size": 8, "in_channels": 1, "channels": (16, 32), "num_groups": 8}

# The papers' sizes: 35.7 M and 114 M (Ho et al. 2020, appendix B); 296 M, 422 M and 554 M (Dhariwal & Nichol 2021).
PARAMETERS = {
    "cifar10": 35_746_307,
    "lsun256": 113_673_219,
    "imagenet64": 295_904_454,
    "imagenet128": 421_529_606,
    "imagenet256": 553_838_086,
    "digits": 702_753,
    "fashion": 1_114_209,
}


def test_every_named_configuration_has_the_papers_size():
    assert set(PARAMETERS) == set(CONFIGS)
    for name, expected in PARAMETERS.items():
        with torch.device("meta"):
            model = UNet.from_config(name)
        assert sum(p.numel() for p in model.parameters()) == expected, name


@pytest.mark.parametrize("name", CONFIGS)
def test_config_survives_json_and_rebuilds_the_model(name):
    with torch.device("meta"):
        model = UNet.from_config(name, eps=1e-4)
        again = UNet(**json.loads(json.dumps(model.config)))
    assert again.config == model.config == json.loads(json.dumps(model.config))
    assert model.config["eps"] == 1e-4
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert shapes == {key: value.shape for key, value in again.state_dict().items()}


def test_digits_fits_in_four_megabytes():
    state = UNet.from_config("digits").state_dict()
    assert sum(v.numel() * v.element_size() for v in state.values()) < 4_000_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": ()}, "channels must name at least one level"),
        ({"channels": (16, 20)}, "channels must be positive multiples of num_groups=8"),
        ({"channels": (16, 0)}, "channels must be positive multiples of num_groups=8"),
        ({"image_size": 9}, "image_size must be divisible by 2"),
        ({"image_size": 0}, "image_size must be at least 1"),
        ({"in_channels": 0}, "in_channels must be at least 1"),
        ({"out_channels": 0}, "out_channels must be at least 1"),
        ({"num_res_blocks": 0}, "num_res_blocks must be at least 1"),
        ({"num_groups": 0}, "num_groups must be at least 1"),
        ({"num_heads": 0}, "num_heads must be at least 1"),
        ({"head_channels": 0}, "head_channels must be at least 1"),
        ({"time_channels": 0}, "time_channels must be at least 1"),
        ({"embedding_channels": 2}, "embedding_channels must be at least 4; got 2"),
        ({"num_classes": 0}, "num_classes must be at least 1"),
        ({"null_class": True}, "null_class=True needs num_classes"),
        ({"timestep_embedding": "cosine"}, "timestep_embedding must be one of ddpm, guided; got 'cosine'"),
        ({"resample": "fir"}, "resample must be one of conv, resblock, plain; got 'fir'"),
        ({"downsample_padding": "same"}, "downsample_padding must be one of symmetric, bottom_right"),
        ({"downsample_padding": "bottom_right", "resample": "plain"}, "needs resample='conv'"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"dropout": -0.1}, "dropout must be in"),
        ({"eps": 0.0}, "eps must be above 0"),
        ({"attention_resolutions": (16,)}, r"attention_resolutions must be among the levels' sides, \[8, 4\]; got 16"),
        ({"num_heads": 3}, "num_heads must divide the 32 channels of an attention; got 3"),
        ({"head_channels": 5}, "head_channels must divide the 32 channels of an attention; got 5"),
        ({"attention_resolutions": (8,), "head_channels": 32}, "head_channels must divide the 16 channels"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        UNet(**{**SMALL, **options})


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"name must be one of cifar10, .*; got 'cifar100'"):
        UNet.from_config("cifar100")
    with pytest.raises(TypeError, match="colour"):
        UNet(**SMALL, colour=1)


def test_heads_matter_only_where_there_is_attention():
    assert UNetConfig(**SMALL, num_heads=3, middle_attention=False).heads(48) == 3
    assert UNetConfig(**SMALL, head_channels=8).heads(32) == 4
