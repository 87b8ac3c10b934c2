"""``explain``: a page that holds its pictures itself, of any model, and errors of one line."""

import base64
import io
import pathlib
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from commands import fails, run
from PIL import Image

import dd_kernels as dd
from dd_kernels.apps import checkpoint, images

OUT = "explain.html"


def explained(model, *arguments):
    """Returns the page of a model."""
    assert run("explain", "--model", model, "--no-progress", "--overwrite", *arguments) == 0
    return pathlib.Path(OUT).read_text(encoding="utf-8")


def pictures(text):
    found = re.findall(r'src="data:image/png;base64,([^"]*)"', text)
    return [Image.open(io.BytesIO(base64.b64decode(content))) for content in found]


class Balanced(HTMLParser):
    """Fails where a tag is closed that is not the last one open."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_holds_everything_itself(models, capsys):
    text = explained(models["digits"], "--seed", 3)
    assert f"{OUT}: 5 pictures of the model {models['digits']}" in capsys.readouterr().out
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    assert len(pictures(text)) == 10  # five pictures and five equations
    assert len(re.findall("src=|href=", text)) == 10
    assert "http" not in text
    assert "predict v over 20 timesteps of the cosine schedule" in text
    assert r"\, v_\theta(x_t, t)" in text
    # The last row of the picture of DDIM, 20 steps: ten images, enlarged.
    model, info = checkpoint.load_model(models["digits"])
    table = dd.ddim(info.make_schedule(), 20, prediction="v")
    x = dd.sample(model, (10, 1, 8, 8), table, seed=3, model_kwargs={"y": torch.arange(10)})
    row = np.array(images.grid(images.to_uint8(x), 10))
    found = np.array(pictures(text)[6])[-row.shape[0] :, -row.shape[1] :]
    assert np.abs(found.astype(int) - row).max() <= 1


@pytest.mark.slow
def test_the_seed_decides(models):
    text = explained(models["digits"])
    assert explained(models["digits"]) == text
    assert explained(models["digits"], "--seed", 1) != text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["learned", "plain", "undropped"])
def test_other_models(models, name):
    assert len(pictures(explained(models[name]))) == 10


@pytest.mark.slow
def test_a_name_cannot_break_the_page(models):
    path = pathlib.Path("<b>&.safetensors")
    path.write_bytes(pathlib.Path(models["plain"]).read_bytes())
    text = explained(path)
    assert "&lt;b&gt;&amp;.safetensors" in text
    assert "<b>" not in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--out", "e.png"], "--out must name a .html; got 'e.png'"),
        (["--out", "no/e.html"], "--out: cannot write 'no/e.html'"),
        (["--out", "there.html"], "--out: 'there.html' is there already"),
        (["--images", "no.png"], "there is no image 'no.png'"),
    ],
)
def test_errors(models, capsys, flags, message):
    pathlib.Path("there.html").write_text("mine")
    assert message in fails(capsys, "explain", "--no-progress", "--model", models["digits"], *flags)
