"""The command line: every command, every flag, every error in one line with status 2."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import dd_kernels as dd
from dd_kernels import checkpoint, cli, data, images
from dd_kernels.checkpoint import ModelInfo
from dd_kernels.cli import common
from dd_kernels.nn import UNet
from dd_kernels.training import Trainer

TINY = ["--set", "channels=[8,16]", "num_heads=2", "num_groups=4"]
SMALL = ["--num-timesteps", "4", "--batch-size", "4", "--steps", "3", "--no-progress", *TINY]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A class-conditional model, one without dropped labels and one without classes; their weights are random."""
    folder, paths = tmp_path_factory.mktemp("models"), {}
    kinds = {"digits": (10, True), "undropped": (10, False), "plain": (None, False)}
    for name, (num_classes, null_class) in kinds.items():
        torch.manual_seed(0)
        model = UNet.from_config(
            "digits", channels=(8, 16), num_heads=2, num_groups=4, num_classes=num_classes, null_class=null_class
        )
        for parameter in model.parameters():  # what starts as 0 would hide timesteps and classes
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
        classes = tuple(map(str, range(num_classes or 0)))
        paths[name] = str(folder / f"{name}.safetensors")
        checkpoint.save_model(paths[name], model.state_dict(), ModelInfo(model.config, "cosine", 20, "v", classes, {}))
    return paths


def _run(*arguments):
    return cli.main([str(a) for a in arguments])


def _fails(capsys, *arguments):
    """The one line that a command fails with; whether argparse or the command found the error."""
    before = {p: p.read_bytes() for p in pathlib.Path().rglob("*") if p.is_file()}
    capsys.readouterr()
    try:
        status = _run(*arguments)
    except SystemExit as error:
        status = error.code
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert {p: p.read_bytes() for p in pathlib.Path().rglob("*") if p.is_file()} == before
    lines = [line for line in captured.err.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert captured.err.splitlines()[-1] == lines[0]
    return lines[0]


def _sample(models, *arguments, name="digits"):
    return _run("sample", "--model", models[name], "--no-progress", *arguments)


def _pixels(path):
    with np.load(path) as file:
        return file["images"]


def test_sample_without_arguments_draws_64_digits(capsys):
    assert _run("sample", "--steps", "2") == 0  # 2 of the 50 steps: the packaged model is not tiny
    captured = capsys.readouterr()
    with Image.open("samples.png") as picture:
        assert picture.size == (584, 584)
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
    assert _sample(models, "-n", 3, "--out", "a.npz", "--steps", 5, "--seed", 7, "--eta", 0.5, "--guidance", 2) == 0
    model, info = checkpoint.load_model(models["digits"])
    table = dd.ddim(info.make_schedule(), 5, eta=0.5, prediction="v")
    kwargs = {
        "model_kwargs": {"y": torch.arange(3)},
        "uncond_kwargs": {"y": torch.full((3,), 10)},
        "guidance_scale": 2.0,
    }
    x = dd.sample(model, (3, 1, 8, 8), table, seed=7, **kwargs)
    assert np.array_equal(_pixels("a.npz"), images.to_uint8(x).numpy())
    with np.load("a.npz") as file:
        assert file["labels"].tolist() == [0, 1, 2]


def test_default_steps(models, capsys):
    assert _sample(models, "-n", 1) == 0
    assert "ddim with 20 steps" in capsys.readouterr().out  # the model has no 50 timesteps
    assert _sample(models, "-n", 1, "--sampler", "ddpm") == 0
    assert "ddpm with 20 steps" in capsys.readouterr().out


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
            ["--clip", 0.3],
            ["--clip", "none"],
            ["--clip", "dynamic"],
            ["--classes", "5"],
            ["--classes", "none"],
            ["--guidance", 3],
            ["--dtype", "bf16"],
            ["--steps", 5],
        )
    ):
        assert _sample(models, *fast, *flags, "--out", f"{i}.npz") == 0
    seen = {_pixels(f"{i}.npz").tobytes() for i in range(15)}
    assert len(seen) == 15


