"""Hugging Face datasets on disk."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from dd_kernels.apps import data

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def png(value):
    content = io.BytesIO()
    Image.fromarray(np.full((4, 6, 3), value, np.uint8)).save(content, "PNG")
    return content.getvalue()


def table(values, labels=None, names=("cat", "dog")):
    """What the package datasets writes for features Image and ClassLabel."""
    columns = {"image": [{"bytes": png(value), "path": None} for value in values]}
    features = {"image": {"_type": "Image"}}
    if labels is not None:
        columns["label"] = labels
        features["label"] = {"_type": "ClassLabel", "names": list(names)}
    schema = pyarrow.Table.from_pydict(columns).schema
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pyarrow.Table.from_pydict(columns, schema=schema.with_metadata(metadata))


def test_parquet_files_of_the_training_split(tmp_path):
    (tmp_path / "data").mkdir()
    parquet.write_table(table([10, 20], [1, 0]), tmp_path / "data" / "train-00000-of-00002.parquet")
    parquet.write_table(table([30], [1]), tmp_path / "data" / "train-00001-of-00002.parquet")
    parquet.write_table(table([99], [1]), tmp_path / "data" / "test-00000-of-00001.parquet")
    found = data.load(tmp_path, 2)
    assert found.images[:, 0, 0, 0].tolist() == [10, 20, 30]
    assert found.images.shape == (3, 3, 2, 2)
    assert found.labels.tolist() == [1, 0, 1]
    assert found.classes == ("cat", "dog")
    assert data.load(tmp_path, 2, grey=True).images.shape == (3, 1, 2, 2)


@pytest.mark.parametrize("writer", ["new_stream", "new_file"])
def test_arrow_files_of_save_to_disk(tmp_path, writer):
    (tmp_path / "train").mkdir()
    rows = table([10, 20])
    with (
        pyarrow.OSFile(str(tmp_path / "train" / "data-00000-of-00001.arrow"), "wb") as file,
        getattr(pyarrow.ipc, writer)(file, rows.schema) as sink,
    ):
        sink.write_table(rows)
    found = data.load(str(tmp_path), 2)
    assert found.images[:, 0, 0, 0].tolist() == [10, 20]
    assert found.labels is None


def test_images_by_their_path_and_broken_ones(tmp_path):
    (tmp_path / "a.png").write_bytes(png(7))
    images = [{"bytes": None, "path": "a.png"}, {"bytes": b"no image", "path": None}, {"bytes": None, "path": None}]
    parquet.write_table(pyarrow.Table.from_pydict({"img": images}), tmp_path / "a.parquet")
    with pytest.warns(UserWarning, match="skipped 2 of 3 images .*row 1.*row 2"):
        found = data.huggingface_folder(tmp_path, 2)
    assert found.images[:, 0, 0, 0].tolist() == [7]
    with pytest.raises(ValueError, match="2 of 3 images"):
        data.huggingface_folder(tmp_path, 2, strict=True)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"picture": [b""]}, "must have a column 'image' or 'img'; got picture"),
        ({"image": [png(1)], "label": ["cat"]}, "must be integers; got 'cat'"),
        ({"image": [png(1), png(2)], "label": [0, None]}, "for all images or for none"),
        ({"image": [png(1), png(2)], "label": [-2, 0]}, "must be in"),
        ({"image": [png(1), png(2)], "label": [10**9, 0]}, "must be in"),
        ({"image": pyarrow.array([], pyarrow.binary())}, "holds no rows"),
    ],
)
def test_errors(tmp_path, columns, message):
    parquet.write_table(pyarrow.Table.from_pydict(columns), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=message):
        data.load(tmp_path, 2)


def test_labels_count_the_names_or_the_images(tmp_path):
    three = {"image": [png(value) for value in (1, 2, 3)], "label": [0, 2, 1]}
    parquet.write_table(pyarrow.Table.from_pydict(three), tmp_path / "a.parquet")
    assert data.load(tmp_path, 2).classes == ("0", "1", "2")
    parquet.write_table(table([1, 2, 3], [0, 2, 1]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"must be in \[0, 2\); got 0 to 2"):
        data.load(tmp_path, 2)


def test_files_that_are_no_tables(tmp_path):
    for name in ("a.parquet", "b.arrow"):
        (tmp_path / name).write_text("no table")
        with pytest.raises(ValueError, match=rf"cannot read .*{name}' as a dataset"):
            data.load(tmp_path, 2)
        (tmp_path / name).unlink()
