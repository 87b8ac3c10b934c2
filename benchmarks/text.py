"""Formats rows of results as cells of text, and cells as lines for a terminal or as Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .harness import Row

RATIO = "ratio: a peer's time over ours, the median (and quartiles) of paired ratios of interleaved runs"
HEADS = ("op", "case", "shape", "dtype", "layout", "threads", "us", "ns/elt", "MB", "GB/s", "% copy", "% bandwidth")


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
