"""The classifier, and the distance to held-out digits."""

from itertools import pairwise

import pytest
import torch

import dd_kernels as dd
from dd_kernels.apps import data
from dd_kernels.apps.evaluate import Judge, train_classifier


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
