"""Accuracy and distance against the strength of guidance: the table, the figures and the plot."""

import io
import sys

import pytest
from PIL import Image

from dd_kernels.apps.evaluate import Cell, Column, Evaluation, Measures, strengths_markdown, strengths_png

REAL = Measures(200, 8.8, 0.5, 0.99, 0.989)
SETTINGS = {"seed": 0, "spacing": "leading", "timesteps": 1000, "axis": "guidance", "sampler": 0.0}
RUN = {"guidance": None, "guidance_rescale": 0.0, "guidance_interval": None, "classifier": None, "batch_size": 256}
RUN |= {"seconds": 1.0, "device": "cpu", "threads": 1, "backend": "cpu", "torch": "2", "model": "m", "dtype": "fp32"}


def found(right=0.75):
    distances = {3.0: 20.0, 1.0: 10.0}
    cells = [Cell(s, 25, Measures(200, d, 1.25, 0.5, right), 123.4) for s, d in distances.items()]
    return Evaluation(list(distances), [Column(25, 200, REAL)], cells, REAL, 16, 0.95, SETTINGS)


def test_the_table_has_a_row_for_each_strength_in_the_order_asked_for():
    lines = strengths_markdown(found(), RUN).splitlines()
    assert lines[0] == (
        "**eta 0, 25 steps, against the guidance** (held-out images: accuracy 98.9%; floor of the distance 8.8)"
    )
    assert [line for line in lines if line.startswith(("| 3", "| 1"))] == [
        "| 3 | 75.0% | 20.0 ± 1.2 | 50.0% | 123 |",
        "| 1 | 75.0% | 10.0 ± 1.2 | 50.0% | 123 |",
    ]
    assert "guidance of the row, batches of 256" in lines[-1]
    assert "| 3 | - |" in strengths_markdown(found(None), RUN)
    by = {**RUN, "guidance": 0.0, "classifier": "c.safetensors", "classifier_scale": None}
    assert "guidance 0, by c.safetensors with the scale of the row" in strengths_markdown(found(), by)


def test_the_plot_has_lines_for_real_images(monkeypatch):
    heights = []
    monkeypatch.setattr("matplotlib.axes.Axes.axhline", lambda axes, y, **style: heights.append(y))
    strengths_png(found())
    assert heights == pytest.approx([100 * REAL.right, REAL.distance])


def test_the_plot(monkeypatch):
    with Image.open(io.BytesIO(strengths_png(found()))) as picture:
        assert picture.width > 2 * 400
    assert strengths_png(found()) != strengths_png(found(None))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="a plot needs matplotlib"):
        strengths_png(found())
