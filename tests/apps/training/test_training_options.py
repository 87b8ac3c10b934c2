"""What a run refuses: bad options, files that are there, the state of another run."""

import dataclasses
import math

import pytest
from training_runs import TINY, options, train

from dd_kernels.apps import checkpoint, training
from dd_kernels.apps.training import TrainOptions, state_path, trainer
from dd_kernels.apps.training.options import DIGITS


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
        ({"channels": "x"}, "no U-Net can be built with"),
        ({"num_groups": 7}, "num_groups"),
    ],
)
def test_model_options_are_checked(images, model, message):
    with pytest.raises(ValueError, match=message):
        trainer.build_model(options(model={**TINY, **model}), images)


def test_other_errors(tmp_path, images):
    with pytest.raises(ValueError, match="learn_variance must be false"):
        TrainOptions(model={"learn_variance": True})
    with pytest.raises(ValueError, match="save_every must be at least 0; got -1"):
        training.train(options(), tmp_path / "a.safetensors", dataset=images, save_every=-1)


def test_the_digits_defaults_are_options():
    assert TrainOptions(**DIGITS).precision == "fp32"


def test_out_is_never_lost(tmp_path, images):
    out = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match="resume: there is no training state"):
        train(out, images, resume=True)
    train(out, images, steps=1)
    with pytest.raises(ValueError, match=r"a\.safetensors.* is there already"):
        train(out, images)
    out.unlink()
    with pytest.raises(ValueError, match=r"a\.training\.safetensors.* is there already"):
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
    state = state_path(out)
    tensors, metadata = checkpoint.load(state, checkpoint.TRAINING)
    tensors.pop("ema.conv_out.bias")
    body = {k: v for k, v in metadata.items() if k not in ("format", "kind")}
    checkpoint.save(state, checkpoint.TRAINING, tensors, body)
    with pytest.raises(ValueError, match="does not hold the weights and moments"):
        train(out, images, resume=True)
    body.pop("scaler")
    checkpoint.save(state, checkpoint.TRAINING, tensors, body)
    with pytest.raises(ValueError, match="does not say where it stopped"):
        train(out, images, resume=True)
    for wrong in ({}, {"options": {"flavour": "mint"}}, {"options": 3}):
        checkpoint.save(state, checkpoint.TRAINING, tensors, wrong)
        with pytest.raises(ValueError, match="does not say how it was trained"):
            train(out, images, resume=True)
    whole = state.read_bytes()
    state.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cannot read .* as a training state"):
        train(out, images, resume=True)
