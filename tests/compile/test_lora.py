"""peft's adapters on an accelerated model: loading, scaling, switching and unloading give what eager gives."""

import copy

import pytest
import torch
from networks import BITS, assert_same_network, is_same_network

import dd_kernels as dd

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.slow  # ten captures of a whole U-Net
TARGETS = ["to_q", "to_v", "proj_in", "conv1", "time_emb_proj"]


def unet():
    torch.manual_seed(1)
    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "block_out_channels": (32, 64)}
    sizes = {"cross_attention_dim": 32, "attention_head_dim": 8, "norm_num_groups": 8, "layers_per_block": 1}
    names = ("UpBlock2D", "CrossAttnUpBlock2D")
    return diffusers.UNet2DConditionModel(sample_size=8, up_block_types=names, **blocks, **sizes).eval()


def config(rank=4, targets=TARGETS):
    return peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, init_lora_weights=False)


def add(name, **options):
    def step(model):
        torch.manual_seed(len(name))
        model.add_adapter(config(**options), adapter_name=name)

    return step


# What a user does to a model one after another, and whether its output changes by it.
STEPS = {
    "load": (add("first"), True),
    "scale": (lambda model: [m.set_scale("first", 0.25) for m in lora_layers(model)], True),
    "load another": (add("other", rank=2, targets=["to_q", "to_k"]), True),
    "both": (lambda model: model.set_adapters(["first", "other"], [0.5, 2.0]), True),
    "disable": (lambda model: model.disable_adapters(), True),
    "enable": (lambda model: model.enable_adapters(), True),
    "fuse": (lambda model: model.fuse_lora(), False),
    "unfuse": (lambda model: model.unfuse_lora(), False),
    "unload one": (lambda model: model.delete_adapters("other"), True),
    "unload all": (lambda model: model.unload_lora(), True),
}


def lora_layers(model):
    return [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]


def in_float64(model, inputs):
    """Returns the exact result."""
    return copy.deepcopy(model).double()(*(v.double() if v.is_floating_point() else v for v in inputs)).sample


def test_adapters_on_an_accelerated_model():
    """Each step is done to both models; the accelerated one is called between all of them."""
    plain = unet()
    fast = copy.deepcopy(plain)
    _, report = dd.accelerate(fast)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.randn(2, 5, 32)
    with torch.no_grad():
        before = fast(*inputs).sample
        for name, (step, changes) in STEPS.items():
            step(plain)
            step(fast)
            actual = fast(*inputs).sample
            assert_same_network(actual, in_float64(plain, inputs))
            assert is_same_network(actual, before) is not changes, name
            before = actual
    assert report.share > 0.8
    # A scale that has changed is a number that the graph reads.
    assert all(note.startswith("not recorded: ") for note in report.networks[0].notes)
    assert lora_layers(fast) == []


def test_an_adapter_is_trained_through_an_accelerated_model():
    """Its gradients are eager's; the frozen weights get none."""
    plain = unet()
    add("first")(plain)
    fast = copy.deepcopy(plain)
    dd.accelerate(fast)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.randn(2, 5, 32)
    exact = copy.deepcopy(plain).double()
    gradients = []
    for model in (fast, plain, exact):
        given = [v.double() if model is exact and v.is_floating_point() else v for v in inputs]
        model(*given).sample.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all("lora" in name for name in gradients[0])
    largest = max(g.abs().max() for g in gradients[2].values())
    for name, g in gradients[2].items():
        assert (gradients[0][name] - g).abs().max() <= 2.0**-BITS * largest, name
