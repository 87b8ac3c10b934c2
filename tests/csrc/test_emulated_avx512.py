"""The CPU kernels of 16 lanes where AVX-512 is emulated: they are tested on processors that lack it."""

import os
import subprocess
import sys

import compiled
import cpu_library
import pytest
from compiled import ROOT


@pytest.mark.slow
@pytest.mark.skipif(compiled.compiler() is None, reason="no C++ compiler")
def test_op_suite(tmp_path):
    cpu_library.skip_unless_here("avx2")
    package = cpu_library.package(tmp_path, cpu_library.build(emulate=True))
    run = {"cwd": ROOT, "capture_output": True, "text": True, "check": False}
    where = [sys.executable, "-P", "-c", "import dd_kernels; print(dd_kernels.__file__)"]
    environment = {**os.environ, "PYTHONPATH": str(package)}
    assert subprocess.run(where, env=environment, **run).stdout == f"{package / 'dd_kernels/__init__.py'}\n"
    only_here = ["-o", f"pythonpath={package}", "-k", "cpu-avx512"]
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-x", *only_here, "tests/ops"]
    done = subprocess.run(command, env=environment, **run)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    assert " passed" in done.stdout
