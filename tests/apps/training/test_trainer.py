"""One step: the right loss, on the right images, labels and timesteps."""

import math

import pytest
import torch
from training_runs import CPU, TINY, options

import dd_kernels as dd
from dd_kernels import losses
from dd_kernels.apps import data
from dd_kernels.apps.data import ImageData
from dd_kernels.apps.training import Trainer, objective, trainer


def test_dropout_is_on_and_differs_between_steps(images):
    run = Trainer(options(model={**TINY, "dropout": 0.5}, lr=1e-12), images, CPU)
    run.model.load_state_dict({name: torch.full_like(v, 0.1) for name, v in run.model.state_dict().items()})
    losses = [float(run.train_step()[0]) for _ in range(2)]
    run.step = 0
    assert float(run.train_step()[0]) == pytest.approx(losses[0], rel=1e-6)
    assert run.model.training
    assert not run.ema.training


def test_the_loss_falls(images):
    run = Trainer(options(num_timesteps=50, batch_size=10, label_drop=0.0), images, CPU)
    losses = [float(run.train_step()[0]) for _ in range(30)]
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])


@pytest.mark.parametrize("prediction", ["epsilon", "x_start", "v"])
def test_a_model_that_predicts_its_target_samples_the_image(prediction):
    schedule = dd.cosine_schedule(20)
    x_start = torch.rand(4, 1, 4, 4) * 2 - 1

    def oracle(x, t):
        rows = schedule.marginal[t].float()
        signal_, sigma = (rows[:, i].reshape(-1, 1, 1, 1) for i in (0, 1))
        return objective.target_of(prediction, x_start, (x - signal_ * x_start) / sigma, t, schedule)

    table = dd.ddim(schedule, 20, prediction=prediction, clip=None)
    assert torch.allclose(dd.sample(oracle, x_start.shape, table, seed=0), x_start, atol=1e-4)


@pytest.mark.parametrize("step", [0, 5])
def test_the_loss_is_the_mean_squared_error_of_the_steps_own_noise(images, step):
    run = Trainer(options(label_drop=0.0, num_timesteps=50, seed=3), images, CPU)
    run.step = step
    # Fresh, the output convolution is 0: the loss is the mean square of the noise of this very draw.
    noise = dd.randn((6, 1, 8, 8), seed=3, draw=step, stream=2)
    assert float(run.train_step()[0]) == pytest.approx(float(noise.square().mean()), rel=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "x_start", "v"])
def test_a_model_that_learns_its_variance_minimises_the_hybrid_loss(images, prediction):
    run = Trainer(options(model={**TINY, "learn_variance": True}, prediction=prediction, label_drop=0.0), images, CPU)
    torch.nn.init.normal_(run.model.conv_out.weight, std=0.1)  # fresh, it is 0 and the gradients of the rest too
    batch = trainer.make_batch(images, run.options, None, 0)
    x_t, noise = dd.q_sample(batch.x_start, batch.t, run.schedule, seed=0, return_noise=True)
    out = run.model.train()(x_t, batch.t, batch.labels)
    assert out.shape[1] == 2
    target = objective.target_of(prediction, batch.x_start, noise, batch.t, run.schedule)
    # The digits have 17 grey levels.
    hybrid = losses.hybrid_loss(
        out, target, batch.x_start, x_t, batch.t, run.schedule, prediction=prediction, levels=17
    )
    asked = objective.Diffused(batch.x_start, x_t, noise, batch.t)
    found = objective.losses_of(out, asked, run.schedule, run.options, 17)
    assert torch.equal(found.minimised, hybrid)
    assert torch.equal(found.simple, (out[:, :1] - target).square().flatten(1).mean(1))
    before = run.model.conv_out.weight.detach().clone()
    assert float(run.train_step()[0]) < 10 * float(found.simple.detach().mean())
    moved = (run.model.conv_out.weight != before).flatten(1).any(1)
    assert moved.tolist() == [True, True]  # the prediction and the variance both learn


def test_batches_are_functions_of_seed_and_step(images):
    run = options(label_drop=0.5, flip=True, batch_size=200, num_timesteps=1000)
    first, again, later, other = (
        trainer.make_batch(images, o, 10, step)
        for o, step in ((run, 3), (run, 3), (run, 4), (options(seed=1, batch_size=200), 3))
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
    run = options(label_drop=0.25, flip=True, batch_size=count, num_timesteps=10)
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
    plain, _ = trainer.build_model(options(unconditional=True), images)
    assert plain.config["num_classes"] is None
    assert trainer.make_batch(images, options(unconditional=True), None, 0).labels is None
    always, info = trainer.build_model(options(label_drop=0.0), images)
    assert always.null_label is None
    assert info.classes == tuple("0123456789")
    assert trainer.make_batch(images, options(label_drop=0.0), None, 0).labels.max() < 10
    unlabelled = ImageData(images.images)
    assert trainer.build_model(options(), unlabelled)[0].config["num_classes"] is None


def test_warmup_clip_and_ema(images):
    run = Trainer(options(lr=0.1, warmup=4, clip_grad=1e-3, ema=0.5), images, CPU)
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
