"""Measures quality and speed of a model's samples for every sampler and number of steps."""

from __future__ import annotations

import dataclasses
import itertools
import operator
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ...ops.reverse_step.table import StepTable
from ...samplers.ddim import ddim
from ...samplers.ddpm import ddpm
from ...samplers.named import FEW_STEP_SAMPLERS
from ...sampling.guidance import guided_steps
from ...sampling.loop import sample
from ...schedules import Schedule
from .judge import FEATURES, SURE, Judge
from .kept import KeptCells
from .results import LARGE, LEARNED, Cell, Column, Evaluation

STEPS = (10, 20, 50, 100, 1000)
ROWS: tuple[float | str, ...] = (0.0, 0.2, 0.5, 1.0, LARGE, "dpm++")
SAMPLES = 200


def ancestral_table(
    schedule: Schedule, steps: int | None, variance: str, *, learned_variance: bool, **options: Any
) -> StepTable:
    """Returns DDPM with a fixed variance or the learned one, for a model that learns its variance or does not.

    Raises:
        ValueError: the learned variance of a model that has none; steps or options that do not fit the schedule.
    """
    if variance == LEARNED and not learned_variance:
        raise ValueError(f"{LEARNED} needs a model that learns its variance; got one that does not")
    table = ddpm(schedule, steps, variance=variance, **options)
    return dataclasses.replace(table, learned_variance=learned_variance)


def sampler_table(
    schedule: Schedule,
    row: float | str,
    steps: int,
    *,
    spacing: str = "leading",
    prediction: str = "epsilon",
    learned_variance: bool = False,
) -> StepTable:
    """Returns DDIM with ``row`` as eta, or DDPM with the variance ``row``, on the same timesteps.

    "fixed_large" is DDPM's larger variance, "learned_range" the model's; other rows ignore a learned variance. A name
    of ``FEW_STEP_SAMPLERS`` is that sampler, on noise levels of its own spacing.

    Raises:
        ValueError: ``row`` is none of these; steps or spacing do not fit the schedule.
    """
    if row in FEW_STEP_SAMPLERS:
        return FEW_STEP_SAMPLERS[str(row)](schedule, steps, prediction=prediction, learned_variance=learned_variance)
    kind: dict[str, Any] = {"learned_variance": learned_variance, "spacing": spacing, "prediction": prediction}
    if row in (LARGE, LEARNED):
        return ancestral_table(schedule, steps, str(row), **kind)
    if isinstance(row, str):
        names = ", ".join((LARGE, LEARNED, *FEW_STEP_SAMPLERS))
        raise ValueError(f"rows must be eta in [0, 1] or one of {names}; got {row!r}")
    return ddim(schedule, steps, eta=row, **kind)


def samples_of_columns(n: int | Sequence[int], steps: Sequence[int]) -> list[int]:
    """Returns the number of samples of each column, where ``n`` is one for all or one for each.

    Raises:
        ValueError: as many as neither, or fewer samples than a covariance needs.
    """
    numbers = [operator.index(n)] * len(steps) if not isinstance(n, Sequence) else list(map(operator.index, n))
    numbers = numbers * len(steps) if len(numbers) == 1 else numbers
    if len(numbers) != len(steps):
        raise ValueError(f"n must be one number, or one for each of the {len(steps)} steps; got {len(numbers)}")
    if min(numbers) < 2:
        raise ValueError(f"n must be at least 2, for a covariance; got {min(numbers)}")
    return numbers


class Strengths(NamedTuple):
    """Strengths of guidance, which are the rows of a table.

    Attributes:
        axis: what they are, "guidance" or "classifier scale".
        variants: options of ``sample`` by strength, ``model`` and ``model_kwargs`` among them.
    """

    axis: str
    variants: Mapping[float, Mapping[str, Any]]


class _Row(NamedTuple):
    """What draws the samples of a row: a sampler for each number of steps, and options of ``sample``, ``model`` too."""

    tables: Mapping[int, StepTable]
    options: Mapping[str, Any]

    @property
    def labels(self) -> Tensor | None:
        """Returns the classes that the samples are meant to have."""
        asked = self.options.get("model_kwargs") or {}
        found: Tensor | None = asked.get("label", asked.get("y"))
        return found

    def calls(self, steps: int) -> int:
        """Returns how often the model is called with a sample: twice where a step is guided."""
        table, guided = self.tables[steps], self.options.get("uncond_kwargs") is not None
        return len(table) + guided * sum(guided_steps(table, self.options.get("guidance_interval")))

    def first(self, n: int, most: int) -> dict[str, Any]:
        """Returns the options for the first ``n`` of ``most`` samples."""
        found = dict(self.options)
        for name in ("model_kwargs", "uncond_kwargs"):
            if arguments := found.get(name):
                cut = {k for k, v in arguments.items() if isinstance(v, Tensor) and v.ndim and len(v) == most}
                found[name] = {k: v[:n] if k in cut else v for k, v in arguments.items()}
        return found


