"""Tests the package with every version of torch, Triton and diffusers that it claims: ``python -m tools.versions``.

The oldest versions are those of pyproject.toml, the newest those of the package index. Of Triton every minor version
between them is tested. ``--small`` keeps the torch that is installed and adds each version of Triton and the oldest
and newest diffusers to it, which downloads little. Without it, the oldest and newest torch are installed too, each in
a virtual environment of its own, which downloads gigabytes where only CUDA builds are offered. CI runs
``--small --quick``.

A version runs the checks that it can change. For each check the numbers of tests are printed, then every failure, and
every reason for which tests were skipped.
"""

from __future__ import annotations

import argparse
import collections
import importlib.metadata
import itertools
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
import venv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import processes

ROOT = processes.ROOT
AHEAD_OF_TIME = ("tests/ops/test_triton.py", "-k", "not every_architecture and not amd and not share_a_cache")
CHECKS = {
    "op tests": ("tests/ops", "-m", "not slow"),
    "op tests on Triton": ("tests/ops", "-m", "not slow", "-k", "triton"),
    "ahead of time": (*AHEAD_OF_TIME, "-m", "slow"),
    "capture": ("tests", "-m", "not slow", "-k", "(compile and not compiler) or capture or graph or export"),
    "diffusers": ("tests/integrations/diffusers", "-m", "not slow"),
}
TRITON_QUICK = "tests/ops/test_triton_activations.py tests/ops/test_triton_noise.py tests/ops/test_q_sample.py"
# What one version of each takes less than a minute for: CI runs these.
QUICK = {
    "op tests on Triton": (*TRITON_QUICK.split(), "-m", "not slow", "-k", "triton and not any_shape"),
    "diffusers": ("tests/integrations/diffusers/test_diffusers.py", "-m", "not slow"),
}
CHECKED = {
    "torch": ("op tests", "ahead of time", "capture", "diffusers"),
    "triton": ("op tests on Triton", "ahead of time"),
    "diffusers": ("diffusers", "capture"),
}
# What a version needs beside it: Triton 3.6's interpreter makes scalars of one-element arrays, which NumPy 2.4 refuses.
# torch 2.10 comes with Triton 3.6.
BESIDE = {("triton", "3.6"): ["numpy<2.4"], ("torch", "2.10"): ["numpy<2.4"]}
BUILDS = ("setuptools", "ninja")  # what the tests of csrc build with
SUMMARY = re.compile(r"^(FAILED|ERROR|SKIPPED) (?:\[(\d+)\] )?(.*)$")
SHOWN = 20  # failures that are printed of one check
Version = tuple[int, ...]


@dataclass(frozen=True)
class Environment:
    """Package ``name`` in ``version``, added to the running environment, or for torch in an environment of its own."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


@dataclass(frozen=True)
class Result:
    """What a check found in an environment: pytest's last line, the failures, and skipped tests by reason."""

    summary: str
    failures: tuple[str, ...]
    skipped: dict[str, int]


