"""Training images (scikit-learn's digits, folders, Hugging Face datasets, IDX, .npz), and their order in training."""

from .arrays import npz_file
from .dataset import (
    ImageData,
    class_indices,
    positions,
    shuffled,
    uniform_words,
)
from .digits import SPLITS, digits
from .folder import SUFFIXES, image_folder
from .idx import fashion_mnist, idx_folder
from .pictures import load_image, parse_colour
from .sources import NAMED, has_held_out, held_out, load, splits
from .tables import huggingface_folder

__all__ = [
    "NAMED",
    "SPLITS",
    "SUFFIXES",
    "ImageData",
    "class_indices",
    "digits",
    "fashion_mnist",
    "has_held_out",
    "held_out",
    "huggingface_folder",
    "idx_folder",
    "image_folder",
    "load",
    "load_image",
    "npz_file",
    "parse_colour",
    "positions",
    "shuffled",
    "splits",
    "uniform_words",
]
