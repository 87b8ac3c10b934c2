"""Says in words how the options of a job that a file holds differ from those that are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Returns every name whose value differs, with both values; "" where none does."""
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    return ", ".join(f"{name} is {there.get(name)!r} there and {here.get(name)!r} here" for name in names)
