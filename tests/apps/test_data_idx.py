"""IDX folders: the splits, compressed or not, and every broken file in one clear error."""

import gzip
import struct

import numpy as np
import pytest
import torch

from dd_kernels.apps import data
from dd_kernels.apps.data import idx


def packed(array, kind=8):
    return struct.pack(f">4B{array.ndim}I", 0, 0, kind, array.ndim, *array.shape) + array.tobytes()


def write(folder, compressed=True, counts=(("train", 6), ("t10k", 4))):
    """Writes images of 5 x 5 and their labels; returns both by the split's name."""
    folder.mkdir(exist_ok=True)
    rng, made = np.random.default_rng(0), {}
    for split, count in counts:
        images = rng.integers(0, 256, (count, 5, 5), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 3
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            content, suffix = (gzip.compress(packed(array)), ".gz") if compressed else (packed(array), "")
            (folder / f"{split}-{kind}-ubyte{suffix}").write_bytes(content)
        made[split] = (images, labels)
    return made


@pytest.mark.parametrize("compressed", [False, True])
def test_both_splits(tmp_path, compressed):
    made = write(tmp_path / "idx", compressed)
    for found, split in ((data.load(tmp_path / "idx"), "train"), (data.held_out(tmp_path / "idx"), "t10k")):
        images, labels = made[split]
        assert np.array_equal(found.images.numpy()[:, 0], images)
        assert found.labels.tolist() == labels.tolist()
        assert found.classes == ("0", "1", "2")
        assert found.maximum == 255
    x, y = data.load(tmp_path / "idx").batch(torch.tensor([3]))
    assert (tuple(x.shape), y.tolist()) == ((1, 1, 5, 5), [0])


def test_fashion_mnist_is_where_debian_puts_it(tmp_path, monkeypatch):
    monkeypatch.setattr(idx, "FASHION", tmp_path / "fashion")
    with pytest.raises(ValueError, match=r"'fashion-mnist' needs the files in .*apt-get install dataset-fashion-mnist"):
        data.load("fashion-mnist")
    bundled = data.held_out("fashion-mnist")
    assert (bundled.images.shape, bundled.classes[9]) == ((200, 1, 28, 28), "ankle boot")
    made = write(tmp_path / "fashion")
    assert np.array_equal(data.load("fashion-mnist").images[:, 0].numpy(), made["train"][0])
    held_out = data.held_out("fashion-mnist")
    assert np.array_equal(held_out.images[:, 0].numpy(), made["t10k"][0])
    assert held_out.classes[0] == "t-shirt"
    assert held_out.classes[9] == "ankle boot"
    assert len(held_out.classes) == 10


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-labels-idx1-ubyte", None, "must hold the file train-labels-idx1-ubyte or its .gz; got neither"),
        ("train-images-idx3-ubyte", b"", "it must begin with 00000803"),
        ("train-images-idx3-ubyte", packed(np.zeros(9, np.uint8)), "it must begin with 00000803 .*; got '00000801'"),
        ("train-images-idx3-ubyte", packed(np.zeros((1, 5, 5), np.float32), 13), "got '00000d03'"),
        ("train-images-idx3-ubyte", bytes((0, 0, 8, 3, 0, 0)), "its header ends early"),
        ("train-images-idx3-ubyte", packed(np.zeros((6, 5, 5), np.uint8))[:-1], "150 bytes, more than the file can"),
        ("train-images-idx3-ubyte", packed(np.zeros((6, 5, 5), np.uint8)) + b"x", "150 bytes, the file holds more"),
        (
            "train-images-idx3-ubyte.gz",
            gzip.compress(packed(np.zeros((6, 5, 5), np.uint8))[:-1]),
            "its header tells of 150 bytes, the file holds 149",
        ),
        (
            "train-images-idx3-ubyte.gz",
            gzip.compress(packed(np.zeros((6, 5, 5), np.uint8)))[:-9],
            "Compressed file ended",
        ),
        ("train-images-idx3-ubyte.gz", b"no gzip", "cannot read .* as IDX"),
        ("train-images-idx3-ubyte", packed(np.zeros((6, 5, 4), np.uint8)), r"must be square; got \[6, 5, 4\]"),
        ("train-images-idx3-ubyte", packed(np.zeros((0, 5, 5), np.uint8)), r"must be square; got \[0, 5, 5\]"),
        ("train-images-idx3-ubyte", packed(np.zeros((7, 5, 5), np.uint8)), "must be 7, one per image; got 6"),
    ],
)
def test_broken_files(tmp_path, name, content, message):
    write(tmp_path, name.endswith(".gz"))
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.load(tmp_path)


def test_sizes_and_colours_are_the_files(tmp_path):
    write(tmp_path)
    assert data.load(tmp_path, 5).images.shape == (6, 1, 5, 5)
    with pytest.raises(ValueError, match="image_size must be that of the data, 5; got 8"):
        data.load(tmp_path, 8)
    with pytest.raises(ValueError, match="grey may be given only for a folder of images"):
        data.load(tmp_path, grey=True)
