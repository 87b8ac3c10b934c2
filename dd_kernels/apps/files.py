"""Files that are written whole or not at all, and a lock that keeps a second writer out.

A temporary file or folder ends in ``.part`` and is locked (``flock``) while its writer lives. One that is not locked
belongs to a process that died, and the next writer of the same path removes it.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.resources
import os
import pathlib
import secrets
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator

from filelock import FileLock, Timeout

if sys.platform != "win32":  # there temporary files of dead processes stay
    import fcntl

PathLike = str | os.PathLike[str]
Bytes = bytes | bytearray | memoryview
_BUFFER = 1 << 20


def resolved(path: PathLike) -> pathlib.Path:
    """Returns the file or folder that ``path`` leads to through symbolic links, which need not be there yet.

    Raises:
        OSError: a link cannot be read, or the links form a loop; ``os.path.realpath`` would return the link itself.
        FileNotFoundError: the folder is missing.
    """
    try:
        return pathlib.Path(os.path.realpath(path, strict=True))
    except FileNotFoundError:
        path = pathlib.Path(path)
    try:
        link = os.readlink(path)
    except FileNotFoundError:
        return pathlib.Path(os.path.realpath(path.parent, strict=True)) / path.name
    return resolved(path.parent / link)


def check_readable(argument: str, path: PathLike) -> pathlib.Path:
    """Returns ``path`` if it is a regular file; a pipe would block whoever opens it.

    Raises:
        ValueError: it is missing, a folder, a pipe or a device.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            raise ValueError(f"there is no {argument} {str(path)!r}") from error
        raise ValueError(f"cannot read the {argument} {str(path)!r}: {_reason(error)}") from error
    if stat.S_ISDIR(mode):
        raise ValueError(f"{argument} must be a file; {str(path)!r} is a folder")
    if not stat.S_ISREG(mode):
        raise ValueError(f"{argument} must be a regular file; {str(path)!r} is a pipe or a device")
    return pathlib.Path(path)


def bundled(name: str) -> pathlib.Path:
    """Returns the path of a file that is bundled with this package."""
    return pathlib.Path(str(importlib.resources.files(__package__))) / "models" / name


def check_writable(argument: str, path: PathLike, overwrite: bool = False) -> pathlib.Path:
    """Returns ``path``, after a temporary file could be made in its folder.

    Raises:
        ValueError: the folder is missing or not writable; ``path`` is a folder, a pipe or a device; or it is a file
            and ``overwrite`` is not set.
    """
    try:
        target = resolved(path)
        if target.is_dir():
            raise ValueError(f"{argument} must name a file; got the folder {str(path)!r}")
        if target.exists() and not target.is_file():
            raise ValueError(f"{argument} must name a regular file; {str(path)!r} is a pipe or a device")
        if target.exists() and not overwrite:
            raise ValueError(f"{argument}: {str(path)!r} is there already (--overwrite to replace it)")
        remove_leftovers(target)
        handle, temporary = _create(target)
        try:
            os.close(handle)
        finally:
            temporary.unlink()
    except OSError as error:
        raise ValueError(f"{argument}: cannot write {str(path)!r}: {_reason(error)}") from error
    return pathlib.Path(path)


def atomic_write(path: PathLike, content: Bytes | Iterable[Bytes]) -> None:
    """Writes ``content`` to a temporary file, syncs it, and renames it to ``path``.

    Whatever fails, ``path`` has either the old content or the new. A file that is replaced keeps its mode, and a
    symbolic link stays: the file that it points to is replaced.

    Raises:
        OSError: naming ``path``.
        ValueError: ``path`` is a pipe or a device.
    """
    with naming(path):
        target = resolved(path)
        if target.exists() and not target.is_file():
            raise ValueError(f"{str(path)!r} is not a regular file")
        remove_leftovers(target)
        handle, temporary = _create(target)
        try:
            try:
                if target.exists():
                    os.chmod(temporary, stat.S_IMODE(target.stat().st_mode))
                write_all(handle, content)
                os.fsync(handle)
                if sys.platform != "win32":  # the lock must outlive the name .part
                    os.replace(temporary, target)
            finally:
                os.close(handle)
            if sys.platform == "win32":
                os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        sync_folder(target.parent)


