"""``train``: flags, data, resuming, and what is kept when it is stopped."""

import os
import pathlib
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from commands import SMALL, TINY, fails, run
from PIL import Image

import dd_kernels as dd
from dd_kernels.apps import checkpoint, cli
from dd_kernels.apps.training import Trainer


def test_train_resume_and_overwrite(capsys):
    train = ["train", "--out", "m.safetensors", *SMALL]
    assert run(*train, "--data", "digits", "--sample-every", 2, "--save-every", 2) == 0
    assert "m.safetensors: step 3, loss" in capsys.readouterr().out
    assert sorted(os.listdir()) == ["m.safetensors", "m.samples.png"]
    assert "is there already (--resume" in fails(capsys, *train, "--data", "digits")
    assert "lr must be 0.001" in fails(capsys, "train", "--out", "m.safetensors", "--resume", "--lr", 1)
    assert run("train", "--out", "m.safetensors", "--resume", "--steps", 5, "--no-progress") == 0
    assert "step 5" in capsys.readouterr().out
    assert checkpoint.load_model("m.safetensors")[1].training["steps"] == 5
    assert run(*train, "--data", "digits", "--overwrite") == 0
    assert checkpoint.load_model("m.safetensors")[1].training["step"] == 3


def test_one_command_begins_and_goes_on(capsys, monkeypatch):
    train = ["train", "--out", "m.safetensors", *SMALL, "--data", "digits", "--resume-if-there", "--save-every", 2]
    step = Trainer.train_step
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", lambda self: step(self) if self.step < 2 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(*train)
    assert run(*train, "--accumulate", 2) == 0
    assert "step 3" in capsys.readouterr().out
    assert "lr must be 0.001" in fails(capsys, *train, "--lr", 1)
    assert "only one of --resume-if-there" in fails(capsys, *train, "--overwrite")
    assert "batch_size must be at least 5" in fails(capsys, *train, "--accumulate", 5)
    assert "shard_model needs the processes" in fails(capsys, *train, "--shard-model")


def test_every_flag_of_train_reaches_the_options(monkeypatch):
    seen = {}
    monkeypatch.setattr(
        cli.train.training, "train", lambda options, out, **k: seen.update(k, options=options) or _Done()
    )
    flags = {
        "data": "digits", "image_size": 16, "config": "cifar10", "schedule": "sigmoid", "num_timesteps": 7,
        "prediction": "v", "label_drop": 0.3, "steps": 9, "batch_size": 3, "lr": 0.5, "weight_decay": 0.1,
        "background": "#00ff00",
        "beta1": 0.5, "beta2": 0.6, "warmup": 2, "clip_grad": 4.0, "precision": "bf16", "seed": 11,
        "loss_weight": "min-snr", "snr_gamma": 3.0, "timesteps": "loss-second-moment", "input_perturbation": 0.1,
        "lr_schedule": "cosine",
    }  # fmt: skip
    line = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    switches = ["accelerate", "grey", "flip", "strict", "unconditional"]
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
        "--ema",
        "0.7",
        "0.9",
    ]
    assert run("train", "--out", "m.safetensors", *line, *[f"--{s}" for s in switches], *extra) == 0
    options = seen["options"]
    for name, value in {**flags, **dict.fromkeys(switches, True), "model": {"dropout": 0.2}, "ema": (0.7, 0.9)}.items():
        assert getattr(options, name) == value
    assert set(flags) | set(switches) | {"model", "ema"} == set(type(options).__dataclass_fields__)
    assert (seen["save_every"], seen["sample_every"], seen["device"], seen["progress"]) == (
        5,
        6,
        torch.device("cpu"),
        True,
    )


class _Done:
    step, loss, stopped_by = 1, 0.0, None


def test_a_recipe_gives_what_is_left_out(monkeypatch, capsys):
    pathlib.Path("idx").mkdir()
    for kind, shape in (("images-idx3", (4, 8, 8)), ("labels-idx1", (4,))):
        header = struct.pack(f">4B{len(shape)}I", 0, 0, 8, len(shape), *shape)
        pathlib.Path("idx", f"train-{kind}-ubyte").write_bytes(header + bytes(range(int(np.prod(shape)))))
    recipe = ["--recipe", "digits", "--sample-every", 0, *SMALL]
    assert run("train", "--data", "idx", "--out", "m.safetensors", *recipe) == 0
    info = checkpoint.load_model("m.safetensors")[1]
    assert info.training["lr"] == 1e-3
    assert (info.training["batch_size"], info.classes) == (4, ("0", "1", "2", "3"))
    line = fails(capsys, "train", "--out", "m.safetensors", "--resume", "--recipe", "digits")
    assert "--recipe must be left out with --resume; got digits" in line
    seen = []
    monkeypatch.setattr(cli.train.training, "train", lambda options, out, **k: seen.append(options) or _Done())
    for flags in (["--data", "fashion-mnist"], ["--data", "idx"], ["--data", "digits", "--recipe", "fashion-mnist"]):
        assert run("train", "--out", "n.safetensors", *flags) == 0
    assert [options.config for options in seen] == ["fashion", None, "fashion"]