def test_batch_size_does_not_change_the_samples_and_first_sample_continues_them(models):
    flags = ["--steps", 3, "--sampler", "ddpm"]
    assert _sample(models, "-n", 5, *flags, "--out", "all.npz") == 0
    assert _sample(models, "-n", 5, *flags, "--out", "batched.npz", "--batch-size", 2) == 0
    assert _sample(models, "-n", 2, *flags, "--out", "tail.npz", "--first-sample", 3) == 0
    whole = _pixels("all.npz").astype(int)
    # Another batch size may round a product otherwise, never by more than a grey level.
    assert np.abs(whole - _pixels("batched.npz")).max() <= 1
    assert np.abs(whole[3:] - _pixels("tail.npz")).max() <= 1


def test_sample_into_a_folder_and_columns(models):
    assert _sample(models, "-n", 2, "--steps", 1, "--out", "folder", "--first-sample", 40) == 0
    assert sorted(os.listdir("folder")) == ["000040.png", "000041.png"]
    assert _sample(models, "-n", 1, "--steps", 1, "--out", "folder", "--overwrite") == 0
    assert _sample(models, "-n", 4, "--steps", 1, "--columns", 4) == 0
    with Image.open("samples.png") as picture:
        assert picture.size == (37 * 8, 10 * 8)


