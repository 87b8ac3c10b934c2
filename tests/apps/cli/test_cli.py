"""What all commands share: help, unknown commands, and errors that are one line."""

import os
import pathlib
import signal
import subprocess
import sys
import warnings

import pytest
import torch
from commands import fails, run, sample

from dd_kernels import backend as backends
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

    def full(handle, content):
        raise OSError(28, "No space left on device")

    flags = ["--model", models["digits"], "--no-progress", "-n", 1, "--steps", 1, "--seed", 1]
    assert "out: 'samples.png' is there already (--overwrite" in fails(capsys, "sample", *flags)
    monkeypatch.setattr(os, "write", full)
    assert "No space left on device: 'samples.png'" in fails(capsys, "sample", *flags, "--overwrite")


def test_ctrl_c_and_memory_are_one_line_each(models, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    def greedy(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate much")

    monkeypatch.setattr(cli.common, "sample", interrupted)
    assert sample(models) == 130
    assert capsys.readouterr().err == "dd_kernels sample: error: interrupted\n"
    monkeypatch.setattr(cli.interpolate, "sample", greedy)
    assert run("interpolate", "--model", models["digits"]) == 2
    assert "--batch-size is too large for the device's memory: CUDA out of memory. Tried" in capsys.readouterr().err


def test_signals_end_with_one_line_and_their_status(models, monkeypatch, capsys):
    for number, status in ((signal.SIGTERM, 143), (signal.SIGHUP, 129)):
        monkeypatch.setattr(cli.common, "sample", lambda *a, number=number, **k: signal.raise_signal(number))
        before = signal.getsignal(number)
        assert sample(models) == status
        assert capsys.readouterr().err == f"dd_kernels sample: error: ended by {number.name}\n"
        assert signal.getsignal(number) == before
        assert os.listdir() == []


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "the memory of this machine is too small"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "take more memory than there is"),
        (RecursionError("deep"), "deep"),
        (OverflowError("too large"), "too large"),
        (OSError(5, "Input/output error", "a.png"), "Input/output error: 'a.png'"),
        (OSError("odd"), "odd"),
    ],
)
def test_every_error_is_one_line(models, monkeypatch, capsys, error, message):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(cli.common, "sample", fail)
    assert sample(models) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_an_error_of_ours_is_not_hidden(models, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("a mistake of the program")

    monkeypatch.setattr(cli.common, "sample", fail)
    with pytest.raises(RuntimeError, match="a mistake"):
        sample(models)


def test_a_warning_is_one_line(models, monkeypatch, capsys):
    draw = cli.common.sample

    def warned(*arguments, **options):
        warnings.warn("some images\nare odd", stacklevel=1)
        return draw(*arguments, **options)

    monkeypatch.setattr(cli.common, "sample", warned)
    assert sample(models, "-n", 1, "--steps", 1) == 0
    assert capsys.readouterr().err == "dd_kernels sample: warning: some images are odd\n"


@pytest.mark.parametrize(("reader", "status"), [("true", 141), ("cat", 0)])
def test_a_reader_that_goes_away(models, reader, status):
    command = [sys.executable, "-c", "import sys; from dd_kernels.apps.cli import main; sys.exit(main())"]
    line = [*command, "sample", "--model", models["plain"], "-n", "1", "--steps", "1", "--no-progress"]
    script = '"$@" | { ' + reader + " >/dev/null; }; echo ${PIPESTATUS[0]}"
    done = subprocess.run(["bash", "-c", script, "bash", *line], capture_output=True, text=True, timeout=120)
    assert done.stdout.split()[-1] == str(status), done.stderr
    assert done.stderr == ""


def test_output_to_a_full_device(models):
    command = [sys.executable, "-m", "dd_kernels", "sample", "--model", models["plain"], "-n", "1", "--steps", "1"]
    with open("/dev/full", "w") as full:
        done = subprocess.run([*command, "--no-progress"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == "dd_kernels sample: error: No space left on device\n"


@pytest.mark.parametrize(
    ("name", "message"),
    [("DD_KERNELS_BACKEND", "must be one of auto, cpu"), ("DD_KERNELS_CPU_ISA", "must be baseline, avx2 or avx512")],
)
@pytest.mark.parametrize("command", ["sample", pytest.param("train", marks=pytest.mark.slow)])
def test_a_wrong_variable_is_named(models, command, name, message):
    """A wrong environment variable is an error of one line, before anything is written."""
    if name == "DD_KERNELS_CPU_ISA" and backends.unavailable("cpu") is not None:
        pytest.skip("the CPU library was not built")
    options = {
        "sample": ["--model", models["plain"], "-n", "1"],
        "train": ["--data", "digits", "--out", "m.safetensors"],
    }
    line = [sys.executable, "-m", "dd_kernels", command, *options[command], "--no-progress"]
    done = subprocess.run(line, env={**os.environ, name: "abacus"}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"dd_kernels {command}: error: {name} {message}")
    assert done.stderr.endswith("got 'abacus'\n")
    assert done.stderr.count("\n") == 1
    assert not [path.name for path in pathlib.Path().iterdir() if not path.name.endswith(".lock")]
