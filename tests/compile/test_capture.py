"""Models in the block styles of public codebases through the Dynamo backend: all norms, one graph, right numbers."""

import copy
import io
import subprocess
import sys
from collections import Counter

import pytest
import torch
from model_checks import assert_within
from models import CHANNELS, STYLES, make, to_bfloat16
from networks import assert_same_network
from torch import nn

from dd_kernels.compile import Report


def compiled(model, **options):
    """The model compiled by the backend's name, and the report."""
    report = Report()
    torch._dynamo.reset()
    return torch.compile(model, backend="dd_kernels", options={"report": report, **options}), report


def outputs(model, x, emb, train=False):
    """y, and with ``train`` the gradients of a weighted sum by every input and parameter."""
    if not train:
        with torch.no_grad():
            return [model(x, emb)]
    x, emb = x.detach().requires_grad_(), emb.detach().requires_grad_()
    y = model(x, emb)
    parameters = list(model.parameters())
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), [x, emb, *parameters])]


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("style", STYLES)
def test_every_norm_of_every_style(style, train):
    model, x, emb = make(style)
    exact = outputs(copy.deepcopy(model).double(), x.double(), emb.double(), train)
    fast, report = compiled(model)
    assert_same_network(outputs(fast, x, emb, train), exact)
    assert len(report.graphs) == 1
    wanted = {what: 2 * count for what, count in STYLES[style][2].items()}
    assert Counter(norm.fused for norm in report.norms) == wanted
    assert report.share == 1
    assert not any(norm.left for norm in report.norms)


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(
    "options", [{}, pytest.param({"inductor": True}, marks=pytest.mark.slow)], ids=["", "inductor"]
)
def test_models_of_one_class_with_other_numbers(options, train):
    """Dynamo makes an input of the graph of an eps that differs between models of a class; its norm is fused."""
    for eps in (1e-5, 1.0, 1e-2):
        model, x, emb = make("latent-diffusion")
        for norm in (module for module in model.modules() if isinstance(module, nn.GroupNorm)):
            norm.eps = eps
        exact = outputs(copy.deepcopy(model).double(), x.double(), emb.double(), train)
        report = Report()
        fast = torch.compile(model, backend="dd_kernels", options={"report": report, **options})
        assert_same_network(outputs(fast, x, emb, train), exact)
        assert report.share == 1, str(report)


def test_checkpointed_blocks():
    """Dynamo keeps a checkpointed block as a graph within the graph."""
    model, x, emb = make("guided-diffusion", checkpointed=True)
    exact = outputs(copy.deepcopy(model).double(), x.double(), emb.double(), train=True)
    fast, report = compiled(model)
    assert_same_network(outputs(fast, x, emb, train=True), exact)
    assert Counter(norm.fused for norm in report.norms) == {("silu",): 2, ("scale-shift", "silu"): 2}


@pytest.mark.parametrize("style", ["guided-diffusion", "latent-diffusion"])
def test_a_model_in_half_precision(style):
    model, x, emb = make(style)
    model, x, emb = to_bfloat16(model), x.bfloat16(), emb.bfloat16()
    (exact,) = outputs(copy.deepcopy(model).double(), x.double(), emb.double())
    fast, report = compiled(model)
    (actual,) = outputs(fast, x, emb)
    assert actual.dtype == torch.bfloat16
    assert report.share == 1
    assert_within(actual, exact, model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model, x, emb = make("guided-diffusion")
    with torch.autocast("cpu", dtype):
        (plain,) = outputs(model, x, emb)
        fast, report = compiled(model)
        (actual,) = outputs(fast, x, emb)
    assert actual.dtype == plain.dtype
    (exact,) = outputs(model.double(), x.double(), emb.double())
    assert_within(actual, exact, model, dtype=dtype)
    assert report.share == 1


def test_inference_mode():
    model, x, emb = make("latent-diffusion")
    plain = outputs(model, x, emb)
    fast, _ = compiled(model)
    with torch.inference_mode():
        actual = fast(x, emb)
    assert_same_network(actual, plain[0])


def test_a_batch_of_any_size_takes_few_graphs():
    """Dynamo captures one graph for the first size and one for any other; batch 1 is a size of its own."""
    model, _, _ = make("latent-diffusion")
    fast, report = compiled(model)
    for batch in (2, 3, 5, 7, 4):
        x, emb = torch.randn(batch, CHANNELS, 12, 12), torch.randn(batch, 16)
        assert_same_network(outputs(fast, x, emb), outputs(model, x, emb))
    assert len(report.graphs) == 2
    assert len(report.norms) == 4


def test_dropout_in_training_stays():
    model, x, emb = make("latent-diffusion")
    fast, report = compiled(model.train())
    torch.manual_seed(5)
    actual = fast(x, emb)
    torch.manual_seed(5)
    assert_same_network(actual, model(x, emb))
    assert report.share == 1


def test_changed_weights_modules_and_attributes_count():
    model, x, emb = make("latent-diffusion")
    fast, _ = compiled(model)
    outputs(fast, x, emb)
    with torch.no_grad():
        model.blocks[0].norm1.weight.mul_(2)
        model.blocks[0].conv1.weight.data.mul_(0.5)
    assert_same_network(outputs(fast, x, emb), outputs(model, x, emb))
    model.blocks[1].norm2 = nn.GroupNorm(4, CHANNELS)
    assert_same_network(outputs(fast, x, emb), outputs(model, x, emb))
    model.blocks[0].nonlinearity = torch.tanh
    assert_same_network(outputs(fast, x, emb), outputs(model, x, emb))


def test_hooks_see_what_they_would_see():
    model, x, emb = make("score_sde")
    seen = []
    model.blocks[0].norm0.register_forward_hook(lambda module, inputs, output: seen.append(output.detach().clone()))
    model.blocks[1].norm1.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2 + 1,))
    plain = outputs(model, x, emb)
    wanted = seen.pop()
    fast, _ = compiled(model)
    assert_same_network(outputs(fast, x, emb), plain)
    assert len(seen) == 1
    assert_same_network(seen[0], wanted)


