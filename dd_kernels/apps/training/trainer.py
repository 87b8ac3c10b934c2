"""One training step, and a state that continues to the same bits.

Nothing random has a state: the images of a step, their timesteps, noise, dropped labels and flips, and
the seed of dropout are functions of (seed, step). A training state is weights, moments and a number.
"""

from __future__ import annotations

import copy
import math
import pathlib
import signal
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...nn import UNet, UNetConfig
from ...ops import q_sample
from ...ops.randn import STREAM_TIMESTEPS
from ...schedules import Schedule, named_schedule
from .. import checkpoint, data
from ..checkpoint import ModelInfo
from ..data import ImageData
from ..files import PathLike
from .options import PRECISIONS, TrainOptions


def state_path(out: PathLike) -> pathlib.Path:
    """Where the training state lies that belongs to the model file ``out``."""
    out = pathlib.Path(out)
    return out.with_name(f"{out.stem}.training.safetensors")


def build_model(options: TrainOptions, dataset: ImageData) -> tuple[UNet, ModelInfo]:
    """A fresh U-Net that fits the data, its weights a function of ``options.seed``."""
    labelled = dataset.labels is not None and not options.unconditional
    fitting = {
        "image_size": dataset.images.shape[-1],
        "in_channels": dataset.images.shape[1],
        "learn_variance": False,
        "num_classes": len(dataset.classes) if labelled else None,
        "null_class": labelled and options.label_drop > 0,
    }
    clash = sorted(options.model.keys() & fitting.keys() - {"learn_variance"})
    if clash:
        raise ValueError(f"model: {clash[0]} follows from the data and cannot be set; got {options.model[clash[0]]!r}")
    unknown = sorted(options.model.keys() - UNetConfig.__dataclass_fields__.keys())
    if unknown:
        raise ValueError(f"model: {unknown[0]} must be one of {', '.join(UNetConfig.__dataclass_fields__)}")
    torch.manual_seed(options.seed)
    try:
        model = UNet.from_config(options.config, **{**fitting, **options.model})
    except TypeError as error:
        raise ValueError(f"model: no U-Net can be built with {options.model}: {error}") from error
    classes = dataset.classes if labelled else ()
    info = ModelInfo(model.config, options.schedule, options.num_timesteps, options.prediction, classes, {})
    return model, info


@dataclass(frozen=True)
class Batch:
    """What one step trains on: x_0 [N, C, H, W] in [-1, 1], t [N], labels [N] or None."""

    x_start: Tensor
    t: Tensor
    labels: Tensor | None


def make_batch(dataset: ImageData, options: TrainOptions, null_label: int | None, step: int) -> Batch:
    """The batch of step ``step``: a function of (data, options, step), on the CPU."""
    size, seed = options.batch_size, options.seed

    def words(stream: int) -> Tensor:
        return data.uniform_words(size, seed=seed, draw=step, stream=stream)

    x_start, labels = dataset.batch(data.positions(dataset, step * size, size, seed=seed))
    if options.flip:
        mirrored = (words(data.STREAM_FLIP) & 1).bool()[:, None, None, None]
        x_start = torch.where(mirrored, x_start.flip(-1), x_start)
    if options.unconditional:
        labels = None
    if labels is not None and null_label is not None:
        dropped = words(data.STREAM_LABEL_DROP) < options.label_drop * 2**32
        labels = torch.where(dropped, null_label, labels)
    # Of 32 random bits the high ones choose: word * T / 2^32, uniform on [0, T).
    t = words(STREAM_TIMESTEPS) * options.num_timesteps >> 32
    return Batch(x_start, t, labels)


