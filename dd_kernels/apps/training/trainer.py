"""One training step, and a state that a resumed run continues from to the same bits.

No random generator has a state: the images of a step, their timesteps, noise, dropped labels and flips, and the seed of
dropout are functions of (seed, step). So a training state is weights, moments and a number of steps.
"""

from __future__ import annotations

import math
import pathlib
import signal
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from ...ops import q_sample, randn
from ...ops.randn import Stream
from ...schedules import named_schedule
from .. import checkpoint, data
from ..checkpoint import ModelInfo
from ..data import ImageData
from ..files import PathLike
from .averages import Averages
from .curve import LossCurve
from .model import build_model
from .objective import Diffused, losses_of
from .options import PRECISIONS, TrainOptions
from .timesteps import LossHistory, uniform


class TrainingDivergedError(RuntimeError):
    """The loss, its gradient or the weights are not numbers, or the loss is far above that of predicting nothing."""


@dataclass(frozen=True)
class Batch:
    """The data of one step: x_0 [N, C, H, W] in [-1, 1], t [N], labels [N] or None, weights of the losses [N]."""

    x_start: Tensor
    t: Tensor
    labels: Tensor | None
    weights: Tensor


def make_batch(
    dataset: ImageData, options: TrainOptions, null_label: int | None, step: int, history: LossHistory | None = None
) -> Batch:
    """Returns the batch of step ``step``, on the CPU: a function of (data, options, step), and of ``history``.

    With a history of losses the timesteps and weights are those of importance sampling; else timesteps are uniform.
    """
    size, seed = options.batch_size, options.seed

    def words(stream: int) -> Tensor:
        return data.uniform_words(size, seed=seed, draw=step, stream=stream)

    x_start, labels = dataset.batch(data.positions(dataset, step * size, size, seed=seed))
    if options.flip:
        mirrored = (words(Stream.FLIP) & 1).bool()[:, None, None, None]
        x_start = torch.where(mirrored, x_start.flip(-1), x_start)
    if options.unconditional:
        labels = None
    if labels is not None and null_label is not None:
        dropped = words(Stream.LABEL_DROP) < options.label_drop * 2**32
        labels = torch.where(dropped, null_label, labels)
    of_t = words(Stream.TIMESTEPS)
    if history is not None:
        t, weights = history.draw(of_t)
    else:
        t, weights = uniform(of_t, options.num_timesteps), torch.ones(size)
    return Batch(x_start, t, labels, weights)


def seed_torch(seed: int, step: int) -> None:
    """Makes dropout's masks, and every other draw from torch's generator, depend on the seed and the step alone."""
    torch.manual_seed((seed * 0x9E3779B97F4A7C15 + step) % 2**63)