class LowRank(nn.Module):
    """An adapter in a convolution's place."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Conv2d(base.in_channels, 2, 1, bias=False)
        self.up = nn.Conv2d(2, base.out_channels, 1, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def test_an_adapter_put_in_later():
    model, x, emb = make("score_sde")
    fast, report = compiled(model)
    outputs(fast, x, emb)
    model.blocks[0].conv0 = LowRank(model.blocks[0].conv0)
    assert_same_network(outputs(fast, x, emb), outputs(model, x, emb))
    assert report.share == 1


def test_the_model_is_not_touched():
    """Its classes, state_dict, copies and files are what they were; the compiled copy computes the same."""
    model, x, emb = make("guided-diffusion")
    classes, state = [type(m) for m in model.modules()], {k: v.clone() for k, v in model.state_dict().items()}
    plain = outputs(model, x, emb)
    fast, _ = compiled(model)
    outputs(fast, x, emb)
    assert [type(m) for m in model.modules()] == classes
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        torch.testing.assert_close(outputs(other, x, emb), plain, rtol=0, atol=0)


@pytest.mark.skipif(torch.__version__.startswith("2.10."), reason="torch 2.10's export fails on its own guard")
def test_an_export_is_the_models_own():
    """torch.export of a compiled model gives the model's own graph, which runs where dd_kernels is not installed."""
    model, x, emb = make("guided-diffusion")
    fast, _ = compiled(model)
    with torch.no_grad():
        fast(x, emb)
        exported = torch.export.export(fast, (x, emb))
        assert not [node for node in exported.graph.nodes if "dd_kernels" in str(node.target)]
        assert torch.equal(exported.module()(x, emb), model(x, emb))


@pytest.mark.slow
def test_the_name_needs_no_import_of_this_package():
    code = (
        "import sys, torch\n"
        "net, x = torch.nn.Sequential(torch.nn.GroupNorm(4, 16), torch.nn.SiLU()), torch.randn(2, 16, 4, 4)\n"
        "assert not [name for name in sys.modules if name.startswith('dd_kernels')]\n"
        "wanted = net(x)\n"
        "off = torch.compile(net, backend='dd_kernels')(x) - wanted\n"
        "assert off.abs().max() <= 2**-18 * wanted.abs().max()\n"
        "assert 'dd_kernels.compile.capture' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_handed_on_to_inductor():
    model, x, emb = make("latent-diffusion", blocks=1)
    fast, report = compiled(model, inductor=True)
    assert_same_network(outputs(fast, x, emb), outputs(model, x, emb))
    assert report.share == 1


def test_unknown_option():
    model, x, emb = make("latent-diffusion", blocks=1)
    with pytest.raises(Exception, match=r"options must be among .*; got 'inducter'"):
        outputs(torch.compile(model, backend="dd_kernels", options={"inducter": True}), x, emb)
    with pytest.raises(Exception, match=r"mode must be left out: .*; got 'reduce-overhead'"):
        outputs(torch.compile(model, backend="dd_kernels", mode="reduce-overhead"), x, emb)


def test_a_report_before_the_first_call_and_after():
    model, x, emb = make("latent-diffusion", blocks=1)
    fast, report = compiled(model)
    assert "not captured yet" in str(report)
    outputs(fast, x, emb)
    assert str(report).splitlines()[0] == "model: 1 graph, 2 norms, 2 in the fused kernel"
    assert {norm.name for norm in report.norms} == {"blocks.0.norm1", "blocks.0.norm2"}
