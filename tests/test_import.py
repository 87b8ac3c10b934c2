"""What `import dd_kernels` loads: nothing that takes longer than the package itself."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SLOW = (
    "torch._dynamo",
    "torch._inductor",
    "sympy",
    "triton",
    "PIL",
    "safetensors",
    "diffusers",
    "matplotlib",
    "sklearn",
)


def loaded_by(statement):
    """The modules that a statement loads in a new process that has torch."""
    code = f"import sys, torch; before = set(sys.modules); {statement}; print(*sys.modules.keys() - before)"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()


def test_an_import_loads_this_package_and_little_else():
    loaded = loaded_by("import dd_kernels")
    assert not [name for name in loaded if name.startswith(SLOW)]
    assert len([name for name in loaded if not name.startswith("dd_kernels")]) <= 12


def test_a_command_loads_its_model_without_dynamo():
    loaded = loaded_by("from dd_kernels.apps.checkpoint import load_model; load_model('digits'); load_model('fashion')")
    assert "torch._dynamo" not in loaded


def test_a_first_import_on_another_device_changes_nothing():
    code = (
        "with torch.device('meta'): import dd_kernels as dd\n"
        "x = torch.randn(1, 4, 2, 2)\n"
        "y = dd.group_norm_silu(x, 2) + dd.q_sample(x, 3, dd.linear_schedule(10), seed=1)\n"
        "assert y.isfinite().all()"
    )
    subprocess.run([sys.executable, "-c", f"import torch\n{code}"], cwd=ROOT, check=True)
