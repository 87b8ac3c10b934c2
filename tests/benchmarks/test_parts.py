"""Tests workers: a plan that kills its process, or hangs, loses no other plan; and the parts that they run."""

import json
import sys
import threading
import types

import pytest
import torch

from benchmarks import parts, render, report
from benchmarks.harness import Case, Plan
from benchmarks.timing import UnusableError
from tools import checks, processes

pytestmark = pytest.mark.slow
WORKER = """
import json, sys, time
arguments = dict(zip(sys.argv[2::2], sys.argv[3::2]))
start, out = int(arguments["--start"]), open(arguments["--out"], "a")
def write(**line): out.write(json.dumps(line) + "\\n"); out.flush()
if start == 0: write(plans=[f"plan {i}" for i in range(6)])
for i in range(start, 6):
    if i == 1: print("illegal memory access"); sys.exit(134)
    if i == 2 and "--stream" not in sys.argv:
        write(plan=2, name="plan 2", not_measured="not captured: why", unusable=True); sys.exit(3)
    if i in (3, 4): write(plan=i, name=f"plan {i}", not_measured="illegal address", unusable=True); sys.exit(3)
    if i == 5: out.write('{"plan": 5, "na'); out.flush(); time.sleep(60)
    write(plan=i, name=f"plan {i}", row={"i": i})
"""


def test_a_worker_that_dies_or_hangs_loses_one_plan(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "GRACE", 0.5)
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    found = parts.measure_part("ops", 3.0, tmp_path, worker=(sys.executable, str(script)))
    assert found["rows"] == [{"i": 0}, {"i": 2}]
    reasons = {one["name"]: one["reason"] for one in found["not_measured"]}
    assert reasons["plan 1"] == "its process ended with status 134: illegal memory access"
    assert reasons["plan 3"] == reasons["plan 4"] == "illegal address"
    assert reasons["plan 5"].startswith("stopped after ")


def test_a_worker_that_cannot_start_is_reported(tmp_path):
    for command in (("/nowhere/python",), ("/bin/false",)):
        found = parts.measure_part("ops", 5.0, tmp_path, worker=command)
        assert found["rows"] == []
        assert found["not_measured"][0]["name"] == "ops"


def test_a_worker_writes_a_line_for_each_plan(tmp_path, monkeypatch):
    def measure(plan, target):
        if plan == "b":
            raise ValueError("no such kernel")
        if plan == "c":
            raise UnusableError("illegal address")
        return {"plan": plan}

    monkeypatch.setattr(parts, "measure", measure)
    monkeypatch.setattr(parts, "plans", lambda target, part: ["a", "b", "c", "d"])
    target = types.SimpleNamespace(clock=types.SimpleNamespace(usable=lambda: True))
    out = tmp_path / "out.jsonl"
    assert parts.work("ops", target, 0, 1e18, out) == parts.UNUSABLE
    assert parts.work("ops", target, 3, 1e18, out) == 0
    assert parts.work("ops", target, 3, 0.0, out) == 0
    names, a, b, c, d, late = [json.loads(line) for line in out.read_text().splitlines()]
    assert names == {"plans": ["a", "b", "c", "d"]}
    assert (a["row"], d["row"], b["not_measured"]) == ({"plan": "a"}, {"plan": "d"}, "ValueError: no such kernel")
    assert (c["unusable"], late["not_measured"]) == (True, parts.OVER)


def test_a_real_worker_ends_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "GRACE", 100.0)
    found = parts.measure_part("growth", 0.0, tmp_path)
    assert found["rows"] == []
    assert {one["reason"] for one in found["not_measured"]} == {parts.OVER}
    assert len(found["not_measured"]) > 5


def test_parts_hold_every_plan_once():
    target = types.SimpleNamespace(kind="cuda", device="cpu")
    files = {path.stem for path in (render.ROOT / "benchmarks").glob("bench_*.py")}
    assert set(parts.MODULES) == files
    measuring = [name for name, part in parts.PARTS.items() if not part.checks]
    plans = [str(plan) for plan in parts.plans(target, *measuring)]
    assert all(parts.plans(target, name) for name in measuring)
    assert len(plans) == len(set(plans))
    assert len(plans) == sum(len(parts.importlib.import_module(f"benchmarks.{m}").plans(target)) for m in files)
    assert parts.TOTAL["cuda"] == 480