def test_classes_by_name_and_backend(models, tmp_path, capsys):
    assert _sample(models, "-n", 3, "--steps", 1, "--classes", "7, 2", "--out", "a.npz", "--backend", "reference") == 0
    with np.load("a.npz") as file:
        assert file["labels"].tolist() == [7, 2, 7]
    assert "backend reference" in capsys.readouterr().out
    assert (
        _sample(
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
        (["--variance", "fixed_large"], "--variance must be left out with --sampler ddim; got fixed_large"),
        (["--clip", "-1"], "argument --clip: must be none, dynamic or a positive number; got '-1'"),
        (["--clip", "tight"], "argument --clip: must be a number; got 'tight'"),
        (["--seed", "-1"], "argument --seed: must be an integer in [0, 18446744073709551615]; got '-1'"),
        (["--first-sample", "4294967296"], "argument --first-sample: must be an integer in [0, 4294967295]"),
        (["--first-sample", "4294967295"], "--first-sample and -n must stay below 2^32 together"),
        (["--guidance", "inf"], "--guidance must be a finite number; got inf"),
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
        (["--out", "kept"], "out must be a .png, a .npz or a folder; got the file 'kept'"),
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
    assert message in _fails(capsys, "sample", "--no-progress", *model, *flags)


def test_errors_that_depend_on_the_model(models, capsys):
    def error(name, *flags):
        return _fails(capsys, "sample", "--no-progress", "--model", models[name], *flags)

    assert "--guidance needs a model trained with dropped labels" in error("undropped", "--guidance", 2)
    assert "--classes none needs a model trained with dropped labels" in error("undropped", "--classes", "none")
    assert "--classes must be left out: the model has no classes; got '1'" in error("plain", "--classes", "1")
    assert "--guidance needs a model" in error("plain", "--guidance", 2)
    state = "m.training.safetensors"
    checkpoint.save(state, checkpoint.TRAINING, {"x": torch.zeros(1)}, {})
    assert "is a training state; wanted is a model" in _fails(capsys, "sample", "--model", state)


def test_without_a_command_or_with_an_unknown_one(capsys):
    assert "the following arguments are required" in _fails(capsys)
    assert "invalid choice: 'paint'" in _fails(capsys, "paint")
    with pytest.raises(SystemExit) as error:
        _run("--help")
    assert error.value.code == 0
    for command in cli.COMMANDS:
        with pytest.raises(SystemExit) as error:
            _run(command, "--help")
        assert error.value.code == 0


def test_a_failing_write_keeps_the_old_picture(models, monkeypatch, capsys):
    assert _sample(models, "-n", 1, "--steps", 1) == 0

    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    flags = ["--model", models["digits"], "--no-progress", "-n", 1, "--steps", 1, "--seed", 1]
    assert "No space left on device" in _fails(capsys, "sample", *flags)


def test_ctrl_c_and_memory_are_one_line_each(models, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    def greedy(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate much")

    monkeypatch.setattr(dd.samplers, "sample", interrupted)
    assert _sample(models) == 130
    assert capsys.readouterr().err == "dd_kernels sample: error: interrupted\n"
    monkeypatch.setattr(dd.samplers, "sample", greedy)
    assert _sample(models) == 2
    assert "--batch-size is too large for the device's memory: CUDA out of memory. Tried" in capsys.readouterr().err


def test_slerp_is_the_shortest_way_on_the_sphere():
    a, b = torch.tensor([[3.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 3.0], [1.0, 0.0]])
    walk = common.slerp(a, b, torch.linspace(0, 1, 3))
    assert walk.shape == (2, 3, 2)
    root = 3 * 0.5**0.5
    assert torch.allclose(walk[0], torch.tensor([[3, 0], [root, root], [0, 3]], dtype=torch.float32))
    assert torch.allclose(walk[1], a[1].expand(3, 2))  # one point: stay there
    opposite = common.slerp(a[:1], -a[:1], torch.tensor([0.25]))
    assert torch.isfinite(opposite).all()
    noise = dd.randn((4, 3, 16, 16), seed=0), dd.randn((4, 3, 16, 16), seed=1)
    middle = common.slerp(*noise, torch.tensor([0.5]))
    assert float(middle.std()) == pytest.approx(1, abs=0.05)  # a straight line would give 0.7


def test_interpolate_between_seeds(models):
    walk = ["interpolate", "--model", models["digits"], "--no-progress", "--steps", 4, "-n", 3]
    assert _run(*walk, "--classes", "4,9", "--out", "walk.npz", "--seeds", 5, 6) == 0
    ends = [_pixels("walk.npz")[i] for i in (0, 2, 3, 5)]
    with np.load("walk.npz") as file:
        assert file["labels"].tolist() == [4, 4, 4, 9, 9, 9]
    # The ends are what sample draws from either seed.
    for seed, columns in ((5, (0, 2)), (6, (1, 3))):
        assert _sample(models, "-n", 2, "--steps", 4, "--classes", "4,9", "--seed", seed, "--out", "end.npz") == 0
        for i, column in enumerate(columns):
            assert np.abs(_pixels("end.npz")[i].astype(int) - ends[column]).max() <= 1
    assert _run(*walk) == 0
    with Image.open("interpolation.png") as picture:
        assert picture.size == ((3 * 9 + 1) * 8, (10 * 9 + 1) * 8)  # a row per class
    assert (
        _run(*walk, "--rows", 3, "--classes", "none", "--out", "walk.npz", "--guidance", 2, "--spacing", "trailing")
        == 0
    )
    assert len(_pixels("walk.npz")) == 9


def test_interpolate_between_images_returns_to_them(models):
    for i, name in enumerate("ab"):
        pixels = data.digits().images[i, 0].numpy() * 15
        Image.fromarray(pixels).save(f"{name}.png")
    walk = ["interpolate", "--model", models["plain"], "--no-progress", "--images", "a.png", "b.png", "-n", 4]
    assert _run(*walk, "--steps", 20, "--out", "walk.npz") == 0
    found = _pixels("walk.npz").astype(int)
    assert found.shape == (4, 8, 8, 1)
    for row, name in ((0, "a.png"), (3, "b.png")):
        with Image.open(name) as image:
            assert np.abs(found[row, ..., 0] - np.array(image)).mean() < 12
    assert np.abs(found[0] - found[3]).mean() > 20
    walk[2] = models["digits"]
    assert _run(*walk, "--steps", 4, "--classes", "1,2,3", "--out", "walk.npz") == 0
    assert len(_pixels("walk.npz")) == 12


def test_only_walks_between_seeds_clip_x0(models, monkeypatch):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save("a.png")
    clips, ddim = [], dd.tables.ddim

    def recorded(*arguments, clip, **keywords):
        clips.append(clip)
        return ddim(*arguments, clip=clip, **keywords)

    monkeypatch.setattr(dd.tables, "ddim", recorded)
    walk = ["interpolate", "--model", models["digits"], "--no-progress", "--steps", 1, "-n", 2]
    assert _run(*walk) == 0
    assert _run(*walk, "--images", "a.png", "a.png") == 0
    assert clips == [1.0, None]


def test_interpolate_errors(models, capsys):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save("a.png")
    pathlib.Path("bad.png").write_text("no image")
    for name, flags, message in (
        ("digits", ["-n", 1], "argument -n/--frames: must be an integer of at least 2; got '1'"),
        ("digits", ["--images", "a.png", "bad.png"], "cannot read the image 'bad.png'"),
        ("digits", ["--images", "a.png", "no.png"], "cannot read the image 'no.png'"),
        ("digits", ["--images", "a.png", "a.png", "--rows", 2], "--rows must be left out with --images"),
        ("digits", ["--images", "a.png", "a.png", "--seeds", 1, 2], "not allowed with argument"),
        ("undropped", ["--images", "a.png", "a.png"], "--classes none needs a model trained with dropped labels"),
        ("digits", ["--steps", 50], "steps must be an int in [1, 20]; got 50"),
        ("digits", ["--steps", 4, "--out", "no/where.png"], "out: cannot write"),
    ):
        assert message in _fails(capsys, "interpolate", "--no-progress", "--model", models[name], *flags)


def test_train_resume_and_overwrite(capsys):
    train = ["train", "--out", "m.safetensors", *SMALL]
    assert _run(*train, "--data", "digits", "--sample-every", 2, "--save-every", 2) == 0
    assert "m.safetensors: step 3, loss" in capsys.readouterr().out
    assert sorted(os.listdir()) == ["m.safetensors", "m.samples.png", "m.training.safetensors"]
    assert "is there already (--resume" in _fails(capsys, *train, "--data", "digits")
    assert "lr must be 0.001" in _fails(capsys, "train", "--out", "m.safetensors", "--resume", "--lr", 1)
    assert _run("train", "--out", "m.safetensors", "--resume", "--steps", 5, "--no-progress") == 0
    assert "step 5" in capsys.readouterr().out
    assert checkpoint.load_model("m.safetensors")[1].training["steps"] == 5
    assert _run(*train, "--data", "digits", "--overwrite") == 0
    assert checkpoint.load_model("m.safetensors")[1].training["step"] == 3


def test_every_flag_of_train_reaches_the_options(monkeypatch):
    seen = {}
    monkeypatch.setattr(
        cli.train.training, "train", lambda options, out, **k: seen.update(k, options=options) or _Done()
    )
    flags = {
        "data": "digits", "image_size": 16, "config": "cifar10", "schedule": "sigmoid", "num_timesteps": 7,
        "prediction": "v", "label_drop": 0.3, "steps": 9, "batch_size": 3, "lr": 0.5, "weight_decay": 0.1,
        "beta1": 0.5, "beta2": 0.6, "warmup": 2, "clip_grad": 4.0, "ema": 0.7, "precision": "bf16", "seed": 11,
    }  # fmt: skip
    line = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    switches = ["grey", "flip", "unconditional"]
    extra = [
        "--save-every",
        5,
        "--sample-every",
        6,
        "--device",
        "cpu",
        "--backend",
        "reference",
        "--set",
        "dropout=0.2",
    ]
    assert _run("train", "--out", "m.safetensors", *line, *[f"--{s}" for s in switches], *extra) == 0
    options = seen["options"]
    for name, value in {**flags, **dict.fromkeys(switches, True), "model": {"dropout": 0.2}}.items():
        assert getattr(options, name) == value
    assert set(flags) | set(switches) | {"model"} == set(type(options).__dataclass_fields__)
    assert (seen["save_every"], seen["sample_every"], seen["device"], seen["progress"]) == (
        5,
        6,
        torch.device("cpu"),
        True,
    )


class _Done:
    step, loss, stopped_by = 1, 0.0, None


def test_train_on_a_folder_and_on_npz(capsys):
    rng = np.random.default_rng(0)
    for i, name in enumerate(("ant", "ant", "bee")):
        pathlib.Path("pictures", name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)).save(f"pictures/{name}/{i}.png")
    base = ["--config", "digits", *SMALL, "--sample-every", 0]
    assert _run("train", "--data", "pictures", "--image-size", 8, "--out", "f.safetensors", *base) == 0
    info = checkpoint.load_model("f.safetensors")[1]
    assert info.classes == ("ant", "bee")
    assert info.sample_shape == (3, 8, 8)
    assert info.training["data"] == "pictures"
    assert _run("sample", "--model", "f.safetensors", "-n", 2, "--steps", 1, "--classes", "bee", "--out", "s.npz") == 0
    with np.load("s.npz") as file:
        assert file["labels"].tolist() == [1, 1]
    np.savez("a.npz", images=rng.integers(0, 255, (4, 8, 8), dtype=np.uint8))
    assert _run("train", "--data", "a.npz", "--out", "n.safetensors", *base) == 0
    assert checkpoint.load_model("n.safetensors")[1].sample_shape == (1, 8, 8)
    pathlib.Path("pictures/bee/broken.png").write_text("no image")
    error = _fails(capsys, "train", "--data", "pictures", "--image-size", 8, "--out", "g.safetensors", *base)
    assert "broken.png" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--data must be given: digits, a folder of images or a .npz file"),
        (["--data", "nowhere"], "data must be 'digits', a folder of images or a .npz file; got 'nowhere'"),
        (["--data", "."], "image_size must be given for the folder of images '.'"),
        (["--data", ".", "--image-size", "8"], "holds no images"),
        (["--data", "text.npz"], "cannot read 'text.npz' as .npz"),
        (["--data", "digits", "--image-size", "16"], "image_size must be that of the data, 8; got 16"),
        (["--data", "digits", "--resume"], "resume: there is no training state 'm.training.safetensors'"),
        (["--data", "digits", "--lr", "0"], "lr must be a positive number; got 0.0"),
        (["--data", "digits", "--ema", "1"], "ema must be in [0, 1); got 1.0"),
        (["--data", "digits", "--steps", "0"], "argument --steps: must be an integer of at least 1; got '0'"),
        (["--data", "digits", "--precision", "fp8"], "argument --precision: invalid choice: 'fp8'"),
        (["--data", "digits", "--config", "huge"], "argument --config: invalid choice: 'huge'"),
        (["--data", "digits", "--set", "dropout"], "argument --set: must be NAME=VALUE; got 'dropout'"),
        (["--data", "digits", "--set", "flavour=mint"], "model: flavour must be one of"),
        (["--data", "digits", "--set", "channels=[8,x]"], "channels"),
        (["--data", "digits", "--set", "learn_variance=true"], "learn_variance must be false"),
        (["--data", "digits", "--device", "nowhere"], "--device 'nowhere' cannot be used"),
        (["--data", "digits", "--backend", "cuda"], "--backend cuda cannot run on cpu"),
        (["--data", "digits", "--out", "m.pt"], "out must end in .safetensors; got 'm.pt'"),
        (["--data", "digits", "--out", "no/m.safetensors"], "out: cannot write 'no/m.safetensors'"),
    ],
)
def test_train_errors(capsys, flags, message):
    pathlib.Path("text.npz").write_text("no arrays")
    out = [] if "--out" in flags else ["--out", "m.safetensors"]
    assert message in _fails(capsys, "train", *out, "--no-progress", *flags)


def test_train_diverging_is_status_1(monkeypatch, capsys):
    step = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda self: tuple(v * torch.nan for v in step(self)))
    assert _run("train", "--data", "digits", "--out", "m.safetensors", *SMALL) == 1
    assert capsys.readouterr().err == (
        "dd_kernels train: error: the loss of step 1 is not a number: try a smaller lr or a longer warmup\n"
    )
    assert os.listdir() == []


