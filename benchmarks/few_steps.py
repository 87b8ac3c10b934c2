"""Measures at what order the solvers converge, on a mixture of Gaussians, and writes the README's table of it.

python -m benchmarks.few_steps
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from .gaussian_mixture import SOLVERS, errors, slopes

README = Path(__file__).parents[1] / "README.md"
MARKS = ("<!-- convergence: begin -->", "<!-- convergence: end -->")
STEPS = (10, 20, 40, 80)


@cache
def measured(name: str) -> list[float]:
    """Returns the errors of a solver at all numbers of steps."""
    return errors(SOLVERS[name][0], STEPS)


def table() -> str:
    """Returns errors and slopes as Markdown: a row per solver, a column per number of steps."""
    lines = [["sampler", *(f"{n} steps" for n in STEPS), "slope"], ["---", *["---:"] * (len(STEPS) + 1)]]
    for name in SOLVERS:
        found = measured(name)
        lines.append([name, *(f"{error:.1e}" for error in found), f"{slopes(found)[-1]:.1f}"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def with_table(readme: str) -> str:
    """Returns the README with the table between its marks."""
    begin, end = MARKS
    before, rest = readme.split(begin)
    return f"{before}{begin}\n\n{table()}\n\n{end}{rest.split(end)[1]}"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text()))
