"""Set before anything imports Triton or torch."""

import os
import signal

# The suite's tensors are tiny: a second thread costs more than it gives. Tests of threads ask for them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

# The same examples in every run; --hypothesis-profile=search draws others, and "thousands" as many as ever.
settings.register_profile("deterministic", derandomize=True, deadline=None, max_examples=40, database=None)
settings.register_profile("search", derandomize=False, deadline=None, max_examples=500)
settings.register_profile("thousands", derandomize=False, deadline=None, max_examples=20_000, database=None)
settings.load_profile("deterministic")

# A suite started under nohup inherits an ignored SIGHUP, which the tests of signals and their children must not.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton's kernels then run on CPU tensors


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same data in every run."""
    torch.manual_seed(0)


@pytest.fixture
def graphs_on_cpu(monkeypatch):
    """A stand-in that gives the CPU CUDA graphs; it counts captures and replays."""
    from cuda_graph_stand_in import install

    return install(monkeypatch)


@pytest.fixture(scope="session")
def judge():
    """What judges drawn digits: a classifier of real ones, trained once."""
    from dd_kernels.apps import data
    from dd_kernels.apps.evaluate import Judge

    return Judge(data.digits("train"), data.digits("test"))
