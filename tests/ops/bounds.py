"""How far a step and q_sample may be from the exact result: of every element, by counting the roundings that make it.

With u = 2^-24 a float32 operation returns its exact result times (1 + d), |d| <= u. n of them in a row give a factor
within gamma(n) = n u / (1 - n u) of 1 (Higham, 2002, lemma 3.1); the coefficients, float64 rounded to float32, count
as one each. Every count here is at least that of each backend, which differ in the order of operations and in fma.
All arguments are float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dd_kernels.ops.reverse_step.table import COLUMNS, StepTable

UNIT = 2.0**-24
KEPT = ("prev_from_last", "prev_from_older")  # what multiplies x_0 of the last step, and of the one before
EXP_ROUNDINGS = 8  # bounds exp on every backend: 2 ulp of its own, and the rounding of its argument


def gamma(n: int) -> float:
    return n * UNIT / (1 - n * UNIT)


def unit(roundings: int, isa: str | None) -> float:
    """Returns the relative error of so many roundings in float32; twice as many where a multiply-add takes two."""
    return gamma(roundings * (2 if isa == "baseline" else 1))


def rounded(value: Tensor, error: Tensor, dtype: torch.dtype, truncated: bool) -> Tensor:
    """The error after rounding to dtype; truncated: cut instead, as Triton's interpreter does."""
    info = torch.finfo(dtype)
    return error + (value.abs() + error) * info.eps / (1 if truncated else 2) + info.smallest_normal * info.eps


def q_sample_error(x: Tensor, z: Tensor, rows: Tensor, noise_error: float) -> Tensor:
    """Returns the error of x_t before it is rounded; rows [N, 2], ``noise_error`` is that of a drawn z."""
    signal, noise = (column.reshape(-1, *[1] * (x.ndim - 1)) for column in rows.unbind(1))
    return gamma(4) * ((signal * x).abs() + (noise * z).abs()) + noise.abs() * noise_error


def _threshold_error(e0: Tensor, threshold: Tensor) -> Tensor:
    """Returns the error of a quantile, which moves no further than the values do, and is interpolated in float32."""
    return e0.flatten(1).amax(1).reshape(threshold.shape) + gamma(4) * threshold


def reverse_step_error(
    table: StepTable,
    steps: Tensor,
    x: Tensor,
    out: Tensor,
    *,
    variance: Tensor | None = None,
    uncond: Tensor | None = None,
    scale: float = 1.0,
    z: Tensor | None = None,
    noise_error: float = 0.0,
    threshold: Tensor | None = None,
    earlier: tuple[Tensor, ...] = (),
    e_x: Tensor | float = 0.0,
    e_out: Tensor | float = 0.0,
    e_variance: Tensor | float = 0.0,
    e_earlier: tuple[Tensor, ...] = (),
    more: int = 0,
) -> tuple[Tensor, Tensor]:
    """Returns the errors of x_prev and x_0 before they are rounded; steps [N], threshold [N, 1, ...] is the exact one.

    ``earlier`` is x_0 of the last step, and of the one before; ``e_x``, ``e_out`` (after guidance), ``e_variance`` and
    ``e_earlier`` are errors of the arguments, and ``more`` counts roundings of the coefficients on top of their one.
    """
    columns = table.rows[steps].reshape(len(steps), len(COLUMNS), *[1] * (x.ndim - 1))
    row = {name: columns[:, i] for i, name in enumerate(COLUMNS)}
    guided, e_out = out, e_out + torch.zeros_like(out)
    if uncond is not None:
        guided = uncond + scale * (out - uncond)
        e_out = (1 + gamma(4)) * e_out + gamma(4) * (uncond.abs() + abs(scale) * (out.abs() + uncond.abs()))
    size = guided.abs() + e_out

    numerator, denominator = row["x0_num_x"] * x + row["x0_num_out"] * guided, row["x0_den"].abs()
    terms = (row["x0_num_x"] * x).abs() + row["x0_num_out"].abs() * size
    passed_on = row["x0_num_out"].abs() * e_out + row["x0_num_x"].abs() * e_x
    e_numerator = gamma(8 + more) * terms + (1 + gamma(8 + more)) * passed_on
    x0, e0 = numerator / row["x0_den"], e_numerator / denominator
    if threshold is None:
        limit = row["x0_clip"].expand_as(x0)
        x0 = x0.clamp(-limit, limit)
        is_clipped = numerator.abs() - e_numerator >= limit * denominator  # by the kernel too
        e0 = torch.where(is_clipped, 0.0, e0).minimum(2 * limit)
        e0 = e0 + torch.where(limit.isfinite(), UNIT * limit, 0.0)
    else:
        e_limit = _threshold_error(e0, threshold)
        x0 = x0.clamp(-threshold, threshold) / threshold
        e0 = (e0 + 2 * e_limit) / (threshold - e_limit).clamp(min=min(1.0, table.threshold.max_value)) + gamma(4)

    sigma, e_sigma = row["sigma"], torch.zeros_like(x)
    if variance is not None:
        low, high, fraction = row["log_var_min"], row["log_var_max"], (variance + 1) / 2
        sigma = sigma * torch.exp(0.5 * (low + fraction * (high - low)))
        range_size, e_fraction = high.abs() + low.abs(), (1 + gamma(6)) * e_variance / 2
        e_exponent = 0.5 * (
            gamma(6) * (low.abs() + (fraction.abs() + 1) * range_size) + e_fraction * (high - low).abs()
        )
        e_sigma = sigma * torch.expm1(e_exponent + gamma(EXP_ROUNDINGS))
    noise = torch.zeros_like(x) if z is None else z
    sum_of_terms = (
        row["prev_from_x0"].abs() * (x0.abs() + e0)
        + row["prev_from_x"].abs() * (x.abs() + e_x)
        + row["prev_from_out"].abs() * size
        + (sigma + e_sigma) * noise.abs()
        + sum((row[name] * x0).abs() for name, x0 in zip(KEPT, earlier, strict=False))
    )
    error = gamma(8 + more) * sum_of_terms + row["prev_from_x0"].abs() * e0 + row["prev_from_out"].abs() * e_out
    error = error + row["prev_from_x"].abs() * e_x
    for name, e_kept in zip(KEPT, e_earlier, strict=False):
        error = error + torch.where(row[name] == 0, 0.0, (1 + gamma(8 + more)) * row[name].abs() * e_kept)
    return error + e_sigma * noise.abs() + (sigma + e_sigma) * noise_error, e0


def assert_within(actual: Tensor, exact: Tensor, error: Tensor, truncated: bool = False) -> None:
    """Every element of ``actual`` is within ``error``, and the rounding to its dtype, of the exact one."""
    assert actual.shape == exact.shape
    allowed = rounded(exact, error, actual.dtype, truncated)
    assert ((actual.double() - exact).abs() <= allowed).all(), ((actual.double() - exact).abs() / allowed).max()
