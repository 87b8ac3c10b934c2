"""What a model predicts and is trained for, under guided-diffusion's names."""

from __future__ import annotations

import enum
from typing import Any


class _SharedEnum(enum.Enum):
    """An enumeration that equals another package's of the same name, member by member.

    Code that takes only one module from here passes its own members, and compares them with ours.
    """

    @classmethod
    def _missing_(cls, value: object) -> Any:
        if isinstance(value, enum.Enum) and type(value).__name__ == cls.__name__:
            return cls.__members__.get(value.name)
        return None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, enum.Enum) and self._key() == (type(other).__name__, other.name)

    def __hash__(self) -> int:
        return hash(self.name)  # that of any enum.Enum

    def _key(self) -> tuple[str, str]:
        return type(self).__name__, self.name


class ModelMeanType(_SharedEnum):
    """What the model's output is."""

    PREVIOUS_X = enum.auto()
    START_X = enum.auto()
    EPSILON = enum.auto()


class ModelVarType(_SharedEnum):
    """The variance of p(x_{t-1} | x_t): from the model's second half, or fixed.

    LEARNED: the second half is the log-variance. LEARNED_RANGE: it says where the log-variance lies
    between those of FIXED_SMALL (-1) and FIXED_LARGE (1), eq. 15 of Nichol & Dhariwal (2021).
    """

    LEARNED = enum.auto()
    FIXED_SMALL = enum.auto()
    FIXED_LARGE = enum.auto()
    LEARNED_RANGE = enum.auto()


class LossType(_SharedEnum):
    """MSE of the model's output (plus the bound, where the variance is learned), or the variational bound itself."""

    MSE = enum.auto()
    RESCALED_MSE = enum.auto()
    KL = enum.auto()
    RESCALED_KL = enum.auto()

    def is_vb(self) -> bool:
        """Returns whether the loss is the variational bound."""
        return self in (LossType.KL, LossType.RESCALED_KL)
