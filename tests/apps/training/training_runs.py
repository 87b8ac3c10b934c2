"""Training runs of a few steps on a few digits."""

import signal
from unittest import mock

import torch
from safetensors.torch import load_file

from dd_kernels.apps import checkpoint, training
from dd_kernels.apps.training import TrainOptions

TINY = {"channels": [8, 16], "num_heads": 2, "num_groups": 4, "attention_resolutions": [4]}
CPU = torch.device("cpu")


def options(**changes):
    values = {
        "config": "digits",
        "model": TINY,
        "schedule": "cosine",
        "num_timesteps": 4,
        "steps": 6,
        "batch_size": 6,
        "lr": 1e-2,
        "warmup": 3,
        "ema": 0.9,
    }
    return TrainOptions(**{**values, **changes})


def train(out, images, resume=False, **changes):
    return training.train(options(**changes), out, dataset=images, resume=resume, save_every=4, sample_every=0)


def stop_after(last, out, images, **changes):
    """Trains until a signal comes in step ``last``, and saves after it."""
    step = training.Trainer.train_step

    def interrupted(self):
        if self.step == last - 1:
            signal.raise_signal(signal.SIGTERM)
        return step(self)

    with mock.patch.object(training.Trainer, "train_step", interrupted):
        assert train(out, images, **changes).step == last


def metadata(path):
    """The training state's metadata in a model file."""
    file, found = checkpoint.open_model(path)
    file.close()
    return found["state"]


def same(a, b):
    """Returns whether two files hold equal tensors: the model's and the training state's."""
    first, second = load_file(a), load_file(b)
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)
