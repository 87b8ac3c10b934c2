"""Sampling by CUDA graphs, with a stand-in on the CPU: equal to the loop, captured once, and where it is not."""

import copy
import gc
import logging
import weakref

import pytest
import torch
from cuda_graphs import NEEDS_CUDA
from networks import assert_same_network
from torch import nn

import dd_kernels as dd
from dd_kernels.ops import cuda_graph
from dd_kernels.sampling import captured
from dd_kernels.sampling.guidance import classifier_guided

SCHEDULE = dd.linear_schedule(100)
SHAPE = (3, 2, 4, 4)
TABLES = {
    "ddpm": dd.ddpm(SCHEDULE, 6),
    "ddim": dd.ddim(SCHEDULE, 6),
    "eta": dd.ddim(SCHEDULE, 6, eta=1.0),
    "learned": dd.ddpm(SCHEDULE, 6, variance="learned_range"),
    "multistep": dd.dpm_solver(SCHEDULE, 6),
    "times between timesteps": dd.euler(SCHEDULE, 6),
    "threshold": dd.ddim(SCHEDULE, 6, clip=dd.DynamicThreshold(0.9)),
}


class Model(nn.Module):
    """A network that looks at x, t and a condition; counts the calls of its Python code."""

    def __init__(self, channels=2, out=None):
        super().__init__()
        self.conv, self.options = nn.Conv2d(channels, out or channels, 3, padding=1), {"scale": 1.0}
        self.calls = _Count()

    def forward(self, x, t, y=None, factor=1.0):
        self.calls.n += 1
        h = self.conv(x) * factor * self.options["scale"] + (t / 100).reshape(-1, 1, 1, 1)
        return torch.sin(h if y is None else h + y.reshape(-1, 1, 1, 1))


class _Count:
    n = 0


def both(model, table, **options):
    """The samples by the loop, and by what ``cuda_graph`` says."""
    shape = options.pop("shape", SHAPE)
    return dd.sample(model, shape, table, cuda_graph=False, **options), dd.sample(model, shape, table, **options)


def assert_same(model, table, **options):
    assert torch.equal(*both(model, table, **options))


@pytest.mark.parametrize("table", TABLES)
def test_equal_to_the_loop(table, graphs_on_cpu):
    model = Model(out=4 if table == "learned" else 2)
    assert_same(model, TABLES[table], seed=3)
    assert (graphs_on_cpu.captures, graphs_on_cpu.replays) == (1, 6)
    assert model.calls.n == 6 + 3, "twice before the capture, and in it"


def test_what_needs_no_other_capture(graphs_on_cpu):
    """Seeds, first samples, start, conditions, weights, tables of one length."""
    model = Model()
    with torch.no_grad():
        for seed, first, steps in ((0, 0, TABLES["ddpm"]), (2**40, 7, TABLES["eta"]), (1, 2, TABLES["ddpm"])):
            model.conv.weight.mul_(1.1)
            assert_same(model, steps, seed=seed, first_sample=first, model_kwargs={"y": torch.randn(3)})
            assert_same(model, steps, seed=seed, shape=torch.randn(SHAPE), model_kwargs={"y": torch.randn(3)})
    assert graphs_on_cpu.captures == 1


