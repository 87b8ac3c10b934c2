"""Runs every plan of a CPU and of a GPU on tiny shapes; those of a GPU on CPU tensors with a fake clock."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dd_kernels as dd
from benchmarks import (
    bench_conv2d,
    bench_group_norm_silu,
    bench_growth,
    bench_model,
    bench_q_sample,
    bench_randn,
    bench_reverse_step,
    bench_throughput,
    bench_training,
    harness,
    inspect_step,
    machine,
    models,
    peak,
    shapes,
    tables,
    text,
    variants,
)
from dd_kernels.nn import CONFIGS, UNet
from dd_kernels.nn.blocks import GroupNormSiLU

pytestmark = pytest.mark.slow

TINY_IMAGES = [(2, 3, 8, 8), (1, 3, 4, 4)]
TINY_NORMS = [(2, 32, 4), (1, 64, 2)]
TINY_UNET = {"channels": (32, 64), "image_size": 8, "attention_resolutions": (4,), "num_res_blocks": 1}
TINY_ADM = {**TINY_UNET, "head_channels": 32}


@pytest.fixture
def tiny(monkeypatch):
    """Replaces the shapes and models of the plans by small ones."""
    both = dict.fromkeys(("cpu", "cuda"), TINY_IMAGES)
    for module in (bench_randn, bench_q_sample, bench_reverse_step):
        monkeypatch.setattr(module, "SHAPES", both)
    monkeypatch.setattr(bench_conv2d, "SHAPES", [(2, 16, 8, 8), (1, 16, 4, 4)])
    monkeypatch.setattr(bench_q_sample, "EVERY_PEER", {"cpu": None, "cuda": None})
    monkeypatch.setattr(bench_reverse_step, "MAIN", dict.fromkeys(both, (3, 3, 8, 8)))
    monkeypatch.setattr(bench_group_norm_silu, "MAIN", dict.fromkeys(both, TINY_NORMS))
    monkeypatch.setattr(bench_group_norm_silu, "EVERY_PEER", dict.fromkeys(both, TINY_NORMS[:1]))
    monkeypatch.setattr(shapes, "MODELS", {name: [(32, 4)] for name in shapes.MODELS})
    monkeypatch.setattr(bench_group_norm_silu, "MODELS", shapes.MODELS)
    monkeypatch.setattr(
        bench_group_norm_silu, "SELECTION", {k: [("cifar10", 2, None), ("imagenet64", 1, None)] for k in both}
    )
    monkeypatch.setitem(CONFIGS, "cifar10", {**CONFIGS["cifar10"], **TINY_UNET})
    monkeypatch.setitem(CONFIGS, "imagenet64", {**CONFIGS["imagenet64"], **TINY_ADM})
    sd = {"sample_size": 8, "block_out_channels": (32, 64), "cross_attention_dim": 16, "attention_head_dim": 4}
    sd |= {"layers_per_block": 1, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
    sd |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "norm_num_groups": 16}
    monkeypatch.setattr(models, "SD_UNET", {**models.SD_UNET, **sd})
    monkeypatch.setattr(models, "SD_TOKENS", (3, 16))
    monkeypatch.setattr(machine, "THREADS", (1,))
    monkeypatch.setattr(torch, "compile", lambda f, **options: f)  # the compiler is not what is tested


@pytest.fixture(params=["cpu", "cuda"])
def target(request, tiny):
    return request.getfixturevalue("cpu_target" if request.param == "cpu" else "gpu_target")


def measured(plans, target):
    rows = [harness.measure(plan, target) for plan in plans]
    assert text.aligned(text.cells(rows))
    return json.loads(json.dumps(rows))


def problems(row):
    return {name: peer for name, peer in row["peers"].items() if "not_measured" in peer}


def called(plans):
    """Returns the plans that call public functions."""
    return [plan for plan in plans if "op alone" not in str(plan)]


def test_conv2d(cpu_target, tiny):
    rows = measured(bench_conv2d.plans(cpu_target), cpu_target)
    assert all(not problems(row) and row["layout"] == "channels_last" for row in rows)
    assert all(0 < row["rms_error"] < (1e-2 if row["dtype"] == "bfloat16" else 1e-5) for row in rows)
    assert {row["case"] for row in rows} >= {"3 x 3, stride 1", "3 x 3, stride 2", "1 x 1, stride 1"}


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
    assert {row["model"] for row in rows} == {"imagenet64"}  # cifar10's one is among the main sizes
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
    assert line[heads.index("peers") :].count("x (") >= 2
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


def test_whole_steps_and_runs(target, monkeypatch):
    monkeypatch.setitem(CONFIGS, "digits", {**CONFIGS["digits"], "channels": (8, 16)})
    few = {
        kind: [replace(r, batch=min(r.batch, 2), dtype=torch.float32) for r in runs]
        for kind, runs in bench_throughput.RUNS.items()
    }
    monkeypatch.setattr(bench_throughput, "RUNS", few)
    monkeypatch.setattr(inspect_step, "REPEATS", 1)
    plans = bench_throughput.plans(target)
    wanted = ("cifar10 ddim 1", "imagenet64 ddim 1", "stable diffusion ddim 1", "whole", "default")
    kept = {word: plan for word in wanted for plan in plans if word in str(plan)}
    rows = measured(kept.values(), target)
    assert {row["case"].split()[0] for row in rows} >= {"cifar10", "imagenet64", "stable"}
    assert any(row.get("steps") == 10 for row in rows)
    for row in rows:
        allowed = {"dd_kernels, CUDA graph"} if target.kind == "cuda" else set()
        assert set(problems(row)) <= allowed, problems(row)
        for name, one in row.get("breakdown", {}).items():
            assert sum(one["share"].values()) == pytest.approx(1), name


@pytest.mark.parametrize(("name", "sampler"), [("cifar10", "ddim"), ("imagenet64", "ddpm"), ("digits", "ddim")])
def test_every_implementation_takes_the_same_step(name, sampler, cpu_target, tiny):
    """Ours, eager, reference and diffusers have the same weights and agree where no noise is drawn."""
    model = models.unet(name, cpu_target, torch.float32)
    x = torch.randn(2, model.config["in_channels"], 8, 8)
    with torch.no_grad():
        ours = models.ours(model, sampler, 2, "cpu")
        others = [models.eager(model, sampler, 2, "cpu"), models.diffusers_unet(model, sampler, 2, "cpu")]
        others.append(models.ours(model, sampler, 2, "cpu", backend="reference"))
        out = ours.model(x)
        for other in others:
            torch.testing.assert_close(other.model(x), out, rtol=1e-3, atol=1e-4)
            if sampler == "ddim":  # small values, because diffusers keeps the epsilon of a clipped x_0
                small = (x / 50, out / 50)
                torch.testing.assert_close(other.update(*small), ours.update(*small), rtol=1e-3, atol=1e-4)


def test_the_accelerated_stable_diffusion_unet_shares_its_weights_and_agrees(cpu_target, tiny):
    found = models.stable_diffusion("ddim", 2, cpu_target, torch.float32)
    ours, theirs = found["dd_kernels"], found["diffusers"]
    assert all(a is b for a, b in zip(ours.module.parameters(), theirs.module.parameters(), strict=True))
    assert ours.module._compiled_call_impl is not None
    assert theirs.module._compiled_call_impl is None
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(ours.model(x), theirs.model(x), rtol=1e-3, atol=1e-4)
        small = x / 50, theirs.model(x) / 50
        torch.testing.assert_close(ours.update(*small), theirs.update(*small), rtol=1e-3, atol=1e-4)


def test_no_weight_is_left_at_zero(cpu_target, tiny):
    model = models.unet("cifar10", cpu_target, torch.float32)
    assert all(parameter.any() for parameter in model.parameters() if parameter.ndim > 1)


def test_a_compiled_step_runs_its_model_once(cpu_target, tiny, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda f, **options: seen.append(options) or f)
    step = models.Denoiser(lambda x: seen.append("model") or x + 1, lambda x, out: 2 * out, torch.nn.Identity())
    assert models.compiled(step, "max-autotune")(torch.tensor(1.0)) == 4
    assert seen == [{"mode": "max-autotune", "dynamic": False}, "model"]


def test_a_missing_peer_is_named_and_stops_nothing(gpu_target, tiny, monkeypatch):
    for name in ("diffusers", "apex", "dd_kernels.integrations.diffusers.unet"):
        monkeypatch.setitem(sys.modules, name, None)
    plans = [*bench_q_sample.plans(gpu_target)[:1], *bench_reverse_step.plans(gpu_target)[:1]]
    runs = [bench_throughput.Run("cifar10", "ddim", 1), bench_throughput.Run("stable diffusion", "ddim", 1)]
    monkeypatch.setattr(bench_throughput, "RUNS", {"cuda": runs})
    whole, stable = bench_throughput.plans(gpu_target)
    plans.append(whole)
    for row in measured(plans, gpu_target):
        assert row["peers"]["diffusers"] == {"not_measured": "diffusers is not installed"}
        assert row["us"] > 0
    with pytest.raises(RuntimeError, match="diffusers is not installed"):
        harness.measure(stable, gpu_target)


def test_training(target, monkeypatch):
    few = {kind: [replace(r, batch=min(r.batch, 2)) for r in runs] for kind, runs in bench_training.RUNS.items()}
    monkeypatch.setattr(bench_training, "RUNS", few)
    monkeypatch.setitem(CONFIGS, "digits", {**CONFIGS["digits"], "channels": (8, 16)})
    plans = [plan for plan in bench_training.plans(target) if "cifar10" in str(plan) or plan.part == "compiled"]
    for row in measured(plans, target):
        assert not problems(row)
        assert row["memory"]["dd_kernels"]["saved_bytes"] > 0
        if "eager" in row["memory"]:  # ours keeps fewer bytes than PyTorch's GroupNorm and SiLU
            assert row["memory"]["dd_kernels"]["saved_bytes"] < row["memory"]["eager"]["saved_bytes"]


def test_a_whole_model_beside_every_peer(cpu_target, tiny, monkeypatch, capsys):
    monkeypatch.setattr(bench_model, "clock_of", lambda device: cpu_target.clock)
    monkeypatch.setattr(peak, "ROUNDS", 1000)
    monkeypatch.setattr("sys.argv", ["bench_model", "--model", "cifar10", "--batch", "2", "--rounds", "3"])
    monkeypatch.setattr(inspect_step, "REPEATS", 1)
    bench_model.main()
    out = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("| ")]
    by_name = {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}
    wanted = {"diffusers", "diffusers, channels_last", "torch.compile", "dd_kernels, nn.UNet", "diffusers bfloat16"}
    assert set(by_name) >= wanted, out
    assert "Not measured" not in out
    for name, line in by_name.items():
        assert 0 < float(line["RMS error"]) < (0.1 if "bfloat16" in name else 1e-5), line
        assert float(line["% of peak"].replace(",", "")) > 0
    assert sum(float(by_name["diffusers"][kind].rstrip("%") or 0) for kind in lines[0][7:]) == pytest.approx(100, abs=3)
    for bad in (["--batch", "0"], ["--rounds", "1"]):
        monkeypatch.setattr("sys.argv", ["bench_model", *bad])
        with pytest.raises(SystemExit):
            bench_model.main()
        assert bad[0] in capsys.readouterr().err


def test_an_implementation_that_cannot_be_made_is_named(cpu_target, tiny, monkeypatch):
    monkeypatch.setattr(
        bench_model, "_makers", lambda: {"broken": lambda net: 1 / 0, "diffusers again": bench_model._eager}
    )
    monkeypatch.setattr(peak, "ROUNDS", 1000)
    row = harness.measure(bench_model.plans(cpu_target)[0], cpu_target)
    assert row["peers"]["broken"] == {"not_measured": "ZeroDivisionError: division by zero"}
    assert row["peers"]["diffusers again"]["ratio"] > 0
    assert row["errors"]["diffusers"] == row["errors"]["diffusers again"]
    assert "broken: ZeroDivisionError" in tables.models([row])


def test_the_error_is_relative_and_of_float64():
    exact = torch.tensor([3.0, -4.0], dtype=torch.float64)
    assert bench_model.rms_error(torch.tensor([3.0, -4.5]), exact) == pytest.approx(0.1)


def test_the_peak_needs_a_compiler_or_takes_a_matrix_product(monkeypatch, few_rounds):
    monkeypatch.setattr(peak, "ROUNDS", 1000)
    assert peak.measured()["how"] == "multiply-adds on registers"
    peak._library.cache_clear()
    monkeypatch.setenv("CXX", "/nowhere/c++")
    without = peak.measured()
    peak._library.cache_clear()
    assert without["gflop_per_s"] > 0
    assert "no C++ compiler" in without["how"]


def test_growth(target, monkeypatch):
    axes = {"steps": (2, 3), "batch": (1, 2), "resolution": (16,), "channels": (32,)}
    base = {"steps": 1, "batch": 1, "resolution": 16, "channels": 32}
    monkeypatch.setattr(bench_growth, "AXES", dict.fromkeys(("cpu", "cuda"), axes))
    monkeypatch.setattr(bench_growth, "BASE", dict.fromkeys(("cpu", "cuda"), base))
    monkeypatch.setitem(bench_growth.DTYPE, "cuda", torch.float32)  # bfloat16 is slow on a CPU
    for name in ("channels", "num_res_blocks"):
        monkeypatch.setitem(CONFIGS["cifar10"], name, {"channels": (32, 64, 64, 64), "num_res_blocks": 1}[name])
    rows = measured(bench_growth.plans(target), target)
    assert [row["value"] for row in rows if row["case"] == "steps"] == [2, 3]
    two, three = (row["flops"] for row in rows if row["case"] == "steps")
    assert three == pytest.approx(1.5 * two)
    assert all(row["floor_flops_us"] > 0 and row["floor_bytes_us"] > 0 for row in rows)


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
        assert found == set(shapes.MODELS[name])


def test_saved_bytes_counts_a_storage_once_and_no_parameter():
    weight = torch.randn(4, 4, requires_grad=True)
    x = torch.randn(2, 4)
    run = lambda: (x @ weight.t()).square() + (x @ weight.t())  # noqa: E731 - squares keep their input
    saved = inspect_step.saved_bytes(run, {weight.untyped_storage().data_ptr()})
    assert saved == x.nbytes + 2 * 4 * 4


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_norm_and_the_sampler_are_found_in_a_profile(backend):
    step = models.Denoiser(lambda x: dd.group_norm_silu(x, 8, backend=backend), torch.add, torch.nn.Identity())
    share = inspect_step.breakdown(step, torch.randn(4, 32, 16, 16), "cpu")["share"]
    assert share["group_norm_silu"] > 0.1
    assert share["sampler"] > 0


def test_the_norms_kernels_are_known_by_name():
    root = Path(dd.__file__).parent
    cuda = "".join(path.read_text() for path in (root.parent / "csrc" / "group_norm_silu").glob("*.cu*"))
    found = re.findall(r"__global__[^{;]*?\w+_kernel\(const (\w+)", cuda)
    triton = "".join(path.read_text() for path in (root / "ops" / "group_norm_silu").glob("triton*.py"))
    found += re.findall(r"\b(_\w+)\[(?:grid|\()", triton)
    assert len(set(found)) >= 10, found
    theirs = ["void at::native::(anonymous)::RowwiseMomentsCUDAKernel<float>", "silu_kernel"]
    assert not [name for name in found + theirs if not inspect_step.NORM.search(name)]
    for other in (
        "implicit_convolve_sgemm",
        "reverse_step_kernel(ReverseStepArguments)",
        "vectorized_elementwise_kernel",
    ):
        assert not inspect_step.NORM.search(other)


def test_peak_memory_is_what_a_call_adds(cuda):
    cuda.reset_peak_memory_stats = lambda: None
    cuda.memory_allocated, cuda.max_memory_allocated = (lambda: 100), (lambda: 175)
    assert inspect_step.peak_bytes(lambda: None, cuda) == 75


def test_flops_of_a_convolution():
    conv = torch.nn.Conv2d(3, 8, 3, padding=1)
    x = torch.randn(2, 3, 4, 4)
    assert inspect_step.flops(lambda: conv(x)) == 2 * 2 * 8 * 16 * 27
