"""``evaluate --bits-per-dim``: its files, its options, every error in one line."""

import json
import sys

import numpy as np
import pytest
from commands import fails, run
from PIL import Image

from dd_kernels.apps import checkpoint, data
from dd_kernels.apps.evaluate import bits_per_dim
from dd_kernels.likelihood import Process


def measure(models, *flags, name="digits"):
    """Returns the JSON of the measurement."""
    line = ["evaluate", "--bits-per-dim", "--model", models[name], "-n", 5, "--no-progress", "--overwrite"]
    assert run(*line, "--out", "b.json", *flags) == 0
    with open("b.json", encoding="utf-8") as file:
        return json.load(file)


def test_the_command_equals_the_library(models, capsys):
    found = measure(models, "--seed", 3, "--plot", "terms.png")
    model, info = checkpoint.load_model(models["digits"])
    held_out = data.held_out("digits")
    process = Process(model, info.make_schedule(), "v")
    expected = bits_per_dim(process, held_out, n=5, labels=held_out.labels, seed=3)
    assert found["terms"] == expected.terms
    assert found["bits_per_dim"] == expected.bits_per_dim
    assert f"{expected.bits_per_dim:.4f} +- " in capsys.readouterr().out
    with Image.open("terms.png") as picture:
        assert picture.width > 400
    assert run("evaluate", "--bits-per-dim", "--model", models["digits"], "-n", 2, "--out", "both") == 0
    assert "measuring: 100%" in capsys.readouterr().err


def test_every_option_changes_the_figure(models):
    plain = measure(models)
    assert measure(models, "--batch-size", 2)["bits_per_dim"] == pytest.approx(plain["bits_per_dim"], rel=1e-6)
    np.savez("held.npz", images=np.random.default_rng(0).integers(0, 255, (6, 8, 8), dtype=np.uint8))
    changed = [
        measure(models, *flags)["bits_per_dim"]
        for flags in (["--seed", 1], ["-n", 6], ["--variance", "fixed_large"], ["--data", "held.npz"])
    ]
    changed += [measure(models, name=name)["bits_per_dim"] for name in ("plain", "learned", "undropped")]
    assert len({plain["bits_per_dim"], *changed}) == 8
    assert measure(models, name="learned")["settings"]["variance"] == "learned_range"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bits-per-dim", "--steps", "2"], "--steps must be left out with --bits-per-dim; got [2]"),
        (["--bits-per-dim", "--rows", "0"], "--etas must be left out with --bits-per-dim"),
        (["--bits-per-dim", "--spacing", "trailing"], "--spacing must be left out with --bits-per-dim"),
        (["--variance", "fixed_large"], "--variance must be left out without --bits-per-dim"),
        (["--bits-per-dim", "--guidance", "2"], "--guidance must be 1 with --bits-per-dim; got 2.0"),
        (["--bits-per-dim", "--plot", "p.jpg"], "--plot must name a .png; got 'p.jpg'"),
        (["--bits-per-dim", "--plot", "no/p.png"], "--plot: cannot write 'no/p.png'"),
        (["--bits-per-dim", "--plot", "there.png"], "--plot: 'there.png' is there already"),
        (["--bits-per-dim", "--variance", "learned_range"], "does not fit a model that does not learn its variance"),
        (["--bits-per-dim", "-n", "361"], "n must be in [2, 360], the held-out images there are; got 361"),
        (["--bits-per-dim", "--data", "no.npz"], "which is not there"),
        (["--bits-per-dim", "--data", "big.npz"], "--model must draw images of (1, 16, 16)"),
    ],
)
def test_errors(models, capsys, flags, message):
    np.savez("big.npz", images=np.zeros((2, 16, 16), np.uint8))
    Image.new("L", (2, 2)).save("there.png")
    assert message in fails(capsys, "evaluate", "--model", models["digits"], "--no-progress", *flags)


def test_errors_of_other_models(models, capsys):
    np.savez("held.npz", images=np.zeros((2, 8, 8), np.uint8))
    line = ["evaluate", "--bits-per-dim", "--no-progress", "--model"]
    message = "--variance fixed_small does not fit a model that learns its variance"
    assert message in fails(capsys, *line, models["learned"], "--variance", "fixed_small")
    message = "the held-out images must have labels of the model's 10 classes; got other images"
    assert message in fails(capsys, *line, models["undropped"], "--data", "held.npz")


def test_a_plot_without_matplotlib(models, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    line = ["evaluate", "--bits-per-dim", "--no-progress", "--model", models["digits"], "-n", 2, "--plot", "p.png"]
    assert "a plot needs matplotlib: pip install 'dd_kernels[plots]'" in fails(capsys, *line)
