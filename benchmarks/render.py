"""The results as Markdown: <device>.md with everything, and the README's section; all of it from the JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from . import plots, results, text
from .harness import reason
from .results import Results, Row
from .text import figure, markdown

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
STEPS = {"ddim": (10, 20, 50, 100), "ddpm": (1000,)}
README_STEPS = {"ddim": 50, "ddpm": 1000}
HEADLINE_IMAGES = 50_000
SHARES = ("group_norm_silu", "sampler", "rest")
QUOTE = (
    "Song, Meng and Ermon (DDIM, ICLR 2021, arXiv 2010.02502, section 1): “it takes around 20 hours to sample 50k "
    "images of size 32 x 32 from a DDPM, but less than a minute to do so from a GAN on a Nvidia 2080 Ti GPU.”"
)


def _machine(found: Results) -> str:
    machine = found["machine"]
    parts = [machine["device"], machine["isa"], f"torch {machine['torch']}"]
    parts += [f"{name} {machine[name]}" for name in ("cuda", "triton", "diffusers") if machine.get(name)]
    parts += [f"backend {name}" for name in sorted({row["backend"] for row in results.rows(found) if "backend" in row})]
    return ", ".join(part for part in parts if part)


def _ratio(line: Row | None) -> str:
    if line is None:
        return ""
    if line["shapes"] == 1:
        return f"{line['median']:.1f}x"
    return f"{line['median']:.1f}x ({line['least']:.1f} to {line['most']:.1f})"


def _threads(number: int | None) -> str:
    return "GPU" if number is None else f"{number} thread{'s' if number > 1 else ''}"


def ops_table(rows: Sequence[Row]) -> str:
    """The digest of the ops: the median over the shapes, and the range."""
    lines = results.digest_of_peers(rows)
    if not lines:
        return ""
    threads = sorted({line["threads"] for line in lines}, key=lambda n: n or 0)
    names = ("op", "case", "dtype", "layout", "peer")
    table: dict[tuple, dict[int | None, Row]] = {}
    for line in lines:
        table.setdefault(tuple(line[name] for name in names), {})[line["threads"]] = line
    head = [*names[:4], "against", *(_threads(n) for n in threads)]
    cells = [head, *([*key, *(_ratio(by.get(n)) for n in threads)] for key, by in table.items())]
    return "How many times longer the peer takes, median over the shapes (range):\n\n" + markdown(cells)


def implementations(rows: Iterable[Row]) -> list[str]:
    """Who was measured in any of the rows, ours first."""
    names: dict[str, None] = {"dd_kernels": None}
    for row in rows:
        names |= dict.fromkeys(name for name, peer in row["peers"].items() if "us" in peer)
    return list(names)


def throughput(rows: Sequence[Row], every: bool) -> str:
    """Images/s of whole samplers; extrapolated from the time of one step, but for whole runs."""
    rows = [row for row in rows if row["op"] == "sample"]
    if not rows:
        return ""
    names = implementations(rows)
    cells = [["model", "sampler", "batch", "dtype", *names]]
    for row in rows:
        model, sampler = row["case"].rsplit(" ", 1)
        whole = row.get("steps")
        steps_of = (whole,) if whole else STEPS[sampler] if every else (README_STEPS[sampler],)
        for steps in steps_of:
            rates = results.images_per_second(row, steps)
            how = "whole run, measured" if whole else "extrapolated"
            cells.append([model, f"{sampler.upper()}-{steps}, {how}", str(row["shape"][0]), row["dtype"]])
            cells[-1] += [figure(rates[name]) if name in rates else "" for name in names]
    note = "Images/s, random weights; extrapolated: from the measured time of one step (model and update)."
    return f"{note}\n\n{markdown(cells)}"


def duration(seconds: float) -> str:
    """In the unit that reads best."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{figure(seconds / size)} {unit}"
    return f"{figure(seconds)} s"