def test_what_is_another_capture(graphs_on_cpu):
    model = Model()
    variants = (
        {},
        {"shape": (2, *SHAPE[1:])},
        {"dtype": torch.bfloat16},
        {"model_kwargs": {"y": torch.ones(3)}},
        {"model_kwargs": {"factor": 0.5}},
        {"model_kwargs": {"factor": 0.25}},
        {"guidance_scale": 2.0, "uncond_kwargs": {}},
        {"guidance_scale": 3.0, "uncond_kwargs": {}},
        {"guidance_scale": 3.0, "uncond_kwargs": {}, "guidance_rescale": 0.5},
        {"backend": "reference"},
        {"noise": torch.randn(6, *SHAPE), "seed": 1},
        {"callback": lambda step: None},
    )
    for number, options in enumerate(variants, 1):
        for _ in range(2):
            assert_same(model, TABLES["ddpm"], **{"seed": 0, **copy.copy(options)})
        assert graphs_on_cpu.captures == number
    assert_same(model, dd.ddpm(SCHEDULE, 7), seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(model, TABLES["ddpm"], seed=0)
    with dd.use_backend("reference"):
        assert_same(model, TABLES["ddpm"], seed=0)
    assert graphs_on_cpu.captures == len(variants) + 3


def with_options(model):
    model.options["scale"] = 0.5


def with_a_submodule(model):
    model.conv = nn.Sequential(model.conv, nn.Tanh())


def with_another_weight(model):
    model.conv.weight = nn.Parameter(model.conv.weight * 2)


def with_training(model):
    model.train(not model.training)


def with_a_forward(model):
    model.forward = lambda x, t: x * 0.1


@pytest.mark.parametrize("change", [with_options, with_a_submodule, with_another_weight, with_training, with_a_forward])
def test_a_changed_model_is_captured_anew(change, graphs_on_cpu):
    model = Model()
    assert_same(model, TABLES["ddim"], seed=0)
    change(model)
    assert_same(model, TABLES["ddim"], seed=0)
    assert_same(model, TABLES["ddim"], seed=1)
    assert graphs_on_cpu.captures == 2


@pytest.mark.parametrize("table", ["ddpm", "multistep"])
@pytest.mark.parametrize("change", [with_options, with_another_weight])
def test_a_model_that_a_callback_changes(change, table, graphs_on_cpu):
    def run(cuda_graph):
        torch.manual_seed(1)
        model = Model()

        def callback(step):
            if step.index == 2:
                change(model)

        return dd.sample(model, SHAPE, TABLES[table], seed=0, callback=callback, cuda_graph=cuda_graph)

    assert torch.equal(run("auto"), run(False))
    assert graphs_on_cpu.replays == 3


def test_noise_of_the_caller(graphs_on_cpu):
    model, noise = Model(), torch.randn(6, *SHAPE)
    assert_same(model, TABLES["ddpm"], noise=noise, seed=0)
    assert_same(model, TABLES["ddpm"], noise=list(noise + 1), seed=0)
    results = [
        dd.sample(model, SHAPE, TABLES["eta"], generator=torch.Generator().manual_seed(2), cuda_graph=cuda_graph)
        for cuda_graph in (False, "auto")
    ]
    assert torch.equal(*results)
    assert graphs_on_cpu.captures == 1


def test_steps_belong_to_who_sees_them(graphs_on_cpu):
    model = Model()
    wanted = list(dd.sample_progressive(model, SHAPE, TABLES["ddpm"], seed=0, cuda_graph=False))
    seen = []
    dd.sample(model, SHAPE, TABLES["ddpm"], seed=0, callback=seen.append)
    again = list(dd.sample_progressive(model, SHAPE, TABLES["ddpm"], seed=0))
    for steps in (seen, again):
        for mine, theirs in zip(steps, wanted, strict=True):
            assert mine[:2] == theirs[:2]
            assert torch.equal(mine.x, theirs.x)
            assert torch.equal(mine.x0, theirs.x0)
    assert graphs_on_cpu.captures == 1


def test_two_loops_at_once(graphs_on_cpu):
    """The second does not take the first one's memory."""
    model = Model()
    wanted = [
        [step.x for step in dd.sample_progressive(model, SHAPE, TABLES["ddpm"], seed=s, cuda_graph=False)]
        for s in (0, 1)
    ]
    loops = [dd.sample_progressive(model, SHAPE, TABLES["ddpm"], seed=s) for s in (0, 1)]
    for first, second, *x in zip(*loops, *wanted, strict=True):
        assert torch.equal(first.x, x[0])
        assert torch.equal(second.x, x[1])
    assert graphs_on_cpu.replays == 6
    assert_same(model, TABLES["ddpm"], seed=0)


def test_a_loop_that_is_left_early(graphs_on_cpu):
    model = Model()
    loop = dd.sample_progressive(model, SHAPE, TABLES["ddpm"], seed=0)
    next(loop)
    loop.close()
    list(dd.sample_progressive(model, SHAPE, TABLES["ddpm"], seed=0))
    assert graphs_on_cpu.replays == 1 + 6


def test_batches_and_empty_batches(graphs_on_cpu):
    model = Model()
    assert_same(model, TABLES["ddpm"], seed=0, shape=(5, 2, 4, 4), batch_size=2)
    assert graphs_on_cpu.captures == 2
    assert_same(model, TABLES["ddpm"], seed=0, shape=(0, 2, 4, 4))
    assert graphs_on_cpu.captures == 2


def test_nothing_is_read_back_between_two_steps(graphs_on_cpu, monkeypatch):
    """Nothing is read back with a callback and a progress bar either, which count on the host."""
    model = Model()
    dd.sample(model, SHAPE, TABLES["ddpm"], seed=0, callback=lambda step: None)
    monkeypatch.setattr(torch.Tensor, "item", lambda x: pytest.fail("read back"))
    dd.sample(model, SHAPE, TABLES["ddpm"], seed=0, callback=lambda step: None, progress=True)
    assert graphs_on_cpu.captures == 1


def plain_model(x, t):
    return torch.sin(x) * 0.5


def test_a_function_only_where_it_is_asked_for(graphs_on_cpu):
    assert_same(plain_model, TABLES["ddpm"], seed=0)
    assert graphs_on_cpu.captures == 0
    for seed in (0, 1):
        wanted = dd.sample(plain_model, SHAPE, TABLES["ddpm"], seed=seed, cuda_graph=False)
        assert torch.equal(dd.sample(plain_model, SHAPE, TABLES["ddpm"], seed=seed, cuda_graph=True), wanted)
    assert graphs_on_cpu.captures == 1


class ClassifierGuided(Model):
    def forward(self, x, t):
        return classifier_guided(super().forward, lambda x, t: torch.cos(x).flatten(1).sum(1), SCHEDULE, 2.0)(x, t)


def test_guidance_by_a_classifier_is_captured_with_its_gradient(graphs_on_cpu):
    assert_same(ClassifierGuided(), TABLES["ddim"], seed=0)
    assert graphs_on_cpu.captures == 1


class Unhashable:
    __hash__ = None


class ReadsT(Model):
    def forward(self, x, t, **kwargs):
        return super().forward(x, t) * (0.5 if t[0].item() > 50 else 1)


def hooked():
    model = Model()
    model.conv.register_forward_hook(lambda module, inputs, output: output * 0.5)
    return model


class Takes(Model):
    def forward(self, x, t, other):
        return super().forward(x, t)


REFUSED = {
    "a function": (lambda: plain_model, {}, "the model is a function"),
    "hooks": (hooked, {}, "the model has hooks"),
    "a value read": (ReadsT, {}, "not permitted when stream is capturing"),
    "float64": (lambda: Model().double(), {"dtype": torch.float64}, "x or the noise is float64"),
    "float64 noise": (Model, {"noise": torch.randn(6, *SHAPE).double()}, "x or the noise is float64"),
    "noise of a function": (Model, {"noise": lambda step: torch.full(SHAPE, step / 6)}, "the noise is a function"),
    "an interval": (Model, {"uncond_kwargs": {}, "guidance_scale": 2.0, "guidance_interval": (20, 70)}, "an interval"),
    "an argument": (Takes, {"model_kwargs": {"other": Unhashable()}}, "is no part of a key"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_falls_back_with_one_reason(case, graphs_on_cpu, caplog):
    make, options, reason = REFUSED[case]
    model = make()
    captured._models.pop(model, None)
    with caplog.at_level(logging.INFO, logger="dd_kernels.sampling.captured"):
        for _ in range(2):
            assert_same(model, TABLES["ddpm"], **{"seed": 0, **options})
    assert graphs_on_cpu.replays == 0
    assert len(caplog.records) == 1
    assert reason in caplog.text


def test_off(graphs_on_cpu, monkeypatch):
    """No graph is captured with the flag off, for two steps, within a capture, or without CUDA."""
    model = Model()
    dd.sample(model, SHAPE, TABLES["ddpm"], seed=0, cuda_graph=False)
    dd.sample(model, SHAPE, dd.ddim(SCHEDULE, 2), seed=0)
    graphs_on_cpu.capturing = True
    dd.sample(model, SHAPE, TABLES["ddpm"], seed=0)
    graphs_on_cpu.capturing = False
    monkeypatch.setattr(cuda_graph, "DEVICE_TYPE", "cuda")
    dd.sample(model, SHAPE, TABLES["ddpm"], seed=0)
    assert graphs_on_cpu.captures == 0
    with pytest.raises(ValueError, match=r"cuda_graph must be True, False or 'auto'; got 'on'"):
        dd.sample(model, SHAPE, TABLES["ddpm"], cuda_graph="on")


def test_captures_go_with_the_model(graphs_on_cpu):
    model = Model()
    before = len(cuda_graph._ring)
    dd.sample(model, SHAPE, TABLES["ddpm"], seed=0)
    assert len(cuda_graph._ring) == before + 1
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert len(cuda_graph._ring) == before


def test_inference_mode_and_back(graphs_on_cpu):
    model = Model()
    with torch.inference_mode():
        inside = dd.sample(model, SHAPE, TABLES["ddpm"], seed=0)
    assert torch.equal(dd.sample(model, SHAPE, TABLES["ddpm"], seed=0), inside)


def test_an_accelerated_model_is_captured_with_its_step_alone(graphs_on_cpu):
    """Its own graph, which the sampler's would never replay, is not captured beside it."""
    model = Model()
    wanted = dd.sample(model, SHAPE, TABLES["ddim"], seed=0, cuda_graph=False)
    dd.accelerate(model)
    assert_same_network(dd.sample(model, SHAPE, TABLES["ddim"], seed=0), wanted)
    assert (graphs_on_cpu.captures, graphs_on_cpu.replays) == (1, 6)


class Drops(Model):
    def forward(self, x, t):
        return nn.functional.dropout(super().forward(x, t))


def test_a_capture_leaves_the_generators_where_they_were(graphs_on_cpu):
    """A capture's trial runs draw random numbers, and must not move the caller's generators."""
    model, states = Drops(), []
    for way in ("auto", False):
        torch.manual_seed(4)
        next(dd.sample_progressive(model, SHAPE, TABLES["ddim"], seed=0, cuda_graph=way))
        states.append(torch.randn(3))
    assert torch.equal(*states)
    assert graphs_on_cpu.captures == 1


@NEEDS_CUDA
@pytest.mark.parametrize("table", TABLES)
def test_on_a_gpu(table):
    model = Model(out=4 if table == "learned" else 2).cuda()
    for seed in (0, 1):
        assert_same(model, TABLES[table], seed=seed)
    assert model.calls.n < 2 * 6 + 4
