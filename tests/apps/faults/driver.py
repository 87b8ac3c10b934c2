"""Runs a command with a fault in its first file-system call, then in its second, and so on, until it meets none.

The library made from ``faults.c`` is preloaded. Each run is a fork of this process, in a fresh copy of a folder. After
it the folder must hold what was there before or what the command writes, never a third state; a run that fails must say
so in one line; and a run after a killed one must leave nothing behind. Prints the counts as JSON.
"""

import ctypes
import json
import os
import pathlib
import re
import shutil
import signal
import sys
import tempfile
from dataclasses import dataclass, field

import sklearn.datasets  # noqa: F401 - what a command imports is imported before the fork: a run then takes 0.1 s
import torch
import torch._dynamo
from known_judge import KnownJudge

from dd_kernels.apps import checkpoint, cli, data
from dd_kernels.apps.cli import evaluate
from dd_kernels.nn import UNet

KINDS = {"error": 1, "disk full": 2, "short": 3, "kill": 4}
TINY = {"channels": [8, 16], "num_heads": 2, "num_groups": 4}
SMALL = ["--set", "channels=[8,16]", "num_heads=2", "num_groups=4"]
TRAIN = ["train", "--out", "m.safetensors", "--no-progress", "--sample-every", "0"]
SAMPLE = ["sample", "--model", "m.safetensors", "--no-progress", "-n", "3", "--steps", "1"]
EVALUATE = ["evaluate", "--model", "m.safetensors", "--no-progress", "-n", "2", "--steps", "1", "--etas", "0"]
FAULTS = ctypes.CDLL(os.environ["LD_PRELOAD"])


@dataclass(frozen=True)
class Case:
    """A command, the commands that make the folder before it, and the one that follows a kill."""

    command: list[str]
    before: list[list[str]] = field(default_factory=list)
    again: list[str] = field(default_factory=list)


CASES = {
    "write a model": Case(["write a model"]),
    "save": Case(
        [*TRAIN, "--resume", "--steps", "3"],
        [
            [*TRAIN, "--data", "digits", "--num-timesteps", "4", "--batch-size", "4", "--steps", "2", *SMALL],
        ],
    ),
    "resume a finished run": Case(
        [*TRAIN, "--resume"],
        [
            [*TRAIN, "--data", "digits", "--num-timesteps", "4", "--batch-size", "4", "--steps", "2", *SMALL],
        ],
    ),
    "sample to a folder": Case([*SAMPLE, "--out", "deep/folder"], again=["--overwrite"]),
    "sample over a folder": Case(
        [*SAMPLE, "--out", "full", "--seed", "1", "--overwrite"], [[*SAMPLE, "--out", "full", "-n", "4"], ["add files"]]
    ),
    "sample to a grid": Case([*SAMPLE, "--out", "s.png", "--seed", "1", "--overwrite"], [[*SAMPLE, "--out", "s.png"]]),
    "sample to a link": Case([*SAMPLE, "--out", "l.npz", "--seed", "1", "--overwrite"], [[*SAMPLE, "--out", "l.npz"]]),
    "evaluate": Case(
        [*EVALUATE, "--out", "t.json", "--seed", "1", "--overwrite"],
        [[*EVALUATE, "--out", "t.json"]],
    ),
    "evaluate to a folder": Case(
        [*EVALUATE, "--out", "t", "--seed", "1", "--overwrite"],
        [[*EVALUATE, "--out", "t"]],
    ),
}


def model_file(path, seed=0):
    torch.manual_seed(seed)
    model = UNet.from_config("digits", **TINY)
    classes = tuple("0123456789")
    checkpoint.save_model(path, model.state_dict(), checkpoint.ModelInfo(model.config, "linear", 8, "v", classes, {}))


def state(folder):
    """Returns every file by its name, temporary ones left out; of a JSON evaluation whether it is whole."""
    found = {}
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden:
            content = path.read_bytes()
            if path.suffix == ".json":  # an evaluation's times differ from run to run
                content = {**json.loads(content), "run": None, "cells": None}
            elif path.suffix == ".md":
                content = re.findall(r"seed \d+", content.decode())
            found[str(path.relative_to(folder))] = content
    return found


def run(command):
    """Runs a command of the command line, puts files of the user's into its folder, or writes a model.

    Returns the exit status.
    """
    if command == ["add files"]:
        pathlib.Path("full/own").mkdir()
        pathlib.Path("full/own/notes.txt").write_text("kept")
        return 0
    if command != ["write a model"]:
        return cli.main(command)
    try:
        model_file("m.safetensors", seed=1)
    except OSError as error:
        print(f"dd_kernels: error: {error}", file=sys.stderr)
        return 2
    return 0


