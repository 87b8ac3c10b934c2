"""CUDA graphs of compiled models, with a stand-in on the CPU: when they are captured, replayed, kept and refused."""

import gc
import logging
from functools import partial

import pytest
import torch
from cuda_graphs import NEEDS_CUDA
from models import make
from networks import assert_same_network
from torch import nn

import dd_kernels as dd
from dd_kernels.compile import Report, places
from dd_kernels.ops import cuda_graph


def compiled(model, **options):
    report = Report()
    return torch.compile(model, backend="dd_kernels", options={"report": report, **options}, dynamic=False), report


@torch.no_grad()
def assert_right(fast, model, *inputs):
    assert_same_network(fast(*inputs), model(*inputs))


def test_captured_once_per_shape_and_replayed(graphs_on_cpu):
    model, x, emb = make("latent-diffusion")
    fast, report = compiled(model)
    for batch in (2, 3, 2, 3, 2):
        assert_right(fast, model, torch.randn(batch, *x.shape[1:]), torch.randn(batch, emb.shape[1]))
    assert (graphs_on_cpu.captures, graphs_on_cpu.replays) == (2, 5)
    assert report.notes == []


def test_results_belong_to_the_caller(graphs_on_cpu):
    model, x, emb = make("latent-diffusion")
    fast, _ = compiled(model)
    with torch.no_grad():
        first = fast(x, emb)
        kept = first.clone()
        first.add_(1)
        fast(x + 1, emb)
        assert torch.equal(first, kept + 1)
        assert torch.equal(fast(x, emb), kept)


def test_changed_weights_count(graphs_on_cpu):
    model, x, emb = make("latent-diffusion")
    fast, _ = compiled(model)
    assert_right(fast, model, x, emb)
    with torch.no_grad():
        model.blocks[0].norm1.weight.mul_(2)
    assert_right(fast, model, x, emb)
    assert graphs_on_cpu.captures == 1
    # The weight moves to other memory.
    model.blocks[0].conv1.weight.data = model.blocks[0].conv1.weight.data.clone() * 0.5
    assert_right(fast, model, x, emb)
    assert graphs_on_cpu.captures == 2


def test_no_capture_where_gradients_are_asked_for(graphs_on_cpu):
    model, x, emb = make("latent-diffusion")
    fast, _ = compiled(model)
    y = fast(x, emb)
    y.sum().backward()
    assert graphs_on_cpu.captures == 0
    assert model.blocks[0].conv1.weight.grad is not None


def test_inference_mode_and_back(graphs_on_cpu):
    model, x, emb = make("latent-diffusion")
    fast, _ = compiled(model)
    with torch.inference_mode():
        inside = fast(x.clone(), emb.clone())
    assert_right(fast, model, x, emb)
    assert_same_network(inside, model(x, emb).detach())


@pytest.mark.parametrize("turn_off", [{"cuda_graphs": False}, None])
def test_turned_off(turn_off, graphs_on_cpu, monkeypatch):
    """No graph is captured with the option off, or where no input is on a device with CUDA graphs."""
    if turn_off is None:
        monkeypatch.setattr(cuda_graph, "DEVICE_TYPE", "cuda")
    model, x, emb = make("latent-diffusion")
    fast, report = compiled(model, **(turn_off or {}))
    assert_right(fast, model, x, emb)
    assert graphs_on_cpu.captures == 0
    assert report.notes == []


def test_within_another_capture(graphs_on_cpu):
    model, x, emb = make("latent-diffusion")
    fast, _ = compiled(model)
    graphs_on_cpu.capturing = True
    assert_right(fast, model, x, emb)
    assert graphs_on_cpu.captures == 0


class CannotBeCaptured(nn.Module):
    def forward(self, x):
        return x.cos()


class ReturnsAView(nn.Module):
    def forward(self, x):
        return x[:1], x * 2


class ReturnsTwoViews(nn.Module):
    def forward(self, x):
        y = x * 2
        return y[:1], y[1:]


class WritesToItsInput(nn.Module):
    def forward(self, x):
        x.add_(1)
        return x * 2


def scaled(x, t):
    return x * t.to(x.device).reshape(-1, 1)


def test_an_expanded_input(graphs_on_cpu):
    """A pipeline's ``t.expand(batch)`` is one number for all samples: it is written once. Windows overlap too."""
    fast, report = compiled(scaled)
    for t in (2.0, 3.0):
        assert_right(fast, scaled, torch.rand(3, 4), torch.tensor(t).expand(3))
        assert_right(fast, scaled, torch.rand(5).as_strided((3, 3), (1, 1)), torch.tensor(t).expand(3))
    assert (graphs_on_cpu.captures, graphs_on_cpu.replays) == (2, 4)
    assert report.notes == []


