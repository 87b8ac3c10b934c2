"""What all commands share: help, unknown commands, and errors that are one line."""

import pytest
import torch
from commands import fails, run, sample
from PIL import Image

from dd_kernels.apps import cli


def test_without_a_command_or_with_an_unknown_one(capsys):
    assert "the following arguments are required" in fails(capsys)
    assert "invalid choice: 'paint'" in fails(capsys, "paint")
    with pytest.raises(SystemExit) as error:
        run("--help")
    assert error.value.code == 0
    for command in cli.COMMANDS:
        with pytest.raises(SystemExit) as error:
            run(command, "--help")
        assert error.value.code == 0


def test_a_failing_write_keeps_the_old_picture(models, monkeypatch, capsys):
    assert sample(models, "-n", 1, "--steps", 1) == 0

    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    flags = ["--model", models["digits"], "--no-progress", "-n", 1, "--steps", 1, "--seed", 1]
    assert "No space left on device" in fails(capsys, "sample", *flags)


def test_ctrl_c_and_memory_are_one_line_each(models, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    def greedy(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate much")

    monkeypatch.setattr(cli.sample, "sample", interrupted)
    assert sample(models) == 130
    assert capsys.readouterr().err == "dd_kernels sample: error: interrupted\n"
    monkeypatch.setattr(cli.sample, "sample", greedy)
    assert sample(models) == 2
    assert "--batch-size is too large for the device's memory: CUDA out of memory. Tried" in capsys.readouterr().err
