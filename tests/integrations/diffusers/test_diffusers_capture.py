"""The schedulers' loops on a device that is never asked, and in one graph of torch.compile."""

from __future__ import annotations

import importlib
import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

theirs = pytest.importorskip("diffusers")

from cuda_graph_stand_in import storages  # noqa: E402
from cuda_graphs import NEEDS_CUDA, capture  # noqa: E402
from scheduler_cases import NAMES, denoise  # noqa: E402

from dd_kernels import backend as backends  # noqa: E402
from dd_kernels.integrations import diffusers as ours  # noqa: E402
from dd_kernels.ops.cuda_graph import Capture  # noqa: E402

# (class, its options, those of step)
OPTIONS = (
    ("DDPMScheduler", {}, {}),
    ("DDPMScheduler", {"timestep_spacing": "trailing", "num_train_timesteps": 37}, {}),
    ("DDPMScheduler", {"variance_type": "learned", "thresholding": True}, {}),
    ("DDPMScheduler", {"variance_type": "learned_range", "prediction_type": "v_prediction"}, {}),
    ("DDPMScheduler", {"variance_type": "fixed_large", "rescale_betas_zero_snr": True}, {}),
    ("DDIMScheduler", {}, {}),
    ("DDIMScheduler", {"set_alpha_to_one": False, "steps_offset": 1}, {"eta": 1.0}),
    ("DDIMScheduler", {"thresholding": True, "timestep_spacing": "linspace"}, {"use_clipped_model_output": True}),
    ("DDIMScheduler", {"prediction_type": "sample", "clip_sample": False}, {"eta": 0.3, "variance_noise": ...}),
    ("DDIMInverseScheduler", {"timestep_spacing": "trailing"}, {}),
    ("UnCLIPScheduler", {}, {}),
    ("UnCLIPScheduler", {"variance_type": "learned_range", "prediction_type": "sample"}, {}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, {}),
    ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "prediction_type": "v_prediction"}, {"s_churn": 1.0}),
    ("EulerAncestralDiscreteScheduler", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, {}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, {}),
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, {}),
    ("LCMScheduler", {}, {}),
    ("LCMScheduler", {"clip_sample": True, "prediction_type": "v_prediction"}, {}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, {}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3, "thresholding": True}, {}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"}, {}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {"variance_noise": ...}),
)
ANCESTRAL = ("DDPMScheduler", "UnCLIPScheduler")
EVERY_OPTION = pytest.mark.parametrize(("name", "config", "options"), OPTIONS)


class StaysOnDevice(TorchDispatchMode):
    """Raises where a value goes from the host to the device; reading a meta tensor raises by itself."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        if any(x.device.type != "meta" for x in tensors):
            raise RuntimeError(f"{func} touches the host: {[(tuple(x.shape), x.device) for x in tensors]}")
        return result


def _denoise_on_device(one: Any, config: dict, options: dict, copies: bool = False) -> int:
    """Runs a loop on meta tensors, which have no values to read, twice; how often the second drew noise."""
    one.set_timesteps(5, device="meta")
    x = torch.empty(2, 3, 4, 4, device="meta")
    options = {key: x if value is ... else value for key, value in options.items()}
    learned = config.get("variance_type", "").startswith("learned")
    drawn: list[int] = []
    randn = torch.randn

    def loop() -> None:
        drawn.clear()
        denoise(one, x, learned=learned, copies=copies, **options)
        if hasattr(one, "add_noise"):
            assert one.add_noise(x, x, one.timesteps[:2]).shape == x.shape

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn", lambda *a, **k: drawn.append(1) or randn(*a, **k))
        loop()  # the first loop uploads the tables
        with StaysOnDevice():
            loop()
    return len(drawn)


def _draws(name: str, config: dict, options: dict) -> bool:
    """Whether the steps of a scheduler draw noise."""
    if "variance_noise" in options:
        return False
    if name in (*ANCESTRAL, "LCMScheduler", "EulerAncestralDiscreteScheduler"):
        return True
    by_option = options.get("eta", 0) > 0 or options.get("s_churn", 0) > 0
    return by_option or config.get("stochastic_sampling", False) or config.get("algorithm_type", "").startswith("sde")


@EVERY_OPTION
@pytest.mark.parametrize(
    ("backend", "noise"), [("reference", "generator"), ("triton", "generator"), ("triton", "philox")]
)
def test_no_step_asks_the_device(
    name: str, config: dict, options: dict, backend: str, noise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is read back, and nothing uploaded after the first loop, as a CUDA graph requires."""
    if backend == "triton":  # everything runs but the launch of the kernel
        pytest.importorskip("triton")
        monkeypatch.setattr(backends, "choose", lambda *a, **k: "triton")
        for op in ("q_sample", "reverse_step"):
            monkeypatch.setattr(importlib.import_module(f"dd_kernels.ops.{op}.triton"), op, lambda *a: None)
    one = getattr(ours, name)(**config, noise=noise)
    one.set_timesteps(5)
    draws = noise == "generator" and _draws(name, config, options)
    # DDPM has no noise at timestep 0, LCM none at the last step. A copy of a timestep does not tell what it is: noise
    # is drawn, and left out by its row.
    without = {"LCMScheduler": 1}.get(name, sum(t <= 0 for t in one.timesteps.tolist()) if name in ANCESTRAL else 0)
    assert _denoise_on_device(one, config, options) == (5 - without if draws else 0)
    assert _denoise_on_device(one, config, options, copies=True) == (5 if draws else 0)


