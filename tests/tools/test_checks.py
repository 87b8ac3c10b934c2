"""Tests the checks of a build: what is read from their output, and that none of them stops its caller."""

import sys
import time

import pytest

from tools import checks, processes, sanitize

pytestmark = pytest.mark.slow
PLAIN = """
tests/ops/test_randn.py::test_shape[cuda-shape0] PASSED                  [ 10%]
tests/ops/test_randn.py::test_shape[triton-(1, 3)] FAILED                [ 20%]
tests/ops/test_randn.py::test_names PASSED                               [ 30%]
FAILED tests/ops/test_randn.py::test_shape[triton-(1, 3)] - assert 0
""".strip().splitlines()
DISTRIBUTED = """
tests/ops/test_randn.py::test_shape[cpu-avx2-a]
[gw1] [ 10%] PASSED tests/ops/test_randn.py::test_shape[cpu-avx2-a]
[gw0] [ 20%] SKIPPED tests/ops/test_randn.py::test_shape[bfloat16-cuda]
[gw0] [ 30%] ERROR tests/ops/test_randn.py::test_shape[cuda-b]
""".strip().splitlines()


def test_tests_are_counted_by_kernel():
    by_kernel, failed = checks.counts(PLAIN)
    assert by_kernel == {"cuda": {"passed": 1}, "no kernel": {"passed": 1}, "triton": {"failed": 1}}
    assert failed == ["tests/ops/test_randn.py::test_shape[triton-(1, 3)]"]
    by_kernel, failed = checks.counts(DISTRIBUTED)
    assert by_kernel == {"cpu-avx2": {"passed": 1}, "cuda": {"skipped": 1, "error": 1}}
    assert failed == ["tests/ops/test_randn.py::test_shape[cuda-b]"]


def test_a_suite_is_run_and_counted(tmp_path):
    suite = tmp_path / "test_one.py"
    suite.write_text("def test_good(): pass\ndef test_bad(): assert 0\n")
    (check,) = checks.op_tests(60.0, tmp_path, [str(suite)])
    assert check["outcome"] == "exit status 1"
    assert check["tail"]


def test_what_runs_too_long_is_stopped_with_its_children(tmp_path):
    started = time.monotonic()
    running = processes.start(["bash", "-c", "sleep 50 & sleep 50; echo done"], tmp_path / "log")
    assert running.finish(time.monotonic() + 0.3).startswith("stopped after 0 s")
    assert time.monotonic() - started < 10
    assert running.lines() == []


def test_a_program_that_is_not_there_is_an_outcome(tmp_path):
    assert "cannot be started" in processes.start(["/nowhere"], tmp_path / "log").finish(0.0)


@pytest.mark.parametrize(("first", "expected"), [("pass", ["ok"]), ("raise SystemExit(3)", ["exit status 3", "ok"])])
def test_the_build_falls_back_to_setup_py(first, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "BUILDS", {"pip install": ("-c", first), "setup.py build_ext": ("-c", "pass")})
    found = checks.build(30.0, tmp_path)
    assert [check["outcome"] for check in found] == expected
    assert found[-1]["libraries"] == sorted(path.name for path in (processes.ROOT / "dd_kernels").glob("_*.so"))


def test_a_build_without_the_cuda_kernels_says_why_where_there_is_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(
        checks, "BUILDS", {"pip install": ("-c", "print('cuda.cu(9): Error: what')" + 20 * "; print(1)")}
    )
    monkeypatch.setattr(checks.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(processes, "ROOT", tmp_path)
    (check,) = checks.build(30.0, tmp_path)
    assert (check["outcome"], check["tail"]) == ("ok", ["cuda.cu(9): Error: what", *["1"] * checks.TAIL])
    monkeypatch.setattr(checks.torch.cuda, "is_available", lambda: False)
    assert "tail" not in checks.build(30.0, tmp_path)[0]


FAKE = """#!{python}
import sys
tool, backend = sys.argv[2], sys.argv[-1]
if backend == "triton" and tool == "initcheck":
    print("not available: no triton"); sys.exit()
print("========= COMPUTE-SANITIZER")
print("sanitized steps on cuda: 8 cases")
if tool == "racecheck":
    print("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)")
elif tool == "memcheck":
    print("========= Invalid __global__ write of size 4 bytes")
    print("========= ERROR SUMMARY: 2 errors")
    sys.exit(9)
elif tool == "synccheck":
    import time; time.sleep(60)
else:
    print("========= ERROR SUMMARY: 0 errors")
"""


def test_the_four_tools_of_the_sanitizer(tmp_path):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(FAKE.format(python=sys.executable))
    tool.chmod(0o755)
    checked = {check["check"]: check for check in checks.sanitizer(2.5, tmp_path, str(tool))}
    assert len(checked) == 8
    assert checked["compute-sanitizer initcheck triton"]["outcome"] == "not measured: not available: no triton"
    found = {name: checked[f"compute-sanitizer {name} cuda"] for name in checks.SANITIZERS}
    assert (found["racecheck"]["outcome"], found["racecheck"]["errors"]) == ("ok", 0)
    assert (found["initcheck"]["errors"], found["initcheck"]["ops"]) == (0, 1)
    assert (found["memcheck"]["outcome"], found["memcheck"]["errors"]) == ("exit status 9", 2)
    assert found["memcheck"]["tail"][0] == "========= Invalid __global__ write of size 4 bytes"
    assert found["synccheck"]["outcome"].startswith("stopped after")
    assert found["synccheck"]["errors"] is None


def test_a_sanitizer_that_cannot_use_the_device_measures_nothing(tmp_path):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\necho '========= Error: Device not supported. Please refer to the manual.'; exit 1\n")
    tool.chmod(0o755)
    outcomes = {check["outcome"] for check in checks.sanitizer(10.0, tmp_path, str(tool))}
    assert outcomes == {"not measured: Error: Device not supported. Please refer to the manual."}


def test_no_sanitizer_is_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "compute_sanitizer", lambda: None)
    assert checks.sanitizer(1.0, tmp_path)[0]["outcome"].startswith("not measured: ")


def test_the_sanitized_script_runs_every_op(capsys, monkeypatch):
    monkeypatch.setattr(sanitize, "NORMS", sanitize.NORMS[:2])
    sanitize.main("reference", "cpu")
    sanitize.main("cuda", "cpu")
    *done, absent = capsys.readouterr().out.splitlines()
    assert done == [f"sanitized {name} on reference: 8 cases" for name in ("steps", "norms", "norms_of_pairs")]
    assert absent.startswith("not available: ")


def test_a_check_is_bad_where_it_failed_and_not_where_it_could_not_be_made():
    assert checks.is_bad({"check": "memcheck", "outcome": "exit status 9", "errors": 2})
    assert checks.is_bad({"check": "tests", "outcome": "stopped after 9 s", "failures": 1})
    assert not checks.is_bad({"check": "compiled ahead", "outcome": "in part: stopped after 9 s"})
    assert not checks.is_bad({"check": "racecheck", "outcome": "not measured: no device", "errors": None})
