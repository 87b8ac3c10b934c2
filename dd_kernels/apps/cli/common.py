"""Arguments and helpers that several commands share."""

from __future__ import annotations

import argparse
import contextlib
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import backend as backends
from ...nn import UNet
from ...ops.reverse_step.table import DynamicThreshold, StepTable
from ...samplers.timesteps import SPACINGS
from ...sampling import sample
from .. import checkpoint
from ..checkpoint import BUNDLED, DEFAULT, ModelInfo
from ..data import NAMED, class_indices
from ..images import NPZ_NAMES
from ..memory import check_memory
from ..processes import local_device
from . import classifier, guidance
from .argument_types import integer, number
from .classifier import ClassifierGuided
from .guidance import Guidance

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


seed = integer(0, 2**64 - 1)
count = integer(1)


def device(text: str | None) -> torch.device:
    """Returns the device called ``text``; by default cuda where there is one, else cpu.

    Raises:
        ValueError: no such device, or this machine has none.
    """
    if text is None:
        return local_device()
    try:
        found = torch.device(text)
        torch.zeros(1, device=found).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"--device {text!r} cannot be used: {reason}") from error
    return found


def backend_of(args: argparse.Namespace, where: torch.device) -> AbstractContextManager[None]:
    """Returns a context in which --backend runs.

    Raises:
        ValueError: it cannot run on the device.
    """
    if args.backend is None:
        return contextlib.nullcontext()
    reason = backends.unavailable(args.backend, where)
    if reason is not None:
        raise ValueError(f"--backend {args.backend} cannot run on {where}: {reason}")
    return backends.use_backend(args.backend)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --device, --backend and --no-progress."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one, else cpu)")
    parser.add_argument(
        "--backend", choices=backends.BACKENDS, help="what runs the ops (default: DD_KERNELS_BACKEND, or auto)"
    )
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")


def add_model_arguments(parser: argparse.ArgumentParser, classes: str | None = "all") -> None:
    """Adds the model and how it is run; --classes too where there is a text that says what it is by default."""
    names = " or ".join(BUNDLED)
    parser.add_argument("--model", help=f"a model file that train wrote, or the bundled {names} (default: {DEFAULT})")
    parser.add_argument(
        "--ema", type=number, help="decay of the average to take, where train --ema kept several (default: the first)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the model's weights (default: fp32)")
    parser.add_argument(
        "--accelerate",
        nargs="?",
        const=True,
        default=False,
        choices=("bfloat16",),
        help="rewrite the model by dd_kernels.accelerate first, which takes seconds and pays for larger models; with "
        "bfloat16 its products are of that where the processor has them",
    )
    if classes is not None:
        parser.add_argument("--classes", help=f"names or numbers, 0,3,7 or all or none (default: {classes})")
    guidance.add_arguments(parser)
    parser.add_argument(
        "--batch-size",
        type=count,
        default=256,
        help="images per model call, halved where they do not fit the device's memory (default: 256)",
    )
    add_run_arguments(parser)


@dataclass(frozen=True)
class LoadedModel:
    """A model on its device, its description, and how it is guided.

    Attributes:
        network: what ``sample`` calls: the model, or it and the classifier that guides it.
    """

    model: UNet
    info: ModelInfo
    device: torch.device
    guidance: Guidance
    network: UNet | ClassifierGuided

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> LoadedModel:
        """Loads --model in --dtype on --device; checks the options of guidance."""
        where = device(args.device)
        model, info = checkpoint.load_model(args.model, args.ema)
        guided = Guidance.from_arguments(args, model)
        model = model.to(where, DTYPES[args.dtype])
        if args.accelerate:
            from ...compile import accelerate  # imports Dynamo, which takes a second

            accelerate(model, dtype=None if args.accelerate is True else args.accelerate)
        network = classifier.guided_model(args, model, info, where)
        return cls(model, info, where, guided, network)

    @property
    def learns_variance(self) -> bool:
        """Whether the second half of the model's output is its variance."""
        return self.model.config["learn_variance"]

    @property
    def classifier_scale(self) -> float | None:
        """How strongly a classifier guides; None without one."""
        return self.network.scale if isinstance(self.network, ClassifierGuided) else None

    @property
    def num_classes(self) -> int | None:
        """Number of the classes that can be asked for: the model's, or else the classifier's; None without both."""
        return self.network.num_classes if isinstance(self.network, ClassifierGuided) else self.model.num_classes

    @property
    def classes(self) -> Sequence[str]:
        """The names of these classes."""
        return self.network.classes if isinstance(self.network, ClassifierGuided) else self.info.classes

    def labels(self, text: str | None, default: str = "all") -> list[int] | None:
        """Returns the labels that --classes names; None for a model without classes."""
        names, num_classes = self.classes, self.num_classes
        if num_classes is None:
            if text is not None:
                raise ValueError(f"--classes must be left out: the model has no classes; got {text!r}")
            return None
        text = default if text is None else text
        if text == "all":
            return list(range(num_classes))
        if text == "none":
            if self.network is not self.model:
                raise ValueError("--classes none must be left out with --classifier, which needs a class; got it")
            if self.model.null_label is None:
                raise ValueError("--classes none needs a model trained with dropped labels; got one without")
            return [self.model.null_label]
        return class_indices([part.strip() for part in text.split(",")], names, num_classes)

    def conditions(self, labels: Sequence[int] | None) -> dict[str, Any]:
        """Returns the keyword arguments of ``sample`` for the class of each image and its guidance."""
        if labels is None:
            return {}
        y = torch.tensor(labels, device=self.device)
        asked = {} if self.network is self.model else {"label": y}
        if self.model.num_classes is None:
            return {"model_kwargs": asked}
        null_label = self.model.null_label
        if self.guidance.scale == 1 or null_label is None:
            return {"model_kwargs": {"y": y, **asked}}
        uncond = {"y": torch.full_like(y, null_label), **asked}
        return {"model_kwargs": {"y": y, **asked}, "uncond_kwargs": uncond, **self.guidance.options()}

    def backend_that_runs(self) -> str:
        """Returns the name of the backend that runs the reverse step."""
        return backends.choose("reverse_step", "auto", self.device)


