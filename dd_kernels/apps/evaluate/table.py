"""Measures quality and speed of a model's samples for every sampler and number of steps."""

from __future__ import annotations

import dataclasses
import operator
import time
from collections.abc import Mapping, Sequence
from typing import Any

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
from .judge import FEATURES, SURE, Judge, Measures

LARGE, LEARNED = "fixed_large", "learned_range"
STEPS = (10, 20, 50, 100, 1000)
ROWS: tuple[float | str, ...] = (0.0, 0.2, 0.5, 1.0, LARGE, "dpm++")
SAMPLES = 200


def row_name(row: float | str) -> str:
    """Returns the title of a row."""
    if isinstance(row, str):
        return {LARGE: "DDPM, larger variance", LEARNED: "DDPM, learned variance"}.get(row, row)
    return f"eta {row:g}"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One sampler at one number of steps.

    Attributes:
        row: eta, "fixed_large" for DDPM with its larger variance, "learned_range" for DDPM with the model's, or a name
            of ``FEW_STEP_SAMPLERS``.
        steps: model calls per sample.
        measures: of the samples, beside the held-out images.
        images_per_second: of sampling alone.
    """

    row: float | str
    steps: int
    measures: Measures
    images_per_second: float


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The measurements of :func:`evaluate`.

    Attributes:
        cells: row by row, steps in the order asked for.
        samples: per cell.
        floor: the measures of as many real training images, of the classes that the samples have.
        held_out: those of the held-out images, whose ``right`` is the classifier's accuracy.
        features: dimension of the classifier's features.
        sure_probability: the least probability of a class at which the classifier counts as sure.
        settings: the other options that decide the figures, as plain JSON values.
    """

    cells: list[Cell]
    samples: int
    floor: Measures
    held_out: Measures
    features: int
    sure_probability: float
    settings: dict[str, Any]


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


def _calls(table: StepTable, options: Mapping[str, Any]) -> int:
    """Returns how often the model is called with a sample: twice where a step is guided."""
    guided = options.get("uncond_kwargs") is not None
    return len(table) + guided * sum(guided_steps(table, options.get("guidance_interval")))


def evaluate(
    model: nn.Module,
    schedule: Schedule,
    judge: Judge,
    *,
    n: int = SAMPLES,
    steps: Sequence[int] = STEPS,
    rows: Sequence[float | str] = ROWS,
    prediction: str = "epsilon",
    learned_variance: bool = False,
    spacing: str = "leading",
    seed: int = 0,
    progress: bool = False,
    **options: Any,
) -> Evaluation:
    r"""Measures distance, accuracy, confidence and images/s in the layout of table 1 of DDIM (Song et al., 2021).

    The distance of n samples is biased upwards, more for smaller n. The floor is therefore the distance of
    as many real images, of the classes that the samples have (:meth:`Judge.labels`).

    Args:
        model: an epsilon, x_0 or v model (``prediction``) trained on ``schedule``.
        judge: holds the real images, and the classifier in whose features samples are compared with them.
        n: samples per cell, at least 2.
        steps: the columns: model calls per sample, in [1, T].
        rows: DDIM's eta in [0, 1]; "fixed_large": DDPM with the larger variance, \hat\sigma in the paper;
            "learned_range": DDPM with the model's variance; or a name of ``FEW_STEP_SAMPLERS``, such as "dpm++".
        learned_variance: the model's output is [N, 2 C, ...], its second half the variance of the row "learned_range".
        spacing: of DDIM's and DDPM's timesteps, see :func:`dd_kernels.timestep_sequence`; "leading" is the paper's
            floor(c i).
        seed: of the samples; all cells start from the same x_T.
        progress: show a tqdm bar.
        options: batch_size, model_kwargs, backend and those of guidance, as in :func:`dd_kernels.sample`.

    Raises:
        ValueError, TypeError: an argument out of range; samples that are not finite.
    """
    n, asked = operator.index(n), options.get("model_kwargs", {})
    labels = asked.get("label", asked.get("y"))
    if n < 2:
        raise ValueError(f"n must be at least 2, for a covariance; got {n}")

    def table_of(row: float | str, steps: int) -> StepTable:
        kind = {"spacing": spacing, "prediction": prediction}
        return sampler_table(schedule, row, steps, learned_variance=learned_variance, **kind)

    # Builds all tables first, so that a sampler that does not fit the schedule raises before the first model call.
    plan = [(row, count, table_of(row, count)) for row in rows for count in map(operator.index, steps)]

    def draw(table: StepTable) -> Tensor:
        return sample(model, (n, *judge.shape), table, seed=seed, **options).cpu()  # waits for the device

    # Allocates memory and compiles kernels before the first cell is timed.
    draw(table_of(0.0, 1))
    calls = n * sum(_calls(table, options) for _, _, table in plan)
    bar = tqdm(total=calls, desc="evaluating", unit="call", unit_scale=True, disable=not progress)
    cells = []
    with bar:
        for row, count, table in plan:
            bar.set_postfix_str(f"{row_name(row)}, {count} steps")
            start = time.perf_counter()
            images = draw(table)
            speed = n / (time.perf_counter() - start)
            bar.update(n * _calls(table, options))
            if not torch.isfinite(images).all():
                raise ValueError(f"model must draw finite samples; got NaN or inf, {row_name(row)}, {count} steps")
            cells.append(Cell(row, count, judge.measure(images, labels), speed))
    settings = {"seed": operator.index(seed), "timesteps": len(schedule), "spacing": spacing}
    settings |= {"prediction": prediction, "learned_variance": learned_variance, "classifier_seed": judge.seed}
    floor, held_out = judge.real(judge.labels(n)), judge.all_held_out()
    return Evaluation(cells, n, floor, held_out, FEATURES, SURE, settings)
