"""Images on disk: right pixels, whole files or none."""

import fcntl
import os
import stat

import numpy as np
import pytest
import torch
from PIL import Image

from dd_kernels.apps import data, files, images
from dd_kernels.apps.images import Output


def test_to_uint8_rounds_clips_and_turns():
    x = torch.tensor([-2.0, -1.0, -1 + 2 / 255, 0.0, 1.0, 3.0]).reshape(1, 1, 2, 3)
    assert images.to_uint8(x).tolist() == [[[[0], [0], [1]], [[128], [255], [255]]]]
    bytes_ = torch.arange(256, dtype=torch.float32).reshape(1, 1, 16, 16)
    assert torch.equal(images.to_uint8(bytes_ / 127.5 - 1).float().reshape(1, 1, 16, 16), bytes_)
    rgb = torch.zeros(1, 3, 2, 2).to(memory_format=torch.channels_last)
    rgb[:, 2] = 1
    assert images.to_uint8(rgb)[0, 0, 0].tolist() == [128, 128, 255]


@pytest.mark.parametrize("channels", [1, 3])
def test_rows_have_their_names_beside_them(channels):
    white, black = torch.ones(2, channels, 8, 8), -torch.ones(2, channels, 8, 8)
    picture = images.rows_of({"white": white, "a much longer name": black})
    grid = images.grid(images.to_uint8(torch.cat((white, black))), 2)
    assert (picture.mode, picture.height) == (grid.mode, grid.height)
    margin = picture.width - grid.width
    shown = np.array(picture)
    assert np.array_equal(shown[:, margin:], np.array(grid))
    upper, lower = np.split((shown[:, :margin] < 128).reshape(picture.height, margin, -1).any(2), 2)
    assert upper.any()
    assert lower.sum() > 2 * upper.sum()  # more letters
    assert not upper[:8].any()
    assert not lower[-8:].any()  # the names are in the middle of their rows


def test_to_uint8_errors():
    with pytest.raises(ValueError, match=r"got \[1, 2, 4, 4\]"):
        images.to_uint8(torch.zeros(1, 2, 4, 4))
    x = torch.zeros(3, 1, 4, 4)
    x[1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="got NaN in 1 of 3"):
        images.to_uint8(x)


