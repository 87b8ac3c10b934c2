"""``interpolate``: between seeds and between images."""

import pathlib

import numpy as np
from commands import fails, pixels, run, sample
from PIL import Image

from dd_kernels.apps import data
from dd_kernels.apps.cli import interpolate


def test_interpolate_between_seeds(models):
    walk = ["interpolate", "--model", models["digits"], "--no-progress", "--overwrite", "--steps", 4, "-n", 3]
    assert run(*walk, "--classes", "4,9", "--out", "walk.npz", "--seeds", 5, 6) == 0
    ends = [pixels("walk.npz")[i] for i in (0, 2, 3, 5)]
    with np.load("walk.npz") as file:
        assert file["labels"].tolist() == [4, 4, 4, 9, 9, 9]
    # The ends are what sample draws from either seed.
    for seed, columns in ((5, (0, 2)), (6, (1, 3))):
        assert sample(models, "-n", 2, "--steps", 4, "--classes", "4,9", "--seed", seed, "--out", "end.npz") == 0
        for i, column in enumerate(columns):
            assert np.abs(pixels("end.npz")[i].astype(int) - ends[column]).max() <= 1
    assert run(*walk) == 0
    with Image.open("interpolation.png") as picture:
        assert picture.size == ((3 * 9 + 1) * 8, (10 * 9 + 1) * 8)  # a row per class
    assert (
        run(*walk, "--rows", 3, "--classes", "none", "--out", "walk.npz", "--guidance", 2, "--spacing", "trailing") == 0
    )
    assert len(pixels("walk.npz")) == 9


def test_interpolate_between_images_returns_to_them(models):
    for i, name in enumerate("ab"):
        Image.fromarray(data.digits().images[i, 0].numpy() * 15).save(f"{name}.png")
    walk = [
        "interpolate",
        "--model",
        models["plain"],
        "--no-progress",
        "--overwrite",
        "--images",
        "a.png",
        "b.png",
        "-n",
        4,
    ]
    assert run(*walk, "--steps", 20, "--out", "walk.npz") == 0
    found = pixels("walk.npz").astype(int)
    assert found.shape == (4, 8, 8, 1)
    for row, name in ((0, "a.png"), (3, "b.png")):
        with Image.open(name) as image:
            assert np.abs(found[row, ..., 0] - np.array(image)).mean() < 12
    assert np.abs(found[0] - found[3]).mean() > 20
    walk[2] = models["digits"]
    assert run(*walk, "--steps", 4, "--classes", "1,2,3", "--out", "walk.npz") == 0
    assert len(pixels("walk.npz")) == 12


def test_only_walks_between_seeds_clip_x0(models, monkeypatch):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save("a.png")
    clips, ddim = [], interpolate.ddim

    def recorded(*arguments, clip, **keywords):
        clips.append(clip)
        return ddim(*arguments, clip=clip, **keywords)

    monkeypatch.setattr(interpolate, "ddim", recorded)
    walk = ["interpolate", "--model", models["digits"], "--no-progress", "--overwrite", "--steps", 1, "-n", 2]
    assert run(*walk) == 0
    assert run(*walk, "--images", "a.png", "a.png") == 0
    assert clips == [1.0, None]


def test_ddpm_walks_from_what_becomes_of_one_image_to_what_becomes_of_the_other(models):
    for i, name in enumerate("ab"):
        Image.fromarray(data.digits().images[i, 0].numpy() * 15).save(f"{name}.png")
    line = [
        "interpolate",
        "--method",
        "ddpm",
        "--no-progress",
        "--overwrite",
        "--model",
        models["digits"],
        "--depth",
        8,
    ]
    line += ["--steps", 10, "--out", "walk.npz"]
    assert run(*line, "-n", 3, "--images", "a.png", "b.png", "--classes", "4,9", "--seed", 3) == 0
    walks = pixels("walk.npz").astype(int)
    edit = ["edit", "--no-progress", "--overwrite", "--model", models["digits"], "--steps", 10, "--strength", 0.4]
    for column, name in ((0, "a.png"), (2, "b.png")):  # 8 of the model's 20 timesteps
        assert run(*edit, "--images", name, name, "--classes", "4,9", "--seed", 3, "--out", "end.npz") == 0
        assert np.abs(pixels("end.npz") - walks[[column, column + 3]]).max() <= 1
    with np.load("walk.npz") as file:
        assert file["labels"].tolist() == [4, 4, 4, 9, 9, 9]
    assert run(*line, "-n", 2) == 0  # between what two seeds draw
    assert len(pixels("walk.npz")) == 16
    between_seeds = pixels("walk.npz")
    assert run(*line, "-n", 2, "--seed", 1) == 0
    assert not np.array_equal(pixels("walk.npz"), between_seeds)


def test_interpolate_errors(models, capsys):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save("a.png")
    pathlib.Path("bad.png").write_text("no image")
    for name, flags, message in (
        ("digits", ["-n", 1], "argument -n/--frames: must be an integer of at least 2; got '1'"),
        ("digits", ["--images", "a.png", "bad.png"], "cannot read the image 'bad.png'"),
        ("digits", ["--images", "a.png", "no.png"], "there is no image 'no.png'"),
        ("digits", ["--images", "a.png", "a.png", "--rows", 2], "--rows must be left out with --images"),
        ("digits", ["--images", "a.png", "a.png", "--seeds", 1, 2], "not allowed with argument"),
        ("undropped", ["--images", "a.png", "a.png"], "--classes none needs a model trained with dropped labels"),
        ("digits", ["--depth", 5], "--depth must be left out with --method ddim; got 5"),
        ("digits", ["--seed", 5], "--seed must be left out with --method ddim; got 5"),
        ("digits", ["--method", "ddpm", "--depth", 21], "--depth must be at most the model's 20 timesteps; got 21"),
        ("undropped", ["--method", "ddpm"], "--classes none needs a model trained with dropped labels"),
        ("digits", ["--steps", 50], "steps must be an int in [1, 20]; got 50"),
        ("digits", ["--steps", 4, "--out", "no/where.png"], "out: cannot write"),
    ):
        assert message in fails(capsys, "interpolate", "--no-progress", "--model", models[name], *flags)
