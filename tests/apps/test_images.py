"""Images on disk: right pixels, whole files or none."""

import os
import stat

import numpy as np
import pytest
import torch
from PIL import Image

from dd_kernels.apps import files, images
from dd_kernels.apps.images import Output


def test_to_uint8_rounds_clips_and_turns():
    x = torch.tensor([-2.0, -1.0, -1 + 2 / 255, 0.0, 1.0, 3.0]).reshape(1, 1, 2, 3)
    assert images.to_uint8(x).tolist() == [[[[0], [0], [1]], [[128], [255], [255]]]]
    bytes_ = torch.arange(256, dtype=torch.float32).reshape(1, 1, 16, 16)
    assert torch.equal(images.to_uint8(bytes_ / 127.5 - 1).float().reshape(1, 1, 16, 16), bytes_)
    rgb = torch.zeros(1, 3, 2, 2).to(memory_format=torch.channels_last)
    rgb[:, 2] = 1
    assert images.to_uint8(rgb)[0, 0, 0].tolist() == [128, 128, 255]


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
    assert (small[4:6, 7:9] == 96).all()  # no sixth image


def test_grid_defaults_are_a_square_that_a_person_can_see():
    picture = images.grid(torch.zeros(64, 8, 8, 1, dtype=torch.uint8))
    assert picture.size == ((8 * 9 + 1) * 8,) * 2
    assert images.grid(torch.zeros(1, 128, 128, 3, dtype=torch.uint8)).size == (130, 130)


def test_grid_errors():
    with pytest.raises(ValueError, match="images must be uint8"):
        images.grid(torch.zeros(1, 2, 2, 1))
    with pytest.raises(ValueError, match="images must be uint8"):
        images.grid(torch.zeros(0, 2, 2, 1, dtype=torch.uint8))


def test_an_output_leaves_nothing_until_it_is_written(tmp_path):
    for name in ("a.png", "a.npz", "folder"):
        Output(tmp_path / name)
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["folder"]


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
    Output(tmp_path / "a.npz").write(x)
    with np.load(tmp_path / "a.npz") as file:
        assert file.files == ["images"]


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
    for path, message in (
        (tmp_path / "missing" / "a.png", "cannot write .*No such file"),
        (tmp_path / "file" / "a.png", "cannot write .*Not a directory"),
        (tmp_path / "is.png", "must name a file"),
        (tmp_path / "file", "got the file"),
        (tmp_path / "file" / "folder", "cannot make the folder"),
    ):
        with pytest.raises(ValueError, match=f"out.*{message}"):
            Output(path)
    assert (tmp_path / "file").read_text() == "kept"
    assert sorted(os.listdir(tmp_path)) == ["file", "is.png"]


def test_a_failing_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("old")

    def write(temporary):
        temporary.write_text("half")
        assert path.read_text() == "old"
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        files.atomic_write(path, write)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.png"]


def test_atomic_write_gives_a_new_file_the_usual_mode(tmp_path):
    before = os.umask(0o027)
    try:
        files.atomic_write(tmp_path / "a", lambda temporary: temporary.write_text("new"))
        assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)


def test_nan_samples_leave_the_old_picture(tmp_path):
    output = Output(tmp_path / "a.png")
    output.write(torch.zeros(1, 1, 2, 2))
    old = (tmp_path / "a.png").read_bytes()
    with pytest.raises(ValueError, match="NaN"):
        output.write(torch.full((1, 1, 2, 2), torch.nan))
    assert (tmp_path / "a.png").read_bytes() == old
