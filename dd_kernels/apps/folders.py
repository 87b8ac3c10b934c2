"""Folders that appear, or change, by one rename: of their files a reader sees all the old ones or all the new ones."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import pathlib
import shutil
import stat
import sys
from collections.abc import Iterator, Sequence

from .files import (
    PathLike,
    check_writable,
    locked,
    naming,
    remove_leftovers,
    resolved,
    sync_folder,
    temporary_name,
    write_all,
)

if sys.platform != "win32":
    import fcntl

_SWAP = 2  # RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
_HERE = -2 if sys.platform == "darwin" else -100  # AT_FDCWD


def check_folder(argument: str, given: str, overwrite: bool, suffixes: Sequence[str]) -> None:
    """Checks that a folder can be made at ``given``, or that its files may be replaced.

    Raises:
        ValueError: naming ``argument``, which may also be a file that ends in one of ``suffixes``, in the message.
    """
    path = pathlib.Path(given)
    wanted = f"{argument} must be a {', a '.join(suffixes)} or a folder (a name without a suffix)"
    try:
        if path.is_dir():
            check_writable(argument, path / "image.png", overwrite=True)
            if not overwrite and any(path.iterdir()):
                raise ValueError(f"{argument}: the folder {given!r} holds files already (--overwrite to write into it)")
            return
        if os.path.lexists(path):
            raise ValueError(f"{wanted}; got the file {given!r}")
        if path.suffix and not given.endswith(os.sep):
            raise ValueError(f"{wanted}; got {given!r}, and {path.suffix} is not written")
        above = next(folder for folder in path.absolute().parents if folder.exists())
    except OSError as error:
        raise ValueError(f"{argument}: cannot make the folder {given!r}: {error.strerror}") from error
    try:
        check_writable(argument, above / path.name)
    except ValueError as error:
        raise ValueError(f"{argument}: cannot make the folder {given!r}: {error}") from error


def write_new(path: pathlib.Path, content: bytes) -> None:
    """Writes a file that nobody else knows of yet, in the folder of :func:`atomic_folder`, and syncs it."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        write_all(handle, content)
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def atomic_folder(path: PathLike) -> Iterator[pathlib.Path]:
    """Yields a temporary folder to write into, which takes the place of ``path`` at the end.

    A folder that is there keeps its other files, which are linked into the new one before both are swapped. Where a
    system cannot swap folders (Windows, a mount point, a parent that is closed, some network file systems), or this
    process works inside of it, the new files are moved into the old folder one by one.

    Raises:
        OSError: naming ``path``. Nothing is left of the temporary folder.
    """
    with naming(path):
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        target = resolved(path)
        place = _place(target)
        remove_leftovers(place)
        temporary, handle = _new_folder(place)
        try:
            yield temporary
            sync_folder(temporary)
            if target.exists():
                with _alone(target):
                    _renew(target, temporary)
            else:
                os.rename(temporary, target)
            sync_folder(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            if handle is not None:
                os.close(handle)


@contextlib.contextmanager
def _alone(target: pathlib.Path) -> Iterator[None]:
    """Waits for other writers of the same folder, whose files would be missing among those that are linked."""
    if sys.platform == "win32":
        yield
        return
    while True:
        handle = os.open(target, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # some network file systems know no locks
                fcntl.flock(handle, fcntl.LOCK_EX)
            if os.path.samestat(os.stat(target), os.fstat(handle)):  # or else it was swapped meanwhile
                yield
                return
        finally:
            os.close(handle)


def _place(target: pathlib.Path) -> pathlib.Path:
    """Returns the path beside which a temporary folder can be made: the target's or, in a closed folder, one in it."""
    closed = target.exists() and not os.access(target.parent, os.R_OK | os.W_OK)
    return target / target.name if closed else target


def _renew(target: pathlib.Path, temporary: pathlib.Path) -> None:
    """Gives ``target`` the files of ``temporary``, beside its own."""
    written = os.listdir(temporary)
    if _works_in(target) or temporary.parent == target:
        _move(temporary, target, written)
        return
    _link_all(target, temporary)
    if _swap(temporary, target):
        # What another program put there since the links were made.
        _move(temporary, target, [name for name in os.listdir(temporary) if not _is_there(target / name)])
    else:
        _move(temporary, target, written)


def _works_in(folder: pathlib.Path) -> bool:
    """Returns whether the working folder of this process is ``folder`` or below it: it would be swapped away."""
    here = pathlib.Path.cwd()
    return here == folder or folder in here.parents


def _move(source: pathlib.Path, target: pathlib.Path, names: Sequence[str]) -> None:
    for name in names:
        os.replace(source / name, target / name)
    sync_folder(target)


def _link_all(source: pathlib.Path, target: pathlib.Path) -> None:
    """Links every file of a folder, and of its subfolders, into another one that has no file of that name."""
    with os.scandir(source) as entries:
        for entry in entries:
            place = target / entry.name
            if entry.is_dir(follow_symlinks=False):
                if not place.is_dir():
                    place.mkdir()
                    _link_all(pathlib.Path(entry.path), place)
            elif not _is_there(place):
                _link(entry.path, place)
    os.chmod(target, stat.S_IMODE(source.stat().st_mode))
    sync_folder(target)


def _is_there(path: pathlib.Path) -> bool:
    """Returns whether there is a file or link; ``os.path.lexists`` would also say no where it cannot be read."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    return True


def _link(source: str, target: pathlib.Path) -> None:
    """Links a file, or copies it where the file system or its rules know no links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS):
            raise
        shutil.copy2(source, target, follow_symlinks=False)


def _swap(a: pathlib.Path, b: pathlib.Path) -> bool:
    """Exchanges the names of two folders in one step; returns False where that is not possible."""
    name = {"linux": "renameat2", "darwin": "renameatx_np"}.get(sys.platform)
    function = None if name is None else getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if function is None:
        return False
    if function(_HERE, os.fsencode(a), _HERE, os.fsencode(b), _SWAP) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBUSY, errno.EXDEV):
        return False
    raise OSError(number, os.strerror(number), str(b))


def _new_folder(place: pathlib.Path) -> tuple[pathlib.Path, int | None]:
    """Makes a temporary folder; returns it and a locked handle of it, None where the system opens none (Windows).

    Another writer may take it for a leftover and remove it before it is locked: then another one is made.
    """
    while True:
        temporary = temporary_name(place)
        temporary.mkdir()
        try:
            handle = None if sys.platform == "win32" else _locked(temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        if handle is not None or sys.platform == "win32":
            return temporary, handle


def _locked(folder: pathlib.Path) -> int | None:
    """Returns a locked handle of a folder, or None where another writer removes or has removed it."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    return locked(handle, folder)
