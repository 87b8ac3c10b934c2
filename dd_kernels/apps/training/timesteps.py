"""Which timesteps a batch is trained at: all alike, or those oftener whose losses are large."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

TIMESTEPS = ("uniform", "loss-second-moment")
KEPT = 10
"""How many losses of each timestep are kept, as in improved DDPM's code."""
UNIFORM_SHARE = 1e-3
"""The share of the draws that stays uniform, so that no timestep is forgotten; as there."""


def uniform(words: Tensor, num_timesteps: int) -> Tensor:
    """Returns timesteps [N], uniform on [0, T) for words [N] uniform on [0, 2^32)."""
    return words * num_timesteps >> 32


class LossHistory:
    r"""Importance sampling of timesteps, eq. 18 of Improved DDPM (Nichol & Dhariwal, 2021).

    .. math:: L = E_{t \sim p}\left[\frac{L_t}{T\, p_t}\right], \qquad p_t \propto \sqrt{E[L_t^2]}, \quad \sum_t p_t = 1

    with E[L_t^2] over the last ten losses of timestep t. Until every timestep has ten, timesteps are uniform.

    Attributes:
        losses: [T, 10] float32, oldest first; -1 where there has been none. It is the whole state.
    """

    def __init__(self, num_timesteps: int) -> None:
        self.losses = torch.full((num_timesteps, KEPT), -1.0)

    def probabilities(self) -> np.ndarray:
        """Returns p_t, float64 [T]."""
        losses = self.losses.numpy().astype(np.float64)
        count = len(losses)
        root = np.sqrt(np.mean(losses**2, axis=1))
        if losses.min() < 0 or not 0 < root.sum() < np.inf:
            return np.full(count, 1 / count)
        return (1 - UNIFORM_SHARE) * root / root.sum() + UNIFORM_SHARE / count

    def draw(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """Returns timesteps [N] for words [N] uniform on [0, 2^32), and the weights 1 / (T p_t) of their losses."""
        p = self.probabilities()
        below = np.cumsum(p)
        # The middle of a word's interval lies inside (0, 1), and so below the last sum, which the division makes 1.
        t = np.searchsorted(below / below[-1], (words.numpy() + 0.5) / 2**32, side="right")
        return torch.from_numpy(t), torch.from_numpy(1 / (len(p) * p[t])).to(torch.float32)

    def add(self, t: Tensor, losses: Tensor) -> None:
        """Takes up the losses [N] of timesteps t [N], in order; each drives out the oldest of its timestep."""
        kept = self.losses.numpy()
        for timestep, loss in zip(t.tolist(), losses.tolist(), strict=True):
            kept[timestep, :-1] = kept[timestep, 1:]
            kept[timestep, -1] = loss
