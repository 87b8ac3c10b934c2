"""Prints one table of all benchmark records at the end of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from . import harness

RECORDS = pytest.StashKey[list[dict[str, Any]]]()


@pytest.fixture(params=harness.THREADS, ids=lambda n: f"{n}T")
def threads(request: pytest.FixtureRequest) -> int:
    """How many of torch's threads a case runs on."""
    return request.param


@pytest.fixture
def compare(benchmark: Any, threads: int, request: pytest.FixtureRequest) -> Callable[[harness.Case], dict[str, Any]]:
    """Measures a :class:`harness.Case` and keeps its record for the table."""

    def run(case: harness.Case) -> dict[str, Any]:
        row = harness.compare(case, threads, benchmark)
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
    for line in harness.table(rows):
        terminalreporter.write_line(line)
