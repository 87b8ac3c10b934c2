"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in processes that have them preloaded."""

import os
import subprocess
import sys
from pathlib import Path

import compiled
import cpu_library
import host_library
import pytest
from compiled import HERE, ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(compiled.address_sanitizer() is None, reason="the C++ compiler has no AddressSanitizer"),
]
CALLS = 3000
# Every regime of every layout, and the elementwise ops in every order of elements.
TESTS = "test_regime or (test_randn or test_q_sample or test_reverse_step) and not any_shape and not statistic"


def run_clean(*arguments: str, python_path: Path | None = None) -> str:
    """Runs Python under the sanitizers, which must report nothing, and returns its output."""
    environment = compiled.sanitized_environment()
    if python_path is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(python_path), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False, cwd=ROOT
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-8000:]
    assert not any(report in output for report in compiled.SANITIZER_REPORTS), output[-8000:]
    return output


def test_cuda_kernels_on_the_host():
    """No access beyond a tensor, a block's shared memory or an array, and no undefined behaviour."""
    host_library.build(sanitize=True)
    files = [str(HERE / name) for name in ("test_group_norm_regimes_on_host.py", "test_op_suite_on_host.py")]
    options = ("-q", "-x", "-s", "-m", "slow", "--sanitize", "-k", TESTS)
    assert " passed" in run_clean("-m", "pytest", *options, *files)


def test_raw_ops_of_the_cuda_library():
    library = host_library.build(sanitize=True)
    assert f"{CALLS} calls" in run_clean(str(HERE / "fuzz_raw_ops.py"), str(CALLS), "1", str(library))


@pytest.fixture(scope="module")
def sanitized_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cpu_library.package(tmp_path_factory.mktemp("sanitized"), cpu_library.build(sanitize=True))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_raw_ops_of_the_cpu_library(sanitized_package, isa, monkeypatch):
    cpu_library.skip_unless_here(isa)
    monkeypatch.setenv("DD_KERNELS_CPU_ISA", isa)
    output = run_clean(str(HERE / "fuzz_raw_ops.py"), str(CALLS), "1", python_path=sanitized_package)
    assert f"{CALLS} calls" in output
