"""Training of a classifier of noisy images: it learns, its bits follow from the options, and each option counts."""

from dataclasses import replace

import pytest
import torch
from training_runs import options

from dd_kernels.apps.data import ImageData
from dd_kernels.apps.training import (
    CLASSIFIER_DEFAULTS,
    CLASSIFIER_RECIPES,
    TrainingDivergedError,
    TrainOptions,
    accuracy_by_timestep,
    train_noisy_classifier,
)


def images(count=12):
    """Dark and light images, which noise of less than 1 does not hide."""
    labels = torch.arange(count) % 2
    light = torch.where(labels == 1, 240, 15)[:, None, None, None].expand(count, 1, 8, 8)
    ramp = torch.arange(8).expand(count, 1, 8, 8)
    return ImageData((light + ramp).to(torch.uint8), labels, ("dark", "light"))


def trained(**changes):
    return train_noisy_classifier(options(**changes), images())


def weights(**changes):
    model, _ = trained(**{"steps": 3, "warmup": 0, **changes})
    return torch.cat([p.flatten() for p in model.parameters()])


def test_it_learns_what_noise_leaves():
    model, info = trained(steps=30, num_timesteps=10, schedule="linear", warmup=0)
    shares = accuracy_by_timestep(model, info, images(40))
    assert sorted(shares) == [0, 1, 2, 3, 5, 6, 7, 8]
    assert shares[0] == 1.0
    assert all(0 <= share <= 1 for share in shares.values())
    assert (info.prediction, info.classes, info.num_timesteps) == ("class", ("dark", "light"), 10)
    assert info.training["steps"] == 30
    assert info.training["loss"] < 0.6931
    assert not model.training


def test_options_decide_the_bits():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert weights().equal(weights())
    assert torch.get_rng_state().equal(before)
    changes = [
        {"seed": 1}, {"lr": 1e-3}, {"steps": 5}, {"batch_size": 5}, {"weight_decay": 0.5}, {"beta1": 0.5},
        {"beta2": 0.9}, {"warmup": 2}, {"lr_schedule": "cosine"}, {"clip_grad": 1e-3}, {"precision": "bf16"},
        {"flip": True}, {"schedule": "linear"}, {"num_timesteps": 5},
    ]  # fmt: skip
    assert len({weights(**change).numpy().tobytes() for change in [{}, *changes]}) == 1 + len(changes)


def test_recipes_are_options():
    for name, recipe in CLASSIFIER_RECIPES.items():
        assert TrainOptions(**{"data": name, **CLASSIFIER_DEFAULTS, **recipe}).lr_schedule == "cosine"


def test_errors():
    with pytest.raises(ValueError, match="data must have labels, for a classifier; got none"):
        train_noisy_classifier(options(), replace(images(), labels=None, classes=()))
    with pytest.raises(ValueError, match="model: num_classes follows from the data and cannot be set; got 3"):
        trained(model={"num_classes": 3})
    with pytest.raises(TrainingDivergedError, match="the loss of step 2 is not a number: try a smaller lr"):
        trained(lr=1e30, warmup=0)
