"""The U-Net that a run trains: what its options, its configuration and its data say together."""

from __future__ import annotations

import torch

from ...nn import CONFIGS, UNet, UNetConfig, fitting_config
from ..checkpoint import ModelInfo
from ..data import ImageData
from ..memory import check_memory
from .options import TrainOptions


def build_model(options: TrainOptions, dataset: ImageData) -> tuple[UNet, ModelInfo]:
    """Returns a fresh U-Net that fits the data; its weights are a function of ``options.seed``.

    Raises:
        ValueError: no U-Net can be built with the options.
    """
    labelled = dataset.labels is not None and not options.unconditional
    fitting = {
        "image_size": dataset.images.shape[-1],
        "in_channels": dataset.images.shape[1],
        "num_classes": len(dataset.classes) if labelled else None,
        "null_class": labelled and options.label_drop > 0,
    }
    clash = sorted(options.model.keys() & fitting.keys())
    if clash:
        raise ValueError(f"model: {clash[0]} follows from the data and cannot be set; got {options.model[clash[0]]!r}")
    unknown = sorted(options.model.keys() - UNetConfig.__dataclass_fields__.keys())
    if unknown:
        raise ValueError(f"model: {unknown[0]} must be one of {', '.join(UNetConfig.__dataclass_fields__)}")
    named = {} if options.config is None or options.config not in CONFIGS else CONFIGS[options.config]
    levels = options.model.get("channels")
    levels = len(levels) if isinstance(levels, list) else None
    base = fitting_config(dataset.images.shape[-1], levels) if options.config is None else named
    if options.config is not None and not named:
        raise ValueError(f"config must be one of {', '.join(CONFIGS)}; got {options.config!r}")
    torch.manual_seed(options.seed)
    try:
        config = {**base, **fitting, **options.model}
        with torch.device("meta"):  # the size is known before memory is asked for
            size = sum(parameter.numel() for parameter in UNet(**config).parameters())
        copies = 4 + len(options.ema)
        check_memory("training the model (weights, averages, gradients and moments)", copies * 4 * size)
        model = UNet(**config)
    except (TypeError, RuntimeError, OverflowError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"model: no U-Net can be built with {options.model}: {reason}") from error
    classes = dataset.classes if labelled else ()
    process = (options.schedule, options.num_timesteps, options.prediction)
    info = ModelInfo(model.config, *process, classes, {}, options.ema)
    return model, info
