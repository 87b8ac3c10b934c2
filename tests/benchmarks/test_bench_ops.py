"""Runs every plan of an op, of a CPU and of a GPU, on tiny shapes; those of a GPU on CPU tensors with a fake clock."""

import re
import sys

import pytest
import torch
from tiny import measured, problems

from benchmarks import (
    bench_attention,
    bench_conv2d,
    bench_group_norm_silu,
    bench_q_sample,
    bench_randn,
    bench_reverse_step,
    bench_throughput,
    harness,
    variants,
)
from dd_kernels.nn import UNet
from dd_kernels.nn.blocks import GroupNormSiLU

pytestmark = pytest.mark.slow


def called(plans):
    """Returns the plans that call public functions."""
    return [plan for plan in plans if "op alone" not in str(plan)]


def test_conv2d(cpu_target, tiny):
    rows = measured(bench_conv2d.plans(cpu_target), cpu_target)
    assert all(not problems(row) and row["layout"] == "channels_last" for row in rows)
    assert all(0 < row["rms_error"] < (1e-2 if row["dtype"] == "bfloat16" else 1e-5) for row in rows)
    assert {row["case"] for row in rows} >= {"3 x 3, stride 1", "3 x 3, stride 2", "1 x 1, stride 1"}


def test_attention(cpu_target, tiny):
    rows = measured(bench_attention.plans(cpu_target), cpu_target)
    assert not any(map(problems, rows))
    assert all(0 < row["rms_error"] < (1e-2 if row["case"].endswith("bfloat16") else 1e-5) for row in rows)
    of = "products of float32"
    assert {row["case"] for row in rows} >= {f"of its tokens, {of}", f"to 77 tokens, {of}"}


@pytest.mark.parametrize("module", [bench_randn, bench_q_sample, bench_reverse_step])
def test_ops(module, target):
    rows = measured(called(module.plans(target)), target)
    for row in rows:
        assert row["how"] == ("clock" if target.kind == "cpu" else "graph"), row
        assert set(problems(row)) <= {"apex"}, row["peers"]
        assert row["threads"] == (1 if target.kind == "cpu" else None)


def test_reverse_step_has_a_row_in_place_beside_each_that_allocates(target):
    rows = measured(bench_reverse_step.plans(target)[:4], target)
    names = {str(plan) for plan in called(bench_reverse_step.plans(target))}
    assert {row["case"] for row in rows} == {"ddpm", "ddim", "ddpm in place", "ddim in place"}
    for name in names:
        if "contiguous" in name and "in place" not in name and "bfloat16" not in name and "(3, 3, 8, 8)" not in name:
            sampler = name.split()[1]
            assert name.replace(sampler, f"{sampler} in place", 1) in names


def test_group_norm_silu_at_the_shapes_of_models(target):
    rows = measured([plan for plan in bench_group_norm_silu.plans(target) if plan.part == "shapes"], target)
    assert {row["model"] for row in rows} == {"imagenet64"}  # the shape of cifar10 is measured among the main sizes
    assert all(set(problems(row)) <= {"apex"} for row in rows)


def test_group_norm_silu(target):
    plans = [plan for plan in called(bench_group_norm_silu.plans(target)) if plan.part == "ops"]
    rows = measured(plans, target)
    assert {row["case"] for row in rows} == {"forward", "backward"}
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}
    assert {row["layout"] for row in rows} == {"contiguous", "channels_last"}
    for row in rows:
        assert set(problems(row)) <= {"apex"}, row["peers"]
    assert any("torch.compile" in row["peers"] for row in rows if row["case"] == "backward")


def test_ops_alone(target):
    """Ops are called alone on a CPU only: the graph that a GPU replays holds nothing of a public function anyway."""
    modules = (bench_reverse_step, bench_q_sample, bench_group_norm_silu)
    plans = [plan for module in modules for plan in module.plans(target) if "op alone" in str(plan)]
    if target.kind == "cuda":
        assert plans == []
        return
    rows = measured(plans, target)
    ways = {"ddpm", "ddim", "noise given", "noise drawn", "forward", "backward"}
    assert {row["case"] for row in rows} == {f"{way}, op alone" for way in ways}
    assert all(len(row["peers"]) == 1 and not problems(row) for row in rows)
    assert all(plan.build().hot and len(plan.build().inputs) == 1 for plan in plans)


