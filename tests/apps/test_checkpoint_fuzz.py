"""Random changes of a model file: it loads, or is one clear ValueError, and costs little memory either way."""

import json
import os
import random
import struct
import time

import pytest
import torch

from dd_kernels.apps import checkpoint, tensors
from dd_kernels.apps.checkpoint import ModelInfo
from dd_kernels.nn import UNet

ODD = [None, True, -1, 0, 1, 3, 10**9, 10**30, 0.5, float("nan"), float("inf"), "", "x", "linear", [], [1], [[]], {}]
ODD += [
    {"a": []},
    [10**9] * 3,
    "\x00",
    [0] * 50,
    list(range(2000)),
    {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    options = {"image_size": 4, "in_channels": 1, "channels": [4], "num_res_blocks": 1, "num_groups": 2}
    return UNet(**options, middle_attention=False)


def places(node, path=()):
    """Yields the path of every value in a JSON tree."""
    yield path
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, value in children:
        yield from places(value, (*path, name))


def changed(tree, random_):
    """Returns a copy of a JSON tree with one value replaced, removed or added."""
    tree = json.loads(json.dumps(tree))
    path = random_.choice(list(places(tree))[1:])
    node = tree
    for name in path[:-1]:
        node = node[name]
    action = random_.randrange(4)
    if action == 0:
        del node[path[-1]]
    elif action == 1 and isinstance(node, dict):
        node[random_.choice(["extra", "format", "kind", "sha256", "channels"])] = random_.choice(ODD)
    else:
        node[path[-1]] = random_.choice(ODD)
    return tree


def write_changed(path, model, random_):
    """Writes a file whose metadata, header or bytes are changed; the checksum fits where the metadata are."""
    info = ModelInfo(model.config, "linear", 8, "v", (), {"step": 3})
    metadata = {"format": checkpoint.FORMAT, "kind": checkpoint.KIND, **info.as_metadata(), "state": {"step": 1}}
    kind = random_.randrange(3)
    if kind == 0:
        for _ in range(random_.randrange(3)):
            metadata = changed(metadata, random_)
    tensors.write(path, model.state_dict(), metadata, checkpoint.KEY)
    if kind == 0:
        return
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    if kind == 1:
        header = json.dumps(changed(json.loads(content[8 : 8 + length]), random_)).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])
        return
    content = bytearray(content)
    for _ in range(random_.randrange(1, 4)):
        place = random_.randrange(8 + length if random_.random() < 0.8 else len(content))
        content[place] = random_.randrange(256)
    path.write_bytes(content[: random_.choice([len(content), random_.randrange(len(content))])])


def attack(path, model, random_):
    """Loads a changed file; returns whether it loaded."""
    write_changed(path, model, random_)
    try:
        loaded, info = checkpoint.load_model(path)
    except ValueError as error:
        message = str(error)
    else:
        # A file that loads makes a schedule and a model that work.
        assert len(info.make_schedule()) == info.num_timesteps
        assert all(parameter.dtype.is_floating_point for parameter in loaded.parameters())
        return True
    assert "\n" not in message
    assert str(path) in message
    return False


def attack_many(path, model, random_, monkeypatch, go_on):
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # fsync would take most of the test's time
    outcomes = []
    while go_on(len(outcomes)):
        outcomes.append(attack(path, model, random_))
    print(f"{len(outcomes)} files, {sum(outcomes)} of them loaded")
    assert any(outcomes)
    assert not all(outcomes)


def test_changed_files_load_or_are_refused(tmp_path, model, monkeypatch):
    attack_many(tmp_path / "m.safetensors", model, random.Random(0), monkeypatch, lambda count: count < 150)


@pytest.mark.slow
def test_changed_files_for_a_minute(tmp_path, model, monkeypatch):
    end = time.monotonic() + 60
    attack_many(tmp_path / "m.safetensors", model, random.Random(1), monkeypatch, lambda count: time.monotonic() < end)