def test_a_number_on_the_host(graphs_on_cpu, monkeypatch):
    """A timestep that a pipeline keeps on the CPU beside images on a device, for which meta stands."""
    monkeypatch.setattr(cuda_graph, "DEVICE_TYPE", "meta")
    monkeypatch.setattr(places, "_storage", lambda x: x.untyped_storage()._cdata)  # meta has no addresses
    monkeypatch.setattr(torch.Tensor, "item", lambda x: pytest.fail("read back"))
    fast, report = compiled(scaled)
    with torch.no_grad():
        for t in (2.0, 3.0):
            assert fast(torch.empty(3, 4, device="meta"), torch.tensor(t)).device.type == "meta"
    assert (graphs_on_cpu.captures, graphs_on_cpu.replays) == (1, 2)
    assert report.notes == []

    fast, report = compiled(lambda x, t: (x * t, t + 1))
    with torch.no_grad():
        assert fast(torch.empty(3, 4, device="meta"), torch.tensor(2.0))[1] == 3
    assert graphs_on_cpu.captures == 1
    assert report.notes == ["no CUDA graph: a result is on the CPU"]


REFUSED = {
    CannotBeCaptured: "operation not permitted when stream is capturing",
    ReturnsAView: "a result is a view of an input",
    ReturnsTwoViews: "two results share their memory",
    WritesToItsInput: "the graph writes to an input",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_with_one_reason(kind, graphs_on_cpu, caplog):
    graphs_on_cpu.refused.add("aten::cos")
    model, x = kind(), torch.rand(3, 4)
    fast, report = compiled(model)
    with torch.no_grad(), caplog.at_level(logging.INFO, logger="dd_kernels.compile.cuda_graph"):
        for _ in range(3):
            mine, theirs = x.clone(), x.clone()
            results = (y if isinstance(y, tuple) else (y,) for y in (fast(mine), model(theirs)))
            assert all(map(torch.equal, *results))
            assert torch.equal(mine, theirs)
    assert graphs_on_cpu.replays == 0
    assert len(report.notes) == 1
    assert REFUSED[kind] in report.notes[0]
    assert report.notes[0] in str(report)
    assert len(caplog.records) == 1


def test_inputs_on_two_devices(graphs_on_cpu):
    fast, report = compiled(lambda x, other: x * other.shape[0] + other.new_zeros((), device="cpu"))
    with torch.no_grad():
        fast(torch.rand(3), torch.empty(2, device="meta"))
    assert graphs_on_cpu.captures == 0
    assert report.notes == ["no CUDA graph: its inputs are on cpu, meta"]


def test_the_ring_is_bounded_by_memory(graphs_on_cpu):
    """A quarter of the device's memory has room for two: the shape used least recently goes."""
    graphs_on_cpu.total = 2 * 4 * graphs_on_cpu.bytes_each
    model, x, emb = make("latent-diffusion")
    fast, _ = compiled(model)
    call = partial(assert_right, fast, model)
    inputs = {n: (torch.randn(n, *x.shape[1:]), torch.randn(n, emb.shape[1])) for n in (2, 3, 4)}
    for batch, captures in ((2, 1), (3, 2), (2, 2), (4, 3), (2, 3), (3, 4)):
        call(*inputs[batch])
        assert graphs_on_cpu.captures == captures


def test_captures_go_with_their_model(graphs_on_cpu):
    model, x, emb = make("latent-diffusion")
    fast, _ = compiled(model)
    before = len(cuda_graph._ring)
    assert_right(fast, model, x, emb)
    assert len(cuda_graph._ring) == before + 1
    del fast, model
    torch._dynamo.reset()
    gc.collect()
    assert len(cuda_graph._ring) == before


def test_by_accelerate(graphs_on_cpu):
    for wanted in (True, False):
        model, x, emb = make("latent-diffusion", blocks=1)
        with torch.no_grad():
            plain = model(x, emb)
            dd.accelerate(model, cuda_graphs=wanted)
            assert_same_network(model(x, emb), plain)
        assert graphs_on_cpu.captures == 1


def test_handed_on_to_inductor(graphs_on_cpu, monkeypatch):
    """What Inductor makes of the graph is what is captured."""
    seen = []
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda module, _: seen.append(1) or module.forward)
    model, x, emb = make("latent-diffusion", blocks=1)
    fast, _ = compiled(model, inductor=True)
    assert_right(fast, model, x, emb)
    assert_right(fast, model, x + 1, emb)
    assert (len(seen), graphs_on_cpu.captures, graphs_on_cpu.replays) == (1, 1, 2)


@NEEDS_CUDA
def test_a_number_on_the_host_of_a_gpu():
    fast, report = compiled(scaled)
    for t in (2.0, 3.0):
        assert_right(fast, scaled, torch.rand(3, 4).cuda(), torch.tensor(t))
    assert report.notes == []


@NEEDS_CUDA
def test_on_a_gpu():
    model, x, emb = (v.cuda() for v in make("latent-diffusion"))
    fast, report = compiled(model)
    for _ in range(3):
        x = torch.randn_like(x)
        with torch.no_grad():
            # cuDNN convolves in TF32, of 10 bits, where a last bit of its input decides how it rounds.
            torch.testing.assert_close(fast(x, emb), model(x, emb), rtol=1e-4, atol=1e-4)
    assert report.notes == []