class Batches:
    """Draws images in batches, which are halved where the device's memory does not hold one; ``size`` is what fits."""

    def __init__(self, size: int) -> None:
        self.size = size

    def draw(
        self, loaded: LoadedModel, table: StepTable, n: int, labels: Sequence[int] | None, **options: Any
    ) -> Tensor:
        """Returns n samples [n, C, H, W] on the CPU.

        Raises:
            ValueError: not even one image fits.
        """
        while True:
            try:
                conditions = loaded.conditions(labels)
                shape = (n, *loaded.info.sample_shape)
                return sample(loaded.network, shape, table, batch_size=self.size, **options, **conditions).cpu()
            except torch.OutOfMemoryError as error:
                if self.size == 1:
                    raise ValueError(f"one image is too large for the device's memory: {error}") from error
            self.size //= 2
            warnings.warn(f"the device's memory is too small, --batch-size is now {self.size}", stacklevel=2)


def clip(text: str) -> float | DynamicThreshold | None:
    """An argparse type: the range that x_0 is clipped to."""
    if text in ("none", "dynamic"):
        return None if text == "none" else DynamicThreshold()
    value = number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be none, dynamic or a positive number; got {text!r}")
    return value


def add_step_arguments(parser: argparse.ArgumentParser, default: str, more_spacings: Sequence[str] = ()) -> None:
    """Adds --steps and --spacing."""
    parser.add_argument("--steps", type=count, help=f"model calls per image (default: {default})")
    own = "; for few-step samplers their own" if more_spacings else ""
    spacings = (*SPACINGS, *more_spacings)
    parser.add_argument("--spacing", choices=spacings, help=f"(default: leading; linspace for ddpm{own})")


def ddim_options(loaded: LoadedModel, args: argparse.Namespace) -> dict[str, Any]:
    """Returns the options of ``ddim`` and its inversion: --steps (by default 50, at most T) and --spacing."""
    steps = min(50, loaded.info.num_timesteps) if args.steps is None else args.steps
    kind = {"prediction": loaded.info.prediction, "learned_variance": loaded.learns_variance}
    return {"steps": steps, "spacing": args.spacing or "leading", **kind}


def data_of(loaded: LoadedModel, args: argparse.Namespace) -> str:
    """Returns the source of real images: --data, or the named one that the model was trained on, or the digits."""
    trained_on = str(loaded.info.training.get("data"))
    return str(args.data or (trained_on if trained_on in NAMED else "digits"))


def check_shape(loaded: LoadedModel, shape: tuple[int, ...]) -> None:
    """Raises ``ValueError`` where the model draws images of another shape than the data's, (C, H, W)."""
    if loaded.info.sample_shape != shape:
        raise ValueError(
            f"--model must draw images of {shape}, as the data are (--data names others); "
            f"got a model that draws {loaded.info.sample_shape}"
        )


def check_images(loaded: LoadedModel, n: int) -> None:
    """Raises ``ValueError`` where ``n`` samples, in float32 and as their batches' list, do not fit this machine."""
    channels, height, width = loaded.info.sample_shape
    check_memory(f"{n} images of {height} x {width} x {channels}", 2 * 4 * n * channels * height * width)


def add_output_arguments(parser: argparse.ArgumentParser, default: str) -> None:
    """Adds --out, --overwrite and --npz-names."""
    parser.add_argument("--out", default=default, help=f"a .png, a .npz or a folder (default: {default})")
    parser.add_argument("--overwrite", action="store_true", help="replace --out, or write to a folder with files")
    parser.add_argument(
        "--npz-names",
        choices=NPZ_NAMES,
        default="images",
        help="of a .npz's arrays: images and labels, or arr_0 and arr_1 (for guided-diffusion's evaluator)",
    )
