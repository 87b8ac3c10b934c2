"""One training step, and a state that a resumed run continues from to the same bits.

No random generator has a state: the images of a step, their timesteps, noise, dropped labels and flips, and the seed of
dropout are functions of (seed, step). So a training state is weights, moments and a number of steps.
"""

from __future__ import annotations

import math
import pathlib
import signal
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...losses import predicted_x_start
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
from .objective import Diffused, Losses, losses_of
from .options import PRECISIONS, TrainOptions
from .parallel import Parallel
from .timesteps import LossHistory, uniform


class TrainingDivergedError(RuntimeError):
    """The loss, its gradient or the weights are not numbers, or the loss is far above that of predicting nothing."""


@dataclass(frozen=True)
class Batch:
    """Data of one step: x_0 [N, C, H, W] in [-1, 1], t [N], labels [N] or None, weights of the losses [N].

    ``first`` is the position of the first image in the whole batch of the step.
    """

    x_start: Tensor
    t: Tensor
    labels: Tensor | None
    weights: Tensor
    first: int


def make_batch(
    dataset: ImageData,
    options: TrainOptions,
    null_label: int | None,
    step: int,
    history: LossHistory | None = None,
    part: range | None = None,
) -> Batch:
    """Returns the batch of step ``step``, on the CPU: a function of (data, options, step), and of ``history``.

    With a history of losses the timesteps and weights are those of importance sampling; else timesteps are uniform.
    A ``part`` of the batch, by position, is the same images with the same draws; None is all of it.
    """
    part, seed = range(options.batch_size) if part is None else part, options.seed

    def words(stream: int) -> Tensor:
        return data.uniform_words(len(part), seed=seed, draw=step, stream=stream, first=part.start)

    position = step * options.batch_size + part.start
    x_start, labels = dataset.batch(data.positions(dataset, position, len(part), seed=seed))
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
        t, weights = uniform(of_t, options.num_timesteps), torch.ones(len(part))
    return Batch(x_start, t, labels, weights, part.start)


