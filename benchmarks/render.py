"""Draws results as PNG files and writes them as Markdown, <device>.md and the README's sections, all from the JSON.

Each PNG file carries the hash of the figures that it shows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tools.checks import described as check_line

from . import results, tables
from .harness import reason
from .results import Results, Row, markdown

ROOT = Path(__file__).parent.parent
SOURCE = "Source"  # key of the hash among a PNG's texts
DDIM_STEPS = 50
UNITS = {"steps": "steps of a run", "batch": "batch", "resolution": "side of the image", "channels": "base channels"}
SECTIONS = ("headline", "benchmarks")  # of the README, each between two marks


def draw_ratios(found: Results) -> Any:
    """Draws how many times longer each peer takes, a panel per op: dots for medians over shapes, lines for ranges.

    The rows are those on the largest number of threads; the tables have the others.
    """
    from matplotlib import pyplot as plt

    lines = results.digest_of_peers(results.rows(found, "ops") or results.ops(found))
    most_threads = max((line["threads"] or 0 for line in lines), default=0)
    lines = [line for line in lines if (line["threads"] or 0) == most_threads]
    cases = list(dict.fromkeys(line["case"] for line in lines))
    lines.sort(key=lambda line: cases.index(line["case"]))
    panels: dict[str, dict[str, list[Row]]] = {}
    for line in lines:
        layout = "" if line["layout"] == "contiguous" else f", {line['layout']}"
        label = f"{line['case']}, {line['dtype']}{layout}".replace("bfloat", "bf").replace("float", "fp")
        panels.setdefault(line["op"], {}).setdefault(label, []).append(line)
    peers = list(dict.fromkeys(line["peer"] for line in lines))
    sizes = [len(labels) for labels in panels.values()]
    figure, axes = plt.subplots(
        len(panels),
        figsize=(9, 1.2 + 0.5 * len(panels) + 0.3 * sum(sizes)),
        sharex=True,
        squeeze=False,
        height_ratios=sizes,
    )
    for axis, (op, labels) in zip(axes.flat, panels.items(), strict=True):
        _ratios_of(axis, labels, peers)
        axis.set_title(op, fontsize=10, loc="left", fontweight="bold")
    least, most = min(line["least"] for line in lines), max(line["most"] for line in lines)
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if least / 1.5 <= t <= most * 1.5]
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{t:g}x" for t in ticks])
    axis.minorticks_off()
    axis.set_xlabel("time of the peer / time of dd_kernels (dot: median over shapes, line: range)")
    marks = [plt.Line2D([], [], marker="o", linestyle="", color=f"C{i}", label=name) for i, name in enumerate(peers)]
    figure.legend(handles=marks, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=len(peers))
    threads = f", {most_threads} thread{'s' if most_threads > 1 else ''}" if most_threads else ""
    figure.suptitle(f"{found['machine']['device']}{threads}: how many times longer the peers take")
    return figure


def _ratios_of(axis: Any, labels: dict[str, list[Row]], peers: Sequence[str]) -> None:
    """Draws one op: a row for each of ``labels``, with a dot and a range for each peer."""
    for y, lines in enumerate(labels.values()):
        if y % 2:
            axis.axhspan(y - 0.5, y + 0.5, color="0.95", zorder=0)
        for i, line in enumerate(lines):
            at, color = y + 0.26 * (i - (len(lines) - 1) / 2), f"C{peers.index(line['peer'])}"
            axis.plot([line["least"], line["most"]], [at, at], color=color, linewidth=2, alpha=0.5)
            axis.plot(line["median"], at, "o", color=color, markersize=5)
    axis.set_yticks(range(len(labels)), list(labels), fontsize=9)
    axis.set_ylim(len(labels) - 0.5, -0.5)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.grid(axis="x", alpha=0.3)


def draw_throughput(found: Results) -> Any:
    """Draws images/s against the batch, a panel per model: DDIM in 50 steps, extrapolated from one step."""
    from matplotlib import pyplot as plt

    rows = [row for row in results.of_op(found, "sample") if row["case"].endswith(" ddim") and "steps" not in row]
    panels = sorted({(row["case"].removesuffix(" ddim"), row["dtype"]) for row in rows})
    names = list(dict.fromkeys(name for row in rows for name in results.seconds_of(row)))
    lines = -(-len(panels) // 2)
    figure, axes = plt.subplots(lines, 2, figsize=(10, 0.5 + 3.2 * lines), squeeze=False)
    for axis, (model, dtype) in zip(axes.flat, panels, strict=False):
        mine = [row for row in rows if row["case"] == f"{model} ddim" and row["dtype"] == dtype]
        _rates(axis, mine, names)
        axis.set_title(f"{model}, {dtype}", fontsize=10)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    figure.suptitle(f"{found['machine']['device']}: images/s, DDIM in {DDIM_STEPS} steps (extrapolated from one step)")
    return figure


def _rates(axis: Any, rows: Sequence[Row], names: Sequence[str]) -> None:
    """Draws one model's images/s against the batch, a line for each of ``names`` that was measured."""
    series: dict[str, dict[int, float]] = {}
    for row in rows:
        for name, rate in results.images_per_second(row, DDIM_STEPS).items():
            series.setdefault(name, {}).setdefault(row["shape"][0], rate)
    for name, by_batch in series.items():
        i = names.index(name)
        batches = sorted(by_batch)
        width = 2.5 if name == "dd_kernels" else 1.2
        rates = [by_batch[n] for n in batches]
        axis.plot(batches, rates, "os^vD*P"[i % 7] + "-", color=f"C{i}", label=name, linewidth=width)
    least, most = (end(r for by_batch in series.values() for r in by_batch.values()) for end in (min, max))
    axis.set_ylim(least / 2, most * 2)  # wide, so that a difference of a percent looks small
    _logarithmic(axis, sorted({n for by_batch in series.values() for n in by_batch}))
    axis.set_xlabel("batch")
    axis.set_ylabel("images/s")
    axis.legend(fontsize=7)


