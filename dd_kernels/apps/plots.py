"""Figures of matplotlib, an optional package, as PNGs."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from .files import PathLike
from .images import check_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figure(width: float, height: float) -> Figure:
    """Returns an empty figure of so many inches, drawn without a display.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("a plot needs matplotlib: pip install 'dd_kernels[plots]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def check_plot(argument: str, path: PathLike, overwrite: bool = False) -> None:
    """Raises ``ValueError`` unless a plot can be drawn and written to ``path``, a .png."""
    check_png(argument, path, overwrite)
    figure(1, 1)


def png(drawn: Figure) -> bytes:
    """Returns a figure as a PNG file's content."""
    content = io.BytesIO()
    drawn.savefig(content, format="png", dpi=120)
    return content.getvalue()


def formula(tex: str) -> bytes:
    """Returns a formula, in the TeX that matplotlib reads, as a PNG file's content."""
    from matplotlib.mathtext import math_to_image

    content = io.BytesIO()
    math_to_image(f"${tex}$", content, dpi=130, format="png")
    return content.getvalue()
