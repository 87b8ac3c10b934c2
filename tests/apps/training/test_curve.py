"""A run's loss curve and its picture of samples: the same after a stop, and no file of the user lost."""

import pytest
import torch
from PIL import Image
from training_runs import options, same, stop_after

from dd_kernels.apps import checkpoint, training
from dd_kernels.apps.training import curve
from dd_kernels.apps.training.curve import BLOCK, LossCurve, add_row, steps_of


def test_the_mean_of_every_block_is_kept():
    first = LossCurve()
    for i in range(2 * BLOCK + 7):
        first.add(float(i))
    assert first.means == [BLOCK / 2 - 0.5, 1.5 * BLOCK - 0.5]
    again = LossCurve(**first.as_json())
    for i in range(2 * BLOCK + 7, 3 * BLOCK):
        again.add(float(i))
    assert again.means == [*first.means, 2.5 * BLOCK - 0.5]


def test_a_resumed_run_has_the_curve_of_one_that_never_stopped(tmp_path, images, monkeypatch):
    monkeypatch.setattr(curve, "BLOCK", 5)
    whole, stopped = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    training.train(options(steps=11), whole, dataset=images, sample_every=0)
    stop_after(7, stopped, images, steps=11)
    training.train(options(steps=11), stopped, dataset=images, resume=True, sample_every=0)
    assert same(whole, stopped)
    losses = [checkpoint.load_model(path)[1].training["losses"] for path in (whole, stopped)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2


def test_rows_are_added_and_those_of_lost_steps_go(tmp_path):
    path = tmp_path / "run.png"
    samples = torch.arange(4 * 12 * 5 * 5, dtype=torch.int64).reshape(4, 12, 5, 5, 1).to(torch.uint8)
    for step, batch in zip((10, 20, 30), samples, strict=False):
        add_row(path, step, batch)
    assert steps_of(path) == [10, 20, 30]
    before = Image.open(path).tobytes()
    add_row(path, 40, samples[3])
    add_row(path, 30, samples[2])
    assert steps_of(path) == [10, 20, 30]
    assert Image.open(path).tobytes() == before


def test_colours_and_fewer_rows(tmp_path):
    samples = torch.randint(256, (10, 4, 4, 3), dtype=torch.uint8)
    add_row(tmp_path / "run.png", 1, samples)
    add_row(tmp_path / "run.png", 1, samples)
    assert Image.open(tmp_path / "run.png").mode == "RGB"
    assert steps_of(tmp_path / "run.png") == [1]
    assert steps_of(tmp_path / "none.png") == []


def test_a_run_draws_both_pictures(tmp_path, images):
    out, pictures = tmp_path / "a.safetensors", {name: tmp_path / f"{name}.png" for name in ("plot", "evolution")}
    training.train(options(), out, dataset=images, sample_every=2, **pictures)
    assert steps_of(pictures["evolution"]) == [2, 4, 6]
    assert Image.open(pictures["plot"]).size == (840, 480)
    training.train(options(steps=8), out, dataset=images, resume=True, sample_every=4, **pictures)
    assert steps_of(pictures["evolution"]) == [2, 4, 6, 8]
    with pytest.raises(ValueError, match=r"plot: .* is there already"):
        training.train(options(), tmp_path / "b.safetensors", dataset=images, **pictures)
    training.train(options(), out, dataset=images, overwrite=True, sample_every=3, **pictures)
    assert steps_of(pictures["evolution"]) == [3, 6]


def test_another_picture_is_not_touched(tmp_path, images):
    out, other = tmp_path / "a.safetensors", tmp_path / "other.png"
    training.train(options(steps=1), out, dataset=images)
    Image.new("L", (9, 9)).save(other)
    for name, path, message in (
        ("evolution", other, "evolution: .* is no picture of a run"),
        ("plot", tmp_path / "a.jpg", "plot must name a .png"),
    ):
        with pytest.raises(ValueError, match=message):
            training.train(options(steps=2), out, dataset=images, resume=True, **{name: path})
    assert Image.open(other).size == (9, 9)


def test_half_weights(tmp_path, images):
    """A finished file in 16 bits is half as long, and is read as float32."""
    full, half = tmp_path / "full.safetensors", tmp_path / "half.safetensors"
    training.train(options(), full, dataset=images, sample_every=0, keep_state=False)
    training.train(options(), half, dataset=images, sample_every=0, keep_state=False, half=True)
    assert half.stat().st_size < 0.6 * full.stat().st_size
    weights, rounded = (checkpoint.load_model(path)[0].state_dict() for path in (full, half))
    assert all(torch.equal(rounded[name], value.half().float()) for name, value in weights.items())
    with pytest.raises(ValueError, match="half needs keep_state=False"):
        training.train(options(), full, dataset=images, overwrite=True, half=True)