def headline(rows: Sequence[Row]) -> str:
    """Time for 50,000 images of 32 x 32 by sampler, each implementation at its best batch; or nothing."""
    rows = [row for row in rows if row["op"] == "sample" and row["case"].startswith("cifar10 ") and "steps" not in row]
    if not rows:
        return ""
    names = implementations(rows)
    cells = [["sampler", *names]]
    for sampler, counts in STEPS.items():
        mine = [row for row in rows if row["case"].endswith(sampler)]
        for steps in counts if mine else ():
            cells.append([f"{sampler.upper()}, {steps} steps", *(_best(mine, name, steps) for name in names)])
    note = f"Time for {HEADLINE_IMAGES:,} images of 32 x 32 with the cifar10 U-Net (35.7 M parameters, random weights)"
    return f"{note}, extrapolated from one step:\n\n{markdown(cells)}\n\n{QUOTE}"


def _best(rows: Sequence[Row], name: str, steps: int) -> str:
    found = [(results.images_per_second(row, steps).get(name), row) for row in rows]
    measured = [(rate, row) for rate, row in found if rate]
    if not measured:
        return ""
    rate, row = max(measured, key=lambda pair: pair[0])
    return f"{duration(HEADLINE_IMAGES / rate)} (batch {row['shape'][0]}, {row['dtype']})"


def breakdown(rows: Sequence[Row]) -> str:
    """Launches of a step, shares of its time, and peak memory beside the weights."""
    cells = [["model", "batch", "dtype", "implementation", "launches", "GroupNorm+SiLU", "sampler", "rest", "peak MB"]]
    for row in rows:
        for name, one in row.get("breakdown", {}).items():
            if "not_measured" in one:
                continue
            share = one.get("share", {})
            shares = [f"{100 * share[key]:.1f}%" if key in share else "" for key in SHARES]
            launches = "" if one.get("launches") is None else str(one["launches"])
            peak = figure(one["peak_bytes"] / 1e6) if "peak_bytes" in one else ""
            cells.append([row["case"], str(row["shape"][0]), row["dtype"], name, launches, *shares, peak])
    if len(cells) == 1:
        return ""
    note = "What a step consists of, by the profiler: kernel launches (on a GPU), shares of the time, memory."
    return f"{note}\n\n{markdown(cells)}"


def training(rows: Sequence[Row]) -> str:
    """Images/s of training steps, what the forward pass keeps, and peak memory."""
    rows = [row for row in rows if row["op"] == "training"]
    cells = [["model", "batch", "dtype", "implementation", "images/s", "kept for backward, MB", "peak, MB"]]
    for row in rows:
        memory = row.get("memory", {})
        for name, seconds in results.seconds_of(row).items():
            sizes = [memory.get(name, {}).get(key) for key in ("saved_bytes", "peak_bytes")]
            cells.append([row["case"], str(row["shape"][0]), row["dtype"], name, figure(row["shape"][0] / seconds)])
            cells[-1] += ["" if size is None else figure(size / 1e6) for size in sizes]
    if len(cells) == 1:
        return ""
    return f"Training, a step of q_sample, forward, backward and AdamW:\n\n{markdown(cells)}"


def growth(rows: Sequence[Row]) -> str:
    """The points of the growth plot."""
    rows = [row for row in rows if row["op"] == "growth"]
    names = implementations(rows)
    heads = ["axis", "value", "GFLOP", "floor of bytes, ms", "floor of FLOPs, ms", *(f"{name}, ms" for name in names)]
    cells = [heads]
    for row in rows:
        times = results.seconds_of(row)
        floors = [row.get(key, math.nan) for key in ("floor_bytes_us", "floor_flops_us")]
        cells.append([row["case"], str(row["value"]), figure(row.get("flops", math.nan) / 1e9)])
        cells[-1] += [figure(floor / 1e3) for floor in floors]
        cells[-1] += [figure(times[name] * 1e3) if name in times else "" for name in names]
    if len(cells) == 1:
        return ""
    return f"How the time of a step (steps: of a run) grows, one thing varied at a time:\n\n{markdown(cells)}"


def is_bad(check: dict[str, Any]) -> bool:
    """Whether a check failed, rather than passed or could not be made."""
    outcome = check["outcome"]
    return bool(check.get("failures") or check.get("errors")) or outcome.startswith("exit status")


