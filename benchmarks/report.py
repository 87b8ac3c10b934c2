"""Run the benchmarks, keep what was measured, and show it: ``python -m benchmarks.report``.

Writes benchmarks/results/<device>.json, draws <device>.png beside it, puts the digest of all committed
results into the README, and prints what lost more than 15 % of its ratio to a peer since the last commit.
``--render`` measures nothing and only draws and writes from the files that are there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from . import results
from .results import Row

ROOT = Path(__file__).parent.parent
IMPLEMENTATIONS = ("dd_kernels", "reference", "diffusers")
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


def measure(arguments: Sequence[str]) -> list[Row]:
    """The records of one run of ``pytest benchmarks --benchmark-only``."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.json"
        command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", f"--benchmark-json={file}"]
        subprocess.run([*command, "-q", "--benchmark-disable-gc", *arguments], cwd=ROOT, check=True)
        run = json.loads(file.read_text())
    return [b["extra_info"]["record"] for b in run["benchmarks"] if "record" in b["extra_info"]]


def _ratio(line: Row | None) -> str:
    if line is None:
        return ""
    if line["shapes"] == 1:
        return f"{line['median']:.1f}x"
    return f"{line['median']:.1f}x ({line['least']:.1f} to {line['most']:.1f})"


def markdown(rows: Sequence[Row]) -> str:
    """The digest of one device's results as a table: median over the shapes, and the range."""
    lines = results.digest(rows)
    threads = sorted({line["threads"] for line in lines})
    names = ("op", "case", "dtype", "layout", "peer")
    table: dict[tuple, dict[int, Row]] = {}
    for line in lines:
        table.setdefault(tuple(line[name] for name in names), {})[line["threads"]] = line
    head = [*names[:4], "against", *(f"{n} thread{'s' if n > 1 else ''}" for n in threads)]
    text = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for key, by_threads in table.items():
        text.append("| " + " | ".join([*key, *(_ratio(by_threads.get(n)) for n in threads)]) + " |")
    machine = rows[0]
    isa = f", {machine['isa']}" if machine["isa"] else ""
    return f"Measured on {machine['device']}{isa}, torch {machine['torch']}:\n\n" + "\n".join(text)


STEPS = {"ddim": (10, 20, 50, 100), "ddpm": (1000,)}


def throughput(rows: Sequence[Row]) -> str:
    """Images/s of whole samplers as a table, extrapolated from the time of one step; nothing where none was timed."""
    text = []
    for row in (row for row in rows if row["op"] == "sample"):
        model, sampler = row["case"].split()
        for steps in STEPS[sampler]:
            rates = results.images_per_second(row, steps)
            cells = [model, f"{sampler.upper()}, {steps} steps", str(row["shape"][0]), str(row["threads"])]
            text.append([*cells, *(f"{rates[name]:.3g}" if name in rates else "" for name in IMPLEMENTATIONS)])
    if not text:
        return ""
    head = ["model", "sampler", "batch", "threads", *IMPLEMENTATIONS]
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *text)]
    return "\n\nImages/s, extrapolated from the time of one step (random weights):\n\n" + "\n".join(lines)


def draw(rows: Sequence[Row], file: Path) -> None:
    """How many times faster, by op and peer: a dot for the median over shapes, a line for the range."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = sorted(results.digest(rows), key=lambda line: (line["op"], line["case"], line["peer"], line["threads"]))
    labels = [f"{x['op']} {x['case']} {x['dtype']} {x['layout']}, {x['peer']}, {x['threads']}T" for x in lines]
    figure, axis = plt.subplots(figsize=(11, 1.2 + 0.24 * len(lines)))
    for y, line in enumerate(reversed(lines)):
        color = f"C{line['threads'] - 1}"
        axis.plot([line["least"], line["most"]], [y, y], color=color, linewidth=2, alpha=0.5)
        axis.plot(line["median"], y, "o", color=color, markersize=5)
    axis.set_yticks(range(len(lines)), reversed(labels), fontsize=7)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_xticks([0.5, 1, 2, 5, 10, 20, 50], ["0.5x", "1x", "2x", "5x", "10x", "20x", "50x"])
    axis.set_xlabel("time of the peer / time of dd_kernels (dot: median over shapes, line: range)")
    axis.set_title(rows[0]["device"])
    axis.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def readme_section() -> str:
    """What stands between the README's two marks."""
    found = [results.load(file) for file in sorted(results.FOLDER.glob("*.json"))]
    return "\n\n".join(markdown(rows) + throughput(rows) for rows in found)


def render() -> None:
    """Draws every device's plot and puts the tables into the README."""
    for file in sorted(results.FOLDER.glob("*.json")):
        draw(results.load(file), file.with_suffix(".png"))
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    after = rest.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\n{readme_section()}\n{END}{after}")


def main() -> int:
    """Measures (unless told not to), saves, renders; the exit status is pytest's."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("--render", action="store_true", help="measure nothing, draw and write from the files")
    parser.add_argument("pytest", nargs="*", help="further arguments of pytest, after --")
    args = parser.parse_args()
    if not args.render:
        rows = measure(args.pytest)
        for device in sorted({row["device"] for row in rows}):
            file = results.file_of(device)
            mine = [row for row in rows if row["device"] == device]
            lost = results.slower(results.load(file), mine) if file.exists() else []
            print("\n".join(["slower than what was committed:", *lost]) if lost else "nothing got slower by over 15 %")
        print("wrote", *results.save(rows))
    render()
    return 0


if __name__ == "__main__":
    sys.exit(main())
