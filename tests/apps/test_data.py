"""Training images, and the Philox words that pick from them."""

import io
import os
import zipfile

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
    wide[:, 2:6] = (10, 20, 30)  # the central square, which the crop keeps; the rest is black
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
def test_a_broken_image_is_skipped_and_named_or_refused(tmp_path, content):
    _png(tmp_path / "good.png", np.zeros((64, 64)))
    _png(tmp_path / "bad.png", np.random.default_rng(0).integers(0, 255, (64, 64)))
    whole = (tmp_path / "bad.png").read_bytes()
    (tmp_path / "bad.png").write_bytes(whole[: len(whole) // 2] if content == "truncated" else content)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.warns(UserWarning, match=r"skipped 2 of 3 images in .*cannot read the image .*bad\.png.*pipe\.png"):
        folder = data.image_folder(tmp_path, 8)
    assert len(folder) == 1
    with pytest.raises(ValueError, match=r"2 of 3 images in .* are broken: .*bad\.png"):
        data.image_folder(tmp_path, 8, strict=True)
    (tmp_path / "good.png").unlink()
    with pytest.raises(ValueError, match="2 of 2 images"):
        data.image_folder(tmp_path, 8)


def test_only_the_first_broken_images_are_named(tmp_path):
    _png(tmp_path / "good.png", np.zeros((2, 2)))
    for i in range(9):
        (tmp_path / f"{i}.png").write_text("no image")
    with pytest.warns(UserWarning, match=r"skipped 9 of 10 images .*'.*4\.png'.*; and 4 more"):
        data.image_folder(tmp_path, 2)


def test_junk_is_ignored_and_links_are_followed(tmp_path):
    folder, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    _png(folder / "cat" / "a.png", np.zeros((2, 2)))
    _png(elsewhere / "b.png", np.zeros((2, 2)))
    (folder / "dog").symlink_to(elsewhere)
    (folder / "cat" / "c.png").symlink_to(elsewhere / "b.png")
    for name in ("._x.png", ".ipynb_checkpoints/a.png", "__MACOSX/a.png", "cat/._a.png", "Thumbs.db", "desktop.ini"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("junk")
    found = data.image_folder(folder, 2)
    assert found.classes == ("cat", "dog")
    assert found.labels.tolist() == [0, 0, 1]
    (folder / "cat" / "loop").symlink_to(folder)
    with pytest.raises(ValueError, match=r"the symbolic link .*loop' leads back to"):
        data.image_folder(folder, 2)


def _square(tmp_path, image, name="a.png", channels=1, **options):
    image.save(tmp_path / name, **options)
    return data.load_image(tmp_path / name, image.size[0], channels)


def test_images_of_16_bits_and_floats_keep_their_greys(tmp_path):
    wide = np.array([[0, 257 * 128], [257 * 200, 65535]], np.uint16)
    wanted = [[0, 128], [200, 255]]
    assert _square(tmp_path, Image.fromarray(wide))[0].tolist() == wanted
    assert _square(tmp_path, Image.fromarray(wide), "a.tiff")[0].tolist() == wanted
    assert _square(tmp_path, Image.fromarray(wide), channels=3)[2].tolist() == wanted
    assert _square(tmp_path, Image.fromarray(wide.astype(np.int32)), "i.tiff")[0].tolist() == wanted
    for scale in (255, 1):
        floats = np.array([[0, 128 / scale], [200 / scale, 255 / scale]], np.float32)
        assert _square(tmp_path, Image.fromarray(floats), "f.tiff")[0].tolist() == wanted
    dark = np.array([[0, 1.6], [0.4, 1]], np.float32)  # beyond 1, so of 255
    assert _square(tmp_path, Image.fromarray(dark), "f.tiff")[0].tolist() == [[0, 2], [0, 1]]
    for values, message in (([[0, np.nan]] * 2, "NaN"), ([[-1, 0]] * 2, "go from -1"), ([[0, 300]] * 2, "to 300")):
        with pytest.raises(ValueError, match=f"cannot read the image .*{message}"):
            _square(tmp_path, Image.fromarray(np.array(values, np.float32)), "f.tiff")


def test_the_orientation_of_a_camera_is_applied(tmp_path):
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[0] = 200  # the top row as stored
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image = _square(tmp_path, Image.fromarray(pixels), channels=1, exif=exif)[0]
    assert image[:, 3].tolist() == [200] * 4
    assert image[:, :3].max() == 0


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "L", "RGB"])
def test_transparent_pixels_have_the_background(tmp_path, mode):
    white, name, options = np.full((2, 2, 4), 255, np.uint8), "a.png", {}
    white[0, :, 3] = 0
    if mode in ("RGBA", "LA"):
        image = Image.fromarray(white).convert(mode)
    elif mode == "PA":
        image, name = Image.new("PA", (2, 2)), "a.tiff"
        image.putpalette([0, 0, 0, 255, 255, 255])
        for place, pixel in (((0, 0), (0, 0)), ((1, 0), (1, 0)), ((0, 1), (1, 255)), ((1, 1), (1, 255))):
            image.putpixel(place, pixel)
    else:
        image = Image.fromarray(np.array([[0, 0], [255, 255]], np.uint8)).convert(mode)
        options = {"transparency": (0, 0, 0) if mode == "RGB" else image.getpixel((0, 0))}
    image.save(tmp_path / name, **options)
    found = data.load_image(tmp_path / name, 2)
    assert found[:, 0].unique().tolist() == [128]
    assert found[:, 1].unique().tolist() == [255]
    red = data.load_image(tmp_path / name, 2, background=data.parse_colour("#ff0000"))
    assert red[:, 0, 0].tolist() == [255, 0, 0]


def test_16_bits_with_a_transparent_grey(tmp_path):
    wide = Image.fromarray(np.array([[1000, 1001], [65535, 0]], np.uint16))
    wide.save(tmp_path / "a.png", transparency=1000)
    assert data.load_image(tmp_path / "a.png", 2)[0].tolist() == [[128, 4], [255, 0]]


def test_cmyk_one_bit_and_palettes(tmp_path):
    red = Image.new("RGB", (2, 2), (255, 0, 0))
    for name, image in (("c.tiff", red.convert("CMYK")), ("p.png", red.convert("P")), ("p.gif", red.convert("P"))):
        assert _square(tmp_path, image, name, 3)[:, 0, 0].tolist() == [255, 0, 0]
    bits = Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8)).convert("1")
    assert _square(tmp_path, bits)[0].tolist() == [[0, 255], [255, 0]]
    lab = Image.new("LAB", (2, 2), (255, 128, 128))
    assert _square(tmp_path, lab, "l.tiff", 3).min() > 250


