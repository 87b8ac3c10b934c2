"""Runs commands as a user types them, with tiny models, and checks what they fail with."""

import pathlib

import numpy as np

from dd_kernels.apps import cli

TINY = ["--set", "channels=[8,16]", "num_heads=2", "num_groups=4"]
SMALL = ["--num-timesteps", "4", "--batch-size", "4", "--steps", "3", "--no-progress", *TINY]


def run(*arguments):
    return cli.main([str(a) for a in arguments])


def fails(capsys, *arguments):
    """Returns the one line that a command fails with; whether argparse or the command found the error."""
    before = {p: p.read_bytes() for p in pathlib.Path().rglob("*") if p.is_file()}
    capsys.readouterr()
    try:
        status = run(*arguments)
    except SystemExit as error:
        status = error.code
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert {p: p.read_bytes() for p in pathlib.Path().rglob("*") if p.is_file()} == before
    lines = captured.err.splitlines()
    assert len(lines) == 1
    assert "error: " in lines[0]
    return lines[0]


def sample(models, *arguments, name="digits"):
    """Runs the command ``sample``, which may overwrite what an earlier call has drawn."""
    return run("sample", "--model", models[name], "--no-progress", "--overwrite", *arguments)


def pixels(path):
    with np.load(path) as file:
        return file["images"]
