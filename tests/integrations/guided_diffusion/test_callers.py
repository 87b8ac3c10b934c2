"""What code around guided-diffusion's, GLIDE's, DiT's and DDPM-IP's modules touches."""

from __future__ import annotations

import enum
import importlib
import logging
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from float64_runs import check
from guided_cases import SHAPE, STEPS, images, make, model, named
from torch import Tensor

import dd_kernels as dd
from dd_kernels.integrations import guided_diffusion
from dd_kernels.integrations.guided_diffusion import gaussian_diffusion as gd
from dd_kernels.integrations.guided_diffusion import process, sampling
from dd_kernels.integrations.guided_diffusion.respace import SpacedDiffusion, _WrappedModel, space_timesteps

T = torch.tensor([0, 5, STEPS - 1])


@pytest.mark.parametrize("package", ["dd_kernels.integrations.guided_diffusion", "dd_kernels.diffusion"])
@pytest.mark.parametrize(
    ("module", "names"),
    [
        (
            "gaussian_diffusion",
            "GaussianDiffusion ModelMeanType ModelVarType LossType get_named_beta_schedule get_beta_schedule "
            "betas_for_alpha_bar _extract_into_tensor mean_flat normal_kl discretized_gaussian_log_likelihood",
        ),
        ("respace", "SpacedDiffusion space_timesteps _WrappedModel GaussianDiffusion"),
        ("losses", "normal_kl approx_standard_normal_cdf discretized_gaussian_log_likelihood"),
        ("nn", "mean_flat"),
    ],
)
def test_modules_and_names_are_theirs(package: str, module: str, names: str) -> None:
    found = importlib.import_module(f"{package}.{module}")
    assert all(hasattr(found, name) for name in names.split())
    assert getattr(importlib.import_module(package), module) is found  # from . import gaussian_diffusion as gd


class Theirs:
    """Enumerations of a caller who takes one module alone from here."""

    class ModelMeanType(enum.Enum):
        PREVIOUS_X = enum.auto()
        START_X = enum.auto()
        EPSILON = enum.auto()

    class ModelVarType(enum.Enum):
        LEARNED = enum.auto()
        FIXED_SMALL = enum.auto()
        FIXED_LARGE = enum.auto()
        LEARNED_RANGE = enum.auto()

    class LossType(enum.Enum):
        MSE = enum.auto()
        RESCALED_MSE = enum.auto()
        KL = enum.auto()
        RESCALED_KL = enum.auto()


def test_enumerations_of_the_caller_are_taken_and_equal() -> None:
    options = {
        "model_mean_type": Theirs.ModelMeanType.START_X,
        "model_var_type": Theirs.ModelVarType.FIXED_LARGE,
        "loss_type": Theirs.LossType.RESCALED_KL,
    }
    one = gd.GaussianDiffusion(betas=[0.1, 0.2], **options)
    assert one.model_mean_type is gd.ModelMeanType.START_X
    for name, value in options.items():
        assert getattr(one, name) == value
        assert value == getattr(one, name)
        assert {value: 1}[getattr(one, name)] == 1
    assert one.loss_type != Theirs.LossType.KL
    assert one.loss_type != Theirs.ModelVarType.LEARNED
    assert one.loss_type != "RESCALED_KL"
    with pytest.raises(ValueError, match="not a valid ModelMeanType"):
        gd.GaussianDiffusion(betas=[0.1], model_mean_type=Theirs.LossType.KL)


def test_glide_builds_a_diffusion_of_two_arguments() -> None:
    one = SpacedDiffusion(use_timesteps=space_timesteps(20, "5"), betas=gd.get_named_beta_schedule("linear", 20))
    assert (one.model_mean_type, one.model_var_type) == (gd.ModelMeanType.EPSILON, gd.ModelVarType.LEARNED_RANGE)
    assert one.loss_type == gd.LossType.MSE
    assert one.p_sample_loop(model(True), SHAPE, seed=0).isfinite().all()


def test_what_a_model_returns_beside_its_output_is_not_lost() -> None:
    one = make(guided_diffusion, "EPSILON", "LEARNED_RANGE")
    plain, extra = model(True), {"features": torch.ones(1)}
    expected = one.p_mean_variance(plain, images(), T)
    got = one.p_mean_variance(lambda x, t: (plain(x, t), extra), images(), T)
    assert got.pop("extra") is extra
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], expected[key]) for key in got)
    torch.manual_seed(0)
    sample = one.p_sample(plain, images(), T)["sample"]
    torch.manual_seed(0)
    assert torch.equal(one.p_sample(lambda x, t: (plain(x, t), extra), images(), T)["sample"], sample)


def test_arrays_may_be_written_to_and_become_tensors_without_a_warning() -> None:
    one = make(guided_diffusion, "EPSILON", "FIXED_LARGE")
    arrays = [value for value in vars(one).values() if isinstance(value, np.ndarray)]
    assert len(arrays) > 15
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for array in arrays:
            torch.from_numpy(array)
    one.betas[0] = 0.5
    assert one.schedule.beta[0] != 0.5


