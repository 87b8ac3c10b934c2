"""``sample --shard-size`` and ``verify``: resumed, refused and checked, every error in one line."""

import errno
import os
import pathlib

import numpy as np
import pytest
import torch
from commands import fails, pixels, run, sample

from dd_kernels.apps.cli import common
from dd_kernels.apps.shards import MANIFEST

OPTIONS = ["-n", "10", "--steps", "3", "--first-sample", "2", "--seed", "1"]


def shards(models, *arguments):
    return run("sample", "--model", models["digits"], "--no-progress", *OPTIONS, "--shard-size", "4", *arguments)


def contents(folder):
    files = pathlib.Path(folder).rglob("*")
    return {str(file): file.read_bytes() for file in files if file.is_file() and not file.name.startswith(".")}


def drawn(folder="out"):
    files = sorted(pathlib.Path(folder).glob("*.npz"))
    return np.concatenate([pixels(file) for file in files])


def test_a_bundled_model_by_its_name():
    line = ("sample", "--model", "digits", "--no-progress", "-n", "2", "--steps", "1", "--shard-size", "1")
    assert run(*line, "--out", "out") == 0
    assert len(drawn()) == 2


def test_shards_hold_what_is_drawn_in_one_piece(models, capsys):
    assert shards(models, "--out", "out") == 0
    assert "out: 10 images in 3 shards, 10 of them drawn now in" in capsys.readouterr().out
    assert sample(models, *OPTIONS, "--out", "one.npz") == 0
    assert np.abs(drawn().astype(int) - pixels("one.npz")).max() <= 1  # batches of other sizes round otherwise
    assert run("verify", "out") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "out: 3 of 3 shards are whole, 10 images"


@pytest.mark.parametrize("form", ["npz", "tar", "png"])
def test_the_same_command_draws_what_is_missing_to_the_same_bytes(models, form, capsys):
    arguments = ["--out", "out", "--shard-format", form]
    assert shards(models, *arguments) == 0
    before = contents("out")
    victims = sorted(p for p in pathlib.Path("out").iterdir() if p.name != MANIFEST and p.name[0] != ".")
    file = next(victims[1].iterdir()) if form == "png" else victims[1]
    file.write_bytes(file.read_bytes()[:-1])
    assert run("verify", "out") == 1
    text = capsys.readouterr().out
    assert f"{victims[1].name} is missing or altered\nout: 2 of 3 shards are whole" in text
    assert shards(models, *arguments) == 0
    captured = capsys.readouterr()
    assert f"shards missing or altered, drawn again: 1 ({victims[1].name})" in captured.err
    assert "4 of them drawn now" in captured.out
    assert contents("out") == before


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(models, monkeypatch, capsys):
    assert shards(models, "--out", "straight") == 0
    write, calls = os.write, []

    def full(handle, content):
        calls.append(len(content))
        if len(calls) == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(handle, content)

    monkeypatch.setattr(os, "write", full)
    capsys.readouterr()
    assert shards(models, "--out", "out") == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert "No space left on device" in error[0]
    assert run("verify", "out") == 1
    assert "is not drawn yet" in capsys.readouterr().out
    assert not list(pathlib.Path("out").glob(".*.part"))
    assert shards(models, "--out", "out") == 0
    assert [c for _, c in sorted(contents("out").items())] == [c for _, c in sorted(contents("straight").items())]


def test_another_job_is_refused(models, capsys):
    assert shards(models, "--out", "out") == 0
    model = ["sample", "--model", models["digits"], "--no-progress", *OPTIONS, "--out", "out", "--shard-size", "4"]
    assert "eta is None there and 0.5 here" in fails(capsys, *model, "--eta", "0.5")
    assert "guidance is 1.0 there and 2.0 here" in fails(capsys, *model, "--guidance", "2")
    assert "seed is 1 there and 5 here" in fails(capsys, *model, "--seed", "5")
    model[2] = models["undropped"]
    assert "model is '" in fails(capsys, *model)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--out", "out", "--columns", "3"], "--columns must be left out with shards"),
        (["--out", "out", "--overwrite"], "--overwrite must be left out with shards"),
        (["--out", "out.npz"], "--out must be a folder"),
        (["--out", "file"], "--out must be a folder"),
        (["--out", "full"], f"--out: the folder 'full' holds files already, and no {MANIFEST}"),
    ],
)
def test_what_shards_have_no_use_for_is_refused(models, capsys, arguments, error):
    pathlib.Path("file").write_text("")
    pathlib.Path("full").mkdir()
    pathlib.Path("full", "a.txt").write_text("")
    model = ["sample", "--model", models["digits"], "--no-progress", "--shard-size", "4"]
    assert error in fails(capsys, *model, *arguments)


def test_a_format_without_shards_is_refused(models, capsys):
    line = fails(capsys, "sample", "--model", models["digits"], "--shard-format", "tar")
    assert "--shard-format needs --shard-size; got tar" in line


def test_verify_without_a_manifest(capsys):
    assert "there is no manifest" in fails(capsys, "verify", ".")


def test_batches_are_halved_where_memory_is_short(models, monkeypatch, capsys):
    draw, sizes = common.sample, []

    def short(*arguments, batch_size, **options):
        sizes.append(batch_size)
        if batch_size > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return draw(*arguments, batch_size=batch_size, **options)

    monkeypatch.setattr(common, "sample", short)
    assert shards(models, "--out", "out", "--batch-size", "12") == 0
    assert sizes == [12, 6, 3, 3, 3]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("warning: ")[1] for line in lines] == [
        f"the device's memory is too small, --batch-size is now {size}" for size in (6, 3)
    ]
    sizes.clear()
    assert sample(models, "-n", 4, "--steps", 2, "--batch-size", "4", "--out", "a.npz") == 0
    assert sizes == [4, 2]


def test_one_image_that_is_too_large_is_one_line(models, monkeypatch, capsys):
    def none(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(common, "sample", none)
    assert sample(models, "-n", 4, "--batch-size", "2", "--out", "a.npz") == 2
    assert "one image is too large for the device's memory" in capsys.readouterr().err.splitlines()[-1]
