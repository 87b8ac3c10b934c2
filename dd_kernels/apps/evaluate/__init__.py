"""How good and how fast a model's samples are, measured: Fréchet distance, a classifier's confidence, images/s."""

from .frechet import frechet_distance, moments
from .judge import Classifier, Judge, Measures, train_classifier
from .judge_file import load_judge, packaged_judge, save_judge
from .kept import KeptCells
from .likelihood import BitsPerDim, bits_per_dim, likelihood_json, likelihood_markdown, terms_png
from .report import as_json, environment, markdown
from .results import Cell, Column, Evaluation
from .strengths import strengths_markdown, strengths_png
from .table import Strengths, evaluate, sampler_table

__all__ = [
    "BitsPerDim",
    "Cell",
    "Classifier",
    "Column",
    "Evaluation",
    "Judge",
    "KeptCells",
    "Measures",
    "Strengths",
    "as_json",
    "bits_per_dim",
    "environment",
    "evaluate",
    "frechet_distance",
    "likelihood_json",
    "likelihood_markdown",
    "load_judge",
    "markdown",
    "moments",
    "packaged_judge",
    "sampler_table",
    "save_judge",
    "strengths_markdown",
    "strengths_png",
    "terms_png",
    "train_classifier",
]
