"""The table of what each option of ``train`` does: its runs are the recipe's but for the option, and made once."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import train_options
from benchmarks.train_options import LINES, Lengths
from dd_kernels.apps import checkpoint, cli
from dd_kernels.apps.checkpoint import ModelInfo
from dd_kernels.apps.training import RECIPES, TrainOptions
from dd_kernels.nn import UNet

LENGTHS = Lengths(steps=40, sampler_steps=3, samples=20)


class _Done:
    step, loss, stopped_by = 0, 0.0, None


def test_each_line_is_a_run_of_the_recipe_but_for_its_option(tmp_path, monkeypatch, capsys):
    model = UNet(image_size=8, in_channels=1, channels=(8,), num_groups=4, middle_attention=False)
    trained, evaluated, real = [], [], train_options.command

    def train(options, out, **_):
        trained.append(options)
        info = ModelInfo(model.config, "linear", 10, "epsilon", (), {"step": options.steps})
        checkpoint.save_model(out, model.state_dict(), info)
        return _Done()

    def command(arguments):
        if arguments[0] == "train":
            return real(arguments)
        evaluated.append(arguments)
        measures = {"images": 20, "distance": 5.0, "distance_error": 1.0, "sure": 1.0, "right": 0.5}
        found = {"cells": [{"measures": measures}] * 2, "columns": [{"floor": measures}], "run": {}}
        (tmp_path / arguments[arguments.index("--out") + 1]).write_text(json.dumps(found))
        return 0

    monkeypatch.setattr(cli.train.training, "train", train)
    monkeypatch.setattr(train_options, "command", command)
    table = train_options.measure(LINES, tmp_path, LENGTHS)

    recipe = asdict(TrainOptions(data="fashion-mnist", **{**RECIPES["fashion-mnist"], "steps": 40, "warmup": 2}))
    changes = [{k: v for k, v in asdict(options).items() if v != recipe[k]} for options in trained]
    assert changes == [
        {"ema": (0.999, 0.9, 0.0)},
        {"seed": 1},
        {"model": {"learn_variance": True}},
        {"prediction": "v"},
        {"prediction": "x_start"},
        {"loss_weight": "min-snr"},
        {"timesteps": "loss-second-moment"},
        {"input_perturbation": 0.1},
        {"label_drop": 0.0},
        {"model": {"self_conditioning": True}},
        {"lr_schedule": "constant"},
        {"warmup": 0},
        {"clip_grad": float("inf")},
        {"precision": "fp32"},
    ]
    outs = [line[line.index("--out") + 1] for line in evaluated]
    assert len(set(outs)) == len(LINES)
    assert ["learned_range" in line for line in evaluated] == ["learn_variance" in line.flags for line in LINES]
    rows = table.splitlines()
    assert "| `--ema 0.9`, a shorter average | 5.0 ± 1.0 | 50.0% | 5.0 ± 1.0 | 50.0% |" in rows
    assert len(capsys.readouterr().out.splitlines()) == len(LINES)
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    assert train_options.measure(LINES, tmp_path, LENGTHS) == table
    assert len(trained) == len(changes), "what is measured is not trained again"
    with pytest.raises(SystemExit, match=r"figures.json is of other lengths: \{'steps': 40, .* wanted \{'steps': 20, "):
        train_options.measure(LINES, tmp_path, Lengths(steps=20))


def test_readme_has_the_table_of_what_was_measured(capsys):
    folder = Path(train_options.__file__).parent / "results/train_options"
    table = train_options.measure(LINES, folder, Lengths())
    assert table in (folder.parents[2] / "README.md").read_text()
