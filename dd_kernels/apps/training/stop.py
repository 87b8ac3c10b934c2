"""Signals that end a run after the step that it is in."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


class Stop:
    """Records SIGINT (Ctrl-C), SIGTERM and SIGHUP; the loop saves and ends after the step that it is in."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[Stop]:
        """Takes the signals inside the block; a second one does what it does outside. ``nohup`` keeps its meaning."""
        if threading.current_thread() is not threading.main_thread():
            yield self  # only the main thread may take signals
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        hang_up = getattr(signal, "SIGHUP", None)  # Windows has none
        if hang_up is not None and signal.getsignal(hang_up) is not signal.SIG_IGN:
            before[hang_up] = signal.getsignal(hang_up)

        def handler(number: int, frame: object) -> None:
            self.signal = signal.Signals(number)
            for each, old in before.items():
                signal.signal(each, old)

        for number in before:
            signal.signal(number, handler)
        try:
            yield self
        finally:
            for number, old in before.items():
                signal.signal(number, old)
