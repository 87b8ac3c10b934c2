"""Makes every command run in an empty folder, and makes the models that the commands sample from."""

import pytest
import torch

from dd_kernels.apps import checkpoint
from dd_kernels.apps.checkpoint import ModelInfo
from dd_kernels.nn import UNet


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A class-conditional model, one without dropped labels, one without classes and one that learns its variance.

    Their weights are random.
    """
    folder, paths = tmp_path_factory.mktemp("models"), {}
    kinds = {"digits": (10, True), "undropped": (10, False), "plain": (None, False), "learned": (None, False)}
    for name, (num_classes, null_class) in kinds.items():
        torch.manual_seed(0)
        options = {"num_classes": num_classes, "null_class": null_class, "learn_variance": name == "learned"}
        model = UNet.from_config("digits", channels=(8, 16), num_heads=2, num_groups=4, **options)
        for parameter in model.parameters():  # layers that start as 0 would hide timesteps and classes
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
        classes = tuple(map(str, range(num_classes or 0)))
        paths[name] = str(folder / f"{name}.safetensors")
        checkpoint.save_model(paths[name], model.state_dict(), ModelInfo(model.config, "cosine", 20, "v", classes, {}))
    return paths
