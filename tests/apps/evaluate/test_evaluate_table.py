"""The table of samplers against a model that knows the answer."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import dd_kernels as dd
from dd_kernels.apps import data
from dd_kernels.apps.evaluate import as_json, evaluate, markdown, sampler_table

SCHEDULE = dd.linear_schedule(1000)


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


class Timeless(nn.Module):
    """A model of x alone."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, t):
        return self.model(x)


class TestTable:
    def test_rows_are_the_samplers(self):
        options = {"spacing": "trailing", "prediction": "v"}
        ddim = sampler_table(SCHEDULE, 0.5, 10, **options)
        assert torch.equal(ddim.rows, dd.ddim(SCHEDULE, 10, eta=0.5, **options).rows)
        large = sampler_table(SCHEDULE, "fixed_large", 10, **options)
        assert torch.equal(large.rows, dd.ddpm(SCHEDULE, 10, variance="fixed_large", **options).rows)
        assert torch.equal(ddim.timesteps, large.timesteps)
        solver = sampler_table(SCHEDULE, "dpm++", 10, learned_variance=True, **options)
        assert torch.equal(solver.rows, dd.dpm_solver(SCHEDULE, 10, prediction="v").rows)
        assert solver.learned_variance

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

    def test_the_row_of_the_learned_variance(self):
        table = sampler_table(SCHEDULE, "learned_range", 10, learned_variance=True)
        expected = dd.ddpm(SCHEDULE, 10, variance="learned_range", spacing="leading")
        assert torch.equal(table.rows, expected.rows)
        assert table.learned_variance
        with pytest.raises(ValueError, match="learned_range needs a model that learns its variance"):
            sampler_table(SCHEDULE, "learned_range", 10)

    def test_unknown_row(self):
        with pytest.raises(ValueError, match="rows must be eta in"):
            sampler_table(SCHEDULE, "small", 10)

    def test_an_ideal_model_reaches_the_floor_by_ddim_only(self, judge):
        """10 steps of DDIM reach the floor; 10 of DDPM with the larger variance do not."""
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
        assert ddim.measures.distance < 2 * result.columns[0].floor.distance
        assert ddpm.measures.distance > 2 * ddim.measures.distance
        assert ddim.measures.sure > 0.95 > ddpm.measures.sure
        assert min(ddim.images_per_second, ddpm.images_per_second) > 0
        column = result.columns[0]
        assert (column.steps, column.samples, column.floor.images, result.held_out.images) == (10, n, n, 360)

    def test_columns_of_their_own_numbers_of_samples(self, judge):
        """A column of fewer samples has the first of them, and a floor of as many real images."""
        model = IdealDenoiser(data.digits("train"), SCHEDULE)
        options = {"steps": [2, 3], "rows": [0.0], "batch_size": 16}
        both = evaluate(model, SCHEDULE, judge, n=[30, 20], model_kwargs={"y": judge.labels(30)}, **options)
        few = evaluate(model, SCHEDULE, judge, n=20, model_kwargs={"y": judge.labels(20)}, **options)
        assert [column.floor.images for column in both.columns] == [30, 20]
        assert [cell.measures.images for cell in both.cells] == [30, 20]
        assert both.columns[1] == few.columns[1]
        assert both.cells[1].measures.distance == pytest.approx(few.cells[1].measures.distance, rel=1e-3)
        assert both.cells[1].measures.right_by_class == few.cells[1].measures.right_by_class

    def test_samples_that_are_not_finite(self, judge):
        model = nn.Conv2d(1, 1, 1)
        nn.init.constant_(model.weight, torch.nan)
        wrapped = Timeless(model)
        with pytest.raises(ValueError, match="model must draw finite samples; got NaN or inf, eta 0, 2 steps"):
            evaluate(wrapped, SCHEDULE, judge, n=4, steps=[2], rows=[0.0])

    def test_bad_count_and_steps(self, judge):
        model = Timeless(nn.Conv2d(1, 1, 1))
        with pytest.raises(ValueError, match="n must be at least 2"):
            evaluate(model, SCHEDULE, judge, n=1)
        with pytest.raises(ValueError, match=r"steps must be an int in \[1, 1000\]; got 1001"):
            evaluate(model, SCHEDULE, judge, n=4, steps=[1, 1001])
        with pytest.raises(ValueError, match="n must be one number, or one for each of the 3 steps; got 2"):
            evaluate(model, SCHEDULE, judge, n=[4, 4], steps=[1, 2, 3])
        with pytest.raises(ValueError, match=r"steps must differ from one another; got \[1, 1\]"):
            evaluate(model, SCHEDULE, judge, n=4, steps=[1, 1])

    def test_progress_counts_the_calls(self, judge, capsys):
        model = Timeless(nn.Conv2d(1, 1, 1))
        for guidance in ({}, {"uncond_kwargs": {}, "guidance_scale": 2.0}):
            evaluate(model, SCHEDULE, judge, n=10, steps=[2, 3], rows=[0.0], batch_size=4, progress=True, **guidance)
            calls = "100/100" if guidance else "50.0/50.0"
            assert f"{calls} [" in capsys.readouterr().err


def test_markdown_without_the_larger_variance(judge):
    result = evaluate(Timeless(nn.Conv2d(1, 1, 1)), SCHEDULE, judge, n=4, steps=[1], rows=[0.0])
    facts = {"seconds": 1.0, "device": "cpu", "threads": 1, "backend": "cpu", "torch": "2", "model": "m"}
    unguided = {"guidance": 1.0, "guidance_rescale": 0.0, "guidance_interval": None, "classifier": None}
    text = markdown(result, {**facts, "classes": [], "dtype": "fp32", "batch_size": 4, **unguided})
    assert "larger variance" not in text
    assert "of each class" not in text


def test_numpy_numbers_become_json(judge):
    model = Timeless(nn.Conv2d(1, 1, 1))
    result = evaluate(model, SCHEDULE, judge, n=np.int64(4), steps=np.array([1]), rows=[0.0], seed=np.int64(3))
    assert json.loads(as_json(result, {}))["cells"][0]["steps"] == 1
