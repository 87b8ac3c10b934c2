"""Hypothesis on every kernel of the op suite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st


def for_draws(kernel: Any, test: Callable[[st.DataObject], None]) -> None:
    """Calls ``test`` for as many draws as the profile says, for a tenth of them in Triton's interpreter."""
    examples = settings.default.max_examples

    @settings(max_examples=max(1, examples // 10) if kernel.interpreted else examples)
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        torch.manual_seed(data.draw(st.integers(0, 2**32 - 1), label="torch's seed"))
        test(data)

    run()
