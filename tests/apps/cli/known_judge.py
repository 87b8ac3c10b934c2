"""A judge of samples that needs no training."""

import torch


class KnownJudge:
    """Stands for :class:`dd_kernels.apps.evaluate.Judge`, whose classifier takes seconds to train."""

    shape, accuracy, seed = (1, 8, 8), 1.0, 0
    test_images = torch.zeros(2, 1, 8, 8)

    def __init__(self, train, test):
        pass

    def labels(self, n):
        return torch.arange(n) % 10

    def real(self, labels):
        return self.test_images

    def distance(self, images):
        return 1.0

    sure = distance
