"""Moving averages of the weights in training, at one horizon or several."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from ...nn import UNet
from ..checkpoint import average_prefix


class Averages:
    """Exponential moving averages of a model's weights, one for each decay.

    Attributes:
        models: the averages, in the order of the decays.
    """

    def __init__(self, model: UNet, decays: Sequence[float]) -> None:
        self.decays = tuple(decays)
        self.models = [copy.deepcopy(model).eval().requires_grad_(False) for _ in decays]

    @torch.no_grad()
    def update(self, model: UNet, step: int) -> None:
        """Takes up the weights after step ``step``; a decay grows with the steps, so that the first weights go soon."""
        for decay, average in zip(self.decays, self.models, strict=True):
            now = min(decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - now)

    def weights(self) -> dict[str, Tensor]:
        """Returns all averages as a model file names them: the first as the model, the others behind their decays."""
        found = dict(self.models[0].state_dict())
        for decay, average in zip(self.decays[1:], self.models[1:], strict=True):
            found |= {f"{average_prefix(decay)}{name}": value for name, value in average.state_dict().items()}
        return found
