"""Training of a U-Net, which a signal may stop anywhere and a resumed run continues, and of a classifier."""

from .classifier import DEFAULTS as CLASSIFIER_DEFAULTS
from .classifier import RECIPES as CLASSIFIER_RECIPES
from .classifier import accuracy_by_timestep, train_noisy_classifier
from .loop import GRID, check_out, grid_path, resumed_options, train
from .options import DIGITS, FASHION, LOSS_WEIGHTS, LR_SCHEDULES, PRECISIONS, RECIPES, TrainOptions
from .parallel import Parallel
from .timesteps import TIMESTEPS
from .trainer import Trainer, TrainingDivergedError, make_batch

__all__ = [
    "CLASSIFIER_DEFAULTS",
    "CLASSIFIER_RECIPES",
    "DIGITS",
    "FASHION",
    "GRID",
    "LOSS_WEIGHTS",
    "LR_SCHEDULES",
    "PRECISIONS",
    "RECIPES",
    "TIMESTEPS",
    "Parallel",
    "TrainOptions",
    "Trainer",
    "TrainingDivergedError",
    "accuracy_by_timestep",
    "check_out",
    "grid_path",
    "make_batch",
    "resumed_options",
    "train",
    "train_noisy_classifier",
]
