"""Guidance from the command line: both conventions, the rescale and the interval, in every command that draws."""

import json
from typing import ClassVar

import numpy as np
import pytest
import torch
from commands import fails, pixels, run, sample
from known_judge import KnownJudge
from PIL import Image

import dd_kernels as dd
from dd_kernels.apps import checkpoint, cli, images
from dd_kernels.apps.checkpoint import ModelInfo
from dd_kernels.apps.cli.classifier import ClassifierGuided
from dd_kernels.apps.evaluate.report import guidance_text
from dd_kernels.nn import NoisyClassifier, UNet

SHARED = {"uncond_kwargs": {"y": torch.full((3,), 10)}, "model_kwargs": {"y": torch.arange(3)}, "seed": 0}


def test_the_weight_of_ho_and_salimans_is_the_scale_less_one(models):
    assert sample(models, "-n", 3, "--steps", 4, "--guidance", 2.5, "--out", "scale.npz") == 0
    assert sample(models, "-n", 3, "--steps", 4, "--guidance-weight", 1.5, "--out", "weight.npz") == 0
    assert np.array_equal(pixels("scale.npz"), pixels("weight.npz"))
    model, info = checkpoint.load_model(models["digits"])
    y, null = SHARED["model_kwargs"]["y"], SHARED["uncond_kwargs"]["y"]
    by_hand = lambda x, t: 2.5 * model(x, t, y) - 1.5 * model(x, t, null)  # noqa: E731
    x = dd.sample(by_hand, (3, 1, 8, 8), dd.ddim(info.make_schedule(), 4, prediction="v"), seed=0)
    assert np.abs(pixels("weight.npz").astype(int) - images.to_uint8(x).numpy()).max() <= 1


def test_sample_equals_the_library(models):
    flags = ["--guidance", 3, "--guidance-rescale", 0.5, "--guidance-interval", 5, 12]
    assert sample(models, "-n", 3, "--steps", 6, *flags, "--out", "a.npz") == 0
    model, info = checkpoint.load_model(models["digits"])
    guided = {"guidance_scale": 3.0, "guidance_rescale": 0.5, "guidance_interval": (5, 12), **SHARED}
    x = dd.sample(model, (3, 1, 8, 8), dd.ddim(info.make_schedule(), 6, prediction="v"), **guided)
    assert np.array_equal(pixels("a.npz"), images.to_uint8(x).numpy())


def test_interpolate_and_shards_take_it_too(models, capsys):
    walk = ["interpolate", "--model", models["digits"], "--steps", 4, "-n", 2, "--no-progress", "--guidance", 3]
    assert run(*walk, "--out", "plain.npz") == 0
    assert run(*walk, "--guidance-interval", 5, 12, "--out", "interval.npz") == 0
    assert not np.array_equal(pixels("plain.npz"), pixels("interval.npz"))
    job = ["sample", "--model", models["digits"], "-n", 4, "--steps", 2, "--shard-size", 2, "--no-progress"]
    job += ["--out", "out", "--guidance", 3]
    assert run(*job) == 0
    line = fails(capsys, *job, "--guidance-interval", 5, 12)
    assert "guidance_interval is None there and [5.0, 12.0] here" in line
    assert "guidance_rescale is 0.0 there and 0.5 here" in fails(capsys, *job, "--guidance-rescale", 0.5)


def test_evaluate_says_how_samples_were_guided(models, monkeypatch, capsys):
    monkeypatch.setattr(cli.evaluate, "Judge", KnownJudge)
    line = ["evaluate", "--model", models["digits"], "-n", 3, "--steps", 4, "--rows", 0, "--out", "t.json"]
    assert run(*line, "--guidance", 3, "--guidance-rescale", 0.5, "--guidance-interval", 5, 12) == 0
    captured = capsys.readouterr()
    assert "guidance 3, rescaled by 0.5, at timesteps 5 to 12, batches of" in captured.out
    assert "evaluating: 100%" in captured.err  # calls outside the interval are counted once
    with open("t.json", encoding="utf-8") as file:
        found = json.load(file)["run"]
    assert (found["guidance"], found["guidance_rescale"], found["guidance_interval"]) == (3.0, 0.5, [5.0, 12.0])
    assert (
        guidance_text({"guidance": 1.0, "guidance_rescale": 0.0, "guidance_interval": None, "classifier": None})
        == "guidance 1"
    )


def strengths(models, *flags, name="digits"):
    """Returns the JSON of a measurement at several strengths."""
    line = ["evaluate", "--model", models[name], "-n", 3, "--steps", 4, "--no-progress", "--overwrite"]
    assert run(*line, "--out", "t.json", *flags) == 0
    with open("t.json", encoding="utf-8") as file:
        return json.load(file)


class Recording(KnownJudge):
    """A judge that keeps the samples it is shown, and the labels."""

    seen: ClassVar[list] = []

    def measure(self, images, labels=None):
        if isinstance(images, torch.Tensor) and images.ndim == 4:
            self.seen.append((images, labels.tolist()))
        return super().measure(images, labels)


