"""Safetensors files: written in one pass with a checksum, and read into memory of this process.

The format is that of the package safetensors: 8 bytes of header length, a JSON header with name, dtype, shape and byte
range of every tensor and string metadata, then the tensors' bytes. The package's own reader maps the file into memory:
a file that is overwritten or truncated later changes the tensors or kills the process. This reader copies, after it
checked the header against the file's size.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .files import PathLike, atomic_write, check_readable

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Enough for 15,000 tensors; a JSON text of this size takes less than 50 MB once it is parsed.
LONGEST_HEADER = 2 << 20
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in the file, in bytes after the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def _bytes_of(tensor: Tensor) -> memoryview:
    """Returns the memory of a dense CPU tensor."""
    if tensor.numel() == 0:
        return memoryview(b"")
    return tensor.reshape(-1).view(torch.uint8).numpy().data.cast("B")


def _signature(table: Mapping[str, Any], metadata: Mapping[str, Any]) -> bytes:
    """Returns the part of a header that the checksum covers, spelled in one way."""
    return json.dumps([table, metadata], sort_keys=True).encode()


def write(path: PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], key: str) -> None:
    """Writes ``tensors``, and ``metadata`` as JSON under ``key`` with the SHA-256 of everything, atomically.

    numpy numbers and paths in ``metadata`` become plain JSON values.
    """
    # The widest dtypes come first, as the package safetensors orders them, so that every tensor is aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    dense = {name: tensors[name].detach().to("cpu").contiguous() for name in names}
    table, offset = {}, 0
    for name, value in dense.items():
        size = value.numel() * value.element_size()
        table[name] = {
            "dtype": NAMES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    plain = json.loads(json.dumps(metadata, default=_plain))
    digest = hashlib.sha256(_signature(table, plain))
    for value in dense.values():
        digest.update(_bytes_of(value))
    described = json.dumps({**plain, "sha256": digest.hexdigest()})
    header = json.dumps({"__metadata__": {key: described}, **table}).encode()
    header += b" " * (-len(header) % 8)
    atomic_write(path, _content(header, dense))


def _content(header: bytes, tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    yield struct.pack("<Q", len(header)) + header
    for value in tensors.values():
        yield _bytes_of(value)


def _plain(value: Any) -> Any:
    """Returns what JSON takes instead of a numpy number, an array, a tensor or a path."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value.tolist()


class TensorFile:
    """An open safetensors file whose header fits it.

    Attributes:
        entries: the tensors by name.
        metadata: the strings of the header.

    Raises:
        ValueError: it is missing, not a regular file, or its header is no header or does not fit the file.
    """

    def __init__(self, path: PathLike, what: str) -> None:
        self.path, self.what = check_readable(what, path), what
        try:
            self._file = io.BufferedReader(io.FileIO(path), _CHUNK)
        except OSError as error:
            raise self._broken(error.strerror or "it cannot be opened") from error
        try:
            self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; what was read stays."""
        self._file.close()

    def _broken(self, reason: str) -> ValueError:
        return ValueError(f"cannot read {str(self.path)!r} as a {self.what} (safetensors): {reason}")

    def _read_header(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        length = struct.unpack("<Q", self._exactly(8))[0] if size >= 8 else 0
        if size < 8 or not 2 <= length <= size - 8:
            raise self._broken(f"its header has {length} bytes, the file {size}")
        if length > LONGEST_HEADER:
            raise self._broken(f"its header has {length} bytes, more than {LONGEST_HEADER}")
        try:
            header = json.loads(self._exactly(length))
            self.metadata = header.pop("__metadata__", {})
            if not all(isinstance(text, str) for text in self.metadata.values()):
                raise TypeError("metadata must be strings")
            self._table = header
            self.entries = {name: self._entry(value) for name, value in header.items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise self._broken(
                f"its header makes no sense ({(str(error) or 'empty').splitlines()[0][:100]})"
            ) from error
        self._data, end = 8 + length, 0
        for name, entry in sorted(self.entries.items(), key=lambda item: (item[1].begin, item[1].end)):
            if entry.begin != end:
                raise self._broken(f"the bytes of {name!r} do not follow those before them")
            end = entry.end
        if end != size - self._data:
            raise self._broken(f"its header tells of {end} bytes, the file has {size - self._data}")

    @staticmethod
    def _entry(value: Mapping[str, Any]) -> Entry:
        dtype, shape = DTYPES[value["dtype"]], tuple(value["shape"])
        begin, end = value["data_offsets"]
        if not all(type(number) is int and 0 <= number < 1 << 62 for number in (*shape, begin, end)):
            raise ValueError("sizes must be integers of at least 0")
        if math.prod(shape) * dtype.itemsize != end - begin:
            raise ValueError(f"{list(shape)} of {dtype} are not {end - begin} bytes")
        return Entry(dtype, shape, begin, end)

    def _fill(self, memory: memoryview) -> None:
        while len(memory):
            try:
                count = self._file.readinto(memory)
            except OSError as error:
                raise self._broken(error.strerror or "it cannot be read") from error
            if not count:
                raise self._broken("it ends early")
            memory = memory[count:]

    def _exactly(self, count: int) -> bytes:
        content = bytearray(count)
        self._fill(memoryview(content))
        return bytes(content)

    def described(self, key: str) -> dict[str, Any]:
        """Returns the JSON metadata under ``key``, without its checksum; {} where there is none."""
        try:
            found = json.loads(self.metadata.get(key, "{}"))
        except (ValueError, RecursionError):
            return {}
        return {name: value for name, value in found.items() if name != "sha256"} if isinstance(found, dict) else {}

    def read(self, key: str, prefix: str | None = None, without: tuple[str, ...] = ()) -> dict[str, Tensor]:
        """Returns tensors in memory of their own, after the checksum of the whole file was verified, if it has one.

        Args:
            key: of the JSON metadata that holds the checksum.
            prefix: only the tensors whose names begin so.
            without: only the tensors whose names begin with none of these.

        Raises:
            ValueError: the file cannot be read, or is not what was written.
        """
        checksum = self.checksum(key)
        digest = None if checksum is None else hashlib.sha256(_signature(self._table, self.described(key)))
        self._file.seek(self._data)
        tensors, buffer = {}, bytearray(_CHUNK)
        for name, entry in sorted(self.entries.items(), key=lambda item: (item[1].begin, item[1].end)):
            if name.startswith(prefix or "") and not name.startswith(without):
                tensors[name] = torch.empty(entry.shape, dtype=entry.dtype)
                parts = iter([_bytes_of(tensors[name])])
            else:
                sizes = range(entry.begin, entry.end, _CHUNK)
                parts = (memoryview(buffer)[: min(_CHUNK, entry.end - first)] for first in sizes)
            for part in parts:
                self._fill(part)
                if digest is not None:
                    digest.update(part)
        if digest is not None and digest.hexdigest() != checksum:
            raise self._broken("its content is not what was written (the checksum differs)")
        return tensors

    def checksum(self, key: str) -> str | None:
        """Returns the SHA-256 of the file's content in the JSON metadata under ``key``, or None."""
        try:
            found = json.loads(self.metadata.get(key, "{}"))
        except (ValueError, RecursionError):
            return None
        checksum = found.get("sha256") if isinstance(found, dict) else None
        return None if checksum is None else str(checksum)