@pytest.mark.parametrize("name", NAMES)
def test_every_step_of_diffusers_asks_the_device(name: str) -> None:
    with pytest.raises((RuntimeError, NotImplementedError), match=r"item\(\)|nonzero\(\)|touches the host"):
        _denoise_on_device(getattr(theirs, name)(), {}, {})


def test_a_timestep_per_sample_is_not_read() -> None:
    x = torch.empty(2, 3, 4, 4, device="meta")
    for name in ("DDPMScheduler", "DDIMScheduler"):
        one = getattr(ours, name)()
        one.set_timesteps(10, device="meta")
        assert one.step(x, torch.empty(2, dtype=torch.int64, device="meta"), x).prev_sample.shape == x.shape
        assert one.add_noise(x, x, one.timesteps[:2]).shape == x.shape
        assert one.alphas_cumprod.device.type == "meta", "where theirs leaves it"


def _launches(capture: Capture[Tensor]) -> Counter[str]:
    """Counts what a capture launches: the operators that make or write a tensor of samples."""
    counts: Counter[str] = Counter()
    for func, args, kwargs, out in capture._graph.recorder.calls:
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        is_view = not writes and bool(storages(out) & storages((args, kwargs)))
        big = any(isinstance(x, Tensor) and x.ndim > 1 for x in tree_leaves((args, kwargs, out)))
        if big and not is_view and "empty" not in func._schema.name:
            counts[func._schema.name] += 1
    return counts


@EVERY_OPTION
@pytest.mark.parametrize("noise", ["generator", "philox"])
def test_a_step_is_one_launch_that_a_graph_replays(
    name: str, config: dict, options: dict, noise: str, graphs_on_cpu: Any
) -> None:
    """A captured loop is replayed from another x; each step of it is the kernel, and the noise that torch draws.

    Beside them Euler scales the model's input and adds its churn, LCM mixes its clipped x_0, and a threshold sorts.
    """
    one = getattr(ours, name)(**config, noise=noise)
    one.set_timesteps(5)
    x = torch.randn(2, 3, 4, 4)
    options = {key: torch.randn_like(x) if value is ... else value for key, value in options.items()}
    learned = config.get("variance_type", "").startswith("learned")

    def loop() -> Tensor:
        return denoise(one, x, learned=learned, timesteps=one.timesteps.tolist(), **options)

    capture = Capture(loop, x.device, x)
    x.copy_(torch.randn_like(x))
    torch.manual_seed(0)
    replayed = capture.replay().clone()
    torch.manual_seed(0)
    assert torch.equal(replayed, loop())

    found = _launches(capture)
    churns, scales = options.get("s_churn", 0) > 0, "Euler" in name and "Flow" not in name
    assert found.pop("dd_kernels::reverse_step") == 5 * (1 + churns)
    without = {"LCMScheduler": 1}.get(name, sum(t <= 0 for t in one.timesteps.tolist()) if name in ANCESTRAL else 0)
    assert found.pop("aten::randn", 0) == (5 - without if noise == "generator" and _draws(name, config, options) else 0)
    assert found.pop("dd_kernels::q_sample", 0) == 5 * (name == "LCMScheduler" and config.get("clip_sample", False))
    if "thresholding" not in config:
        model = {"aten::mul": 10, "aten::sin": 5} | dict.fromkeys(("aten::abs", "aten::add", "aten::cat"), 5 * learned)
        assert found == Counter(model | {"aten::div": 5 * scales})


