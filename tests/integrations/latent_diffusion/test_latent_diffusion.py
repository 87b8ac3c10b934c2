"""DDIMSampler against values recorded from stable-diffusion's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import latent_cases
import numpy as np
import pytest
import torch
from latent_cases import SHAPE, Model, images

from dd_kernels.integrations.latent_diffusion import DDIMSampler


def test_equals_stable_diffusion() -> None:
    with np.load(latent_cases.DATA) as data:
        theirs = dict(data)
    ours = latent_cases.results(DDIMSampler)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert (value.shape, value.dtype) == (theirs[name].shape, theirs[name].dtype), name
        # Both are float32; up to ten steps, none of which amplifies an error by much.
        assert np.abs(value - theirs[name]).max() <= 4e-6 * max(np.abs(theirs[name]).max(), 1.0), name


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
