"""The classifier, and the distance to held-out digits."""

from itertools import pairwise

import pytest
import torch

import dd_kernels as dd
from dd_kernels.apps import data
from dd_kernels.apps.evaluate import Judge, train_classifier


@pytest.fixture(scope="module")
def held_out():
    """The held-out digits, [N, 1, 8, 8] in [-1, 1]."""
    digits = data.digits("test")
    return digits.batch(torch.arange(len(digits)))[0]


class TestJudge:
    def test_accuracy(self, judge):
        assert judge.all_held_out.right >= 0.975

    def test_training_is_deterministic_and_leaves_torch_alone(self):
        images, labels = data.digits("train").batch(torch.arange(100))
        state, threads = torch.get_rng_state(), torch.get_num_threads()
        first, again, other = (train_classifier(images, labels, seed) for seed in (3, 3, 4))
        assert torch.equal(state, torch.get_rng_state())
        assert threads == torch.get_num_threads()
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
        assert not torch.equal(first.head.weight, other.head.weight)
        assert not first.training

    def test_noise_grows_the_distance(self, judge, held_out):
        noise = dd.randn(held_out.shape, seed=0)
        distances = [judge.measure(held_out + sigma * noise).distance for sigma in (0, 0.1, 0.2, 0.4, 0.8)]
        assert distances[0] == pytest.approx(0, abs=1e-6)
        assert all(b > 1.5 * a for a, b in pairwise(distances))

    def test_beyond_the_range_is_clipped(self, judge, held_out):
        beyond = torch.where(held_out.abs() == 1, 3 * held_out, held_out)
        assert judge.measure(beyond) == judge.measure(held_out)

    def test_sure_of_digits_not_of_noise(self, judge, held_out):
        assert judge.measure(held_out).sure > 0.85
        assert judge.measure(dd.randn((500, 1, 8, 8), seed=0)).sure < 0.4

    def test_shares_are_counted(self, judge, held_out):
        labels = data.digits("test").labels
        probabilities = judge.classifier(held_out).softmax(1)
        found = judge.measure(held_out, labels)
        assert found.sure == pytest.approx((probabilities.amax(1) >= 0.95).float().mean().item())
        assert found.right == pytest.approx((probabilities.argmax(1) == labels).float().mean().item())
        assert found == judge.all_held_out
        assert judge.measure(held_out, (labels + 1) % 10).right < 0.02
        own = probabilities.argmax(1).eq(3)[labels == 3].float().mean().item()
        assert found.right_by_class[3] == pytest.approx(own)
        assert judge.measure(held_out[labels == 3], labels[labels == 3]).right_by_class[2:4] == [
            None,
            pytest.approx(own),
        ]
        assert judge.measure(held_out).right is judge.measure(held_out).right_by_class is None

    def test_the_standard_error_is_that_of_other_draws(self, judge):
        """The distances of 16 parts of the training images scatter as the bootstrap of one says, within 2.5 times.

        A bootstrap of 100 has an error of 7 %, the standard deviation of 16 distances one of 18 %; and a bootstrap
        repeats images, which adds to a part's distance and its scatter.
        """
        features = judge.train.features[torch.randperm(len(judge.train.features))][:1280].split(80)
        distances = torch.tensor([judge._measure(part, None).distance for part in features])
        errors = torch.tensor([judge._measure(part, None).distance_error for part in features])
        assert 1 / 2.5 < distances.std() / errors.median() < 2.5

    def test_labels_are_those_of_the_held_out_images(self, judge):
        labels = data.digits("test").labels
        assert torch.equal(judge.labels(7), labels[:7])
        assert torch.equal(judge.labels(400), torch.cat((labels, labels[:40])))

    def test_real_images_have_the_classes_asked_for(self, judge):
        wanted = judge.labels(60)
        assert judge.real(wanted).images == 60
        assert judge.real(torch.zeros(1000, dtype=torch.int64)).images == int(judge.train.labels.eq(0).sum())
        only = judge.train.features[judge.train.labels == 3][:5]
        assert judge.real(torch.full((5,), 3)) == judge._measure(only, torch.full((5,), 3))

    def test_bad_data(self):
        digits = data.digits("test")
        with pytest.raises(ValueError, match="train must have labels"):
            Judge.trained(data.ImageData(digits.images), digits)
        with pytest.raises(ValueError, match=r"train must have images of \(1, 8, 8\).*got \(1, 8, 4\)"):
            Judge.trained(data.ImageData(digits.images[..., :4], digits.labels), digits)
