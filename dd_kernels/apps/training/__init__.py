"""Train a U-Net with L_simple, stopped anywhere and continued to the same bits."""

from .loop import TrainingDivergedError, check_out, grid_path, resumed_options, train
from .options import DIGITS, PRECISIONS, TrainOptions
from .trainer import Trainer, state_path

__all__ = [
    "DIGITS",
    "PRECISIONS",
    "TrainOptions",
    "Trainer",
    "TrainingDivergedError",
    "check_out",
    "grid_path",
    "resumed_options",
    "state_path",
    "train",
]
