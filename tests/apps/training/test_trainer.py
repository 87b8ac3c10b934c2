"""One step: the right loss, on the right images, labels and timesteps."""

import math

import pytest
import torch
from training_runs import CPU, TINY, options

import dd_kernels as dd
from dd_kernels import losses
from dd_kernels.apps import data
from dd_kernels.apps.data import ImageData
from dd_kernels.apps.training import Trainer, objective, timesteps, trainer


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


@pytest.mark.parametrize("prediction", ["epsilon", "x_start", "v"])
def test_min_snr_weights_the_error_in_x0_alike_for_every_prediction(images, prediction):
    run = options(loss_weight="min-snr", snr_gamma=0.7, prediction=prediction, num_timesteps=6)
    schedule, t = dd.cosine_schedule(6), torch.arange(6)
    assert schedule.snr[0] > 0.7 > schedule.snr[-1]
    x_start, noise = (dd.randn((6, 1, 4, 4), seed=seed) for seed in (0, 1))
    x_t = dd.q_sample(x_start, t, schedule, noise)
    guess = x_start + 0.1 * dd.randn((6, 1, 4, 4), seed=2)
    signal, sigma = (schedule.marginal[:, i].float().reshape(6, 1, 1, 1) for i in (0, 1))
    out = objective.target_of(prediction, guess, (x_t - signal * guess) / sigma, t, schedule)
    asked = objective.Diffused(x_start, x_t, noise, t)
    found = objective.losses_of(out, asked, schedule, run, 256)
    weight = torch.from_numpy(schedule.snr).clamp(max=0.7).float()
    expected = weight * (guess - x_start).square().flatten(1).mean(1)
    torch.testing.assert_close(found.minimised, expected, rtol=1e-4, atol=0)
    assert not torch.allclose(found.simple, found.minimised)
    # Of L_hybrid, L_simple alone is weighted.
    both = torch.cat((out, out), dim=1)
    bound = losses.variance_bound(both, x_start, x_t, t, schedule, prediction=prediction)
    hybrid = objective.losses_of(both, asked, schedule, run, 256)
    torch.testing.assert_close(hybrid.minimised, found.minimised + 1e-3 * 6 * bound)


def test_timesteps_follow_the_second_moment_of_their_losses_without_bias():
    history = timesteps.LossHistory(4)
    words = torch.arange(0, 2**32, 2**20)
    for _ in range(10):  # until every timestep has ten losses, timesteps are uniform
        t, weights = history.draw(words)
        assert torch.equal(t, timesteps.uniform(words, 4))
        assert (weights == 1).all()
        history.add(torch.tensor([3, 2, 1, 0]), torch.tensor([8.0, 4.0, 3.0, 1.0]))
    share = 0.999 * torch.tensor([1.0, 3.0, 4.0, 8.0]).double() / 16 + 0.001 / 4
    t, weights = history.draw(words)
    assert (torch.bincount(t) - share * len(words)).abs().max() <= 1
    assert torch.equal(weights, (1 / (4 * share)).float()[t])
    # The weighted mean of any loss is its mean over all timesteps, but for one word more or less of each timestep.
    losses_of_t = torch.tensor([1.0, 3.0, 5.0, 7.0])
    most = float((losses_of_t / (4 * share)).sum()) / len(words)
    assert float((weights * losses_of_t[t]).double().mean()) == pytest.approx(4.0, abs=most)
    history.add(torch.tensor([0, 0]), torch.tensor([6.0, 7.0]))
    assert history.losses[0].tolist() == [1.0] * 8 + [6.0, 7.0]
    assert history.draw(torch.tensor([2**32 - 1]))[0].tolist() == [3]


def test_the_history_is_of_what_is_minimised_and_weights_the_step(images):
    by_loss = options(timesteps="loss-second-moment", loss_weight="min-snr", snr_gamma=0.1, num_timesteps=2)
    run = Trainer(by_loss, images, CPU)
    run.history.losses = torch.tensor([[1.0] * 10, [3.0] * 10])
    batch = trainer.make_batch(images, run.options, None, 0, run.history)
    assert batch.weights.unique().numel() == 2
    noise = dd.randn((6, 1, 8, 8), seed=0, stream=2)  # fresh, the model predicts 0
    each = noise.square().flatten(1).mean(1)
    assert float(run.train_step()[0]) == pytest.approx(float((batch.weights * each).mean()), rel=1e-5)
    for timestep in (0, 1):
        added = each[batch.t == timestep] * min(1.0, 0.1 / run.schedule.snr[timestep])
        assert torch.allclose(run.history.losses[timestep, 10 - len(added) :], added, rtol=1e-5)
    assert float(run.model.conv_out.weight.grad.abs().max()) > 0


