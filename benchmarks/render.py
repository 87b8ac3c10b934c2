"""Writes results as Markdown: <device>.md with everything, and the README's section, both from the JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.checks import described as check_line

from . import plots, results, tables, text
from .harness import reason
from .results import Results
from .text import markdown

ROOT = Path(__file__).parent.parent
SECTIONS = ("headline", "benchmarks")  # of the README, each between two marks


def _machine(found: Results) -> str:
    """Returns what the results were measured on."""
    machine = found["machine"]
    parts = [machine["device"], machine["isa"], f"torch {machine['torch']}"]
    parts += [f"{name} {machine[name]}" for name in ("cuda", "triton", "diffusers") if machine.get(name)]
    parts += [f"backend {name}" for name in sorted({row["backend"] for row in results.rows(found) if "backend" in row})]
    return ", ".join(part for part in parts if part)


def missing(found: Sequence[dict[str, str]]) -> list[str]:
    """Returns what was not measured, a line for each reason."""
    by_reason: dict[str, list[str]] = {}
    for one in found:
        by_reason.setdefault(one["reason"], []).append(one["name"])
    return [f"{why} ({len(names)}): {'; '.join(names)}" for why, names in by_reason.items()]


def summary(name: str, part: dict[str, Any]) -> str:
    """Returns a part in a few lines, for the terminal."""
    lines = [check_line(check) for check in part.get("checks", [])]
    for check in part.get("checks", []):
        lines += [f"    {line}" for line in check.get("tail", [])]
    if part["rows"]:
        lines += text.aligned(text.cells(part["rows"]))
    lines += [f"not measured: {line}" for line in missing(part["not_measured"])]
    return "\n".join([*lines, f"{name} took {part['seconds']:.0f} s"])


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
    texts += [f"![{name}]({stem}{suffix}.png)" for suffix, name in plots.drawn(found).items()]
    every = [row for row in rows if row["op"] in {r["op"] for r in results.ops(found)}]
    texts += _section("Every case", f"{text.title(every)}.\n\n{markdown(text.cells(every))}" if every else "")
    lacking = [f"- {name}, {line}" for name, part in found["parts"].items() for line in missing(part["not_measured"])]
    texts += _section("Not measured", "\n".join(lacking))
    return "\n\n".join(texts) + "\n"


def device_section(found: Results) -> str:
    """Returns what the README shows of one device."""
    stem = f"benchmarks/results/{results.stem_of(found['machine']['device'])}"
    rows = results.rows(found)
    texts = [f"Measured on {_machine(found)} ([everything]({stem}.md))."]
    texts += [tables.headline(rows), tables.models(rows), tables.throughput(rows, every=False), tables.training(rows)]
    texts += [f"![{name}]({stem}{suffix}.png)" for suffix, name in plots.drawn(found).items()]
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
            problems += plots.draw(found, file)
        except Exception as error:
            problems.append(f"{file.name}: {reason(error)}")
    if folder.resolve() == results.FOLDER.resolve():
        readme = ROOT / "README.md"
        readme.write_text(with_sections(readme.read_text()))
    return problems