def target_of(prediction: str, x_start: Tensor, noise: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    r"""What the model is to predict: noise, x_0, or v = \sqrt{\bar\alpha} noise - \sqrt{1 - \bar\alpha} x_0.

    v is from Salimans & Ho (2022), appendix D.
    """
    if prediction == "epsilon":
        return noise
    if prediction == "x_start":
        return x_start
    signal, sigma = (schedule.gather(column.numpy(), t, x_start) for column in schedule.marginal.unbind(1))
    return signal * noise - sigma * x_start


class Trainer:
    """Weights, their average, the optimizer and a step count.

    Attributes:
        model, ema: the weights in training and their average; ``info`` describes both.
        step: steps done. loss: running mean over about 100 steps, NaN before the first.
        stopped_by: the signal that ended :func:`train` early, or None.
    """

    def __init__(self, options: TrainOptions, dataset: ImageData, device: torch.device) -> None:
        self.options, self.dataset, self.device = options, dataset, device
        model, self.info = build_model(options, dataset)
        self.model = model.to(device).train()
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
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
        self.stopped_by: signal.Signals | None = None

    def train_step(self) -> tuple[Tensor, Tensor]:
        """One step of algorithm 1 of DDPM; (loss, gradient norm), still on the device."""
        options = self.options
        # Dropout's masks, and whatever else asks torch, are those of this step in every run.
        torch.manual_seed((options.seed * 0x9E3779B97F4A7C15 + self.step) % 2**63)
        for group in self.optimizer.param_groups:
            group["lr"] = options.lr * min(1.0, (self.step + 1) / max(options.warmup, 1))
        loss = self._loss(make_batch(self.dataset, options, self.model.null_label, self.step))
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), options.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._average()
        self.step += 1
        return loss.detach(), norm.detach()

    def _loss(self, batch: Batch) -> Tensor:
        """L_simple, eq. 14 of DDPM: the mean squared error of the prediction."""
        x_start, t = batch.x_start.to(self.device), batch.t.to(self.device)
        labels = None if batch.labels is None else batch.labels.to(self.device)
        x_t, noise = q_sample(x_start, t, self.schedule, seed=self.options.seed, draw=self.step, return_noise=True)
        target = target_of(self.options.prediction, x_start, noise, t, self.schedule)
        dtype = PRECISIONS[self.options.precision]
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32):
            out = self.model(x_t, t, labels)
        return F.mse_loss(out.float(), target)

    @torch.no_grad()
    def _average(self) -> None:
        """EMA of the weights; its memory grows with the steps, so that the first ones are soon forgotten."""
        decay = min(self.options.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)

    def described(self) -> ModelInfo:
        """The model's description, with how far it has come."""
        training = {**asdict(self.options), "data": pathlib.Path(self.options.data).name}
        return replace(self.info, training={**training, "step": self.step, "loss": self.loss})

    def save(self, out: PathLike) -> None:
        """Writes the training state, then the model file (the averaged weights), each whole or not at all."""
        metadata = {
            "options": asdict(self.options),
            "step": self.step,
            "loss": self.loss,
            "scaler": self.scaler.state_dict(),
            "fingerprint": self.dataset.fingerprint,
            **self.described().as_metadata(),
        }
        checkpoint.save(state_path(out), checkpoint.TRAINING, self._slots(), metadata)
        checkpoint.save_model(out, self.ema.state_dict(), self.described())

    def restore(self, out: PathLike) -> None:
        """Takes up the training state that belongs to ``out``.

        Raises:
            ValueError: it is missing, truncated, foreign, or of other data or another model.
        """
        path = state_path(out)
        tensors, metadata = checkpoint.load(path, checkpoint.TRAINING)
        if not {"fingerprint", "scaler", "step", "loss"} <= metadata.keys():
            raise ValueError(f"{str(path)!r} does not say where it stopped")
        if metadata["fingerprint"] != self.dataset.fingerprint:
            raise ValueError(f"data: the images are not those that {str(path)!r} was trained on")
        wanted = self._slots()
        if {name: value.shape for name, value in tensors.items()} != {n: v.shape for n, v in wanted.items()}:
            raise ValueError(f"{str(path)!r} does not hold the weights and moments of this model")
        with torch.no_grad():
            for name, slot in wanted.items():
                slot.copy_(tensors[name])
        self.scaler.load_state_dict(metadata["scaler"])
        self.step, self.loss = metadata["step"], metadata["loss"]

    def _slots(self) -> dict[str, Tensor]:
        """Every tensor of a training state by its name; AdamW's moments are made, as 0, where it has none yet."""
        slots = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        slots |= {f"ema.{name}": value for name, value in self.ema.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            state = self.optimizer.state[parameter]
            if not state:
                on_host = not self.optimizer.defaults["fused"]
                state["step"] = torch.zeros((), device="cpu" if on_host else parameter.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            slots |= {f"optimizer.{name}.{moment}": value for moment, value in state.items()}
        return slots