@dataclasses.dataclass(frozen=True)
class _Cells:
    """Measures cells: draws the samples of a row and a column, and has them judged."""

    rows: dict[float | str, _Row]
    judge: Judge
    seed: int
    most: int

    def draw(self, row: _Row, table: StepTable, n: int) -> Tensor:
        """Returns the first n samples [n, C, H, W] on the CPU, for which it waits."""
        shape = (n, *self.judge.shape)
        return sample(shape_or_x=shape, table=table, seed=self.seed, **row.first(n, self.most)).cpu()

    def warm_up(self, table: StepTable) -> None:
        """Allocates memory and compiles kernels, once for options that several rows share."""
        for row in {id(row.options): row for row in self.rows.values()}.values():
            self.draw(row, table, self.most)

    def measure(self, row: float | str, column: Column) -> Cell | None:
        """Returns a cell, or None where the samples are not finite."""
        drawn, start = self.rows[row], time.perf_counter()
        images = self.draw(drawn, drawn.tables[column.steps], column.samples)
        speed = column.samples / (time.perf_counter() - start)
        if not torch.isfinite(images).all():
            return None
        labels = None if drawn.labels is None else drawn.labels[: column.samples]
        return Cell(row, column.steps, self.judge.measure(images, labels), speed)


def evaluate(
    model: nn.Module,
    schedule: Schedule,
    judge: Judge,
    *,
    n: int | Sequence[int] = SAMPLES,
    steps: Sequence[int] = STEPS,
    rows: Sequence[float | str] = ROWS,
    prediction: str = "epsilon",
    learned_variance: bool = False,
    spacing: str = "leading",
    seed: int = 0,
    progress: bool = False,
    kept: KeptCells | None = None,
    strengths: Strengths | None = None,
    **options: Any,
) -> Evaluation:
    r"""Measures distance, accuracy, confidence and images/s in the layout of table 1 of DDIM (Song et al., 2021).

    The distance of n samples is biased upwards, more for smaller n. The floor is therefore the distance of
    as many real images, of the classes that the samples have (:meth:`Judge.floor`).

    Args:
        model: an epsilon, x_0 or v model (``prediction``) trained on ``schedule``.
        judge: holds the real images, and the classifier in whose features samples are compared with them.
        n: samples per cell, at least 2: a number, or one for each column. Of fewer samples than another column has,
            the images are the first of that column.
        steps: the columns, which differ: model calls per sample, in [1, T].
        rows: DDIM's eta in [0, 1]; "fixed_large": DDPM with the larger variance, \hat\sigma in the paper;
            "learned_range": DDPM with the model's variance; or a name of ``FEW_STEP_SAMPLERS``, such as "dpm++".
        learned_variance: the model's output is [N, 2 C, ...], its second half the variance of the row "learned_range".
        spacing: of DDIM's and DDPM's timesteps, see :func:`dd_kernels.timestep_sequence`; "leading" is the paper's
            floor(c i).
        seed: of the samples; all cells start from the same x_T.
        progress: show a tqdm bar.
        kept: keeps every cell once it is measured, and knows those that an earlier run has measured.
        strengths: of guidance, which are the rows in place of ``rows``, of which there is one, the sampler of all.
        options: batch_size, model_kwargs (of the largest n), backend and those of guidance, as in
            :func:`dd_kernels.sample`.

    Raises:
        ValueError, TypeError: an argument out of range; samples that are not finite.
    """
    numbers, steps = samples_of_columns(n, steps), list(map(operator.index, steps))
    for name, values in (("steps", steps), ("rows", rows)):
        if len(set(values)) < len(values):
            raise ValueError(f"{name} must differ from one another; got {list(values)}")

    def table_of(row: float | str, steps: int) -> StepTable:
        kind = {"spacing": spacing, "prediction": prediction}
        return sampler_table(schedule, row, steps, learned_variance=learned_variance, **kind)

    # Builds all tables first, so that a sampler that does not fit the schedule raises before the first model call.
    tables = {row: {count: table_of(row, count) for count in steps} for row in rows}
    columns = [Column(count, number, judge.floor(number)) for count, number in zip(steps, numbers, strict=True)]
    settings = {"seed": operator.index(seed), "timesteps": len(schedule), "spacing": spacing}
    settings |= {"prediction": prediction, "learned_variance": learned_variance}
    settings |= {"classifier_seed": judge.seed, "judge": judge.digest()}
    own = {"model": model, **options}
    drawn: dict[float | str, _Row] = {row: _Row(tables[row], own) for row in rows}
    if strengths is not None:
        (sampler,) = rows
        settings |= {"axis": strengths.axis, "sampler": sampler}
        drawn = {s: _Row(tables[sampler], {**own, **variant}) for s, variant in strengths.variants.items()}
    result = Evaluation(list(drawn), columns, [], judge.all_held_out, FEATURES, SURE, settings)
    _fill(result, _Cells(drawn, judge, seed, max(numbers)), table_of(0.0, 1), kept, progress)
    return result


def _fill(result: Evaluation, cells: _Cells, quick: StepTable, kept: KeptCells | None, progress: bool) -> None:
    """Measures all cells of an evaluation that are not known, after a warm-up by a ``quick`` sampler."""
    known = {(cell.row, cell.steps): cell for cell in (kept.begin(result) if kept is not None else ())}
    if len(known) < len(result.rows) * len(result.columns):
        cells.warm_up(quick)
    calls = {(row, c.steps): c.samples * cells.rows[row].calls(c.steps) for row in result.rows for c in result.columns}
    with tqdm(total=sum(calls.values()), desc="evaluating", unit="call", unit_scale=True, disable=not progress) as bar:
        for row, column in itertools.product(result.rows, result.columns):
            place = result.place(row, column.steps)
            bar.set_postfix_str(place)
            cell = known.get((row, column.steps)) or cells.measure(row, column)
            if cell is None:
                raise ValueError(f"model must draw finite samples; got NaN or inf, {place}")
            result.cells.append(cell)
            if kept is not None and (row, column.steps) not in known:
                kept.keep(result)
            bar.update(calls[row, column.steps])
