"""Training: the right loss, the same bits after a stop, nothing lost."""

import dataclasses
import math
import signal
import threading

import pytest
import torch
from safetensors.torch import load_file

import dd_kernels as dd
from dd_kernels import checkpoint, data, training
from dd_kernels.data import ImageData
from dd_kernels.training import Trainer, TrainingDivergedError, TrainOptions, loop, options, state_path, trainer

TINY = {"channels": [8, 16], "num_heads": 2, "num_groups": 4, "attention_resolutions": [4]}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images():
    return dataclasses.replace(data.digits(), images=data.digits().images[:20], labels=data.digits().labels[:20])


def _options(**changes):
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


def _train(out, images, resume=False, **changes):
    return training.train(_options(**changes), out, dataset=images, resume=resume, save_every=4, sample_every=0)


def _same(a, b):
    first, second = load_file(a), load_file(b)
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("changes", [{}, {"precision": "fp16", "flip": True}, {"precision": "bf16", "prediction": "v"}])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, images, changes):
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    _train(whole, images, **changes)
    _train(parts, images, steps=2, **changes)
    assert not _same(whole, parts)
    torch.manual_seed(99)  # whatever the new process' generator holds
    _train(parts, images, resume=True, **changes)
    assert _same(state_path(whole), state_path(parts))
    assert _same(whole, parts)
    assert (
        checkpoint.load(state_path(whole), "training state")[1]
        == checkpoint.load(state_path(parts), "training state")[1]
    )


def test_dropout_is_on_and_differs_between_steps(images):
    run = Trainer(_options(model={**TINY, "dropout": 0.5}, lr=1e-12), images, CPU)
    run.model.load_state_dict({name: torch.full_like(v, 0.1) for name, v in run.model.state_dict().items()})
    losses = [float(run.train_step()[0]) for _ in range(2)]
    run.step = 0
    assert float(run.train_step()[0]) == pytest.approx(losses[0], rel=1e-6)
    assert run.model.training
    assert not run.ema.training


def test_training_leaves_the_callers_generator_alone(tmp_path, images):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    _train(tmp_path / "a.safetensors", images, steps=1)
    assert torch.equal(torch.rand(3), expected)


def test_the_loss_falls(images):
    run = Trainer(_options(num_timesteps=50, batch_size=10, label_drop=0.0), images, CPU)
    losses = [float(run.train_step()[0]) for _ in range(30)]
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])


@pytest.mark.parametrize("prediction", ["epsilon", "x_start", "v"])
def test_a_model_that_predicts_its_target_samples_the_image(prediction):
    schedule = dd.cosine_schedule(20)
    x_start = torch.rand(4, 1, 4, 4) * 2 - 1

    def oracle(x, t):
        rows = schedule.marginal[t].float()
        signal_, sigma = (rows[:, i].reshape(-1, 1, 1, 1) for i in (0, 1))
        return trainer.target_of(prediction, x_start, (x - signal_ * x_start) / sigma, t, schedule)

    table = dd.ddim(schedule, 20, prediction=prediction, clip=None)
    assert torch.allclose(dd.sample(oracle, x_start.shape, table, seed=0), x_start, atol=1e-4)


@pytest.mark.parametrize("step", [0, 5])
def test_the_loss_is_the_mean_squared_error_of_the_steps_own_noise(images, step):
    run = Trainer(_options(label_drop=0.0, num_timesteps=50, seed=3), images, CPU)
    run.step = step
    # Fresh, the output convolution is 0: the loss is the mean square of the noise of this very draw.
    noise = dd.randn((6, 1, 8, 8), seed=3, draw=step, stream=2)
    assert float(run.train_step()[0]) == pytest.approx(float(noise.square().mean()), rel=1e-5)


def test_batches_are_functions_of_seed_and_step(images):
    run = _options(label_drop=0.5, flip=True, batch_size=200, num_timesteps=1000)
    first, again, later, other = (
        trainer.make_batch(images, o, 10, step)
        for o, step in ((run, 3), (run, 3), (run, 4), (_options(seed=1, batch_size=200), 3))
    )
    for name in ("x_start", "t", "labels"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(later, name))
    assert not torch.equal(first.t, other.t)


