"""The schedulers against diffusers' own: random options, dtypes, layouts, shapes, generators, errors."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

theirs = pytest.importorskip("diffusers")

from diffusers.schedulers import scheduling_ddim, scheduling_ddpm, scheduling_unclip  # noqa: E402

import dd_kernels as dd  # noqa: E402
from dd_kernels.integrations import diffusers as ours  # noqa: E402

NAMES = ("DDPMScheduler", "DDIMScheduler", "DDIMInverseScheduler", "UnCLIPScheduler")
DTYPES = (torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _config(name: str, pick: random.Random) -> dict[str, Any]:
    """Random options of one scheduler, without those where theirs is NaN."""
    config: dict[str, Any] = {"clip_sample": pick.random() < 0.7, "clip_sample_range": pick.choice([1.0, 0.5, 3.0])}
    config["prediction_type"] = pick.choice(["epsilon", "sample", "v_prediction"])
    config["num_train_timesteps"] = pick.choice([1000, 100, 37])
    if name == "UnCLIPScheduler":
        config["prediction_type"] = pick.choice(["epsilon", "sample"])
        return config | {"variance_type": pick.choice(["fixed_small_log", "learned_range"])}
    config["beta_schedule"] = pick.choice(["linear", "scaled_linear", "squaredcos_cap_v2"])
    config["timestep_spacing"] = pick.choice(["leading", "trailing"])
    config["steps_offset"] = pick.choice([0, 1])
    if name == "DDIMInverseScheduler":
        # At alpha_bar = 1 theirs divides by 0 for "sample".
        return config | {"set_alpha_to_one": config["prediction_type"] != "sample" and pick.random() < 0.5}
    config["timestep_spacing"] = pick.choice(["leading", "trailing", "linspace"])
    config["thresholding"] = pick.random() < 0.3
    config |= {
        "dynamic_thresholding_ratio": pick.choice([0.995, 0.8]),
        "sample_max_value": pick.choice([1.0, 1.5, 0.5]),
    }
    clips = config["clip_sample"] and not config["thresholding"]  # a quantile of +-inf is NaN
    finite = clips or config["prediction_type"] != "epsilon"
    config["rescale_betas_zero_snr"] = finite and pick.random() < 0.3
    if name == "DDIMScheduler":
        return config | {"set_alpha_to_one": pick.random() < 0.5}
    variances = ["fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range"]
    return config | {"variance_type": pick.choice(variances), "beta_schedule": pick.choice(["linear", "sigmoid"])}


def _lay_out(x: Tensor, layout: str) -> Tensor:
    if layout == "channels_last" and x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x.transpose(0, -1).contiguous().transpose(0, -1) if layout == "transposed" else x


class _Case:
    """One random case: a scheduler's options, and the arguments of its step."""

    def __init__(self, name: str, seed: int) -> None:
        pick = random.Random(seed)
        torch.manual_seed(seed)
        self.name, self.config = name, _config(name, pick)
        self.steps = pick.choice([2, 5, 7, 20, 30])
        shape = pick.choice([(2, 3, 8, 8), (1, 4, 5, 7), (3, 6, 11), (2, 32), (2, 3, 2, 4, 4), (0, 3, 4, 4)])
        if self.config.get("thresholding") and (len(shape) == 2 or shape[0] == 0):  # where theirs raises
            shape = (2, 3, 8, 8)
        dtype, out_dtype = pick.choice(DTYPES), pick.choice(DTYPES)
        out_dtype = dtype if pick.random() < 0.6 else out_dtype
        layout = pick.choice(["contiguous", "channels_last", "transposed"])
        self.sample = _lay_out(torch.randn(shape), layout).to(dtype)
        learned = self.config.get("variance_type", "").startswith("learned")
        out = torch.randn(shape[0], shape[1] * (2 if learned else 1), *shape[2:])
        if learned:
            # Theirs takes the root of a "learned" variance; away from 0, where a logarithm has no digits left.
            out[:, shape[1] :] = torch.rand(shape) * 0.5 + 0.01
        self.out = _lay_out(out, layout).to(out_dtype)
        self.generators = pick.choice(["global", "one", "list"])
        self.index = pick.random()
        self.options: dict[str, Any] = {}
        if name == "DDIMScheduler":
            self.options = {"eta": pick.choice([0.0, 0.3, 1.0]), "use_clipped_model_output": pick.random() < 0.4}
            if pick.random() < 0.3:
                self.generators = "noise"
                self.options["variance_noise"] = torch.randn(shape).to(out_dtype)

    def scheduler(self, module: Any) -> Any:
        one = getattr(module, self.name)(**self.config)
        one.set_timesteps(self.steps)
        return one

    def step(self, one: Any, exact: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """(previous sample, x_0, the noise that would come next)."""
        in_range = [t for t in one.timesteps.tolist() if t < self.config["num_train_timesteps"]]
        place = int(self.index * len(in_range))
        t, options = torch.tensor(in_range[place]), dict(self.options)
        if self.name == "UnCLIPScheduler" and place + 1 < len(in_range):
            options["prev_timestep"] = torch.tensor(in_range[place + 1])
        sources = [torch.Generator().manual_seed(n) for n in range(max(len(self.sample), 1))]
        if self.generators == "list" and len(self.sample):
            options["generator"] = sources
        elif self.generators == "one":
            options["generator"] = sources[0]
        if self.name == "DDIMInverseScheduler":
            options.pop("generator", None)
        torch.manual_seed(7)
        sample, out = (x.double() if exact else x for x in (self.sample, self.out))
        result = one.step(out, t, sample, **options)
        source = sources[0] if "generator" in options else None
        return result.prev_sample, result.pred_original_sample, torch.randn(2, generator=source)


def _check(value: Tensor, their: Tensor, truth: Tensor, size: float, what: str) -> None:
    """As near to float64 as theirs: twice their error, and a rounding of the largest term."""
    assert (value.shape, value.dtype) == (their.shape, their.dtype), what
    error, their_error = ((x.double() - truth).abs().max().item() for x in (value, their))
    assert torch.isfinite(truth).all(), what
    budget = 2 * their_error + 2 * max(torch.finfo(value.dtype).eps, 1.2e-7) * max(size, truth.abs().max().item())
    assert error <= budget, f"{what}: {error}; theirs {their_error}, budget {budget}"


@pytest.mark.parametrize("seed", range(48))
@pytest.mark.parametrize("name", NAMES)
def test_a_step_equals_theirs(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = _Case(name, seed)
    a, b = case.scheduler(theirs), case.scheduler(ours)
    assert torch.equal(a.timesteps, b.timesteps)
    their, value = case.step(a), case.step(b)
    assert torch.equal(their[2], value[2]), "the generator must be left where theirs leaves it"

    # In float64, of the noise that was drawn in the output's dtype.
    for module in (scheduling_ddpm, scheduling_ddim, scheduling_unclip):
        draw = module.randn_tensor
        monkeypatch.setattr(
            module, "randn_tensor", lambda *x, dtype, d=draw, **y: d(*x, dtype=case.out.dtype, **y).double()
        )
    truth = case.step(a, exact=True)
    if case.sample.numel() == 0:
        assert value[0].shape == their[0].shape
        return
    size = max(case.sample.abs().max().item(), case.out.abs().max().item())
    wide = torch.promote_types(case.sample.dtype, case.out.dtype)
    _check(value[0], their[0], truth[0], size, "prev_sample")
    _check(value[1], their[1].to(wide), truth[1], size, "pred_original_sample")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_add_noise_and_velocity_are_nearer_than_theirs(name: str, dtype: torch.dtype) -> None:
    a, b = (getattr(module, name)() for module in (theirs, ours))
    if not hasattr(a, "add_noise"):
        return
    x, z = torch.randn(2, 6, 3, 8, 8).unbind()
    x, z, t = x.to(dtype), z.to(dtype), torch.tensor([0, 4, 9, 500, 700, 999])
    for method in ("add_noise", "get_velocity"):
        if hasattr(a, method):
            truth = getattr(a, method)(x.double(), z.double(), t)
            _check(getattr(b, method)(x, z, t), getattr(a, method)(x, z, t), truth, 1.0, method)
    assert not torch.equal(b.add_noise(x, z, t[:1].expand(6)), x), "a little noise must not vanish in 16 bits"


def test_add_noise_broadcasts_and_differentiates() -> None:
    a, b = theirs.DDPMScheduler(), ours.DDPMScheduler()
    x, z = torch.randn(1, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4)
    for t in (torch.tensor([3, 900]), torch.tensor(5), torch.tensor([[7]]), torch.tensor([8], dtype=torch.int32)):
        torch.testing.assert_close(b.add_noise(x, z, t), a.add_noise(x, z, t))
    one, two = (torch.autograd.grad(s.add_noise(x, z, torch.tensor([3, 900])).square().sum(), x)[0] for s in (a, b))
    torch.testing.assert_close(one, two)
    assert b.add_noise(x.half(), z, torch.tensor([1])).dtype == torch.float32


def _loop(one: Any, x: Tensor, generator: torch.Generator | None = None, **options: Any) -> Tensor:
    timesteps = one.timesteps
    for place, t in enumerate(timesteps):
        if "UnCLIP" in type(one).__name__:
            options["prev_timestep"] = timesteps[place + 1] if place + 1 < len(timesteps) else None
        if generator is not None:
            options["generator"] = generator
        x = one.step(0.5 * torch.sin(2 * x), t, x, **options).prev_sample
    return x


@pytest.mark.parametrize("steps", [61, 50])
@pytest.mark.parametrize("name", NAMES)
def test_loops_equal_theirs(name: str, steps: int) -> None:
    options = {} if name == "UnCLIPScheduler" else {"timestep_spacing": "trailing"}
    results = []
    for module in (theirs, ours):
        one = getattr(module, name)(**options)
        one.set_timesteps(steps)
        torch.manual_seed(0)
        results.append(_loop(one, torch.randn(2, 3, 8, 8)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    if options:
        assert (-1 in one.timesteps) == (steps == 61)


@pytest.mark.parametrize("name", NAMES)
def test_no_step_asks_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A meta tensor has no values: whatever reads one on the host raises.
    one = getattr(ours, name)()
    one.set_timesteps(10, device="meta")
    options = {"eta": 1.0} if name == "DDIMScheduler" else {}
    drawn = []
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *a, **k: drawn.append(1) or randn(*a, **k))
    x = torch.empty(2, 3, 4, 4, device="meta")
    assert _loop(one, x, **options).shape == x.shape
    assert (
        len(drawn) == {"DDPMScheduler": 9, "DDIMScheduler": 10, "DDIMInverseScheduler": 0, "UnCLIPScheduler": 9}[name]
    )
    if name in ("DDPMScheduler", "DDIMScheduler"):
        # Timesteps that are not views of the scheduler's, one and one per sample.
        for t in (torch.empty((), dtype=torch.int64, device="meta"), torch.empty(2, dtype=torch.int64, device="meta")):
            assert one.step(x, t, x).prev_sample.shape == x.shape
        assert one.add_noise(x, x, one.timesteps[:2]).shape == x.shape
        assert one.alphas_cumprod.device.type == "meta"


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
        results.append(_loop(one, torch.randn(1, 3, 4, 4)))
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


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_as_theirs(name: str, tmp_path: Any) -> None:
    a = getattr(theirs, name)(num_train_timesteps=50)
    b = getattr(ours, name).from_config(a.config)
    assert dict(b.config) == dict(a.config)
    b.save_pretrained(tmp_path)
    assert type(getattr(theirs, name).from_pretrained(tmp_path)) is getattr(theirs, name)
    assert dict(getattr(ours, name).from_pretrained(tmp_path).config)["num_train_timesteps"] == 50
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
        return _loop(one, x, torch.Generator().manual_seed(seed), **options)

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
    torch.manual_seed(1)  # not the suite's own
    global_seed = one.step(x.sin(), first, x, **options).prev_sample
    assert torch.equal(one.step(x.sin(), first, x, **options).prev_sample, global_seed)
    one.set_timesteps(6)
    assert not torch.equal(one.step(x.sin(), first, x, **options).prev_sample, global_seed)
    assert one.step(x.sin(), last, x, **options).prev_sample.isfinite().all()


@pytest.mark.parametrize(
    ("name", "eta"), [("DDPMScheduler", 0.0), ("DDIMScheduler", 0.7), ("DDIMInverseScheduler", 0.0)]
)
def test_a_whole_loop_compiles(name: str, eta: float) -> None:
    one = getattr(ours, name)()
    options = {"eta": eta} if eta else {}
    torch.compiler.reset()
    compiled = torch.compile(_loop, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 3, 4, 4)
    for steps in (2, 3):
        one.set_timesteps(steps)
        results = []
        for run in (_loop, compiled):
            torch.manual_seed(0)
            results.append(run(one, x, **options))
        torch.testing.assert_close(*results)
    torch.compiler.reset()


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
        (lambda: _ready("DDPMScheduler").step(torch.zeros(1, 6, 4, 4), 100, X), "out must have the shape"),
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
