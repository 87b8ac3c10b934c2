"""GaussianDiffusion against values recorded from guided-diffusion and DDPM-IP, and its own promises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import guided_cases
import numpy as np
import pytest
import torch
from float64_runs import bounded, check
from guided_cases import MEANS, SHAPE, STEPS, VARIANCES, cond_fn, images, make, model
from torch import Tensor

import dd_kernels as dd
from dd_kernels.integrations import guided_diffusion as diffusion
from dd_kernels.integrations.guided_diffusion import (
    GaussianDiffusion,
    SpacedDiffusion,
    get_named_beta_schedule,
    process,
    sampling,
    space_timesteps,
)

T = torch.tensor([0, 5, STEPS - 1])
OPS = (process, sampling)  # the modules that call ops
DIGITS = {"rtol": 2e-8}  # of a figure that is written to eight of them
FEW = {"rtol": 64 * 2.0**-53}  # eight roundings, where 1 - 7/8 and the like multiplies them


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    with np.load(guided_cases.DATA) as data:
        return {name: torch.from_numpy(value) for name, value in data.items()}


def test_equals_guided_diffusion(recorded: dict[str, Tensor]) -> None:
    theirs = {name: value for name, value in recorded.items() if not name.startswith("ip/")}
    check(lambda dtype: guided_cases.results(diffusion, dtype), theirs, *OPS)


@pytest.mark.parametrize("name", ["input_pertub", "input_perturbation"])
def test_equals_ddpm_ip(name: str, recorded: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        guided_cases, "make", lambda *a, input_pertub, **options: make(*a, **{name: input_pertub}, **options)
    )
    theirs = {k.removeprefix("ip/"): value for k, value in recorded.items() if k.startswith("ip/")}
    check(lambda dtype: guided_cases.perturbed_results(diffusion, dtype), theirs, *OPS)


class _Overridden(GaussianDiffusion):
    """What user code does: nothing may bypass its p_mean_variance."""

    calls = 0

    def p_mean_variance(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        self.calls += 1
        return super().p_mean_variance(*args, **kwargs)


def steps(one: GaussianDiffusion, learned: bool) -> Callable[[torch.dtype], dict[str, Tensor]]:
    """Returns cases in a dtype: a step of each kind, with noise from the generator and from a seed."""

    def cases(dtype: torch.dtype) -> dict[str, Tensor]:
        net, x, seeded = model(learned), images(dtype), {"seed": 3, "first_sample": 8}
        calls = {
            "p_sample": lambda: one.p_sample(net, x, T),
            "p_sample seeded": lambda: one.p_sample(net, x, T, **seeded),
            "ddim_sample": lambda: one.ddim_sample(net, x, T, eta=0.7),
            "ddim_sample seeded": lambda: one.ddim_sample(net, x, T, eta=0.7, **seeded),
        }
        return guided_cases.named(calls)

    return cases


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("mean", MEANS)
def test_the_fused_step_equals_the_step_in_parts(mean: str, variance: str) -> None:
    plain = make(diffusion, mean, variance)
    parts = _Overridden(
        betas=plain.betas,
        model_mean_type=plain.model_mean_type,
        model_var_type=plain.model_var_type,
        loss_type=plain.loss_type,
    )
    learned = variance.startswith("LEARNED")
    exact = {name: value for name, (value, _) in bounded(steps(plain, learned), *OPS).items()}
    for one in (plain, parts):
        check(steps(one, learned), exact, *OPS)
    assert parts.calls == 12, "four steps, twice in float32 and once in float64"


def test_seeded_noise_is_that_of_the_samplers() -> None:
    """Both loops take the same steps: either is within the bound of float64."""
    spaced = make(diffusion, "EPSILON", "FIXED_SMALL", spaced="5,3,2")
    net, seeded = model(False), {"seed": 11, "first_sample": 2}
    got = spaced.p_sample_loop(net, SHAPE, **seeded, device="cpu")
    betas = get_named_beta_schedule("cosine", 40) * 0.2
    table = dd.ddpm(dd.from_betas(betas), timesteps=sorted(spaced.use_timesteps))
    noise = dd.randn(SHAPE, **seeded).double()
    cases = {"loop": lambda: spaced.p_sample_loop(net, SHAPE, noise, **seeded)}
    exact, error = bounded(lambda _: guided_cases.named(cases), *OPS)["loop"]
    for result in (got, dd.sample(net, SHAPE, table, **seeded)):
        assert ((result - exact).abs() <= error).all()


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_a_seeded_sample_does_not_depend_on_its_batch(loop: str) -> None:
    one = make(diffusion, "EPSILON", "LEARNED_RANGE")
    run = getattr(one, loop)
    whole = run(model(True), SHAPE, device="cpu", seed=5)
    for n in range(SHAPE[0]):
        alone = run(model(True), (1, *SHAPE[1:]), device="cpu", seed=5, first_sample=n)
        torch.testing.assert_close(whole[n : n + 1], alone, rtol=0, atol=0)


def test_seeded_sampling_leaves_the_generator_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    make(diffusion, "EPSILON", "FIXED_SMALL").ddim_sample_loop(model(False), SHAPE, eta=1.0, seed=5)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_inputs_give_float32(dtype: torch.dtype) -> None:
    one = make(diffusion, "EPSILON", "LEARNED_RANGE")
    x = images(dtype)
    assert one.q_sample(x, T).dtype == torch.float32
    for result in (
        one.p_mean_variance(model(True), x, T),
        one.p_sample(model(True), x, T),
        one.p_sample(model(True), x, T, cond_fn=cond_fn),
        one.ddim_sample(model(True), x, T),
        one.ddim_reverse_sample(model(True), x, T),
    ):
        assert result["pred_xstart"].dtype == torch.float32
        assert result.get("sample", result["pred_xstart"]).dtype == torch.float32


@pytest.mark.parametrize("loss", guided_cases.LOSSES)
def test_losses_reach_the_model(loss: str) -> None:
    net = torch.nn.Conv2d(2, 4, 1)
    one = make(diffusion, "EPSILON", "LEARNED_RANGE", loss)
    one.training_losses(lambda x, t: net(x), images(scale=1.0), T)["loss"].mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in net.parameters())
    if not one.loss_type.is_vb():
        terms = one.training_losses(lambda x, t: net(x), images(scale=1.0), T)
        gradient = torch.autograd.grad(terms["vb"].sum(), net.weight)[0]
        assert gradient[:2].abs().max() == 0, "the bound must not train the mean"


def test_a_step_of_zero_snr_is_finite() -> None:
    one = GaussianDiffusion(
        betas=[0.1, 0.3, 1.0],
        model_mean_type=diffusion.ModelMeanType.EPSILON,
        model_var_type=diffusion.ModelVarType.FIXED_SMALL,
        loss_type=diffusion.LossType.MSE,
    )
    for loop in (one.p_sample_loop, one.ddim_sample_loop):
        assert loop(model(False), SHAPE, seed=0).isfinite().all()


def test_a_process_of_one_step() -> None:
    options = {"loss_type": diffusion.LossType.MSE, "model_mean_type": diffusion.ModelMeanType.EPSILON}
    for variance in diffusion.ModelVarType:
        one = GaussianDiffusion(betas=[0.5], model_var_type=variance, **options)
        assert one.p_sample_loop(model(one._learned), SHAPE, seed=0).isfinite().all()


def test_progressive_loops_yield_every_step_on_the_models_device() -> None:
    one = make(diffusion, "START_X", "FIXED_SMALL")
    net = torch.nn.Conv2d(2, 2, 1)
    steps = list(one.p_sample_loop_progressive(lambda x, t: net(x), SHAPE, progress=False))
    assert len(steps) == STEPS
    assert not steps[-1]["sample"].requires_grad
    seen = []
    one.ddim_sample_loop(_Recorder(seen), SHAPE, noise=images(), progress=True)
    assert seen == list(range(STEPS))[::-1]


class _Recorder(torch.nn.Module):
    """Its parameter's device is where the loop runs; it notes the timesteps."""

    def __init__(self, seen: list[int]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.seen = seen

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen.append(int(t[0]))
        return x * self.weight


def test_space_timesteps() -> None:
    assert space_timesteps(300, [10, 15, 20]) == space_timesteps(300, "10,15,20")
    assert len(space_timesteps(300, [10, 15, 20])) == 45
    assert space_timesteps(1000, "ddim50") == set(range(0, 1000, 20))
    assert space_timesteps(10, [1]) == {0}
    assert space_timesteps(10, [0, 5]) == {5, 6, 7, 8, 9}
    fast = space_timesteps(1000, "fast27")
    assert len(fast) == 27
    assert 997 in fast
    assert 999 not in fast


def test_beta_schedules() -> None:
    np.testing.assert_allclose(get_named_beta_schedule("linear", 1000), dd.linear_schedule(1000).beta, **FEW)
    np.testing.assert_array_equal(get_named_beta_schedule("linear", 500)[[0, -1]], [2 * 0.0001, 2 * 0.02])
    cosine = get_named_beta_schedule("cosine", 1000)
    np.testing.assert_allclose(cosine[[0, 500, 999]], [4.1284225e-5, 0.0031556914, 0.999], **DIGITS)
    np.testing.assert_allclose(
        diffusion.betas_for_alpha_bar(4, lambda u: 1 - u / 2), 1 - np.array([7 / 8, 6 / 7, 5 / 6, 4 / 5]), **FEW
    )


def test_known_values_of_the_linear_process() -> None:
    one = GaussianDiffusion(
        betas=get_named_beta_schedule("linear", 1000),
        model_mean_type=diffusion.ModelMeanType.EPSILON,
        model_var_type=diffusion.ModelVarType.FIXED_LARGE,
        loss_type=diffusion.LossType.MSE,
    )
    np.testing.assert_allclose(one.alphas_cumprod[[500, 999]], [0.0777966584, 4.0358298e-5], **DIGITS)
    np.testing.assert_allclose(one.posterior_log_variance_clipped[:2], -9.8167251, **DIGITS)
    np.testing.assert_allclose(one.fixed_variance[[0, 999]], [5.4531877e-5, 0.02], **DIGITS)
    np.testing.assert_allclose(
        [one.posterior_mean_coef1[1], one.posterior_mean_coef2[1]], [0.5452914995, 0.4547084990], **DIGITS
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: space_timesteps(10, "ddim7"), "section_counts='ddim7'"),
        (lambda: space_timesteps(10, [6, 2]), "section 0 has 5 timesteps; got 6"),
        (lambda: get_named_beta_schedule("quadratic", 10), "schedule_name must be"),
        (
            lambda: make(diffusion, "EPSILON", "LEARNED").p_sample(model(False), images(), T),
            r"must return \[3, 4, 3, 4\]",
        ),
        (lambda: make(diffusion, "EPSILON", "FIXED_SMALL").p_sample(model(False), images(), T[:2]), "t must have"),
        (lambda: make(diffusion, "EPSILON", "FIXED_SMALL").q_mean_variance(images(), T + 1), r"t must be in \[0, 12\)"),
        (lambda: make(diffusion, "EPSILON", "FIXED_SMALL").q_sample(images(), T, images()[:2]), "noise must have"),
        (
            lambda: make(diffusion, "EPSILON", "FIXED_SMALL").ddim_reverse_sample(model(False), images(), T, eta=0.5),
            "eta must be 0",
        ),
        (lambda: make(diffusion, "EPSILON", "FIXED_SMALL", input_pertub=0.1, input_perturbation=0.1), "got both"),
        (lambda: SpacedDiffusion({0, 7}, betas=[0.1] * 7), "use_timesteps must hold"),
        (lambda: diffusion.discretized_gaussian_log_likelihood(images(), means=images(), log_scales=T), "log_scales"),
    ],
)
def test_errors_name_the_argument(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_type_errors() -> None:
    one = make(diffusion, "EPSILON", "FIXED_SMALL")
    with pytest.raises(TypeError, match="shape must be a tuple or list"):
        one.p_sample_loop(model(False), 3)
    with pytest.raises(TypeError, match="at least one of mean1"):
        diffusion.normal_kl(0.0, 0.0, 0.0, 0.0)
