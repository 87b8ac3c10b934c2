"""Every snippet and command of the README is run: here, or (what installs and tests) by .ci/run."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = sorted(
    {
        line.strip()
        for block in [*re.findall(r"```bash\n(.*?)```", README, re.DOTALL), *re.findall(r"\| `([^`]+)` \|", README)]
        for line in block.splitlines()
        if line.strip()
    }
)
OURS = [c for c in COMMANDS if c.startswith(("python -m dd_kernels", "dd-kernels"))]


def test_the_readme_has_snippets_and_commands():
    assert len(SNIPPETS) >= 3
    assert len(OURS) >= 3


@pytest.mark.parametrize("snippet", SNIPPETS, ids=[s.strip().splitlines()[0][:50] for s in SNIPPETS])
def test_snippet_runs(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = SNIPPETS[0].split("\nschedule")[0]  # later snippets use the imports and the model of the first
    exec(compile(f"{first}\n{snippet}", "README.md", "exec"), {})


def test_commands_run_one_after_another(tmp_path):
    for command in OURS:
        words = shlex.split(command)
        words = [sys.executable, "-m", "dd_kernels", *words[1 if words[0] == "dd-kernels" else 3 :]]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{command}\n{done.stderr}"


def test_every_other_command_is_one_that_ci_runs():
    script = (ROOT / ".ci" / "run").read_text()
    others = [part.strip() for c in COMMANDS if c not in OURS and not re.match(r"^\w+$", c) for part in c.split("&&")]
    unknown = [part for part in others if part.startswith(("pip", "pytest", "ruff")) and part not in script]
    assert not unknown