def _logarithmic(axis: Any, ticks: Sequence[float]) -> None:
    """Makes both axes logarithmic."""
    from matplotlib.ticker import LogLocator

    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axis.minorticks_off()
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.grid(alpha=0.3)


def draw_growth(found: Results) -> Any:
    """Draws time against steps, batch, resolution and channels, with its two lower bounds."""
    from matplotlib import pyplot as plt

    rows = results.of_op(found, "growth")
    axes_names = list(dict.fromkeys(row["case"] for row in rows))
    figure, axes = plt.subplots(2, 2, figsize=(10, 8))
    for axis, name in zip(axes.flat, axes_names, strict=False):
        mine = sorted((row for row in rows if row["case"] == name), key=lambda row: row["value"])
        values = [row["value"] for row in mine]
        for peer, style in (("dd_kernels", "o-"), ("eager", "s--")):
            times = [results.seconds_of(row).get(peer) for row in mine]
            axis.plot(values, [None if t is None else t * 1e3 for t in times], style, label=peer)
        for key, label, color in (
            ("floor_flops_us", "floor: FLOPs / matrix product's rate", "black"),
            ("floor_bytes_us", "floor: weights and images / copy bandwidth", "gray"),
        ):
            floor = [row.get(key) for row in mine]
            axis.plot(values, [None if f is None else f / 1e3 for f in floor], ":", color=color, label=label)
        _logarithmic(axis, values)
        base = ", ".join(f"{key} {value}" for key, value in mine[0]["sizes"].items() if key not in (name, "steps"))
        axis.set_title(base, fontsize=9)
        axis.set_xlabel(UNITS[name])
        axis.set_ylabel("ms")
    for axis in axes.flat[len(axes_names) :]:
        axis.axis("off")
    lines, names = axes.flat[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=2, fontsize=9)
    figure.suptitle(f"{found['machine']['device']}: a step of a U-Net like cifar10's, {rows[0]['dtype']}")
    return figure


# By suffix of the file: the title, the function that draws, and the op that it needs (None: any single op).
PLOTS: dict[str, tuple[str, Callable[[Results], Any], str | None]] = {
    "": ("ratios by op and peer", draw_ratios, None),
    "_throughput": ("images/s against the batch", draw_throughput, "sample"),
    "_growth": ("how the time of a step grows", draw_growth, "growth"),
}


def drawn(found: Results) -> dict[str, str]:
    """Returns the titles, by suffix, of the plots for which there are figures."""
    return {
        suffix: title
        for suffix, (title, _, op) in PLOTS.items()
        if (results.digest_of_peers(results.ops(found)) if op is None else results.of_op(found, op))
    }


def draw(found: Results, file: Path) -> list[str]:
    """Draws every plot beside ``file``; returns what could not be drawn, and why."""
    try:
        import matplotlib
    except ImportError:
        return ["plots: matplotlib is not installed"]
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    problems = []
    for suffix in drawn(found):
        try:
            figure = PLOTS[suffix][1](found)
            figure.tight_layout()
            target = file.with_name(f"{file.stem}{suffix}.png")
            figure.savefig(
                target, dpi=110, bbox_inches="tight", metadata={SOURCE: results.digest_of(found), "Software": None}
            )
        except Exception as error:
            problems.append(f"{file.stem}{suffix}.png: {reason(error)}")
        finally:
            plt.close("all")
    return problems


