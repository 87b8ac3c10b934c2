"""The committed results, benchmarks/results/<device>.json: read, written and compared with a new run."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
Row = dict[str, Any]


def file_of(device: str) -> Path:
    """Where the results of a device lie."""
    return FOLDER / (re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_") + ".json")


def save(rows: Sequence[Row]) -> list[Path]:
    """Writes the rows, a file per device; returns the files."""
    FOLDER.mkdir(exist_ok=True)
    files = []
    for device in sorted({row["device"] for row in rows}):
        files.append(file_of(device))
        mine = [row for row in rows if row["device"] == device]
        files[-1].write_text(json.dumps(mine, indent=1) + "\n")
    return files


def load(path: Path) -> list[Row]:
    """The rows of a results file."""
    return json.loads(path.read_text())


def ratios(row: Row) -> dict[str, float]:
    """How many times longer each peer that was measured takes."""
    return {name: peer["ratio"] for name, peer in row["peers"].items() if "ratio" in peer}


def _name(row: Row) -> tuple:
    return (row["op"], row["case"], *row["shape"], row["dtype"], row["layout"], row["threads"])


def slower(before: Sequence[Row], after: Sequence[Row], allowed: float = 0.15) -> list[str]:
    """What lost more than ``allowed`` of its ratio to a peer: ratios compare between runs, times do not."""
    known = {_name(row): ratios(row) for row in before}
    lost = []
    for row in after:
        for peer, ratio in ratios(row).items():
            old = known.get(_name(row), {}).get(peer)
            if old is not None and ratio < old * (1 - allowed):
                lost.append(f"{' '.join(map(str, _name(row)))}: {ratio:.2f}x {peer}, was {old:.2f}x")
    return lost


def digest(rows: Sequence[Row]) -> list[Row]:
    """One line per op, case, dtype, layout, peer and number of threads: the ratio over all shapes."""
    groups: dict[tuple, list[float]] = {}
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


def images_per_second(row: Row, steps: int) -> dict[str, float]:
    """Of a whole-step row ("sample"): by implementation, extrapolated from the time of one step to ``steps``."""
    seconds = {"dd_kernels": row["us"] / 1e6}
    seconds |= {name: peer["us"] / 1e6 for name, peer in row["peers"].items() if "us" in peer}
    return {name: row["shape"][0] / (steps * one) for name, one in seconds.items()}
