"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Callable

PathLike = str | os.PathLike[str]


def _temporary(path: pathlib.Path) -> tuple[int, str]:
    """An open new file in the folder of ``path``, from which os.replace can put it in place."""
    return tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")


def check_writable(argument: str, path: PathLike) -> pathlib.Path:
    """``path``, after a file has been made (and removed) in its folder: found out before the work is done.

    Raises:
        ValueError: the folder is not there or not writable, or ``path`` is a folder itself.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        raise ValueError(f"{argument} must name a file; got the folder {str(path)!r}")
    try:
        handle, name = _temporary(path)
    except OSError as error:
        raise ValueError(f"{argument}: cannot write {str(path)!r}: {error.strerror}") from error
    os.close(handle)
    os.unlink(name)
    return path


def atomic_write(path: PathLike, write: Callable[[pathlib.Path], object]) -> None:
    """Calls ``write`` with a temporary file's path, then puts that file in the place of ``path``.

    Whatever fails on the way, ``path`` holds either the old content or the new, and no other file stays.
    """
    path = pathlib.Path(path)
    handle, name = _temporary(path)
    os.close(handle)
    temporary = pathlib.Path(name)
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        # mkstemp's files are private; the result has the mode that any new file has here.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: pathlib.Path) -> None:
    """Makes a rename survive a power cut, where the system can (Windows opens no folder)."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
