"""Compiles the kernels' sources into libraries that only tests load, and keeps what an earlier run compiled."""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
SANITIZER_REPORTS = ("AddressSanitizer", "runtime error:")


def compiler() -> str | None:
    """The C++ compiler to build with; None if there is none."""
    return shutil.which((os.environ.get("CXX", "").split() or ["c++"])[0])


def _runtime_library(name: str) -> str | None:
    """The path of a library of the compiler's own; None if it has none of that name."""
    if compiler() is None:
        return None
    answer = subprocess.run([compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=False)
    path = answer.stdout.strip()
    return path if os.path.isabs(path) else None


def address_sanitizer() -> str | None:
    """The library of AddressSanitizer, which a process must load before any other; None if the compiler has none."""
    return _runtime_library("libasan.so")


def sanitized_environment() -> dict[str, str]:
    """The environment of a process that loads a library built with :data:`SANITIZE`."""
    # AddressSanitizer looks for the function that throws when it starts, and Python alone does not load libstdc++.
    preload = filter(None, (address_sanitizer(), _runtime_library("libstdc++.so.6")))
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}  # the leaks are Python's own
    return {**os.environ, "LD_PRELOAD": " ".join(preload), **options}


def _digest(*parts: object) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.read_bytes() if isinstance(part, Path) else repr(part).encode())
    return digest.hexdigest()[:16]


def _with_headers(source: Path, folders: Sequence[Path]) -> list[Path]:
    """Returns a source and this repository's files that it includes, its DD_KERNEL among them."""
    found: set[Path] = set()
    left = [source]
    while left:
        path = left.pop()
        if path in found:
            continue
        found.add(path)
        names = re.findall(r'^#(?:include|define DD_KERNEL) ["<](.+)[">]', path.read_text(), re.MULTILINE)
        for name in names:
            left += [file for folder in (path.parent, *folders) if (file := folder / name).is_file()][:1]
    return sorted(found)


def _compile(command: Sequence[str], source: Path, target: Path) -> Path:
    """Returns ``target``, which is compiled unless an earlier run on the same sources did so."""
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}.o")
        subprocess.run([*command, "-x", "c++", "-c", str(source), "-o", str(partial)], check=True)
        partial.replace(target)
    return target


def build(name: str, sources: Sequence[Path], flags: Sequence[str], folders: Sequence[Path]) -> Path:
    """Returns the library of ``sources``, which include from ``folders``, csrc/ and torch's headers."""
    cache = Path(tempfile.gettempdir()) / f"dd_kernels_{name}_{os.getuid()}"
    cache.mkdir(exist_ok=True)
    folders = [*folders, ROOT / "csrc"]
    flags = [*flags, "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall"]
    flags += ["-DTORCH_TARGET_VERSION=0x020A000000000000"]
    command = [str(compiler()), *flags, *(f"-I{path}" for path in (*folders, *include_paths()))]
    common = _digest(command, torch.__version__)
    digests = {source: _digest(common, *_with_headers(source, folders)) for source in sources}
    targets = {source: cache / f"{source.parent.name}_{source.stem}_{key}.o" for source, key in digests.items()}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda item: _compile(command, *item), targets.items()))
    library = cache / f"dd_kernels_{name}_{_digest([str(path) for path in objects])}.so"
    if not library.exists():
        partial = library.with_suffix(f".{os.getpid()}")
        link = ["-shared", *(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10"]
        subprocess.run([str(compiler()), *flags, *map(str, objects), *link, "-o", str(partial)], check=True)
        partial.replace(library)
    return library
