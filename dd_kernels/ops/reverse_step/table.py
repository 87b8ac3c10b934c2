r"""A sampler is a table: DDPM, DDIM, inversion and every parameterisation as rows of one update.

.. math::
    x_0 &= clip\big((x0\_num\_x\, x_t + x0\_num\_out\, out) / x0\_den\big) \\
    x_{prev} &= prev\_from\_x0\, x_0 + prev\_from\_x\, x_t + prev\_from\_out\, out
        + prev\_from\_last\, x_0^{last} + prev\_from\_older\, x_0^{older} + \sigma z

x_0^{last} and x_0^{older} are x_0 of the step before and of the one before that, which multistep solvers keep. The
coefficients are computed here in float64 and read by :func:`dd_kernels.reverse_step` in float32.
Numerator and denominator of x_0 stay apart: at a step with alpha_bar = 0 (zero terminal SNR) the
quotient is +-inf, which clipping makes finite, where folded factors would give inf - inf.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..upload import PerDevice, real

# What the columns of a row hold; csrc/reverse_step/formula.h and triton.py count in this order.
COLUMNS = (
    "x0_num_x",
    "x0_num_out",
    "x0_den",
    "x0_clip",
    "prev_from_x0",
    "prev_from_x",
    "prev_from_out",
    "sigma",
    "log_var_min",
    "log_var_max",
    "prev_from_last",
    "prev_from_older",
)
_WITHOUT_HISTORY = COLUMNS.index("prev_from_last")  # columns of a table from before multistep solvers


@dataclass(frozen=True)
class DynamicThreshold:
    """Dynamic thresholding of x_0 (Imagen, Saharia et al., 2022, section 2.3).

    Each sample's x_0 is clipped to [-s, s] and divided by s, where s is the ``ratio`` quantile of
    \\|x_0\\|, at least 1 and at most ``max_value``.
    """

    ratio: float = 0.995
    max_value: float = float("inf")

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio must lie in (0, 1]; got {self.ratio}")
        if not self.max_value >= 1:
            raise ValueError(f"max_value must be at least 1; got {self.max_value}")


class DeviceTable(NamedTuple):
    """A table on a device: rows [S, 12] (float32), timesteps [S] and every step's index as a tensor [1].

    ``times`` [S] is what the model is called with, float32, or ``timesteps`` themselves.
    """

    rows: Tensor
    timesteps: Tensor
    steps: Sequence[Tensor]
    times: Tensor


@dataclass(frozen=True, eq=False)
class StepTable(PerDevice[DeviceTable]):
    """The coefficients of a sampler, one row per step, in the order in which steps are taken.

    Attributes:
        rows: [S, 12] float64 on the CPU (whatever float came is converted); the columns are named in ``COLUMNS``.
            [S, 10], a table without the last two columns, is taken as one with zeros there.
        timesteps: [S] int64 in [0, 2^32), what the model is called with (and the draw of the step's noise).
        times: [S] float64, what the model is called with where that is not ``timesteps``, or None.
        learned_variance: the model's output is [N, 2 C, ...], its second half the variance.
        threshold: dynamic thresholding, or None.
        stochastic: whether any step adds noise.
        history: how many x_0 of earlier steps the solver keeps: 0, 1 or 2.

    Raises:
        ValueError, TypeError: rows or timesteps of another shape, dtype or range.
    """

    rows: Tensor
    timesteps: Tensor
    learned_variance: bool = False
    threshold: DynamicThreshold | None = None
    times: Tensor | None = None
    stochastic: bool = field(init=False)
    history: int = field(init=False)
    _copies: dict[torch.device, DeviceTable] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        real(self._check)

    def _check(self) -> None:
        for name, value in (("rows", self.rows), ("timesteps", self.timesteps)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor; got {type(value).__name__}")
        rows, timesteps = self.rows.detach(), self.timesteps
        if not rows.is_floating_point():
            raise TypeError(f"rows must be of a floating dtype; got {rows.dtype}")
        if rows.ndim == 2 and rows.shape[1] == _WITHOUT_HISTORY:
            rows = torch.nn.functional.pad(rows, (0, len(COLUMNS) - _WITHOUT_HISTORY))
        if rows.ndim != 2 or rows.shape[1] != len(COLUMNS):
            raise ValueError(f"rows must have the shape [S, {len(COLUMNS)}]; got {list(rows.shape)}")
        if timesteps.shape != rows.shape[:1]:
            raise ValueError(f"timesteps must have the shape {list(rows.shape[:1])}; got {list(timesteps.shape)}")
        if timesteps.is_floating_point() or timesteps.is_complex() or timesteps.dtype is torch.bool:
            raise TypeError(f"timesteps must be integers; got {timesteps.dtype}")
        timesteps = timesteps.to("cpu", torch.int64).contiguous()
        if len(timesteps) > 0 and not (timesteps.min() >= 0 and timesteps.max() < 1 << 32):
            raise ValueError(f"timesteps must be in [0, 2^32); got {int(timesteps.min())} to {int(timesteps.max())}")
        object.__setattr__(self, "rows", rows.to("cpu", torch.float64).contiguous())
        object.__setattr__(self, "timesteps", timesteps)
        if self.times is not None:
            object.__setattr__(self, "times", _checked_times(self.times, len(timesteps)))
        object.__setattr__(self, "stochastic", bool((self.column("sigma") != 0).any()))
        last, older = (bool((self.column(name) != 0).any()) for name in COLUMNS[_WITHOUT_HISTORY:])
        object.__setattr__(self, "history", 2 if older else int(last))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, steps: slice) -> StepTable:
        """Returns the steps of a slice as a table, such as ``table[10:]``, whose noise is theirs in the whole table.

        Raises:
            TypeError: ``steps`` is no slice.
            ValueError: its first step reads x_0 of a step that is left out.
        """
        if not isinstance(steps, slice):
            raise TypeError(f"a table is cut by slices, such as table[10:]; got {type(steps).__name__}")
        times = None if self.times is None else self.times[steps]
        rows = self.rows[steps]
        if rows[:1, _WITHOUT_HISTORY:].any():
            raise ValueError(
                "the steps of a multistep solver cannot be cut where x_0 of an earlier step is read (a sampler's "
                f"timesteps= makes a table that starts there); got a cut before step {range(len(self))[steps][0]}"
            )
        return StepTable(rows, self.timesteps[steps], self.learned_variance, self.threshold, times)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.rows, self.timesteps, self.learned_variance, self.threshold, self.times)

    @property
    def model_times(self) -> Tensor:
        """What the model is called with at every step, [S] on the CPU: ``times``, or ``timesteps``."""
        return self.timesteps if self.times is None else self.times

    def column(self, name: str) -> Tensor:
        """One coefficient of every step, [S] float64."""
        return self.rows[:, COLUMNS.index(name)]

    def history_like(self, x: Tensor) -> tuple[Tensor, ...]:
        """Returns where :func:`dd_kernels.reverse_step` keeps the x_0 of earlier steps, of ``x``'s shape and layout."""
        return tuple(torch.empty_like(x) for _ in range(self.history))

    def copy_to(self, device: torch.device) -> DeviceTable:
        """Uploads the rows in float32."""
        steps = torch.arange(len(self)).to(device).split(1)
        timesteps = self.timesteps.to(device)
        times = timesteps if self.times is None else self.times.to(torch.float32).to(device)
        return DeviceTable(self.rows.to(torch.float32).to(device), timesteps, steps, times)


def _checked_times(times: Any, steps: int) -> Tensor:
    """Returns ``times`` as float64 [steps] on the CPU; raises unless it is that many finite floats."""
    if not isinstance(times, Tensor) or not times.is_floating_point():
        raise TypeError(f"times must be a floating torch.Tensor; got {getattr(times, 'dtype', type(times).__name__)}")
    if list(times.shape) != [steps]:
        raise ValueError(f"times must have the shape {[steps]}; got {list(times.shape)}")
    times = times.detach().to("cpu", torch.float64).contiguous()
    if not times.isfinite().all():
        raise ValueError(f"times must be finite; got {times.tolist()}")
    return times


def from_columns(
    timesteps: np.ndarray,
    *,
    learned_variance: bool = False,
    threshold: DynamicThreshold | None = None,
    times: np.ndarray | None = None,
    **columns: Any,
) -> StepTable:
    """A table from named columns (arrays [S] or numbers); those not named are 0, ``x0_den`` 1, ``x0_clip`` inf."""
    defaults = {"x0_den": 1.0, "x0_clip": np.inf}
    values = [np.broadcast_to(columns.pop(name, defaults.get(name, 0.0)), timesteps.shape) for name in COLUMNS]
    if columns:
        raise TypeError(f"a table has the columns {', '.join(COLUMNS)}; got {', '.join(columns)}")
    rows = np.stack(values, axis=1).astype(np.float64)
    if threshold is not None:
        # There is no quantile of x_0 = +-inf; a finite x_0 as large is clipped to the same.
        denominator = rows[:, COLUMNS.index("x0_den")]
        np.maximum(denominator, 2.0**-64, out=denominator)

    def make() -> StepTable:
        steps = torch.from_numpy(timesteps.astype(np.int64))
        model_times = None if times is None else torch.from_numpy(times.astype(np.float64))
        return StepTable(torch.from_numpy(rows), steps, learned_variance, threshold, model_times)

    return real(make)
