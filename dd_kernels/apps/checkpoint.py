"""Model files: a U-Net's weights, what they mean, and, while it is trained, the state that training continues from.

Everything is in one file, so that one rename makes a model and its training state visible together. The model's weights
(the averaged ones) have their own names. The names of the state's tensors begin with ``training.``, those of further
averages with ``ema.`` and their decay.
"""

from __future__ import annotations

import pathlib
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..nn import UNet
from ..nn.blocks import channels_last
from ..nn.encoder import Encoder
from ..samplers.rows import PREDICTIONS
from ..schedules import SCHEDULES, Schedule, named_schedule
from . import tensors as tensor_files
from .files import PathLike, bundled
from .memory import check_memory
from .tensors import Entry, TensorFile

FORMAT = 2
READABLE = (1, FORMAT)  # files of format 1 have no checksum
KEY, KIND = "dd_kernels", "model"
# The models that are bundled with this package.
BUNDLED = ("fashion", "digits")
DEFAULT = "fashion"
STATE, AVERAGE = "training.", "ema."
# The greatest length of a schedule, since a header can state any number; DDPM has 1,000.
MOST_TIMESTEPS = 1_000_000

NetworkT = TypeVar("NetworkT", bound=Encoder)


def average_prefix(decay: float) -> str:
    """Returns what the names of a further average's tensors begin with."""
    return f"{AVERAGE}{decay}."


def check_timesteps(num_timesteps: Any) -> None:
    """Raises ``ValueError`` unless a schedule may have this many steps."""
    if (
        isinstance(num_timesteps, bool)
        or not isinstance(num_timesteps, int)
        or not 1 <= num_timesteps <= MOST_TIMESTEPS
    ):
        raise ValueError(f"num_timesteps must be an integer in [1, {MOST_TIMESTEPS}]; got {num_timesteps!r}")


@dataclass(frozen=True)
class ModelInfo:
    """The meaning of a model's weights.

    Attributes:
        config: the U-Net's options, or the classifier's.
        schedule, num_timesteps: name in ``SCHEDULES`` and T of the forward process that it was trained on.
        prediction: "epsilon", "x_start" or "v"; "class" of a classifier.
        classes: names of the classes, () if it has none.
        training: options, steps done and loss of the training; for readers, no code uses it.
        ema: decays of the averaged weights that the file holds, the model's own first; () where the file says none.
    """

    config: dict[str, Any]
    schedule: str
    num_timesteps: int
    prediction: str
    classes: tuple[str, ...]
    training: dict[str, Any]
    ema: tuple[float, ...] = ()

    @classmethod
    def from_metadata(
        cls, path: PathLike, metadata: Mapping[str, Any], predictions: Collection[str] = PREDICTIONS
    ) -> ModelInfo:
        """Returns the ``info`` of a header, checked; its prediction is one of ``predictions``.

        Raises:
            ValueError: naming ``path``.
        """
        try:
            found = {"ema": (), **metadata["info"]}
            info = cls(**{**found, "classes": tuple(found["classes"]), "ema": tuple(found["ema"])})
            for name, kind in (("config", dict), ("training", dict), ("schedule", str), ("prediction", str)):
                if not isinstance(getattr(info, name), kind):
                    raise TypeError(f"{name} must be a {kind.__name__}; got {getattr(info, name)!r}")
            if not all(isinstance(name, str) for name in info.classes):
                raise TypeError("classes must be strings")
            if not all(isinstance(decay, float) for decay in info.ema):
                raise TypeError("ema must be numbers")
            if info.schedule not in SCHEDULES or info.prediction not in predictions:
                raise ValueError(f"schedule {info.schedule!r} or prediction {info.prediction!r} is unknown")
            check_timesteps(info.num_timesteps)
            named_schedule(info.schedule, info.num_timesteps)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{str(path)!r} does not describe its model: {error}") from error
        return info

    def as_metadata(self) -> dict[str, Any]:
        """Returns what :meth:`from_metadata` reads."""
        return {"info": asdict(self)}

    def make_schedule(self) -> Schedule:
        """Returns the forward process that the model was trained on."""
        return named_schedule(self.schedule, self.num_timesteps)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """[C, H, W] of a sample."""
        return self.config["in_channels"], self.config["image_size"], self.config["image_size"]


def save(
    path: PathLike,
    weights: Mapping[str, Tensor],
    info: ModelInfo,
    state: Mapping[str, Tensor] | None = None,
    training: Mapping[str, Any] | None = None,
    kind: str = KIND,
) -> None:
    """Writes a model, and with ``state`` and ``training`` (tensors and JSON values) its training state, in one file."""
    metadata: dict[str, Any] = {"format": FORMAT, "kind": kind, **info.as_metadata()}
    if training is not None:
        metadata["state"] = dict(training)
    every = {**weights, **{f"{STATE}{name}": value for name, value in (state or {}).items()}}
    tensor_files.write(path, every, metadata, KEY)


