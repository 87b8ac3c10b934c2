"""Accuracy and distance of samples against the strength of their guidance: figures, a table and a plot."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, NamedTuple

from .. import plots
from .report import cell_text, number, run_notes
from .results import Cell, Column, Evaluation, row_name


class Strengths(NamedTuple):
    """Samples of one sampler at several strengths of guidance, beside the same real images.

    Attributes:
        axis: what the strengths are, "guidance" or "classifier scale".
        evaluations: by strength, each of one cell.
    """

    axis: str
    evaluations: dict[float, Evaluation]

    @property
    def first(self) -> Evaluation:
        """Returns one evaluation, for what all have in common."""
        return next(iter(self.evaluations.values()))

    @property
    def column(self) -> Column:
        """Returns the number of steps that all have in common."""
        return self.first.columns[0]

    @property
    def cells(self) -> dict[float, Cell]:
        """Returns the measures by strength."""
        return {strength: evaluation.cells[0] for strength, evaluation in self.evaluations.items()}


def strengths_markdown(found: Strengths, run: dict[str, Any]) -> str:
    """Returns a Markdown table, a row for each strength, and how it was measured; ``run`` as in :func:`markdown`."""
    common, cell = found.first, found.first.cells[0]
    lines = [
        f"**{row_name(cell.row)}, {cell.steps} steps, against the {found.axis}** (held-out images: accuracy "
        f"{common.held_out.right:.1%}; floor of the distance {number(found.column.floor.distance)})",
        "",
        f"| {found.axis} | accuracy | Fréchet distance | sure | images/s |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    for strength, cell in found.cells.items():
        figures = (cell_text(name, cell) for name in ("right", "distance", "sure", "images_per_second"))
        lines.append(f"| {strength:g} | {' | '.join(figures)} |")
    accuracy = "Accuracy: the share of samples that the classifier gives the class asked for."
    return "\n".join([*lines, "", *(f"- {note}" for note in (accuracy, *run_notes(common, run)))]) + "\n"


def strengths_json(found: Strengths, run: dict[str, Any]) -> str:
    """Returns all figures and ``run`` as JSON."""
    rows = [
        {"strength": strength, **dataclasses.asdict(evaluation)} for strength, evaluation in found.evaluations.items()
    ]
    return json.dumps({"axis": found.axis, "strengths": rows, "run": run}, indent=2) + "\n"


def strengths_png(found: Strengths) -> bytes:
    """Returns a plot of accuracy and distance against the strength, with those of real images, as a PNG.

    Raises:
        ValueError: matplotlib is not installed.
    """
    figure, common = plots.figure(9, 4), found.first
    cell = common.cells[0]
    figure.suptitle(f"{row_name(cell.row)}, {cell.steps} steps, {found.column.samples} samples at each {found.axis}")
    left, right = figure.subplots(1, 2)
    measured = sorted((strength, cell.measures) for strength, cell in found.cells.items())
    x = [strength for strength, _ in measured]
    left.plot(x, [float("nan") if m.right is None else 100 * m.right for _, m in measured], "o-", label="samples")
    if common.held_out.right is not None:
        left.axhline(100 * common.held_out.right, linestyle="--", color="grey", label="held-out images")
    left.set(xlabel=found.axis, ylabel="accuracy, %", title="Samples of the class asked for")
    errors = [measures.distance_error for _, measures in measured]
    right.errorbar(x, [m.distance for _, m in measured], errors, fmt="o-", capsize=3, label="samples ± standard error")
    right.axhline(found.column.floor.distance, linestyle="--", color="grey", label="as many real images")
    right.set(xlabel=found.axis, ylabel="Fréchet distance", title="Distance to held-out images", ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    return plots.png(figure)