def seed_torch(seed: int, step: int, first: int = 0) -> None:
    """Makes dropout's masks, and every other draw from torch's generator, depend on seed, step and part alone.

    ``first`` is the position of the part's first image in the batch of the step.
    """
    torch.manual_seed((seed * 0x9E3779B97F4A7C15 + step + (first << 40)) % 2**63)


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

    def __init__(
        self, options: TrainOptions, dataset: ImageData, device: torch.device, parallel: Parallel | None = None
    ) -> None:
        self.options, self.dataset, self.device = options, dataset, device
        self.parallel = parallel or Parallel()
        self.parts, (model, self.info) = self.parallel.processes.together(
            lambda: (self.parallel.parts(options.batch_size), build_model(options, dataset))
        )
        self.averages = Averages(model, options.ema)
        for average in self.averages.models:
            self.parallel.placed(average, device, by_block=False)
        self.model = self.parallel.placed(model, device).train()
        self.connected = self.parallel.connected(self.model)
        self.ema = self.averages.models[0]
        if options.accelerate:
            from ...compile import accelerate  # imports Dynamo, which takes a second

            accelerate(self.model)
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
        for group in self.optimizer.param_groups:
            group["lr"] = options.learning_rate(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        simple, loss, seen = torch.zeros((), device=self.device), torch.zeros((), device=self.device), []
        for part in self.parts:
            seed_torch(options.seed, self.step, part.start)
            batch = make_batch(self.dataset, options, self.model.null_label, self.step, self.history, part)
            with self.parallel.of_part(self.connected, part, self.parts):
                losses = self._losses(batch)
                simple_part, loss_part = (self._share(batch, each) for each in losses)
                # The processes' gradients are averaged, of which each is of a share of the sum over all images.
                self.scaler.scale(self.parallel.processes.count * loss_part).backward()
            simple, loss = simple + simple_part.detach(), loss + loss_part.detach()
            seen.append((batch.t, losses.minimised.detach()))
        norm = self._update()
        self._remember(seen)
        self.step += 1
        return torch.where(loss.isfinite(), simple, loss), norm

    def _update(self) -> Tensor:
        """Takes the optimizer's step and the averages'; returns the gradient's norm before it is clipped."""
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.averages.update(self.model, self.step)
        return self.parallel.whole(norm.detach())

    def _remember(self, seen: list[tuple[Tensor, Tensor]]) -> None:
        """Adds timesteps and losses of all images, in the batch's order, to the history, where there is one."""
        if self.history is not None:
            columns = (torch.cat(column) for column in zip(*seen, strict=True))
            size, first = self.options.batch_size, self.parts[0].start
            self.history.add(*(self.parallel.of_batch(column, first, size) for column in columns))

    def _losses(self, batch: Batch) -> Losses:
        """Returns L_simple of each image, and what is minimised."""
        x_start, t = batch.x_start.to(self.device), batch.t.to(self.device)
        labels = None if batch.labels is None else batch.labels.to(self.device)
        x_t, noise = self._diffused(x_start, t, batch.first)
        x_self = self._estimate(x_t, t, labels, batch.first) if self.model.self_conditioning else None
        with self._autocast():
            out = self.connected(x_t, t, labels, x_self)
        asked, levels = Diffused(x_start, x_t, noise, t), self.dataset.maximum + 1
        return losses_of(out.to(x_start.dtype), asked, self.schedule, self.options, levels)

    def _autocast(self) -> torch.autocast:
        """Returns the context of one forward pass, which ends with it what autocast keeps of the weights."""
        dtype = PRECISIONS[self.options.precision]
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32)

    @torch.no_grad()
    def _estimate(self, x_t: Tensor, t: Tensor, labels: Tensor | None, first: int) -> Tensor:
        """Returns what self-conditioning reads (Chen et al., 2022, section 3.2): the model's x_0 of every second image.

        Of the others it reads zeros, as at the first step of a sampler. Images are counted through all steps.
        """
        turn = slice((self.step * self.options.batch_size + first) % 2, None, 2)
        with self._autocast():
            out = self.model(x_t[turn], t[turn], None if labels is None else labels[turn])
        found = torch.zeros_like(x_t)
        found[turn] = predicted_x_start(
            out.to(x_t.dtype), x_t[turn], t[turn], self.schedule, prediction=self.options.prediction, clip=1.0
        )
        return found

    def _share(self, batch: Batch, losses: Tensor) -> Tensor:
        """Returns what some images' losses add to the mean over the whole batch."""
        return (batch.weights.to(self.device) * losses).sum() / self.options.batch_size

    def _diffused(self, x_start: Tensor, t: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
        """Returns x_t and the noise that the model is asked for; with input perturbation x_t holds more than that."""
        seed, draw, gamma = self.options.seed, self.step, self.options.input_perturbation
        if gamma == 0:
            return q_sample(x_start, t, self.schedule, seed=seed, first_sample=first, draw=draw, return_noise=True)
        noise, second = (
            randn(x_start.shape, seed=seed, first_sample=first, draw=draw, stream=stream, device=self.device)
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
            if not torch.isfinite(self.parallel.whole(value)).all():
                raise TrainingDivergedError(f"after step {self.step} {name} is not a number")

    def save(self, out: PathLike, with_state: bool = True, half: bool = False) -> None:
        """Writes the model file: the averaged weights and, ``with_state``, the training state; whole or not at all.

        With ``half`` the averaged weights are written in float16, which only a file without a state may hold. Of
        several processes the first one writes, with whole tensors, so that any number of them may go on.
        """
        weights, slots = self._gathered(self.averages.weights()), self._gathered(self._slots() if with_state else {})
        if half and not with_state:
            weights = {name: value.half() for name, value in weights.items()}
        training = {
            "options": asdict(self.options),
            "step": self.step,
            "loss": self.loss,
            "curve": self.curve.as_json(),
            "scaler": self.scaler.state_dict(),
            "fingerprint": self.dataset.fingerprint,
        }
        state = (slots, training) if with_state else ()
        self.parallel.processes.first_alone(lambda: checkpoint.save(out, weights, self.described(), *state))

    def _gathered(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns whole tensors, in the first process; {} in the others."""
        first, found = self.parallel.is_first, {}
        for name, tensor in tensors.items():
            value = self.parallel.whole(tensor)
            if first:
                found[name] = value if value is tensor else value.to("cpu")
        return found

    def restore(self, out: PathLike) -> None:
        """Takes up the training state in the model file ``out``.

        Raises:
            ValueError: the file is missing, changed, foreign, without a training state, or of other data or model.
        """
        slots = {f"{checkpoint.STATE}{name}": slot for name, slot in self._slots().items()}
        slots.update(self.averages.weights())
        training, tensors = self.parallel.processes.together(lambda: self._read(out, slots))
        with torch.no_grad():
            for name, slot in slots.items():
                self.parallel.fill(slot, tensors[name])
        self.scaler.load_state_dict(training["scaler"])
        self.step, self.loss, self.curve = training["step"], training["loss"], LossCurve(**training.get("curve", {}))

    def _read(self, out: PathLike, slots: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Returns the training state in ``out`` and its tensors, which must have the names and shapes of ``slots``."""
        file, metadata = checkpoint.open_model(out)
        with file:
            training = metadata.get("state")
            if not isinstance(training, dict) or not {"fingerprint", "scaler", "step", "loss"} <= training.keys():
                raise ValueError(f"{str(out)!r} does not say where its training stopped")
            if training["fingerprint"] != self.dataset.fingerprint:
                raise ValueError(f"data: the images are not those that {str(out)!r} was trained on")
            found = {name: entry.shape for name, entry in file.entries.items()}
            if found != {name: tuple(slot.shape) for name, slot in slots.items()}:
                raise ValueError(f"{str(out)!r} does not hold the weights and moments of this model")
            return training, file.read(checkpoint.KEY)

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
