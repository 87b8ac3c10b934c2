"""Runs diffusers' own scheduler tests with this package's classes in the place of theirs.

    python tests/integrations/diffusers/run_diffusers_tests.py DIFFUSERS_CHECKOUT [pytest options]

The checkout's ``tests`` folder is used, with the diffusers that is installed.
"""

from __future__ import annotations

import pathlib
import sys

import diffusers
import pytest

from dd_kernels.integrations import diffusers as ours

FILES = {
    "test_scheduler_ddpm.py": "DDPMScheduler",
    "test_scheduler_ddim.py": "DDIMScheduler",
    "test_scheduler_ddim_inverse.py": "DDIMInverseScheduler",
    "test_scheduler_unclip.py": "UnCLIPScheduler",
    "test_scheduler_euler.py": "EulerDiscreteScheduler",
    "test_scheduler_lcm.py": "LCMScheduler",
    "test_scheduler_dpm_multi.py": "DPMSolverMultistepScheduler",
    "test_scheduler_euler_ancestral.py": "EulerAncestralDiscreteScheduler",
}


def main(checkout: str, *options: str) -> int:
    """pytest's exit status."""
    folder = pathlib.Path(checkout) / "tests" / "schedulers"
    missing = [name for name in FILES if not (folder / name).exists()]
    if missing:
        raise FileNotFoundError(f"{folder} must be the schedulers' tests of diffusers; it has no {', '.join(missing)}")
    # The test files import the classes by these names.
    for name in FILES.values():
        setattr(diffusers, name, getattr(ours, name))
    return pytest.main([*(str(folder / name) for name in FILES), "--rootdir", checkout, *options])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
