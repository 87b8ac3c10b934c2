"""fuse: what it fuses computes and trains as before, what differs is left alone, and unfuse restores exactly."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from model_checks import assert_all_within, double, randomise
from torch import nn

import dd_kernels
from dd_kernels.nn.fused import FusedSequential

fused_module = sys.modules["dd_kernels.nn.fused"]


class GroupNorm32(nn.GroupNorm):
    """As in guided-diffusion, but float64 stays: there is an exact answer."""

    def forward(self, x):
        return super().forward(x.to(torch.promote_types(x.dtype, torch.float32))).type(x.dtype)


class SiLU(nn.Module):
    """As in improved-diffusion."""

    def forward(self, x):
        return x * torch.sigmoid(x)


class Guided(nn.Module):
    """The calls of guided-diffusion's ResBlock with scale-shift: slices and single layers of a Sequential."""

    def __init__(self, norm=nn.GroupNorm, act=nn.SiLU):
        super().__init__()
        self.in_layers = nn.Sequential(norm(2, 8), act(), nn.Conv2d(8, 8, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(4, 16))
        self.out_layers = nn.Sequential(norm(4, 8), act(), nn.Dropout(0.2), nn.Conv2d(8, 8, 1))
        self.last = nn.Sequential(norm(1, 8, affine=False), nn.ReLU(), norm(2, 8))

    def forward(self, x, emb):
        h = self.in_layers[-1](F.avg_pool2d(self.in_layers[:-1](x), 2)) + F.avg_pool2d(self.in_layers(x), 2)
        scale, shift = self.emb_layers(emb)[..., None, None].chunk(2, dim=1)
        h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        return self.last(h + self.out_layers(h))


KINDS = [
    (nn.GroupNorm, nn.SiLU, "silu"),
    (GroupNorm32, SiLU, "silu"),
    (nn.GroupNorm, nn.Mish, "mish"),
    (nn.GroupNorm, nn.GELU, "gelu"),
    (nn.GroupNorm, lambda: nn.GELU("tanh"), "gelu_tanh"),
]


@pytest.fixture(autouse=True)
def small_maps(monkeypatch):
    """Small maps are fused too."""
    monkeypatch.setattr(fused_module, "_LEAST", 0)


def build(norm=nn.GroupNorm, act=nn.SiLU):
    return randomise(Guided(norm, act)).eval(), (torch.randn(2, 8, 6, 6), torch.randn(2, 4))


def run(model, arguments):
    """Output and every gradient, each dropout drawn from the same seed."""
    model.zero_grad()
    x = arguments[0].clone().requires_grad_()
    torch.manual_seed(1)
    out = model(x, *arguments[1:])
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"output": out.detach(), "x": x.grad, **gradients}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("norm", "act", "name"), KINDS)
def test_output_and_gradients_are_right(norm, act, name, training):
    model, arguments = build(norm, act)
    model.train(training)
    if training:  # the mask of a dropout depends on the dtype; drawn once, both dtypes share it
        model.out_layers[2].forward = lambda x: x * (torch.rand(x.shape) > 0.2) / 0.8
    exact = run(double(model), tuple(a.double() for a in arguments))
    assert dd_kernels.fuse(model) == {"in_layers.0": name, "out_layers.0": name}
    assert model.training == training
    assert_all_within(run(model, arguments), exact, model)


def test_keys_stay_and_unfuse_restores_exactly():
    model, arguments = build()
    before = run(model, arguments)
    modules = {name: (module, type(module), dict(vars(module))) for name, module in model.named_modules()}
    state = model.state_dict()
    dd_kernels.fuse(model)
    assert model.state_dict().keys() == state.keys()
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(model.state_dict().values(), state.values(), strict=True))
    assert dd_kernels.fuse(model) == {}  # a second call finds nothing to fuse, which is no error
    assert dd_kernels.unfuse(model) == ["in_layers", "out_layers"]
    for name, module in model.named_modules():
        same, kind, attributes = modules[name]
        assert module is same
        assert type(module) is kind
        assert vars(module).keys() == attributes.keys()
    assert all(value.equal(before[name]) for name, value in run(model, arguments).items())
    assert dd_kernels.unfuse(model) == []


