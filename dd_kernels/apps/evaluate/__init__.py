"""How good and how fast a model's samples are, measured: Fréchet distance, a classifier's confidence, images/s."""

from .frechet import frechet_distance, moments
from .judge import Classifier, Judge, train_classifier
from .report import as_json, environment, markdown
from .table import Cell, Evaluation, evaluate, sampler_table

__all__ = [
    "Cell",
    "Classifier",
    "Evaluation",
    "Judge",
    "as_json",
    "environment",
    "evaluate",
    "frechet_distance",
    "markdown",
    "moments",
    "sampler_table",
    "train_classifier",
]