def test_sample_takes_the_average_that_ema_names(capsys):
    assert run("train", "--out", "m.safetensors", *SMALL, "--data", "digits", "--lr", 1, "--ema", 0.9, 0.1) == 0
    for flags in ([], ["--ema", 0.9], ["--ema", 0.1]):
        assert run("sample", "--model", "m.safetensors", "-n", 2, "--out", f"{len(flags)}{flags[-1:]}.npz", *flags) == 0
    first, named, other = (np.load(name)["images"] for name in ("0[].npz", "2[0.9].npz", "2[0.1].npz"))
    assert np.array_equal(first, named)
    assert not np.array_equal(first, other)
    line = fails(capsys, "sample", "--model", "m.safetensors", "--ema", 0.5, "--out", "c.png")
    assert "ema must be the decay of an average that 'm.safetensors' holds, 0.9, 0.1; got 0.5" in line
    bundled = ("sample", "--model", "digits", "--ema", 0.5)
    assert "holds, one, and does not say of which decay" in fails(capsys, *bundled, "--out", "c.png")


def test_train_on_a_folder_and_on_npz(capsys):
    rng = np.random.default_rng(0)
    for i, name in enumerate(("ant", "ant", "bee")):
        pathlib.Path("pictures", name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)).save(f"pictures/{name}/{i}.png")
    base = ["--config", "digits", *SMALL, "--sample-every", 0]
    assert run("train", "--data", "pictures", "--image-size", 8, "--out", "f.safetensors", *base) == 0
    info = checkpoint.load_model("f.safetensors")[1]
    assert info.classes == ("ant", "bee")
    assert info.sample_shape == (3, 8, 8)
    assert info.training["data"] == "pictures"
    assert run("sample", "--model", "f.safetensors", "-n", 2, "--steps", 1, "--classes", "bee", "--out", "s.npz") == 0
    with np.load("s.npz") as file:
        assert file["labels"].tolist() == [1, 1]
    np.savez("a.npz", images=rng.integers(0, 255, (4, 8, 8), dtype=np.uint8))
    assert run("train", "--data", "a.npz", "--out", "n.safetensors", *base) == 0
    assert checkpoint.load_model("n.safetensors")[1].sample_shape == (1, 8, 8)
    pathlib.Path("pictures/bee/broken.png").write_text("no image")
    broken = ["train", "--data", "pictures", "--image-size", 8, "--out", "g.safetensors", *base]
    assert "1 of 4 images in 'pictures' are broken: cannot read the image" in fails(capsys, *broken, "--strict")
    assert run(*broken) == 0
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "warning: skipped 1 of 4 images in 'pictures': cannot read the image 'pictures/bee/broken.png'" in error


def test_without_a_configuration_a_model_is_chosen_that_fits(capsys):
    np.savez("a.npz", images=np.zeros((2, 24, 24), np.uint8))
    small = ["--set", "channels=[8,8]", "num_groups=4", "num_res_blocks=1", "--num-timesteps", 2, "--batch-size", 1]
    assert run("train", "--data", "a.npz", "--out", "m.safetensors", *small, "--steps", 1, "--no-progress") == 0
    config = checkpoint.load_model("m.safetensors")[0].config
    assert (config["image_size"], config["attention_resolutions"]) == (24, [12])


def test_a_preview_is_what_training_sees(capsys):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    np.savez("a.npz", images=images, labels=np.array([0, 1, 0, 1, 0]))
    preview = ["train", "--data", "a.npz", "--out", "m.safetensors", "--preview", "p.png"]
    assert run(*preview) == 0
    assert capsys.readouterr().out == ("p.png: 5 of 5 images, 4 x 4 x 3, values from -1.00 to 1.00, 2 classes: 0, 1\n")
    assert os.listdir() == ["a.npz", "p.png"] or sorted(os.listdir()) == ["a.npz", "p.png"]
    with Image.open("p.png") as picture:
        shown = np.array(picture)[::16, ::16]
    tiles = {shown[1 + 5 * i : 5 + 5 * i, 1 + 5 * j : 5 + 5 * j].tobytes() for i in range(2) for j in range(3)}
    assert {image.tobytes() for image in images} <= tiles
    assert "--preview: 'p.png' is there already" in fails(capsys, *preview)
    assert "--preview must name a .png" in fails(capsys, *preview[:-1], "p.jpg")