BY_HAND = {
    bench_randn: [],
    bench_q_sample: ["--noise", "drawn"],
    bench_reverse_step: ["--sampler", "ddim", "--in-place"],
    bench_group_norm_silu: ["--backward"],
    bench_conv2d: ["--kernel", "1"],
    bench_attention: ["--keys", "5"],
}


@pytest.mark.parametrize("module", BY_HAND, ids=lambda module: module.__name__)
def test_one_row_by_hand(module, cpu_target, tiny, monkeypatch, capsys):
    monkeypatch.setattr(variants, "clock_of", lambda device: cpu_target.clock)
    given = ["--shape", "2,32,4,4", "--dtype", "bfloat16", "--layout", "channels_last", "--threads", "1"]
    monkeypatch.setattr("sys.argv", ["bench", *given, *BY_HAND[module]])
    variants.main(module.Variant, module._case, module.__doc__)
    title, heads, line = capsys.readouterr().out.splitlines()
    assert "the median (and quartiles) of paired ratios of interleaved runs of the same shape and dtype" in title
    assert re.search(r"2x32x4x4  .*bfloat16 +channels_last +1 ", line)
    assert line[heads.index("peers") :].count("x (") >= (1 if module is bench_attention else 2)
    for bad in (["--shape", "2,3"], ["--threads", "0"], ["--dtype", "int8"]):
        monkeypatch.setattr("sys.argv", ["bench", *given, *bad])
        with pytest.raises(SystemExit):
            variants.main(module.Variant, module._case, module.__doc__)
        assert bad[0] in capsys.readouterr().err


def test_the_backward_pass_is_the_gradient(cpu_target, tiny):
    variant = bench_group_norm_silu.Variant((2, 32, 4, 4), torch.float32, "channels_last", backward=True)
    with torch.no_grad():
        case = bench_group_norm_silu._case(cpu_target, variant)
        for ours, theirs in zip(case.ours(*case.inputs[0]), case.peers["eager"](*case.inputs[0]), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_missing_peer_is_named_and_stops_nothing(gpu_target, tiny, monkeypatch):
    for name in ("diffusers", "apex", "dd_kernels.integrations.diffusers.unet"):
        monkeypatch.setitem(sys.modules, name, None)
    plans = [*bench_q_sample.plans(gpu_target)[:1], *bench_reverse_step.plans(gpu_target)[:1]]
    runs = [bench_throughput.Run("cifar10", "ddim", 1), bench_throughput.Run("stable diffusion", "ddim", 1)]
    monkeypatch.setattr(bench_throughput, "RUNS", {"cuda": runs})
    monkeypatch.setattr(bench_throughput, "AXES", {"cuda": {}})
    whole, stable = bench_throughput.plans(gpu_target)
    plans.append(whole)
    for row in measured(plans, gpu_target):
        assert row["peers"]["diffusers"] == {"not_measured": "diffusers is not installed"}
        assert row["us"] > 0
    with pytest.raises(RuntimeError, match="diffusers is not installed"):
        harness.measure(stable, gpu_target)


def test_the_shapes_are_those_of_the_models():
    for name in ("cifar10", "imagenet64", "imagenet256"):
        with torch.device("meta"):
            model = UNet.from_config(name)
            images = torch.empty(1, 3, *[model.config["image_size"]] * 2)
            y = None if model.config["num_classes"] is None else torch.zeros(1, dtype=torch.long)
        found = set()

        def note(module, args, found=found):
            if module.activation == "silu":
                found.add((args[0].shape[1], args[0].shape[2]))

        for module in model.modules():
            if isinstance(module, GroupNormSiLU):
                module.register_forward_pre_hook(note)
        model(images, torch.zeros(1, device="meta"), y)
        assert found == set(bench_group_norm_silu.MODELS[name])
