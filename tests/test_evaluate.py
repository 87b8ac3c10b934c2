"""The Fréchet distance against closed forms; the classifier; the table against a model that knows the answer."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

import dd_kernels as dd
from dd_kernels import data
from dd_kernels.checkpoint import ModelInfo, save_model
from dd_kernels.cli import evaluate as command
from dd_kernels.cli import main
from dd_kernels.evaluate import Judge, evaluate, frechet_distance, markdown, moments, sampler_table, train_classifier
from dd_kernels.nn import UNet

SCHEDULE = dd.linear_schedule(1000)


@pytest.fixture(scope="module")
def judge():
    return Judge(data.digits("train"), data.digits("test"))


def random_gaussian(size, seed):
    rng = np.random.default_rng(seed)
    factor = rng.standard_normal((size, size + 2))
    return rng.standard_normal(size), factor @ factor.T


class TestFrechet:
    def test_one_dimension(self):
        """(m - m')^2 + (s - s')^2."""
        assert frechet_distance([1.0], [[4.0]], [-2.0], [[9.0]]) == pytest.approx(9 + 1)

    def test_commuting_covariances(self):
        """With common eigenvectors, |m - m'|^2 + sum (sqrt(a) - sqrt(b))^2; an eigenvalue may be 0."""
        rng = np.random.default_rng(0)
        basis, _ = np.linalg.qr(rng.standard_normal((6, 6)))
        a, b = np.array([0.0, 1, 2, 3, 4, 50]), np.array([3.0, 0, 2, 1, 9, 2])
        mean_a, mean_b = rng.standard_normal((2, 6))
        wanted = np.sum((mean_a - mean_b) ** 2) + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
        found = frechet_distance(mean_a, basis * a @ basis.T, mean_b, basis * b @ basis.T)
        # The 0 comes back as +-1e-15, whose root counts.
        assert found == pytest.approx(wanted, rel=1e-7)

    def test_any_covariances(self):
        """Against the eigenvalues of the unsymmetric product, as the formula stands in the paper."""
        (mean_a, cov_a), (mean_b, cov_b) = random_gaussian(8, 0), random_gaussian(8, 1)
        root = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real).sum()
        wanted = np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a) + np.trace(cov_b) - 2 * root
        assert frechet_distance(mean_a, cov_a, mean_b, cov_b) == pytest.approx(wanted, rel=1e-9)

    def test_symmetric_and_zero_for_equals(self):
        a, b = random_gaussian(8, 0), random_gaussian(8, 1)
        assert frechet_distance(*a, *b) == pytest.approx(frechet_distance(*b, *a), rel=1e-12)
        assert 0 <= frechet_distance(*a, *a) < 1e-11 * np.trace(a[1])

    def test_moves_with_both(self):
        """A rotation, a reflection and a shift of both sets of features change nothing; a scale c is c^2."""
        rng = np.random.default_rng(0)
        a, b = rng.standard_normal((50, 5)), 1 + rng.standard_normal((70, 5)) * [1, 2, 3, 4, 5]
        basis, _ = np.linalg.qr(rng.standard_normal((5, 5)))
        before = frechet_distance(*moments(a), *moments(b))
        moved = frechet_distance(*moments(3 * a @ basis + 7), *moments(3 * b[::-1] @ basis + 7))
        assert moved == pytest.approx(9 * before, rel=1e-10)

    def test_moments(self):
        features = np.random.default_rng(0).standard_normal((7, 3)).astype(np.float32)
        mean, cov = moments(torch.from_numpy(features))
        centred = features.astype(np.float64) - features.astype(np.float64).mean(0)
        np.testing.assert_allclose(cov, centred.T @ centred / 6, rtol=1e-12)
        assert mean.dtype == cov.dtype == np.float64
        assert moments(features[:, :1])[1].shape == (1, 1)

    @pytest.mark.parametrize(
        ("features", "message"),
        [
            (np.zeros((1, 3)), r"features must be \[N, D\] with N of at least 2; got \[1, 3\]"),
            (np.zeros(3), r"got \[3\]"),
            (np.array([[0.0], [np.nan], [np.inf]]), "features must be finite; got NaN or inf in 2 rows"),
        ],
    )
    def test_bad_features(self, features, message):
        with pytest.raises(ValueError, match=message):
            moments(features)

    def test_bad_shapes(self):
        with pytest.raises(ValueError, match=r"cov_b must have the shape \[2, 2\]; got \[3, 3\]"):
            frechet_distance(np.zeros(2), np.eye(2), np.zeros(2), np.eye(3))


