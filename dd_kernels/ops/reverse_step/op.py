"""reverse_step as an operator of PyTorch: its schema and its arguments."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..tracing import operator, untraced

OP = operator(
    "reverse_step",
    "(Tensor x, Tensor out, Tensor? variance, Tensor? uncond, float guidance_scale, Tensor? noise, "
    "Tensor? threshold, Tensor rows, Tensor timesteps, Tensor step, Tensor? key, "
    "Tensor(a!) x_prev, Tensor(b!)? x0=None, Tensor(c!)? even=None, Tensor(d!)? odd=None) -> ()",
)
UNTRACED = untraced(OP)


class Arguments(NamedTuple):
    """A checked call, in the order of the schema; the reference makes its own outputs."""

    x: Tensor
    out: Tensor
    variance: Tensor | None  # what the model says of the variance, in [-1, 1]
    uncond: Tensor | None
    guidance_scale: float
    noise: Tensor | None
    threshold: Tensor | None  # [N], of dynamic thresholding
    rows: Tensor  # [S, columns]
    timesteps: Tensor  # int64 [S]
    step: Tensor  # int64, [1] or [N]
    key: Tensor | None  # int64 [3]: seed, first_sample, draw
    x_prev: Tensor | None = None
    x0: Tensor | None = None
    even: Tensor | None = None  # x0 of earlier steps: of the last step; where there is an odd, of the last even step
    odd: Tensor | None = None  # x0 of the last odd step