def test_each_guidance_is_that_of_sample(models, monkeypatch, capsys):
    monkeypatch.setattr(cli.evaluate, "Judge", Recording)
    Recording.seen.clear()
    found = strengths(models, "--guidances", 1, 3, "--guidance-interval", 5, 12, "--plot", "g.png", "--data", "digits")
    assert [cell["row"] for cell in found["cells"]] == found["rows"] == [1.0, 3.0]
    assert (found["settings"]["axis"], found["settings"]["sampler"]) == ("guidance", 0.0)
    assert (found["run"]["guidance"], found["run"]["guidance_interval"]) == (None, [5.0, 12.0])
    assert "guidance of the row, at timesteps 5 to 12" in capsys.readouterr().out
    assert [labels for _, labels in Recording.seen] == [[0, 1, 2]] * 2
    for (x, _), flags in zip(Recording.seen, ([], ["--guidance", 3, "--guidance-interval", 5, 12]), strict=True):
        assert sample(models, "-n", 3, "--steps", 4, *flags, "--out", "a.npz") == 0
        assert np.array_equal(pixels("a.npz"), images.to_uint8(x).numpy())
    with Image.open("g.png") as picture:
        assert picture.width > 400


def test_each_scale_of_a_classifier(models, monkeypatch, capsys):
    monkeypatch.setattr(cli.evaluate, "Judge", Recording)
    Recording.seen.clear()
    train = ["train-classifier", "--data", "digits", "--out", "c.safetensors", "--schedule", "cosine", "--steps", 2]
    tiny = [
        "--num-timesteps",
        20,
        "--set",
        "channels=[8]",
        "num_groups=4",
        "attention_resolutions=[]",
        "--batch-size",
        2,
    ]
    assert run(*train, *tiny, "--no-progress") == 0
    found = strengths(models, "--classifier", "c.safetensors", "--classifier-scales", 0, 100, "--data", "digits")
    assert found["settings"]["axis"] == "classifier scale"
    assert (found["run"]["guidance"], found["run"]["classifier_scale"]) == (1.0, None)
    (plain, _), (guided, _) = Recording.seen
    assert sample(models, "-n", 3, "--steps", 4, "--out", "a.npz") == 0
    assert np.array_equal(pixels("a.npz"), images.to_uint8(plain).numpy())
    assert not plain.equal(guided)
    strengths(models, "--classifier", "c.safetensors", "--classifier-scales", 1, "--data", "digits", name="plain")
    assert Recording.seen[-1][1] == [0, 1, 2], "a model without classes is asked for the classifier's"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--guidances", "1", "--steps", "2", "3"], "--steps must be one with --guidances; got [2, 3]"),
        (["--guidances", "1", "--rows", "0", "1"], "--etas must be one with --guidances; got [0.0, 1.0]"),
        (["--guidances", "1", "--guidance", "2"], "--guidance must be left out with --guidances; got 2.0"),
        (["--guidances", "1", "inf"], "--guidance must be a finite number; got inf"),
        (["--guidances", "1", "--guidance-rescale", "0.5"], "--guidance-rescale must be left out with --guidance 1"),
        (["--guidances", "1", "--classifier-scales", "1"], "not allowed with argument --guidances"),
        (["--classifier-scales", "1"], "--classifier-scales needs --classifier, without --classifier-scale; got [1.0]"),
        (["--classifier", "c", "--classifier-scales", "inf"], "--classifier-scales must be finite numbers; got [inf]"),
        (["--guidances", "1", "--bits-per-dim"], "--guidances must be left out with --bits-per-dim; got [1.0]"),
        (["--plot", "p.png"], "--plot must be left out without --bits-per-dim, --guidances or --classifier-scales"),
        (["--guidances", "1", "--plot", "p.jpg"], "--plot must name a .png; got 'p.jpg'"),
    ],
)
def test_strengths_that_do_not_go_together(models, capsys, flags, message):
    assert message in fails(capsys, "evaluate", "--model", models["digits"], "--no-progress", *flags)


def test_strengths_of_a_model_without_dropped_labels(models, capsys):
    line = fails(capsys, "evaluate", "--model", models["undropped"], "--guidances", 1, 2)
    assert "--guidance needs a model trained with dropped labels; got 2.0 for one without" in line


def test_a_classifier_that_pushes_nowhere_leaves_a_model_its_self_conditioning():
    torch.manual_seed(0)
    size = {"image_size": 8, "in_channels": 1, "channels": (8,), "num_groups": 4, "middle_attention": False}
    model, judge = UNet(**size, self_conditioning=True).eval(), NoisyClassifier(**size, num_classes=3).eval()
    torch.nn.init.normal_(model.conv_out.weight, std=0.1)
    info = ModelInfo(model.config, "linear", 20, "epsilon", (), {})
    guided = ClassifierGuided(model, info, judge, (), scale=0.0)
    draw = {"shape_or_x": (3, 1, 8, 8), "table": dd.ddim(info.make_schedule(), 4), "seed": 0}
    x = dd.sample(guided, model_kwargs={"label": torch.arange(3)}, **draw)
    assert torch.equal(x, dd.sample(model, **draw))
    assert not torch.equal(x, dd.sample(lambda x, t: model(x, t), **draw))  # which reads zeros at every step
