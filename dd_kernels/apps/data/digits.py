"""The handwritten digits of scikit-learn."""

from __future__ import annotations

import numpy as np
import torch

from ...ops.randn import Stream
from .dataset import ImageData, shuffled

SPLITS = ("train", "test", "all")


def digits(split: str = "train") -> ImageData:
    """Returns the 1,797 handwritten digits of UCI (8 x 8, 17 grey levels), as scikit-learn ships them.

    Args:
        split: "train" (1,437 of them), "test" (the other 360; the choice is fixed), or "all".

    Raises:
        ValueError: an unknown split, or scikit-learn is not installed.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError("data 'digits' needs scikit-learn: pip install 'dd_kernels[digits]'") from error
    source = load_digits()
    images = torch.from_numpy(source.images.astype(np.uint8))[:, None]
    labels = torch.from_numpy(source.target.astype(np.int64))
    order = shuffled(len(images), seed=0, draw=0, stream=Stream.SPLIT)
    held_out = len(images) // 5 + 1
    index = {"train": order[held_out:], "test": order[:held_out], "all": torch.arange(len(images))}[split]
    return ImageData(images[index], labels[index], tuple("0123456789"), maximum=16)
