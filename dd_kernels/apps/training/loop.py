"""The loop around the steps: progress, sample grids, saving, and stopping without losing anything."""

from __future__ import annotations

import contextlib
import math
import pathlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import asdict

import torch
from torch import Tensor
from tqdm import tqdm

from ...samplers.ddim import ddim
from ...sampling.loop import sample
from .. import checkpoint, images
from ..data import ImageData, load
from ..files import PathLike, check_writable
from .options import TrainOptions
from .trainer import Trainer, state_path

# Losses are read from the device once in so many steps, so that it never waits for the host.
READ_EVERY = 10
GRID = 64
GRID_STEPS = 50


class TrainingDivergedError(RuntimeError):
    """The loss or its gradient is no longer a number; the last saved state is good."""


class Stop:
    """Set by SIGINT (Ctrl-C) or SIGTERM: the loop saves and ends after the step it is in."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[Stop]:
        """Takes the two signals inside the block; a second one does what it does outside."""
        if threading.current_thread() is not threading.main_thread():
            yield self  # only the main thread may take signals
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def handler(number: int, frame: object) -> None:
            self.signal = signal.Signals(number)
            for each, old in before.items():
                signal.signal(each, old)

        for number in before:
            signal.signal(number, handler)
        try:
            yield self
        finally:
            for number, old in before.items():
                signal.signal(number, old)


def grid_path(out: PathLike) -> pathlib.Path:
    """Where the sample grids of the run that writes ``out`` go."""
    out = pathlib.Path(out)
    return out.with_name(f"{out.stem}.samples.png")


def resumed_options(out: PathLike) -> TrainOptions:
    """The options of the run whose training state belongs to ``out``.

    Raises:
        ValueError: it is missing, truncated or foreign.
    """
    path = state_path(out)
    _, metadata = checkpoint.load(path, checkpoint.TRAINING)
    try:
        return TrainOptions(**metadata["options"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{str(path)!r} does not say how it was trained: {error}") from error


def check_out(out: PathLike, resume: bool, overwrite: bool) -> pathlib.Path:
    """``out``, after it is known that it can be written and that nobody else's model is lost.

    Raises:
        ValueError: not a .safetensors in a writable folder; there already, with neither flag; or
            nothing there to resume.
    """
    out = check_writable("out", out)
    if out.suffix != ".safetensors":
        raise ValueError(f"out must end in .safetensors; got {str(out)!r}")
    if resume and overwrite:
        raise ValueError("only one of resume and overwrite may be given; got both")
    if resume and not state_path(out).is_file():
        raise ValueError(f"resume: there is no training state {str(state_path(out))!r}")
    present = [path for path in (out, state_path(out)) if path.exists()]
    if present and not resume and not overwrite:
        raise ValueError(f"out: {str(present[0])!r} is there already (--resume to continue it, --overwrite to lose it)")
    return out


class _Losses:
    """Reads losses in blocks and keeps their running mean."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.unread: list[tuple[Tensor, Tensor]] = []

    def add(self, loss: Tensor, norm: Tensor) -> None:
        self.unread.append((loss, norm))

    def read(self) -> None:
        """Folds the unread losses into ``trainer.loss``.

        Raises:
            TrainingDivergedError: one is not finite. With fp16 the gradient may overflow: the scaler
                leaves such a step out.
        """
        if not self.unread:
            return
        values = torch.stack([torch.stack(pair) for pair in self.unread]).tolist()
        first = self.trainer.step - len(values)
        self.unread.clear()
        for i, (loss, norm) in enumerate(values):
            scaled = self.trainer.options.precision == "fp16"
            if not math.isfinite(loss) or not (scaled or math.isfinite(norm)):
                raise TrainingDivergedError(
                    f"the {'gradient' if math.isfinite(loss) else 'loss'} of step {first + i + 1} is not a number: "
                    "try a smaller lr or a longer warmup"
                )
            old = self.trainer.loss
            self.trainer.loss = loss if math.isnan(old) else 0.99 * old + 0.01 * loss