def open_model(path: PathLike, kind: str = KIND) -> tuple[TensorFile, dict[str, Any]]:
    """Returns an open model file, or one of another kind, and its metadata; close it.

    Raises:
        ValueError: the file is missing, unreadable, truncated, or of another format, version or kind.
    """
    file = TensorFile(path, kind)
    try:
        metadata = file.described(KEY)
        if "format" not in metadata or "kind" not in metadata:
            raise ValueError(f"{str(path)!r} is safetensors, but no {kind} that dd_kernels wrote")
        if metadata["format"] not in READABLE:
            raise ValueError(f"{str(path)!r} has the format {metadata['format']}; this version reads {FORMAT}")
        if metadata["format"] == FORMAT and file.checksum(KEY) is None:
            raise ValueError(f"{str(path)!r} was changed after it was written: it has no checksum")
        if metadata["kind"] != kind:
            raise ValueError(f"{str(path)!r} is a {metadata['kind']}; wanted is a {kind}")
    except BaseException:
        file.close()
        raise
    return file, metadata


def build_network(network: type[NetworkT], path: PathLike, info: ModelInfo, entries: Mapping[str, Entry]) -> NetworkT:
    """Returns the network that ``info`` describes, without memory for its weights, if ``entries`` are its weights.

    Raises:
        ValueError: naming ``path``.
    """
    try:
        channels, per_level = info.config.get("channels"), info.config.get("num_res_blocks", 2)
        # Every residual block has weights: more blocks than tensors is a lie, which would take minutes to build.
        if isinstance(channels, list) and isinstance(per_level, int) and len(channels) * per_level > len(entries):
            raise ValueError(
                f"num_res_blocks={per_level} on {len(channels)} levels need more than {len(entries)} tensors"
            )
        with torch.device("meta"):
            model = network(**info.config)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{str(path)!r} does not describe a {network.__name__}: {reason}") from error
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: entry.shape for name, entry in entries.items()}
    if wanted != found:
        wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise ValueError(
            f"{str(path)!r} does not hold the weights that it describes: {wrong[0]} is "
            f"{found.get(wrong[0], 'missing')}, wanted {wanted.get(wrong[0], 'none')} ({len(wrong)} such)"
        )
    integers = [name for name, entry in entries.items() if not entry.dtype.is_floating_point]
    if integers:
        raise ValueError(f"{str(path)!r} holds {entries[integers[0]].dtype} where weights belong: {integers[0]}")
    check_memory(f"the model {str(path)!r}", sum(entry.end - entry.begin for entry in entries.values()))
    return model


def save_model(path: PathLike, weights: Mapping[str, Tensor], info: ModelInfo) -> None:
    """Writes a model file without a training state."""
    save(path, weights, info)


def _prefix_of(path: PathLike, info: ModelInfo, ema: float | None) -> str:
    """Returns what the names of an average's tensors begin with: "" for the first of the file, which None means too."""
    if ema is None or ema in info.ema[:1]:
        return ""
    if ema not in info.ema:
        held = ", ".join(map(str, info.ema)) or "one, and does not say of which decay"
        raise ValueError(f"ema must be the decay of an average that {str(path)!r} holds, {held}; got {ema}")
    return average_prefix(ema)


def load_model(path: PathLike | None = None, ema: float | None = None) -> tuple[UNet, ModelInfo]:
    """Returns a U-Net (in eval mode, on the CPU) and its description; its weights of 16 bits become float32.

    Args:
        path: the model file, or the name of a bundled model (where no file has it); None: the default one.
        ema: decay of the average of the weights to load, where the file holds several; the first by default.

    Raises:
        ValueError: the file is missing, truncated, foreign, changed since it was written, or does not hold what it
            describes.
    """
    path = model_path(path)
    file, metadata = open_model(path)
    with file:
        info = ModelInfo.from_metadata(path, metadata)
        prefix = _prefix_of(path, info, ema)
        without = (STATE,) if prefix else (STATE, AVERAGE)
        names = [name for name in file.entries if name.startswith(prefix) and not name.startswith(without)]
        model = build_network(UNet, path, info, {name.removeprefix(prefix): file.entries[name] for name in names})
        weights = file.read(KEY, prefix, without)
        wide = {name.removeprefix(prefix): v.float() if v.element_size() == 2 else v for name, v in weights.items()}
        model.load_state_dict(wide, assign=True)
    return channels_last(model).eval().requires_grad_(False), info


def model_path(path: PathLike | None = None) -> PathLike:
    """Returns the file of a model: ``path``, or that of the bundled model of this name (where no file has it)."""
    path = DEFAULT if path is None else path
    return packaged_model(str(path)) if path in BUNDLED and not pathlib.Path(path).exists() else path


def packaged_model(name: str = DEFAULT) -> pathlib.Path:
    """Returns the path of a model that is bundled with this package."""
    return bundled(f"{name}.safetensors")
