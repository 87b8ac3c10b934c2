"""Reads the losses of a run from its device, and ends the run where they tell of divergence."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .trainer import Trainer, TrainingDivergedError

# The target of a prediction has a variance of at most 1, so a loss of 1 is that of predicting nothing.
DIVERGED = 10.0


class LossReader:
    """Reads losses from the device in blocks and keeps their running mean."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.unread: list[tuple[Tensor, Tensor]] = []

    def add(self, loss: Tensor, norm: Tensor) -> None:
        self.unread.append((loss, norm))

    def read(self) -> None:
        """Puts the unread losses into ``trainer.loss``.

        Raises:
            TrainingDivergedError: one is not finite, or their mean is above ``DIVERGED``. With fp16 the gradient may
                overflow: the scaler leaves such a step out.
        """
        if not self.unread:
            return
        losses, norms = (torch.stack(column).to("cpu") for column in zip(*self.unread, strict=True))
        losses = self.trainer.parallel.processes.summed(losses)  # each process has a share of the mean
        self.unread.clear()
        for step, (loss, norm) in enumerate(zip(losses.tolist(), norms.tolist(), strict=True), 1 - len(losses)):
            scaled = self.trainer.options.precision == "fp16"
            if not math.isfinite(loss) or not (scaled or math.isfinite(norm)):
                what = "gradient" if math.isfinite(loss) else "loss"
                raise TrainingDivergedError(f"the {what} of step {self.trainer.step + step} is not a number")
            self.trainer.curve.add(loss)
            old = self.trainer.loss
            self.trainer.loss = loss if math.isnan(old) else 0.99 * old + 0.01 * loss
        mean = float(losses.double().mean())
        if mean > DIVERGED:
            raise TrainingDivergedError(f"the loss is {mean:.3g} at step {self.trainer.step}")
