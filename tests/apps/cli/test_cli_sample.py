"""``sample``: every flag, every error in one line with status 2."""

import os
import pathlib

import numpy as np
import pytest
import torch
from commands import fails, pixels, run, sample
from PIL import Image

import dd_kernels as dd
from dd_kernels import compile
from dd_kernels.apps import checkpoint, cli, images
from dd_kernels.apps.cli import common


def test_sample_without_arguments_draws_64_images(capsys):
    assert run("sample", "--steps", "2") == 0  # 2 of the 50 steps: the packaged model is not tiny
    captured = capsys.readouterr()
    with Image.open("samples.png") as picture:
        assert picture.size == (699, 699)
    assert "samples.png: 64 images, ddim with 2 steps" in captured.out
    for word in (
        "images/s",
        "steps/s",
        "on cpu",
        f"backend {common.backends.choose('x', 'auto', torch.device('cpu'))}",
    ):
        assert word in captured.out
    assert "sampling: 100%" in captured.err  # the progress bar
    arguments = cli.build_parser().parse_args(["sample"])
    assert (arguments.num_samples, arguments.out, arguments.sampler) == (64, "samples.png", "ddim")


def test_sample_equals_the_library(models):
    assert sample(models, "-n", 3, "--out", "a.npz", "--steps", 5, "--seed", 7, "--eta", 0.5, "--guidance", 2) == 0
    model, info = checkpoint.load_model(models["digits"])
    table = dd.ddim(info.make_schedule(), 5, eta=0.5, prediction="v")
    kwargs = {
        "model_kwargs": {"y": torch.arange(3)},
        "uncond_kwargs": {"y": torch.full((3,), 10)},
        "guidance_scale": 2.0,
    }
    x = dd.sample(model, (3, 1, 8, 8), table, seed=7, **kwargs)
    assert np.array_equal(pixels("a.npz"), images.to_uint8(x).numpy())
    with np.load("a.npz") as file:
        assert file["labels"].tolist() == [0, 1, 2]


def test_an_accelerated_model_draws_the_same_images(models, monkeypatch):
    """Another convolution algorithm may move a value by a few roundings, and so one grey level, no more."""
    accelerate, asked = dd.accelerate, []

    def noted(model, dtype):
        asked.append(dtype)
        accelerate(model, dtype=dtype)

    monkeypatch.setattr(compile, "accelerate", noted)
    assert sample(models, "-n", 3, "--steps", 5, "--out", "plain.npz") == 0
    assert not asked
    assert sample(models, "-n", 3, "--steps", 5, "--out", "fast.npz", "--accelerate") == 0
    assert asked == [None]
    assert np.abs(pixels("plain.npz").astype(int) - pixels("fast.npz").astype(int)).max() <= 1
    assert sample(models, "-n", 3, "--steps", 5, "--out", "bfloat16.npz", "--accelerate", "bfloat16") == 0
    assert asked == [None, "bfloat16"]


def test_accelerate_takes_no_other_dtype(models, capsys):
    with pytest.raises(SystemExit):
        sample(models, "--accelerate", "float16")
    assert "argument --accelerate: invalid choice: 'float16'" in capsys.readouterr().err


def test_default_steps(models, capsys):
    assert sample(models, "-n", 1) == 0
    assert "ddim with 20 steps" in capsys.readouterr().out  # the model has no 50 timesteps
    assert sample(models, "-n", 1, "--sampler", "ddpm") == 0
    assert "ddpm with 20 steps" in capsys.readouterr().out
    assert sample(models, "-n", 1, "--sampler", "dpm++") == 0
    assert "dpm++ with 10 steps" in capsys.readouterr().out


def test_every_flag_of_sample_changes_the_samples(models):
    fast = ["-n", 2, "--steps", 4]
    for i, flags in enumerate(
        (
            [],
            ["--seed", 1],
            ["--first-sample", 1],
            ["--eta", 1],
            ["--spacing", "trailing"],
            ["--sampler", "ddpm"],
            ["--sampler", "ddpm", "--variance", "fixed_large"],
            *(["--sampler", name] for name in ("dpm++", "dpm++sde", "unipc", "euler", "euler_ancestral")),
            ["--sampler", "dpm++3m", "--steps", 6],  # of fewer steps none has two steps before and one after it
            ["--sampler", "dpm++", "--spacing", "karras"],
            ["--sampler", "dpm++", "--clip", 0.3],
            ["--clip", 0.3],
            ["--clip", "none"],
            ["--clip", "dynamic"],
            ["--classes", "5"],
            ["--classes", "none"],
            ["--guidance", 3],
            ["--guidance-weight", 3],
            ["--guidance", 3, "--guidance-rescale", 0.5],
            ["--guidance", 3, "--guidance-interval", 5, 12],
            ["--dtype", "bf16"],
            ["--steps", 5],
        )
    ):
        assert sample(models, *fast, *flags, "--out", f"{i}.npz") == 0
    seen = {pixels(f"{i}.npz").tobytes() for i in range(26)}
    assert len(seen) == 26


