"""Measures at what order the solvers converge, on a mixture of Gaussians: the README's table of it, and a plot.

python -m benchmarks.few_steps
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from .gaussian_mixture import SOLVERS, errors, slopes

PLOT = Path(__file__).parent / "results" / "convergence.png"
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


def draw(file: Path) -> None:
    """Draws the errors against the numbers of steps, and the slopes 1, 2 and 3 beside them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5.5))
    for i, name in enumerate(SOLVERS):
        # The dashes tell lines apart that lie on one another.
        axis.loglog(STEPS, measured(name), "o-" if i % 2 else "s--", color=f"C{i}", label=name, markersize=5)
    for order, first in ((1, 0.2), (2, 0.15), (3, 0.05)):
        axis.loglog(STEPS, [first * (n / STEPS[0]) ** -order for n in STEPS], ":", color="gray", linewidth=1)
        axis.annotate(f"slope {order}", (STEPS[-1], first * (STEPS[-1] / STEPS[0]) ** -order), color="gray")
    axis.set_xticks(STEPS, [str(n) for n in STEPS])
    axis.minorticks_off()
    axis.set_xlabel("steps")
    axis.set_ylabel("root mean square distance to the exact solution")
    axis.legend(fontsize=8)
    figure.savefig(file, dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    draw(PLOT)
    README.write_text(with_table(README.read_text()))
