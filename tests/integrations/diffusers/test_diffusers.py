"""The schedulers against diffusers' own: random options, dtypes, layouts, shapes, generators."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

theirs = pytest.importorskip("diffusers")

from diffusers.schedulers import scheduling_ddim, scheduling_ddpm, scheduling_unclip  # noqa: E402
from scheduler_cases import NAMES, Case, denoise  # noqa: E402
from step_bounds import recorded  # noqa: E402

from dd_kernels.integrations import diffusers as ours  # noqa: E402


@pytest.mark.parametrize("seed", range(48))
@pytest.mark.parametrize("name", NAMES)
def test_a_step_equals_theirs(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(name, seed)
    a, b = case.scheduler(theirs), case.scheduler(ours)
    assert torch.equal(a.timesteps, b.timesteps)
    with recorded() as calls:
        their, value = case.step(a), case.step(b)
    assert torch.equal(their[2], value[2]), "the generator must be left where theirs leaves it"
    wide = torch.promote_types(case.sample.dtype, case.out.dtype)
    assert (value[0].shape, value[0].dtype) == (their[0].shape, their[0].dtype)
    assert (value[1].shape, value[1].dtype) == (their[1].shape, wide)

    # In float64, of the noise that was drawn in the output's dtype.
    for module in (scheduling_ddpm, scheduling_ddim, scheduling_unclip):
        draw = module.randn_tensor
        monkeypatch.setattr(
            module, "randn_tensor", lambda *x, dtype, d=draw, **y: d(*x, dtype=case.out.dtype, **y).double()
        )
    truth = case.step(a, exact=True)
    if name == "DDIMInverseScheduler" and case.config["prediction_type"] == "sample" and not truth[0].isfinite().all():
        truth = case.step(b, exact=True)  # theirs divides by 0 at alpha_bar = 1: ours in float64, by the reference
    assert all(exact.isfinite().all() for exact in truth)
    assert [calls.beyond(x, exact) for x, exact in zip(value[:2], truth, strict=False)] == [None, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_add_noise_and_velocity(name: str, dtype: torch.dtype) -> None:
    a, b = (getattr(module, name)() for module in (theirs, ours))
    if not hasattr(a, "add_noise"):
        return
    x, z = torch.randn(2, 6, 3, 8, 8).unbind()
    x, z, t = x.to(dtype), z.to(dtype), torch.tensor([0, 4, 9, 500, 700, 999])
    for method in ("add_noise", "get_velocity"):
        if hasattr(a, method):
            with recorded() as calls:
                value = getattr(b, method)(x, z, t)
            assert value.dtype == dtype
            assert calls.beyond(value, getattr(a, method)(x.double(), z.double(), t)) is None
    assert not torch.equal(b.add_noise(x, z, t[:1].expand(6)), x), "a little noise must not vanish in 16 bits"


def test_add_noise_broadcasts_and_differentiates() -> None:
    a, b = theirs.DDPMScheduler(), ours.DDPMScheduler()
    x, z = torch.randn(1, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4)
    for t in (torch.tensor([3, 900]), torch.tensor(5), torch.tensor([[7]]), torch.tensor([8], dtype=torch.int32)):
        torch.testing.assert_close(b.add_noise(x, z, t), a.add_noise(x, z, t))
    one, two = (torch.autograd.grad(s.add_noise(x, z, torch.tensor([3, 900])).square().sum(), x)[0] for s in (a, b))
    torch.testing.assert_close(one, two)
    assert b.add_noise(x.half(), z, torch.tensor([1])).dtype == torch.float32


@pytest.mark.parametrize("steps", [61, 50])
@pytest.mark.parametrize("name", NAMES)
def test_loops_equal_theirs(name: str, steps: int) -> None:
    options = {} if name == "UnCLIPScheduler" else {"timestep_spacing": "trailing"}
    results = []
    for module in (theirs, ours):
        one = getattr(module, name)(**options)
        one.set_timesteps(steps)
        torch.manual_seed(0)
        results.append(denoise(one, torch.randn(2, 3, 8, 8)))
    # At each of 61 steps either side rounds numbers of the size of 1, and no step magnifies what came before.
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    if options:
        assert (-1 in one.timesteps) == (steps == 61)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_a_timestep_may_be_given_in_any_form(name: str) -> None:
    one = getattr(ours, name)(variance_type="fixed_large") if name == "DDPMScheduler" else getattr(ours, name)()
    one.set_timesteps(10)
    x, out = torch.randn(2, 2, 3, 4, 4).unbind()

    def step(t: Any) -> Tensor:
        torch.manual_seed(0)
        return one.step(out, t, x).prev_sample

    wanted = step(500)
    for t in (np.int64(500), torch.tensor(500), torch.tensor([500]), torch.tensor([500, 500], dtype=torch.int32)):
        assert torch.equal(step(t), wanted)
    mixed = step(torch.tensor([500, 0]))
    assert torch.equal(mixed[0], wanted[0])
    assert torch.equal(mixed[1], step(0)[1])


@pytest.mark.parametrize("loop", ["leading", "custom"])
def test_ddpm_steps_to_the_next_in_its_list(loop: str) -> None:
    results = []
    for module in (theirs, ours):
        one = module.DDPMScheduler(timestep_spacing="linspace")
        one.set_timesteps(**({"timesteps": [977, 500, 3]} if loop == "custom" else {"num_inference_steps": 7}))
        torch.manual_seed(0)
        results.append(denoise(one, torch.randn(1, 3, 4, 4)))
    torch.testing.assert_close(*results)


def test_what_is_nan_in_theirs_is_what_was_meant() -> None:
    x, out = torch.randn(2, 1, 3, 4, 4).unbind()
    a, b = (ours.DDPMScheduler(variance_type=v) for v in ("fixed_large_log", "fixed_large"))
    results = []
    for one in (a, b):
        torch.manual_seed(0)
        results.append(one.step(out, 500, x).prev_sample)
    torch.testing.assert_close(*results)
    inverse = ours.DDIMInverseScheduler(prediction_type="sample")
    inverse.set_timesteps(10)
    assert inverse.step(out, 0, x).prev_sample.isfinite().all()
    ddim = ours.DDIMScheduler()
    ddim.set_timesteps(10)
    assert ddim.step(out, 500, x, eta=1.5).prev_sample.isfinite().all()
    unclip = ours.UnCLIPScheduler(variance_type="learned_range")
    unclip.set_timesteps(10)
    assert unclip.step(torch.cat((out, out), 1), 500, x, prev_timestep=-1).prev_sample.isfinite().all()


def test_what_is_changed_afterwards_counts() -> None:
    x, out = torch.randn(2, 1, 3, 4, 4).unbind()

    def changes(one: Any) -> list[Tensor]:
        one.set_timesteps(10)
        results = [one.step(out, 100, x).prev_sample]
        one.alphas_cumprod = one.alphas_cumprod**2
        results.append(one.step(out, 100, x).prev_sample)
        one.final_alpha_cumprod = torch.tensor(0.99999)
        results.append(one.step(out, 0, x).prev_sample)
        one.register_to_config(prediction_type="v_prediction")
        results.append(one.step(out, 100, x).prev_sample)
        one.set_timesteps(20)
        return [*results, one.step(out, 100, x).prev_sample]

    for their, value in zip(changes(theirs.DDIMScheduler()), changes(ours.DDIMScheduler()), strict=True):
        torch.testing.assert_close(value, their)
    a, b = theirs.DDPMScheduler(), ours.DDPMScheduler()
    for one in (a, b):
        one.set_timesteps(10)
        one.step(out, 0, x)
        one.timesteps = torch.tensor([800, 300, 300, 0])
    for t in (800, 300):
        results = []
        for one in (a, b):
            torch.manual_seed(0)
            results.append(one.step(out, t, x).prev_sample)
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("max_value", [1.0, 1.5])
@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_a_threshold_of_an_infinite_x_0_is_its_maximum(name: str, max_value: float) -> None:
    """Zero terminal SNR divides by 0, and theirs takes a quantile of inf, which is NaN."""
    options = {"rescale_betas_zero_snr": True, "thresholding": True, "timestep_spacing": "trailing"}
    one = getattr(ours, name)(**options, sample_max_value=max_value)
    one.set_timesteps(5)
    x, out = torch.randn(2, 2, 3, 8, 8).unbind()
    result = one.step(out, 999, x)
    assert torch.equal(result.pred_original_sample, (x - out).sign())
    assert result.prev_sample.isfinite().all()
