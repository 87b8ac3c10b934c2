"""The place of a measurement's --out: one file, or a folder in which a file of each kind appears at once."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

from ..files import atomic_write, check_writable
from ..folders import atomic_folder, check_folder, write_new

SUFFIXES = (".md", ".json")


class Report:
    """A file that is a .md or a .json, or a folder for both.

    Raises:
        ValueError: ``out`` is neither, or cannot be written.
    """

    def __init__(self, out: str, overwrite: bool) -> None:
        self.path = pathlib.Path(out)
        if self.path.suffix.lower() in SUFFIXES:
            check_writable("--out", out, overwrite)
        else:
            check_folder("--out", out, overwrite, SUFFIXES)

    def write(self, contents: Mapping[str, str]) -> None:
        """Writes the file's or the folder's share of ``contents``, which has a text for each suffix."""
        suffix = self.path.suffix.lower()
        if suffix in SUFFIXES:
            atomic_write(self.path, contents[suffix].encode())
            return
        with atomic_folder(self.path) as folder:
            for suffix in SUFFIXES:
                write_new(folder / f"evaluation{suffix}", contents[suffix].encode())
