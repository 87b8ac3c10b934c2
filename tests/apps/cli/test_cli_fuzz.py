"""Random command lines: each ends with status 0, or with status 2 and one line."""

import os
import pathlib
import random
import shutil

import numpy as np
import pytest
from commands import run
from known_judge import KnownJudge
from PIL import Image

from dd_kernels.apps import cli

ODD = [
    "-", "-1", "0", "1", "2", "3", "0.5", "nan", "inf", "-inf", "1e400", "0x10", "true", "null", "[]", "{}",
    "[1,[2]]", "[8]", "..", "/dev/null", "/dev/full", "pipe", "link", "loop", "folder", "empty", "no/such", "a.png",
    "a.jpg", "a.npz", "text.npz", "text.safetensors", "m.safetensors", "digits", "pictures", "\u00e4\u4e2d",
    "\udcff", "@a", "%s", "'\"", "all", "none", "cpu", "cuda:99", "meta", "xla", "reference", "--", "--help", "x=1",
    "x",
]  # fmt: skip
ODD += ["", " ", "9" * 40, "a\nb"]
SWITCHES = {"--overwrite", "--no-progress", "--resume", "--grey", "--flip", "--strict", "--unconditional", "--no-state"}
SWITCHES |= {"--bits-per-dim", "--half"}
FLAGS = {
    "sample": (
        "-n --out --overwrite --columns --sampler --steps --spacing --eta --variance --clip --seed --first-sample "
        "--model --ema --dtype --classes --guidance --batch-size --device --backend --npz-names --no-progress "
        "--guidance-weight --guidance-rescale --guidance-interval --classifier --classifier-scale"
    ),
    "interpolate": (
        "-n --seeds --images --rows --steps --spacing --out --overwrite --model --classes --guidance --device --dtype "
        "--method --depth --seed"
    ),
    "reconstruct": "-n --images --data --steps --spacing --out --overwrite --plot --model --classes --dtype",
    "edit": (
        "-n --images --data --strength --sampler --steps --spacing --eta --variance --clip --seed --out --overwrite "
        "--model --classes --guidance --batch-size"
    ),
    "inpaint": (
        "-n --images --data --mask --draws --resample --jump --sampler --steps --spacing --eta --clip --seed --out "
        "--overwrite --model --classes --guidance --batch-size"
    ),
    "evaluate": (
        "-n --steps --etas --spacing --seed --out --overwrite --model --guidance --batch-size --device --dtype "
        "--guidances --classifier-scales --bits-per-dim --data --plot --variance --judge"
    ),
    "train": (
        "--out --resume --overwrite --save-every --sample-every --preview --no-state --device --data --image-size "
        "--grey --background --strict --flip --config --set --schedule --num-timesteps --prediction --label-drop "
        "--unconditional --batch-size --lr --weight-decay --beta1 --beta2 --warmup --clip-grad --ema --precision "
        "--half --plot --evolution "
        "--seed --recipe --loss-weight --snr-gamma --timesteps --input-perturbation --lr-schedule"
    ),
}
GOOD = {
    "--sampler": ["ddim", "ddpm", "dpm++", "unipc"],
    "--spacing": ["leading", "trailing", "linspace", "karras"],
    "--variance": ["fixed_large"],
    "--dtype": ["bf16"],
    "--classes": ["1,2"],
    "--npz-names": ["arr"],
    "--etas": ["fixed_large", "dpm++"],
    "--schedule": ["cosine"],
    "--prediction": ["v"],
    "--config": ["digits"],
    "--set": ["channels=[8]", "num_groups=4", "dropout={}", "num_heads=1"],
    "--precision": ["bf16"],
    "--loss-weight": ["min-snr"],
    "--timesteps": ["loss-second-moment"],
    "--lr-schedule": ["cosine"],
    "--data": ["digits", "pictures", "a.npz"],
    "--out": ["new.png", "new.npz", "new"],
    "--preview": ["p.png"],
    "--plot": ["p.png"],
    "--recipe": ["digits"],
    "--image-size": ["8"],
    "--model": ["m.safetensors"],
    "--images": ["a.png"],
    "--method": ["ddpm"],
    "--mask": ["half", "centre", "a.png"],
    "--strength": ["0", "0.5", "1"],
    "--classifier": ["c.safetensors"],
}
# Flags that make a valid command finish in a fraction of a second.
SHORT = {
    "sample": ["--model", "m.safetensors", "-n", "2", "--steps", "1"],
    "interpolate": ["--model", "m.safetensors", "-n", "2", "--steps", "1"],
    "reconstruct": ["--model", "m.safetensors", "--steps", "1"],
    "edit": ["--model", "m.safetensors", "--steps", "2"],
    "inpaint": ["--model", "m.safetensors", "--steps", "2", "--resample", "1"],
    "evaluate": ["--model", "m.safetensors", "-n", "2", "--steps", "1"],
    "train": ["--data", "digits", "--out", "t.safetensors", "--config", "digits", "--batch-size", "1", "--steps", "1"],
}