class TestJudge:
    def test_accuracy(self, judge):
        assert judge.accuracy >= 0.975

    def test_training_is_deterministic_and_leaves_torch_alone(self):
        images, labels = data.digits("train").batch(torch.arange(100))
        state, threads = torch.get_rng_state(), torch.get_num_threads()
        first, again, other = (train_classifier(images, labels, seed) for seed in (3, 3, 4))
        assert torch.equal(state, torch.get_rng_state())
        assert threads == torch.get_num_threads()
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
        assert not torch.equal(first.head.weight, other.head.weight)
        assert not first.training

    def test_noise_grows_the_distance(self, judge):
        noise = dd.randn(judge.test_images.shape, seed=0)
        distances = [judge.distance(judge.test_images + sigma * noise) for sigma in (0, 0.1, 0.2, 0.4, 0.8)]
        assert distances[0] == pytest.approx(0, abs=1e-6)
        assert all(b > 1.5 * a for a, b in pairwise(distances))

    def test_beyond_the_range_is_clipped(self, judge):
        beyond = torch.where(judge.test_images.abs() == 1, 3 * judge.test_images, judge.test_images)
        assert judge.distance(beyond) == judge.distance(judge.test_images)

    def test_sure_of_digits_not_of_noise(self, judge):
        noise = dd.randn((500, 1, 8, 8), seed=0)
        assert judge.sure(judge.test_images) > 0.85
        assert judge.sure(noise) < 0.4

    def test_sure_is_the_share_above_the_probability(self, judge):
        probabilities = judge.classifier(judge.test_images).softmax(1).amax(1)
        assert judge.sure(judge.test_images) == pytest.approx((probabilities >= 0.95).float().mean().item())

    def test_labels_are_those_of_the_held_out_images(self, judge):
        labels = data.digits("test").labels
        assert torch.equal(judge.labels(7), labels[:7])
        assert torch.equal(judge.labels(400), torch.cat((labels, labels[:40])))

    def test_real_images_have_the_classes_asked_for(self, judge):
        train = data.digits("train")
        images, labels = train.batch(torch.arange(len(train)))
        class_of = {image.numpy().tobytes(): int(label) for image, label in zip(images, labels, strict=True)}
        wanted = judge.labels(60)
        found = [class_of[image.contiguous().numpy().tobytes()] for image in judge.real(wanted)]
        assert sorted(found) == sorted(wanted.tolist())
        assert len(judge.real(torch.zeros(1000, dtype=torch.int64))) == int((labels == 0).sum())

    def test_bad_data(self):
        digits = data.digits("test")
        with pytest.raises(ValueError, match="train must have labels"):
            Judge(data.ImageData(digits.images), digits)
        with pytest.raises(ValueError, match=r"train must have images of \(1, 8, 8\).*got \(1, 8, 4\)"):
            Judge(data.ImageData(digits.images[..., :4], digits.labels), digits)


class IdealDenoiser(nn.Module):
    """The best epsilon, in closed form, where every image given comes with a little noise N(0, 0.1^2).

    Without that noise the last step would snap to an image, and hide what the sampler has left.
    """

    def __init__(self, train, schedule):
        super().__init__()
        self.images, self.labels = train.batch(torch.arange(len(train)))
        self.alpha_bar = torch.tensor(schedule.alpha_bar, dtype=torch.float32)

    def forward(self, x, t, y):
        signal, variance = self.alpha_bar[t].sqrt()[:, None], 1 - self.alpha_bar[t][:, None]
        flat, images, spread = x.flatten(1), self.images.flatten(1), signal**2 * 0.1**2
        squares = flat.square().sum(1)[:, None] - 2 * signal * flat @ images.T + signal**2 * images.square().sum(1)
        logits = (-squares / (2 * (variance + spread))).masked_fill(self.labels != y[:, None], -torch.inf)
        nearest = logits.softmax(1) @ images
        x_start = nearest + spread / (signal * (spread + variance)) * (flat - signal * nearest)
        return ((flat - signal * x_start) / variance.sqrt()).reshape(x.shape)


