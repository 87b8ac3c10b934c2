"""Files of classifiers of noisy images: weights and what they mean, written as those of models are."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..nn import NoisyClassifier
from ..nn.blocks import channels_last
from .checkpoint import KEY, ModelInfo, build_network, open_model, save
from .files import PathLike

KIND, PREDICTION = "classifier", "class"


def save_classifier(path: PathLike, weights: Mapping[str, Tensor], info: ModelInfo) -> None:
    """Writes a classifier, whole or not at all."""
    save(path, weights, info, kind=KIND)


def load_classifier(path: PathLike) -> tuple[NoisyClassifier, ModelInfo]:
    """Returns a classifier (in eval mode, on the CPU) and its description.

    Raises:
        ValueError: the file is missing, truncated, foreign, changed since it was written, or does not hold what it
            describes.
    """
    file, metadata = open_model(path, KIND)
    with file:
        info = ModelInfo.from_metadata(path, metadata, (PREDICTION,))
        classifier = build_network(NoisyClassifier, path, info, file.entries)
        classifier.load_state_dict(file.read(KEY), assign=True)
    return channels_last(classifier).eval().requires_grad_(False), info
