"""A judge's file: the same classifier, features to float16's rounding, and an error for anything else."""

import pytest
import torch

from dd_kernels.apps import tensors
from dd_kernels.apps.checkpoint import KEY
from dd_kernels.apps.evaluate import load_judge, save_judge


@pytest.fixture(scope="module")
def path(judge, tmp_path_factory):
    path = tmp_path_factory.mktemp("judge") / "judge.safetensors"
    save_judge(path, judge)
    return path


def test_a_file_holds_the_judge(judge, path):
    found = load_judge(path)
    images = torch.rand(20, 1, 8, 8) * 2 - 1
    assert torch.equal(found.classifier(images), judge.classifier(images))
    assert (found.shape, found.seed, found.num_classes) == (judge.shape, judge.seed, 10)
    assert load_judge(path).digest() == found.digest() != judge.digest()  # whose features are not rounded
    for ours, theirs in ((found.train, judge.train), (found.held_out, judge.held_out)):
        assert torch.equal(ours.labels, theirs.labels)
        assert torch.equal(ours.features, theirs.features.half().float())


def test_another_file_is_refused(path, tmp_path):
    content, damaged = path.read_bytes(), tmp_path / "damaged.safetensors"
    for wrong in (content[:-1], content[:-1] + bytes([content[-1] ^ 1]), b""):
        damaged.write_bytes(wrong)
        with pytest.raises(ValueError, match=r"cannot read .*damaged"):
            load_judge(damaged)
    tensors.write(damaged, {"a": torch.zeros(1)}, {"format": 2, "kind": "model"}, KEY)
    with pytest.raises(ValueError, match="is a model; wanted is a judge"):
        load_judge(damaged)


@pytest.mark.parametrize(
    "missing", ["held_out.labels", "train.features", "classifier.head.bias", "classifier.body.0.bias"]
)
def test_a_file_without_a_part_is_refused(path, tmp_path, missing):
    with tensors.TensorFile(path, "judge") as file:
        found, description = file.read(KEY), file.described(KEY)
    damaged = tmp_path / "damaged.safetensors"
    tensors.write(damaged, {name: v for name, v in found.items() if name != missing}, description, KEY)
    with pytest.raises(ValueError, match="does not hold a judge"):
        load_judge(damaged)
    found[missing] = found[missing][:-1]
    tensors.write(damaged, found, description, KEY)
    with pytest.raises(ValueError, match="does not hold a judge"):
        load_judge(damaged)
