"""Whole runs: the same bits after a stop, nothing lost."""

import math
import signal
import threading

import pytest
import torch
from training_runs import TINY, metadata, options, same, train

from dd_kernels.apps import checkpoint, training
from dd_kernels.apps.training import Trainer, TrainingDivergedError, grid_path, loop


def test_training_leaves_the_callers_generator_alone(tmp_path, images):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(tmp_path / "a.safetensors", images, steps=1)
    assert torch.equal(torch.rand(3), expected)


def test_the_model_file_is_the_average_and_says_how_it_was_made(tmp_path, images):
    out = tmp_path / "a.safetensors"
    run = train(out, images)
    model, info = checkpoint.load_model(out)
    for name, value in run.ema.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert not torch.equal(model.conv_out.weight, run.model.conv_out.weight)
    assert (info.schedule, info.num_timesteps, info.prediction) == ("cosine", 4, "epsilon")
    assert info.training["step"] == 6
    assert info.training["loss"] == run.loss
    assert (tmp_path / "a.samples.png").stat().st_size > 100


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_not_a_number_stops_and_keeps_the_last_good_state(tmp_path, images, monkeypatch, where):
    out = tmp_path / "a.safetensors"
    train(out, images, steps=4)
    kept = out.read_bytes()
    step = Trainer.train_step

    def spoiled(self):
        loss, norm = step(self)
        if self.step == 6:
            loss, norm = (loss * math.nan, norm) if where == "loss" else (loss, norm * math.inf)
        return loss, norm

    monkeypatch.setattr(Trainer, "train_step", spoiled)
    with pytest.raises(
        TrainingDivergedError, match=rf"the {where} of step 6 is not a number.*holds step 4, whose loss"
    ):
        train(out, images, resume=True, steps=20)
    assert out.read_bytes() == kept


def test_a_state_is_never_saved_from_a_step_that_was_not_checked(tmp_path, images, monkeypatch):
    # Step 7 is bad and step 8 would be saved, before the block of 10 losses is full.
    out = tmp_path / "a.safetensors"
    step = Trainer.train_step
    monkeypatch.setattr(
        Trainer, "train_step", lambda self: tuple(v * (math.nan if self.step == 7 else 1) for v in step(self))
    )
    with pytest.raises(TrainingDivergedError, match="step 7"):
        train(out, images, steps=20)
    assert metadata(out)["step"] == 4


def test_weights_that_are_not_numbers_are_never_saved(tmp_path, images, monkeypatch):
    # The loss of step 8 is fine, and its update is what breaks the weights.
    out = tmp_path / "a.safetensors"
    step = Trainer.train_step

    def spoiled(self):
        result = step(self)
        if self.step == 8:
            next(self.model.parameters()).data.fill_(math.inf)
        return result

    monkeypatch.setattr(Trainer, "train_step", spoiled)
    with pytest.raises(TrainingDivergedError, match=r"after step 8 model\..* is not a number.*holds step 4"):
        train(out, images, steps=20)
    assert metadata(out)["step"] == 4


def test_a_loss_that_grows_without_end_is_divergence(tmp_path, images, monkeypatch):
    step = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda self: (step(self)[0] * 0 + 3.0**self.step, torch.ones(())))
    with pytest.raises(TrainingDivergedError, match=r"the loss is .* at step 4.*nothing was saved"):
        train(tmp_path / "a.safetensors", images, steps=20)
    assert list(tmp_path.iterdir()) == []


def test_fp16_overflow_is_left_out_by_the_scaler(tmp_path, images, monkeypatch):
    step = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda self: (step(self)[0], torch.tensor(math.inf)))
    assert train(tmp_path / "a.safetensors", images, steps=1, precision="fp16").step == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_after_the_step_it_came_in(tmp_path, images, monkeypatch, number):
    out, whole = tmp_path / "a.safetensors", tmp_path / "whole.safetensors"
    step = Trainer.train_step

    def interrupted(self):
        if self.step == 2:
            signal.raise_signal(number)
        return step(self)

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupted)
        stopped = train(out, images)
    assert stopped.stopped_by == number
    assert stopped.step == 3
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert train(out, images, resume=True).stopped_by is None
    train(whole, images)
    assert same(out, whole)


