"""Workers: a plan that takes its process with it, or hangs, costs no other; and the parts that they run."""

import json
import sys
import types

import pytest

from benchmarks import measuring, parts, render, worker
from benchmarks.timing import UnusableError

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
    monkeypatch.setattr(measuring, "GRACE", 0.5)
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    found = measuring.measure("ops", 3.0, tmp_path, worker=(sys.executable, str(script)))
    assert found["rows"] == [{"i": 0}, {"i": 2}]
    reasons = {one["name"]: one["reason"] for one in found["not_measured"]}
    assert reasons["plan 1"] == "its process ended with status 134: illegal memory access"
    assert reasons["plan 3"] == reasons["plan 4"] == "illegal address"
    assert reasons["plan 5"].startswith("stopped after ")


def test_a_worker_that_cannot_start_is_reported(tmp_path):
    for command in (("/nowhere/python",), ("/bin/false",)):
        found = measuring.measure("ops", 5.0, tmp_path, worker=command)
        assert found["rows"] == []
        assert found["not_measured"][0]["name"] == "ops"


def test_a_worker_writes_a_line_for_each_plan(tmp_path, monkeypatch):
    def measure(plan, target):
        if plan == "b":
            raise ValueError("no such kernel")
        if plan == "c":
            raise UnusableError("illegal address")
        return {"plan": plan}

    monkeypatch.setattr(worker, "measure", measure)
    monkeypatch.setattr(parts.Part, "plans", lambda self, target: ["a", "b", "c", "d"])
    target = types.SimpleNamespace(clock=types.SimpleNamespace(usable=lambda: True))
    out = tmp_path / "out.jsonl"
    assert worker.run("ops", target, 0, 1e18, out) == worker.UNUSABLE
    assert worker.run("ops", target, 3, 1e18, out) == 0
    assert worker.run("ops", target, 3, 0.0, out) == 0
    names, a, b, c, d, late = [json.loads(line) for line in out.read_text().splitlines()]
    assert names == {"plans": ["a", "b", "c", "d"]}
    assert (a["row"], d["row"], b["not_measured"]) == ({"plan": "a"}, {"plan": "d"}, "ValueError: no such kernel")
    assert (c["unusable"], late["not_measured"]) == (True, worker.OVER)


def test_a_real_worker_ends_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "GRACE", 100.0)
    found = measuring.measure("growth", 0.0, tmp_path)
    assert found["rows"] == []
    assert {one["reason"] for one in found["not_measured"]} == {worker.OVER}
    assert len(found["not_measured"]) > 5


def test_parts_hold_every_benchmark_once():
    target = types.SimpleNamespace(kind="cuda", device="cpu")
    files = {path.stem for path in (render.ROOT / "benchmarks").glob("bench_*.py")}
    assert {file for part in parts.PARTS.values() for file in part.files} == files
    plans = [str(plan) for part in parts.PARTS.values() if part.files for plan in part.plans(target)]
    assert len(plans) == len(set(plans))
    assert parts.TOTAL["cuda"] == 480
