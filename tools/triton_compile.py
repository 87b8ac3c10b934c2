"""Runs Triton's launch code with no GPU: a launch compiles its kernel, or only says which kernel it would compile."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver, jit


class CompileOnly(DriverBase):
    """A driver that launches nothing. ``arch`` is a compute capability (90 means 9.0) or an AMD name ("gfx942")."""

    def __init__(self, arch: int | str) -> None:
        super().__init__()
        self.arch = arch

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("nothing is launched")

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32) if isinstance(self.arch, int) else GPUTarget("hip", self.arch, 64)

    def get_current_device(self) -> int | str:
        return self.arch  # Triton caches kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_benchmarker(self) -> Callable:
        raise NotImplementedError("nothing is launched")


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel launch that was compiled and not run; ``kernel`` is Triton's CompiledKernel."""

    name: str
    kernel: Any
    options: dict[str, Any]


@contextlib.contextmanager
def compile_only(arch: int | str) -> Iterator[list[Launch]]:
    """Within the block, compiles every Triton launch for ``arch`` and appends it to the list instead of running it."""
    launches: list[Launch] = []
    run, before = jit.JITFunction.run, driver._active

    def compile_and_list(self: jit.JITFunction, *args: object, grid: object, warmup: bool, **options: object) -> object:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        launches.append(Launch(self.fn.__name__, kernel, options))
        return kernel

    driver.set_active(CompileOnly(arch))
    jit.JITFunction.run = compile_and_list
    try:
        yield launches
    finally:
        jit.JITFunction.run, driver._active = run, before


@contextlib.contextmanager
def without_compiling(arch: int) -> Iterator[tuple[list[Launch], set[str]]]:
    """Within the block, lists the launches, and the kernels that they would compile, without compiling any."""
    kernels: set[str] = set()

    def note(*, key: str, fn: jit.JitFunctionInfo, **_: object) -> bool:
        kernels.add(f"{fn.name} {key}")
        return True  # tells Triton that the kernel is already compiled

    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, note
    try:
        with compile_only(arch) as launches:
            yield launches, kernels
    finally:
        knobs.runtime.jit_cache_hook = before


def specialisations(calls: Sequence[Callable[[], None]], arch: int = 90) -> set[str]:
    """Returns the kernels that the calls would compile for ``arch``, without compiling them."""
    with without_compiling(arch) as (_, kernels):
        for call in calls:
            call()
    return kernels
