"""How far float32 may be from float64 in any computation: a bound that is carried along while float64 runs it.

This is running error analysis (Higham, 2002, section 3.3). Every operation adds to the error that its arguments bring
the rounding of its result, u = 2^-24 of its size, and FUNCTION where it is an elementary function. A float64 tensor
from outside counts as one that float32 rounds once; one that is converted from float32 is exact. The bound holds for
every draw, and for sums in any order. reverse_step and q_sample count by their own bounds, of any backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from bounds import UNIT, gamma, q_sample_error, reverse_step_error, rounded
from budget import NORMAL_ERROR
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from dd_kernels import q_sample, randn, reverse_step
from dd_kernels.ops.randn import Stream
from dd_kernels.ops.reverse_step.threshold import dynamic_threshold

FUNCTION = 4 * UNIT  # relative: torch's vectorised functions are within two units in the last place
aten = torch.ops.aten

# What moves elements and computes nothing: an error moves with its element.
MOVES = {
    *(aten.alias, aten.cat, aten.clone, aten.detach, aten.expand, aten.flip, aten.index, aten.lift_fresh),
    *(aten.permute, aten.select, aten.slice, aten.split, aten.split_with_sizes, aten.squeeze, aten.stack, aten.t),
    *(aten.index_select, aten.transpose, aten.unbind, aten.unsqueeze, aten.view, aten._unsafe_view),
}
# What may write in place: dropout does, where it makes its factors, of which there is no view.
IN_PLACE = {aten.bernoulli_, aten.div_}
# What makes tensors of numbers, or of nothing.
FILLS = {
    *(aten.empty_like, aten.full, aten.full_like, aten.ones, aten.ones_like, aten.scalar_tensor, aten.zeros),
    aten.zeros_like,
}
COMPARISONS = {aten.ge, aten.gt, aten.le, aten.lt}

# How far an error e of the argument x moves a function's value: by its slope and its curvature, which is at most 1 for
# sine and cosine and 0.77 for tanh, and no further than their values lie apart.
FUNCTIONS: dict[Any, Callable[[Tensor, Tensor], Tensor]] = {
    aten.cos: lambda x, e: (x.sin().abs() * e + e.square() / 2).minimum(e).clamp(max=2),
    aten.exp: lambda x, e: x.exp() * torch.expm1(e),
    aten.expm1: lambda x, e: x.exp() * torch.expm1(e),
    aten.reciprocal: lambda x, e: torch.where(e < x.abs(), e / (x.abs() * (x.abs() - e)), torch.inf),
    aten.sin: lambda x, e: (x.cos().abs() * e + e.square() / 2).minimum(e).clamp(max=2),
    aten.sqrt: lambda x, e: (x.sqrt() - (x - e).clamp(min=0).sqrt()).maximum((x + e).sqrt() - x.sqrt()),
    aten.tanh: lambda x, e: (
        ((1 - x.tanh().square()) * e + 0.385 * e.square()).minimum(e).clamp(max=2)
    ),  # |tanh''| <= 0.77
}


def _sum(value: Tensor, a: Tensor, e_a: Tensor, b: Tensor, e_b: Tensor, alpha: float = 1.0) -> Tensor:
    return e_a + abs(alpha) * e_b


def _product(value: Tensor, a: Tensor, e_a: Tensor, b: Tensor, e_b: Tensor) -> Tensor:
    return a.abs() * e_b + b.abs() * e_a + e_a * e_b


def _quotient(value: Tensor, a: Tensor, e_a: Tensor, b: Tensor, e_b: Tensor) -> Tensor:
    return torch.where(e_b < b.abs(), (e_a + value.abs() * e_b) / (b.abs() - e_b), torch.inf)


def _power(value: Tensor, a: Tensor, e_a: Tensor, b: Tensor, e_b: Tensor) -> Tensor:
    """Returns the error of x^0.5, x^2 and x^3; of the two roundings of x^3 it counts one."""
    n = float(b)
    if n == 0.5:
        return FUNCTIONS[aten.sqrt](a, e_a) + FUNCTION * value  # torch's roots are not always rounded correctly
    assert n in (2, 3), f"the power {n} is not bounded"
    return (a.abs() + e_a) ** n - a.abs() ** n + (n - 2) * UNIT * (a.abs() + e_a) ** n


OPERATIONS: dict[Any, Callable[..., Tensor]] = {
    aten.add: _sum,
    aten.div: _quotient,
    aten.div_: _quotient,
    aten.mul: _product,
    aten.pow: _power,
    aten.rsub: _sum,
    aten.sub: _sum,
}


class UndecidedError(AssertionError):
    """A comparison, or a rounding to integers, that may turn out otherwise in float32: no bound holds."""


class RunningError(TorchDispatchMode):
    """Bounds the error in float32 of every float64 tensor that is computed in it."""

    def __init__(self) -> None:
        super().__init__()
        self._errors = WeakTensorKeyDictionary()
        self._floors = WeakTensorKeyDictionary()  # what a clamped tensor is at least, in float32 too

    def error(self, x: Tensor) -> Tensor:
        """Returns how far ``x`` may be off in float32: not at all where it is not float64."""
        if x.dtype is not torch.float64:
            return torch.zeros_like(x, dtype=torch.float64)
        known = self._errors.get(x)
        return UNIT * x.abs() if known is None else known

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        value = func(*args, **kwargs)
        name = func.overloadpacket
        results = value if isinstance(value, (tuple, list)) else (value,)
        if any(isinstance(x, Tensor) and x.dtype is torch.float64 for x in results):
            assert name in IN_PLACE or not func._schema.is_mutable, f"{name} writes in place, which is not followed"
            errors = self._of(name, func, value, args, kwargs)
            for x, e in zip(results, errors if isinstance(errors, (tuple, list)) else (errors,), strict=True):
                self._errors[x] = e
        elif name in COMPARISONS:
            self._check_decided(*map(self._operand, args))
        return value

    def _of(self, name: Any, func: Any, value: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Returns the errors of the results of one operation."""
        if name in MOVES:
            return func(*tree_map_only(Tensor, self._moved, args), **kwargs)
        if name in FILLS:
            return UNIT * value.abs()
        if name is aten.bernoulli_:
            return torch.zeros_like(value)
        if name is aten.round:
            self._check_decided(((args[0] - value).abs(), self.error(args[0])), self._operand(0.5))
            return torch.zeros_like(value)
        if name in (aten._to_copy, aten.abs, aten.neg):
            return self.error(args[0])
        if name in (aten.clamp, aten.clamp_min):
            return self._of_clamp(value, *args, **kwargs)
        if name is aten.log:
            return self._of_log(value, args[0])
        if name is aten.where:
            return torch.where(args[0], *(self._operand(x)[1] for x in args[1:]))
        if name in (aten.mean, aten.sum):
            return self._of_sum(func, value, args, kwargs)
        if name is aten.std:
            return self._of_deviation(value, *args, **kwargs)
        if name in (aten.bmm, aten.mm):
            return self._of_matmul(value, *args)
        if name in FUNCTIONS:
            error = FUNCTIONS[name](args[0], self.error(args[0])) + FUNCTION * value.abs()
        else:
            assert name in OPERATIONS, f"{name} is not bounded"
            error = OPERATIONS[name](value, *self._operand(args[0]), *self._operand(args[1]), *args[2:], **kwargs)
        return rounded(value, error, torch.float32, False)

    def _moved(self, x: Tensor) -> Tensor:
        """Returns the errors of numbers; indices stay themselves."""
        return self._operand(x)[1] if x.is_floating_point() else x

    def _operand(self, x: Tensor | float) -> tuple[Tensor, Tensor]:
        """Returns a tensor or a number, which float32 rounds, and its error."""
        if not isinstance(x, Tensor):
            number = torch.tensor(x, dtype=torch.float64)
            return number, (number.float().double() - number).abs()
        return x.double(), self.error(x)

    def _check_decided(self, one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> None:
        """Refuses a comparison that float32 may decide otherwise."""
        if not ((one[0] - other[0]).abs() >= one[1] + other[1]).all():
            raise UndecidedError("rounding decides a comparison")

    def _of_clamp(self, value: Tensor, x: Tensor, min: float | None = None, max: float | None = None) -> Tensor:
        """Returns an error that is 0 where float32 is beyond the limits too, but for the rounding of the limits."""
        e_x, e_value = self.error(x), torch.zeros_like(x)
        if min is not None:
            self._floors[value] = float(torch.tensor(min, dtype=torch.float32))
        for limit, beyond in ((min, -1), (max, 1)):
            if limit is not None:
                number, error = self._operand(limit)
                e_x = torch.where(beyond * (x - number) > e_x + error, 0.0, e_x)
                e_value = e_value.maximum(error)
        return e_x + e_value

    def _of_log(self, value: Tensor, x: Tensor) -> Tensor:
        e_x, floor = self.error(x), self._floors.get(x, 0.0)
        below = torch.log(x / (x - e_x).clamp(min=floor))
        error = torch.where(e_x == 0, 0.0, below.maximum(torch.log1p(e_x / x)))
        return rounded(value, error + FUNCTION * value.abs(), torch.float32, False)

    def _of_sum(self, func: Any, value: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        x, *rest = args
        terms = x.numel() // value.numel()
        return rounded(value, func(self.error(x) + gamma(terms) * x.abs(), *rest, **kwargs), torch.float32, False)

    def _of_deviation(self, value: Tensor, x: Tensor, axes: list[int], *, correction: int, keepdim: bool) -> Tensor:
        """Returns the error of a deviation: that of the values in the mean square, since the CPU sums in float64."""
        n = x.numel() // value.numel()
        moved = (self.error(x).square().sum(axes, keepdim=keepdim) / (n - correction)).sqrt()
        return rounded(value, moved, torch.float32, False)

    def _of_matmul(self, value: Tensor, a: Tensor, b: Tensor) -> Tensor:
        e_a, e_b = self.error(a), self.error(b)
        error = (a.abs() + e_a) @ e_b + e_a @ b.abs() + gamma(a.shape[-1]) * (a.abs() + e_a) @ (b.abs() + e_b)
        return rounded(value, error, torch.float32, False)

    def q_sample(self, x: Tensor, t: Any, table: Any, noise: Tensor) -> Tensor:
        """Runs :func:`dd_kernels.q_sample`, whose bound is its own."""
        with _disable_current_modes():
            value = q_sample(x, t, table, noise)
            rows = table.marginal[torch.as_tensor(t).reshape(-1).expand(len(x))]
            signal, sigma = (column.reshape(-1, *[1] * (x.ndim - 1)) for column in rows.unbind(1))
            passed_on = signal * self.error(x) + sigma * self._operand(noise)[1]
            error = q_sample_error(x, noise.double(), rows, 0.0) + (1 + gamma(4)) * passed_on
            self._errors[value] = rounded(value, error, torch.float32, False)
        return value

    def reverse_step(
        self,
        x: Tensor,
        out: Tensor,
        table: Any,
        row: Any,
        *,
        history: Sequence[Tensor] | None = None,
        return_x0: bool = False,
        x_prev: Tensor | None = None,
        backend: str = "auto",
        **options: Any,
    ) -> Any:
        """Runs :func:`dd_kernels.reverse_step`, whose bound is its own; writes x_{t-1} to a new tensor."""
        with _disable_current_modes():
            step = self._step(x, out, table, row, history or (), **options)
            errors = reverse_step_error(**step)
            value, x0 = reverse_step(x, out, table, row, history=history, return_x0=True, **options)
            for result, error in zip((value, x0), errors, strict=True):
                self._errors[result] = rounded(result, error, torch.float32, False)
            if table.history:
                assert history is not None
                written = history[int(step["steps"][0]) % table.history]  # x_0 of odd steps is kept second
                self._errors[written] = self._errors[x0]
        return (value, x0) if return_x0 else value

    def _step(
        self,
        x: Tensor,
        out: Tensor,
        table: Any,
        row: Any,
        history: Sequence[Tensor],
        *,
        noise: Tensor | None = None,
        seed: int | None = None,
        first_sample: int = 0,
        uncond: Tensor | None = None,
        guidance_scale: float = 1.0,
    ) -> dict[str, Any]:
        """Returns the arguments of reverse_step_error."""
        steps = torch.as_tensor(row).reshape(-1).expand(len(x))
        rows = table.rows.double()
        (out, e_out), (variance, e_variance) = self._operand(out), (None, 0.0)
        if uncond is not None:
            e_out = abs(1 - guidance_scale) * self.error(uncond) + abs(guidance_scale) * e_out
        if table.learned_variance:
            variance, e_variance = (y.chunk(2, 1)[1] for y in self._operand(out))
            out, e_out = out.chunk(2, 1)[0], e_out.chunk(2, 1)[0]
            uncond = None if uncond is None else uncond.chunk(2, 1)[0]
        threshold = None
        if table.threshold is not None:
            values = dynamic_threshold(x, out, uncond, guidance_scale, rows, steps, table.threshold)
            threshold = values.reshape(-1, *[1] * (x.ndim - 1))
        if noise is None and seed is not None and table.stochastic:
            noise = _drawn(x, table.timesteps[steps], seed, first_sample)
        kept = list(history)
        if len(kept) == 2 and int(steps[0]) % 2 == 0:
            kept.reverse()
        return {
            "table": SimpleNamespace(rows=rows, threshold=table.threshold),
            "steps": steps,
            "x": x,
            "out": out,
            "variance": variance,
            "uncond": uncond,
            "scale": guidance_scale,
            "z": None if noise is None else noise.double(),
            "noise_error": 0.0 if seed is None else NORMAL_ERROR,
            "threshold": threshold,
            "earlier": tuple(x0.nan_to_num() for x0 in kept),  # there may be anything before the first step
            "e_x": self.error(x),
            "e_out": e_out,
            "e_variance": e_variance,
            "e_earlier": tuple(self.error(x0).nan_to_num() for x0 in kept),
        }


def _drawn(x: Tensor, timesteps: Tensor, seed: int, first_sample: int) -> Tensor:
    """Returns the noise that a step draws, which depends on the timestep of each sample."""
    noise = [
        randn(x[:1].shape, seed=seed, first_sample=first_sample + n, draw=int(t), stream=Stream.REVERSE_STEP)
        for n, t in enumerate(timesteps)
    ]
    return torch.cat(noise)


@contextmanager
def running_error(*modules: ModuleType) -> Iterator[RunningError]:
    """Bounds what runs inside, and the steps and q_sample that these modules call."""
    with RunningError() as running, ExitStack() as patches:
        for module in modules:
            for name in {"q_sample", "reverse_step"} & vars(module).keys():
                patches.enter_context(patch.object(module, name, getattr(running, name)))
        yield running
