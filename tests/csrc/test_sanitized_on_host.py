"""The CUDA kernels on the host under AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import subprocess
import sys
from pathlib import Path

import host_library
import pytest

HERE = Path(__file__).parent
# Every regime of every layout, and the elementwise ops in every order of elements.
TESTS = "test_regime or (test_randn or test_q_sample or test_reverse_step) and not any_shape and not statistic"
REPORTS = ("AddressSanitizer", "runtime error:")


@pytest.mark.slow
@pytest.mark.skipif(host_library.address_sanitizer() is None, reason="the C++ compiler has no AddressSanitizer")
def test_no_report():
    """No access beyond a tensor, a block's shared memory or an array, and no undefined behaviour."""
    host_library.build(sanitize=True)
    environment = {
        **os.environ,
        "LD_PRELOAD": host_library.address_sanitizer(),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    files = [str(HERE / name) for name in ("test_group_norm_regimes_on_host.py", "test_op_suite_on_host.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "--sanitize", "-k", TESTS, *files]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=HERE.parents[1])
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-8000:]
    assert not any(report in output for report in REPORTS), output[-8000:]
    assert " passed" in output
