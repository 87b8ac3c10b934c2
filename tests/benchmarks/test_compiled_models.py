"""The table of whole models: every model is known by name, and a row says what was captured."""

import pytest

from benchmarks import compiled_models


@pytest.mark.parametrize("name", ["latent-diffusion", "lucidrains"])
def test_a_row(name):
    found, norms, graphs, seconds, errors, one, two = compiled_models.row(name, [1, 2], False, False, at_least=0.0)
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
    monkeypatch.setattr("sys.argv", ["compiled_models", "cifar100"])
    with pytest.raises(SystemExit):
        compiled_models.main()
    assert "no model cifar100; there are cifar10, " in capsys.readouterr().err


def test_speedups_are_medians_of_pairs(monkeypatch):
    """A slow round counts once: the ratios are 4, 4, 4, 100 and 2."""
    times = iter([4, 1, 8, 2, 4, 1, 100, 1, 4, 2])
    monkeypatch.setattr(compiled_models, "seconds", lambda call: next(times))
    assert compiled_models.speedups([lambda: None, lambda: None], at_least=0.0) == [4]