def test_timesteps_labels_and_flips_have_their_shares():
    # One epoch of many images, each of them lopsided and labelled by its own number.
    count = 20_000
    pixels = torch.zeros(count, 1, 1, 2, dtype=torch.uint8)
    pixels[..., 1] = 255
    many = ImageData(pixels, torch.arange(count), tuple(map(str, range(count))))
    run = _options(label_drop=0.25, flip=True, batch_size=count, num_timesteps=10)
    batch = trainer.make_batch(many, run, count, 0)
    shares = torch.bincount(batch.t, minlength=10) / count
    assert shares.shape == (10,)
    assert (shares - 0.1).abs().max() < 5 * math.sqrt(0.09 / count)
    dropped, mirrored = batch.labels == count, batch.x_start[:, 0, 0, 0] == 1
    assert float(dropped.float().mean()) == pytest.approx(0.25, abs=5 * math.sqrt(0.19 / count))
    assert float(mirrored.float().mean()) == pytest.approx(0.5, abs=5 * math.sqrt(0.25 / count))
    assert torch.equal(batch.x_start[mirrored], torch.tensor([1.0, -1.0]).expand(int(mirrored.sum()), 1, 1, 2))
    assert torch.equal(batch.labels[~dropped], data.positions(many, 0, count, seed=0)[~dropped])
    # The choices are independent of one another.
    low = batch.t < 5
    for a, b in ((dropped, low), (dropped, mirrored), (low, mirrored)):
        expected = float(a.float().mean() * b.float().mean())
        assert float((a & b).float().mean()) == pytest.approx(expected, abs=5 * math.sqrt(0.25 / count))


def test_unconditional_and_without_dropped_labels(images):
    plain, _ = trainer.build_model(_options(unconditional=True), images)
    assert plain.config["num_classes"] is None
    assert trainer.make_batch(images, _options(unconditional=True), None, 0).labels is None
    always, info = trainer.build_model(_options(label_drop=0.0), images)
    assert always.null_label is None
    assert info.classes == tuple("0123456789")
    assert trainer.make_batch(images, _options(label_drop=0.0), None, 0).labels.max() < 10
    unlabelled = ImageData(images.images)
    assert trainer.build_model(_options(), unlabelled)[0].config["num_classes"] is None


def test_warmup_clip_and_ema(images):
    run = Trainer(_options(lr=0.1, warmup=4, clip_grad=1e-3, ema=0.5), images, CPU)
    rates, before = [], {n: v.clone() for n, v in run.ema.state_dict().items()}
    for step in range(6):
        run.train_step()
        rates.append(run.optimizer.param_groups[0]["lr"])
        norm = torch.stack([p.grad.norm() for p in run.model.parameters()]).norm()
        assert norm <= 1.001e-3
        decay = min(0.5, (1 + step) / (10 + step))
        for name, now in run.model.state_dict().items():
            expected = decay * before[name] + (1 - decay) * now
            assert torch.allclose(run.ema.state_dict()[name], expected, atol=1e-6)
        before = {n: v.clone() for n, v in run.ema.state_dict().items()}
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])


def test_the_model_file_is_the_average_and_says_how_it_was_made(tmp_path, images):
    out = tmp_path / "a.safetensors"
    run = _train(out, images)
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
    _train(out, images, steps=4)
    kept = [p.read_bytes() for p in (out, state_path(out))]
    step = Trainer.train_step

    def spoiled(self):
        loss, norm = step(self)
        if self.step == 6:
            loss, norm = (loss * math.nan, norm) if where == "loss" else (loss, norm * math.inf)
        return loss, norm

    monkeypatch.setattr(Trainer, "train_step", spoiled)
    with pytest.raises(TrainingDivergedError, match=f"the {where} of step 6 is not a number"):
        _train(out, images, resume=True, steps=20)
    assert [p.read_bytes() for p in (out, state_path(out))] == kept


def test_a_state_is_never_saved_from_a_step_that_was_not_checked(tmp_path, images, monkeypatch):
    # Step 7 is bad and step 8 would be saved, before the block of 10 losses is full.
    out = tmp_path / "a.safetensors"
    step = Trainer.train_step
    monkeypatch.setattr(
        Trainer, "train_step", lambda self: tuple(v * (math.nan if self.step == 7 else 1) for v in step(self))
    )
    with pytest.raises(TrainingDivergedError, match="step 7"):
        _train(out, images, steps=20)
    assert checkpoint.load(state_path(out), "training state")[1]["step"] == 4


def test_fp16_overflow_is_left_out_by_the_scaler(tmp_path, images, monkeypatch):
    step = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda self: (step(self)[0], torch.tensor(math.inf)))
    assert _train(tmp_path / "a.safetensors", images, steps=1, precision="fp16").step == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
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
        stopped = _train(out, images)
    assert stopped.stopped_by == number
    assert stopped.step == 3
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert _train(out, images, resume=True).stopped_by is None
    _train(whole, images)
    assert _same(out, whole)


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
        _train(tmp_path / "a.safetensors", images)
    assert list(tmp_path.iterdir()) == []


def test_train_in_a_thread_takes_no_signals(tmp_path, images):
    done = []
    thread = threading.Thread(target=lambda: done.append(_train(tmp_path / "a.safetensors", images, steps=1)))
    thread.start()
    thread.join()
    assert done[0].step == 1


def test_a_run_that_was_stopped_before_its_first_step_resumes(tmp_path, images, monkeypatch):
    out, whole = tmp_path / "a.safetensors", tmp_path / "whole.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(
            loop._Losses,
            "__init__",
            lambda self, t: (setattr(self, "unread", []), signal.raise_signal(signal.SIGTERM))[0],
        )
        assert _train(out, images).step == 0
    _train(out, images, resume=True)
    _train(whole, images)
    assert _same(out, whole)


