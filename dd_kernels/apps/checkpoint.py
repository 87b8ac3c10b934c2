"""Models and training states on disk: safetensors, with what they mean as JSON in the header.

A model file holds a U-Net's weights under their own names. A training state holds everything a run
continues from: ``model.*``, ``ema.*``, and ``optimizer.<weight>.<moment>``.
"""

from __future__ import annotations

import importlib.resources
import json
import pathlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..nn import UNet
from ..nn.blocks import channels_last
from ..samplers.rows import PREDICTIONS
from ..schedules import SCHEDULES, Schedule, named_schedule
from .files import PathLike, atomic_write

FORMAT = 1
MODEL, TRAINING = "model", "training state"


def save(path: PathLike, kind: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes ``tensors`` and JSON ``metadata`` to ``path``, whole or not at all."""
    header = json.dumps({"format": FORMAT, "kind": kind, **metadata})
    dense = {name: value.detach().to("cpu").contiguous() for name, value in tensors.items()}
    atomic_write(path, lambda temporary: save_file(dense, temporary, metadata={"dd_kernels": header}))


def load(path: PathLike, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, metadata) of a file that :func:`save` wrote as the same ``kind``.

    Raises:
        ValueError: the file is missing, unreadable, truncated, of another format, version or kind.
    """
    if pathlib.Path(path).is_dir():
        raise ValueError(f"a {kind} must be a .safetensors file; {str(path)!r} is a folder")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = _metadata(path, kind, file.metadata() or {})
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 (it is no dict)
    except FileNotFoundError as error:
        raise ValueError(f"there is no {kind} {str(path)!r}") from error
    except (SafetensorError, OSError) as error:
        first_line = str(error).splitlines()[0]
        raise ValueError(f"cannot read {str(path)!r} as a {kind} (safetensors): {first_line}") from error


def _metadata(path: PathLike, kind: str, header: Mapping[str, str]) -> dict[str, Any]:
    try:
        metadata = json.loads(header["dd_kernels"])
        found = metadata["format"], metadata["kind"]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{str(path)!r} is safetensors, but no {kind} that dd_kernels wrote") from error
    if found[0] != FORMAT:
        raise ValueError(f"{str(path)!r} has the format {found[0]}; this version reads {FORMAT}")
    if found[1] != kind:
        raise ValueError(f"{str(path)!r} is a {found[1]}; wanted is a {kind}")
    return metadata


@dataclass(frozen=True)
class ModelInfo:
    """What a model's weights do not say.

    Attributes:
        config: the U-Net's options.
        schedule, num_timesteps: name in ``SCHEDULES`` and T of the forward process it was trained on.
        prediction: "epsilon", "x_start" or "v".
        classes: names of the classes, () if it has none.
        training: how it was made: options, steps done, loss; for people, not read back.
    """

    config: dict[str, Any]
    schedule: str
    num_timesteps: int
    prediction: str
    classes: tuple[str, ...]
    training: dict[str, Any]

    @classmethod
    def from_metadata(cls, path: PathLike, metadata: Mapping[str, Any]) -> ModelInfo:
        """The ``info`` of a header, checked."""
        try:
            info = cls(**{**metadata["info"], "classes": tuple(metadata["info"]["classes"])})
            if info.schedule not in SCHEDULES or info.prediction not in PREDICTIONS:
                raise ValueError(f"schedule {info.schedule!r} or prediction {info.prediction!r} is unknown")
            named_schedule(info.schedule, info.num_timesteps)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{str(path)!r} does not describe its model: {error}") from error
        return info

    def as_metadata(self) -> dict[str, Any]:
        """What :meth:`from_metadata` reads."""
        return {"info": asdict(self)}

    def make_schedule(self) -> Schedule:
        """The forward process that the model was trained on."""
        return named_schedule(self.schedule, self.num_timesteps)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """[C, H, W] of what the model draws."""
        return self.config["in_channels"], self.config["image_size"], self.config["image_size"]


def build_model(path: PathLike, info: ModelInfo, weights: Mapping[str, Tensor]) -> UNet:
    """The U-Net that ``info`` describes, with ``weights`` in it; ``path`` is named in errors."""
    try:
        # On "meta" nothing is allocated: a header that lies about the sizes costs nothing.
        with torch.device("meta"):
            model = UNet(**info.config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{str(path)!r} does not describe a U-Net: {error}") from error
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if wanted != found:
        wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise ValueError(
            f"{str(path)!r} does not hold the weights that it describes: {wrong[0]} is "
            f"{found.get(wrong[0], 'missing')}, wanted {wanted.get(wrong[0], 'none')} ({len(wrong)} such)"
        )
    model.load_state_dict(dict(weights), assign=True)
    return channels_last(model)


def save_model(path: PathLike, weights: Mapping[str, Tensor], info: ModelInfo) -> None:
    """Writes a model file."""
    save(path, MODEL, weights, info.as_metadata())


def load_model(path: PathLike | None = None) -> tuple[UNet, ModelInfo]:
    """A U-Net (in eval mode, on the CPU) and what is known of it; the digits model of this package by default.

    Raises:
        ValueError: the file is missing, truncated, foreign, or does not hold what it describes.
    """
    path = packaged_model() if path is None else path
    weights, metadata = load(path, MODEL)
    info = ModelInfo.from_metadata(path, metadata)
    return build_model(path, info, weights).eval().requires_grad_(False), info


def packaged_model() -> pathlib.Path:
    """Where the digits model lies that comes with this package."""
    return pathlib.Path(str(importlib.resources.files(__package__))) / "models" / "digits.safetensors"
