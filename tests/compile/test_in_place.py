"""Networks accelerated in one process: each has its own graphs, and the report says where Dynamo runs none."""

import pytest
import torch
from models import make
from networks import assert_same_network

import dd_kernels as dd
from dd_kernels.compile import in_place

LIMIT = torch._dynamo.config.recompile_limit
ISOLATED = "isolate_recompiles" in torch.compile.__kwdefaults__


def runs_of(model, report, *inputs):
    """Returns how many graphs a second call runs."""
    with torch.no_grad():
        model(*inputs)
        before = report.networks[0].runs
        model(*inputs)
    return report.networks[0].runs - before


class Broken(torch.nn.Module):
    """A model with a break of its graph in its own forward."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.GroupNorm(4, 16)

    def forward(self, x):
        y = torch.nn.functional.silu(self.norm(x))
        torch._dynamo.graph_break()
        return y + 1


def test_more_models_of_a_class_than_dynamo_recompiles():
    for _ in range(LIMIT + 2):
        model, x, emb = make("latent-diffusion", blocks=1)
        _, report = dd.accelerate(model)
        assert runs_of(model, report, x, emb) == 1
        assert report.networks[0].notes == []


def test_more_models_with_a_graph_break_than_dynamo_recompiles():
    runs = []
    for _ in range(LIMIT + 2):
        model = Broken()
        runs.append(runs_of(model, dd.accelerate(model)[1], torch.randn(1, 16, 8, 8)))
    assert runs[0] == 2
    assert not ISOLATED or runs == [2] * len(runs)


def test_the_norms_of_each_model_keep_their_numbers():
    """Dynamo makes an input of a number that differs between calls of one function; groups must be none."""
    for eps, groups in ((1e-5, 4), (1e-6, 8), (1e-3, 2)):
        model = torch.nn.Sequential(torch.nn.GroupNorm(groups, 16, eps=eps), torch.nn.SiLU(), torch.nn.Flatten())
        _, report = dd.accelerate(model)
        with torch.no_grad():
            model(torch.randn(1, 16, 8, 8))
        assert [(norm.fused, norm.kept) for norm in report.networks[0].norms] == [(("silu",), None)]


def test_a_call_that_dynamo_gives_up_on_is_noted(caplog):
    """Each number as an argument is a graph of its own."""

    class Scaled(torch.nn.Module):
        def forward(self, x, name):
            return x + len(name)

    model = Scaled()
    _, report = dd.accelerate(model)
    limit = in_place.GRAPHS if ISOLATED else LIMIT
    for i in range(limit):
        model(torch.ones(4), "n" * i)
    assert report.networks[0].notes == []
    for i in range(limit, limit + 3):
        assert torch.equal(model(torch.ones(4), "n" * i), torch.ones(4) + i)
    assert report.networks[0].notes == [in_place._GAVE_UP]
    assert in_place._GAVE_UP in str(report)
    assert "Scaled: PyTorch ran a call eagerly" in caplog.text


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_that_come_and_go_after_a_call(register):
    """They are called as in eager use; a hook of another model captures nothing."""
    model, x, emb = make("latent-diffusion", blocks=1)
    _, report = dd.accelerate(model)
    seen = []

    def is_right(graphs):
        seen.clear()
        result = model(x, emb)
        calls = len(seen)
        assert_same_network(result, model._call_impl(x, emb))
        assert len(seen) == 2 * calls
        assert len(report.networks[0].graphs) == graphs
        return calls

    def hook(module, inputs, output=None):
        seen.append(1)
        return inputs[0] * 2 if output is None else output * 2

    with torch.no_grad():
        assert is_right(graphs=1) == 0
        torch.nn.Linear(1, 1).register_forward_hook(hook)
        assert is_right(graphs=1) == 0
        first, second = (getattr(layer, register)(hook) for layer in (model.blocks[0].norm1, model.blocks[0].conv1))
        assert is_right(graphs=2) == 2
        assert is_right(graphs=2) == 2
        first.remove()
        assert is_right(graphs=3) == 1
        second.remove()
        assert is_right(graphs=4) == 0


@pytest.mark.parametrize("order", ["before", "after"])
def test_within_a_model_that_is_compiled(order):
    model, x, emb = make("latent-diffusion", blocks=1)
    with torch.no_grad():
        plain = model(x, emb)
        _, report = dd.accelerate(model)
        if order == "before":
            model(x, emb)
        outer = torch.compile(lambda x, emb: model(x, emb) * 2, backend="eager", fullgraph=True)
        assert_same_network(outer(x, emb), plain * 2)
    assert report.networks[0].notes == []


def test_a_network_that_divides_its_batch_by_its_frames_is_captured_for_each_size():
    """Otherwise the second size would take more than half an hour, see ``in_place``; here the sizes stay numbers."""

    class Decoder(torch.nn.Module):
        def forward(self, sample, image_only_indicator, num_frames=1):
            samples = sample.shape[0] // num_frames
            return sample.reshape(samples, num_frames, -1).cumsum(1) + image_only_indicator[..., None]

    class Vae(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = Decoder()

        def forward(self, z, frames):
            return self.decoder(z, torch.zeros(z.shape[0] // frames, frames), num_frames=frames)

    fast, report = dd.accelerate(Vae())
    with torch.no_grad():
        for samples in (1, 8, 4, 8):
            z = torch.randn(2 * samples, 3)
            assert fast(z, 2).equal(Vae()(z, 2))
    assert len(report.networks[0].graphs) == 3


def test_a_traced_module_within_a_network():
    """It has no signature to look at, and PyTorch runs it as it is."""
    x = torch.randn(2, 16, 4, 4)
    traced = torch.jit.trace(torch.nn.Sigmoid(), x)
    model = torch.nn.Sequential(torch.nn.GroupNorm(4, 16), traced)
    with torch.no_grad():
        plain = model(x)
        fast, _ = dd.accelerate(model)
        assert_same_network(fast(x), plain)