def command_line(random_):
    """Returns a command with up to three random flags, each with a value that is good or odd."""
    name = random_.choice([*FLAGS, *FLAGS, *FLAGS, "paint", ""])
    words = [name, *SHORT.get(name, [])]
    if name == "train":
        words += [
            "--num-timesteps",
            "2",
            "--set",
            "channels=[8,8]",
            "num_heads=2",
            "num_groups=4",
            "--sample-every",
            "9",
        ]
    for _ in range(random_.randrange(4)):
        flag = random_.choice(FLAGS.get(name, "-n --out").split())
        words.append(flag if random_.random() < 0.97 else flag + random_.choice(ODD))
        if flag not in SWITCHES or random_.random() < 0.05:
            for _ in range(random_.choice([1, 1, 1, 1, 2, 0])):
                words.append(random_.choice(GOOD[flag] if flag in GOOD and random_.random() < 0.8 else ODD))
    return words if random_.random() < 0.9 else [*words, random_.choice(ODD)]


def fill(models):
    """Puts files of every sort into the working folder."""
    for path in pathlib.Path().iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    shutil.copy(models["digits"], "m.safetensors")
    for name in ("text.npz", "text.safetensors"):
        pathlib.Path(name).write_text("text")
    pathlib.Path("empty").mkdir()
    for name in ("folder", "pictures/cat", "pictures/dog"):
        pathlib.Path(name).mkdir(parents=True)
        Image.fromarray(np.zeros((8, 9), np.uint8)).save(f"{name}/a.png")
    shutil.copy("folder/a.png", "a.png")
    np.savez("a.npz", images=np.zeros((3, 8, 8), np.uint8), labels=np.array([0, 1, 1]))
    os.mkfifo("pipe")
    os.symlink("m.safetensors", "link")
    os.symlink("loop", "loop")


@pytest.mark.parametrize("count", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_random_command_lines(models, monkeypatch, capsys, count):
    monkeypatch.setattr(cli.evaluate, "Judge", KnownJudge)
    random_, statuses = random.Random(count), []
    for _ in range(count):
        words = command_line(random_)
        fill(models)
        try:
            status = run(*words)
        except SystemExit as stop:
            status = stop.code
        except BaseException as error:
            raise AssertionError(f"{words} raised {error!r}") from error
        error = capsys.readouterr().err
        errors = [line for line in error.splitlines() if ": error: " in line]
        assert status in (0, 1, 2), (words, status, error)
        assert len(errors) == (status != 0), (words, error)
        assert status != 1 or "try a smaller lr" in errors[0], (words, error)
        assert "Traceback" not in error, (words, error)
        assert not list(pathlib.Path().rglob(".*.part")), words
        statuses.append(status)
    print({status: statuses.count(status) for status in sorted(set(statuses))})
    assert statuses.count(0) > count // 10
    assert statuses.count(2) > count // 10
