"""Writes an evaluation as Markdown tables, and as JSON with all figures."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ...samplers.named import FEW_STEP_SAMPLERS
from .judge import Measures
from .results import LARGE, Cell, Evaluation, row_name

TITLES = {
    "distance": "Fréchet distance to held-out images (lower is better; the floor is that of as many real images)",
    "right": "Share of samples that the classifier gives the class asked for (held-out images: {held_out.right:.1%})",
    "sure": "Share of samples that the classifier is sure of (held-out images: {held_out.sure:.1%})",
    "images_per_second": "Images/s",
}


def number(value: float) -> str:
    """Returns a figure with one place behind the point, or none where it has three before it."""
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def share(value: float | None) -> str:
    """Returns a share in percent, or "-" for none."""
    return "-" if value is None else f"{value:.1%}"


def distance(measures: Measures) -> str:
    """Returns a distance and its standard error."""
    return f"{number(measures.distance)} ± {number(measures.distance_error)}"


def cell_text(name: str, cell: Cell) -> str:
    """Returns one of a cell's measures, a key of ``TITLES``, as a table shows it."""
    if name == "images_per_second":
        return number(cell.images_per_second)
    return distance(cell.measures) if name == "distance" else share(getattr(cell.measures, name))


def _table(head: list[str], rows: dict[str, list[str]]) -> str:
    """Returns a Markdown table; the names of rows are their first cells, and figures stand on the right."""
    first = max(map(len, rows))
    lines = [[" " * first, *head], ["-" * first, *("---:" for _ in head)]]
    lines += [[name.ljust(first), *texts] for name, texts in rows.items()]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("| " + " | ".join(f"{c:>{w}}" for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def _grid(evaluation: Evaluation, name: str) -> str:
    """Returns one measure as a Markdown table: rows are samplers, columns are steps."""
    cells = {(cell.row, cell.steps): cell for cell in evaluation.cells}
    rows = {
        row_name(row): [cell_text(name, cells[row, column.steps]) for column in evaluation.columns]
        for row in evaluation.rows
    }
    if name == "distance":
        rows["floor"] = [distance(column.floor) for column in evaluation.columns]
    return _table([f"{column.steps} steps" for column in evaluation.columns], rows)


def _by_class(evaluation: Evaluation, classes: Sequence[str]) -> list[str]:
    """Returns the accuracy by class at the last number of steps, with its title; [] for samples without classes."""
    steps = evaluation.columns[-1].steps
    rows = {row_name(c.row): c.measures.right_by_class for c in evaluation.cells if c.steps == steps}
    if None in rows.values():
        return []
    rows["held-out images"] = evaluation.held_out.right_by_class
    table = _table(list(classes), {name: list(map(share, shares or ())) for name, shares in rows.items()})
    return [f"**Share of the samples of each class that the classifier gives that class, {steps} steps**\n\n{table}"]


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
    """Returns the evaluation as Markdown: four tables, for a model with classes a fifth, and how they were measured.

    ``run`` is :func:`environment` and the run's seconds, model, classes, dtype, batch_size and options of guidance.
    """
    titles = {name: title.format(held_out=evaluation.held_out) for name, title in TITLES.items()}
    parts = [f"**{title}**\n\n{_grid(evaluation, name)}" for name, title in titles.items()]
    parts += _by_class(evaluation, run["classes"])
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in run_notes(evaluation, run))]) + "\n"


def _of_columns(texts: Sequence[str]) -> str:
    """Returns a text for each column, or the one text of all."""
    return texts[0] if len(set(texts)) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]} (by column)"


def run_notes(evaluation: Evaluation, run: dict[str, Any]) -> list[str]:
    """Returns how figures were measured, a sentence or two for each matter."""
    columns, settings = evaluation.columns, evaluation.settings
    solvers = [row for row in evaluation.samplers if row in FEW_STEP_SAMPLERS]
    choose = f" {', '.join(map(str, solvers))}: noise levels of their own spacing." if solvers else ""
    return [
        f"{_of_columns([str(column.samples) for column in columns])} samples per cell, seed {settings['seed']}, "
        f"timesteps {settings['spacing']}, of {settings['timesteps']}. "
        "eta 0 is DDIM, eta 1 is DDPM with the posterior variance"
        + ("; DDPM's larger variance is beta of the steps taken." if LARGE in evaluation.samplers else ".")
        + choose,
        f"Features: the {evaluation.features} inputs of the last layer of a classifier trained on real training "
        f"images, accuracy {evaluation.held_out.right:.1%} on {evaluation.held_out.images} held-out ones; "
        f"sure is a probability of at least {evaluation.sure_probability:g}. ± is a standard error, by bootstrap.",
        f"The floor is the distance of {_of_columns([str(column.floor.images) for column in columns])} real training "
        f"images of the same classes; the classifier is sure of "
        f"{_of_columns([share(column.floor.sure) for column in columns])} of them.",
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
    """Returns the evaluation and ``run`` as JSON; a row is eta or the name of a sampler."""
    return json.dumps({**dataclasses.asdict(evaluation), "run": run}, indent=2) + "\n"
