"""Model files: safetensors in, one clear ValueError for everything else."""

import json
import os
import pickle
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dd_kernels.apps import checkpoint, tensors
from dd_kernels.apps.checkpoint import ModelInfo
from dd_kernels.nn import UNet

TINY = {"channels": [8, 16], "num_heads": 2, "num_groups": 4}


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = UNet.from_config("digits", **TINY).eval()
    with torch.no_grad():  # layers that start as 0 get values, so that a lost one shows
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    return model


def _info(model, **changes):
    values = {
        "config": model.config,
        "schedule": "cosine",
        "num_timesteps": 50,
        "prediction": "v",
        "classes": tuple("0123456789"),
        "training": {"seed": 3},
    }
    return ModelInfo(**{**values, **changes})


@pytest.fixture
def path(tmp_path, model):
    path = tmp_path / "model.safetensors"
    checkpoint.save_model(path, model.state_dict(), _info(model))
    return path


def test_a_model_comes_back_as_it_was(path, model):
    loaded, info = checkpoint.load_model(path)
    assert info == _info(model)
    assert info.sample_shape == (1, 8, 8)
    assert len(info.make_schedule()) == 50
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([3, 40]), torch.tensor([1, 10])
    with torch.no_grad():
        assert torch.equal(loaded(x, t, y), model(x, t, y))
    assert loaded.down[0].resnets[0].conv2.weight.is_contiguous(memory_format=torch.channels_last)


def test_the_packaged_models_are_small_and_whole(tmp_path, monkeypatch):
    side = {"fashion": 28, "digits": 8}
    assert set(side) == set(checkpoint.BUNDLED)
    for name in checkpoint.BUNDLED:
        assert checkpoint.packaged_model(name).stat().st_size < 3_000_000
        model, info = checkpoint.load_model(name)
        assert info.sample_shape == (1, side[name], side[name])
        assert len(info.classes) == model.null_label == 10
        assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    assert checkpoint.load_model()[1] == checkpoint.load_model("fashion")[1]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").write_bytes(b"")  # a file of the user's goes before a bundled model of its name
    with pytest.raises(ValueError, match="cannot read 'digits' as a model"):
        checkpoint.load_model("digits")


def test_every_truncation_is_one_clear_error(path):
    whole = path.read_bytes()
    for size in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cannot read .*model\.safetensors.* as a model") as error:
            checkpoint.load_model(path)
        assert "\n" not in str(error.value)


class Bomb:
    """Pickled, it would write a file where it is loaded."""

    def __reduce__(self):
        return exec, ("open('exploded', 'w')",)


def test_nothing_is_ever_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="cannot read"):
        checkpoint.load_model(path)
    torch.save({"weight": torch.zeros(2), "bomb": Bomb()}, path)
    with pytest.raises(ValueError, match="cannot read"):
        checkpoint.load_model(path)
    assert not (tmp_path / "exploded").exists()


def test_missing_foreign_and_wrong_kinds(tmp_path, path):
    with pytest.raises(ValueError, match="there is no model"):
        checkpoint.load_model(tmp_path / "missing.safetensors")
    with pytest.raises(ValueError, match="is a folder"):
        checkpoint.load_model(tmp_path)
    tensors.write(tmp_path / "other", {"x": torch.zeros(1)}, {"format": 2, "kind": "judge"}, checkpoint.KEY)
    with pytest.raises(ValueError, match="is a judge; wanted is a model"):
        checkpoint.load_model(tmp_path / "other")
    foreign = tmp_path / "foreign.safetensors"
    for metadata in (None, {"format": "pt"}, {"dd_kernels": "not json"}, {"dd_kernels": "3"}, {"dd_kernels": "{}"}):
        save_file({"x": torch.zeros(1)}, foreign, metadata=metadata)
        with pytest.raises(ValueError, match="no model that dd_kernels wrote"):
            checkpoint.load_model(foreign)
    header = json.dumps({"format": 99, "kind": "model"})
    save_file({"x": torch.zeros(1)}, foreign, metadata={"dd_kernels": header})
    with pytest.raises(ValueError, match="has the format 99; this version reads 2"):
        checkpoint.load_model(foreign)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "wavy"}, "does not describe its model: schedule 'wavy'"),
        ({"prediction": "future"}, "does not describe its model"),
        ({"num_timesteps": 0}, "does not describe its model: num_timesteps must be an integer in"),
        ({"num_timesteps": 10**12}, "does not describe its model: num_timesteps must be an integer in"),
        ({"training": []}, "training must be a dict"),
        ({"classes": (1, 2)}, "classes must be strings"),
        ({"ema": ("0.9",)}, "ema must be numbers"),
        ({"ema": 3}, "does not describe its model"),
        ({"num_timesteps": "many"}, "does not describe its model"),
        ({"config": {"image_size": 8}}, "does not describe a UNet"),
        ({"config": {"flavour": "mint"}}, "does not describe a UNet"),
    ],
)
def test_headers_that_make_no_sense(tmp_path, model, changes, message):
    path = tmp_path / "model.safetensors"
    checkpoint.save_model(path, model.state_dict(), _info(model, **changes))
    with pytest.raises(ValueError, match=message):
        checkpoint.load_model(path)


