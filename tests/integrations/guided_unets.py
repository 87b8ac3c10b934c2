"""Models of guided-diffusion whose names, shapes and outputs are recorded in ``data/guided_unets.npz``.

The weights are a function of their name and shape, so that none has to be kept. Recorded by running
UNetModel of openai/guided-diffusion at 22e0df8183507e13a7813f8d38d51b072ca1e67c with torch 2.13.0 on a CPU:
``python tests/integrations/guided_unets.py GUIDED_DIFFUSION_CHECKOUT``.
"""

from __future__ import annotations

import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

DATA = pathlib.Path(__file__).parents[1] / "data" / "guided_unets.npz"
_COMMON = {"image_size": 8, "in_channels": 3, "model_channels": 32, "dropout": 0.0}

# name: (options of UNetModel, options of nn.UNet)
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "adm": (
        {
            **_COMMON,
            "out_channels": 6,
            "num_res_blocks": 2,
            "attention_resolutions": (2, 4),
            "channel_mult": (1, 2, 2),
            "num_classes": 5,
            "num_head_channels": 16,
            "use_scale_shift_norm": True,
            "resblock_updown": True,
        },
        {
            "channels": (32, 64, 64),
            "attention_resolutions": (4, 2),
            "num_classes": 5,
            "head_channels": 16,
            "scale_shift": True,
            "resample": "resblock",
            "learn_variance": True,
        },
    ),
    "improved": (
        {
            **_COMMON,
            "out_channels": 3,
            "num_res_blocks": 1,
            "attention_resolutions": (1,),
            "channel_mult": (1, 2),
            "num_heads": 4,
        },
        {"channels": (32, 64), "num_res_blocks": 1, "attention_resolutions": (8,), "num_heads": 4},
    ),
    "new_order": (
        {
            **_COMMON,
            "out_channels": 3,
            "num_res_blocks": 1,
            "attention_resolutions": (2,),
            "channel_mult": (1, 2),
            "num_heads": 2,
            "conv_resample": False,
            "use_new_attention_order": True,
        },
        {
            "channels": (32, 64),
            "num_res_blocks": 1,
            "attention_resolutions": (4,),
            "num_heads": 2,
            "resample": "plain",
        },
    ),
}


def weight(name: str, shape: Sequence[int]) -> Tensor:
    """Values in place of trained ones: of unit gain, different for every name."""
    seed = sum((i + 1) * ord(letter) for i, letter in enumerate(name))
    # The legacy generator: its numbers are the same in every version of numpy.
    normal = torch.from_numpy(np.random.RandomState(seed).standard_normal(tuple(shape)))
    if len(shape) > 1:
        return (normal / math.sqrt(math.prod(shape[1:]))).float()
    return (0.2 * normal + (1.0 if name.endswith("weight") else 0.0)).float()


def inputs(classes: bool) -> list[Tensor]:
    """x, t, and labels where there are classes."""
    x = torch.sin(torch.arange(2 * 3 * 8 * 8, dtype=torch.float64) * 0.37).reshape(2, 3, 8, 8).float()
    return [x, torch.tensor([3, 801])] + ([torch.tensor([4, 1])] if classes else [])


def _record(checkout: str) -> None:
    sys.path.insert(0, checkout)
    from guided_diffusion.unet import UNetModel

    data = {}
    for name, (options, _) in MODELS.items():
        model = UNetModel(**options).eval()
        shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
        model.load_state_dict({key: weight(key, shape) for key, shape in shapes.items()})
        with torch.no_grad():
            data[f"{name}/output"] = model(*inputs("num_classes" in options)).numpy()
        data[f"{name}/names"] = np.array(list(shapes))
        data[f"{name}/shapes"] = np.array([",".join(map(str, shape)) for shape in shapes.values()])
    np.savez_compressed(DATA, **data)


if __name__ == "__main__":
    _record(sys.argv[1])
