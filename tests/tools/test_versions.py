"""Tests which versions are chosen, what is read from pytest, and that environments and checks are run."""

import subprocess
import sys
import types
from pathlib import Path

import pytest

from tools import versions
from tools.versions import Environment, Result

PRINTED = """
tests/ops/test_a.py ..F
SKIPPED [3] tests/ops/test_a.py:7: a CUDA graph needs a CUDA device
SKIPPED [2] tests/ops/test_b.py:9: a CUDA graph needs a CUDA device
FAILED tests/ops/test_a.py::test_x[triton] - assert 0
ERROR tests/ops/test_c.py
=== 2 failed, 1 passed, 5 skipped in 0.10s ===
""".splitlines()


def test_the_oldest_versions_are_those_of_pyproject():
    for name in versions.CHECKED:
        assert versions.newest_of_each_minor(versions.claimed(name).split(), "0.1") == [versions.claimed(name)]
    with pytest.raises(ValueError, match="must require one version nothing"):
        versions.claimed("nothing")


def test_a_minor_version_is_its_newest_patch_from_the_oldest_on():
    offered = ["3.10.0", "3.9.0", "3.6.1", "3.6.0", "3.5.1", "3.9.2"]
    assert versions.newest_of_each_minor(offered, "3.6") == ["3.6.1", "3.9.2", "3.10.0"]


def test_the_matrix_has_every_triton_and_both_ends_of_the_others(monkeypatch):
    offered = {"torch": ["2.9.0", "2.10.0", "2.11.0", "2.14.1"], "triton": ["3.5.0", "3.6.0", "3.7.1", "3.8.0"]}
    offered["diffusers"] = ["0.40.0", "0.41.0", "0.42.1"]
    monkeypatch.setattr(versions, "offered", offered.get)
    monkeypatch.setattr(versions, "claimed", {"torch": "2.10", "triton": "3.6", "diffusers": "0.40"}.get)
    small = ["diffusers 0.40.0", "diffusers 0.42.1", "triton 3.6.0", "triton 3.7.1", "triton 3.8.0"]
    assert [str(one) for one in versions.matrix(small=True)] == small
    assert [str(one) for one in versions.matrix(small=False)] == [*small, "torch 2.10.0", "torch 2.14.1"]


@pytest.mark.parametrize(
    ("printed", "expected"), [("Available versions: 1.10, 1.9, 2.0rc1\n", ["1.9", "1.10"]), ("", 0)]
)
def test_released_versions_are_read_from_pip(printed, expected, monkeypatch):
    done = types.SimpleNamespace(stdout=printed)
    monkeypatch.setattr(subprocess, "run", lambda command, **options: done)
    if expected:
        assert versions.offered("triton") == expected
    else:
        with pytest.raises(ValueError, match="pip index versions triton lists no versions"):
            versions.offered("triton")


def test_failures_and_reasons_are_read_from_pytest():
    failures = ("tests/ops/test_a.py::test_x[triton] - assert 0", "tests/ops/test_c.py")
    result = versions.read(PRINTED)
    assert result == Result("2 failed, 1 passed, 5 skipped in 0.10s", failures, {"a CUDA graph needs a CUDA device": 5})
    assert versions.described(result)[-1] == "      skipped 5: a CUDA graph needs a CUDA device"
    many = Result("", ("x",) * (versions.SHOWN + 3), {})
    assert versions.described(many)[-1] == "      and 3 more failed"


def test_every_check_names_tests_that_exist():
    for arguments in (*versions.CHECKS.values(), *versions.QUICK.values()):
        for argument in (one for one in arguments if one.startswith("tests")):
            path, _, test = argument.partition("::")
            assert (versions.ROOT / path).exists()
            assert test in (versions.ROOT / path).read_text() if test else True
    assert set(versions.QUICK) < set(versions.CHECKS)
    assert {name for names in versions.CHECKED.values() for name in names} <= set(versions.CHECKS)


