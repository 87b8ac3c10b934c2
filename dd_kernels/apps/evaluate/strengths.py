"""Accuracy and distance of samples against the strength of their guidance: a table and a plot."""

from __future__ import annotations

from typing import Any

from .. import plots
from .report import cell_text, number, run_notes
from .results import Evaluation, row_name


def strengths_markdown(evaluation: Evaluation, run: dict[str, Any]) -> str:
    """Returns a Markdown table, a row for each strength, and how it was measured; ``run`` as in :func:`markdown`."""
    (column,), axis = evaluation.columns, evaluation.settings["axis"]
    lines = [
        f"**{row_name(evaluation.settings['sampler'])}, {column.steps} steps, against the {axis}** (held-out images: "
        f"accuracy {evaluation.held_out.right:.1%}; floor of the distance {number(column.floor.distance)})",
        "",
        f"| {axis} | accuracy | Fréchet distance | sure | images/s |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    for cell in evaluation.cells:
        figures = (cell_text(name, cell) for name in ("right", "distance", "sure", "images_per_second"))
        lines.append(f"| {cell.row:g} | {' | '.join(figures)} |")
    accuracy = "Accuracy: the share of samples that the classifier gives the class asked for."
    return "\n".join([*lines, "", *(f"- {note}" for note in (accuracy, *run_notes(evaluation, run)))]) + "\n"


def strengths_png(evaluation: Evaluation) -> bytes:
    """Returns a plot of accuracy and distance against the strength, with those of real images, as a PNG.

    Raises:
        ValueError: matplotlib is not installed.
    """
    figure, (column,), axis = plots.figure(9, 4), evaluation.columns, evaluation.settings["axis"]
    sampler = row_name(evaluation.settings["sampler"])
    figure.suptitle(f"{sampler}, {column.steps} steps, {column.samples} samples at each {axis}")
    left, right = figure.subplots(1, 2)
    measured = sorted((float(cell.row), cell.measures) for cell in evaluation.cells)
    x = [strength for strength, _ in measured]
    left.plot(x, [float("nan") if m.right is None else 100 * m.right for _, m in measured], "o-", label="samples")
    if evaluation.held_out.right is not None:
        left.axhline(100 * evaluation.held_out.right, linestyle="--", color="grey", label="held-out images")
    left.set(xlabel=axis, ylabel="accuracy, %", title="Samples of the class asked for")
    errors = [measures.distance_error for _, measures in measured]
    right.errorbar(x, [m.distance for _, m in measured], errors, fmt="o-", capsize=3, label="samples ± standard error")
    right.axhline(column.floor.distance, linestyle="--", color="grey", label="as many real images")
    right.set(xlabel=axis, ylabel="Fréchet distance", title="Distance to held-out images", ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    return plots.png(figure)
