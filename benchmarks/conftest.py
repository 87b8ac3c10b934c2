"""One test per plan of a benchmark file, and one table of all records at the end of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from . import harness, machine, text, timing

RECORDS = pytest.StashKey[list[harness.Row]]()
TARGET = pytest.StashKey[harness.Target]()


def _target(config: pytest.Config) -> harness.Target:
    if TARGET not in config.stash:
        clock = timing.clock_of(machine.DEVICE)
        config.stash[TARGET] = harness.Target(machine.DEVICE, machine.DEVICE, clock)
    return config.stash[TARGET]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "plan" in metafunc.fixturenames:
        target = _target(metafunc.config)
        # What takes minutes to compile has its place in benchmarks.report.
        plans = [plan for plan in metafunc.module.plans(target) if not plan.slow]
        metafunc.parametrize("plan", plans, ids=str)


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest) -> Callable[[harness.Plan], harness.Row]:
    """Measures a plan once and keeps its record for the table; pytest-benchmark's own column is how long that took."""

    def run(plan: harness.Plan) -> harness.Row:
        target = _target(request.config)
        row = benchmark.pedantic(harness.measure, (plan, target), rounds=1)
        benchmark.extra_info["record"] = row
        request.config.stash.setdefault(RECORDS, []).append(row)
        return row

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash.get(RECORDS, [])
    if not rows:
        return
    terminalreporter.section("dd_kernels benchmarks: ratio = peer's time / ours, median of interleaved rounds")
    for device in sorted({f"{row['device']}, {row['isa']}, torch {row['torch']}" for row in rows}):
        terminalreporter.write_line(device)
    for line in text.aligned(text.cells(rows)):
        terminalreporter.write_line(line)
