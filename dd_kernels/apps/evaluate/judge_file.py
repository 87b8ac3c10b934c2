"""A judge in a file: its classifier, and the labels and features of real images, these in float16, not the images."""

from __future__ import annotations

import pathlib
from typing import Any

import torch

from .. import tensors as tensor_files
from ..checkpoint import FORMAT, KEY, open_model
from ..files import PathLike, bundled
from .judge import FEATURES, Classifier, Judge, RealImages

KIND = "judge"
# Training images of which features are kept, for the floor: as many as Fashion-MNIST keeps for tests.
KEPT = 10_000
_CLASSIFIER = "classifier."


def save_judge(path: PathLike, judge: Judge) -> None:
    """Writes a judge, whole or not at all; the file has 1.1 MB for images of 28 x 28 pixels."""
    found = {f"{_CLASSIFIER}{name}": value for name, value in judge.classifier.state_dict().items()}
    for name, real in (("train", judge.train), ("held_out", judge.held_out)):
        found[f"{name}.features"] = real.features[:KEPT].half()
        found[f"{name}.labels"] = real.labels[:KEPT].to(torch.int16)
    description = {"format": FORMAT, "kind": KIND, "shape": judge.shape, "seed": judge.seed}
    tensor_files.write(path, found, description, KEY)


def load_judge(path: PathLike) -> Judge:
    """Returns the judge that :func:`save_judge` wrote.

    Raises:
        ValueError: the file is missing, truncated, changed, foreign, or does not hold what it describes.
    """
    file, description = open_model(path, KIND)
    with file:
        found = {name: v if v.dtype == torch.int16 else v.float() for name, v in file.read(KEY).items()}
    try:
        return _judge(description, found)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{str(path)!r} does not hold a {KIND}: {str(error).splitlines()[0]}") from error


def _judge(description: dict[str, Any], found: dict[str, torch.Tensor]) -> Judge:
    channels, height, width = description["shape"]
    real = [RealImages(found[f"{name}.features"], found[f"{name}.labels"].long()) for name in ("train", "held_out")]
    for features, labels in real:
        if features.shape != (len(labels), FEATURES):
            raise ValueError(f"features must be [{len(labels)}, {FEATURES}]; got {list(features.shape)}")
    weights = {n.removeprefix(_CLASSIFIER): v for n, v in found.items() if n.startswith(_CLASSIFIER)}
    classifier = Classifier((channels, height, width), len(weights["head.bias"]))
    classifier.load_state_dict(weights)
    seed = int(description["seed"])
    return Judge(classifier.eval().requires_grad_(False), (channels, height, width), seed, real[0], real[1])


def packaged_judge(data: str) -> pathlib.Path | None:
    """Returns the path of the judge of a named source that is bundled with this package, or None."""
    return bundled("fashion.judge.safetensors") if data == "fashion-mnist" else None
