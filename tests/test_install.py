"""What pip builds: a library for every torch and every x86-64, and an installation that does without it."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import dd_kernels

ROOT = Path(__file__).parents[1]
LIBRARY = next(Path(dd_kernels.__file__).parent.glob("_cpu.*so"), None)
needs_library = pytest.mark.skipif(LIBRARY is None, reason="installed without a C++ compiler")


def symbols(*options):
    return subprocess.run(["nm", "-DC", *options, str(LIBRARY)], capture_output=True, text=True, check=True).stdout


@needs_library
@pytest.mark.skipif(shutil.which("nm") is None, reason="binutils is not installed")
def test_imports_nothing_but_the_stable_abi():
    imported = symbols("--undefined-only")
    assert "torch_parallel_for" in imported
    assert not re.findall(r".*\b(?:at|c10|caffe2|torch::(?!stable|headeronly))::.*", imported)
    assert not re.findall(r".*\bPy\w+.*", imported)


@needs_library
@pytest.mark.skipif(shutil.which("objdump") is None, reason="binutils is not installed")
def test_wide_vectors_only_in_functions_chosen_at_run_time():
    """A function of another namespace compiled with AVX2 or AVX-512 would fault on an older processor."""
    code = subprocess.run(
        ["objdump", "-dC", "--no-show-raw-insn", str(LIBRARY)], capture_output=True, text=True, check=True
    ).stdout
    if "x86-64" not in code:
        return
    function, with_avx2, with_avx512 = "", set(), set()
    for line in code.splitlines():
        if line.endswith(">:"):
            function = line
        elif "%zmm" in line or "%k" in line:
            with_avx512.add(function)
        elif "%ymm" in line:
            with_avx2.add(function)
    assert with_avx2
    assert with_avx512
    assert all("avx512" in name or "@" in name for name in with_avx512), with_avx512
    assert all("avx2" in name or "avx512" in name or "@" in name for name in with_avx2), with_avx2


@pytest.mark.skipif(
    int(importlib.metadata.version("setuptools").split(".")[0]) < 77, reason="setuptools reads SPDX licences from 77 on"
)
@pytest.mark.parametrize("compiler", ["/nonexistent/c++"])
def test_setup_without_a_compiler_warns_and_builds_nothing(tmp_path, compiler):
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "CXX": compiler, "DD_KERNELS_CUDA": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler (/nonexistent/c++)" in done.stderr
    assert not list(tmp_path.rglob("_cpu*"))


def test_setup_with_an_empty_compiler_takes_the_default():
    """An empty CXX means the default compiler, as in make; torch reads the variable too."""
    show = "lambda **how: print([e.name for e in how['ext_modules']], os.environ.get('CXX'))"
    code = f"import os, runpy, setuptools; setuptools.setup = {show}; runpy.run_path('setup.py')"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        env={**os.environ, "CXX": " ", "DD_KERNELS_CUDA": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == f"{['dd_kernels._cpu'] if shutil.which('c++') else []} None"


@pytest.fixture(scope="module")
def source_distribution(tmp_path_factory):
    """What ``python -m build --sdist`` packs, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder), "sdist", "-d", str(folder)]
    environment = {**os.environ, "DD_KERNELS_CUDA": "0"}
    subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        filters = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.11.3 and before have none
        archive.extractall(folder, **filters)
    return next(path for path in folder.iterdir() if (path / "PKG-INFO").exists())


@pytest.mark.slow
def test_source_distribution_has_every_source(source_distribution):
    folders = ("csrc", "tests", "tools", "benchmarks", "dd_kernels")
    built = {".so", ".pyc", ".pyo", ".pyd"}
    files = [path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    wanted = [path for path in files if path.suffix not in built and not any(p.startswith(".") for p in path.parts)]
    top = [Path(name) for name in ("setup.py", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE")]
    assert [path for path in top + wanted if not (source_distribution / path).exists()] == []


@pytest.mark.slow
@needs_library
def test_built_from_the_source_distribution_it_runs_without_a_compiler(source_distribution, tmp_path):
    """The files of a wheel, made from the sdist, pass the op tests where no compiler is found."""
    command = [sys.executable, "setup.py", "-q", "build", "--build-lib", str(tmp_path / "wheel")]
    environment = {**os.environ, "DD_KERNELS_CUDA": "0"}
    subprocess.run(command, cwd=source_distribution, env=environment, capture_output=True, check=True)
    shutil.copytree(source_distribution / "tests", tmp_path / "tests")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    where = "import dd_kernels.backend as b; print(b.__file__, b.unavailable('cpu'))"
    environment |= {"PATH": str(tmp_path), "PYTHONPATH": str(tmp_path / "wheel")}
    run = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "check": False}
    shown = subprocess.run([sys.executable, "-c", where], **run)
    assert shown.stdout == f"{tmp_path / 'wheel/dd_kernels/backend.py'} None\n", shown.stderr
    files = [f"tests/ops/test_{op}.py" for op in ("randn", "q_sample", "reverse_step", "group_norm_silu")]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-k", "cpu", *files], **run)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