def draw_grid(trainer: Trainer, out: PathLike) -> None:
    """Writes 64 samples of the averaged weights (DDIM, 50 steps), a class after another, beside ``out``."""
    options, info = trainer.options, trainer.described()
    steps = min(GRID_STEPS, options.num_timesteps)
    kwargs = {"y": torch.arange(GRID, device=trainer.device) % len(info.classes)} if info.classes else {}
    table = ddim(trainer.schedule, steps, prediction=options.prediction)
    x = sample(trainer.ema, (GRID, *info.sample_shape), table, seed=options.seed, model_kwargs=kwargs)
    images.save_png(images.grid(images.to_uint8(x)), grid_path(out))


def train(
    options: TrainOptions,
    out: PathLike,
    *,
    dataset: ImageData | None = None,
    resume: bool = False,
    overwrite: bool = False,
    save_every: int = 1000,
    sample_every: int = 1000,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Trainer:
    """Trains a U-Net and writes the model file ``out``, its training state and a grid of samples beside it.

    Args:
        options: how; with ``resume`` the same as before, but for ``steps``.
        out: the model file, a .safetensors.
        dataset: the training images; loaded as ``options`` say by default.
        resume: continue from the training state beside ``out``: to the same bits as a run that never
            stopped, on one machine with one number of threads.
        overwrite: a model and training state that are there may be lost.
        save_every, sample_every: steps between two states, and between two grids (0: only at the end).
        device: where to train.
        progress: show a tqdm bar.

    Returns:
        The trainer; ``stopped_by`` is not None where SIGINT or SIGTERM ended the run, which then was saved.

    Raises:
        ValueError: an option, the data or ``out`` does not fit.
        TrainingDivergedError: the loss is not a number; files hold the last good state.
    """
    for name, value in (("save_every", save_every), ("sample_every", sample_every)):
        if value < 0:
            raise ValueError(f"{name} must be at least 0; got {value}")
    out = check_out(out, resume, overwrite)
    check_writable("out", grid_path(out))
    if dataset is None:
        dataset = load(options.data, options.image_size, options.grey, progress)
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        trainer = Trainer(options, dataset, device)
        if resume:
            _check_same_run(options, resumed_options(out))
            trainer.restore(out)
        with Stop().listening() as stop:
            _run(trainer, out, stop, save_every, sample_every, progress)
        trainer.stopped_by = stop.signal
    return trainer


def _check_same_run(options: TrainOptions, before: TrainOptions) -> None:
    for name, value in asdict(before).items():
        if name not in ("steps", "data") and getattr(options, name) != value:
            raise ValueError(f"{name} must be {value!r}, as in the run that is resumed; got {getattr(options, name)!r}")


def _run(trainer: Trainer, out: pathlib.Path, stop: Stop, save_every: int, sample_every: int, progress: bool) -> None:
    """Steps until ``options.steps`` or ``stop``; saves at the end either way."""
    losses, steps = _Losses(trainer), trainer.options.steps
    saved = trainer.step
    images_in_step = trainer.options.batch_size
    with tqdm(total=steps, initial=trainer.step, desc="training", unit="step", disable=not progress) as bar:
        while trainer.step < steps and stop.signal is None:
            losses.add(*trainer.train_step())
            bar.update()
            if trainer.step % READ_EVERY == 0:
                losses.read()
                rate = (bar.format_dict["rate"] or 0.0) * images_in_step
                bar.set_postfix_str(f"loss {trainer.loss:.4f}, {rate:.0f} images/s", refresh=False)
            if save_every and trainer.step % save_every == 0:
                losses.read()
                trainer.save(out)
                saved = trainer.step
            if sample_every and trainer.step % sample_every == 0 and trainer.step < steps:
                losses.read()
                draw_grid(trainer, out)
        losses.read()
    if trainer.step > saved or not out.exists():
        trainer.save(out)
    if stop.signal is None:
        draw_grid(trainer, out)