def _machine(found: Results) -> str:
    """Returns what the results were measured on."""
    machine = found["machine"]
    parts = [machine["device"], machine["isa"], f"torch {machine['torch']}"]
    parts += [f"{name} {machine[name]}" for name in ("cuda", "triton", "diffusers") if machine.get(name)]
    parts += [f"backend {name}" for name in sorted({row["backend"] for row in results.rows(found) if "backend" in row})]
    return ", ".join(part for part in parts if part)


def _section(title: str, body: str) -> list[str]:
    """Returns a section, or nothing where the body is empty."""
    return [f"## {title}", body] if body else []


def document(found: Results) -> str:
    """Returns the page of everything that was measured on one device."""
    rows = results.rows(found)
    texts = [f"# {found['machine']['device']}", f"Measured on {_machine(found)}."]
    for name, part in found["parts"].items():
        stamp = f"- {name}: {part['seconds']:.0f} s, {part['date']}, commit {part['commit'] or 'unknown'}"
        texts.append("\n".join([stamp, *(f"  - {check_line(check)}" for check in part.get("checks", []))]))
    stem = results.stem_of(found["machine"]["device"])
    texts += _section("50,000 images", tables.headline(rows))
    texts += _section("Whole samplers", tables.throughput(rows, every=True))
    texts += _section("What a step consists of", tables.breakdown(rows))
    texts += _section("Training", tables.training(rows))
    texts += _section("Whole models", tables.models(rows))
    texts += _section("Growth", tables.growth(rows))
    texts += _section("Ops", tables.ops_table(results.ops(found)))
    texts += [f"![{name}]({stem}{suffix}.png)" for suffix, name in drawn(found).items()]
    every = [row for row in rows if row["op"] in {r["op"] for r in results.ops(found)}]
    texts += _section("Every case", f"{results.title(every)}.\n\n{markdown(results.cells(every))}" if every else "")
    lacking = [(name, line) for name, part in found["parts"].items() for line in results.missing(part["not_measured"])]
    texts += _section("Not measured", "\n".join(f"- {name}, {line}" for name, line in lacking))
    return "\n\n".join(texts) + "\n"


def device_section(found: Results) -> str:
    """Returns what the README shows of one device."""
    stem = f"benchmarks/results/{results.stem_of(found['machine']['device'])}"
    rows = results.rows(found)
    texts = [f"Measured on {_machine(found)} ([everything]({stem}.md))."]
    texts += [tables.headline(rows), tables.models(rows), tables.throughput(rows, every=False), tables.training(rows)]
    texts += [f"![{name}]({stem}{suffix}.png)" for suffix, name in drawn(found).items()]
    table = tables.ops_table(results.rows(found, "ops"))
    texts += [f"<details>\n<summary>The ops as a table</summary>\n\n{table}\n\n</details>"] if table else []
    return "\n\n".join(part for part in texts if part)


def _marks(section: str) -> tuple[str, str]:
    return f"<!-- {section}: begin -->", f"<!-- {section}: end -->"


def readme_section(section: str) -> str:
    """Returns the text between the README's two marks of a section."""
    every = [results.load(file) for file in sorted(results.FOLDER.glob("*.json"))]
    if section == "headline":
        return "\n".join(f"{tables.first_numbers(results.rows(found))}\n\n*{_machine(found)}.*" for found in every)
    return "\n\n".join(device_section(found) for found in every)


def with_sections(readme: str) -> str:
    """Returns the README with its sections written anew."""
    for section in SECTIONS:
        begin, end = _marks(section)
        before, rest = readme.split(begin)
        readme = f"{before}{begin}\n{readme_section(section)}\n{end}{rest.split(end)[1]}"
    return readme


def everything(folder: Path) -> list[str]:
    """Writes <device>.md and the plots of every file, and the README if these are the committed results.

    Returns:
        What failed, and why.
    """
    problems = []
    for file in sorted(folder.glob("*.json")):
        try:
            found = results.load(file)
            file.with_suffix(".md").write_text(document(found))
            problems += draw(found, file)
        except Exception as error:
            problems.append(f"{file.name}: {reason(error)}")
    if folder.resolve() == results.FOLDER.resolve():
        readme = ROOT / "README.md"
        readme.write_text(with_sections(readme.read_text()))
    return problems
