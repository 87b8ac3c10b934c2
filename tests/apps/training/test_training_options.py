"""What a run refuses: bad options, files that are there, the state of another run."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from training_runs import TINY, metadata, options, train

from dd_kernels.apps import checkpoint, training
from dd_kernels.apps.data import NAMED, ImageData
from dd_kernels.apps.training import TrainOptions, trainer
from dd_kernels.apps.training.options import DIGITS, RECIPES
from dd_kernels.nn import CONFIGS, UNet, fitting_config


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("batch_size", 0),
        ("num_timesteps", 0),
        ("warmup", -1),
        ("seed", -1),
        ("seed", 1 << 64),
        ("lr", 0.0),
        ("lr", math.nan),
        ("lr", math.inf),
        ("clip_grad", 0.0),
        ("weight_decay", -1.0),
        ("ema", 1.0),
        ("beta1", -0.1),
        ("beta2", 1.0),
        ("label_drop", 1.5),
        ("prediction", "future"),
        ("precision", "fp8"),
        ("schedule", "wavy"),
        ("num_timesteps", 10**12),
        ("background", "mint-ish"),
        ("loss_weight", "max-snr"),
        ("snr_gamma", 0.0),
        ("snr_gamma", math.inf),
        ("timesteps", "often"),
        ("input_perturbation", -0.1),
        ("input_perturbation", math.nan),
        ("lr_schedule", "step"),
        ("ema", []),
        ("ema", [0.9, 0.9]),
        ("ema", [0.9, 1.0]),
        ("ema", "slow"),
        ("steps", "many"),
        ("lr", None),
        ("image_size", 0),
        ("model", 3),
    ],
)
def test_options_are_checked(name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        TrainOptions(**{name: value})


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"flavour": 1}, "flavour must be one of"),
        ({"num_classes": 3}, "num_classes follows from the data"),
        ({"channels": "x"}, "channels must be a list of integers; got 'x'"),
        ({"channels": [[8, 16]]}, r"channels must be an integer below 2\^31; got \[8, 16\]"),
        ({"channels": [8, 2**40]}, "channels must be an integer"),
        ({"dropout": {"nested": 1}}, "dropout must be a number"),
        ({"scale_shift": "yes"}, "scale_shift must be true or false"),
        ({"channels": [1 << 20, 1 << 20]}, "takes .* GiB of memory"),
        ({"num_groups": 7}, "num_groups"),
    ],
)
def test_model_options_are_checked(images, model, message):
    with pytest.raises(ValueError, match=message):
        trainer.build_model(options(model={**TINY, **model}), images)


def test_other_errors(tmp_path, images):
    with pytest.raises(ValueError, match="save_every must be at least 0; got -1"):
        training.train(options(), tmp_path / "a.safetensors", dataset=images, save_every=-1)


@pytest.mark.parametrize("size", [7, 8, 24, 28, 32, 60, 256])
def test_without_a_configuration_the_model_fits_the_images(size):
    config = fitting_config(size)
    with torch.device("meta"):
        UNet(in_channels=3, **{name: value for name, value in config.items() if name != "in_channels"})
    assert config == CONFIGS["cifar10"] or size != 32
    assert {**config, "dropout": 0.0} == {"dropout": 0.0, **CONFIGS["lsun256"]} or size != 256
    dataset = ImageData(torch.zeros(1, 3, size, size, dtype=torch.uint8))
    model, _ = trainer.build_model(options(config=None, model={"channels": [8], "num_groups": 4}), dataset)
    assert model.config["image_size"] == size


def test_numpy_numbers_and_paths_are_options(tmp_path, images):
    numbers = {"steps": np.int64(1), "lr": np.float32(0.01), "seed": np.uint8(3), "data": tmp_path}
    run = options(**numbers, model={**TINY, "channels": np.array([8, 16]), "num_groups": np.int64(4)})
    training.train(run, tmp_path / "a.safetensors", dataset=images, save_every=np.int64(1), sample_every=0)
    assert metadata(tmp_path / "a.safetensors")["options"]["steps"] == 1


def test_the_recipes_are_options_for_data_that_have_their_names():
    assert RECIPES.keys() == NAMED.keys()
    assert TrainOptions(**DIGITS).precision == "fp32"
    fashion = TrainOptions(**RECIPES["fashion-mnist"])
    dataset = ImageData(torch.zeros(10, 1, 28, 28, dtype=torch.uint8), torch.arange(10), tuple("0123456789"))
    model, _ = trainer.build_model(fashion, dataset)
    assert 1.0e6 < sum(parameter.numel() for parameter in model.parameters()) < 1.2e6
    assert fashion.learning_rate(fashion.warmup) == fashion.lr > 100 * fashion.learning_rate(fashion.steps - 1)


def test_out_is_never_lost(tmp_path, images):
    out = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match="resume: there is no model"):
        train(out, images, resume=True)
    train(out, images, steps=1)
    with pytest.raises(ValueError, match=r"a\.safetensors.* is there already"):
        train(out, images)
    training.train(options(steps=1), out, dataset=images, overwrite=True)
    for path, message in (
        (tmp_path / "model.pt", "must end in .safetensors"),
        (tmp_path / "no" / "a.safetensors", "cannot write"),
        (tmp_path, "must name a file"),
    ):
        with pytest.raises(ValueError, match=message):
            train(path, images)
    with pytest.raises(ValueError, match="only one of resume and overwrite"):
        training.train(options(), out, dataset=images, resume=True, overwrite=True)


def test_resuming_another_run_is_refused(tmp_path, images):
    out = tmp_path / "a.safetensors"
    train(out, images, steps=2)
    with pytest.raises(ValueError, match=r"lr must be 0\.01, as in the run that is resumed; got 0\.1"):
        train(out, images, resume=True, lr=0.1)
    changed = dataclasses.replace(images, images=images.images.flip(0))
    with pytest.raises(ValueError, match="data: the images are not those"):
        train(out, changed, resume=True)
    file, found = checkpoint.open_model(out)
    with file:
        tensors, info, body = file.read(checkpoint.KEY), checkpoint.ModelInfo.from_metadata(out, found), found["state"]
    tensors.pop("training.model.conv_out.bias")

    def write(training_state):
        checkpoint.save(out, tensors, info, {}, training_state)

    write(body)
    with pytest.raises(ValueError, match="does not hold the weights and moments"):
        train(out, images, resume=True)
    write({name: value for name, value in body.items() if name != "scaler"})
    with pytest.raises(ValueError, match="does not say where its training stopped"):
        train(out, images, resume=True)
    for wrong in ({}, {"options": {"flavour": "mint"}}, {"options": 3}, {"options": {"lr": "fast"}}):
        write(wrong)
        with pytest.raises(ValueError, match="does not say how it was trained"):
            train(out, images, resume=True)
    whole = out.read_bytes()
    out.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cannot read .* as a model"):
        train(out, images, resume=True)
