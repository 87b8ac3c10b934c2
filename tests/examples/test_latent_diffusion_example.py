"""The example of latent diffusion, with few steps on digits: what it prints, and its picture."""

import sys

import latent_diffusion
import pytest
from PIL import Image


@pytest.mark.slow
def test_it_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = "latent_diffusion.py --data digits --steps 5 --autoencoder-steps 5 -n 40 --out picture.png"
    monkeypatch.setattr(sys, "argv", line.split())
    latent_diffusion.main()
    printed = capsys.readouterr().out
    for text in (
        "autoencoder: [1, 8, 8] to [4, 2, 2], RMS error",
        "diffusion of latents: distance",
        "diffusion of pixels",
    ):
        assert text in printed
    assert Image.open("picture.png").size[0] > 10 * 64
