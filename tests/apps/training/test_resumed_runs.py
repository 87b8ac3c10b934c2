"""Runs that a signal stopped, of every option: resumed, they end with the same bits; and what their files hold."""

import pytest
import torch
from training_runs import TINY, metadata, options, same, stop_after, train

from dd_kernels.apps import checkpoint, training

CHANGES = [
    {},
    {"precision": "fp16", "flip": True},
    {"precision": "bf16", "prediction": "v"},
    {"model": {**TINY, "learn_variance": True}, "prediction": "x_start"},
    {"model": {**TINY, "self_conditioning": True}, "precision": "bf16", "batch_size": 5},
    {"loss_weight": "min-snr", "snr_gamma": 2.0},
    {"timesteps": "loss-second-moment", "num_timesteps": 1},
    {"timesteps": "loss-second-moment", "num_timesteps": 2, "batch_size": 40},
    {"input_perturbation": 0.1},
    {"ema": (0.9, 0.5)},
    {"lr_schedule": "cosine"},
    pytest.param({"accelerate": True}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("changes", CHANGES)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, images, changes):
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    train(whole, images, **changes)
    stop_after(2, parts, images, **changes)
    assert not same(whole, parts)
    torch.manual_seed(99)  # whatever the new process' generator holds
    train(parts, images, resume=True, **changes)
    assert same(whole, parts)
    assert metadata(whole) == metadata(parts)


def test_the_cosine_ends_where_it_was_to_end(tmp_path, images):
    out = tmp_path / "a.safetensors"
    train(out, images, lr_schedule="cosine")
    with pytest.raises(ValueError, match="steps must be 6, as in the run that is resumed; got 7"):
        train(out, images, resume=True, lr_schedule="cosine", steps=7)
    train(tmp_path / "b.safetensors", images)
    train(tmp_path / "b.safetensors", images, resume=True, steps=7)


def test_a_file_holds_every_average_and_the_first_is_the_models(tmp_path, images):
    out = tmp_path / "a.safetensors"
    run = train(out, images, ema=(0.9, 0.5))
    training.train(options(ema=(0.9, 0.5)), out, dataset=images, resume=True, keep_state=False)
    for ema, average in ((None, 0), (0.9, 0), (0.5, 1)):
        model, info = checkpoint.load_model(out, ema)
        assert info.ema == (0.9, 0.5)
        expected = run.averages.models[average].state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"ema must be the decay of an average that .* holds, 0\.9, 0\.5; got 0\.7"):
        checkpoint.load_model(out, 0.7)