def test_grids_and_saves_come_when_asked_for(tmp_path, images, monkeypatch):
    events = []
    monkeypatch.setattr(Trainer, "save", lambda self, out: events.append(("save", self.step)))
    monkeypatch.setattr(loop, "draw_grid", lambda run, out: events.append(("grid", run.step)))
    training.train(_options(steps=6), tmp_path / "a.safetensors", dataset=images, save_every=3, sample_every=2)
    assert events == [("grid", 2), ("save", 3), ("grid", 4), ("save", 6), ("save", 6), ("grid", 6)]


def test_drawing_a_grid_changes_nothing(tmp_path, images):
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    training.train(_options(), a, dataset=images, sample_every=2)
    training.train(_options(), b, dataset=images, sample_every=0)
    assert _same(state_path(a), state_path(b))


def test_out_is_never_lost(tmp_path, images):
    out = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match="resume: there is no training state"):
        _train(out, images, resume=True)
    _train(out, images, steps=1)
    with pytest.raises(ValueError, match=r"a\.safetensors.* is there already"):
        _train(out, images)
    out.unlink()
    with pytest.raises(ValueError, match=r"a\.training\.safetensors.* is there already"):
        _train(out, images)
    training.train(_options(steps=1), out, dataset=images, overwrite=True)
    for path, message in (
        (tmp_path / "model.pt", "must end in .safetensors"),
        (tmp_path / "no" / "a.safetensors", "cannot write"),
        (tmp_path, "must name a file"),
    ):
        with pytest.raises(ValueError, match=message):
            _train(path, images)
    with pytest.raises(ValueError, match="only one of resume and overwrite"):
        training.train(_options(), out, dataset=images, resume=True, overwrite=True)


def test_resuming_another_run_is_refused(tmp_path, images):
    out = tmp_path / "a.safetensors"
    _train(out, images, steps=2)
    with pytest.raises(ValueError, match=r"lr must be 0\.01, as in the run that is resumed; got 0\.1"):
        _train(out, images, resume=True, lr=0.1)
    changed = dataclasses.replace(images, images=images.images.flip(0))
    with pytest.raises(ValueError, match="data: the images are not those"):
        _train(out, changed, resume=True)
    state = state_path(out)
    tensors, metadata = checkpoint.load(state, checkpoint.TRAINING)
    tensors.pop("ema.conv_out.bias")
    body = {k: v for k, v in metadata.items() if k not in ("format", "kind")}
    checkpoint.save(state, checkpoint.TRAINING, tensors, body)
    with pytest.raises(ValueError, match="does not hold the weights and moments"):
        _train(out, images, resume=True)
    body.pop("scaler")
    checkpoint.save(state, checkpoint.TRAINING, tensors, body)
    with pytest.raises(ValueError, match="does not say where it stopped"):
        _train(out, images, resume=True)
    for wrong in ({}, {"options": {"flavour": "mint"}}, {"options": 3}):
        checkpoint.save(state, checkpoint.TRAINING, tensors, wrong)
        with pytest.raises(ValueError, match="does not say how it was trained"):
            _train(out, images, resume=True)
    whole = state.read_bytes()
    state.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cannot read .* as a training state"):
        _train(out, images, resume=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("batch_size", 0),
        ("num_timesteps", 0),
        ("warmup", -1),
        ("seed", -1),
        ("seed", 1 << 64),
        ("lr", 0.0),
        ("lr", math.nan),
        ("lr", math.inf),
        ("clip_grad", 0.0),
        ("weight_decay", -1.0),
        ("ema", 1.0),
        ("beta1", -0.1),
        ("beta2", 1.0),
        ("label_drop", 1.5),
        ("prediction", "future"),
        ("precision", "fp8"),
    ],
)
def test_options_are_checked(name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        TrainOptions(**{name: value})


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"flavour": 1}, "flavour must be one of"),
        ({"num_classes": 3}, "num_classes follows from the data"),
        ({"channels": "x"}, "no U-Net can be built with"),
        ({"num_groups": 7}, "num_groups"),
    ],
)
def test_model_options_are_checked(images, model, message):
    with pytest.raises(ValueError, match=message):
        trainer.build_model(_options(model={**TINY, **model}), images)


def test_other_errors(tmp_path, images):
    with pytest.raises(ValueError, match="learn_variance must be false"):
        TrainOptions(model={"learn_variance": True})
    with pytest.raises(ValueError, match="save_every must be at least 0; got -1"):
        training.train(_options(), tmp_path / "a.safetensors", dataset=images, save_every=-1)


def test_the_digits_defaults_are_options():
    assert TrainOptions(**options.DIGITS).precision == "fp32"
