"""DDIMSampler against values recorded from stable-diffusion's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import latent_cases
import numpy as np
import pytest
import torch
from float64_runs import check
from latent_cases import SHAPE, Model, images

from dd_kernels.integrations.latent_diffusion import DDIMSampler, ddim


def test_equals_stable_diffusion() -> None:
    with np.load(latent_cases.DATA) as data:
        theirs = {name: torch.from_numpy(value) for name, value in data.items()}
    check(lambda dtype: latent_cases.results(DDIMSampler, dtype), theirs, ddim)


def test_decode_takes_back_what_encode_gives() -> None:
    sampler = DDIMSampler(Model())
    errors = []
    for steps in (10, 50):
        sampler.make_schedule(steps, verbose=False)
        x, _ = sampler.encode(0.3 * images(), None, steps // 2)
        errors.append((sampler.decode(x, None, steps // 2) - 0.3 * images()).abs().max())
    assert errors[1] < 0.4 * errors[0], "the ODE's error falls with the number of steps"
    assert errors[1] < 0.05


def test_callbacks_see_every_step() -> None:
    seen: list[Any] = []
    x, _ = DDIMSampler(Model()).sample(
        5, 2, SHAPE, verbose=False, callback=seen.append, img_callback=lambda x0, i: seen.append((i, x0.shape))
    )
    assert seen[::2] == list(range(5))
    assert seen[1::2] == [(i, x.shape) for i in range(5)]
    sampler = DDIMSampler(Model())
    sampler.make_schedule(5, verbose=False)
    steps: list[int] = []
    sampler.decode(images(), None, 3, callback=steps.append)
    sampler.encode(images(), None, 3, callback=steps.append)
    assert steps == [0, 1, 2] * 2


def _ready(parameterization: str = "eps") -> DDIMSampler:
    sampler = DDIMSampler(Model(parameterization))
    sampler.make_schedule(10, verbose=False)
    return sampler


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DDIMSampler(Model("x0")), "model.parameterization must be"),
        (lambda: _ready().make_schedule(101), r"ddim_num_steps must be in \[1, 100\]"),
        (lambda: _ready().make_schedule(100), "ddim_num_steps must leave"),
        (lambda: _ready().make_schedule(10, "linear"), "ddim_discretize must be"),
        (lambda: _ready().sample(5, 1, SHAPE, mask=torch.ones(1)), "x0 must be given with mask"),
        (lambda: _ready().encode(images(), None, 11), r"t_enc must be in \[0, 10\]"),
        (lambda: _ready("v").encode(images(), None, 1), "encode needs a model that predicts epsilon"),
        (lambda: _ready("v").sample(5, 3, SHAPE, score_corrector=latent_cases.Corrector()), "score_corrector must"),
    ],
)
def test_errors_name_the_argument(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_make_schedule_leaves_what_callers_read() -> None:
    sampler = DDIMSampler(Model(), device="cpu")
    sampler.make_schedule(10, ddim_eta=0.5, verbose=False)
    model, steps = sampler.model, sampler.ddim_timesteps
    assert torch.equal(sampler.ddim_alphas, model.alphas_cumprod[steps])
    assert torch.equal(sampler.ddim_sqrt_one_minus_alphas, (1 - sampler.ddim_alphas).sqrt())
    assert sampler.ddim_alphas_prev.tolist() == [float(model.alphas_cumprod[t]) for t in [0, *steps[:-1]]]
    a, b = sampler.ddim_alphas.double().numpy(), sampler.ddim_alphas_prev
    # Ten roundings of float64, times the 1e2 of 1 / (1 - a / b), and of 1 / (1 - a).
    np.testing.assert_allclose(sampler.ddim_sigmas, 0.5 * np.sqrt((1 - b) / (1 - a) * (1 - a / b)), rtol=1e-12)
    alpha_bar = model.alphas_cumprod
    expected = {
        "betas": model.betas,
        "alphas_cumprod": alpha_bar,
        "alphas_cumprod_prev": model.alphas_cumprod_prev,
        "sqrt_alphas_cumprod": alpha_bar.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - alpha_bar).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - alpha_bar).log(),
        "sqrt_recip_alphas_cumprod": (1 / alpha_bar).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / alpha_bar - 1).sqrt(),
    }
    for name, value in expected.items():
        assert torch.equal(getattr(sampler, name), value), name
        assert getattr(sampler, name) is not getattr(model, name, None), "a copy"
    assert sampler.ddim_sigmas_for_original_num_steps.shape == (100,)
    sampler.register_buffer("mine", torch.ones(2))
    assert torch.equal(sampler.mine, torch.ones(2))
    sampler.register_buffer("text", "as it is")
    assert sampler.text == "as it is"


def _sample(**options: Any) -> torch.Tensor:
    torch.manual_seed(0)
    return DDIMSampler(Model()).sample(5, 3, SHAPE, verbose=False, **options)[0]


def test_the_arguments_after_callback_stand_where_theirs_do() -> None:
    seen: list[int] = []
    torch.manual_seed(0)
    got = DDIMSampler(Model()).sample(5, 3, SHAPE, None, None, ["unused"], lambda x0, i: seen.append(i), True)[0]
    assert seen == [0, 1, 2, 3, 4]
    assert torch.equal(got, _sample(quantize_x0=True))
    # log_images passes it, and theirs takes no notice.
    assert torch.equal(_sample(quantize_denoised=True, ddim=True), _sample())


def test_a_scale_for_each_step() -> None:
    c, uncond = torch.tensor([0.1, -0.2, 0.3]), torch.tensor([0.0, 0.1, -0.1])
    guided = {"conditioning": c, "unconditional_conditioning": uncond}
    assert torch.equal(_sample(**guided, ucg_schedule=[3.0] * 5), _sample(**guided, unconditional_guidance_scale=3.0))
    changing = _sample(**guided, ucg_schedule=[3.0, 3.0, 3.0, 3.0, 1.0])
    assert not torch.equal(changing, _sample(**guided, unconditional_guidance_scale=3.0))
    with pytest.raises(ValueError, match="ucg_schedule must hold a scale for each of 5 steps; got 2"):
        _sample(ucg_schedule=[1.0, 2.0])
    with pytest.raises(NotImplementedError, match=r"dynamic_threshold must be None.*got 0.9"):
        _sample(dynamic_threshold=0.9)


def test_without_a_scale_there_is_no_guidance() -> None:
    """The model is called once, with one batch: of sample, ddim_sampling, p_sample_ddim, decode and encode."""
    sampler, calls = _ready(), []
    apply_model = sampler.model.apply_model
    sampler.model.apply_model = lambda x, t, c: calls.append(len(x)) or apply_model(x, t, c)
    c, x = torch.tensor([0.1, -0.2, 0.3]), images()
    uncond = {"unconditional_conditioning": c + 1}
    sampler.p_sample_ddim(x, c, torch.full((3,), 11), 1, **uncond)
    sampler.decode(x, c, 2, **uncond)
    sampler.encode(x, c, 2, **uncond)
    sampler.ddim_sampling(c, x.shape, timesteps=3, verbose=False, **uncond)
    sampler.sample(2, 3, SHAPE, c, verbose=False, **uncond)
    assert calls == [3] * (1 + 2 + 2 + 2 + 2)


def test_ddim_sampling_takes_a_part_of_the_steps() -> None:
    sampler, seen = _ready(), []
    apply_model = sampler.model.apply_model
    sampler.model.apply_model = lambda x, t, c: seen.append(int(t[0])) or apply_model(x, t, c)
    shape = (3, *SHAPE)
    for options, wanted in (
        ({}, sampler.ddim_timesteps),
        ({"timesteps": 4}, sampler.ddim_timesteps[:3]),
        ({"timesteps": 4, "ddim_use_original_steps": True}, np.arange(4)),
        ({"ddim_use_original_steps": True}, np.arange(100)),
    ):
        seen.clear()
        sampler.ddim_sampling(None, shape, verbose=False, **options)
        assert seen == wanted[::-1].tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_latents_give_float32(dtype: torch.dtype) -> None:
    assert _sample(x_T=images().to(dtype)).dtype == torch.float32
    assert _ready().stochastic_encode(images().to(dtype), torch.tensor([0, 4, 9])).dtype == torch.float32
    sampler = _ready()
    sampler.model.apply_model = lambda x, t, c: x.to(dtype)
    for quantize in (False, True):
        x, t = images().to(dtype), torch.full((3,), 11)
        assert sampler.p_sample_ddim(x, None, t, 1, quantize_denoised=quantize)[0].dtype == torch.float32


def test_a_last_timestep_that_does_not_exist_is_an_index_error_too() -> None:
    with pytest.raises(IndexError, match="ddim_num_steps must leave the last timestep below 100; got 100"):
        _ready().make_schedule(100)
