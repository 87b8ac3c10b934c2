"""``train-classifier``, and the classifier that guides ``sample`` and ``evaluate``."""

import json
import pathlib

import numpy as np
import pytest
import torch
from commands import fails, pixels, run, sample
from known_judge import KnownJudge

import dd_kernels as dd
from dd_kernels.apps import checkpoint, cli, images, training
from dd_kernels.apps.checkpoint import ModelInfo
from dd_kernels.apps.classifier_file import load_classifier, save_classifier
from dd_kernels.nn import NoisyClassifier
from dd_kernels.sampling.guidance import classifier_guided

TINY = ["--set", "channels=[8]", "num_groups=4", "num_heads=1", "attention_resolutions=[]", "--num-timesteps", 4]
TINY += ["--batch-size", 4, "--steps", 2, "--no-progress"]


@pytest.fixture
def classifier():
    """A classifier of random weights, for the schedule of ``models``."""
    torch.manual_seed(1)
    model = NoisyClassifier(image_size=8, in_channels=1, channels=(8,), num_groups=4, num_classes=10)
    torch.nn.init.normal_(model.head.weight, std=3.0)
    classes = tuple(map(str, range(10)))
    save_classifier("c.safetensors", model.state_dict(), ModelInfo(model.config, "cosine", 20, "class", classes, {}))
    return "c.safetensors"


def test_the_command_equals_the_library(capsys):
    assert run("train-classifier", "--data", "digits", "--out", "c.safetensors", *TINY, "--seed", 3) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("c.safetensors: step 2, loss ")
    assert lines[1].startswith("accuracy by timestep on 360 held-out images: ")
    assert lines[1].endswith("% at 3")
    found, info = load_classifier("c.safetensors")
    settings = {**training.CLASSIFIER_DEFAULTS, **training.CLASSIFIER_RECIPES["digits"], "num_timesteps": 4, "seed": 3}
    network = {"channels": [8], "num_groups": 4, "num_heads": 1, "attention_resolutions": []}
    settings |= {"batch_size": 4, "steps": 2, "model": network}
    options = training.TrainOptions(**settings)
    wanted, described = training.train_noisy_classifier(options, cli.train_classifier.data.load("digits"))
    assert all(value.equal(wanted.state_dict()[name]) for name, value in found.state_dict().items())
    assert (info.config, info.classes) == (described.config, described.classes)
    assert info.training["loss"] == described.training["loss"]
    assert "prediction" not in info.training


def test_other_data_and_recipes(capsys):
    rng = np.random.default_rng(0)
    np.savez("a.npz", images=rng.integers(0, 255, (4, 8, 8), dtype=np.uint8), labels=np.array([0, 1, 0, 2]))
    train = ["train-classifier", "--data", "a.npz", "--out", "c.safetensors", *TINY]
    assert run(*train, "--recipe", "digits") == 0
    assert "on 4 training images" in capsys.readouterr().out
    assert load_classifier("c.safetensors")[1].classes == ("0", "1", "2")
    assert "--out: 'c.safetensors' is there already (--overwrite to replace it)" in fails(capsys, *train)
    assert run(*train, "--overwrite", "--lr", 1e-4) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--data must be given: digits, fashion-mnist, a folder or a .npz file"),
        (["--data", "unlabelled.npz"], "data must have labels, for a classifier; got none"),
        (["--data", "digits", "--out", "c.pt"], "--out must end in .safetensors; got 'c.pt'"),
        (["--data", "digits", "--out", "no/c.safetensors"], "--out: cannot write 'no/c.safetensors'"),
        (["--data", "digits", "--lr", "0"], "lr must be a positive number; got 0.0"),
        (["--data", "digits", "--set", "flavour=mint"], "model: flavour must be one of"),
        (["--data", "digits", "--label-drop", "0.1"], "unrecognized arguments: --label-drop 0.1"),
    ],
)
def test_errors(capsys, flags, message):
    np.savez("unlabelled.npz", images=np.zeros((2, 8, 8), np.uint8))
    out = [] if "--out" in flags else ["--out", "c.safetensors"]
    assert message in fails(capsys, "train-classifier", *out, "--no-progress", *flags)


def test_training_that_diverges_is_status_1(capsys):
    assert (
        run("train-classifier", "--data", "digits", "--out", "c.safetensors", *TINY, "--lr", 1e30, "--warmup", 0) == 1
    )
    assert "the loss of step 2 is not a number: try a smaller lr" in capsys.readouterr().err
    assert not list(pathlib.Path().iterdir())


