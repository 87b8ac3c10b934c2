"""Training images, and the Philox words that pick from them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dd_kernels.apps import data
from dd_kernels.apps.data import ImageData


def _png(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)


def test_digits_split_is_a_partition_that_never_changes():
    train, test, everything = (data.digits(split) for split in data.SPLITS)
    assert (len(train), len(test), len(everything)) == (1437, 360, 1797)
    rows = torch.cat((train.images, test.images)).flatten(1).tolist()
    assert sorted(rows) == sorted(everything.images.flatten(1).tolist())
    # Every class is well represented on both sides, and the very images are pinned.
    assert torch.bincount(test.labels).min() >= 25
    assert test.fingerprint == data.digits("test").fingerprint
    assert test.labels[:10].tolist() == PINNED_LABELS


PINNED_LABELS = [9, 4, 8, 8, 5, 6, 5, 0, 2, 5]


def test_batch_maps_the_bytes_to_minus_one_and_one():
    digits = data.digits()
    x, labels = digits.batch(torch.arange(100))
    assert x.shape == (100, 1, 8, 8)
    assert x.dtype == torch.float32
    assert (x.min(), x.max()) == (-1, 1)
    assert torch.equal((x + 1) * 8, digits.images[:100].float())
    assert torch.equal(labels, digits.labels[:100])


def test_digits_rejects_an_unknown_split():
    with pytest.raises(ValueError, match="split must be one of train, test, all; got 'dev'"):
        data.digits("dev")


def test_fingerprint_sees_every_byte_label_and_class():
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).reshape(2, 3, 4, 4)
    labels = torch.tensor([0, 1])
    other = images.clone()
    other[1, 2, 3, 3] += 1
    variants = [
        ImageData(images, labels, ("a", "b")),
        ImageData(other, labels, ("a", "b")),
        ImageData(images, labels.flip(0), ("a", "b")),
        ImageData(images, labels, ("a", "c")),
        ImageData(images),
        ImageData(images, labels, ("a", "b"), maximum=16),
    ]
    assert len({v.fingerprint for v in variants}) == len(variants)
    assert variants[0].fingerprint == ImageData(images.clone(), labels.clone(), ("a", "b")).fingerprint


def test_uniform_words_are_the_first_words_of_the_noise_contract():
    # Philox4x32-10 of counter 0 and key 0 begins with 6627e8d5 (Salmon et al., 2011).
    assert data.uniform_words(1, seed=0, draw=0, stream=0).tolist() == [0x6627E8D5]
    many = data.uniform_words(8, seed=3, draw=5, stream=4)
    assert torch.equal(many[2:], data.uniform_words(6, seed=3, draw=5, stream=4, first=2))


def test_uniform_words_are_uniform():
    u = data.uniform_words(200_000, seed=1, draw=2, stream=3).double() / 2**32
    counts = torch.histc(u, bins=64, min=0, max=1)
    chi2 = float(((counts - len(u) / 64) ** 2 / (len(u) / 64)).sum())
    assert 25 < chi2 < 120  # 63 degrees of freedom: mean 63, deviation 11


@given(size=st.integers(1, 40), first=st.integers(0, 200), count=st.integers(1, 90), seed=st.integers(0, 2**64 - 1))
@settings(max_examples=30, deadline=None)
def test_positions_run_through_shuffled_epochs(size, first, count, seed):
    images = ImageData(torch.zeros(size, 1, 1, 1, dtype=torch.uint8))
    found = data.positions(images, first, count, seed=seed)
    assert found.shape == (count,)
    # The same run cut elsewhere is the same run.
    cut = count // 2
    parts = [data.positions(images, first, cut, seed=seed)] if cut else []
    assert torch.equal(found, torch.cat([*parts, data.positions(images, first + cut, count - cut, seed=seed)]))
    epoch = data.positions(images, size * (first // size), size, seed=seed)
    assert sorted(epoch.tolist()) == list(range(size))


def test_epochs_differ():
    images = ImageData(torch.zeros(50, 1, 1, 1, dtype=torch.uint8))
    run = data.positions(images, 0, 100, seed=0)
    assert not torch.equal(run[:50], run[50:])


def test_image_folder_reads_classes_crops_and_resizes(tmp_path):
    wide = np.zeros((4, 8, 3), np.uint8)
    wide[:, 2:6] = (10, 20, 30)  # the central square; black beside it must not come in
    _png(tmp_path / "cat" / "b.png", wide)
    _png(tmp_path / "cat" / "deep" / "a.PNG", np.full((2, 2), 200))
    _png(tmp_path / "ant" / "c.png", np.full((2, 2, 3), 7))
    (tmp_path / "ant" / "notes.txt").write_text("not an image")
    folder = data.image_folder(tmp_path, 2)
    assert folder.classes == ("ant", "cat")
    assert folder.labels.tolist() == [0, 1, 1]
    assert folder.images.shape == (3, 3, 2, 2)
    assert folder.images[0].unique().tolist() == [7]
    assert folder.images[1, :, 0, 0].tolist() == [10, 20, 30]
    assert folder.images[1].unique().tolist() == [10, 20, 30]
    assert folder.images[2].unique().tolist() == [200]
    grey = data.image_folder(tmp_path, 2, channels=1)
    assert grey.images.shape == (3, 1, 2, 2)
    assert grey.images[0].unique().tolist() == [7]


def test_image_folder_without_subfolders_has_no_classes(tmp_path):
    _png(tmp_path / "a.png", np.zeros((2, 2)))
    folder = data.image_folder(tmp_path, 4)
    assert folder.labels is None
    assert folder.classes == ()
    assert folder.images.shape == (1, 3, 4, 4)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n broken", "truncated"])
def test_a_broken_image_is_named(tmp_path, content):
    _png(tmp_path / "good.png", np.zeros((64, 64)))
    _png(tmp_path / "bad.png", np.random.default_rng(0).integers(0, 255, (64, 64)))
    whole = (tmp_path / "bad.png").read_bytes()
    (tmp_path / "bad.png").write_bytes(whole[: len(whole) // 2] if content == "truncated" else content)
    with pytest.raises(ValueError, match=r"cannot read the image .*bad\.png"):
        data.image_folder(tmp_path, 8)


def test_image_folder_errors(tmp_path):
    with pytest.raises(ValueError, match="holds no images"):
        data.image_folder(tmp_path, 8)
    _png(tmp_path / "beside.png", np.zeros((2, 2)))
    _png(tmp_path / "cat" / "a.png", np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"classes, but 'beside\.png' lies beside them"):
        data.image_folder(tmp_path, 8)
    with pytest.raises(ValueError, match="size must be at least 1; got 0"):
        data.image_folder(tmp_path, 0)
    with pytest.raises(ValueError, match="channels must be 1"):
        data.image_folder(tmp_path, 8, channels=2)


def test_npz_file(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.array([0, 2, 1, 1, 0], dtype=np.int32))
    loaded = data.npz_file(tmp_path / "a.npz")
    assert np.array_equal(loaded.images.permute(0, 2, 3, 1).numpy(), images)
    assert loaded.labels.tolist() == [0, 2, 1, 1, 0]
    assert loaded.classes == ("0", "1", "2")
    np.savez(tmp_path / "grey.npz", images=images[..., 0])
    assert data.npz_file(tmp_path / "grey.npz").images.shape == (5, 1, 4, 4)


_IMAGES = np.zeros((3, 4, 4, 1), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": _IMAGES}, "must hold an array 'images'"),
        ({"images": _IMAGES.astype(np.float32)}, "must be uint8"),
        ({"images": np.zeros((3, 4, 4, 2), np.uint8)}, "C 1 or 3"),
        ({"images": np.zeros((0, 4, 4, 1), np.uint8)}, "must be uint8"),
        ({"images": np.zeros((3, 4, 5, 1), np.uint8)}, "must be square; got 4 x 5"),
        ({"images": _IMAGES, "labels": np.zeros(2, int)}, "must be 3 integers"),
        ({"images": _IMAGES, "labels": np.zeros(3)}, "must be 3 integers"),
        ({"images": _IMAGES, "labels": np.array([0, -1, 1])}, "count from 0; got -1 to 1"),
        ({"images": _IMAGES, "labels": np.array([0, 9, 1])}, "count from 0; got 0 to 9"),
        ({"images": np.array([{"pickled": 1}])}, "cannot read"),
    ],
)
def test_npz_errors(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        data.npz_file(tmp_path / "a.npz")


def test_npz_truncated(tmp_path):
    np.savez(tmp_path / "a.npz", images=_IMAGES)
    whole = (tmp_path / "a.npz").read_bytes()
    for content in (whole[:100], b"", b"text"):
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot read .*a\.npz"):
            data.npz_file(tmp_path / "a.npz")


def test_load_finds_what_its_name_says(tmp_path):
    assert len(data.load("digits")) == 1437
    _png(tmp_path / "a.png", np.zeros((2, 2)))
    assert data.load(str(tmp_path), 4).images.shape == (1, 3, 4, 4)
    assert data.load(str(tmp_path), 4, grey=True).images.shape == (1, 1, 4, 4)
    with pytest.raises(ValueError, match="grey may be given only for a folder of images; got it for 'digits'"):
        data.load("digits", grey=True)
    np.savez(tmp_path / "a.npz", images=_IMAGES)
    assert len(data.load(str(tmp_path / "a.npz"))) == 3
    for source, size, message in (
        (str(tmp_path), None, "image_size must be given"),
        ("digits", 16, "image_size must be that of the data, 8; got 16"),
        ("nowhere", None, "which is not there"),
    ):
        with pytest.raises(ValueError, match=message):
            data.load(source, size)


def test_class_indices():
    assert data.class_indices(["dog", "0"], ("cat", "dog"), 2) == [1, 0]
    assert data.class_indices(["1"], (), 2) == [1]
    with pytest.raises(ValueError, match="classes must be among cat, dog; got '2'"):
        data.class_indices(["2"], ("cat", "dog"), 2)