def test_a_learned_variance_is_used_by_ddpm_and_left_alone_by_the_others(models, capsys):
    model, info = checkpoint.load_model(models["learned"])
    assert sample(models, "-n", 2, "--sampler", "ddpm", "--steps", 4, "--out", "a.npz", name="learned") == 0
    table = dd.ddpm(info.make_schedule(), 4, variance="learned_range", prediction="v")
    expected = images.to_uint8(dd.sample(model, (2, 1, 8, 8), table, seed=0)).numpy()
    assert np.array_equal(pixels("a.npz"), expected)
    for flags in (["--sampler", "ddpm", "--variance", "fixed_small"], ["--eta", 1], ["--sampler", "dpm++"]):
        assert sample(models, "-n", 2, "--steps", 4, *flags, "--out", "b.npz", name="learned") == 0
        assert not np.array_equal(pixels("b.npz"), expected)
    fixed = dd.ddpm(info.make_schedule(), 4, prediction="v")
    assert sample(models, "-n", 2, "--sampler", "ddpm", "--variance", "fixed_small", "--steps", 4, name="learned") == 0
    assert run("interpolate", "--model", models["learned"], "--steps", 2, "-n", 2, "--rows", 1, "--no-progress") == 0
    alone = dd.sample(lambda x, t: model(x, t)[:, :1], (2, 1, 8, 8), fixed, seed=0)
    flags = ["--sampler", "ddpm", "--variance", "fixed_small", "--steps", 4, "--out", "b.npz"]
    assert sample(models, "-n", 2, *flags, name="learned") == 0
    assert np.array_equal(pixels("b.npz"), images.to_uint8(alone).numpy())
    assert "learned_range needs a model that learns its variance" in fails(
        capsys,
        "sample",
        "--model",
        models["plain"],
        "--sampler",
        "ddpm",
        "--variance",
        "learned_range",
        "--out",
        "c.png",
    )


def test_batch_size_does_not_change_the_samples_and_first_sample_continues_them(models):
    flags = ["--steps", 3, "--sampler", "ddpm"]
    assert sample(models, "-n", 5, *flags, "--out", "all.npz") == 0
    assert sample(models, "-n", 5, *flags, "--out", "batched.npz", "--batch-size", 2) == 0
    assert sample(models, "-n", 2, *flags, "--out", "tail.npz", "--first-sample", 3) == 0
    whole = pixels("all.npz").astype(int)
    # Another batch size may round a product otherwise, never by more than a grey level.
    assert np.abs(whole - pixels("batched.npz")).max() <= 1
    assert np.abs(whole[3:] - pixels("tail.npz")).max() <= 1


def test_sample_into_a_folder_and_columns(models):
    assert sample(models, "-n", 2, "--steps", 1, "--out", "folder", "--first-sample", 40) == 0
    assert sorted(os.listdir("folder")) == ["000040.png", "000041.png"]
    assert sample(models, "-n", 1, "--steps", 1, "--out", "folder", "--overwrite") == 0
    assert sample(models, "-n", 4, "--steps", 1, "--columns", 4) == 0
    with Image.open("samples.png") as picture:
        assert picture.size == (37 * 8, 10 * 8)


def test_arrays_under_the_names_of_guided_diffusion(models):
    assert sample(models, "-n", 2, "--steps", 1, "--out", "a.npz", "--npz-names", "arr") == 0
    with np.load("a.npz") as file:
        assert file["arr_0"].shape == (2, 8, 8, 1)
        assert file["arr_1"].tolist() == [0, 1]


def test_a_grid_of_a_billion_columns_is_a_row(models):
    assert sample(models, "-n", 2, "--steps", 1, "--columns", 10**9) == 0
    with Image.open("samples.png") as picture:
        assert picture.size == (19 * 8, 10 * 8)