def test_ctrl_c_saves_and_says_how_to_go_on(monkeypatch, capsys):
    step = Trainer.train_step

    def interrupted(self):
        signal.raise_signal(signal.SIGINT)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupted)
        assert _run("train", "--data", "digits", "--out", "m.safetensors", *SMALL) == 130
    assert "stopped by SIGINT and saved at step 1: loss" in capsys.readouterr().out
    assert sorted(os.listdir()) == ["m.safetensors", "m.training.safetensors"]
    assert _run("train", "--out", "m.safetensors", "--resume", "--no-progress") == 0
    assert "m.safetensors: step 3" in capsys.readouterr().out


def test_a_killed_run_is_saved():
    command = [sys.executable, "-m", "dd_kernels", "train", "--data", "digits", "--out", "m.safetensors"]
    flags = ["--num-timesteps", "4", "--batch-size", "1", "--steps", "1000000", "--save-every", "5", *TINY]
    process = subprocess.Popen(
        [*command, *flags, "--no-progress"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(pathlib.Path(dd.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while not pathlib.Path("m.safetensors").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    assert "stopped by SIGTERM and saved at step" in out
    step = int(out.split("saved at step ")[1].split(":")[0])
    assert checkpoint.load_model("m.safetensors")[1].training["step"] == step
    assert sorted(os.listdir()) == ["m.safetensors", "m.training.safetensors"]  # and no temporary file
