"""Builds the CUDA kernels for the host, where a block's threads run as fibers, and loads them.

The sources are those of the CUDA library, compiled by a C++ compiler against the stand-ins in
``tests/csrc/host``. The ops are then ``torch.ops.dd_kernels_host.*``, on CPU tensors.
"""

from __future__ import annotations

import ctypes
import math
from pathlib import Path
from typing import NamedTuple

import compiled
import torch
from compiled import HERE, ROOT

OPS = (
    "randn",
    "q_sample",
    "reverse_step",
    "group_norm_silu",
    "group_norm_silu_backward",
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REGIMES, ACCESSES = ("warp", "resident", "split"), ("contiguous", "channels_last", "scalar")
HOST = HERE / "host"


def build(sanitize: bool = False) -> Path:
    """Returns the library; what an earlier run compiled from the same sources is used again."""
    sources = [*ROOT.glob("csrc/*/cuda*.cu"), *ROOT.glob("csrc/*/cuda*.cpp"), HOST / "host.cpp"]
    flags = ["-O1", "-Wno-unknown-pragmas", *(compiled.SANITIZE if sanitize else [])]
    return compiled.build("host", sorted(sources), flags, [HOST])


class Plan(NamedTuple):
    """The fields of NormPlan in csrc/group_norm_silu/cuda_plan.h."""

    regime: str
    access: str
    resident: int
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
        """Sets the chip that kernels are planned for, and the PTX that they are compiled to; by default an H200."""
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
        """Returns the plan of GroupNorm of x [N, C, ...] for the chip that is set."""
        pixels = math.prod(shape[2:])
        numbers = [shape[0], shape[1], pixels, groups, channels_last, aligned, DTYPES.index(dtype), backward]
        numbers.append(shape[1] if x_channels is None else x_channels)
        plan = (ctypes.c_int64 * len(Plan._fields))()
        self._library.dd_host_plan((ctypes.c_int64 * len(numbers))(*numbers), plan)
        return Plan(REGIMES[plan[0]], ACCESSES[plan[1]], *plan[2:])

    def set_backwards(self, backwards: bool) -> None:
        """Sets whether a block's last thread runs first, an order in which a missing barrier shows."""
        self._library.dd_host_backwards(ctypes.c_bool(backwards))

    def set_refuses(self, refuses: bool) -> None:
        """Sets whether every launch is refused."""
        self._library.dd_host_refuse(ctypes.c_bool(refuses))

    def launches(self, blocks: int) -> bool:
        """Returns whether a grid of so many blocks can be launched."""
        self._library.dd_host_launches.restype = ctypes.c_bool
        return self._library.dd_host_launches(ctypes.c_int64(blocks))


def define_ops() -> None:
    """Schemas of ``dd_kernels_host``: those of ``dd_kernels``."""
    for name in OPS:
        schema = str(getattr(torch.ops.dd_kernels, name).default._schema)
        torch.library.define(f"dd_kernels_host::{name}", schema[schema.index("(") :])
        torch.library.register_fake(f"dd_kernels_host::{name}", lambda *outputs_are_arguments: None)