@pytest.fixture
def calls(monkeypatch):
    """The activation of every call of the op made by a fused Sequential."""
    made = []

    def record(*arguments, activation):
        made.append(activation)
        return dd_kernels.group_norm_silu(*arguments, activation=activation)

    monkeypatch.setattr(fused_module, "group_norm_silu", record)
    return made


def pair(norm=None, act=None):
    return nn.Sequential(norm or nn.GroupNorm(2, 8), act or nn.SiLU(), nn.Conv2d(8, 8, 1))


X = torch.linspace(-3, 3, 2 * 8 * 4 * 4).reshape(2, 8, 4, 4)


def test_the_pair_is_one_call_of_the_op(calls):
    model = pair()
    expected = model(X)
    dd_kernels.fuse(model)
    torch.testing.assert_close(model(X), expected)
    assert calls == ["silu"]


def test_a_copy_of_a_fused_model_is_fused(calls):
    model = nn.Sequential(pair(), pair())
    dd_kernels.fuse(model)
    twin = copy.deepcopy(model)
    dd_kernels.unfuse(model)
    twin(X)
    assert calls == ["silu", "silu"]


def test_small_maps_stay_with_pytorch(calls, monkeypatch):
    monkeypatch.setattr(fused_module, "_LEAST", X.numel() + 1)
    model = pair()
    dd_kernels.fuse(model)
    model(X)
    assert calls == []


class Scaled(nn.GroupNorm):
    def forward(self, x):
        return super().forward(x) * 1.001


class Swish(nn.GroupNorm):
    """A norm that applies SiLU itself, as GLIDE's does."""

    def forward(self, x):
        return F.silu(super().forward(x))


class Misnamed(nn.Module):
    def forward(self, x):
        return torch.relu(x)


Misnamed.__name__ = "SiLU"


class Learned(nn.Module):
    def __init__(self):
        super().__init__()
        self.beta = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * torch.sigmoid(self.beta * x)


class Reversed(nn.Sequential):
    def forward(self, x):
        return self[1](self[0](x).flip(1))


@pytest.mark.parametrize(
    "make",
    [
        lambda: pair(norm=Scaled(2, 8)),
        lambda: pair(norm=Swish(2, 8)),
        lambda: pair(act=Misnamed()),
        lambda: pair(act=Learned()),
        lambda: pair(act=nn.ReLU()),
        lambda: Reversed(nn.GroupNorm(2, 8), nn.SiLU()),
        lambda: nn.Linear(2, 2),
    ],
)
def test_what_behaves_otherwise_is_left_alone(make):
    model = make()
    with pytest.warns(UserWarning, match=r"has no nn.Sequential with a GroupNorm and an activation"):
        assert dd_kernels.fuse(model) == {}
    assert not any(isinstance(module, FusedSequential) for module in model.modules())


@pytest.mark.parametrize("layer", [0, 1])
def test_hooks_put_in_later_are_called(layer, calls):
    model = pair()
    dd_kernels.fuse(model)
    model[layer].register_forward_hook(lambda module, inputs, output: output + 1)
    norm, act, conv = model
    expected = conv(act(norm(X)))
    torch.testing.assert_close(model(X), expected)
    assert calls == []


def test_a_layer_swapped_in_later_counts(calls):
    model = pair()
    dd_kernels.fuse(model)
    model[1] = nn.Tanh()
    norm, act, conv = model
    torch.testing.assert_close(model(X), conv(act(norm(X))))
    assert calls == []


def test_a_fused_model_compiles_to_one_graph(calls):
    model = pair()
    dd_kernels.fuse(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), model(X))


def test_what_is_not_a_module():
    for function in (dd_kernels.fuse, dd_kernels.unfuse):
        with pytest.raises(TypeError, match=r"model must be a torch.nn.Module; got dict"):
            function({})


def test_no_codebase_is_imported():
    code = (
        "import sys, torch, dd_kernels as dd; m = torch.nn.Sequential(torch.nn.GroupNorm(1, 2), torch.nn.SiLU());"
        "assert dd.fuse(m) == {'0': 'silu'}; dd.unfuse(m); assert 'diffusers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
