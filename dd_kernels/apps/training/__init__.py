"""Training of a U-Net, which a signal may stop anywhere and a resumed run continues to the same bits."""

from .loop import GRID, check_out, grid_path, resumed_options, train
from .options import DIGITS, FASHION, LOSS_WEIGHTS, LR_SCHEDULES, PRECISIONS, RECIPES, TrainOptions
from .timesteps import TIMESTEPS
from .trainer import Trainer, TrainingDivergedError, make_batch

__all__ = [
    "DIGITS",
    "FASHION",
    "GRID",
    "LOSS_WEIGHTS",
    "LR_SCHEDULES",
    "PRECISIONS",
    "RECIPES",
    "TIMESTEPS",
    "TrainOptions",
    "Trainer",
    "TrainingDivergedError",
    "check_out",
    "grid_path",
    "make_batch",
    "resumed_options",
    "train",
]
