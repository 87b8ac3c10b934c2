"""q_sample as an operator of PyTorch: its schema and its arguments."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..tracing import operator, untraced

OP = operator(
    "q_sample",
    "(Tensor x_start, Tensor? noise, Tensor rows, Tensor t, Tensor? key, Tensor(a!) x_t, Tensor(b!)? noise_out) -> ()",
)
UNTRACED = untraced(OP)


class Arguments(NamedTuple):
    """A checked call, in the order of the schema; the reference makes its own outputs."""

    x_start: Tensor
    noise: Tensor | None
    rows: Tensor  # [T, 2]
    t: Tensor  # int64, [1] or [N]
    key: Tensor | None  # int64 [3]: seed, first_sample, draw
    x_t: Tensor | None = None
    noise_out: Tensor | None = None