def test_grid_places_every_image_and_enlarges_whole_pixels():
    batch = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 2, 2, 1) * 10
    picture = np.array(images.grid(batch, columns=3, zoom=4))
    assert picture.shape == (7 * 4, 10 * 4)
    small = picture[::4, ::4]
    assert np.array_equal(picture, small.repeat(4, 0).repeat(4, 1))
    for i in range(5):
        top, left = 1 + 3 * (i // 3), 1 + 3 * (i % 3)
        assert (small[top : top + 2, left : left + 2] == 10 * i).all()
    assert (small[0] == 96).all()
    assert (small[4:6, 7:9] == 96).all()  # the sixth place of the grid is empty


def test_grid_defaults_are_a_square_that_a_person_can_see():
    picture = images.grid(torch.zeros(64, 8, 8, 1, dtype=torch.uint8))
    assert picture.size == ((8 * 9 + 1) * 8,) * 2
    assert images.grid(torch.zeros(1, 128, 128, 3, dtype=torch.uint8)).size == (130, 130)


def test_grid_errors():
    with pytest.raises(ValueError, match="images must be uint8"):
        images.grid(torch.zeros(1, 2, 2, 1))
    with pytest.raises(ValueError, match="images must be uint8"):
        images.grid(torch.zeros(0, 2, 2, 1, dtype=torch.uint8))
    with pytest.raises(ValueError, match="columns must be at least 1"):
        images.grid(torch.zeros(1, 2, 2, 1, dtype=torch.uint8), columns=0)
    with pytest.raises(ValueError, match="a grid of 1 images takes"):
        images.grid(torch.zeros(1, 2, 2, 1, dtype=torch.uint8), zoom=10**6)


def test_an_output_leaves_nothing_until_it_is_written(tmp_path):
    for name in ("a.png", "a.npz", "folder"):
        Output(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_output_png(tmp_path):
    Output(tmp_path / "a.png").write(torch.ones(4, 1, 2, 2), columns=4)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (13 * 32, 4 * 32)
        assert picture.mode == "L"


def test_output_npz(tmp_path):
    x = torch.rand(3, 3, 4, 4) * 2 - 1
    Output(tmp_path / "a.npz").write(x, [2, 0, 1])
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert np.array_equal(file["images"], images.to_uint8(x).numpy())
        assert file["labels"].tolist() == [2, 0, 1]
    with pytest.raises(ValueError, match=r"a\.npz.* is there already \(--overwrite"):
        Output(tmp_path / "a.npz")
    Output(tmp_path / "a.npz", overwrite=True).write(x)
    with np.load(tmp_path / "a.npz") as file:
        assert file.files == ["images"]
    Output(tmp_path / "b.npz", npz_names="arr").write(x, np.array([2, 0, 1]))
    with np.load(tmp_path / "b.npz") as file:
        assert file.files == ["arr_0", "arr_1"]
    assert data.npz_file(tmp_path / "b.npz").labels.tolist() == [2, 0, 1]
    with pytest.raises(ValueError, match="npz_names must be one of images, arr"):
        Output(tmp_path / "c.npz", npz_names="mine")


def test_output_folder(tmp_path):
    x = torch.stack([torch.full((1, 2, 2), v) for v in (-1.0, 0.0, 1.0)])
    Output(tmp_path / "new" / "folder").write(x, first_sample=7)
    names = sorted(os.listdir(tmp_path / "new" / "folder"))
    assert names == ["000007.png", "000008.png", "000009.png"]
    with Image.open(tmp_path / "new" / "folder" / names[2]) as picture:
        assert np.array(picture).tolist() == [[255, 255], [255, 255]]
    with pytest.raises(ValueError, match="holds files already"):
        Output(tmp_path / "new" / "folder")
    Output(tmp_path / "new" / "folder", overwrite=True).write(x[:1])
    assert len(os.listdir(tmp_path / "new" / "folder")) == 4


def test_output_that_cannot_be_written_is_found_at_once(tmp_path):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "is.png").mkdir()
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe.png")
    for path, message in (
        (tmp_path / "missing" / "a.png", "cannot write .*No such file"),
        (tmp_path / "file" / "a.png", "cannot write .*Not a directory"),
        (tmp_path / "is.png", "must name a file"),
        (tmp_path / "file", "got the file"),
        (tmp_path / "file" / "folder", "cannot make the folder"),
        (tmp_path / "a.jpg", r"got '.*a\.jpg', and \.jpg is not written"),
        (tmp_path / "pipe.png", "must name a regular file"),
        (tmp_path / "pipe", "got the file"),
    ):
        with pytest.raises(ValueError, match=f"out.*{message}"):
            Output(path)
    assert (tmp_path / "file").read_text() == "kept"
    assert sorted(os.listdir(tmp_path)) == ["file", "is.png", "pipe", "pipe.png"]


def test_a_failing_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("old")

    def content():
        yield b"half"
        assert path.read_text() == "old"
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: '.*a\.png'"):
        files.atomic_write(path, content())
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.png"]


def test_a_short_write_is_continued(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, content: write(handle, content[: max(1, len(content) // 3)]))
    files.atomic_write(tmp_path / "a", [b"0123456789", memoryview(b"abc")])
    assert (tmp_path / "a").read_bytes() == b"0123456789abc"


def test_atomic_write_keeps_modes_and_links(tmp_path):
    before = os.umask(0o027)
    try:
        files.atomic_write(tmp_path / "a", b"new")
        assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
        for mode in (0o600, 0o664, 0o444):
            (tmp_path / "a").chmod(mode)
            files.atomic_write(tmp_path / "a", b"newer")
            assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode
    finally:
        os.umask(before)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere/b")
    for content in (b"first", b"second"):
        files.atomic_write(tmp_path / "link", content)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "elsewhere" / "b").read_bytes() == content
    assert os.listdir(tmp_path / "elsewhere") == ["b"]


def test_a_link_that_cannot_be_read_is_no_file(tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to("elsewhere")
    lstat = os.lstat

    def fail(path, **options):
        if str(path).endswith("link"):
            raise OSError(5, "Input/output error", str(path))
        return lstat(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "lstat", fail)
        with pytest.raises(OSError, match=r"Input/output error: '.*link'"):
            files.atomic_write(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match=r"out: cannot write .*loop"):
        files.check_writable("out", tmp_path / "loop")


def test_the_umask_is_never_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "umask", None)
    files.atomic_write(tmp_path / "a", b"new")
    files.atomic_write(tmp_path / "a", b"newer")


def test_temporary_files_of_the_dead_go_and_those_of_the_living_stay(tmp_path):
    for name in (".a.dead.part", ".a.0.part", ".b.dead.part"):
        (tmp_path / name).write_text("half")
    (tmp_path / ".a.folder.part").mkdir()
    (tmp_path / ".a.folder.part" / "000.png").write_text("half")
    handle = os.open(tmp_path / ".a.0.part", os.O_RDWR)
    fcntl.flock(handle, fcntl.LOCK_EX)
    files.atomic_write(tmp_path / "a", b"new")
    os.close(handle)
    assert sorted(os.listdir(tmp_path)) == [".a.0.part", ".b.dead.part", "a"]
    files.atomic_write(tmp_path / "a", b"newer")
    assert sorted(os.listdir(tmp_path)) == [".b.dead.part", "a"]


def test_a_temporary_file_that_a_cleaner_took_is_made_again(tmp_path, monkeypatch):
    flock, taken = fcntl.flock, []

    def stolen(handle, operation):
        if not taken:
            taken.extend(p.unlink() for p in tmp_path.glob(".a.*.part"))
        return flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", stolen)
    files.atomic_write(tmp_path / "a", b"new")
    assert len(taken) == 1
    assert (tmp_path / "a").read_bytes() == b"new"


def test_the_longest_name_can_be_written(tmp_path):
    name = "\u00e4" * 125 + ".png"
    files.atomic_write(tmp_path / name, b"new")
    assert os.listdir(tmp_path) == [name]


def test_a_lock_keeps_a_second_writer_out_and_leaves_nothing(tmp_path):
    def again():
        with files.only_writer("out", tmp_path / "a"):
            pass

    refused = pytest.raises(ValueError, match=r"out: another process is writing .*a'")
    with files.only_writer("out", tmp_path / "a"), refused:
        again()
    again()
    assert os.listdir(tmp_path) == []


def test_nan_samples_leave_the_old_picture(tmp_path):
    output = Output(tmp_path / "a.png")
    output.write(torch.zeros(1, 1, 2, 2), columns=np.int64(10**9))
    old = (tmp_path / "a.png").read_bytes()
    with pytest.raises(ValueError, match="NaN"):
        output.write(torch.full((1, 1, 2, 2), torch.nan))
    assert (tmp_path / "a.png").read_bytes() == old
