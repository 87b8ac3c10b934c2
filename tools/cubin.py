"""Reads registers, stack and instructions of compiled kernels from their cubins, with the tools in Triton's package."""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence

import triton

_BINARIES = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = 16  # bytes


@dataclasses.dataclass(frozen=True)
class Usage:
    """What one kernel uses: registers, stack bytes, spill instructions, and access widths.

    ``loads`` and ``stores`` count the global-memory instructions by their width in bits.
    """

    registers: int
    stack: int
    spills: int
    instructions: int
    loads: dict[int, int]
    stores: dict[int, int]


def _tool(name: str, *arguments: str) -> str:
    """Runs one of the programs in Triton's package and returns what it prints."""
    done = subprocess.run([str(_BINARIES / name), *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def _code(cubin: bytes) -> bytes:
    """Returns the instructions of the one kernel in a cubin, its ELF section ``.text.<name>``."""
    (sections,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, sections + i * size) for i in range(count)]
    strings = headers[names][4]
    (code,) = (cubin[at : at + n] for name, *_, at, n in headers if cubin.startswith(b".text.", strings + name))
    return code


def _widths(opcodes: list[str], stem: str) -> dict[int, int]:
    """Counts the instructions that begin with ``stem`` by their width in bits; 32 is the unmarked width."""
    widths: collections.Counter[int] = collections.Counter()
    for opcode in opcodes:
        if opcode.startswith(stem):
            bits = re.search(r"\.[US]?(8|16|64|128|256)(?:\.|$)", opcode)
            widths[int(bits.group(1)) if bits else 32] += 1
    return dict(sorted(widths.items()))


def usages(cubins: Sequence[bytes], arch: int) -> list[Usage]:
    """Returns what each kernel uses.

    All kernels are disassembled by one nvdisasm, because starting it takes as long as compiling a kernel.
    """
    codes = [_code(cubin) for cubin in cubins]
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, "code")
        file.write_bytes(b"".join(codes))
        listing = _tool("nvdisasm", "--binary", f"SM{arch}a" if arch >= 90 else f"SM{arch}", str(file))
        resources = []
        for cubin in cubins:
            file.write_bytes(cubin)
            resources.append(_tool("cuobjdump", "--dump-resource-usage", str(file)))
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", listing)
    if len(opcodes) * _INSTRUCTION != sum(map(len, codes)):
        raise RuntimeError(f"nvdisasm lists {len(opcodes)} instructions in {sum(map(len, codes))} bytes of code")
    result = []
    for code, resource in zip(codes, resources, strict=True):
        own, opcodes = opcodes[: len(code) // _INSTRUCTION], opcodes[len(code) // _INSTRUCTION :]
        ((registers, stack),) = [map(int, pair) for pair in re.findall(r"REG:(\d+) STACK:(\d+)", resource)]
        spills = sum(opcode.startswith(("LDL", "STL")) for opcode in own)
        result.append(Usage(registers, stack, spills, len(own), _widths(own, "LDG"), _widths(own, "STG")))
    return result