def test_ddpm_ip_logs_gamma_and_draws_twice_even_where_it_is_0(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        one = make(guided_diffusion, "EPSILON", "FIXED_LARGE", input_pertub=0.0)
        make(guided_diffusion, "EPSILON", "FIXED_LARGE", input_perturbation=0.25)
        plain = make(guided_diffusion, "EPSILON", "FIXED_LARGE")
    assert [record.message for record in caplog.records] == [
        "input perturbation is: 0.0",
        "input perturbation is: 0.25",
    ]
    after = []
    for diffusion in (one, plain):
        torch.manual_seed(0)
        losses = diffusion.training_losses(model(False), images(), T)["loss"]
        after.append((losses, torch.randn(2)))
    assert torch.equal(after[0][0], after[1][0])
    assert not torch.equal(after[0][1], after[1][1])
    plain.input_perturbation = 0.25
    assert plain.input_pertub == 0.25
    torch.manual_seed(0)
    assert not torch.equal(plain.training_losses(model(False), images(), T)["loss"], after[1][0])


def test_extract_into_tensor_is_theirs() -> None:
    array = np.linspace(0, 1, STEPS)
    for given in (array, torch.from_numpy(array)):
        got = gd._extract_into_tensor(given, T, SHAPE)
        assert got.dtype == torch.float32
        assert got.shape == SHAPE
        assert torch.equal(got[:, 0, 0, 0], torch.from_numpy(array)[T].float())


@pytest.mark.parametrize("rescale", [False, True])
def test_a_wrapped_model_sees_the_original_timesteps(rescale: bool) -> None:
    seen: list[Tensor] = []
    wrapped = _WrappedModel(lambda x, t, y: seen.append(t) or x * y, [0, 10, 30], rescale, 50)
    assert torch.equal(wrapped(torch.ones(2), torch.tensor([2, 1]), y=3), torch.full((2,), 3.0))
    assert seen[0].tolist() == ([600.0, 200.0] if rescale else [30, 10])
    one = make(guided_diffusion, "EPSILON", "FIXED_SMALL", spaced="5,3,2")
    again = one._wrap_model(one._wrap_model(model(False)))
    assert isinstance(again, _WrappedModel)
    assert not isinstance(again.model, _WrappedModel)


@pytest.mark.parametrize("timesteps", [[], [-1, 3], [0, 7], [7], {3, 100}])
def test_timesteps_out_of_range_are_refused(timesteps: Any) -> None:
    with pytest.raises(ValueError, match=r"use_timesteps must hold at least one timestep in \[0, 7\)"):
        SpacedDiffusion(use_timesteps=timesteps, betas=[0.1] * 7)
    assert SpacedDiffusion(use_timesteps=[0, 6], betas=[0.1] * 7).num_timesteps == 2


def test_reverse_steps_take_a_condition_as_in_glide() -> None:
    """A gradient of 0 changes nothing but for rounding, and one of 1 makes the x_0 of condition_score."""
    one, net = make(guided_diffusion, "EPSILON", "FIXED_SMALL"), model(False)

    def cases(dtype: torch.dtype) -> dict[str, Tensor]:
        x, gradient = images(dtype), {"cond_fn": lambda x, t: torch.zeros_like(x)}
        return named({"still": lambda: one.ddim_reverse_sample(net, x, T, **gradient)})

    plain = named({"still": lambda: one.ddim_reverse_sample(net, images(torch.float64), T)})
    check(cases, plain, process, sampling)
    pushed = one.ddim_reverse_sample(net, images(), T, cond_fn=lambda x, t: torch.ones_like(x))
    p = one.condition_score(lambda x, t: torch.ones_like(x), one.p_mean_variance(net, images(), T), images(), T)
    assert torch.equal(pushed["pred_xstart"], p["pred_xstart"])


def test_beta_schedules_by_all_their_names() -> None:
    assert np.array_equal(gd.get_named_beta_schedule("squaredcos_cap_v2", 20), gd.get_named_beta_schedule("cosine", 20))

    def betas(name: str, steps: int = 10) -> np.ndarray:
        return gd.get_beta_schedule(name, beta_start=0.01, beta_end=0.04, num_diffusion_timesteps=steps)

    few = {"rtol": 8 * 2.0**-53}  # as many roundings
    np.testing.assert_allclose(betas("linear"), dd.linear_schedule(10, 0.01, 0.04).beta, **few)
    np.testing.assert_allclose(betas("quad"), dd.scaled_linear_schedule(10, 0.01, 0.04).beta, **few)
    assert betas("const").tolist() == [0.04] * 10
    np.testing.assert_allclose(betas("jsd", 4), [1 / 4, 1 / 3, 1 / 2, 1], **few)
    assert betas("warmup10", 20).tolist() == [0.01, *[0.04] * 19]  # two steps from 0.01 to 0.04
    np.testing.assert_allclose(betas("warmup50"), [*np.linspace(0.01, 0.04, 5), *[0.04] * 5], **few)
    with pytest.raises(ValueError, match="beta_schedule must be one of linear, quad, jsd"):
        betas("cubic")