class TestTable:
    def test_rows_are_the_samplers(self):
        options = {"spacing": "trailing", "prediction": "v"}
        ddim = sampler_table(SCHEDULE, 0.5, 10, **options)
        assert torch.equal(ddim.rows, dd.ddim(SCHEDULE, 10, eta=0.5, **options).rows)
        large = sampler_table(SCHEDULE, "fixed_large", 10, **options)
        assert torch.equal(large.rows, dd.ddpm(SCHEDULE, 10, variance="fixed_large", **options).rows)
        assert torch.equal(ddim.timesteps, large.timesteps)

    @pytest.mark.parametrize("row", [0.0, "fixed_large"])
    def test_learned_variance_plays_no_part(self, row):
        """A model of twice the channels draws what its first half draws."""
        model = nn.Conv2d(1, 1, 3, padding=1)

        def both(x, t):
            return torch.cat((model(x), 5 + x), dim=1)

        alone, halved = (
            dd.sample(f, (3, 1, 8, 8), sampler_table(SCHEDULE, row, 5, learned_variance=learned), seed=0)
            for f, learned in ((lambda x, t: model(x), False), (both, True))
        )
        torch.testing.assert_close(alone, halved, rtol=1e-5, atol=1e-6)

    def test_unknown_row(self):
        with pytest.raises(ValueError, match="rows must be eta in"):
            sampler_table(SCHEDULE, "small", 10)

    def test_an_ideal_model_reaches_the_floor_by_ddim_only(self, judge):
        """The figures mean something: 10 steps of DDIM draw digits, 10 of DDPM with the larger variance do not."""
        model = IdealDenoiser(data.digits("train"), SCHEDULE)
        n = 100
        result = evaluate(
            model,
            SCHEDULE,
            judge,
            n=n,
            steps=[10],
            rows=[0.0, "fixed_large"],
            batch_size=64,
            model_kwargs={"y": judge.labels(n)},
        )
        ddim, ddpm = result.cells
        assert (ddim.row, ddpm.row, ddim.steps) == (0.0, "fixed_large", 10)
        assert ddim.distance < 2 * result.floor
        assert ddpm.distance > 2 * ddim.distance
        assert ddim.sure > 0.95 > ddpm.sure
        assert min(ddim.images_per_second, ddpm.images_per_second) > 0
        assert (result.samples, result.floor_images, result.test_images) == (n, n, 360)
        assert not model._forward_hooks

    def test_samples_that_are_not_finite(self, judge):
        model = nn.Conv2d(1, 1, 1)
        nn.init.constant_(model.weight, torch.nan)
        wrapped = Timeless(model)
        with pytest.raises(ValueError, match="model must draw finite samples; got NaN or inf, eta 0, 2 steps"):
            evaluate(wrapped, SCHEDULE, judge, n=4, steps=[2], rows=[0.0])
        assert not wrapped._forward_hooks

    def test_bad_count_and_steps(self, judge):
        model = Timeless(nn.Conv2d(1, 1, 1))
        with pytest.raises(ValueError, match="n must be at least 2"):
            evaluate(model, SCHEDULE, judge, n=1)
        with pytest.raises(ValueError, match=r"steps must be an int in \[1, 1000\]; got 1001"):
            evaluate(model, SCHEDULE, judge, n=4, steps=[1, 1001])

    def test_progress_counts_every_call(self, judge, capsys):
        model = Timeless(nn.Conv2d(1, 1, 1))
        for guidance in ({}, {"uncond_kwargs": {}, "guidance_scale": 2.0}):
            evaluate(model, SCHEDULE, judge, n=10, steps=[2, 3], rows=[0.0], batch_size=4, progress=True, **guidance)
            calls = "100/100" if guidance else "50.0/50.0"
            assert f"{calls} [" in capsys.readouterr().err


