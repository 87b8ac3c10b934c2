"""Training images (scikit-learn's digits, folders, Hugging Face datasets, .npz), and the order they are visited in."""

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
from .pictures import load_image, parse_colour
from .sources import held_out, load
from .tables import huggingface_folder

__all__ = [
    "SPLITS",
    "SUFFIXES",
    "ImageData",
    "class_indices",
    "digits",
    "held_out",
    "huggingface_folder",
    "image_folder",
    "load",
    "load_image",
    "npz_file",
    "parse_colour",
    "positions",
    "shuffled",
    "uniform_words",
]
