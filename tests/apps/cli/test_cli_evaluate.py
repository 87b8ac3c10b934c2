"""``evaluate``: the table's layout, its files, every error in one line."""

import json
from dataclasses import replace

import pytest
import torch
from known_judge import KnownJudge
from torch import nn

from dd_kernels.apps.checkpoint import ModelInfo, save_model
from dd_kernels.apps.cli import evaluate as command
from dd_kernels.apps.cli import main
from dd_kernels.apps.data import ImageData, sources
from dd_kernels.apps.evaluate import Judge, Measures, save_judge
from dd_kernels.apps.evaluate.report import distance, share
from dd_kernels.apps.files import only_writer
from dd_kernels.nn import UNet


def tiny_model(path, **overrides):
    torch.manual_seed(0)
    options = {"image_size": 8, "in_channels": 1, "channels": (8,), "num_res_blocks": 1, "middle_attention": False}
    model = UNet(**{**options, "num_groups": 4, "num_classes": 10, "null_class": True, **overrides})
    for parameter in model.parameters():
        if not parameter.any():  # the last layer is 0 before training, and would predict 0
            nn.init.normal_(parameter, std=0.1)
    classes = tuple(str(c) for c in range(model.config["num_classes"] or 0))
    save_model(path, model.state_dict(), ModelInfo(model.config, "linear", 1000, "epsilon", classes, {}))
    return str(path)


@pytest.fixture
def run(judge, monkeypatch):
    """Runs the command with the classifier that is trained already."""
    monkeypatch.setattr(command.Judge, "trained", lambda train, held_out: judge)
    return lambda *arguments: main(["evaluate", "--no-progress", "--overwrite", "-n", "12", *arguments])


