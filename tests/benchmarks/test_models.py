"""The table of whole models: every model is known by name, and a row says what was captured."""

import pytest

from benchmarks import bench_models


@pytest.mark.parametrize("name", ["latent-diffusion", "lucidrains"])
def test_a_row(name):
    found, norms, graphs, seconds, errors, one, two = bench_models.row(name, [1, 2], False, False, at_least=0.0)
    assert found == name
    assert norms == ("8 / 8 / 0" if name == "latent-diffusion" else "0 / 0 / 0")
    assert graphs == "1"
    assert float(seconds) > 0
    ours, eager = map(float, errors.split(" / "))
    assert 0 < ours < 1e-3
    assert 0 < eager < 1e-3
    assert float(one) > 0
    assert float(two) > 0


def test_an_unknown_model(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench_models", "cifar100"])
    with pytest.raises(SystemExit):
        bench_models.main()
    assert "no model cifar100; there are cifar10, " in capsys.readouterr().err


def test_speedups_are_medians_of_pairs():
    """The second call takes about a quarter of the first's time."""

    def work(count):
        return lambda: sum(range(count))

    (ratio,) = bench_models.speedups([work(400_000), work(100_000)], at_least=0.2)
    assert 2 < ratio < 8