def test_a_bound_that_is_no_number_is_the_loss_that_is_read(images):
    run = Trainer(options(model={**TINY, "learn_variance": True}), images, CPU)
    assert math.isfinite(run.train_step()[0])
    with torch.no_grad():
        run.model.conv_out.bias[1] = -1e6  # a log-variance of which the divergence overflows
    assert not math.isfinite(run.train_step()[0])


def test_input_perturbation_adds_noise_that_is_not_asked_for(images):
    run = Trainer(options(input_perturbation=0.5, seed=3), images, CPU)
    run.step = 4
    x_start, t = torch.zeros(2, 1, 8, 8), torch.tensor([0, 3])
    x_t, noise = run._diffused(x_start, t)
    first, second = (dd.randn((2, 1, 8, 8), seed=3, draw=4, stream=stream) for stream in (2, 8))
    assert torch.equal(noise, first)
    sigma = run.schedule.marginal[t, 1].float().reshape(2, 1, 1, 1)
    torch.testing.assert_close(x_t, sigma * (first + 0.5 * second), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("step", "of_estimates"), [(0, [0, 2, 4]), (1, [1, 3])])
def test_self_conditioning_reads_x_0_of_every_second_image(images, step, of_estimates):
    """Counted through all steps, of five images each; x_0 is the model's own, clipped, and zeros for the others."""
    model = {**TINY, "self_conditioning": True, "dropout": 0.0}
    run, read = Trainer(options(model=model, batch_size=5, label_drop=0.0, lr=1e-12), images, CPU), []
    run.step = step
    torch.nn.init.normal_(run.model.conv_out.weight, std=0.1)
    hook = run.model.register_forward_pre_hook(lambda module, arguments: read.append(arguments))
    run.train_step()
    hook.remove()
    (x_half, *_), (x_t, t, labels, x_self) = read
    assert torch.equal(x_half, x_t[of_estimates])
    with torch.no_grad():
        out = run.model(x_half, t[of_estimates], labels[of_estimates])
    expected = torch.zeros_like(x_t)
    expected[of_estimates] = losses.predicted_x_start(out, x_half, t[of_estimates], run.schedule, clip=1.0)
    assert torch.equal(x_self, expected)
    assert not x_self.requires_grad
    assert x_self.abs().max() == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_self_conditioning_leaves_every_weight_its_gradient(images, precision):
    """Autocast keeps weights that it has cast: those of the pass without gradient must not serve the other."""
    run = Trainer(options(model={**TINY, "self_conditioning": True}, precision=precision), images, CPU)
    torch.nn.init.normal_(run.model.conv_out.weight, std=0.1)
    run.train_step()
    for name, parameter in run.model.named_parameters():
        assert parameter.grad is not None, name


def test_several_averages_each_with_its_decay(images):
    run, alone = (Trainer(options(ema=ema), images, CPU) for ema in ([0.5, 0.2], 0.2))
    for _ in range(3):
        run.train_step()
        alone.train_step()
    for a, b in zip(run.averages.models[1].parameters(), alone.ema.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(run.ema.conv_out.weight, alone.ema.conv_out.weight)


def test_the_cosine_falls_from_the_warm_up_to_the_end(images):
    cosine = options(lr=0.2, warmup=2, steps=6, lr_schedule="cosine")
    expected = [0.1, 0.2, 0.2, *(0.1 * (1 + math.cos(math.pi * i / 4)) for i in (1, 2, 3)), 0.0]
    assert [cosine.learning_rate(step) for step in range(7)] == pytest.approx(expected, abs=1e-15)
    run = Trainer(cosine, images, CPU)
    run.step = 4
    run.train_step()
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


@pytest.mark.slow
def test_an_accelerated_run_computes_the_same_to_rounding(images):
    plain, fast = (Trainer(options(accelerate=on), images, CPU) for on in (False, True))
    for _ in range(2):
        (loss, norm), (its_loss, its_norm) = plain.train_step(), fast.train_step()
        torch.testing.assert_close(torch.stack([its_loss, its_norm]), torch.stack([loss, norm]), rtol=1e-4, atol=0)
    assert [type(module) for module in fast.model.modules()] == [type(module) for module in plain.model.modules()]
    assert not plain.model.conv_out.weight.equal(fast.model.conv_out.weight)
    dd.restore(fast.model)


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
