"""What an evaluation measures: cells of a table, whose columns are numbers of steps.

Its rows are samplers, or strengths of guidance of one sampler.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from .judge import Measures

LARGE, LEARNED = "fixed_large", "learned_range"


def row_name(row: float | str) -> str:
    """Returns the title of a row."""
    if isinstance(row, str):
        return {LARGE: "DDPM, larger variance", LEARNED: "DDPM, learned variance"}.get(row, row)
    return f"eta {row:g}"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One sampler at one number of steps, or at one strength.

    Attributes:
        row: eta, "fixed_large" for DDPM with its larger variance, "learned_range" for DDPM with the model's, or a name
            of ``FEW_STEP_SAMPLERS``; or the strength.
        steps: model calls per sample.
        measures: of the samples, beside the held-out images.
        images_per_second: of sampling alone.
    """

    row: float | str
    steps: int
    measures: Measures
    images_per_second: float

    @staticmethod
    def from_json(values: dict[str, Any]) -> Cell:
        """Returns the cell of which ``values`` are what JSON keeps."""
        return Cell(**{**values, "measures": Measures(**values["measures"])})


@dataclasses.dataclass(frozen=True)
class Column:
    """A number of steps.

    Attributes:
        steps: model calls per sample.
        samples: of each of its cells.
        floor: the measures of as many real training images, of the classes that the samples have.
    """

    steps: int
    samples: int
    floor: Measures


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The measurements of :func:`evaluate`.

    Attributes:
        rows, columns: of the table.
        cells: row by row; of an evaluation that was stopped, as many as it had measured.
        held_out: the measures of the held-out images, whose ``right`` is the classifier's accuracy.
        features: dimension of the classifier's features.
        sure_probability: the least probability of a class at which the classifier counts as sure.
        settings: the other options that decide the figures, as plain JSON values: where rows are strengths, "axis" says
            of what, and "sampler" is that of all rows.
    """

    rows: list[float | str]
    columns: list[Column]
    cells: list[Cell]
    held_out: Measures
    features: int
    sure_probability: float
    settings: dict[str, Any]

    @property
    def samplers(self) -> list[float | str]:
        """Returns the samplers of the rows, named as rows are."""
        return [self.settings["sampler"]] if "sampler" in self.settings else self.rows

    def place(self, row: float | str, steps: int) -> str:
        """Returns the title of a cell."""
        name = f"{self.settings['axis']} {row:g}" if "axis" in self.settings else row_name(row)
        return f"{name}, {steps} steps"
