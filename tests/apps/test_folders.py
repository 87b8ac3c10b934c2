"""Folders that appear, or change, by one rename."""

import errno
import os
import pathlib
import threading

import pytest

from dd_kernels.apps import folders


def write(path, **contents):
    with folders.atomic_folder(path) as folder:
        for name, content in contents.items():
            folders.write_new(folder / name, content)


def contents(folder):
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if not path.is_dir()}
    return {name: path.read_bytes() for name, path in found.items()}


@pytest.fixture
def folder(tmp_path):
    """A folder with a file that is replaced, one that stays, a link and a subfolder."""
    folder = tmp_path / "folder"
    (folder / "own").mkdir(parents=True)
    (folder / "own" / "deep").write_bytes(b"0")
    (folder / "a").write_bytes(b"0")
    (folder / "kept").write_bytes(b"0")
    (folder / "kept").chmod(0o640)
    (folder / "link").symlink_to("nowhere")
    folder.chmod(0o750)
    return folder


KEPT = {"own/deep": b"0", "kept": b"0"}


def check_renewed(folder):
    assert os.readlink(folder / "link") == "nowhere"
    (folder / "link").unlink()
    assert contents(folder) == {**KEPT, "a": b"1", "b": b"2"}
    assert folder.stat().st_mode & 0o777 == 0o750
    assert (folder / "kept").stat().st_mode & 0o777 == 0o640
    assert os.listdir(folder.parent) == ["folder"]


def test_a_folder_appears_as_a_whole(tmp_path):
    def interrupted():
        with folders.atomic_folder(tmp_path / "deep" / "folder") as folder:
            folders.write_new(folder / "a", b"1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path / "deep") == []
    write(tmp_path / "deep" / "folder", a=b"1")
    assert contents(tmp_path / "deep") == {"folder/a": b"1"}


def test_a_folder_changes_in_one_step_and_keeps_the_rest(folder, monkeypatch):
    """The folder is replaced by another one, which has every file when it takes the name."""
    before, swap, seen = folder.stat().st_ino, folders._swap, []
    monkeypatch.setattr(folders, "_swap", lambda a, b: seen.append(contents(a).keys()) or swap(a, b))
    (folder / "link").unlink()
    write(folder, a=b"1", b=b"2")
    assert seen == [{"a", "b", *KEPT}]
    assert folder.stat().st_ino != before
    (folder / "link").symlink_to("nowhere")
    check_renewed(folder)


def test_an_interrupted_change_changes_nothing(folder):
    def interrupted():
        with folders.atomic_folder(folder) as temporary:
            folders.write_new(temporary / "a", b"1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    (folder / "link").unlink()
    assert contents(folder) == {**KEPT, "a": b"0"}
    assert os.listdir(folder.parent) == ["folder"]


def test_one_by_one_where_folders_cannot_be_swapped(folder, monkeypatch):
    monkeypatch.setattr(folders.sys, "platform", "win32" if folders.sys.platform == "win32" else "sunos")
    write(folder, a=b"1", b=b"2")
    check_renewed(folder)


@pytest.mark.parametrize("below", ["", "own"])
def test_the_working_folder_stays(folder, monkeypatch, below):
    monkeypatch.chdir(folder / below)
    write(folder, a=b"1", b=b"2")
    assert pathlib.Path("deep" if below else "a").exists()
    assert os.stat(folder / below).st_ino == os.stat(".").st_ino
    check_renewed(folder)


def test_a_parent_that_is_closed(folder, monkeypatch):
    """The temporary folder is made inside, and nothing is touched above."""
    access, made, mkdir = os.access, [], pathlib.Path.mkdir
    closed = lambda path, mode: access(path, mode) and pathlib.Path(path) != folder.parent  # noqa: E731
    monkeypatch.setattr(os, "access", closed)
    monkeypatch.setattr(pathlib.Path, "mkdir", lambda path, *a, **k: made.append(path) or mkdir(path, *a, **k))
    write(folder, a=b"1", b=b"2")
    assert [path.parent for path in made if path.name.endswith(".part")] == [folder]
    check_renewed(folder)


def test_files_that_cannot_be_linked_are_copied(folder, monkeypatch):
    def no_links(*arguments, **options):
        raise OSError(errno.EPERM, "no links")

    monkeypatch.setattr(os, "link", no_links)
    write(folder, a=b"1", b=b"2")
    check_renewed(folder)


def test_a_link_that_fails_otherwise_changes_nothing(folder, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(OSError, match="cannot write it: full"):
        write(folder, a=b"1", b=b"2")
    assert (folder / "a").read_bytes() == b"0"
    assert os.listdir(folder.parent) == ["folder"]


def test_a_swap_that_fails_otherwise_changes_nothing(folder, monkeypatch):
    class Refusing:
        def __init__(self, *arguments, **options):
            self.renameat2 = self.renameatx_np = lambda *arguments: -1

    monkeypatch.setattr(folders.ctypes, "CDLL", Refusing)
    monkeypatch.setattr(folders.ctypes, "get_errno", lambda: errno.EIO)
    with pytest.raises(OSError, match="cannot write it"):
        write(folder, a=b"1", b=b"2")
    assert (folder / "a").read_bytes() == b"0"
    monkeypatch.setattr(folders.ctypes, "get_errno", lambda: errno.EBUSY)
    write(folder, a=b"1", b=b"2")
    check_renewed(folder)


def test_what_another_program_adds_meanwhile_is_kept(folder, monkeypatch):
    swap = folders._swap

    def late(a, b):
        (folder / "late").write_bytes(b"3")
        return swap(a, b)

    monkeypatch.setattr(folders, "_swap", late)
    write(folder, a=b"1", b=b"2")
    assert (folder / "late").read_bytes() == b"3"
    (folder / "late").unlink()
    check_renewed(folder)


def test_many_writers_of_one_folder_lose_nothing(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    writers = [threading.Thread(target=write, args=(folder,), kwargs={f"f{i}": b"%d" % i}) for i in range(12)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert contents(folder) == {f"f{i}": b"%d" % i for i in range(12)}
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize("when", ["before it is opened", "before it is locked"])
def test_a_temporary_folder_that_another_writer_removes_is_made_anew(tmp_path, monkeypatch, when):
    module, name = (os, "open") if when == "before it is opened" else (folders, "locked")
    function, seen = getattr(module, name), []

    def removed_once(*arguments, **options):
        (path,) = [value for value in arguments if isinstance(value, os.PathLike)] or [None]
        if path is not None and path.name.endswith(".part"):
            seen.append(path)
            if len(seen) == 1:
                path.rmdir()
        return function(*arguments, **options)

    monkeypatch.setattr(module, name, removed_once)
    write(tmp_path / "folder", own=b"1")
    monkeypatch.undo()
    assert contents(tmp_path / "folder") == {"own": b"1"}
    assert len(set(seen)) == 2
    assert os.listdir(tmp_path) == ["folder"]


def test_a_file_does_not_replace_a_folder(folder):
    with pytest.raises(FileExistsError):
        write(folder, own=b"1")
    assert (folder / "own" / "deep").read_bytes() == b"0"