def claimed(name: str) -> str:
    """Returns the oldest version of a package that pyproject.toml allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = itertools.chain(project["dependencies"], *project["optional-dependencies"].values())
    found = {match[1] for one in requirements if (match := re.fullmatch(rf"{name}>=([\d.]+)", one))}
    if len(found) != 1:
        raise ValueError(f"pyproject.toml must require one version {name}>=...; found {sorted(found)}")
    return found.pop()


def _parsed(version: str) -> Version:
    """Returns the numbers of a version, which compare as versions do."""
    return tuple(int(number) for number in version.split("."))


def offered(name: str) -> list[str]:
    """Returns the released versions of a package that pip offers for this Python, oldest first."""
    command = [sys.executable, "-m", "pip", "index", "versions", name]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    versions = re.search(r"^Available versions: (.*)$", printed, re.MULTILINE)
    if versions is None:
        raise ValueError(f"pip index versions {name} lists no versions: {printed!r}")
    released = [one for one in versions[1].split(", ") if re.fullmatch(r"[\d.]+", one)]
    return sorted(released, key=_parsed)


def newest_of_each_minor(versions: Iterable[str], oldest: str) -> list[str]:
    """Returns the newest patch release of every minor version from ``oldest`` on."""
    newest = {_parsed(version)[:2]: version for version in sorted(versions, key=_parsed)}
    return [version for minor, version in newest.items() if minor >= _parsed(oldest)[:2]]


def matrix(small: bool) -> list[Environment]:
    """Returns the environments, in the order of their cost."""
    found = []
    for name in ("diffusers", "triton") if small else ("diffusers", "triton", "torch"):
        versions = newest_of_each_minor(offered(name), claimed(name))
        ends = versions if name == "triton" else sorted({versions[0], versions[-1]}, key=_parsed)
        found += [Environment(name, version) for version in ends]
    return found


def make(environment: Environment, folder: Path) -> Path:
    """Makes the virtual environment and returns its Python.

    The environment of a torch installs everything anew. Another one sees the packages of the running environment
    behind its own, so that only one package is downloaded.
    """
    venv.create(folder, with_pip=False)  # with pip it would also get an old setuptools
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--disable-pip-version-check"]
    minor = ".".join(environment.version.split(".")[:2])
    pinned = [f"{environment.name}=={environment.version}", *BESIDE.get((environment.name, minor), [])]
    if environment.name == "torch":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        others = [one for one in project["test"] if not one.startswith("dd_kernels")]
        install += [*pinned, "safetensors", "pillow", "tqdm", "scikit-learn", "diffusers", "triton", *BUILDS, *others]
    else:
        behind = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
        # addsitedir also follows the .pth files of the running environment.
        (behind / "running.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
        install += pinned
    subprocess.run(install, check=True)
    return python


def read(lines: Sequence[str]) -> Result:
    """Reads the output of ``pytest -q -rfEs``."""
    failures, skipped = [], collections.Counter[str]()
    for line in lines:
        if (match := SUMMARY.match(line)) is None:
            continue
        if match[1] == "SKIPPED":
            skipped[match[3].partition(": ")[2]] += int(match[2])
        else:
            failures.append(match[3])
    last = next((line for line in reversed(lines) if line.strip()), "no output")
    return Result(last.strip("= "), tuple(failures), dict(skipped))


def described(result: Result) -> list[str]:
    """Returns the failures, and the reasons for which tests were skipped, in lines."""
    lines = [f"      failed: {one}" for one in result.failures[:SHOWN]]
    if len(result.failures) > SHOWN:
        lines.append(f"      and {len(result.failures) - SHOWN} more failed")
    return lines + [f"      skipped {count}: {reason}" for reason, count in result.skipped.items()]


def check(python: Path, name: str, folder: Path, seconds: float, tests: Sequence[str]) -> Result:
    """Runs the tests of one check in an environment."""
    command = [str(python), "-m", "pytest", "-q", "-rfEs", "--tb=no", "-p", "no:cacheprovider", "-o", "addopts="]
    running = processes.start([*command, *tests], folder / f"{name.replace(' ', '_')}.log")
    status = running.finish(time.monotonic() + seconds)
    result = read(running.lines())
    if status == 0:
        return result
    return Result(
        f"{result.summary} ({status if isinstance(status, str) else f'exit status {status}'})",
        result.failures or (result.summary,),
        result.skipped,
    )


def run(environments: Sequence[Environment], folder: Path, seconds: float, quick: bool = False) -> bool:
    """Makes each environment, runs its checks and prints what they found; returns whether all passed."""
    checks = QUICK if quick else CHECKS
    passed = True
    for environment in environments:
        print(f"== {environment}", flush=True)
        home = folder / str(environment).replace(" ", "-")
        try:
            python = make(environment, home)
        except subprocess.CalledProcessError as error:
            print(f"   cannot be installed: exit status {error.returncode}")
            passed = False
            continue
        for name in (one for one in CHECKED[environment.name] if one in checks):
            result = check(python, name, home, seconds, checks[name])
            passed = passed and not result.failures
            print("\n".join([f"   {name}: {result.summary}", *described(result)]), flush=True)
    return passed


def main() -> int:
    """Runs the command line; the exit status is 1 where a check failed."""
    parser = argparse.ArgumentParser(prog="python -m tools.versions", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="keep the installed torch, and so download little")
    parser.add_argument(
        "--quick", action="store_true", help="leave out the installed versions, and run few tests of each other one"
    )
    parser.add_argument("--only", metavar="NAME[=VERSION]", help="only this package, or this version of it")
    parser.add_argument("--folder", type=Path, help="keep the environments and logs here (a temporary folder)")
    parser.add_argument("--seconds", type=float, default=1800, help="limit of one check (%(default)s)")
    options = parser.parse_args()
    name, _, version = (options.only or "").partition("=")
    if name and name not in CHECKED:
        parser.error(f"--only must name one of {', '.join(CHECKED)}; got {name!r}")
    if name and version:
        wanted = [Environment(name, version)]
    else:
        wanted = [one for one in matrix(options.small) if not name or one.name == name]
    if options.quick:
        wanted = [one for one in wanted if one.version != importlib.metadata.version(one.name)]
    installed = {one: importlib.metadata.version(one) for one in CHECKED}
    print("installed:", ", ".join(f"{one} {version}" for one, version in installed.items()), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        return 0 if run(wanted, options.folder or Path(temporary), options.seconds, options.quick) else 1


if __name__ == "__main__":
    sys.exit(main())
