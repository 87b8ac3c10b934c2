"""A fused model equals the original, trains like it, says what it replaced, and can be restored exactly."""

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from fuse_cases import (
    MODELS,
    autoencoder,
    build,
    guided,
    improved,
    output,
    run,
    to_double,
    unet2d,
    unet2d_condition,
    unet2d_scale_shift,
)
from model_checks import assert_all_within_budget, assert_within_budget, double, randomise
from torch import nn

import dd_kernels
from dd_kernels.nn.fused import FusedModule

pytest.importorskip("diffusers")

fuse_module = sys.modules["dd_kernels.nn.fused"]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("make", MODELS)
def test_output_and_gradients_equal_within_the_error_budget(make, training):
    model, arguments = build(make)
    model.train(training)
    if training:
        # The mask of a dropout depends on the dtype; drawn once, both dtypes share it.
        for module in model.modules():
            if isinstance(module, nn.Dropout) and module.p > 0:
                module.forward = lambda x, p=module.p: x * (torch.rand(x.shape) > p) / (1 - p)
    exact = run(double(model), to_double(arguments))
    plain = run(model, arguments)
    dd_kernels.fuse(model)
    assert model.training == training
    assert_all_within_budget(run(model, arguments), plain, exact)


@pytest.mark.parametrize("make", MODELS)
def test_dropout_draws_the_same_masks(make):
    model, arguments = build(make)
    model.train()
    before = run(model, arguments)["output"]
    dd_kernels.fuse(model)
    torch.testing.assert_close(run(model, arguments)["output"], before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("make", MODELS)
def test_keys_stay_and_unfuse_restores_exactly(make):
    model, arguments = build(make)
    before = run(model, arguments)
    modules = {name: (module, type(module), dict(vars(module))) for name, module in model.named_modules()}
    state = model.state_dict()
    replaced = dd_kernels.fuse(model)
    assert model.state_dict().keys() == state.keys()
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(model.state_dict().values(), state.values(), strict=True))
    fused = {name for name, module in model.named_modules() if isinstance(module, FusedModule)}
    assert set(replaced) <= fused
    assert dd_kernels.fuse(model) == {}  # a second call finds nothing left, and does not complain

    assert set(dd_kernels.unfuse(model)) == fused
    for name, module in model.named_modules():
        same, kind, attributes = modules[name]
        assert module is same
        assert type(module) is kind
        assert vars(module).keys() == attributes.keys()
    assert all(value.equal(before[name]) for name, value in run(model, arguments).items())
    assert dd_kernels.unfuse(model) == []


@pytest.fixture
def calls(monkeypatch):
    """The options of every call of the op made by a fused norm."""
    made = []

    def record(*arguments, **options):
        made.append(options)
        return dd_kernels.group_norm_silu(*arguments, **options)

    monkeypatch.setattr(fuse_module, "group_norm_silu", record)
    return made


def kinds(calls):
    """How many calls did what."""
    words = [
        ("add " if c["pre_shift"] is not None else "")
        + ("scale " if c["scale"] is not None and c["shift"] is not None else "")
        + c["activation"]
        for c in calls
    ]
    return {word: words.count(word) for word in sorted(set(words))}


NORM, SILU = "GroupNorm", "GroupNorm, SiLU"

EMBED, SCALE = "time embedding, GroupNorm, SiLU", "GroupNorm, scale-shift, SiLU"


@pytest.mark.parametrize(
    ("make", "report", "made"),
    [
        (unet2d, {NORM: 4, SILU: 9, EMBED: 8}, {"none": 4, "silu": 9, "add silu": 8}),
        (unet2d_scale_shift, {NORM: 4, SILU: 10, SCALE: 9}, {"none": 4, "silu": 10, "add scale silu": 9}),
        (unet2d_condition, {NORM: 4, SILU: 10, EMBED: 9}, {"none": 4, "silu": 10, "add silu": 9}),
        (autoencoder, {NORM: 2, SILU: 22}, {"none": 2, "silu": 12, "add silu": 10}),
        (guided, {NORM: 2, SILU: 2}, {"none": 3, "silu": 3}),
        (improved, {NORM: 2, SILU: 2}, {"none": 3, "silu": 3}),
    ],
)
def test_it_says_what_it_replaced_and_does_that(make, report, made, calls):
    model, arguments = build(make)
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.GroupNorm)}
    replaced = dd_kernels.fuse(model)
    assert set(replaced) == norms
    assert {what: list(replaced.values()).count(what) for what in replaced.values()} == report
    output(model, arguments)
    assert kinds(calls) == made


def test_a_copy_of_a_fused_model_is_fused(calls):
    model, arguments = build(unet2d)
    dd_kernels.fuse(model)
    twin = copy.deepcopy(model)
    dd_kernels.unfuse(model)
    output(twin, arguments)
    assert len(calls) == 21


def test_channels_last_is_kept_by_norms_of_images_and_of_tokens():
    norm = nn.GroupNorm(2, 8)
    dd_kernels.fuse(norm)
    x = torch.randn(2, 8, 4, 6).contiguous(memory_format=torch.channels_last)
    assert norm(x).stride() == x.stride()
    tokens = torch.randn(2, 24, 8).transpose(1, 2)
    assert norm(tokens).stride() == tokens.stride()
    torch.testing.assert_close(norm(tokens), F.group_norm(tokens, 2, norm.weight, norm.bias))
    torch.testing.assert_close(norm(tokens[:, :, 0]), F.group_norm(tokens[:, :, 0], 2, norm.weight, norm.bias))


@pytest.mark.parametrize("make", [unet2d, guided])
def test_under_autocast(make):
    model, arguments = build(make)
    with torch.no_grad():
        exact = output(double(model), to_double(arguments))
        with torch.autocast("cpu", torch.bfloat16):
            plain = output(model, arguments)
            dd_kernels.fuse(model)
            ours = output(model, arguments)
    # A norm under autocast gives float32 in PyTorch, which costs the fused model one rounding where it ends in one.
    assert_within_budget(ours.float(), plain.to(ours.dtype).float(), exact)


def test_a_fused_block_compiles_to_one_graph():
    from diffusers.models.resnet import ResnetBlock2D

    block = randomise(ResnetBlock2D(in_channels=8, temb_channels=6, groups=2))
    model = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU())
    dd_kernels.fuse(block)
    dd_kernels.fuse(model)
    x, temb = torch.randn(2, 8, 4, 4), torch.randn(2, 6)
    compiled = torch.compile(lambda x, temb: block(model(x), temb), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, temb), block(model(x), temb))
