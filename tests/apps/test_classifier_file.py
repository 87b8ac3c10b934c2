"""Files of classifiers: what is written is read, and what is no classifier is refused by one line."""

import pytest
import torch

from dd_kernels.apps import checkpoint
from dd_kernels.apps.checkpoint import ModelInfo
from dd_kernels.apps.classifier_file import load_classifier, save_classifier
from dd_kernels.nn import NoisyClassifier, UNet

OPTIONS = {"image_size": 8, "in_channels": 1, "channels": (8,), "num_groups": 4, "num_classes": 3}


def written(path, network=NoisyClassifier, prediction="class"):
    torch.manual_seed(0)
    model = network(**OPTIONS)
    info = ModelInfo(model.config, "cosine", 20, prediction, ("a", "b", "c"), {"steps": 7})
    save_classifier(path, model.state_dict(), info)
    return model, info


def test_what_is_written_is_read(tmp_path):
    model, info = written(tmp_path / "c.safetensors")
    found, described = load_classifier(tmp_path / "c.safetensors")
    assert described == info
    assert found.config == model.config
    assert all(value.equal(model.state_dict()[name]) for name, value in found.state_dict().items())
    assert not found.training
    assert not any(parameter.requires_grad for parameter in found.parameters())


def test_what_is_no_classifier(tmp_path):
    path = tmp_path / "c.safetensors"
    with pytest.raises(ValueError, match=r"there is no classifier '.*c.safetensors'"):
        load_classifier(path)
    model, info = written(path)
    with pytest.raises(ValueError, match="is a classifier; wanted is a model"):
        checkpoint.load_model(path)
    content = path.read_bytes()
    path.write_bytes(content[:-8])
    with pytest.raises(ValueError, match="as a classifier"):
        load_classifier(path)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="the checksum differs"):
        load_classifier(path)
    checkpoint.save_model(path, model.state_dict(), info)
    with pytest.raises(ValueError, match="is a model; wanted is a classifier"):
        load_classifier(path)
    written(path, UNet)
    with pytest.raises(ValueError, match="does not hold the weights that it describes"):
        load_classifier(path)
    written(path, prediction="epsilon")
    with pytest.raises(ValueError, match="prediction 'epsilon' is unknown"):
        load_classifier(path)
