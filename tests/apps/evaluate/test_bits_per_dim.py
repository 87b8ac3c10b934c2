"""The bound of held-out images: its average, its error, its files."""

import json
import math

import pytest
import torch

import dd_kernels as dd
from dd_kernels.apps import data
from dd_kernels.apps.evaluate import bits_per_dim, likelihood_json, likelihood_markdown, terms_png
from dd_kernels.likelihood import Process, split_bound

SCHEDULE = dd.linear_schedule(6, 1e-3, 0.5)
RUN = {"seconds": 1.0, "device": "cpu", "threads": 1, "backend": "cpu", "torch": "2", "model": "m", "dtype": "fp32"}
RUN |= {"batch_size": 4}


def half(x, t, y=None):
    return 0.5 * x + (0 if y is None else 0.01 * y.reshape(-1, 1, 1, 1))


def test_the_figures_are_averages_over_images_in_bits_and_nats():
    held_out = data.held_out("digits")
    result = bits_per_dim(Process(half, SCHEDULE), held_out, n=10, seed=2, batch_size=4)
    x_start = held_out.batch(torch.arange(10))[0]
    bound = split_bound(Process(half, SCHEDULE, levels=17), x_start, seed=2)
    assert (result.images, result.dimensions, result.settings["levels"]) == (10, 64, 17)
    assert result.bits_per_dim == pytest.approx(float(bound.total.double().mean()), rel=1e-6)
    assert result.standard_error == pytest.approx(float(bound.total.double().std()) / math.sqrt(10), rel=1e-5)
    assert result.terms == pytest.approx(bound.terms.double().mean(0).tolist(), rel=1e-6)
    assert result.bits_per_dim == pytest.approx(math.fsum(result.terms) + result.prior, rel=1e-6)
    for bits, nats in (
        (result.bits_per_dim, result.nats),
        (result.prior, result.prior_nats),
        (result.terms[3], result.terms_nats[3]),
    ):
        assert nats == pytest.approx(64 * math.log(2) * bits)


def test_labels_reach_the_model_and_the_batch_changes_nothing():
    held_out = data.held_out("digits")
    plain = bits_per_dim(Process(half, SCHEDULE), held_out, n=6)
    labelled, batched = (
        bits_per_dim(Process(half, SCHEDULE), held_out, n=6, labels=held_out.labels, batch_size=size)
        for size in (256, 4)
    )
    assert labelled.bits_per_dim != plain.bits_per_dim
    assert batched == labelled


def test_written_and_drawn():
    result = bits_per_dim(Process(half, SCHEDULE), data.held_out("digits"), n=3)
    text = likelihood_markdown(result, RUN)
    assert f"{result.bits_per_dim:.4f} +- {result.standard_error:.4f} bits/dim" in text
    assert "of 64 values of 17 grey levels" in text
    rows = {
        cells[1].strip(): float(cells[2])
        for line in text.splitlines()
        if len(cells := line.split("|")) == 5 and "L_" in line
    }
    wanted = {"L_0, decoder": result.terms[0], "L_T, prior": result.prior}
    wanted[f"L_1 to L_{len(result.terms) - 1}, sum"] = sum(result.terms[1:])
    assert rows == pytest.approx(wanted, abs=1e-4)  # what is written has four digits
    found = json.loads(likelihood_json(result, RUN))
    assert found["terms"] == result.terms
    assert found["run"] == RUN
    assert terms_png(result).startswith(b"\x89PNG")


def test_errors():
    held_out = data.held_out("digits")
    for n in (1, 361):
        with pytest.raises(ValueError, match=r"n must be in \[2, 360\], the held-out images there are; got"):
            bits_per_dim(Process(half, SCHEDULE), held_out, n=n)
    with pytest.raises(ValueError, match="model must give a finite bound"):
        bits_per_dim(Process(lambda x, t: x * math.nan, SCHEDULE), held_out, n=2)
