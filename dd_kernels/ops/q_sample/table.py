"""The table of q_sample: what multiplies x_0 and the noise at every timestep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..upload import PerDevice


class DeviceMarginal(NamedTuple):
    """A marginal table on a device: rows [T, 2] (float32), and every timestep as a tensor [1]."""

    rows: Tensor
    steps: Sequence[Tensor]


class MarginalTable(PerDevice[DeviceMarginal]):
    r"""The marginals q(x_t | x_0) of a forward process with T timesteps.

    Attributes:
        marginal: float64 tensor [T, 2] on the CPU, the factors of x_0 and of the noise:
            \sqrt{\bar\alpha_t} and \sqrt{1 - \bar\alpha_t}.
    """

    def __init__(self, marginal: Tensor) -> None:
        self.marginal = marginal
        self._copies = {}

    def __len__(self) -> int:
        return len(self.marginal)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.marginal,)

    def copy_to(self, device: torch.device) -> DeviceMarginal:
        """Uploads the rows in float32."""
        steps = torch.arange(len(self)).to(device).split(1)
        return DeviceMarginal(self.marginal.to(torch.float32).to(device), steps)