def test_a_finished_file_without_its_state(capsys):
    train = ["train", "--out", "m.safetensors", *SMALL, "--data", "digits", "--sample-every", 0, "--no-state"]
    assert run(*train) == 0
    resume = ["train", "--out", "m.safetensors", "--resume", "--no-progress"]
    assert "resume: 'm.safetensors' is a model without a training state" in fails(capsys, *resume)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--data must be given: digits, fashion-mnist, a folder or a .npz file"),
        (["--data", "nowhere"], "data must be 'digits', 'fashion-mnist', a folder or a .npz file; got 'nowhere'"),
        (["--data", "."], "image_size must be given for the folder of images '.'"),
        (["--data", ".", "--image-size", "8"], "holds no images"),
        (["--data", "text.npz"], "cannot read 'text.npz' as .npz"),
        (["--data", "digits", "--image-size", "16"], "image_size must be that of the data, 8; got 16"),
        (["--data", "digits", "--resume"], "resume: there is no model 'm.safetensors'"),
        (["--data", "digits", "--lr", "0"], "lr must be a positive number; got 0.0"),
        (["--data", "digits", "--ema", "1"], "ema must be different numbers in [0, 1); got (1.0,)"),
        (["--data", "digits", "--steps", "0"], "argument --steps: must be an integer of at least 1; got '0'"),
        (["--data", "digits", "--precision", "fp8"], "argument --precision: invalid choice: 'fp8'"),
        (["--data", "digits", "--config", "huge"], "argument --config: invalid choice: 'huge'"),
        (["--data", "digits", "--set", "dropout"], "argument --set: must be NAME=VALUE; got 'dropout'"),
        (["--data", "digits", "--set", "flavour=mint"], "model: flavour must be one of"),
        (["--data", "digits", "--set", "channels=[8,x]"], "channels"),
        (["--data", "digits", "--set", "channels=[[8,16]]"], "channels must be an integer below 2^31; got [8, 16]"),
        (["--data", "digits", "--set", 'dropout={"a":[1]}'], "dropout must be a number; got {'a': [1]}"),
        (["--data", "digits", "--set", "channels=" + "[" * 100000], "channels is nested too deeply"),
        (["--data", "digits", "--set", "channels=[1048576,1048576]"], "of memory; this machine has"),
        (["--data", "digits", "--num-timesteps", "1000000000000"], "argument --num-timesteps: must be an integer in"),
        (["--data", ".", "--image-size", "8", "--background", "mint-ish"], "background must be a colour"),
        (["--data", "pipe"], "data must be a regular file; 'pipe' is a pipe or a device"),
        (["--data", "digits", "--device", "nowhere"], "--device 'nowhere' cannot be used"),
        (["--data", "digits", "--backend", "cuda"], "--backend cuda cannot run on cpu"),
        (["--data", "digits", "--out", "m.pt"], "out must end in .safetensors; got 'm.pt'"),
        (["--data", "digits", "--out", "no/m.safetensors"], "out: cannot write 'no/m.safetensors'"),
    ],
)
def test_train_errors(capsys, flags, message):
    pathlib.Path("text.npz").write_text("no arrays")
    os.mkfifo("pipe")
    out = [] if "--out" in flags else ["--out", "m.safetensors"]
    assert message in fails(capsys, "train", *out, "--no-progress", *flags)


def test_train_diverging_is_status_1(monkeypatch, capsys):
    step = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda self: tuple(v * torch.nan for v in step(self)))
    assert run("train", "--data", "digits", "--out", "m.safetensors", *SMALL) == 1
    assert capsys.readouterr().err == (
        "dd_kernels train: error: the loss of step 1 is not a number: try a smaller lr or a longer warmup; "
        "nothing was saved\n"
    )
    assert os.listdir() == []


def test_ctrl_c_saves_and_says_how_to_go_on(monkeypatch, capsys):
    step = Trainer.train_step

    def interrupted(self):
        signal.raise_signal(signal.SIGINT)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupted)
        assert run("train", "--data", "digits", "--out", "m.safetensors", *SMALL) == 130
    assert "stopped by SIGINT and saved at step 1: loss" in capsys.readouterr().out
    assert sorted(os.listdir()) == ["m.safetensors"]
    assert run("train", "--out", "m.safetensors", "--resume", "--no-progress") == 0
    assert "m.safetensors: step 3" in capsys.readouterr().out


@pytest.mark.slow
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
    assert sorted(os.listdir()) == ["m.safetensors"]  # and no temporary file
