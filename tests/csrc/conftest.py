"""The CUDA kernels on the host, as a backend of the op suite."""

from __future__ import annotations

import functools
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import compiled
import host_library
import pytest
import torch
from host_library import HostLibrary

from dd_kernels import backend as backends

OPS = Path(__file__).parents[1] / "ops"
sys.path.append(str(OPS))  # holds the op suite and its error bounds


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds --sanitize, for a process that has AddressSanitizer preloaded."""
    parser.addoption("--sanitize", action="store_true", help="run the CUDA kernels' host build under sanitizers")


@pytest.fixture(scope="session")
def library(request: pytest.FixtureRequest) -> HostLibrary:
    """The kernels, built for the host and loaded."""
    if compiled.compiler() is None:
        pytest.skip("no C++ compiler builds the CUDA kernels for the host")
    host_library.define_ops()
    return HostLibrary(host_library.build(sanitize=request.config.getoption("--sanitize", False)))


@pytest.fixture
def host(library: HostLibrary, monkeypatch: pytest.MonkeyPatch) -> Iterator[HostLibrary]:
    """Backend "cuda" takes CPU tensors, and runs the kernels on the host."""
    override = torch.library.Library("dd_kernels", "IMPL", "CPU")
    for name in host_library.OPS:
        function = getattr(torch.ops.dd_kernels_host, name).default
        override.impl(name, functools.partial(function), allow_override=True)
    monkeypatch.setitem(backends._unavailable_reason, "cuda", None)
    monkeypatch.setattr(backends, "_devices", lambda name: ("cpu",))
    library.set_chip()
    library.set_backwards(False)
    library.set_refuses(False)
    yield library
    override._destroy()


@pytest.fixture
def kernel(host: HostLibrary) -> Any:
    """The op suite's fixture of this name, of one kind here."""
    return runpy.run_path(str(OPS / "conftest.py"))["Kernel"]("cuda", "cpu")
