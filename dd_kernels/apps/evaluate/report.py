"""Writes an evaluation as Markdown tables, and as JSON with all figures."""

from __future__ import annotations

import dataclasses
import json
import platform
from typing import Any

import numpy as np
import torch

from ...samplers.named import FEW_STEP_SAMPLERS
from .table import LARGE, Cell, Evaluation, row_name

TITLES = {
    "distance": "Fréchet distance to held-out images (lower is better; the floor is {floor.distance:.1f})",
    "right": "Share of samples that the classifier gives the class asked for (held-out images: {held_out.right:.1%})",
    "sure": "Share of samples that the classifier is sure of (held-out images: {held_out.sure:.1%})",
    "images_per_second": "Images/s",
}


def number(value: float) -> str:
    """Returns a figure with one place behind the point, or none where it has three before it."""
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def cell_text(name: str, cell: Cell) -> str:
    """Returns one of a cell's measures, a key of ``TITLES``, as a table shows it."""
    measures = cell.measures
    if name == "images_per_second":
        return number(cell.images_per_second)
    if name == "distance":
        return f"{number(measures.distance)} ± {number(measures.distance_error)}"
    share = getattr(measures, name)
    return "-" if share is None else f"{share:.1%}"


def _grid(evaluation: Evaluation, name: str) -> str:
    """Returns one measure as a Markdown table: rows are samplers, columns are steps."""
    rows = list(dict.fromkeys(cell.row for cell in evaluation.cells))
    columns = list(dict.fromkeys(cell.steps for cell in evaluation.cells))
    cells: dict[tuple[Any, int], Cell] = {(cell.row, cell.steps): cell for cell in evaluation.cells}
    first = max(len(row_name(row)) for row in rows)
    lines = [
        [" " * first, *(f"{steps} steps" for steps in columns)],
        ["-" * first, *("---:" for _ in columns)],
        *([row_name(row).ljust(first), *(cell_text(name, cells[row, s]) for s in columns)] for row in rows),
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("| " + " | ".join(f"{c:>{w}}" for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def guidance_text(run: dict[str, Any]) -> str:
    """Returns how samples were guided: scale, rescale, interval, classifier; a scale that is None is the row's."""
    scale = run["guidance"]
    parts = ["guidance of the row" if scale is None else f"guidance {scale:g}"]
    if run["guidance_rescale"]:
        parts.append(f"rescaled by {run['guidance_rescale']:g}")
    if run["guidance_interval"]:
        parts.append("at timesteps {:g} to {:g}".format(*run["guidance_interval"]))
    if run["classifier"]:
        scale = run["classifier_scale"]
        parts.append(f"by {run['classifier']} with the scale {'of the row' if scale is None else f'{scale:g}'}")
    return ", ".join(parts)


def markdown(evaluation: Evaluation, run: dict[str, Any]) -> str:
    """Returns the evaluation as Markdown: four tables, and how they were measured.

    ``run`` is :func:`environment` and the run's seconds, model, dtype, batch_size and options of guidance.
    """
    facts = {"floor": evaluation.floor, "held_out": evaluation.held_out}
    parts = [f"**{title.format(**facts)}**\n\n{_grid(evaluation, name)}" for name, title in TITLES.items()]
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in run_notes(evaluation, run))]) + "\n"


def run_notes(evaluation: Evaluation, run: dict[str, Any]) -> list[str]:
    """Returns how figures were measured, a sentence or two for each matter."""
    large = any(cell.row == LARGE for cell in evaluation.cells)
    solvers = [row for row in dict.fromkeys(cell.row for cell in evaluation.cells) if row in FEW_STEP_SAMPLERS]
    choose = f" {', '.join(map(str, solvers))}: noise levels of their own spacing." if solvers else ""
    return [
        f"{evaluation.samples} samples per cell, seed {evaluation.settings['seed']}, "
        f"timesteps {evaluation.settings['spacing']}, of {evaluation.settings['timesteps']}. "
        "eta 0 is DDIM, eta 1 is DDPM with the posterior variance"
        + ("; DDPM's larger variance is beta of the steps taken." if large else ".")
        + choose,
        f"Features: the {evaluation.features} inputs of the last layer of a classifier trained on real training "
        f"images, accuracy {evaluation.held_out.right:.1%} on {evaluation.held_out.images} held-out ones; "
        f"sure is a probability of at least {evaluation.sure_probability:g}. ± is a standard error, by bootstrap.",
        f"The floor is the distance of {evaluation.floor.images} real training images of the same classes "
        f"(± {number(evaluation.floor.distance_error)}); the classifier is sure of "
        f"{evaluation.floor.sure:.1%} of them.",
        "Measured in {seconds:.0f} s on {device}, {threads} threads, backend {backend}, torch {torch}; "
        "model {model}, {dtype}, {guided}, batches of {batch_size}.".format(**run, guided=guidance_text(run)),
    ]


def environment(device: torch.device, backend: str) -> dict[str, Any]:
    """Returns device, backend, threads and versions as plain JSON values."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": f"{device} ({name})",
        "backend": backend,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def as_json(evaluation: Evaluation, run: dict[str, Any]) -> str:
    """Returns the evaluation and ``run`` as JSON; a row is eta or "fixed_large"."""
    return json.dumps({**dataclasses.asdict(evaluation), "run": run}, indent=2) + "\n"
