"""The schedulers that count their steps: Euler, flow matching, LCM and DPM-Solver, against diffusers' own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

theirs = pytest.importorskip("diffusers")

from differential_loops import LOOPS  # noqa: E402
from scheduler_cases import denoise, restart  # noqa: E402

import dd_kernels as dd  # noqa: E402
from dd_kernels.integrations import diffusers as ours  # noqa: E402

X, OUT = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).unbind()
STOCHASTIC = {
    "EulerAncestralDiscreteScheduler": {},
    "FlowMatchEulerDiscreteScheduler": {"stochastic_sampling": True},
    "LCMScheduler": {},
    "DPMSolverMultistepScheduler": {"algorithm_type": "sde-dpmsolver++"},
}


def ready(name: str, steps: int = 10, module: Any = ours, **options: Any) -> Any:
    one = getattr(module, name)(**options)
    one.set_timesteps(steps)
    return one


def both(call: Callable[[Any], Any], steps: int = 1, size: float = 1.0) -> None:
    """Checks that a call gives the same on diffusers' module and on ours, but for the roundings of ``steps`` steps.

    Either side rounds numbers of ``size`` eight times a step or less (2^-24 each), and these loops, whose model has a
    slope of 1 at most, do not magnify what a step has rounded. Single steps are compared with float64 elsewhere, by
    a bound for each number.
    """
    results = []
    for module in (theirs, ours):
        torch.manual_seed(0)
        results.append(call(module))
    torch.testing.assert_close(results[1], results[0], rtol=steps * 2**-20, atol=steps * 2**-20 * size)


@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize("name", LOOPS)
def test_loops_equal_theirs(name: str, steps: int) -> None:
    # Euler's x starts from a noise of 157 standard deviations.
    both(lambda module: denoise(ready(name, steps, module), X), steps, size=10.0 if "Euler" in name else 1.0)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"])
def test_loops_of_every_order_equal_theirs(algorithm: str, order: int) -> None:
    """From the middle of the list too, where the order grows anew."""
    if algorithm == "sde-dpmsolver" and order == 3:  # theirs has no such step
        return
    options = {"algorithm_type": algorithm, "solver_order": order, "final_sigmas_type": "sigma_min"}

    def loop(module: Any, begin: int) -> Tensor:
        one, x = ready("DPMSolverMultistepScheduler", 9, module, **options), X
        one.set_begin_index(begin)
        for t in one.timesteps[begin:]:
            x = one.step(0.5 * torch.sin(x), t, x).prev_sample
        return x

    for begin in (0, 3):
        both(lambda module, begin=begin: loop(module, begin), steps=9 - begin)


@pytest.mark.parametrize("name", [name for name in LOOPS if "Flow" not in name])
def test_made_of_each_other_s_configuration(name: str) -> None:
    """As pipelines change their scheduler: what two have in common is taken over."""
    for other in (*LOOPS, "DDIMScheduler", "DDPMScheduler"):
        given = getattr(ours, other)(num_train_timesteps=321)
        expected = getattr(theirs, name).from_config(getattr(theirs, other)(num_train_timesteps=321).config)
        assert dict(getattr(ours, name).from_config(given.config).config) == dict(expected.config)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_philox_noise_does_not_depend_on_the_batch(name: str) -> None:
    one = ready(name, 4, noise="philox", **STOCHASTIC[name])

    def run(x: Tensor, seed: int) -> Tensor:
        return denoise(one, x, torch.Generator().manual_seed(seed))

    whole = run(X, 5)
    assert torch.equal(run(X[:1], 5), whole[:1])
    assert not torch.equal(run(X, 6), whole)
    z = dd.randn(X.shape, seed=5, draw=round(float(one.timesteps[0])), stream=1)
    plain = ready(name, 4, **STOCHASTIC[name])
    plain._noise = lambda like, generator, dtype=None: {"noise": z}
    first = one.timesteps[0]
    results = []
    for scheduler in (one, plain):
        restart(scheduler)
        results.append(scheduler.step(OUT, first, X, generator=torch.Generator().manual_seed(5)).prev_sample)
    torch.testing.assert_close(*results)


def test_churn_is_drawn_in_the_kernel_too() -> None:
    one = ready("EulerDiscreteScheduler", 4, noise="philox")
    results = []
    for index in (0, 1, 0):
        one._step_index = index
        generator = torch.Generator().manual_seed(5)
        results.append(one.step(OUT, one.timesteps[index], X, s_churn=1.0, generator=generator).prev_sample)
    assert torch.equal(results[0], results[2])
    plain = ready("EulerDiscreteScheduler", 4)
    z = dd.randn(X.shape, seed=5, draw=round(float(one.timesteps[0])), stream=1)
    plain._noise = lambda like, generator: {"noise": z}
    expected = plain.step(OUT, plain.timesteps[0], X, s_churn=1.0).prev_sample
    torch.testing.assert_close(results[0], expected)


@pytest.mark.parametrize("name", LOOPS)
def test_the_first_step_says_where_a_loop_begins(name: str) -> None:
    """By begin_index, or by its timestep: a view, a copy, or one that only the device knows."""

    def stepped(begin: int | None, form: Callable[[Tensor], Any], hidden: bool = False) -> tuple[Tensor, Any]:
        one = ready(name)
        if begin is not None:
            one.set_begin_index(begin)
        with pytest.MonkeyPatch.context() as patch:
            if hidden:
                patch.setattr(type(one), "_index_of", lambda self, t: self._places(t))
            torch.manual_seed(0)
            result = one.step(OUT, form(one.timesteps[3]), X).prev_sample
        return result, one.step_index

    wanted, after = stepped(3, lambda t: t)
    assert after == 4
    for form in (lambda t: t, torch.clone, lambda t: t.reshape(1), lambda t: t.numpy(), lambda t: t.double()):
        result, after = stepped(None, form)
        assert torch.equal(result, wanted)
        assert after == 4
    result, after = stepped(None, torch.clone, hidden=True)
    torch.testing.assert_close(result, wanted)
    assert after.tolist() == [4]


@pytest.mark.parametrize("name", LOOPS)
def test_of_two_equal_timesteps_the_second_counts(name: str) -> None:
    one = ready(name)
    listed = one.timesteps.clone()
    listed[4] = listed[3]
    one.timesteps = listed
    assert one.index_for_timestep(listed[3]) == 4
    assert one._places(listed[[3, 5]]).tolist() == [4, 5]
    assert one.index_for_timestep(torch.tensor(7.0), torch.tensor([9.0, 7.0])) == 1
    last = len(listed) - 1
    if name == "DPMSolverMultistepScheduler":
        assert one.index_for_timestep(torch.tensor(12345)) == last
        assert one._places(torch.tensor([12345])).tolist() == [last]
    else:
        with pytest.raises(IndexError, match="timestep must be one of"):
            one.index_for_timestep(torch.tensor(12345.0))
        assert one._places(torch.tensor([12345])).tolist() == [last + 1]


@pytest.mark.parametrize("name", LOOPS)
def test_a_step_after_the_last_is_an_error(name: str) -> None:
    one = ready(name, 2)
    for t in one.timesteps:
        one.step(OUT, t, X)
    with pytest.raises(IndexError, match="which begins them anew"):
        one.step(OUT, one.timesteps[0], X)


@pytest.mark.parametrize("name", [name for name in LOOPS if name != "LCMScheduler"])
def test_noise_is_added_at_a_timestep_or_at_the_loop_s_step(name: str) -> None:
    noise = OUT

    def noisy(module: Any, begin: int | None, steps: int, dtype: torch.dtype) -> Tensor:
        one = ready(name, module=module)
        if begin is not None:
            one.set_begin_index(begin)
        for t in one.timesteps[:steps]:
            one.step(OUT, t, X)
        method = one.scale_noise if "Flow" in name else one.add_noise
        return (
            method(X.to(dtype), one.timesteps[[2, 4]], noise)
            if "Flow" in name
            else method(X.to(dtype), noise, one.timesteps[[2, 4]])
        )

    for begin, steps in ((None, 0), (1, 0), (0, 3)):
        both(lambda module, begin=begin, steps=steps: noisy(module, begin, steps, torch.float32))
    one = ready(name)
    x = torch.ones(2, 3, 4, 4, dtype=torch.bfloat16)
    add = one.scale_noise if "Flow" in name else one.add_noise
    arguments = {"timestep": one.timesteps[-2:]} if "Flow" in name else {"timesteps": one.timesteps[-2:]}
    assert add(x, noise=OUT.bfloat16(), **arguments).dtype is torch.bfloat16


def test_sigmas_that_are_changed_count() -> None:
    """Set, and written to in place."""

    def changes(module: Any) -> list[Tensor]:
        one = ready("EulerDiscreteScheduler", module=module)
        results = [one.step(OUT, one.timesteps[0], X).prev_sample]
        one.sigmas = one.sigmas * 0.9
        results.append(one.step(OUT, one.timesteps[1], X).prev_sample)
        one.sigmas[:] = one.sigmas.sqrt()
        results.append(one.scale_model_input(X, one.timesteps[2]))
        return [*results, one.step(OUT, one.timesteps[2], X).prev_sample]

    both(changes)


@pytest.mark.parametrize("name", LOOPS)
def test_the_timesteps_are_set_as_theirs(name: str) -> None:
    """With the same names of arguments, which pipelines look for."""
    wanted = inspect.signature(getattr(theirs, name).set_timesteps)
    assert inspect.signature(getattr(ours, name).set_timesteps) == wanted
    for a, b in zip(*(ready(name, np.int64(7), module).timesteps for module in (theirs, ours)), strict=True):
        assert torch.equal(a, b)
    one = getattr(ours, name)()
    one.set_timesteps(5, "meta")
    assert one.timesteps.device.type == "meta"
    assert (getattr(one, "sigmas", one.timesteps).device.type == "meta") == (name in ("LCMScheduler", LOOPS[2]))
    for steps in (0, -3):
        with pytest.raises(ValueError, match="num_inference_steps must be at least 1"):
            one.set_timesteps(steps)


def test_flow_takes_a_timestep_per_token() -> None:
    x, out = torch.randn(2, 2, 6, 4).unbind()
    tokens = torch.rand(2, 6) * 1000

    def step(module: Any) -> Tensor:
        one = ready("FlowMatchEulerDiscreteScheduler", module=module)
        return one.step(out, one.timesteps[3], x, per_token_timesteps=tokens, return_dict=False)[0]

    both(step)


@pytest.mark.parametrize("algorithm", ["dpmsolver", "sde-dpmsolver"])
def test_a_threshold_of_epsilon_is_diffusers_own_step(algorithm: str) -> None:
    options = {"algorithm_type": algorithm, "final_sigmas_type": "sigma_min", "thresholding": True}
    both(lambda module: denoise(ready("DPMSolverMultistepScheduler", 4, module, **options), X), steps=4)


def test_outputs_of_earlier_steps_may_be_given() -> None:
    def step(module: Any) -> Tensor:
        one = ready("DPMSolverMultistepScheduler", module=module)
        one.set_begin_index(4)
        one.model_outputs, one.lower_order_nums = [None, X.sin()], 1
        return one.step(OUT, one.timesteps[4], X).prev_sample

    both(step)


def test_lcm_steps_from_the_timestep_that_it_is_given() -> None:
    def step(module: Any, **options: Any) -> list[Tensor]:
        one = ready("LCMScheduler", 4, module, **options)
        one.set_begin_index(1)
        result = one.step(OUT, torch.tensor(700), X)
        return [result.prev_sample, result.denoised]

    both(step)
    both(lambda module: step(module, clip_sample=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ready(LOOPS[0]).step(OUT, 3, X), "not an integer index; got 3"),
        (lambda: ready(LOOPS[1]).step(OUT, torch.tensor(3), X), "not an integer index"),
        (lambda: ready(LOOPS[2]).step(OUT, 3, X), "not an integer index"),
        (lambda: ready(LOOPS[0], prediction_type="x0").step(OUT, 999.0, X), "prediction_type must be one of"),
        (lambda: ours.LCMScheduler().step(OUT, 999, X), "num_inference_steps must be set"),
        (lambda: ours.DPMSolverMultistepScheduler().step(OUT, 999, X), "num_inference_steps must be set"),
        (
            lambda: ready(LOOPS[1], noise="philox").step(OUT, 999.0, X, [torch.Generator(), torch.Generator()]),
            "generator must be one torch.Generator",
        ),
    ],
)
def test_errors_name_the_argument(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
