"""Sets threads, Hypothesis profiles and Triton's interpreter before anything imports torch."""

import gc
import os
import signal
import sys
from pathlib import Path

# The suite's tensors are tiny: a second thread costs more than it gives. Tests of threads ask for them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

# Holds the error bounds, and what runs in float64 beside other packages.
sys.path += [str(Path(__file__).parent / folder) for folder in ("ops", "integrations")]

# The same examples in every run; --hypothesis-profile=search draws others, and "thousands" draws 20,000.
settings.register_profile("deterministic", derandomize=True, deadline=None, max_examples=40, database=None)
settings.register_profile("search", derandomize=False, deadline=None, max_examples=500)
settings.register_profile("thousands", derandomize=False, deadline=None, max_examples=20_000, database=None)
settings.load_profile("deterministic")

# A suite started under nohup inherits an ignored SIGHUP, which the tests of signals and their children must not.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton's kernels then run on CPU tensors


def pytest_collection_finish() -> None:
    """Lets later garbage collections skip what imports made, which lives to the end: they take a tenth of the time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Lets the interpreter free at its end what collections skipped: libraries warn of what is left."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Makes every test draw the same data in every run."""
    torch.manual_seed(0)


@pytest.fixture
def graphs_on_cpu(monkeypatch):
    """Gives the CPU a stand-in for CUDA graphs, which counts captures and replays."""
    from cuda_graph_stand_in import install

    return install(monkeypatch)


@pytest.fixture(scope="session")
def judge():
    """Trains the classifier that judges drawn digits, once for all tests."""
    from dd_kernels.apps import data
    from dd_kernels.apps.evaluate import Judge

    return Judge.trained(data.digits("train"), data.digits("test"))