@pytest.mark.parametrize("name", ["digits", "plain", "learned"])
def test_sample_guided_by_a_classifier_equals_the_library(models, classifier, name):
    """Of a model with classes and of models without; all predict v."""
    flags = ["-n", 3, "--steps", 4, "--classifier", classifier, "--classifier-scale", 2, "--classes", "4,7"]
    assert sample(models, *flags, "--out", "a.npz", name=name) == 0
    (model, info), (found, _) = checkpoint.load_model(models[name]), load_classifier(classifier)
    labels = torch.tensor([4, 7, 4])
    y = labels if name == "digits" else None
    guided = classifier_guided(
        lambda x, t: model(x, t, y), lambda x, t: found.log_probability(x, t, labels), info.make_schedule(), 2.0, "v"
    )
    table = dd.ddim(info.make_schedule(), 4, prediction="v", learned_variance=name == "learned")
    x = dd.sample(guided, (3, 1, 8, 8), table, seed=0)
    assert np.array_equal(pixels("a.npz"), images.to_uint8(x).numpy())
    with np.load("a.npz") as file:
        assert file["labels"].tolist() == labels.tolist()


def test_scales_and_both_guidances(models, classifier):
    """Scale 0 is the model alone; --guidance 0 leaves the class to the classifier."""
    guide, draw = ["--classifier", classifier], ["-n", 2, "--steps", 3, "--out"]
    assert sample(models, *draw, "plain.npz") == 0
    for i, flags in enumerate(
        (
            ["--classifier-scale", 0],
            [],
            ["--classifier-scale", 3],
            ["--guidance", 0],
            ["--guidance", 2],
            ["--dtype", "bf16"],
        )
    ):
        assert sample(models, *draw, f"{i}.npz", *guide, *flags) == 0
    assert np.array_equal(pixels("plain.npz"), pixels("0.npz"))
    assert len({pixels(f"{i}.npz").tobytes() for i in range(6)}) == 6
    assert sample(models, *draw, "none.npz", *guide, "--guidance", 0, "--classifier-scale", 0) == 0
    assert sample(models, *draw, "null.npz", "--classes", "none") == 0
    assert np.abs(pixels("none.npz").astype(int) - pixels("null.npz")).max() <= 1


def test_shards_and_evaluate(models, classifier, capsys, monkeypatch):
    job = ["sample", "--model", models["digits"], "-n", 4, "--steps", 2, "--shard-size", 2, "--no-progress"]
    assert run(*job, "--out", "out", "--classifier", classifier) == 0
    assert "classifier is '" in fails(capsys, *job, "--out", "out")
    line = fails(capsys, *job, "--out", "out", "--classifier", classifier, "--classifier-scale", 3)
    assert "classifier_scale is 1.0 there and 3.0 here" in line
    assert run(*job, "--out", "out", "--classifier", classifier, "--classifier-scale", 1) == 0
    monkeypatch.setattr(cli.evaluate, "Judge", KnownJudge)
    measure = ["evaluate", "--model", models["plain"], "-n", 3, "--steps", 2, "--rows", 0, "--out", "t.json"]
    assert run(*measure, "--classifier", classifier, "--classifier-scale", 2, "--data", "digits") == 0
    assert f"guidance 1, by {classifier} with the scale 2, batches of" in capsys.readouterr().out
    with open("t.json", encoding="utf-8") as file:
        assert json.load(file)["run"]["classifier_scale"] == 2.0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--classifier", "no.safetensors"], "there is no classifier 'no.safetensors'"),
        (["--classifier-scale", "2"], "--classifier-scale needs --classifier; got 2.0"),
        (["--classifier", "c.safetensors", "--classifier-scale", "inf"], "must be a finite number; got inf"),
        (["--classifier", "c.safetensors", "--classes", "none"], "--classes none must be left out with --classifier"),
        (["--classifier", "other.safetensors"], "--classifier must be trained on the schedule ('cosine', 20), as the"),
        (["--classifier", "few.safetensors"], "--classifier must be trained on classes: 10, as the model is; got 3"),
        (["--classifier", "big.safetensors"], "--classifier must be trained on images of (1, 8, 8), as the model is"),
    ],
)
def test_a_classifier_that_does_not_fit(models, classifier, capsys, flags, message):
    for name, size, classes, steps in (("other", 8, 10, 30), ("few", 8, 3, 20), ("big", 16, 10, 20)):
        model = NoisyClassifier(image_size=size, in_channels=1, channels=(8,), num_groups=4, num_classes=classes)
        info = ModelInfo(model.config, "cosine", steps, "class", tuple(map(str, range(classes))), {})
        save_classifier(f"{name}.safetensors", model.state_dict(), info)
    assert message in fails(capsys, "sample", "--model", models["digits"], "--no-progress", *flags)
