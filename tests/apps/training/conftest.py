"""What is trained on."""

import dataclasses

import pytest

from dd_kernels.apps import data
from dd_kernels.apps.data import ImageData
from dd_kernels.apps.training import trainer


@pytest.fixture(scope="session")
def images():
    return dataclasses.replace(data.digits(), images=data.digits().images[:20], labels=data.digits().labels[:20])


@pytest.fixture
def in_float64(monkeypatch):
    """Makes training runs compute in float64, where a rounding is 2^29 times smaller than in float32."""
    batch, build = ImageData.batch, trainer.build_model

    def double_batch(self, index):
        x_start, labels = batch(self, index)
        return x_start.double(), labels

    def double_model(*arguments):
        model, info = build(*arguments)
        return model.double(), info

    monkeypatch.setattr(ImageData, "batch", double_batch)
    monkeypatch.setattr(trainer, "build_model", double_model)