def test_checks_run_at_once_and_one_that_breaks_stops_no_other(tmp_path, monkeypatch):
    together = threading.Barrier(3)

    def op_tests(seconds, folder):
        together.wait(20)
        return [{"check": "tests", "outcome": "ok"}]

    def sanitizer(seconds, folder):
        together.wait(20)
        raise OSError("no room")

    monkeypatch.setattr(checks, "op_tests", op_tests)
    monkeypatch.setattr(checks, "sanitizer", sanitizer)
    monkeypatch.setattr(report, "compiled_ahead", op_tests)
    first, second, third = report.side_by_side(1.0, tmp_path)
    assert first == third == {"check": "tests", "outcome": "ok"}
    assert second == {"check": "sanitizer", "outcome": "not measured: OSError: no room"}


def test_what_is_compiled_ahead_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "half_the_cores", lambda: 2)
    scripts = {"ops": "print('compiled a'); print('compiled b')", "models": "print('model: out of memory'); exit(7)"}
    start = processes.start

    def started(command, log, environment):
        assert command[1:4] == ["-m", "benchmarks.parts", "--compile"]
        return start([sys.executable, "-c", scripts[command[4]]], log, environment)

    monkeypatch.setattr(processes, "start", started)
    (check,) = report.compiled_ahead(30.0, tmp_path)
    assert check["plans"] == 4
    assert check["outcome"] == "in part: exit status 7, ok"
    assert check["tail"] == ["model: out of memory"]


def test_every_implementation_is_called_once_ahead(cpu_target, capsys):
    called = []

    def large(x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    peers = {"large": large, "peer": lambda x: called.append(("peer", x)), "absent": "not installed"}
    case = Case("op", "case", (1,), lambda x: called.append(("ours", x)), [(1,), (2,)], 8, peers)
    parts.compile_all([Plan("broken", lambda: 1 / 0), Plan("good", lambda: case)], cpu_target)
    assert called == [("ours", 1), ("peer", 1)]
    assert capsys.readouterr().out.splitlines() == ["broken: ZeroDivisionError: division by zero", "compiled good"]


def test_the_compiling_ahead_leaves_cores_and_memory_to_others(gpu_target, monkeypatch):
    taken, ran = {}, []
    monkeypatch.setattr("sys.argv", ["worker", "--compile", "models", "1", "2"])
    monkeypatch.setattr(parts.os, "nice", lambda n: taken.update(nice=n))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda f: taken.update(memory=f))
    monkeypatch.setattr(parts.machine, "DEVICE", "cuda")
    monkeypatch.setattr(parts.timing, "clock_of", lambda device, graphs: gpu_target.clock)
    monkeypatch.setattr(
        parts, "compile_all", lambda mine, target: ran.append((mine, target.clock.copies(1), target.kind))
    )
    with torch._inductor.config.patch(autotune_local_cache=True):  # restores the option, which monkeypatch would delete
        assert parts.main() == 0
    ((mine, copies, kind),) = ran
    assert [str(plan) for plan in mine] == [str(plan) for plan in parts.to_compile(gpu_target, "models")[1::2]]
    assert (copies, kind, taken) == (1, "cuda", {"nice": 10, "memory": parts.MEMORY / 2})


def test_a_device_that_is_lost_ends_the_compiling_ahead(cpu_target, monkeypatch, capsys):
    monkeypatch.setattr(cpu_target.clock, "usable", lambda: False)
    parts.compile_all([Plan("broken", lambda: 1 / 0), Plan("never", lambda: 1 / 0)], cpu_target)
    assert capsys.readouterr().out == "broken: ZeroDivisionError: division by zero\n"


def test_what_is_measured_is_compiled_ahead_but_for_what_tunes(gpu_target):
    models, others = ({str(plan) for plan in parts.to_compile(gpu_target, kind)} for kind in ("models", "ops"))
    assert not models & others
    assert any("reduce-overhead" in name for name in models)
    assert not any("max-autotune" in name for name in models)
    assert {name.split()[0] for name in others} == {
        *("reverse_step", "randn", "q_sample", "group_norm_silu", "sample", "training", "growth")
    }