def test_an_environment_sees_the_running_one_behind_its_own(tmp_path, monkeypatch):
    commands, run = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **options: commands.append(command))
    python = versions.make(Environment("triton", "3.6.2"), tmp_path / "environment")
    assert commands[0][-2:] == ["triton==3.6.2", "numpy<2.4"]
    done = run([str(python), "-c", "import torch, sys; print(sys.prefix)"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / "environment")
    versions.make(Environment("torch", "2.10.0"), tmp_path / "torch")
    assert {"torch==2.10.0", "numpy<2.4", "setuptools"} <= set(commands[1])
    assert "pytest>=8" in commands[1]
    assert not list((tmp_path / "torch").rglob("running.pth"))


@pytest.mark.slow
def test_a_check_is_run_and_one_that_fails_is_the_outcome(tmp_path, monkeypatch, capsys):
    (tmp_path / "test_one.py").write_text("def test_a(): pass\ndef test_b(): assert 0\n")
    checks = {"good": (f"{tmp_path}/test_one.py::test_a",), "bad": (str(tmp_path / "test_one.py"),)}
    monkeypatch.setattr(versions, "CHECKS", checks)
    monkeypatch.setattr(versions, "CHECKED", {"triton": ("good",), "diffusers": ("bad",)})
    monkeypatch.setattr(versions, "make", lambda environment, home: home.mkdir() or Path(sys.executable))
    assert versions.run([Environment("triton", "3.6.0")], tmp_path, 60.0)
    assert not versions.run([Environment("diffusers", "0.40.0")], tmp_path, 60.0)
    good, bad = capsys.readouterr().out.split("== diffusers 0.40.0")
    assert "good: 1 passed" in good
    assert "bad: 1 failed, 1 passed" in bad
    assert "failed: " in bad
    assert "test_one.py::test_b" in bad
    monkeypatch.setattr(versions, "QUICK", {"good": checks["bad"]})
    assert not versions.run([Environment("triton", "3.7.0")], tmp_path, 60.0, quick=True)
    # Quick runs skip every check of diffusers.
    assert versions.run([Environment("diffusers", "0.40.1")], tmp_path, 60.0, quick=True)


def test_what_cannot_be_installed_is_a_failure(tmp_path, monkeypatch, capsys):
    def make(environment, home):
        raise subprocess.CalledProcessError(1, "pip")

    monkeypatch.setattr(versions, "make", make)
    assert not versions.run([Environment("triton", "9.9")], tmp_path, 1.0)
    assert "cannot be installed: exit status 1" in capsys.readouterr().out


def test_the_command_line(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(
        versions, "run", lambda wanted, folder, seconds, quick: seen.append([str(e) for e in wanted]) or True
    )
    monkeypatch.setattr(
        versions, "matrix", lambda small: [Environment("triton", "3.6.0"), Environment("torch", "2.10.0")]
    )
    for arguments in (["--small"], ["--only", "triton"], ["--only", "triton=3.7.0"]):
        monkeypatch.setattr("sys.argv", ["versions", *arguments])
        assert versions.main() == 0
    assert seen == [["triton 3.6.0", "torch 2.10.0"], ["triton 3.6.0"], ["triton 3.7.0"]]
    assert "installed: torch 2." in capsys.readouterr().out
    monkeypatch.setattr(
        versions.importlib.metadata, "version", {"triton": "3.6.0", "torch": "2.13.0", "diffusers": "1"}.get
    )
    monkeypatch.setattr("sys.argv", ["versions", "--quick"])
    assert versions.main() == 0
    assert seen[-1] == ["torch 2.10.0"]
    monkeypatch.setattr("sys.argv", ["versions", "--only", "numpy"])
    with pytest.raises(SystemExit):
        versions.main()
    assert "--only must name one of torch, triton, diffusers; got 'numpy'" in capsys.readouterr().err