def test_colours():
    assert data.parse_colour("rgb(1, 2, 3)") == (1, 2, 3)
    for wrong in ("mint-ish", "", "#12"):
        with pytest.raises(ValueError, match="background must be a colour"):
            data.parse_colour(wrong)


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
        ({"arr_0": _IMAGES[..., :0]}, "arr_0 in .* must be uint8"),
        ({"arr_0": _IMAGES, "arr_1": np.zeros(2, int)}, "arr_1 in .* must be 3 integers"),
    ],
)
def test_npz_errors(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        data.npz_file(tmp_path / "a.npz")


def test_npz_of_guided_diffusion(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images, np.array([0, 2, 1, 1, 0]))
    loaded = data.npz_file(tmp_path / "a.npz")
    assert np.array_equal(loaded.images.permute(0, 2, 3, 1).numpy(), images)
    assert loaded.labels.tolist() == [0, 2, 1, 1, 0]
    np.savez(tmp_path / "b.npz", images)
    assert data.npz_file(tmp_path / "b.npz").labels is None


def test_npz_whose_header_promises_more_than_it_holds(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        head = np.lib.format.header_data_from_array_1_0(_IMAGES) | {"shape": (1 << 40, 4, 4, 1)}
        content = io.BytesIO()
        np.lib.format.write_array_header_1_0(content, head)
        archive.writestr("images.npy", content.getvalue() + b"few")
    with pytest.raises(ValueError, match=r"tells of 17592186044416 bytes, the file of 3"):
        data.npz_file(tmp_path / "a.npz")


def test_pipes_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="data must be a regular file"):
        data.load(tmp_path / "pipe")


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
