"""Reads, writes, compares and formats results, which lie in benchmarks/results/<device>.json.

A file describes the "machine" and holds, by name, the "parts" that have run: when, on which commit, for how long,
their "rows" (see :func:`benchmarks.harness.record`), what was "not_measured" and why, and the "checks" of a part
that checks. A part that runs again replaces its last run.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RATIO = "ratio: a peer's time over ours, the median (and quartiles) of paired ratios of interleaved runs"
HEADS = ("op", "case", "shape", "dtype", "layout", "threads", "us", "ns/elt", "MB", "GB/s", "% copy", "% bandwidth")
FOLDER = Path(__file__).parent / "results"
WHOLE = ("sample", "training", "growth", "model")  # ops whose rows are whole steps
Row = dict[str, Any]
Results = dict[str, Any]


def stem_of(device: str) -> str:
    """Returns the stem of the names of a device's files."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")


def file_of(device: str, folder: Path | None = None) -> Path:
    """Returns the file of a device's results."""
    return (folder or FOLDER) / f"{stem_of(device)}.json"


def save(results: Results, folder: Path | None = None) -> Path:
    """Writes the results of one device and returns the file. A run that is killed leaves the old file whole."""
    file = file_of(results["machine"]["device"], folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_suffix(".new")
    new.write_text(json.dumps(results, indent=1) + "\n")
    new.replace(file)
    return file


def load(path: Path) -> Results:
    """Returns the results in a file."""
    found: Results = json.loads(path.read_text())
    return found


def digest_of(results: Results) -> str:
    """Returns a hash of the figures; a plot carries the hash of the figures that it shows."""
    return hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest()


def rows(results: Results, *parts: str) -> list[Row]:
    """Returns the rows of the parts named, or of all."""
    return [row for name, part in results["parts"].items() if not parts or name in parts for row in part["rows"]]


def ops(results: Results) -> list[Row]:
    """Returns the rows of single ops."""
    return [row for row in rows(results) if row["op"] not in WHOLE]


def of_op(results: Results, op: str) -> list[Row]:
    """Returns the rows of one op."""
    return [row for row in rows(results) if row["op"] == op]


def ratios(row: Row) -> dict[str, float]:
    """Returns how many times longer than ours each peer takes that was measured.

    A row of a whole model is timed beside diffusers: there it returns how many times faster than that each one is.
    """
    if row["op"] == "model":
        return {name: 1 / peer["ratio"] for name, peer in row["peers"].items() if "ratio" in peer}
    return {name: peer["ratio"] for name, peer in row["peers"].items() if "ratio" in peer}


def _name(row: Row) -> tuple[object, ...]:
    """Returns what identifies a row between runs."""
    value = [f"{row['case']} {row['value']}"] if "value" in row else [row["case"]]
    steps = [f"{row['steps']} steps"] if "steps" in row else []
    return (row["op"], *value, *steps, *row["shape"], row["dtype"], row["layout"], row["threads"])


def slower(before: Sequence[Row], after: Sequence[Row], allowed: float = 0.15) -> list[str]:
    """Lists the rows that lost more than ``allowed`` of their ratio to a peer. Times of two runs do not compare."""
    known: dict[tuple[object, ...], dict[str, float]] = {}
    for row in before:
        known.setdefault(_name(row), {}).update(ratios(row))
    lost = []
    for row in after:
        for peer, ratio in ratios(row).items():
            old = known.get(_name(row), {}).get(peer)
            if old is not None and ratio < old * (1 - allowed):
                name = " ".join(str(part) for part in _name(row) if part is not None)
                lost.append(f"{name}: {ratio:.2f}x {peer}, was {old:.2f}x")
    return lost


def digest(rows: Sequence[Row]) -> list[Row]:
    """Returns the range of the ratios over all shapes, by op, case, dtype, layout, peer and number of threads."""
    groups: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        for peer, ratio in ratios(row).items():
            key = (row["op"], row["case"], row["dtype"], row["layout"], peer, row["threads"])
            groups.setdefault(key, []).append(ratio)
    names = ("op", "case", "dtype", "layout", "peer", "threads")
    return [
        {
            **dict(zip(names, key, strict=True)),
            "shapes": len(values),
            "least": min(values),
            "median": statistics.median(values),
            "most": max(values),
        }
        for key, values in groups.items()
    ]


def digest_of_peers(rows: Sequence[Row]) -> list[Row]:
    """Returns the digest without our reference, which is not meant to be fast."""
    return [line for line in digest(rows) if line["peer"] != "reference"]


def seconds_of(row: Row) -> dict[str, float]:
    """Returns the seconds of one call by implementation."""
    theirs = {name: peer["us"] / 1e6 for name, peer in row["peers"].items() if "us" in peer}
    return {"dd_kernels": row["us"] / 1e6, **theirs}


def images_per_second(row: Row, steps: int) -> dict[str, float]:
    """Returns images/s by implementation: those of a whole run, or of ``steps`` steps extrapolated from one."""
    repeats = 1 if row.get("steps") == steps else steps
    return {name: row["shape"][0] / (repeats * one) for name, one in seconds_of(row).items()}


def missing(found: Sequence[dict[str, str]]) -> list[str]:
    """Returns what was not measured, a line for each reason."""
    by_reason: dict[str, list[str]] = {}
    for one in found:
        by_reason.setdefault(one["reason"], []).append(one["name"])
    return [f"{why} ({len(names)}): {'; '.join(names)}" for why, names in by_reason.items()]


def title(rows: Sequence[Row]) -> str:
    """Returns what the rows were measured on, and what a ratio is."""
    devices = sorted({", ".join(filter(None, (row["device"], row["isa"], f"torch {row['torch']}"))) for row in rows})
    return f"{'; '.join(devices)}; {RATIO} of the same shape and dtype"


def figure(value: float) -> str:
    """Returns a number with three significant digits and no exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def peer_text(peers: Row) -> str:
    """Returns each peer's ratio with its quartiles, or why it was not measured."""
    texts = []
    for name, peer in peers.items():
        if "not_measured" in peer:
            texts.append(f"{name}: not measured ({peer['not_measured']})")
        else:
            how = f", {peer['how']}: {peer['note']}" if "note" in peer else ""
            texts.append(f"{name} {peer['ratio']:.2f}x ({peer['ratio_q1']:.2f} to {peer['ratio_q3']:.2f}{how})")
    return "; ".join(texts)


def cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Returns HEADS and a line per row."""
    lines: list[tuple[str, ...]] = [(*HEADS, "peers")]
    for row in rows:
        lines.append(
            (
                row["op"],
                row["case"],
                "x".join(map(str, row["shape"])),
                row["dtype"],
                row["layout"],
                "" if row["threads"] is None else str(row["threads"]),
                f"{row['us']:.1f}",
                f"{row['ns_per_element']:.3g}",
                f"{row['bytes'] / 1e6:.2f}",
                f"{row['gb_per_s']:.1f}",
                f"{row['percent_of_copy']:.0f}",
                "" if row["percent_of_bandwidth"] is None else f"{row['percent_of_bandwidth']:.0f}",
                peer_text(row["peers"]),
            )
        )
    return lines


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Returns lines whose columns are aligned."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Returns a table whose first line is its head."""
    rows = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in rows)