class Timeless(nn.Module):
    """A model of x alone."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, t):
        return self.model(x)


def tiny_model(path, **overrides):
    torch.manual_seed(0)
    options = {"image_size": 8, "in_channels": 1, "channels": (8,), "num_res_blocks": 1, "middle_attention": False}
    model = UNet(**{**options, "num_groups": 4, "num_classes": 10, "null_class": True, **overrides})
    for parameter in model.parameters():
        if not parameter.any():  # an untrained model's last layer, with which it would predict 0
            nn.init.normal_(parameter, std=0.1)
    classes = tuple(str(c) for c in range(model.config["num_classes"] or 0))
    save_model(path, model.state_dict(), ModelInfo(model.config, "linear", 1000, "epsilon", classes, {}))
    return str(path)


@pytest.fixture
def run(judge, monkeypatch, tmp_path):
    """Runs the command in an empty folder with the classifier that is trained already."""
    monkeypatch.setattr(command, "Judge", lambda train, test: judge)
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: main(["evaluate", "--no-progress", "-n", "12", *arguments])


class TestCommand:
    def test_layout_and_files(self, run, tmp_path, capsys):
        model = tiny_model(tmp_path / "model.safetensors")
        assert run("--model", model, "--steps", "2", "3", "--out", "table.md", "table.json", "--seed", "5") == 0
        printed = capsys.readouterr().out
        assert printed == (tmp_path / "table.md").read_text(encoding="utf-8")
        lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if "|" in line]
        rows = ["eta 0", "eta 0.2", "eta 0.5", "eta 1", "DDPM, larger variance"]
        assert [line[0] for line in lines if line[0] and not line[0].startswith("-")] == rows * 3
        assert [line[1:] for line in lines if not line[0]] == [["2 steps", "3 steps"]] * 3

        found = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))
        etas = [0.0, 0.2, 0.5, 1.0, "fixed_large"]
        assert [(c["row"], c["steps"]) for c in found["cells"]] == [(row, s) for row in etas for s in (2, 3)]
        assert found["samples"] == 12
        assert found["settings"]["seed"] == 5
        assert found["run"]["backend"] in ("cpu", "reference")
        assert {"device", "threads", "torch", "numpy", "python", "model", "dtype", "guidance"} <= found["run"].keys()
        assert f"the floor is {found['floor']:.1f}" in printed
        assert f"accuracy {found['accuracy']:.1%}" in printed
        assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "table.json", "table.md"]

    def test_same_seed_same_figures(self, run, tmp_path):
        model = tiny_model(tmp_path / "model.safetensors")
        cells = []
        for batch_size in ("12", "5"):
            run("--model", model, "--steps", "3", "--etas", "1", "--batch-size", batch_size, "--out", "t.json")
            cells.append(json.loads((tmp_path / "t.json").read_text())["cells"][0])
        assert cells[0]["distance"] == pytest.approx(cells[1]["distance"], rel=1e-3)

    def test_guidance_changes_the_samples(self, run, tmp_path):
        model = tiny_model(tmp_path / "model.safetensors")
        distances = []
        for guidance in ([], ["--guidance", "4"]):
            assert run("--model", model, "--steps", "3", "--etas", "0", "--out", "t.json", *guidance) == 0
            distances.append(json.loads((tmp_path / "t.json").read_text())["cells"][0]["distance"])
        assert distances[0] != distances[1]

    @pytest.mark.parametrize("overrides", [{"num_classes": None, "null_class": False}, {"learn_variance": True}])
    def test_other_models(self, run, tmp_path, overrides):
        model = tiny_model(tmp_path / "model.safetensors", **overrides)
        assert run("--model", model, "--steps", "2", "--etas", "0", "fixed_large") == 0

    @pytest.mark.parametrize(
        ("overrides", "arguments", "message"),
        [
            ({}, ["--out", "table.txt"], "--out must name .md or .json files; got 'table.txt'"),
            ({}, ["--out", "kept.md", "no/table.md"], "--out: cannot write 'no/table.md'"),
            ({}, ["--steps", "2000"], "steps must be an int in [1, 1000]; got 2000"),
            ({"null_class": False}, ["--guidance", "2"], "--guidance needs a model trained with dropped labels"),
            ({"num_classes": 3}, [], "--model must have the 10 classes of the digits, or none; got 3"),
            ({"in_channels": 3}, [], "--model must draw digits, (1, 8, 8); got a model that draws (3, 8, 8)"),
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


def test_markdown_without_the_larger_variance(judge):
    result = evaluate(Timeless(nn.Conv2d(1, 1, 1)), SCHEDULE, judge, n=4, steps=[1], rows=[0.0])
    facts = {"seconds": 1.0, "device": "cpu", "threads": 1, "backend": "cpu", "torch": "2", "model": "m"}
    text = markdown(result, {**facts, "dtype": "fp32", "guidance": 1.0, "batch_size": 4})
    assert "larger variance" not in text