@pytest.mark.parametrize("variance_type", ["fixed_small_log", "learned_range"])
def test_unclip_steps_between_timesteps_that_only_the_device_knows(variance_type: str) -> None:
    """Pairs of timesteps that differ by one, that are neighbours in the list, or neither, step as on the host."""
    one = ours.UnCLIPScheduler(variance_type=variance_type)
    one.set_timesteps(7)
    x, out = torch.randn(2, 3, 3, 4, 4).unbind()
    out = torch.cat((out, out.tanh()), dim=1) if variance_type == "learned_range" else out
    listed = one.timesteps.tolist()
    pairs = [(500, 499), (listed[2], listed[3]), (700, 100), (listed[-2], 0), (0, -1)]

    def step(t: Any, prev: Any) -> Tensor:
        return one.step(out, t, x, prev, generator=torch.Generator().manual_seed(0)).prev_sample

    expected = [step(*pair) for pair in pairs]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(one), "_value", lambda self, t: None)
        for pair, wanted in zip(pairs, expected, strict=True):
            torch.testing.assert_close(step(*(torch.tensor(t) for t in pair)), wanted)
        mixed = step(torch.tensor([500, 700, 0]), torch.tensor([499, 100, -1]))
        assert step(torch.tensor(1001), torch.tensor(5)).isnan().all(), "out of range"
    torch.testing.assert_close(mixed, torch.stack([expected[i][n] for n, i in enumerate((0, 2, 4))]))


@NEEDS_CUDA
@EVERY_OPTION
@pytest.mark.parametrize("noise", ["generator", "philox"])
def test_a_whole_loop_captures(name: str, config: dict, options: dict, noise: str) -> None:
    """Replayed from another x, with the noise that the generator's seed gives where it is drawn at all."""
    one = getattr(ours, name)(**config, noise=noise)
    one.set_timesteps(5, device="cuda")
    x, z = torch.randn(2, 2, 3, 4, 4, device="cuda").unbind()
    options = {key: z if value is ... else value for key, value in options.items()}
    options["learned"] = config.get("variance_type", "").startswith("learned")
    graph, result = capture(lambda: denoise(one, x, **options))
    x.copy_(torch.randn_like(x))
    torch.cuda.manual_seed(0)
    graph.replay()
    torch.cuda.manual_seed(0)
    assert result.equal(denoise(one, x, **options))


@EVERY_OPTION
@pytest.mark.parametrize("noise", [pytest.param("generator", marks=pytest.mark.slow), "philox"])
def test_a_whole_loop_compiles(name: str, config: dict, options: dict, noise: str) -> None:
    one = getattr(ours, name)(**config, noise=noise)
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(denoise, fullgraph=True, backend=counter)
    x = torch.randn(2, 3, 4, 4)
    options = {key: torch.randn_like(x) if value is ... else value for key, value in options.items()}
    options["learned"] = config.get("variance_type", "").startswith("learned")
    for _ in range(4):  # as a pipeline does: the same again is not compiled again, but once for another seed
        one.set_timesteps(2)
        results = []
        for run in (denoise, compiled):
            torch.manual_seed(0)
            results.append(run(one, x, **options))
        torch.testing.assert_close(*results)
    assert counter.frame_count <= 1 + (noise == "philox")
    torch.compiler.reset()


def test_what_is_changed_after_compiling_counts() -> None:
    one = ours.DDIMScheduler()
    one.set_timesteps(3)
    torch.compiler.reset()
    compiled = torch.compile(denoise, fullgraph=True, backend="eager")
    x = torch.randn(1, 3, 4, 4)

    def check() -> Tensor:
        result = compiled(one, x)
        torch.testing.assert_close(result, denoise(one, x))
        return result

    seen = [check()]
    one.alphas_cumprod = one.alphas_cumprod**1.1
    seen.append(check())
    one.final_alpha_cumprod = torch.tensor(0.9)
    seen.append(check())
    one.timesteps = torch.tensor([800, 300, 0])
    seen.append(check())
    one.register_to_config(prediction_type="v_prediction")
    seen.append(check())
    one.set_timesteps(4)
    seen.append(check())
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(seen))
    torch.compiler.reset()


def test_several_tables_in_one_graph() -> None:
    """An inpainting step: the known part gets its noise, the rest is denoised; eta may change on the way."""
    one = ours.DDIMScheduler()
    one.set_timesteps(3)
    x, known, z = torch.randn(3, 2, 3, 4, 4).unbind()

    def loop(x: Tensor) -> Tensor:
        for eta, t in zip((1.0, 0.5, 0.0), one.timesteps, strict=True):
            x = one.step(0.5 * torch.sin(x), t, x, eta=eta, variance_noise=z if eta else None).prev_sample
            x = torch.where(known > 0, one.add_noise(known, z, t.reshape(1)), x)
            x = x + one.get_velocity(x, z, t.reshape(1))
        return x

    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(loop, fullgraph=True, backend="aot_eager")(x), loop(x))
    torch.compiler.reset()