def check_line(check: dict[str, Any]) -> str:
    """A check in one line."""
    words = [f"{check['check']}: {check['outcome']}"]
    if "seconds" in check:
        words.append(f"{check['seconds']:.0f} s")
    if check.get("libraries"):
        words.append(", ".join(check["libraries"]))
    for kernel, by_status in check.get("kernels", {}).items():
        words.append(f"{kernel} {', '.join(f'{n} {status}' for status, n in by_status.items())}")
    if "errors" in check:
        found = "no summary" if check["errors"] is None else f"{check['errors']} errors"
        words.append(f"{found}, {check['ops']} groups of ops")
    if "plans" in check:
        words.append(f"{check['plans']} plans")
    words += [f"failed: {name}" for name in check.get("failed", [])]
    return "; ".join(words)


def missing(found: Sequence[dict[str, str]]) -> list[str]:
    """What was not measured, a line for each reason."""
    by_reason: dict[str, list[str]] = {}
    for one in found:
        by_reason.setdefault(one["reason"], []).append(one["name"])
    return [f"{why} ({len(names)}): {'; '.join(names)}" for why, names in by_reason.items()]


def summary(name: str, part: dict[str, Any]) -> str:
    """A part in a few lines, for the terminal."""
    lines = [check_line(check) for check in part.get("checks", [])]
    for check in part.get("checks", []):
        lines += [f"    {line}" for line in check.get("tail", [])]
    if part["rows"]:
        lines += text.aligned(text.cells(part["rows"]))
    lines += [f"not measured: {line}" for line in missing(part["not_measured"])]
    return "\n".join([*lines, f"{name} took {part['seconds']:.0f} s"])


def _section(title: str, body: str) -> list[str]:
    return [f"## {title}", body] if body else []


def document(found: Results) -> str:
    """Everything that was measured on one device."""
    rows = results.rows(found)
    texts = [f"# {found['machine']['device']}", f"Measured on {_machine(found)}."]
    for name, part in found["parts"].items():
        stamp = f"- {name}: {part['seconds']:.0f} s, {part['date']}, commit {part['commit'] or 'unknown'}"
        texts.append("\n".join([stamp, *(f"  - {check_line(check)}" for check in part.get("checks", []))]))
    stem = results.stem_of(found["machine"]["device"])
    texts += _section("50,000 images", headline(rows))
    texts += _section("Whole samplers", throughput(rows, every=True))
    texts += _section("What a step consists of", breakdown(rows))
    texts += _section("Training", training(rows))
    texts += _section("Growth", growth(rows))
    texts += _section("Ops", ops_table(results.ops(found)))
    texts += [f"![{name}]({stem}{suffix}.png)" for suffix, name in plots.drawn(found).items()]
    every = [row for row in rows if row["op"] in {r["op"] for r in results.ops(found)}]
    texts += _section("Every case", markdown(text.cells(every)) if every else "")
    lacking = [f"- {name}, {line}" for name, part in found["parts"].items() for line in missing(part["not_measured"])]
    texts += _section("Not measured", "\n".join(lacking))
    return "\n\n".join(texts) + "\n"


def device_section(found: Results) -> str:
    """What the README shows of one device."""
    stem = f"benchmarks/results/{results.stem_of(found['machine']['device'])}"
    rows = results.rows(found)
    texts = [f"Measured on {_machine(found)} ([everything]({stem}.md))."]
    texts += [headline(rows), throughput(rows, every=False), training(rows)]
    texts += [f"![{name}]({stem}{suffix}.png)" for suffix, name in plots.drawn(found).items()]
    table = ops_table(results.rows(found, "ops"))
    texts += [f"<details>\n<summary>The ops as a table</summary>\n\n{table}\n\n</details>"] if table else []
    return "\n\n".join(part for part in texts if part)


def readme_section() -> str:
    """What stands between the README's two marks."""
    files = sorted(results.FOLDER.glob("*.json"))
    return "\n\n".join(device_section(results.load(file)) for file in files)


def everything(folder: Path) -> list[str]:
    """Writes <device>.md and the plots of every file; the README where these are the committed ones. What failed."""
    problems = []
    for file in sorted(folder.glob("*.json")):
        try:
            found = results.load(file)
            file.with_suffix(".md").write_text(document(found))
            problems += plots.draw(found, file)
        except Exception as error:
            problems.append(f"{file.name}: {reason(error)}")
    if folder.resolve() == results.FOLDER.resolve():
        readme = ROOT / "README.md"
        before, rest = readme.read_text().split(BEGIN)
        after = rest.split(END)[1]
        readme.write_text(f"{before}{BEGIN}\n{readme_section()}\n{END}{after}")
    return problems
