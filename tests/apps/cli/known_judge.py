"""A judge of samples that needs no training."""

import torch

from dd_kernels.apps.evaluate import Measures


class KnownJudge:
    """Stands for :class:`dd_kernels.apps.evaluate.Judge`, whose classifier takes seconds to train."""

    shape, num_classes, seed = (1, 8, 8), 10, 0

    @classmethod
    def trained(cls, train, held_out):
        return cls()

    def labels(self, n):
        return torch.arange(n) % 10

    def measure(self, images, labels=None):
        return Measures(len(images), 1.0, 0.1, 1.0, 1.0)

    def real(self, labels):
        return self.measure(labels)

    def floor(self, n):
        return self.real(self.labels(n))

    @property
    def all_held_out(self):
        return self.measure(range(2))

    def digest(self):
        return "known"