class TestCommand:
    def test_layout_and_files(self, run, tmp_path, capsys):
        model = tiny_model(tmp_path / "model.safetensors")
        assert run("--model", model, "--steps", "2", "3", "--out", "report", "--seed", "5") == 0
        printed = capsys.readouterr().out
        report = tmp_path / "report"
        assert printed == (report / "evaluation.md").read_text(encoding="utf-8")
        lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if "|" in line]
        rows = ["eta 0", "eta 0.2", "eta 0.5", "eta 1", "DDPM, larger variance", "dpm++"]
        grids = [*rows, "floor", *rows * 3, *rows, "held-out images"]
        assert [line[0] for line in lines if line[0] and not line[0].startswith("-")] == grids
        assert [line[1:] for line in lines if not line[0]] == [["2 steps", "3 steps"]] * 4 + [list("0123456789")]

        found = json.loads((report / "evaluation.json").read_text(encoding="utf-8"))
        etas = [0.0, 0.2, 0.5, 1.0, "fixed_large", "dpm++"]
        assert [(c["row"], c["steps"]) for c in found["cells"]] == [(row, s) for row in etas for s in (2, 3)]
        assert [(c["steps"], c["samples"]) for c in found["columns"]] == [(2, 12), (3, 12)]
        assert found["settings"]["seed"] == 5
        assert found["run"]["backend"] in ("cpu", "reference")
        assert {"device", "threads", "torch", "numpy", "python", "model", "dtype", "guidance"} <= found["run"].keys()
        floor = next(line for line in lines if line[0] == "floor")
        assert floor[1] == distance(Measures(**found["columns"][0]["floor"]))
        by_class = next(line for line in reversed(lines) if line[0] == "eta 1")
        assert by_class[1:] == list(map(share, found["cells"][7]["measures"]["right_by_class"]))
        assert "dpm++: noise levels of their own spacing." in printed
        assert f"accuracy {found['held_out']['right']:.1%}" in printed
        assert sorted(p.name for p in report.iterdir()) == ["evaluation.json", "evaluation.md"]

    def test_one_file(self, run, tmp_path, capsys):
        model = tiny_model(tmp_path / "model.safetensors")
        assert run("--model", model, "--steps", "2", "--etas", "0", "--out", "t.md") == 0
        assert capsys.readouterr().out == (tmp_path / "t.md").read_text(encoding="utf-8")

    def test_other_data(self, tmp_path, monkeypatch, capsys):
        """Compares with the held-out images of the data named; one that has none of its own is refused."""
        judges = []

        class Recording(KnownJudge):
            @classmethod
            def trained(cls, train, held_out):
                judges.append((train, held_out))
                return cls()

        monkeypatch.setattr(command, "Judge", Recording)
        real = ImageData(torch.zeros(20, 1, 8, 8, dtype=torch.uint8), torch.arange(20) % 10, tuple("0123456789"))
        monkeypatch.setitem(sources.NAMED, "zeros", lambda split: replace(real, maximum=len(split)))
        line = ["evaluate", "--model", tiny_model(tmp_path / "m.safetensors"), "--steps", "1", "--rows", "0", "-n", "2"]
        assert main([*line, "--no-progress", "--data", "zeros"]) == 0
        assert [data.maximum for data in judges[0]] == [len("train"), len("test")]
        capsys.readouterr()
        assert main([*line, "--no-progress", "--data", "a.npz"]) == 2
        assert "or a folder of IDX files, which keep images for tests; got 'a.npz'" in capsys.readouterr().err

    def test_a_judge_is_trained_once_and_kept(self, run, judge, tmp_path, monkeypatch):
        """The file of a judge gives the figures that the run gave which wrote it; another shape is refused."""
        line = ["--model", tiny_model(tmp_path / "m.safetensors"), "--steps", "2", "--rows", "0", "--out", "t.json"]
        assert run(*line, "--judge", "judge.safetensors") == 0
        first = json.loads((tmp_path / "t.json").read_text())
        monkeypatch.setattr(command.Judge, "trained", None)
        assert run(*line, "--judge", "judge.safetensors") == 0
        again = json.loads((tmp_path / "t.json").read_text())
        assert again["cells"][0]["measures"] == first["cells"][0]["measures"]
        assert again["held_out"] == first["held_out"]
        line[1] = tiny_model(tmp_path / "wide.safetensors", image_size=16)
        assert run(*line, "--judge", "judge.safetensors") == 2
        assert run(*line[2:], "--data", "nothing", "--judge", "m.safetensors") == 2

    @pytest.mark.parametrize(
        ("flags", "images"),
        [
            (["-n", "12", "10", "--steps", "2", "3", "--rows", "0", "1"], [12, 10, 12, 10, 10]),
            (["-n", "12", "--steps", "2", "--rows", "1", "--guidances", "0", "1", "2", "3"], [12, 12, 12, 12, 12]),
        ],
    )
    def test_a_run_that_was_stopped_goes_on(self, run, tmp_path, monkeypatch, capsys, flags, images):
        """It draws the cells that are missing alone, and has the figures of a run that was not stopped."""
        model, drawn, whole = tiny_model(tmp_path / "model.safetensors"), [], Judge.measure
        line = ["evaluate", "--no-progress", "--model", model, *flags]

        def figures(path):
            found = json.loads((tmp_path / path).read_text())
            del found["run"]["seconds"]
            return {**found, "cells": [{**cell, "images_per_second": 0} for cell in found["cells"]]}

        def stopping(self, images, labels=None):
            drawn.append(len(images))
            if len(drawn) == 4:
                raise KeyboardInterrupt
            return whole(self, images, labels)

        assert main([*line, "--out", "whole.json"]) == 0
        monkeypatch.setattr(Judge, "measure", stopping)
        line += ["--out", "t.json", "--resume-if-there"]
        assert main(line) == 130
        assert len(figures("t.json")["cells"]) == 3
        capsys.readouterr()
        assert main(line) == 0
        assert drawn == images
        assert figures("t.json") == figures("whole.json")
        printed = capsys.readouterr().out
        with only_writer("--out", "t.json"):
            assert main(line) == 2
        assert "--out: another process is writing 't.json'" in capsys.readouterr().err
        assert main(line) == 0  # draws nothing, and prints the tables
        assert len(drawn) == 5
        assert capsys.readouterr().out.splitlines()[:-1] == printed.splitlines()[:-1]  # the last one has the seconds

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            (["--seed", "1"], "--out: 't.json' holds another evaluation; seed is 0 there and 1 here"),
            (["-n", "11"], "samples is [12] there and [11] here"),
            (["--rows", "1"], "rows is [0.0] there and [1.0] here"),
            (["--guidance", "2"], "guidance is 1.0 there and 2.0 here"),
            (["--judge", "other.safetensors"], "judge is '"),
            (
                ["--model", "other_model.safetensors"],
                "model is 'm.safetensors' there and 'other_model.safetensors' here",
            ),
            (["--overwrite"], "only one of --resume-if-there and --overwrite may be given; got both"),
            (["--out", "t.md"], "--resume-if-there needs --out X.json, without --bits-per-dim; got --out t.md"),
            (["--guidances", "1"], "axis is None there and 'guidance' here"),
            (["--out", "damaged.json"], "'damaged.json' holds no evaluation to go on with"),
        ],
    )
    def test_another_run_is_not_gone_on_with(self, run, judge, tmp_path, capsys, changed, message):
        tiny_model(tmp_path / "m.safetensors")
        tiny_model(tmp_path / "other_model.safetensors", num_res_blocks=2)
        save_judge("other.safetensors", judge)
        (tmp_path / "damaged.json").write_text('{"cells": []}')
        line = ["evaluate", "--no-progress", "--model", "m.safetensors", "-n", "12", "--steps", "2", "--rows", "0"]
        line += ["--out", "t.json", "--resume-if-there"]
        assert main(line) == 0
        kept = (tmp_path / "t.json").read_bytes()
        capsys.readouterr()
        assert main([*line, *changed]) == 2
        assert message in capsys.readouterr().err
        assert (tmp_path / "t.json").read_bytes() == kept

    def test_same_seed_same_figures(self, run, tmp_path):
        model = tiny_model(tmp_path / "model.safetensors")
        cells = []
        for batch_size in ("12", "5"):
            run("--model", model, "--steps", "3", "--etas", "1", "--batch-size", batch_size, "--out", "t.json")
            cells.append(json.loads((tmp_path / "t.json").read_text())["cells"][0])
        distances = [cell["measures"]["distance"] for cell in cells]
        assert distances[0] == pytest.approx(distances[1], rel=1e-3)

    def test_guidance_changes_the_samples(self, run, tmp_path):
        model = tiny_model(tmp_path / "model.safetensors")
        distances = []
        for guidance in ([], ["--guidance", "4"]):
            assert run("--model", model, "--steps", "3", "--etas", "0", "--out", "t.json", *guidance) == 0
            distances.append(json.loads((tmp_path / "t.json").read_text())["cells"][0]["measures"]["distance"])
        assert distances[0] != distances[1]

    def test_steps_that_do_not_fit_are_found_before_the_classifier_is_trained(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(command, "Judge", None)
        model = tiny_model(tmp_path / "model.safetensors")
        assert main(["evaluate", "--model", model, "--steps", "10", "1001"]) == 2
        assert "steps must be an int in [1, 1000]; got 1001" in capsys.readouterr().err

    def test_nothing_is_replaced_unasked(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(command, "Judge", None)
        (tmp_path / "t.json").write_text("kept")
        assert main(["evaluate", "--out", "t.json"]) == 2
        assert "--out: 't.json' is there already (--overwrite to replace it)" in capsys.readouterr().err
        assert (tmp_path / "t.json").read_text() == "kept"

    @pytest.mark.parametrize("overrides", [{"num_classes": None, "null_class": False}, {"learn_variance": True}])
    def test_other_models(self, run, tmp_path, overrides):
        model = tiny_model(tmp_path / "model.safetensors", **overrides)
        assert run("--model", model, "--steps", "2", "--rows", "0", "fixed_large", "unipc", "euler_ancestral") == 0

    def test_a_learned_variance_is_a_row_of_its_model(self, run, tmp_path, capsys):
        model = tiny_model(tmp_path / "model.safetensors", learn_variance=True)
        assert run("--model", model, "--steps", "2") == 0
        assert "DDPM, learned variance" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("overrides", "arguments", "message"),
        [
            (
                {},
                ["--out", "table.txt"],
                "--out must be a .md, a .json or a folder (a name without a suffix); got 'table.txt'",
            ),
            ({}, ["--out", "no/table.md"], "--out: cannot write 'no/table.md'"),
            ({}, ["--steps", "2000"], "steps must be an int in [1, 1000]; got 2000"),
            ({"null_class": False}, ["--guidance", "2"], "--guidance needs a model trained with dropped labels"),
            ({}, ["--rows", "learned_range"], "learned_range needs a model that learns its variance"),
            ({"num_classes": 3}, [], "--model must have the 10 classes of the data, or none; got 3"),
            (
                {"in_channels": 3},
                [],
                "--model must draw images of (1, 8, 8), as the data are (--data names others); got a model that draws",
            ),
            ({}, ["--model", "absent.safetensors"], "there is no model 'absent.safetensors'"),
            ({}, ["--device", "nowhere"], "--device 'nowhere' cannot be used"),
        ],
    )
    def test_one_clear_line(self, run, tmp_path, capsys, overrides, arguments, message):
        model = tiny_model(tmp_path / "model.safetensors", **overrides)
        (tmp_path / "kept.md").write_text("kept")
        assert run("--model", model, "--steps", "2", "--etas", "0", *arguments) == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.count("\n") == 1
        assert message in output.err
        assert (tmp_path / "kept.md").read_text() == "kept"

    @pytest.mark.parametrize(
        "arguments", [["--etas", "1.5"], ["--etas", "small"], ["--etas", "nan"], ["--steps", "0"], ["-n", "1"]]
    )
    def test_bad_values(self, run, capsys, arguments):
        with pytest.raises(SystemExit) as stop:
            run(*arguments)
        assert stop.value.code == 2
        assert "must be" in capsys.readouterr().err.splitlines()[-1]
