"""Makes a tiny job, its folder, and the model that draws its images."""

import pytest
import torch

from dd_kernels.apps.shards import Job, Manifest


@pytest.fixture
def job():
    """Ten images of two classes, from index 5 on, four to a shard."""
    return Job("1", "m", {"steps": 3}, "t", [7, 8], 0, 5, 10, [1, 2, 2], 4, "npz")


@pytest.fixture
def manifest(job, tmp_path):
    """The manifest of the job, which has begun."""
    found = Manifest(tmp_path / "out", job)
    found.start()
    return found


@pytest.fixture
def draw():
    """Draws images whose grey levels are their index; keeps the shards that it was called for."""

    def images(shard):
        images.drawn.append(shard)
        levels = torch.arange(shard.first, shard.first + shard.count, dtype=torch.float32)
        return (levels / 127.5 - 1).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)

    images.drawn = []
    return images
