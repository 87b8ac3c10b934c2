"""How a step is shared out: each image once, with the draws that it has in the whole batch, and the same sum."""

import pytest
import torch
from training_runs import CPU, TINY, options, train

from dd_kernels.apps import training
from dd_kernels.apps.data import ImageData
from dd_kernels.apps.processes import Processes
from dd_kernels.apps.training import Parallel, Trainer, make_batch, timesteps


def all_parts(count, accumulate, batch_size):
    return [part for rank in range(count) for part in Parallel(Processes(rank, count), accumulate).parts(batch_size)]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_parts_are_the_batch_cut_evenly(count, accumulate):
    for batch_size in range(count * accumulate, 40):
        parts = all_parts(count, accumulate, batch_size)
        assert [position for part in parts for position in part] == list(range(batch_size))
        sizes = {len(part) for part in parts}
        assert max(sizes) - min(sizes) <= 1


def test_parts_that_would_be_empty_are_refused():
    with pytest.raises(
        ValueError, match="batch_size must be at least 6: accumulate is 2 in each of 3 processes; got 5"
    ):
        Parallel(Processes(0, 3), 2).parts(5)
    with pytest.raises(ValueError, match="accumulate must be at least 1; got 0"):
        Parallel(accumulate=0)


def test_a_part_has_the_draws_of_its_positions(images):
    run = options(batch_size=17, flip=True, label_drop=0.5, num_timesteps=50)
    history = timesteps.LossHistory(50)
    history.losses = torch.rand(50, 10)
    for kept in (None, history):
        whole = make_batch(images, run, 10, 3, kept)
        parts = [make_batch(images, run, 10, 3, kept, part) for part in all_parts(3, 2, 17)]
        for name in ("x_start", "t", "labels", "weights"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name


@pytest.mark.parametrize("perturbation", [0.0, 0.1])
def test_a_part_has_the_noise_of_its_positions(images, perturbation):
    run = Trainer(options(batch_size=17, input_perturbation=perturbation), images, CPU)
    batch = make_batch(images, run.options, 10, 0)
    whole = run._diffused(batch.x_start, batch.t)
    parts = all_parts(3, 2, 17)
    found = [run._diffused(batch.x_start[p.start : p.stop], batch.t[p.start : p.stop], p.start) for p in parts]
    for pieces, expected in zip(zip(*found, strict=True), whole, strict=True):
        assert torch.equal(torch.cat(pieces), expected)


def test_no_process_sees_an_image_of_another_in_one_epoch():
    numbered = ImageData(torch.arange(20, dtype=torch.uint8).reshape(20, 1, 1, 1))
    run = options(batch_size=7)
    seen = []
    for step in range(20):  # seven epochs
        for part in all_parts(3, 1, 7):
            x_start = make_batch(numbered, run, None, step, part=part).x_start
            seen += ((x_start + 1) * 127.5).round().flatten().int().tolist()
    assert all(sorted(seen[i : i + 20]) == list(range(20)) for i in range(0, 140, 20))


@pytest.mark.usefixtures("in_float64")
def test_micro_batches_add_up_to_the_gradient_of_the_batch(images):
    """A rounding is 1e-16, no gradient is far above 1, and each is a sum of some hundred products."""
    gradients, losses = [], []
    for accumulate in (1, 2, 7):
        undropped = options(batch_size=7, clip_grad=1e-3, model={**TINY, "dropout": 0.0})
        run = Trainer(undropped, images, CPU, Parallel(accumulate=accumulate))
        run.train_step()  # the output convolution starts at 0, and with it all other gradients
        losses.append(torch.stack(run.train_step()))
        gradients.append(torch.cat([p.grad.flatten() for p in run.model.parameters()]))
    assert gradients[0].dtype is torch.float64
    assert losses[0].min() > 1e-2
    for i in (1, 2):
        assert (gradients[0] - gradients[i]).abs().max() < 1e-13
        assert (losses[0] - losses[i]).abs().max() < 1e-13


def test_dropout_differs_from_part_to_part_and_not_from_run_to_run(images, monkeypatch):
    seeds = []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    for _ in range(2):
        run = Trainer(options(), images, CPU, Parallel(accumulate=3))
        seeds.clear()
        run.train_step()
        assert len(set(seeds)) == 3
        before = list(seeds)
    assert seeds == before


def test_a_resumed_run_of_micro_batches_keeps_its_bits(tmp_path, images):
    parallel = Parallel(accumulate=2)
    for name, steps in (("whole", [6]), ("parts", [4, 6])):
        for i, count in enumerate(steps):
            training.train(
                options(steps=count), tmp_path / f"{name}.safetensors", dataset=images, resume=i > 0, parallel=parallel
            )
    assert (tmp_path / "whole.safetensors").read_bytes() == (tmp_path / "parts.safetensors").read_bytes()


def test_any_number_of_micro_batches_may_resume(tmp_path, images):
    out = tmp_path / "a.safetensors"
    train(out, images, steps=2, model=TINY)
    assert training.train(options(), out, dataset=images, resume=True, parallel=Parallel(accumulate=3)).step == 6
