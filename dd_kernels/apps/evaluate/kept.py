"""Keeps the cells of an evaluation in its JSON file, from which the same command goes on after it was stopped."""

from __future__ import annotations

import json
import pathlib
import time
from typing import Any

from ..differences import differences
from ..files import PathLike, atomic_write, check_readable
from .report import as_json
from .results import Cell, Evaluation

_NOT_OPTIONS = ("seconds",)  # of a run's description, what the next run does not share


class KeptCells:
    """The JSON file of an evaluation, which holds each cell from the moment that it is measured.

    Args:
        path: of the file.
        run: what the evaluation runs on, and with what options, as plain JSON values.
        resume: go on from the file where it is there, in place of replacing it.

    Attributes:
        seconds_before: how long the runs took that the file is from.
    """

    def __init__(self, path: PathLike, run: dict[str, Any], resume: bool) -> None:
        self.path, self.run, self.resume = pathlib.Path(path), run, resume
        self.seconds_before = 0.0
        self._start = time.perf_counter()

    def begin(self, planned: Evaluation) -> list[Cell]:
        """Returns the cells that the file holds of an evaluation of which none is measured yet.

        Raises:
            ValueError: the file holds no evaluation, or one of other options; the message names what differs.
        """
        if not self.resume or not self.path.exists():
            return []
        content = check_readable("--out", self.path).read_bytes()
        wanted = json.loads(as_json(planned, self.run))
        try:
            found = json.loads(content)
            cells = {(cell.row, cell.steps): cell for cell in map(Cell.from_json, found["cells"])}
            different = differences(_options(found), _options(wanted))
            self.seconds_before = float(found["run"]["seconds"])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"--out: {str(self.path)!r} holds no evaluation to go on with: {error!r}") from error
        if different:
            raise ValueError(f"--out: {str(self.path)!r} holds another evaluation; {different}")
        return list(cells.values())

    def keep(self, so_far: Evaluation) -> None:
        """Writes the evaluation with the cells that are measured."""
        seconds = round(self.seconds_before + time.perf_counter() - self._start, 1)
        atomic_write(self.path, as_json(so_far, {**self.run, "seconds": seconds}).encode())


def _options(document: dict[str, Any]) -> dict[str, Any]:
    """Returns everything of an evaluation's JSON that decides its figures, by name."""
    columns = {name: [column[name] for column in document["columns"]] for name in ("steps", "samples")}
    options = {"rows": document["rows"], **columns, **document["settings"], **document["run"]}
    return {name: value for name, value in options.items() if name not in _NOT_OPTIONS}