@contextlib.contextmanager
def only_writer(argument: str, path: PathLike) -> Iterator[None]:
    """Holds the lock of ``path`` inside the block.

    Raises:
        ValueError: another process, or another thread, holds it.
    """
    try:
        with naming(path):
            target = resolved(path)
            lock_file = target.with_name(f".{target.name[:50]}.lock")
            lock = FileLock(lock_file, timeout=0, is_singleton=False)
            lock.acquire()
    except Timeout as error:
        raise ValueError(f"{argument}: another process is writing {str(path)!r}") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            lock_file.unlink()
        lock.release()


def remove_leftovers(target: pathlib.Path) -> None:
    """Removes the temporary files and folders of ``target`` whose writers are dead."""
    if sys.platform == "win32":
        return
    prefix = temporary_name(target, "").name.removesuffix(".part")
    with os.scandir(target.parent) as entries:
        names = [entry.name for entry in entries if entry.name.startswith(prefix) and entry.name.endswith(".part")]
    for name in names:
        leftover = target.with_name(name)
        with contextlib.suppress(OSError):
            handle = os.open(leftover, os.O_RDONLY | os.O_NONBLOCK)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if leftover.is_dir():
                    shutil.rmtree(leftover)
                else:
                    leftover.unlink()
            finally:
                os.close(handle)


def temporary_name(target: pathlib.Path, token: str | None = None) -> pathlib.Path:
    # Cut, so that the longest name that a file may have still has a temporary name.
    return target.with_name(f".{target.name[:50]}.{secrets.token_hex(4) if token is None else token}.part")


def _create(target: pathlib.Path) -> tuple[int, pathlib.Path]:
    """Returns the handle and name of a new locked file in the folder of ``target``, as private as ``target`` is."""
    mode = stat.S_IMODE(target.stat().st_mode) & 0o777 if target.exists() else 0o666
    while True:
        temporary = temporary_name(target)
        handle = locked(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), temporary)
        if handle is not None:
            return handle, temporary


def locked(handle: int, path: pathlib.Path) -> int | None:
    """Locks a handle and returns it; closes it and returns None where another writer took it for a leftover."""
    try:
        if _lock(handle, path):
            return handle
    except BaseException:
        os.close(handle)
        raise
    os.close(handle)
    return None


def _lock(handle: int, path: pathlib.Path) -> bool:
    """Locks ``handle``; False where another writer took it for a leftover and removed it just before."""
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Some network file systems know no locks; another writer that holds this one is about to remove it.
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def write_all(handle: int, content: Bytes | Iterable[Bytes]) -> None:
    """Writes every byte, small chunks together; a write may take fewer bytes than it is given."""
    buffer = bytearray()
    for chunk in (content,) if isinstance(content, Bytes) else content:
        if len(buffer) + len(chunk) > _BUFFER:
            _write(handle, buffer)
            buffer = bytearray()
        if len(chunk) > _BUFFER:
            _write(handle, chunk)
        else:
            buffer += chunk
    _write(handle, buffer)


def _write(handle: int, content: Bytes) -> None:
    rest = memoryview(content)
    while len(rest):
        rest = rest[os.write(handle, rest) :]


def sync_folder(folder: pathlib.Path) -> None:
    """Makes a rename survive a power cut, where the file system can (Windows opens no folder)."""
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def naming(path: PathLike) -> Iterator[None]:
    """Puts ``path`` into every OSError of the block, in place of a temporary name or none."""
    try:
        yield
    except Timeout:
        raise
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, f"cannot write it: {error.strerror}", str(path)) from error


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
