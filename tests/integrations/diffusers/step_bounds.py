"""How far the schedulers may be from float64: the ops' own bounds, of what a scheduler calls the ops with.

diffusers in float64 is the truth. Its coefficients are float32 numbers there too, which this package computes by the
same operations and then folds: epsilon of x and x_0 becomes a part of the factors of both. Some of diffusers' samples
are float32 there too. Either rounds a term at most FOLDS times more than the op's own bound counts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[2] / "ops"))  # holds the ops' bounds

from bounds import KEPT, UNIT, gamma, q_sample_error, reverse_step_error, rounded

from dd_kernels import q_sample, reverse_step
from dd_kernels.integrations.diffusers import base
from dd_kernels.ops.reverse_step.reference import clip_x0, predict_x0
from dd_kernels.ops.reverse_step.table import COLUMNS
from dd_kernels.ops.reverse_step.threshold import dynamic_threshold

FOLDS = 4
LOGARITHM = 4 * UNIT  # relative: theirs and ours are each within a unit in the last place


class Result:
    """What an op returned, and how far it may be from the exact result before it is rounded to its dtype."""

    def __init__(self, value: Tensor, error: Tensor) -> None:
        self.value, self.error = value, error

    def is_of(self, x: Tensor) -> bool:
        """Returns whether ``x`` is this result, in its dtype or another."""
        return x.shape == self.value.shape and torch.equal(self.value.to(x.dtype), x)

    def allowed(self, exact: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns how far the result may be from the exact one, rounded to its own dtype and then to ``dtype``."""
        error = rounded(exact, self.error, self.value.dtype, False)
        return error if dtype is self.value.dtype else rounded(exact, error, dtype, False)


