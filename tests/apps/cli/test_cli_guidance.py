"""Guidance from the command line: both conventions, the rescale and the interval, in every command that draws."""

import json

import numpy as np
import torch
from commands import fails, pixels, run, sample
from known_judge import KnownJudge

import dd_kernels as dd
from dd_kernels.apps import checkpoint, cli, images
from dd_kernels.apps.evaluate.report import guidance_text

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
