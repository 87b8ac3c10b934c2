"""Runs the plans of whole models at tiny sizes; those of a GPU on CPU tensors with a fake clock."""

from dataclasses import replace

import pytest
import torch
from tiny import measured, problems

import dd_kernels as dd
from benchmarks import bench_model, bench_throughput, bench_training, harness, machine, models, tables
from dd_kernels.nn import CONFIGS

pytestmark = pytest.mark.slow


def test_whole_steps_and_runs(target, monkeypatch):
    monkeypatch.setitem(CONFIGS, "digits", {**CONFIGS["digits"], "channels": (8, 16)})
    few = {
        kind: [replace(r, batch=min(r.batch, 2), dtype=torch.float32) for r in runs]
        for kind, runs in bench_throughput.RUNS.items()
    }
    monkeypatch.setattr(bench_throughput, "RUNS", few)
    monkeypatch.setattr(machine, "PROFILED_RUNS", 1)
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
            if sampler == "ddim":
                # Only below the clip do both take the same epsilon: diffusers keeps that of the unclipped x_0.
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
    monkeypatch.setattr(machine, "PEAK_ROUNDS", 1000)
    monkeypatch.setattr("sys.argv", ["bench_model", "--model", "cifar10", "--batch", "2", "--rounds", "3"])
    monkeypatch.setattr(machine, "PROFILED_RUNS", 1)
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
    monkeypatch.setattr(machine, "PEAK_ROUNDS", 1000)
    row = harness.measure(bench_model.plans(cpu_target)[0], cpu_target)
    assert row["peers"]["broken"] == {"not_measured": "ZeroDivisionError: division by zero"}
    assert row["peers"]["diffusers again"]["ratio"] > 0
    assert row["errors"]["diffusers"] == row["errors"]["diffusers again"]
    assert "broken: ZeroDivisionError" in tables.models([row])


def test_the_error_is_relative_and_of_float64():
    exact = torch.tensor([3.0, -4.0], dtype=torch.float64)
    assert bench_model.rms_error(torch.tensor([3.0, -4.5]), exact) == pytest.approx(0.1)


def test_growth(target, monkeypatch):
    axes = {"steps": (2, 3), "batch": (1, 2), "resolution": (16,), "channels": (32,)}
    base = {"steps": 1, "batch": 1, "resolution": 16, "channels": 32}
    monkeypatch.setattr(bench_throughput, "AXES", dict.fromkeys(("cpu", "cuda"), axes))
    monkeypatch.setattr(bench_throughput, "BASE", dict.fromkeys(("cpu", "cuda"), base))
    monkeypatch.setitem(bench_throughput.GROWTH_DTYPE, "cuda", torch.float32)  # bfloat16 is slow on a CPU
    for name in ("channels", "num_res_blocks"):
        monkeypatch.setitem(CONFIGS["cifar10"], name, {"channels": (32, 64, 64, 64), "num_res_blocks": 1}[name])
    rows = measured([plan for plan in bench_throughput.plans(target) if plan.part == "growth"], target)
    assert [row["value"] for row in rows if row["case"] == "steps"] == [2, 3]
    two, three = (row["flops"] for row in rows if row["case"] == "steps")
    assert three == pytest.approx(1.5 * two)
    assert all(row["floor_flops_us"] > 0 and row["floor_bytes_us"] > 0 for row in rows)


def test_saved_bytes_counts_a_storage_once_and_no_parameter():
    weight = torch.randn(4, 4, requires_grad=True)
    x = torch.randn(2, 4)
    run = lambda: (x @ weight.t()).square() + (x @ weight.t())  # noqa: E731 - squares keep their input
    saved = bench_training.saved_bytes(run, {weight.untyped_storage().data_ptr()})
    assert saved == x.nbytes + 2 * 4 * 4


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_norm_and_the_sampler_are_found_in_a_profile(backend):
    step = models.Denoiser(lambda x: dd.group_norm_silu(x, 8, backend=backend), torch.add, torch.nn.Identity())
    share = models.breakdown(step, torch.randn(4, 32, 16, 16), "cpu")["share"]
    assert share["group_norm_silu"] > 0
    assert share["sampler"] > 0
    assert sum(share.values()) == pytest.approx(1)


def test_the_shares_of_a_profile(monkeypatch):
    model = [("dd_kernels::group_norm_silu", 30.0, 2), ("aten::mm", 50.0, 4)]
    found = iter([model, [("dd_kernels::reverse_step", 20.0, 2)]])
    monkeypatch.setattr(models.machine, "events", lambda run, device: next(found))
    step = models.Denoiser(torch.neg, torch.add, torch.nn.Identity())
    share = models.breakdown(step, torch.randn(1, 4, 2, 2), "cpu")["share"]
    assert share == {"group_norm_silu": 0.3, "sampler": 0.2, "rest": 0.5}
