"""The network that a run trains: what its options, its configuration and its data say together."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from ...nn import CONFIGS, NoisyClassifier, UNet, UNetConfig, fitting_config
from ...nn.encoder import Encoder
from ..checkpoint import ModelInfo
from ..classifier_file import PREDICTION
from ..data import ImageData
from ..memory import check_memory
from .options import TrainOptions

NetworkT = TypeVar("NetworkT", bound=Encoder)


def build_model(options: TrainOptions, dataset: ImageData) -> tuple[UNet, ModelInfo]:
    """Returns a fresh U-Net that fits the data; its weights are a function of ``options.seed``.

    Raises:
        ValueError: no U-Net can be built with the options.
    """
    labelled = dataset.labels is not None and not options.unconditional
    classes = {
        "num_classes": len(dataset.classes) if labelled else None,
        "null_class": labelled and options.label_drop > 0,
    }
    model = _built(UNet, _configuration(options, dataset, classes), options, copies=4 + len(options.ema))
    process = (options.schedule, options.num_timesteps, options.prediction)
    return model, ModelInfo(model.config, *process, dataset.classes if labelled else (), {}, options.ema)


def build_classifier(options: TrainOptions, dataset: ImageData) -> tuple[NoisyClassifier, ModelInfo]:
    """Returns a fresh classifier that fits the data; its weights are a function of ``options.seed``.

    Raises:
        ValueError: data without labels; no classifier can be built with the options.
    """
    if dataset.labels is None or options.unconditional:
        raise ValueError("data must have labels, for a classifier; got none")
    classes = {"num_classes": len(dataset.classes), "null_class": False}
    model = _built(NoisyClassifier, _configuration(options, dataset, classes), options, copies=4)
    process = (options.schedule, options.num_timesteps, PREDICTION)
    return model, ModelInfo(model.config, *process, dataset.classes, {})


def _configuration(options: TrainOptions, dataset: ImageData, classes: dict[str, Any]) -> dict[str, Any]:
    """Returns the network's options: those of the configuration, then what the data say, then ``options.model``."""
    fitting = {"image_size": dataset.images.shape[-1], "in_channels": dataset.images.shape[1], **classes}
    clash = sorted(options.model.keys() & fitting.keys())
    if clash:
        raise ValueError(f"model: {clash[0]} follows from the data and cannot be set; got {options.model[clash[0]]!r}")
    unknown = sorted(options.model.keys() - UNetConfig.__dataclass_fields__.keys())
    if unknown:
        raise ValueError(f"model: {unknown[0]} must be one of {', '.join(UNetConfig.__dataclass_fields__)}")
    if options.config is not None and options.config not in CONFIGS:
        raise ValueError(f"config must be one of {', '.join(CONFIGS)}; got {options.config!r}")
    levels = options.model.get("channels")
    levels = len(levels) if isinstance(levels, list) else None
    base = fitting_config(dataset.images.shape[-1], levels) if options.config is None else CONFIGS[options.config]
    return {**base, **fitting, **options.model}


def _built(network: type[NetworkT], config: dict[str, Any], options: TrainOptions, copies: int) -> NetworkT:
    """Returns a network of which training holds so many copies: weights, gradients, moments, averages."""
    torch.manual_seed(options.seed)
    try:
        with torch.device("meta"):  # the size is known before memory is asked for
            size = sum(parameter.numel() for parameter in network(**config).parameters())
        check_memory("training the model (weights, averages, gradients and moments)", copies * 4 * size)
        return network(**config)
    except (TypeError, RuntimeError, OverflowError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"model: no {network.__name__} can be built with {options.model}: {reason}") from error