class Step:
    """One call of reverse_step, in float64."""

    def __init__(self, x: Tensor, out: Tensor, table: Any, row: int | Tensor, options: dict[str, Any]) -> None:
        self.x, self.out, self.variance = x.double(), out.double(), None
        if table.learned_variance:
            self.out, self.variance = self.out.chunk(2, 1)
        self.out_unit = torch.finfo(out.dtype).eps / 2
        noise = options["noise"]
        self.z = torch.zeros_like(self.x) if noise is None else noise.double()
        self.table = SimpleNamespace(rows=table.rows.double(), threshold=table.threshold)
        self.steps = torch.as_tensor(row).reshape(-1).expand(len(x))
        columns = self.table.rows[self.steps].reshape(len(x), len(COLUMNS), *[1] * (x.ndim - 1))
        self.row = dict(zip(COLUMNS, columns.unbind(1), strict=True))
        history = [x0.double() for x0 in options.get("history", ())]
        if len(history) == 2 and int(self.steps[0]) % 2 == 0:  # x_0 of odd steps is kept second
            history.reverse()
        self.threshold = self._threshold()
        self.x0 = clip_x0(predict_x0(self.x, self.out, self.row), self.row, self.threshold)
        # A step that does not read what is kept may find anything there.
        self.earlier = tuple(torch.where(self.row[n] == 0, 0.0, x0) for n, x0 in zip(KEPT, history, strict=False))

    def _threshold(self) -> Tensor | None:
        rule = self.table.threshold
        if rule is None:
            return None
        values = dynamic_threshold(self.x, self.out, None, 1.0, self.table.rows, self.steps, rule)
        return values.reshape(-1, *[1] * (self.x.ndim - 1))

    def errors(self, e_x: Tensor, e_kept: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Returns the errors of x_prev and x_0 before they are rounded, given those of x and of earlier x_0."""
        options = {"variance": self.variance, "z": self.z, "threshold": self.threshold, "earlier": self.earlier}
        errors = {"e_x": e_x, "e_earlier": tuple(e_kept), "more": FOLDS}
        error, e_x0 = reverse_step_error(self.table, self.steps, self.x, self.out, **options, **errors)
        # A part of prev_from_x0 that prev_from_x has taken over may cancel, and leaves its rounding.
        factor = 2 * gamma(FOLDS) * self.row["prev_from_x"].abs()
        return error + torch.where(factor == 0, 0.0, factor * self.x0.abs()) + self._of_deviation(), e_x0

    def _of_deviation(self) -> Tensor:
        """Returns the error of sigma z by the logarithms that sigma, or its range, is made of."""
        sigma, low, high = (self.row[name] for name in ("sigma", "log_var_min", "log_var_max"))
        if self.variance is None:
            exponent = torch.where(sigma == 0, 0.0, sigma.log().abs()) * LOGARITHM
        else:
            fraction = (self.variance + 1) / 2
            # The variance of "learned" is a logarithm that is rounded to the output's dtype.
            of_output = self.variance.abs() * (self.out_unit + LOGARITHM)
            exponent = 0.5 * (LOGARITHM * (low.abs() + (fraction.abs() + 1) * (high - low).abs()) + of_output)
            sigma = sigma * torch.exp(0.5 * (low + fraction * (high - low)))
        return sigma * torch.expm1(exponent + 2 * LOGARITHM) * self.z.abs()


class Calls:
    """The results of the ops that a scheduler of ours calls, and their errors."""

    def __init__(self) -> None:
        self.results: list[Result] = []
        self._e_kept: list[Tensor] = []  # the errors of x_0 of earlier steps, the last one first

    def result(self, x: Tensor) -> Result | None:
        """Returns the last result that ``x`` is, if it is one."""
        return next((result for result in reversed(self.results) if result.is_of(x)), None)

    def beyond(self, value: Tensor, exact: Tensor) -> str | None:
        """Returns how far ``value``, a result, is beyond its bound where its dtype has the exact number; None if not.

        What no op has made, such as Euler's scaled input, is a quotient of float32 whose divisor is rounded.
        """
        result = self.result(value) or Result(value, gamma(2) * exact.abs())
        excess = (value.double() - exact).abs() / result.allowed(exact, value.dtype)
        worst = excess[exact.abs() < torch.finfo(value.dtype).max].max().item() if exact.numel() else 0.0
        return None if worst <= 1 else f"{worst:.3g} times its bound from the exact result"

    def _error(self, x: Tensor) -> Tensor:
        """Returns the error of an argument, that of a result of an op before, or 0."""
        result = self.result(x)
        return torch.zeros_like(x, dtype=torch.float64) if result is None else result.allowed(x.double(), x.dtype)

    def q_sample(self, x: Tensor, t: Any, table: Any, noise: Tensor) -> Tensor:
        """Runs :func:`dd_kernels.q_sample`, and records it."""
        value = q_sample(x, t, table, noise)
        rows = table.marginal[torch.as_tensor(t).reshape(-1).expand(len(x))]
        factor = rows[:, 0].abs().reshape(-1, *[1] * (x.ndim - 1))
        error = q_sample_error(x.double(), noise.double(), rows, 0.0) + factor * self._error(x)
        self.results.append(Result(value, error))
        return value

    def reverse_step(self, x: Tensor, out: Tensor, table: Any, row: Any, **options: Any) -> Any:
        """Runs :func:`dd_kernels.reverse_step`, and records it."""
        step = Step(x, out, table, row, options)
        error, e_x0 = step.errors(self._error(x), self._e_kept)
        value = reverse_step(x, out, table, row, **options)
        self.results += map(Result, value, (error, e_x0)) if options["return_x0"] else [Result(value, error)]
        self._e_kept = [rounded(step.x0, e_x0, x.dtype, False), *self._e_kept[:1]]
        return value


@contextmanager
def recorded() -> Iterator[Calls]:
    """Records the ops' results while schedulers of ours run."""
    calls = Calls()
    with patch.multiple(base, q_sample=calls.q_sample, reverse_step=calls.reverse_step):
        yield calls
