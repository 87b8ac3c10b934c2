"""randn as an operator of PyTorch: its schema, and what tracing sees of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

torch.library.define("dd_kernels::randn", "(Tensor(a!) z, Tensor key, int stream) -> ()")


@torch.library.register_fake("dd_kernels::randn")
def _(z: Tensor, key: Tensor, stream: int) -> None:
    return None


OP = torch.ops.dd_kernels.randn.default  # to look it up takes as long as a check


class Arguments(NamedTuple):
    """A checked call, in the order of the schema."""

    z: Tensor  # what is written
    key: Tensor  # int64 [3]: seed, first_sample, draw
    stream: int
