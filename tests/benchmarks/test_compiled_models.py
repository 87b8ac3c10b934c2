"""The table of whole models: every model is known by name, and a row says what was captured."""

import pytest
import torch

from benchmarks import compiled_models, public_models
from dd_kernels.compile import GraphReport, NormReport, Report


@pytest.mark.parametrize("name", ["latent-diffusion", "lucidrains"])
def test_a_row(name):
    found, norms, why_not, graphs, seconds, errors, one, two = compiled_models.row(
        name, [1, 2], False, False, at_least=0.0
    )
    assert found == name
    assert norms == ("8 / 8" if name == "latent-diffusion" else "0 / 0")
    assert why_not == "-"
    assert graphs == "1"
    assert float(seconds) > 0
    ours, eager = map(float, errors.split(" / "))
    assert 0 < ours < 1e-3
    assert 0 < eager < 1e-3
    assert float(one) > 0
    assert float(two) > 0


def test_a_row_with_products_of_bfloat16():
    cells = compiled_models.row("lucidrains", [1], False, False, at_least=0.0, bfloat16=True)
    exact, rounded, eager = map(float, cells[5].split(" / "))
    assert 0 < eager < 1e-3
    assert 0 < exact <= rounded < 0.1
    assert all(float(ratio) > 0 for ratio in cells[6].split(" / "))


def test_why_not():
    norms = [
        NormReport(str(i), (), kept, left)
        for i, (kept, left) in enumerate([(None, ()), ("small", ()), ("small", ("relu",))])
    ]
    report = Report(graphs=[GraphReport(tuple(norms), 0, 0, 0, 0.0)])
    assert compiled_models.why_not(report) == "2: small; 1: relu"


def test_a_large_model_runs_one_sample_and_only_where_it_is_named(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(compiled_models, "row", lambda name, batches, *rest: asked.append((name, batches)) or [name])
    monkeypatch.setattr("torch.set_num_threads", lambda threads: None)
    for names in (["vae 512", "glide"], []):
        monkeypatch.setattr("sys.argv", ["compiled_models", *names])
        compiled_models.main()
    assert asked[:2] == [("vae 512", [1]), ("glide", [1, 8])]
    assert [name for name, _ in asked[2:]] == list(public_models.MODELS)
    assert "| vae 512 |" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", [*public_models.MODELS, *public_models.LARGE])
def test_every_model_is_built_and_fits_its_inputs(name):
    """On a device without memory, so that public widths cost nothing; the temporal decoder makes tensors on the CPU."""
    of_blocks, on_cpu = name in public_models.STYLES, name == "temporal decoder"
    for full in (False, True)[: 1 + (not of_blocks and not on_cpu)]:
        with torch.device("cpu" if on_cpu else "meta"), torch.no_grad():
            build = public_models.LARGE.get(name)
            model, inputs_of = public_models.MODELS[name](full) if build is None else build()
            assert model.eval()(*inputs_of(2)).shape[0] >= 2


def test_an_unknown_model(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["compiled_models", "cifar100"])
    with pytest.raises(SystemExit):
        compiled_models.main()
    assert "no model cifar100; there are cifar10, " in capsys.readouterr().err


def test_speedups_are_medians_of_pairs(monkeypatch):
    """A slow round counts once: the ratios are 4, 4, 4, 100 and 2. Of long calls there are three rounds."""
    for long, left in ((compiled_models.LONG, 0), (0.0, 4)):
        times = iter([4, 1, 8, 2, 4, 1, 100, 1, 4, 2])
        monkeypatch.setattr(compiled_models, "seconds", lambda call: next(times))  # noqa: B023
        monkeypatch.setattr(compiled_models, "LONG", long)
        assert compiled_models.speedups([lambda: None, lambda: None], at_least=0.0) == [4]
        assert len(list(times)) == left


def test_what_fails_is_a_cell(monkeypatch, capsys):
    """Beside torch.compile's failure ours is measured; a model that fails is a row, and the table goes on."""
    real = torch.compile

    def broken(*inputs):
        raise RuntimeError("no such | thing\nsecond line")

    monkeypatch.setattr(torch, "compile", lambda f, **options: real(f, **options) if "backend" in options else broken)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setitem(compiled_models.MODELS, "none", lambda full: 1 / 0)
    arguments = ["--inductor", "--batch", "1", "--seconds", "0"]
    monkeypatch.setattr("sys.argv", ["compiled_models", "none", "lucidrains", *arguments])
    compiled_models.main()
    none, lucidrains = capsys.readouterr().out.splitlines()[2:]
    assert none == "| none | fails: ZeroDivisionError: division by zero | - | - | - | - | - |"
    speed, reason = lucidrains.split(" | ")[-1].removesuffix(" |").split(" / ", 1)
    assert float(speed) > 0
    assert reason == "fails: RuntimeError: no such / thing"


def test_a_controlnet_leaves_nothing_out():
    """A compiler leaves out of a model what its result is not made of."""
    with torch.device("meta"):
        model, inputs_of = public_models.MODELS["controlnet"](False)
        result = model(*inputs_of(1))
        result.square().sum().backward()
    assert result.shape[0] == 1
    assert all(p.grad is not None for name, p in model.named_parameters() if "controlnet_" in name)
