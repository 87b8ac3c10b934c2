"""Random calls, valid and not, on diffusers' classes and ours; and the forms of arguments that they turned up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

theirs = pytest.importorskip("diffusers")

from differential import LOOPS, NAMES, difference  # noqa: E402

from dd_kernels.integrations import diffusers as ours  # noqa: E402


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(36))
@pytest.mark.parametrize("name", NAMES + LOOPS)
def test_a_random_call_differs_only_as_documented(name: str, seed: int) -> None:
    assert difference(name, seed) is None


def _ready(name: str, steps: int = 10, module: Any = ours, **options: Any) -> Any:
    one = getattr(module, name)(**options)
    one.set_timesteps(steps)
    return one


@pytest.mark.parametrize("name", NAMES)
def test_timesteps_of_numpy_and_lists_are_taken(name: str) -> None:
    one = _ready(name)
    t = int(one.timesteps[3])
    x, out = torch.randn(2, 2, 3, 4, 4).unbind()

    def step(timestep: Any) -> Tensor:
        torch.manual_seed(0)
        return one.step(out, timestep, x).prev_sample

    wanted = step(t)
    for form in (np.int32(t), np.array(t), np.array([t]), [t], [t, t], np.array([t, t])):
        assert torch.equal(step(form), wanted), form
    for form in (float(t), torch.tensor(float(t)), True, torch.tensor(True), str(t), [0.5], None):
        with pytest.raises(TypeError, match="timestep must be") as caught:
            step(form)
        assert isinstance(caught.value, IndexError)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_output_of_one_sample_broadcasts_as_theirs(name: str) -> None:
    x, out = torch.randn(3, 3, 4, 4), torch.randn(1, 3, 4, 4)
    results = []
    for module in (theirs, ours):
        one = _ready(name, module=module)
        torch.manual_seed(0)
        results.append(one.step(out, one.timesteps[2], x).prev_sample)
    torch.testing.assert_close(*results)
    with pytest.raises(ValueError, match="model_output must have the shape of sample") as caught:
        one.step(out[..., :3], one.timesteps[2], x)
    assert isinstance(caught.value, RuntimeError)


@pytest.mark.parametrize("name", NAMES)
def test_a_number_of_steps_is_a_whole_number_above_0(name: str) -> None:
    one = getattr(ours, name)()
    for steps in (0, -3, np.int64(0)):
        with pytest.raises(ValueError, match="num_inference_steps must be at least"):
            one.set_timesteps(steps)
    with pytest.raises(TypeError, match=r"num_inference_steps must be an int; got 2.5"):
        one.set_timesteps(2.5)
    for steps in (np.int64(5), 5.0):
        one.set_timesteps(steps)
        assert one.timesteps.tolist() == _ready(name, 5).timesteps.tolist()
        assert one.num_inference_steps == 5


def test_timesteps_per_sample_are_checked_where_the_host_knows_them() -> None:
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(IndexError, match=r"timestep must be one of scheduler\.timesteps; got 1"):
        _ready("DDPMScheduler").step(x, [0, 1], x)
    with pytest.raises(IndexError, match=r"timestep must be in \[0, 1000\); got -4"):
        _ready("DDIMScheduler").step(x, torch.tensor([0, -4]), x)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_to_in_place_counts(name: str) -> None:
    one, fresh = (_ready(name) for _ in range(2))
    x, out, t = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4), int(one.timesteps[5])

    def step(scheduler: Any) -> Tensor:
        torch.manual_seed(0)
        return scheduler.step(out, t, x).prev_sample

    before = step(one)
    one.alphas_cumprod *= 0.9
    fresh.alphas_cumprod = fresh.alphas_cumprod * 0.9
    assert not torch.equal(step(one), before)
    assert torch.equal(step(one), step(fresh))
    if name != "DDIMInverseScheduler":
        one.add_noise(x, x, torch.tensor([t]))  # moves the tables to the device of x
        assert torch.equal(step(one), step(fresh))


def test_a_scheduler_made_in_inference_mode_works() -> None:
    with torch.inference_mode():
        one = _ready("DDIMScheduler")
        x = torch.ones(1, 3, 4, 4)
        expected = _ready("DDIMScheduler", module=theirs).step(x, 500, x).prev_sample
        torch.testing.assert_close(one.step(x, 500, x).prev_sample, expected)


def test_unclip_with_more_steps_than_timesteps_repeats_some() -> None:
    x, out = torch.randn(2, 1, 3, 4, 4).unbind()
    one, other = (_ready("UnCLIPScheduler", 12, module, num_train_timesteps=10) for module in (ours, theirs))
    listed = one.timesteps.tolist()
    place = next(i for i in range(11) if listed[i] == listed[i + 1])
    for following in (listed[place + 1], listed[place + 2]):
        results = []
        for scheduler in (one, other):
            torch.manual_seed(0)
            results.append(scheduler.step(out, listed[place], x, prev_timestep=following).prev_sample)
        torch.testing.assert_close(*results)


def test_ddim_steps_to_the_next_of_its_list_where_diffusers_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def previous_timestep(self: Any, timestep: int) -> Tensor:
        place = int((self.timesteps == timestep).nonzero()[0])
        return self.timesteps[place + 1] if place + 1 < len(self.timesteps) else torch.tensor(-1)

    monkeypatch.setattr(theirs.DDIMScheduler, "previous_timestep", previous_timestep, raising=False)
    one = _ready("DDIMScheduler", 7, timestep_spacing="linspace", clip_sample=False)
    x, out, (t, prev) = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4), one.timesteps[1:3].tolist()
    a, b = one.alphas_cumprod[t], one.alphas_cumprod[prev]
    x0 = (x - (1 - a).sqrt() * out) / a.sqrt()
    torch.testing.assert_close(one.step(out, t, x).prev_sample, b.sqrt() * x0 + (1 - b).sqrt() * out)
