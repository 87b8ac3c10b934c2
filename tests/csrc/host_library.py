"""Builds the CUDA kernels for the host, where a block's threads run as fibers, and loads them.

The sources are those of the CUDA library, compiled by a C++ compiler against the stand-ins in
``tests/csrc/host``. The ops are then ``torch.ops.dd_kernels_host.*``, on CPU tensors.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import hashlib
import math
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.cpp_extension import include_paths, library_paths

OPS = (
    "randn",
    "q_sample",
    "reverse_step",
    "group_norm_silu",
    "group_norm_silu_backward",
    "join_group_norm_silu",
    "join_group_norm_silu_backward",
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REGIMES, ACCESSES = ("warp", "held", "split"), ("contiguous", "channels_last", "scalar")
ROOT = Path(__file__).parents[2]
HOST = Path(__file__).parent / "host"
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def compiler() -> str | None:
    """The C++ compiler to build with; None if there is none."""
    return shutil.which((os.environ.get("CXX", "").split() or ["c++"])[0])


def address_sanitizer() -> str | None:
    """Its library, which a process must have loaded before anything else; None if the compiler has none."""
    if compiler() is None:
        return None
    answer = subprocess.run([compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True, check=False)
    path = answer.stdout.strip()
    return path if os.path.isabs(path) else None


def _sources() -> list[Path]:
    return sorted([*ROOT.glob("csrc/*/cuda*.cu"), *ROOT.glob("csrc/*/cuda*.cpp"), HOST / "host.cpp"])


def _digest(*parts: object) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.read_bytes() if isinstance(part, Path) else repr(part).encode())
    return digest.hexdigest()[:16]


def _with_headers(source: Path) -> list[Path]:
    """A source and all of this repository's files that it includes: the CPU library's headers change nothing here."""
    found: set[Path] = set()
    left = [source]
    while left:
        path = left.pop()
        if path in found:
            continue
        found.add(path)
        for name in re.findall(r'^#include ["<](.+)[">]', path.read_text(), re.MULTILINE):
            included = (folder / name for folder in (path.parent, HOST, ROOT / "csrc"))
            left += [path for path in included if path.is_file()][:1]
    return sorted(found)


def _compile(command: list[str], source: Path, target: Path) -> Path:
    """``target`` itself, made unless an earlier run on the same sources made it."""
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}.o")
        subprocess.run([*command, "-x", "c++", "-c", str(source), "-o", str(partial)], check=True)
        partial.replace(target)
    return target


def build(sanitize: bool = False) -> Path:
    """The library; what an earlier run compiled from the same sources is used again."""
    folder = Path(tempfile.gettempdir()) / f"dd_kernels_host_{os.getuid()}"
    folder.mkdir(exist_ok=True)
    flags = [*FLAGS, *(SANITIZE if sanitize else []), "-DTORCH_TARGET_VERSION=0x020A000000000000"]
    command = [compiler(), *flags, *(f"-I{path}" for path in (HOST, ROOT / "csrc", *include_paths()))]
    common = _digest(command, torch.__version__)
    digests = {source: _digest(common, *_with_headers(source)) for source in _sources()}
    targets = {source: folder / f"{source.parent.name}_{source.stem}_{key}.o" for source, key in digests.items()}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda item: _compile(command, *item), targets.items()))
    library = folder / f"dd_kernels_host_{_digest([str(path) for path in objects])}.so"
    if not library.exists():
        partial = library.with_suffix(f".{os.getpid()}")
        link = ["-shared", *(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10"]
        subprocess.run([compiler(), *flags, *map(str, objects), *link, "-o", str(partial)], check=True)
        partial.replace(library)
    return library


class Plan(NamedTuple):
    """As in csrc/group_norm_silu/cuda_plan.h."""

    regime: str
    access: str
    held: int
    cluster: int
    splits: int
    tile_channels: int
    tiles: int
    wave_tiles: int
    rows: int
    rows_each: int
    partials: int


class HostLibrary:
    """The library, loaded, and what tests set in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        torch.ops.load_library(str(path))
        self._library = ctypes.CDLL(str(path))

    def set_chip(
        self,
        sm_count: int = 132,
        major: int = 9,
        l2_bytes: int = 60 << 20,
        largest_cluster: int = 8,
        ptx_version: int = 90,
    ) -> None:
        """The chip that kernels are planned for, and what they are compiled for; an H200 unless told otherwise."""
        last = (ctypes.c_int(largest_cluster), ctypes.c_int(ptx_version))
        self._library.dd_host_chip(ctypes.c_int(sm_count), ctypes.c_int(major), ctypes.c_int64(l2_bytes), *last)

    def plan(
        self,
        shape: tuple[int, ...],
        groups: int,
        dtype: torch.dtype = torch.bfloat16,
        channels_last: bool = False,
        aligned: bool = True,
        backward: bool = False,
        x_channels: int | None = None,
    ) -> Plan:
        """How GroupNorm of x [N, C, ...] is cut for the chip that is set."""
        pixels = math.prod(shape[2:])
        numbers = [shape[0], shape[1], pixels, groups, channels_last, aligned, DTYPES.index(dtype), backward]
        numbers.append(shape[1] if x_channels is None else x_channels)
        plan = (ctypes.c_int64 * len(Plan._fields))()
        self._library.dd_host_plan((ctypes.c_int64 * len(numbers))(*numbers), plan)
        return Plan(REGIMES[plan[0]], ACCESSES[plan[1]], *plan[2:])

    def set_backwards(self, backwards: bool) -> None:
        """Whether a block's last thread runs first, which a missing barrier does not survive."""
        self._library.dd_host_backwards(ctypes.c_bool(backwards))

    def set_refuses(self, refuses: bool) -> None:
        """Whether no kernel can be launched."""
        self._library.dd_host_refuse(ctypes.c_bool(refuses))

    def launches(self, blocks: int) -> bool:
        """Whether a grid of so many blocks is launched."""
        self._library.dd_host_launches.restype = ctypes.c_bool
        return self._library.dd_host_launches(ctypes.c_int64(blocks))


def define_ops() -> None:
    """Schemas of ``dd_kernels_host``: those of ``dd_kernels``."""
    for name in OPS:
        schema = str(getattr(torch.ops.dd_kernels, name).default._schema)
        torch.library.define(f"dd_kernels_host::{name}", schema[schema.index("(") :])
        torch.library.register_fake(f"dd_kernels_host::{name}", lambda *outputs_are_arguments: None)
