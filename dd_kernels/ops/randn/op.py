"""randn as an operator of PyTorch: its schema and its arguments."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..tracing import operator

OP = operator(
    "randn",
    "(Tensor(a!) z, Tensor key, int stream) -> ()",
)


class Arguments(NamedTuple):
    """A checked call, in the order of the schema."""

    z: Tensor  # what is written
    key: Tensor  # int64 [3]: seed, first_sample, draw
    stream: int
