"""Set before anything imports Triton or torch."""

import os

# The suite's tensors are tiny: a second thread costs more than it gives. Tests of threads ask for them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton's kernels then run on CPU tensors


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same data in every run."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def judge():
    """What judges drawn digits: a classifier of real ones, trained once."""
    from dd_kernels.apps import data
    from dd_kernels.apps.evaluate import Judge

    return Judge(data.digits("train"), data.digits("test"))
