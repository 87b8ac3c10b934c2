"""The schedulers' files, noise from a seed, and errors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

theirs = pytest.importorskip("diffusers")

from differential_loops import LOOPS  # noqa: E402
from scheduler_cases import NAMES, denoise  # noqa: E402

import dd_kernels as dd  # noqa: E402
from dd_kernels.integrations import diffusers as ours  # noqa: E402


@pytest.mark.parametrize("name", NAMES + LOOPS)
def test_saved_and_loaded_as_theirs(name: str, tmp_path: Any) -> None:
    a = getattr(theirs, name)(num_train_timesteps=500)
    b = getattr(ours, name).from_config(a.config)
    assert dict(b.config) == dict(a.config)
    b.save_pretrained(tmp_path)
    assert type(getattr(theirs, name).from_pretrained(tmp_path)) is getattr(theirs, name)
    assert dict(getattr(ours, name).from_pretrained(tmp_path).config)["num_train_timesteps"] == 500
    philox = getattr(ours, name).from_config(a.config, noise="philox")
    philox.save_pretrained(tmp_path)
    again = getattr(ours, name).from_pretrained(tmp_path)
    assert again.config.noise == "philox"
    assert getattr(ours, name).from_config(again.config, noise="generator").config.get("noise") is None
    again.set_timesteps(5)
    assert copy.deepcopy(again).timesteps.tolist() == again.timesteps.tolist()
    assert isinstance(again, getattr(theirs, name))


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "UnCLIPScheduler"])
def test_philox_noise_does_not_depend_on_the_batch(name: str) -> None:
    one = getattr(ours, name)(noise="philox")
    one.set_timesteps(6)
    options = {"eta": 1.0} if name == "DDIMScheduler" else {}
    x = torch.randn(3, 3, 4, 4)

    def run(x: Tensor, seed: int) -> Tensor:
        return denoise(one, x, torch.Generator().manual_seed(seed), **options)

    whole = run(x, 5)
    assert torch.equal(run(x[:1], 5), whole[:1])
    assert not torch.equal(run(x, 6), whole)
    first, last = one.timesteps[0], 0
    z = dd.randn(x.shape, seed=5, draw=int(first), stream=1)
    plain = getattr(ours, name)()
    plain.set_timesteps(6)
    plain._noise = lambda like, generator: {"noise": z}
    expected = plain.step(x.sin(), first, x, **options).prev_sample
    generator = torch.Generator().manual_seed(5)
    torch.testing.assert_close(one.step(x.sin(), first, x, generator=generator, **options).prev_sample, expected)
    torch.manual_seed(1)  # a seed other than the suite's
    global_seed = one.step(x.sin(), first, x, **options).prev_sample
    assert torch.equal(one.step(x.sin(), first, x, **options).prev_sample, global_seed)
    one.set_timesteps(6)
    assert not torch.equal(one.step(x.sin(), first, x, **options).prev_sample, global_seed)
    assert one.step(x.sin(), last, x, **options).prev_sample.isfinite().all()


def _ready(name: str, **options: Any) -> Any:
    one = getattr(ours, name)(**options)
    one.set_timesteps(10)
    return one


X = torch.zeros(1, 3, 4, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ours.DDIMScheduler(noise="torch"), "noise must be"),
        (lambda: ours.DDIMScheduler().step(X, 1, X), "num_inference_steps must be set"),
        (lambda: ours.DDIMInverseScheduler().step(X, 1, X), "num_inference_steps must be set"),
        (lambda: _ready("DDIMScheduler").step(X, 1000, X), r"timestep must be in \[0, 1000\); got 1000"),
        (lambda: _ready("DDPMScheduler").step(X, 501, X), "timestep must be one of scheduler.timesteps; got 501"),
        (lambda: _ready("DDIMScheduler").step(X, 1, X, 0.5, False, torch.Generator(), X), "only one of generator and"),
        (lambda: _ready("DDPMScheduler", prediction_type="x0").step(X, 100, X), "prediction_type must be one of"),
        (lambda: _ready("UnCLIPScheduler", prediction_type="v_prediction").step(X, 111, X), "prediction_type must be"),
        (lambda: _ready("UnCLIPScheduler", variance_type="fixed_large").step(X, 111, X), "variance_type must be"),
        (lambda: _ready("DDPMScheduler", variance_type="learned_range").step(X, 100, X), "must have 6 channels"),
        (lambda: _ready("DDPMScheduler").step(torch.zeros(1, 6, 4, 4), 100, X), "model_output must have the shape"),
        (lambda: ours.UnCLIPScheduler().set_timesteps(1), "num_inference_steps must be at least 2"),
        (lambda: ours.DDPMScheduler().set_timesteps(10, timesteps=[1]), "Can only pass one"),
        (
            lambda: _ready("DDPMScheduler", noise="philox").step(X, 100, X, [torch.Generator(), torch.Generator()]),
            "generator must be one torch.Generator",
        ),
    ],
)
def test_errors_name_the_argument(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_float_timestep_is_a_type_error() -> None:
    for t in (1.0, torch.tensor(1.0)):
        with pytest.raises(TypeError):
            _ready("DDIMScheduler").step(X, t, X)


def test_unclip_knows_which_steps_its_table_holds():
    """Where the host knows the timesteps, the device does not look for the step's row."""
    scheduler = _ready("UnCLIPScheduler")
    first, second = scheduler._values[:2]
    assert scheduler._pairs(first, None) == "adjacent"
    assert scheduler._pairs(first, first - 1) == "adjacent"
    assert scheduler._pairs(first, second) == "listed"
    assert scheduler._pairs(first, second - 1) == (first, second - 1)
    assert scheduler._pairs(None, second) is None
