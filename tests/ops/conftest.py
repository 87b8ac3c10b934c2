"""The kernels that the op suite runs on: one suite for all of them."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from budget import FAST_NORMAL_ERROR, NORMAL_ERROR

import dd_kernels
from dd_kernels import backend as backends

INSTRUCTION_SETS = ("avx512", "avx2", "baseline")


@dataclass(frozen=True)
class Kernel:
    """A backend on a device; ``isa`` is the CPU library's instruction set."""

    name: str
    device: str
    isa: str | None = None

    def op(self, op: str) -> Callable[..., Any]:
        """What the public function of ``op`` calls: outputs are among its arguments."""
        if self.name == "triton":
            launch = getattr(importlib.import_module(f"dd_kernels.ops.{op}.triton"), op)
            arguments = getattr(importlib.import_module(f"dd_kernels.ops.{op}"), "Arguments", None)
            return launch if arguments is None else lambda *values: launch(arguments(*values))
        return getattr(torch.ops.dd_kernels, op)

    @property
    def interpreted(self) -> bool:
        """Triton's interpreter takes a tenth of a second per launch: the suite gives it fewer cases."""
        return self.name == "triton" and backends.interpreting_triton()

    def truncates(self, dtype: torch.dtype) -> bool:
        """Triton's interpreter cuts float32 to bfloat16 where the compiled kernel rounds."""
        return self.interpreted and dtype == torch.bfloat16

    def has_fast_sines(self, dtype: torch.dtype) -> bool:
        """Compiled Triton kernels draw what they round to 16 bits with a GPU's own sine and cosine."""
        return self.name == "triton" and not self.interpreted and dtype != torch.float32

    def normal_error(self, dtype: torch.dtype) -> float:
        """Returns how far the normals drawn for this dtype may be off before they are rounded to it."""
        return FAST_NORMAL_ERROR if self.has_fast_sines(dtype) else NORMAL_ERROR


def _isa_function() -> Callable[[bytes | None], bytes | None]:
    library = next(Path(dd_kernels.__file__).parent.glob("_cpu.*so"))
    function = ctypes.CDLL(str(library)).dd_kernels_cpu_isa
    function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_char_p
    return function


def _available() -> list[Kernel]:
    kernels = []
    if backends.unavailable("cpu") is None:
        force = _isa_function()
        kernels += [Kernel("cpu", "cpu", isa) for isa in INSTRUCTION_SETS if force(isa.encode()) is not None]
        force(b"")
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    kernels += [Kernel(name, accelerator) for name in ("triton", "cuda") if not backends.unavailable(name, accelerator)]
    return kernels


@pytest.fixture(autouse=True)
def _same_data_every_time() -> None:
    torch.manual_seed(0)


def _unsupported_reason(kernel: Kernel) -> str | None:
    """Returns why this kernel cannot be tested with the versions that are installed; None if it can."""
    numpy = tuple(int(part) for part in version("numpy").split(".")[:2])
    if kernel.interpreted and version("triton").startswith("3.6.") and numpy >= (2, 4):
        return "Triton 3.6's interpreter makes scalars of one-element arrays, which NumPy 2.4 refuses"
    return None


@pytest.fixture(params=_available(), ids=lambda kernel: "-".join(filter(None, (kernel.name, kernel.isa))))
def kernel(request: pytest.FixtureRequest) -> Iterator[Kernel]:
    """Every kernel backend that runs here; the CPU library once for each instruction set."""
    if (reason := _unsupported_reason(request.param)) is not None:
        pytest.skip(reason)
    if request.param.isa is None:
        yield request.param
        return
    force = _isa_function()
    force(request.param.isa.encode())
    yield request.param
    force(b"")
