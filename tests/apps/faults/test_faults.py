"""Faults in every file-system call: after each a folder holds the state before or after, never a third."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
KINDS = ("error", "disk full", "short", "kill")
CASES = (
    "save",
    "resume a finished run",
    "sample to a folder",
    "sample over a folder",
    "sample to a grid",
    "sample to a link",
    "evaluate",
    "evaluate to a folder",
)
compiler = shutil.which("cc") or shutil.which("gcc")
pytestmark = pytest.mark.skipif(sys.platform != "linux" or compiler is None, reason="needs Linux and a C compiler")


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """The library that counts the calls and injects the faults."""
    path = tmp_path_factory.mktemp("faults") / "faults.so"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", path, HERE / "faults.c", "-ldl"], check=True)
    return path


def inject(library, case):
    root = HERE.parents[2]
    environment = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": f"{root}:{HERE.parent / 'cli'}"}
    command = [sys.executable, str(HERE / "driver.py"), case]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)[case]


def check(counts, least):
    print(counts)
    assert set(counts) == set(KINDS)
    for kind in KINDS:
        assert counts[kind]["calls"] >= least
        assert counts[kind]["before"] + counts[kind]["after"] == counts[kind]["calls"]
    # A short write is continued, so every run ends with the new state; the others have both states.
    assert counts["short"]["before"] == 0


@pytest.mark.slow
def test_faults_in_the_writing_of_a_model(library):
    counts = inject(library, "write a model")
    check(counts, 15)
    assert all(counts[kind][state] for kind in ("error", "disk full", "kill") for state in ("before", "after"))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_faults_in_a_command(library, case):
    check(inject(library, case), 40)