@pytest.fixture
def interruptible():
    """Ctrl-C raises KeyboardInterrupt, also where the suite runs in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_second_signal_interrupts_at_once(tmp_path, images, monkeypatch):
    def twice(self):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "train_step", twice)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "a.safetensors", images)
    assert list(tmp_path.iterdir()) == []


def test_train_in_a_thread_takes_no_signals(tmp_path, images):
    done = []
    thread = threading.Thread(target=lambda: done.append(train(tmp_path / "a.safetensors", images, steps=1)))
    thread.start()
    thread.join()
    assert done[0].step == 1


def test_a_run_that_was_stopped_before_its_first_step_resumes(tmp_path, images, monkeypatch):
    out, whole = tmp_path / "a.safetensors", tmp_path / "whole.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(
            loop.LossReader,
            "__init__",
            lambda self, t: (setattr(self, "unread", []), signal.raise_signal(signal.SIGTERM))[0],
        )
        assert train(out, images).step == 0
    train(out, images, resume=True)
    train(whole, images)
    assert same(out, whole)


def test_nohup_keeps_its_meaning(tmp_path, images, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    step = Trainer.train_step

    def interrupted(self):
        signal.raise_signal(signal.SIGHUP)
        return step(self)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    try:
        assert train(tmp_path / "a.safetensors", images).stopped_by is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_ends_the_drawing_of_a_grid(tmp_path, images, monkeypatch):
    out, calls = tmp_path / "a.safetensors", []

    def sample(model, *arguments, **options):
        calls.append(len(calls))
        signal.raise_signal(signal.SIGTERM)
        return model(torch.zeros(1, 1, 8, 8), torch.zeros(1))

    monkeypatch.setattr(loop, "sample", sample)
    assert train(out, images, steps=2).stopped_by == signal.SIGTERM
    assert len(calls) == 1
    assert metadata(out)["step"] == 2
    assert not grid_path(out).exists()


def test_a_grid_of_a_model_that_learns_its_variance(tmp_path, images):
    out = tmp_path / "a.safetensors"
    train(out, images, steps=1, model={**TINY, "learn_variance": True})
    assert checkpoint.load_model(out)[0].config["learn_variance"]
    assert grid_path(out).exists()


def test_grids_and_saves_come_when_asked_for(tmp_path, images, monkeypatch):
    events = []
    monkeypatch.setattr(Trainer, "save", lambda self, out, with_state, half: events.append(("save", self.step)))
    monkeypatch.setattr(loop, "draw_grid", lambda run, out, stop, evolution: events.append(("grid", run.step)))
    training.train(options(steps=6), tmp_path / "a.safetensors", dataset=images, save_every=3, sample_every=2)
    assert events == [("grid", 2), ("save", 3), ("grid", 4), ("save", 6), ("grid", 6)]


def test_drawing_a_grid_changes_nothing(tmp_path, images):
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    training.train(options(), a, dataset=images, sample_every=2)
    training.train(options(), b, dataset=images, sample_every=0)
    assert same(a, b)


def test_a_second_trainer_of_one_file_is_refused(tmp_path, images, monkeypatch):
    out, refused = tmp_path / "a.safetensors", []
    step = Trainer.train_step

    def beside(self):
        if self.step == 1:
            with pytest.raises(ValueError, match="another process is writing"):
                training.train(options(), out, dataset=images, overwrite=True)
            refused.append(True)
        return step(self)

    monkeypatch.setattr(Trainer, "train_step", beside)
    train(out, images, steps=2)
    assert refused == [True]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "a.samples.png"]


def test_a_finished_run_resumes_to_the_same_file_and_a_changed_one_is_refused(tmp_path, images):
    out = tmp_path / "a.safetensors"
    train(out, images)
    before = out.read_bytes()
    assert train(out, images, resume=True).step == 6
    assert out.read_bytes() == before
    changed = bytearray(before)
    changed[-1] ^= 1
    out.write_bytes(changed)
    with pytest.raises(ValueError, match="the checksum differs"):
        train(out, images, resume=True)


def test_a_file_without_its_state_is_small_and_says_so(tmp_path, images):
    out = tmp_path / "a.safetensors"
    train(out, images)
    weights, size = checkpoint.load_model(out)[0].state_dict(), out.stat().st_size
    training.train(options(), out, dataset=images, resume=True, keep_state=False)
    assert out.stat().st_size < 0.3 * size
    assert all(torch.equal(value, weights[name]) for name, value in checkpoint.load_model(out)[0].state_dict().items())
    with pytest.raises(ValueError, match="is a model without a training state"):
        train(out, images, resume=True)


def test_leftovers_of_dead_runs_go_and_the_grid_is_not_lost(tmp_path, images):
    out = tmp_path / "a.safetensors"
    (tmp_path / ".a.safetensors.0123.part").write_bytes(b"half")
    (tmp_path / ".a.samples.png.0123.part").write_bytes(b"half")
    grid_path(out).write_bytes(b"the user's")
    with pytest.raises(ValueError, match=r"a\.samples\.png.* is there already"):
        train(out, images)
    assert grid_path(out).read_bytes() == b"the user's"
    training.train(options(steps=1), out, dataset=images, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "a.samples.png"]
