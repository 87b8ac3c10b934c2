"""What a run leaves to look at: its loss by step, and the same samples as the training goes on."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from .. import images, plots
from ..files import PathLike, atomic_write, resolved

BLOCK = 100
"""Steps whose mean loss is one point of the curve."""
SHOWN = 10
"""Samples in a row of the picture that grows."""
_ZOOM = 2
_KEY = "dd_kernels"


class LossCurve:
    """The mean loss of every ``BLOCK`` steps, with the sum and number of those that do not fill a block yet."""

    def __init__(self, means: Sequence[float] = (), total: float = 0.0, count: int = 0) -> None:
        self.means, self.total, self.count = list(means), total, count

    def add(self, loss: float) -> None:
        """Takes up the loss of the next step."""
        self.total, self.count = self.total + loss, self.count + 1
        if self.count == BLOCK:
            self.means.append(float(f"{self.total / BLOCK:.6g}"))
            self.total, self.count = 0.0, 0

    def as_json(self) -> dict[str, Any]:
        """Returns what the constructor takes, as plain JSON values."""
        return {"means": self.means, "total": self.total, "count": self.count}

    def png(self) -> bytes:
        """Returns a plot of the loss by step, both logarithmic, as a PNG.

        Raises:
            ValueError: matplotlib is not installed.
        """
        figure = plots.figure(7, 4)
        axes = figure.add_subplot()
        axes.loglog([(i + 0.5) * BLOCK for i in range(len(self.means))], self.means, linewidth=1)
        axes.set(xlabel="step", ylabel="loss", title=f"Mean square error of the prediction, means of {BLOCK} steps")
        axes.grid(alpha=0.3, which="both")
        return plots.png(figure)


def check_pictures(plot: PathLike | None, evolution: PathLike | None, resume: bool, overwrite: bool) -> None:
    """Raises ``ValueError`` where a run's plot or growing picture cannot be drawn, or would replace another file."""
    if plot is not None:
        plots.check_plot("plot", plot, overwrite=resume or overwrite)
    if evolution is not None:
        images.check_png("evolution", evolution, overwrite=resume or overwrite)
        if resume:
            steps_of(evolution)


def steps_of(path: PathLike) -> list[int]:
    """Returns the steps whose samples a picture of :func:`add_row` shows, row by row; [] where there is no file.

    Raises:
        ValueError: the file is another picture, or none.
    """
    return [step for step, _ in _rows_of(path)]


def _rows_of(path: PathLike) -> list[tuple[int, Tensor]]:
    """Returns each row's step and samples [SHOWN, H, W, C]."""
    if not resolved(path).exists():
        return []
    try:
        with Image.open(path) as picture:
            steps = json.loads(picture.info[_KEY])["steps"]
            pixels = np.atleast_3d(np.asarray(picture))[::_ZOOM, ::_ZOOM]
        # Each image has a line of one pixel above it and to its left, and the last ones below and to the right too.
        channels, height = pixels.shape[2], (pixels.shape[0] - 1) // len(steps)
        cells = torch.from_numpy(pixels[1:, 1:].copy()).reshape(len(steps), height, SHOWN, -1, channels)
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise ValueError(f"evolution: {str(path)!r} is no picture of a run") from error
    return list(zip(steps, cells[:, :-1, :, :-1].transpose(1, 2), strict=True))


def add_row(path: PathLike, step: int, samples: Tensor) -> None:
    """Adds the first ``SHOWN`` of samples [N, H, W, C] uint8 below those of earlier steps, in one picture.

    Rows of this step and of later ones, which a run left that died before it saved them, go.

    Raises:
        ValueError: the file is there, and is no such picture.
    """
    rows = [(before, row) for before, row in _rows_of(path) if before < step] + [(step, samples[:SHOWN])]
    info = PngInfo()
    info.add_text(_KEY, json.dumps({"steps": [step for step, _ in rows]}))
    content = io.BytesIO()
    sheet = images.grid(torch.cat([row for _, row in rows]), SHOWN, zoom=_ZOOM)
    sheet.save(content, format="PNG", pnginfo=info)
    atomic_write(path, content.getvalue())
