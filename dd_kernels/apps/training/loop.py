"""The training loop: progress, sample grids, saving, and stopping by a signal."""

from __future__ import annotations

import contextlib
import pathlib
import signal
from dataclasses import asdict

import torch
from torch import nn
from tqdm import tqdm

from ...samplers.ddim import ddim
from ...sampling.loop import sample
from .. import checkpoint, images
from ..data import ImageData, load
from ..files import PathLike, atomic_write, check_writable, only_writer, remove_leftovers, resolved
from .curve import add_row, check_pictures
from .loss_reader import LossReader
from .options import TrainOptions
from .parallel import Parallel
from .stop import Stop
from .trainer import Trainer, TrainingDivergedError

# The number of steps between two reads of the losses, so that the device rarely waits for the host.
READ_EVERY = 10
GRID = 64
GRID_STEPS = 50
# Options that a resumed run may change; the steps only where the learning rate does not depend on them.
CHANGEABLE = ("steps", "data", "strict")


class _StoppedError(Exception):
    """A signal came while a sample grid was drawn."""


def grid_path(out: PathLike) -> pathlib.Path:
    """Returns the path of the sample grids of the run that writes ``out``."""
    out = pathlib.Path(out)
    return out.with_name(f"{out.stem}.samples.png")


def resumed_options(out: PathLike) -> TrainOptions:
    """Returns the options of the run whose training state is in ``out``.

    Raises:
        ValueError: the file is missing, truncated, foreign or without a training state.
    """
    file, metadata = checkpoint.open_model(out)
    file.close()
    if "state" not in metadata:
        raise ValueError(f"resume: {str(out)!r} is a model without a training state")
    try:
        return TrainOptions(**metadata["state"]["options"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{str(out)!r} does not say how it was trained: {error}") from error


def check_out(out: PathLike, resume: bool, overwrite: bool) -> pathlib.Path:
    """Returns ``out``, after a check that it can be written and that no file of the user is lost.

    Raises:
        ValueError: not a .safetensors in a writable folder; it or the sample grid is there already, and neither flag is
            set; or nothing is there to resume.
    """
    out = pathlib.Path(out)
    if out.suffix != ".safetensors" and not out.is_dir():
        raise ValueError(f"out must end in .safetensors; got {str(out)!r}")
    if resume and overwrite:
        raise ValueError("only one of resume and overwrite may be given; got both")
    if resume and not out.exists():
        raise ValueError(f"resume: there is no model {str(out)!r}")
    if out.is_file() and not resume and not overwrite:
        raise ValueError(f"out: {str(out)!r} is there already (--resume to continue it, --overwrite to lose it)")
    check_writable("out", out, overwrite=True)
    check_writable("out", grid_path(out), overwrite=resume or overwrite)
    return out


def draw_grid(trainer: Trainer, out: PathLike, stop: Stop, evolution: PathLike | None = None) -> None:
    """Writes 64 samples of the averaged weights (DDIM, 50 steps), class after class, beside ``out``.

    The first of them are added to the picture ``evolution`` as a row.
    A signal ends it before the next step of the sampler; the grid that is there then stays.
    """

    def check(module: nn.Module, arguments: object) -> None:
        if stop.signal is not None:
            raise _StoppedError

    options, info = trainer.options, trainer.described()
    steps = min(GRID_STEPS, options.num_timesteps)
    kwargs = {"y": torch.arange(GRID, device=trainer.device) % len(info.classes)} if info.classes else {}
    learned = info.config["learn_variance"]
    table = ddim(trainer.schedule, steps, prediction=options.prediction, learned_variance=learned)

    def draw() -> None:
        hook = trainer.ema.register_forward_pre_hook(check)
        try:
            x = sample(trainer.ema, (GRID, *info.sample_shape), table, seed=options.seed, model_kwargs=kwargs)
        except _StoppedError:
            return
        finally:
            hook.remove()
        if not torch.isfinite(x).all():
            raise TrainingDivergedError(f"the samples of step {trainer.step} are not numbers")
        pixels = images.to_uint8(x)
        images.save_png(images.grid(pixels), grid_path(out))
        if evolution is not None:
            add_row(evolution, trainer.step, pixels)

    with trainer.parallel.collected(trainer.ema):
        trainer.parallel.processes.first_alone(draw)


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
    keep_state: bool = True,
    half: bool = False,
    plot: PathLike | None = None,
    evolution: PathLike | None = None,
    parallel: Parallel | None = None,
) -> Trainer:
    """Trains a U-Net and writes the model file ``out``, with its training state, and a grid of samples beside it.

    Args:
        options: how; with ``resume`` the same as before, but for ``steps``.
        out: the model file, a .safetensors.
        dataset: the training images; loaded as ``options`` say by default.
        resume: continue from the training state in ``out``: to the same bits as a run that never stopped, on one
            machine with one number of threads.
        overwrite: a model and a grid that are there may be lost.
        save_every, sample_every: steps between two states, and between two grids (0: only at the end).
        device: where to train.
        progress: show a tqdm bar.
        keep_state: leave the training state in the file of a finished run; without it the file is a quarter as long
            and cannot be resumed.
        half: write the weights of a finished run in float16; needs ``keep_state=False``.
        plot: where the loss by step is drawn when the run ends, a .png; needs matplotlib.
        evolution: a .png that grows by a row, the first samples of the grid, with each grid.
        parallel: the processes that share each step, all of which make this call. Another number of them, or of
            micro-batches, may resume the run, with sums in another order and other masks of dropout.

    Returns:
        The trainer; ``stopped_by`` is the signal that ended the run early, after a save, or None.

    Raises:
        ValueError: an option, the data or ``out`` does not fit, or another process trains ``out``.
        TrainingDivergedError: the loss, its gradient or a weight is not a number, or the loss is above ``DIVERGED``;
            the message says what the file holds.
    """
    for name, value in (("save_every", save_every), ("sample_every", sample_every)):
        if value < 0:
            raise ValueError(f"{name} must be at least 0; got {value}")
    if half and keep_state:
        raise ValueError(
            "half needs keep_state=False (--no-state): a run that can be resumed keeps its weights in float32"
        )
    out, device, parallel = pathlib.Path(out), torch.device(device), parallel or Parallel()
    progress = progress and parallel.is_first
    with contextlib.ExitStack() as held:

        def begin() -> None:
            check_pictures(plot, evolution, resume, overwrite)
            _claim(out, resume, overwrite, held)
            if evolution is not None and not resume:
                pathlib.Path(evolution).unlink(missing_ok=True)

        def data_of_run() -> ImageData:
            if resume:
                _check_same_run(options, resumed_options(out))
            if dataset is not None:
                return dataset
            return load(options.data, options.image_size, options.grey, progress, options.background, options.strict)

        parallel.processes.first_alone(begin)
        held.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        trainer = Trainer(options, parallel.processes.together(data_of_run), device, parallel)
        if resume:
            trainer.restore(out)
        with Stop().listening() as stop:
            saver = _Saver(trainer, out, half, evolution)
            _run(saver, stop, save_every, sample_every, progress, keep_state)
            trainer.stopped_by = _agreed(trainer, stop)
        if plot is not None and parallel.is_first:
            atomic_write(plot, trainer.curve.png())
    return trainer


def _claim(out: pathlib.Path, resume: bool, overwrite: bool, held: contextlib.ExitStack) -> None:
    """Checks ``out``, locks it as long as ``held``, and removes what dead runs left."""
    check_out(out, resume, overwrite)
    held.enter_context(only_writer("out", out))
    check_out(out, resume, overwrite)  # another run may have ended between the first check and the lock
    for path in (out, grid_path(out)):
        remove_leftovers(resolved(path))


def _agreed(trainer: Trainer, stop: Stop) -> signal.Signals | None:
    """Returns the signal that has come to any of the processes, the same one in each."""
    number = trainer.parallel.processes.largest(stop.signal or 0)
    return signal.Signals(number) if number else None


def _check_same_run(options: TrainOptions, before: TrainOptions) -> None:
    # The cosine ends at the last step, so that another end would change the steps before it.
    changeable = set(CHANGEABLE) - ({"steps"} if before.lr_schedule == "cosine" else set())
    for name, value in asdict(before).items():
        if name not in changeable and getattr(options, name) != value:
            raise ValueError(f"{name} must be {value!r}, as in the run that is resumed; got {getattr(options, name)!r}")


class _Saver:
    """Saves a run and draws its samples, and knows which step its file holds."""

    def __init__(
        self, trainer: Trainer, out: pathlib.Path, half: bool = False, evolution: PathLike | None = None
    ) -> None:
        self.trainer, self.out, self.half, self.evolution = trainer, out, half, evolution
        self.saved = trainer.step if trainer.step else None
        self.loss = trainer.loss

    def save(self, with_state: bool = True) -> None:
        """Writes the file, if every weight is a number."""
        self.trainer.check_finite()
        self.trainer.save(self.out, with_state, self.half)
        self.saved, self.loss = self.trainer.step, self.trainer.loss

    def draw(self, stop: Stop) -> None:
        """Draws the samples of the weights as they are."""
        draw_grid(self.trainer, self.out, stop, self.evolution)

    def holds(self) -> str:
        """Says what the file holds, for an error."""
        if self.saved is None:
            return "nothing was saved"
        return f"{str(self.out)!r} holds step {self.saved}, whose loss was {self.loss:.4g}"


def _run(saver: _Saver, stop: Stop, save_every: int, sample_every: int, progress: bool, keep_state: bool) -> None:
    """Steps until ``options.steps`` or ``stop``; saves at the end either way."""
    try:
        stopped = _steps(saver, stop, save_every, sample_every, progress)
        stays = keep_state or stopped is not None
        if saver.trainer.step != saver.saved or not stays:
            saver.save(with_state=stays)
        if stopped is None:  # a run that died before its grid was drawn draws it when it is resumed
            saver.draw(stop)
    except TrainingDivergedError as error:
        if not saver.trainer.parallel.is_first:
            raise SystemExit(1) from error  # the first process says why
        raise TrainingDivergedError(f"{error}: try a smaller lr or a longer warmup; {saver.holds()}") from error


def _steps(saver: _Saver, stop: Stop, save_every: int, sample_every: int, progress: bool) -> signal.Signals | None:
    """Steps to the end, or to a signal in any of the processes, which all end after the same step; returns it."""
    trainer = saver.trainer
    losses, steps = LossReader(trainer), trainer.options.steps
    with tqdm(total=steps, initial=trainer.step, desc="training", unit="step", disable=not progress) as bar:
        while (stopped := _agreed(trainer, stop)) is None and trainer.step < steps:
            losses.add(*trainer.train_step())
            bar.update()
            if trainer.step % READ_EVERY == 0:
                losses.read()
                rate = (bar.format_dict["rate"] or 0.0) * trainer.options.batch_size
                bar.set_postfix_str(f"loss {trainer.loss:.4f}, {rate:.0f} images/s", refresh=False)
            if save_every and trainer.step % save_every == 0:
                losses.read()
                saver.save()
            if sample_every and trainer.step % sample_every == 0 and trainer.step < steps:
                losses.read()
                saver.draw(stop)
        losses.read()
    return stopped