def child(folder, command, at=0, kind=0, log=None):
    """Runs ``command`` in a fork; returns (exit status or -signal, calls seen)."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        os.chdir(folder)
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        FAULTS.fault_arm(os.fsencode(str(folder)), at, kind)
        try:
            status = run(command)
        except SystemExit as error:
            status = error.code
        except BaseException:
            import traceback

            traceback.print_exc()
            status = 99
        seen = FAULTS.fault_count()
        FAULTS.fault_arm(b"", 0, 0)
        os.write(writer, str(seen).encode())
        sys.stderr.flush()
        os._exit(status)
    os.close(writer)
    _, status = os.waitpid(process, 0)
    seen = os.read(reader, 20)
    os.close(reader)
    return os.waitstatus_to_exitcode(status), int(seen or -1)


def prepare(case, root):
    """Makes the folders before and after the command; returns the folder before, and both states."""
    before, after = root / "before", root / "after"
    before.mkdir()
    if "train" not in case.command:
        model_file(before / "m.safetensors")
    if "l.npz" in case.command:
        (before / "target").mkdir()
        (before / "l.npz").symlink_to("target/l.npz")
    with tempfile.TemporaryFile() as log:
        for command in case.before:
            assert child(before, command, log=log)[0] == 0
        shutil.copytree(before, after, symlinks=True)
        assert child(after, case.command, log=log)[0] == 0
    states = state(before), state(after)
    return before, states


def check(case, folder, states, status, text, kind):
    """Returns "before" or "after": which of the two states the folder is in.

    The sample grid is drawn after the model was saved, so it may still be missing or old in the state after.
    """
    found = state(folder)
    if found.get("m.samples.png") == states[0].get("m.samples.png") and "m.samples.png" in found and status != 0:
        found["m.samples.png"] = states[found["m.safetensors"] == states[1]["m.safetensors"]]["m.samples.png"]
    assert found in states, (sorted(found), status, text)
    assert "Traceback" not in text, text
    if kind != "kill":
        assert status in (0, 2), (status, text, kind)
        errors = [line for line in text.splitlines() if line.startswith("dd_kernels") and ": error: " in line]
        assert len(errors) == (status == 2), text
        assert status == 2 or found == states[1] or states[0] == states[1], text
        assert kind == "error" or not list(folder.rglob(".*.part")), sorted(folder.rglob(".*"))
    return "after" if found == states[1] else "before"


def run_case(name, case):
    """Returns the counts of a case, by the kind of the fault."""
    counts = {}
    with tempfile.TemporaryDirectory() as place:
        root = pathlib.Path(place).resolve()
        before, states = prepare(case, root)
        folder = root / "work"
        for kind, code in KINDS.items():
            seen = counts[kind] = {"calls": 0, "before": 0, "after": 0}
            for at in range(100_000):
                shutil.copytree(before, folder, symlinks=True)
                with tempfile.TemporaryFile() as log:
                    status, calls = child(folder, case.command, at, code, log)
                    log.seek(0)
                    text = log.read().decode()
                met = status == -signal.SIGKILL if kind == "kill" else calls > at
                if met:
                    seen["calls"] += 1
                    seen[check(case, folder, states, status, text, kind)] += 1
                if kind == "kill" and met:
                    run_again(case, folder, states)
                shutil.rmtree(folder)
                if not met:
                    break
    return counts


def run_again(case, folder, states):
    """Runs the command after a kill: it succeeds, and nothing of the dead run stays."""
    with tempfile.TemporaryFile() as log:
        status, _ = child(folder, [*case.command, *case.again], log=log)
        log.seek(0)
        assert status == 0, log.read().decode()
    assert state(folder) == states[1]
    assert [p for p in folder.rglob(".*") if p.name != ".m.safetensors.lock"] == [], sorted(folder.rglob(".*"))


def main():
    torch.set_num_threads(1)
    evaluate.Judge = KnownJudge
    digits = {split: data.digits(split) for split in ("train", "test")}
    for module in (data, data.sources):
        module.digits = lambda split="train": digits[split]
    names = sys.argv[1:] or list(CASES)
    print(json.dumps({name: run_case(name, CASES[name]) for name in names}))


if __name__ == "__main__":
    main()