class Trainer:
    """Weights, their averages, the optimizer and a step count.

    Attributes:
        model, ema: the weights in training and their first average; ``info`` describes both.
        averages: all averages.
        history: the losses of every timestep, where timesteps are drawn by them.
        step: steps done.
        loss: running mean over about 100 steps, NaN before the first.
        curve: the loss of every step so far.
        stopped_by: the signal that ended :func:`train` early, or None.
    """

    def __init__(self, options: TrainOptions, dataset: ImageData, device: torch.device) -> None:
        self.options, self.dataset, self.device = options, dataset, device
        model, self.info = build_model(options, dataset)
        self.model = model.to(device).train()
        self.averages = Averages(self.model, options.ema)
        self.ema = self.averages.models[0]
        by_loss = options.timesteps == "loss-second-moment"
        self.history = LossHistory(options.num_timesteps) if by_loss else None
        self.schedule = named_schedule(options.schedule, options.num_timesteps)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=options.lr,
            betas=(options.beta1, options.beta2),
            weight_decay=options.weight_decay,
            fused=device.type in ("cpu", "cuda"),
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=options.precision == "fp16")
        self.step = 0
        self.loss = math.nan
        self.curve = LossCurve()
        self.stopped_by: signal.Signals | None = None

    def train_step(self) -> tuple[Tensor, Tensor]:
        """Makes one step of algorithm 1 of DDPM; returns L_simple and the gradient's norm, which stay on the device.

        L_simple is comparable between runs whatever they minimise, which counts only where it is no number.
        """
        options = self.options
        seed_torch(options.seed, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = options.learning_rate(self.step)
        simple, loss = self._losses(make_batch(self.dataset, options, self.model.null_label, self.step, self.history))
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), options.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.averages.update(self.model, self.step)
        self.step += 1
        return torch.where(loss.isfinite(), simple, loss).detach(), norm.detach()

    def _losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns the batch's L_simple and what is minimised."""
        x_start, t = batch.x_start.to(self.device), batch.t.to(self.device)
        labels = None if batch.labels is None else batch.labels.to(self.device)
        x_t, noise = self._diffused(x_start, t)
        dtype = PRECISIONS[self.options.precision]
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32):
            out = self.model(x_t, t, labels)
        asked, levels = Diffused(x_start, x_t, noise, t), self.dataset.maximum + 1
        losses = losses_of(out.float(), asked, self.schedule, self.options, levels)
        if self.history is None:
            return losses.simple.mean(), losses.minimised.mean()
        self.history.add(batch.t, losses.minimised.detach())
        weights = batch.weights.to(self.device)
        return (weights * losses.simple).mean(), (weights * losses.minimised).mean()

    def _diffused(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns x_t and the noise that the model is asked for; with input perturbation x_t holds more than that."""
        seed, draw, gamma = self.options.seed, self.step, self.options.input_perturbation
        if gamma == 0:
            return q_sample(x_start, t, self.schedule, seed=seed, draw=draw, return_noise=True)
        noise, second = (
            randn(x_start.shape, seed=seed, draw=draw, stream=stream, device=self.device)
            for stream in (Stream.Q_SAMPLE, Stream.PERTURBATION)
        )
        return q_sample(x_start, t, self.schedule, noise + gamma * second), noise

    def described(self) -> ModelInfo:
        """Returns the model's description, with the steps done and the loss."""
        training = {**asdict(self.options), "data": pathlib.Path(self.options.data).name}
        return replace(
            self.info, training={**training, "step": self.step, "loss": self.loss, "losses": self.curve.means}
        )

    def check_finite(self) -> None:
        """Raises ``TrainingDivergedError`` unless all weights, averages and moments are finite."""
        for name, value in [*self.averages.weights().items(), *self._slots().items()]:
            if not torch.isfinite(value).all():
                raise TrainingDivergedError(f"after step {self.step} {name} is not a number")

    def save(self, out: PathLike, with_state: bool = True, half: bool = False) -> None:
        """Writes the model file: the averaged weights and, ``with_state``, the training state; whole or not at all.

        With ``half`` the averaged weights are written in float16, which only a file without a state may hold.
        """
        weights, info = self.averages.weights(), self.described()
        if not with_state:
            weights = {name: value.half() if half else value for name, value in weights.items()}
            checkpoint.save_model(out, weights, info)
            return
        training = {
            "options": asdict(self.options),
            "step": self.step,
            "loss": self.loss,
            "curve": self.curve.as_json(),
            "scaler": self.scaler.state_dict(),
            "fingerprint": self.dataset.fingerprint,
        }
        checkpoint.save(out, weights, info, self._slots(), training)

    def restore(self, out: PathLike) -> None:
        """Takes up the training state in the model file ``out``.

        Raises:
            ValueError: the file is missing, changed, foreign, without a training state, or of other data or model.
        """
        file, metadata = checkpoint.open_model(out)
        with file:
            training = metadata.get("state")
            if not isinstance(training, dict) or not {"fingerprint", "scaler", "step", "loss"} <= training.keys():
                raise ValueError(f"{str(out)!r} does not say where its training stopped")
            if training["fingerprint"] != self.dataset.fingerprint:
                raise ValueError(f"data: the images are not those that {str(out)!r} was trained on")
            slots = {f"{checkpoint.STATE}{name}": slot for name, slot in self._slots().items()}
            slots.update(self.averages.weights())
            found = {name: entry.shape for name, entry in file.entries.items()}
            if found != {name: tuple(slot.shape) for name, slot in slots.items()}:
                raise ValueError(f"{str(out)!r} does not hold the weights and moments of this model")
            tensors = file.read(checkpoint.KEY)
        with torch.no_grad():
            for name, slot in slots.items():
                slot.copy_(tensors[name])
        self.scaler.load_state_dict(training["scaler"])
        self.step, self.loss, self.curve = training["step"], training["loss"], LossCurve(**training.get("curve", {}))

    def _slots(self) -> dict[str, Tensor]:
        """Returns every tensor of the training state but the averages; AdamW's moments are 0 before the first step."""
        slots = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            state = self.optimizer.state[parameter]
            if not state:
                on_host = not self.optimizer.defaults["fused"]
                state["step"] = torch.zeros((), device="cpu" if on_host else parameter.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            slots |= {f"optimizer.{name}.{moment}": value for moment, value in state.items()}
        if self.history is not None:
            slots["timesteps.losses"] = self.history.losses
        return slots
