"""``edit`` and ``inpaint``: what they write is what the library gives, and every error is one line."""

import numpy as np
import pytest
import torch
from commands import fails, pixels, run
from PIL import Image

import dd_kernels as dd
from dd_kernels.apps import checkpoint, data
from dd_kernels.apps.images import to_uint8


def line(command, model, *arguments):
    return run(command, "--model", model, "--no-progress", "--overwrite", *arguments)


def library(models, sampler=dd.ddpm, steps=20, **options):
    """Returns the model, the first three held-out digits, a sampler and its schedule; and their labels."""
    model, info = checkpoint.load_model(models["digits"])
    images, labels = data.held_out("digits").batch(torch.arange(3))
    schedule = info.make_schedule()
    return (model, images, sampler(schedule, steps, prediction="v", **options), schedule), {"y": labels}


def same(path, x):
    """Whether a file holds the images x, to a grey level."""
    return np.abs(pixels(path).astype(int) - to_uint8(x).numpy()).max() <= 1


def test_edit_equals_the_library(models, capsys):
    assert line("edit", models["digits"], "-n", 3, "--strength", 0.3, 1, "--seed", 4, "--out", "e.npz") == 0
    assert "e.npz: 3 images at the strengths 0.3, 1, ddpm with 20 steps" in capsys.readouterr().out
    (model, images, table, schedule), kwargs = library(models)
    each = [
        dd.image_to_image(model, images, table, schedule, strength=strength, seed=4, model_kwargs=kwargs)
        for strength in (0.3, 1)
    ]
    assert same("e.npz", torch.cat(each))
    with np.load("e.npz") as file:
        assert file["labels"].tolist() == kwargs["y"].tolist() * 2
    options = ["--sampler", "ddim", "--eta", 0.5, "--steps", 10, "--classes", "4", "--clip", "none"]
    assert line("edit", models["digits"], "-n", 3, "--strength", 0.5, "--out", "e.npz", *options) == 0
    (model, images, table, schedule), _ = library(models, dd.ddim, 10, eta=0.5, clip=None)
    kwargs = {"y": torch.full((3,), 4)}
    assert same("e.npz", dd.image_to_image(model, images, table, schedule, strength=0.5, seed=0, model_kwargs=kwargs))


def test_inpaint_equals_the_library(models, capsys):
    Image.fromarray(np.eye(8, dtype=np.uint8) * 255).save("mask.png")
    options = ["--mask", "mask.png", "--draws", 2, "--resample", 3, "--jump", 4, "--steps", 10]
    assert line("inpaint", models["digits"], "-n", 3, "--seed", 4, "--out", "p.npz", *options) == 0
    assert "8 of 64 pixels painted, ddpm with 10 steps, taken 3 times" in capsys.readouterr().out
    (model, images, table, schedule), kwargs = library(models, steps=10)
    twice, mask = images.repeat(2, 1, 1, 1), torch.eye(8) > 0
    kwargs = {"y": kwargs["y"].repeat(2)}
    x = dd.inpaint(model, twice, mask, table, schedule, resample=3, jump=4, seed=4, model_kwargs=kwargs)
    assert same("p.npz", x)
    assert not np.array_equal(pixels("p.npz")[:3], pixels("p.npz")[3:])
    with np.load("p.npz") as file:
        assert file["labels"].tolist() == kwargs["y"].tolist()


@pytest.mark.parametrize(
    ("model", "name", "pixels_painted"), [("plain", "half", 32), ("plain", "centre", 16), ("learned", "centre", 16)]
)
def test_masks_with_names(models, capsys, model, name, pixels_painted):
    assert line("inpaint", models[model], "-n", 2, "--steps", 2, "--mask", name, "--resample", 1) == 0
    assert f"{pixels_painted} of 64 pixels painted" in capsys.readouterr().out
    with Image.open("inpainted.png") as picture:
        assert picture.height == (5 * 9 + 1) * 8  # the images, what is known, three draws
        assert picture.width > (2 * 9 + 1) * 8  # names at the left


@pytest.mark.parametrize("name", ["digits", "plain"])
def test_files_of_images(models, name):
    Image.fromarray(np.full((20, 30, 3), 200, np.uint8)).save("a.png")
    assert line("edit", models[name], "--images", "a.png", "a.png", "--strength", 0, "--out", "e.npz") == 0
    assert np.array_equal(pixels("e.npz"), np.full((2, 8, 8, 1), 200))


@pytest.mark.parametrize(
    ("name", "command", "flags", "message"),
    [
        ("digits", "edit", ["--strength", 1.5], "strength must lie in [0, 1]; got 1.5"),
        ("digits", "edit", ["--strength", "x"], "argument --strength: must be a number; got 'x'"),
        ("digits", "edit", ["--images", "no.png"], "there is no image 'no.png'"),
        ("digits", "edit", ["--images", "a.png", "-n", 1], "-n must be left out with --images; got 1"),
        ("digits", "edit", ["-n", 361], "-n must be at most 360, the held-out images there are; got 361"),
        ("digits", "edit", ["--data", "big.npz"], "--model must draw images of (1, 16, 16)"),
        ("digits", "edit", ["--eta", 1], "--eta must be left out with --sampler ddpm; got 1.0"),
        ("digits", "edit", ["--sampler", "dpm++"], "invalid choice: 'dpm++'"),
        ("undropped", "edit", ["--images", "a.png"], "must have labels of the model's 10 classes"),
        ("digits", "inpaint", ["--mask", "no.png"], "there is no image 'no.png'"),
        ("digits", "inpaint", ["--mask", "a.png"], "--mask must have white pixels, which are painted; got none"),
        ("digits", "inpaint", ["--jump", 20, "--steps", 9], "jump must be an int in [1, 8], with 9 steps; got 20"),
        ("digits", "inpaint", ["--resample", 0], "argument --resample: must be an integer of at least 1; got '0'"),
        ("digits", "inpaint", ["--out", "no/where.png"], "out: cannot write"),
    ],
)
def test_errors(models, capsys, name, command, flags, message):
    Image.new("L", (8, 8)).save("a.png")
    np.savez("big.npz", images=np.zeros((2, 16, 16), np.uint8))
    assert message in fails(capsys, command, "--no-progress", "--model", models[name], *flags)
