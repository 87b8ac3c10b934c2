"""Every snippet and command of the README is run: here, or (what installs and tests) by .ci/run."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
FIRST_SCREEN = README.split("\n## ")[0]
ROWS = re.findall(r"^\| [^|`]+ \| `([^`]+)` \|", FIRST_SCREEN, re.MULTILINE)
BLOCKS = [*ROWS, *re.findall(r"```bash\n(.*?)```", README, re.DOTALL)]
COMMANDS = [part.strip() for block in BLOCKS for line in block.splitlines() for part in line.split("&&")]
OURS = [c for c in COMMANDS if c.startswith(("python -m dd_kernels", "dd-kernels", "torchrun"))]
STARTS = {"dd-kernels": ["-m", "dd_kernels"], "torchrun": ["-m", "torch.distributed.run"], "python": []}


def test_the_readme_has_snippets_and_commands():
    assert len(SNIPPETS) >= 3
    assert len(OURS) >= 3
    assert len(ROWS) >= 6


@pytest.mark.parametrize("snippet", SNIPPETS, ids=[s.strip().splitlines()[0][:50] for s in SNIPPETS])
def test_snippet_runs(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = SNIPPETS[0].split("\nschedule")[0]  # later snippets use the imports and the model of the first
    exec(compile(f"{first}\n{snippet}", "README.md", "exec"), {})


def test_what_is_imported_instead_is_there():
    """The lines to change: each of theirs has the names that code written against it imports."""
    lines = re.findall(r"`from ([\w.]+) import [^`]*` → `(from dd_kernels[^`]*)`", README)
    names = {
        "guided_diffusion.gaussian_diffusion": "GaussianDiffusion, LossType, ModelMeanType, ModelVarType, "
        "get_named_beta_schedule, betas_for_alpha_bar, _extract_into_tensor",
        "functions.denoising": "generalized_steps, ddpm_steps",
        "ldm.models.diffusion.ddim": "DDIMSampler",
    }
    assert {theirs for theirs, _ in lines} == set(names)
    for theirs, line in lines:
        exec(line.replace("...", names[theirs]), {})


@pytest.mark.slow
def test_commands_run_one_after_another(tmp_path):
    for command in OURS:
        words = shlex.split(command)
        words = [sys.executable, *STARTS[words[0]], *words[1:]]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{command}\n{done.stderr}"


def test_what_is_installed_and_tested_is_there():
    """The commands that install, test and lint: .ci/run runs them; the others name what exists."""
    script = (ROOT / ".ci" / "run").read_text().replace(" -q ", " ")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for command in (command for command in COMMANDS if command not in OURS):
        words = shlex.split(command)
        if words[:3] == ["pip", "install", "-e"]:
            assert words[3] == "." or words[3][2:-1] in extras, command
        elif words[0] == "pytest":
            assert all((ROOT / word).exists() for word in words[1:2]), command
        else:
            assert command in script, command
    for command in ("pip install -e .", "pip install -e '.[test]'", "pytest", "ruff check ."):
        assert command in script