def test_a_header_that_names_an_average_which_is_not_there(tmp_path, model):
    path = tmp_path / "model.safetensors"
    checkpoint.save_model(path, model.state_dict(), _info(model, ema=(0.9, 0.99)))
    checkpoint.load_model(path, 0.9)
    with pytest.raises(ValueError, match="need more than 0 tensors"):
        checkpoint.load_model(path, 0.99)


def test_a_header_without_info(tmp_path):
    path = tmp_path / "model.safetensors"
    for metadata in ({}, {"info": 3}, {"info": {"classes": []}}, {"info": {"classes": [], "extra": 1}}):
        header = {"format": checkpoint.FORMAT, "kind": checkpoint.KIND, **metadata}
        tensors.write(path, {"x": torch.zeros(1)}, header, checkpoint.KEY)
        with pytest.raises(ValueError, match="does not describe its model"):
            checkpoint.load_model(path)


def test_weights_of_another_model(tmp_path, model):
    path = tmp_path / "model.safetensors"
    weights = model.state_dict()
    without = {name: value for name, value in weights.items() if name != "conv_out.bias"}
    for changed, message in (
        (without, r"conv_out\.bias is missing, wanted \(1,\) \(1 such\)"),
        ({**weights, "extra": torch.zeros(2)}, r"extra is \(2,\), wanted none"),
        ({**weights, "conv_out.bias": torch.zeros(5)}, r"conv_out\.bias is \(5,\), wanted \(1,\)"),
    ):
        checkpoint.save_model(path, changed, _info(model))
        with pytest.raises(ValueError, match=message):
            checkpoint.load_model(path)


def test_a_header_that_lies_about_sizes_allocates_nothing(tmp_path, model):
    path = tmp_path / "model.safetensors"
    huge = {**model.config, "channels": [1 << 20, 1 << 20]}  # weights of 40 TB
    checkpoint.save_model(path, model.state_dict(), _info(model, config=huge))
    with pytest.raises(ValueError, match="does not hold the weights that it describes"):
        checkpoint.load_model(path)


def test_a_header_with_more_blocks_than_tensors_is_not_built(tmp_path, model):
    path = tmp_path / "model.safetensors"
    checkpoint.save_model(path, model.state_dict(), _info(model, config={**model.config, "num_res_blocks": 10**9}))
    with pytest.raises(ValueError, match="need more than"):
        checkpoint.load_model(path)


def _with_header(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize(
    "header",
    [
        {"x": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {"x": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0]}},
        {"__metadata__": {"a": 1}},
        {"__metadata__": 3},
        [1],
        b"[" * 100_000,
        b"{}" + b" " * (5 << 20),
        b"\xff\xfe",
    ],
)
def test_headers_that_lie(tmp_path, header):
    path = tmp_path / "model.safetensors"
    _with_header(path, header, b"1234")
    with pytest.raises(ValueError, match=r"cannot read .* as a model") as error:
        checkpoint.load_model(path)
    assert len(str(error.value)) < 500


def test_a_header_longer_than_the_file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    with pytest.raises(ValueError, match=r"cannot read .* its header has 1099511627776 bytes, the file 10"):
        checkpoint.load_model(path)


@pytest.mark.parametrize("stride", [61, pytest.param(1, marks=pytest.mark.slow)])
def test_a_changed_byte_is_found_wherever_it_is(path, stride):
    whole = path.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0] + 8
    before = checkpoint.load_model(path)
    for place in [*range(0, length, stride), *range(length, len(whole), 100 * stride)]:
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        try:
            model, info = checkpoint.load_model(path)
        except ValueError:
            continue
        # Only white space of the header may differ.
        assert chr(whole[place]) in " \t\n\r"
        assert info == before[1]
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before[0].parameters(), strict=True))


def test_a_loaded_model_does_not_depend_on_its_file(path):
    model, _ = checkpoint.load_model(path)
    before = [parameter.clone() for parameter in model.parameters()]
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\xff" * 1000)
        file.truncate(path.stat().st_size // 2 + 1000)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_weights_that_are_integers_are_refused(path, model):
    integers = {name: value.to(torch.int32) for name, value in model.state_dict().items()}
    checkpoint.save_model(path, integers, _info(model))
    with pytest.raises(ValueError, match=r"holds torch\.int32 where weights belong"):
        checkpoint.load_model(path)


def test_the_file_is_one_that_safetensors_reads(path, model):
    loaded = load_file(path)
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


def test_files_of_format_1_are_still_read(path, model):
    header = {"format": 1, "kind": "model", **_info(model).as_metadata()}
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()},
        path,
        metadata={"dd_kernels": json.dumps(header)},
    )
    assert checkpoint.load_model(path)[1] == _info(model)


def test_a_pipe_is_no_model(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="must be a regular file"):
        checkpoint.load_model(tmp_path / "pipe")


def test_numpy_numbers_and_paths_in_the_description(path, model):
    info = _info(model, num_timesteps=50, training={"data": path, "lr": np.float32(0.5), "steps": np.int64(3)})
    checkpoint.save_model(path, model.state_dict(), info)
    assert checkpoint.load_model(str(path))[1].training == {"data": str(path), "lr": 0.5, "steps": 3}


def test_a_failing_save_leaves_the_old_file(path, model, monkeypatch):
    old = path.read_bytes()

    def fail(handle, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", fail)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save_model(path, model.state_dict(), _info(model))
    assert path.read_bytes() == old
    assert [p.name for p in path.parent.iterdir()] == [path.name]
