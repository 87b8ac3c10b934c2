"""The one enumeration of what noise is drawn for."""

from __future__ import annotations

from enum import IntEnum


class Stream(IntEnum):
    """The last word of the noise's counter: uses of one seed that differ in it are independent.

    csrc/common/layout.h has the numbers that kernels draw with; a test holds the two together. Numbers below 256
    are kept for this package, numbers from 256 on are free.
    """

    X_T = 0  # the noise that sampling starts from
    REVERSE_STEP = 1  # z of a step from x_t to x_{t-1}; draw is the timestep
    Q_SAMPLE = 2  # z of the forward process; draw is the training step
    TIMESTEPS = 3  # the timesteps of a training batch
    SHUFFLE = 4  # the order of a data set in an epoch
    LABEL_DROP = 5  # which labels classifier-free guidance leaves out in training
    FLIP = 6  # which images of a training batch are mirrored
    SPLIT = 7  # which images of a data set are kept for tests
    PERTURBATION = 8  # the second noise of a training batch, in input perturbation; draw is the training step
    LIKELIHOOD = 9  # z of the forward process where the bound is measured; draw is the timestep
    RESAMPLE = 10  # what inpainting draws where it goes back to more noise, and for the steps after; draw is the move