def test_classes_by_name_and_backend(models, tmp_path, capsys):
    assert sample(models, "-n", 3, "--steps", 1, "--classes", "7, 2", "--out", "a.npz", "--backend", "reference") == 0
    with np.load("a.npz") as file:
        assert file["labels"].tolist() == [7, 2, 7]
    assert "backend reference" in capsys.readouterr().out
    assert (
        sample(
            models,
            "-n",
            1,
            "--steps",
            1,
            "--out",
            "b.npz",
            name="plain",
        )
        == 0
    )
    with np.load("b.npz") as file:
        assert file.files == ["images"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-n", "0"], "argument -n/--num-samples: must be an integer of at least 1; got '0'"),
        (["--steps", "x"], "argument --steps: must be an integer of at least 1; got 'x'"),
        (["--steps", "21"], "steps must be an int in [1, 20]; got 21"),
        (["--spacing", "odd"], "argument --spacing: invalid choice: 'odd'"),
        (["--eta", "2"], "eta must lie in [0, 1]; got 2.0"),
        (["--eta", "nan"], "argument --eta: must be a number; got 'nan'"),
        (["--eta", "0", "--sampler", "ddpm"], "--eta must be left out with --sampler ddpm; got 0.0"),
        (["--eta", "0", "--sampler", "dpm++"], "--eta must be left out with --sampler dpm++; got 0.0"),
        (["--variance", "fixed_small", "--sampler", "unipc"], "--variance must be left out with --sampler unipc"),
        (["--spacing", "karras"], "spacing must be one of linspace, leading, trailing, quadratic; got 'karras'"),
        (["--variance", "fixed_large"], "--variance must be left out with --sampler ddim; got fixed_large"),
        (["--clip", "-1"], "argument --clip: must be none, dynamic or a positive number; got '-1'"),
        (["--clip", "tight"], "argument --clip: must be a number; got 'tight'"),
        (["--seed", "-1"], "argument --seed: must be an integer in [0, 18446744073709551615]; got '-1'"),
        (["--first-sample", "4294967296"], "argument --first-sample: must be an integer in [0, 4294967295]"),
        (["--first-sample", "4294967295"], "--first-sample and -n must stay below 2^32 together"),
        (["--guidance", "inf"], "--guidance must be a finite number; got inf"),
        (["--guidance-weight", "x"], "argument --guidance-weight: must be a number; got 'x'"),
        (["--guidance", "2", "--guidance-weight", "1"], "not allowed with argument --guidance"),
        (["--guidance", "2", "--guidance-rescale", "1.5"], "guidance_rescale must lie in [0, 1]; got 1.5"),
        (["--guidance", "2", "--guidance-interval", "9", "3"], "the lower one first; got (9.0, 3.0)"),
        (["--guidance-rescale", "0.5"], "--guidance-rescale must be left out with --guidance 1; got 0.5"),
        (["--guidance-interval", "3", "9"], "--guidance-interval must be left out with --guidance 1; got [3.0, 9.0]"),
        (["--classes", "11"], "classes must be among 0, 1, 2, 3, 4, 5, 6, 7, 8, 9; got '11'"),
        (["--classes", ""], "got ''"),
        (["--dtype", "fp8"], "argument --dtype: invalid choice: 'fp8'"),
        (["--batch-size", "0"], "argument --batch-size: must be an integer of at least 1; got '0'"),
        (["--columns", "0"], "argument --columns: must be an integer of at least 1; got '0'"),
        (["--device", "nowhere"], "--device 'nowhere' cannot be used"),
        (["--device", "meta"], "--device 'meta' cannot be used"),
        (["--backend", "cuda"], "--backend cuda cannot run on cpu: "),
        (["--backend", "abacus"], "argument --backend: invalid choice: 'abacus'"),
        (["--out", "no/folder.png"], "out: cannot write 'no/folder.png': No such file or directory"),
        (["--out", "kept"], "out must be a .png, a .npz or a folder (a name without a suffix); got the file 'kept'"),
        (["--out", "a.jpg"], "got 'a.jpg', and .jpg is not written"),
        (["--out", "full/a.png"], "out: 'full/a.png' is there already (--overwrite to replace it)"),
        (["-n", "4294967295"], "4294967295 images of 8 x 8 x 1 take"),
        (["-n", "1" + "0" * 30], "argument -n/--num-samples: must be an integer of at least 1"),
        (["--num", "3"], "unrecognized arguments: --num 3"),
        (["--out", "full"], "out: the folder 'full' holds files already (--overwrite to write into it)"),
        (["--model", "no.safetensors"], "there is no model 'no.safetensors'"),
        (["--model", "kept"], "cannot read 'kept' as a model (safetensors)"),
    ],
)
def test_sample_errors(models, capsys, flags, message):
    pathlib.Path("kept").write_text("kept")
    pathlib.Path("full").mkdir()
    pathlib.Path("full/a.png").write_text("kept")
    model = [] if "--model" in flags else ["--model", models["digits"]]
    assert message in fails(capsys, "sample", "--no-progress", *model, *flags)


def test_errors_that_depend_on_the_model(models, capsys):
    def error(name, *flags):
        return fails(capsys, "sample", "--no-progress", "--model", models[name], *flags)

    assert "--guidance needs a model trained with dropped labels" in error("undropped", "--guidance", 2)
    assert "--classes none needs a model trained with dropped labels" in error("undropped", "--classes", "none")
    assert "--classes must be left out: the model has no classes; got '1'" in error("plain", "--classes", "1")
    assert "--guidance needs a model" in error("plain", "--guidance", 2)
    os.mkfifo("pipe")
    assert "model must be a regular file; 'pipe' is a pipe or a device" in fails(capsys, "sample", "--model", "pipe")
