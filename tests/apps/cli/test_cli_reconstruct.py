"""``reconstruct``: the table is that of the library's two samplers, the error falls, and every error is one line."""

import re

import pytest
import torch
from commands import fails, pixels, run
from PIL import Image

import dd_kernels as dd
from dd_kernels.apps import checkpoint, data


def table(text):
    """Returns steps -> (error, standard error) of the printed table."""
    rows = re.findall(r"^\| +(\d+) \| +([\d.]+) \| +([\d.]+) \|$", text, re.MULTILINE)
    return {int(steps): (float(mean), float(error)) for steps, mean, error in rows}


def test_the_table_is_of_the_librarys_samplers(models, capsys):
    line = ["reconstruct", "--model", models["digits"], "-n", 4, "--steps", 5, 20, "--no-progress", "--overwrite"]
    assert run(*line, "--plot", "errors.png", "--out", "r.npz") == 0
    found = table(capsys.readouterr().out)
    model, info = checkpoint.load_model(models["digits"])
    images, labels = data.held_out("digits").batch(torch.arange(4))
    schedule, kwargs = info.make_schedule(), {"y": labels}
    for steps, (mean, error) in found.items():
        x_T = dd.sample(model, images, dd.ddim_inversion(schedule, steps, prediction="v"), model_kwargs=kwargs)
        x = dd.sample(model, x_T, dd.ddim(schedule, steps, prediction="v", clip=None), model_kwargs=kwargs)
        each = ((x - images) / 2).square().mean(dim=(1, 2, 3))
        assert (mean, error) == pytest.approx((float(each.mean()), float(each.std()) / 2), abs=2e-6)
    assert pixels("r.npz").shape == (8, 8, 8, 1)
    with Image.open("errors.png") as picture:
        assert picture.width > 400
    assert run(*line[:4], 1, *line[5:]) == 0  # of one image there is no standard error
    assert table(capsys.readouterr().out)[5][1] == 0


def test_the_bundled_models_error_falls_with_the_steps(capsys):
    assert run("reconstruct", "--model", "digits", "-n", 2, "--no-progress", "--steps", 5, 15, 45) == 0
    errors = [mean for mean, _ in table(capsys.readouterr().out).values()]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    with Image.open("reconstructed.png") as picture:
        assert picture.height == (4 * 9 + 1) * 8


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", 21], "steps must be an int in [1, 20]; got 21"),
        (["--plot", "p.jpg"], "--plot must name a .png; got 'p.jpg'"),
        (["--plot", "no/p.png"], "--plot: cannot write 'no/p.png'"),
        (["--out", "no/r.png"], "out: cannot write"),
        (["-n", 361], "-n must be at most 360"),
    ],
)
def test_errors(models, capsys, flags, message):
    assert message in fails(capsys, "reconstruct", "--no-progress", "--model", models["digits"], *flags)
