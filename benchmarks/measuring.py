"""Runs a part's plans in processes of their own, so that no kernel takes the others with it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import processes
from .worker import OVER, UNUSABLE

GRACE = 5.0  # a plan that has started may end so much later than the part's time
WORKER = (sys.executable, "-m", "benchmarks.worker")


def _lines(out: Path) -> list[dict[str, Any]]:
    """What workers wrote; a line that one was killed in is left out."""
    found = []
    for line in out.read_text().splitlines() if out.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def _last_words(running: processes.Running, status: int | str) -> str:
    lines = [line for line in running.lines() if line.strip() and not line.startswith("USDT:")]
    words = f": {lines[-1].strip()[:200]}" if lines else ""
    return f"{status}{words}" if isinstance(status, str) else f"its process ended with status {status}{words}"


def _is_capture(line: dict[str, Any]) -> bool:
    return "captured" in str(line.get("not_measured"))


def measure(
    part: str, seconds: float, folder: Path, stream: bool = False, worker: Sequence[str] = WORKER
) -> dict[str, list[dict[str, Any]]]:
    """Rows and what was not measured, of all plans of a part, in their order.

    A worker that dies or hangs loses the plan it was at; another one goes on behind it. Where the capture of
    a graph took the device away, the next ones capture none, and start with that plan.
    """
    end = time.monotonic() + seconds
    done: dict[int, dict[str, Any]] = {}
    names: list[str] = []
    start = tries = 0
    while True:
        tries += 1
        out = folder / f"{part}.{tries}.jsonl"
        command = [*worker, part, "--start", str(start), "--seconds", f"{max(0.0, end - time.monotonic()):.1f}"]
        command += ["--out", str(out), *(["--stream"] if stream else [])]
        running = processes.start(command, folder / f"{part}.{tries}.log")
        status = running.finish(end + GRACE)
        lines = _lines(out)
        names = next((line["plans"] for line in lines if "plans" in line), names)
        done |= {line["plan"]: line for line in lines if "plan" in line}
        if not names:
            return {"rows": [], "not_measured": [{"name": part, "reason": _last_words(running, status)}]}
        uncaptured = [number for number, line in done.items() if line.get("unusable") and _is_capture(line)]
        again = bool(uncaptured) and not stream
        if again:
            stream = True
            for number in uncaptured:
                del done[number]
        at = next((number for number in range(len(names)) if number not in done), len(names))
        # Where it died without a word, the plan it was at is the first that has no line.
        if at < len(names) and not again and (status != UNUSABLE or at == start):
            done[at] = {"plan": at, "name": names[at], "not_measured": _last_words(running, status)}
            at += 1
        start = at
        if start >= len(names) or time.monotonic() > end:
            break
    missing = [done.get(i, {"name": name, "not_measured": OVER}) for i, name in enumerate(names)]
    return {
        "rows": [line["row"] for line in missing if "row" in line],
        "not_measured": [
            {"name": line["name"], "reason": line["not_measured"]} for line in missing if "not_measured" in line
        ],
    }
