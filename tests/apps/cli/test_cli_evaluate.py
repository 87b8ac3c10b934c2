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
        assert [line[0] for line in lines if line[0] and not line[0].startswith("-")] == rows * 4
        assert [line[1:] for line in lines if not line[0]] == [["2 steps", "3 steps"]] * 4

        found = json.loads((report / "evaluation.json").read_text(encoding="utf-8"))
        etas = [0.0, 0.2, 0.5, 1.0, "fixed_large", "dpm++"]
        assert [(c["row"], c["steps"]) for c in found["cells"]] == [(row, s) for row in etas for s in (2, 3)]
        assert found["samples"] == 12
        assert found["settings"]["seed"] == 5
        assert found["run"]["backend"] in ("cpu", "reference")
        assert {"device", "threads", "torch", "numpy", "python", "model", "dtype", "guidance"} <= found["run"].keys()
        assert f"the floor is {found['floor']['distance']:.1f}" in printed
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
