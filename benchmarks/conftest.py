"""Makes a test of every plan of a benchmark file, and prints one table of all rows at the end of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from . import harness, machine, results, timing

ROWS = pytest.StashKey[list[harness.Row]]()
TARGET = pytest.StashKey[harness.Target]()


def _target(config: pytest.Config) -> harness.Target:
    """Returns where this run measures, the same for all its tests."""
    if TARGET not in config.stash:
        clock = timing.clock_of(machine.DEVICE)
        config.stash[TARGET] = harness.Target(machine.DEVICE, machine.DEVICE, clock)
    return config.stash[TARGET]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "plan" in metafunc.fixturenames:
        target = _target(metafunc.config)
        # What takes minutes to compile is measured by benchmarks.report.
        plans = [plan for plan in metafunc.module.plans(target) if plan.part != "compiled"]
        metafunc.parametrize("plan", plans, ids=str)


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest) -> Callable[[harness.Plan], harness.Row]:
    """Returns a function that measures a plan once and keeps its row for the table.

    The column of pytest-benchmark shows how long the measurement took.
    """

    def run(plan: harness.Plan) -> harness.Row:
        target = _target(request.config)
        row = benchmark.pedantic(harness.measure, (plan, target), rounds=1)
        benchmark.extra_info["row"] = row
        request.config.stash.setdefault(ROWS, []).append(row)
        return row

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash.get(ROWS, [])
    if not rows:
        return
    terminalreporter.section("dd_kernels benchmarks")
    terminalreporter.write_line(results.title(rows))
    for line in results.aligned(results.cells(rows)):
        terminalreporter.write_line(line)
