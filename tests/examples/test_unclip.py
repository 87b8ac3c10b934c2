"""The example of DALL-E 2's design, with few steps on digits: its captions, what it prints, its picture."""

import sys

import pytest
import torch
import unclip
from PIL import Image


def test_captions_name_the_shade_and_the_class():
    x = torch.full((3, 1, 4, 4), -1.0)
    x[:, :, :2] = torch.tensor([-0.8, 0.0, 1.0])[:, None, None, None]
    assert unclip.captions_of(x, torch.tensor([1, 0, 1]), ("coat", "ankle boot")) == [
        "a dark ankle boot",
        "a grey coat",
        "a bright ankle boot",
    ]


def test_captions_that_are_alike_are_all_right():
    """The loss of a model that tells classes apart, but not images of one class, is that of choosing among these."""
    torch.manual_seed(0)
    clip = unclip.Contrastive(1, ["a", "b"])
    vectors = torch.nn.functional.one_hot(torch.tensor([0, 0, 1, 1]), unclip.WIDTH).float()
    clip.of_images = clip.of_captions = lambda given: vectors
    clip.temperature.data.fill_(5.0)
    loss = clip.loss(torch.zeros(4, 1, 4, 4), ["a", "a", "b", "b"])
    torch.testing.assert_close(loss, torch.tensor(2.0).log(), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_it_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = "unclip.py --data digits --steps 4 -n 40 --out picture.png"
    monkeypatch.setattr(sys, "argv", line.split())
    unclip.main()
    printed = capsys.readouterr().out
    assert "picture.png: 10 captions; " in printed
    assert "of 40 images are of the class that theirs names" in printed
    assert Image.open("picture.png").size == (1920, 408)
