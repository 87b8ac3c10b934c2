"""Starts other programs with a time limit, their output in a file, and kills them together with their children."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
KILL_SECONDS = 5.0


@dataclass
class Running:
    """A program that was started; ``log`` is the file that holds what it prints.

    ``process`` is None where the program could not be started, and ``failure`` then says why.
    """

    process: subprocess.Popen[bytes] | None
    log: Path
    started: float
    failure: str = ""

    def finish(self, end: float) -> int | str:
        """Waits until the monotonic clock shows ``end``, kills what still runs, and returns the outcome.

        Returns:
            The exit status, or in words why there is none.
        """
        if self.process is None:
            return self.failure
        try:
            return self.process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            return f"stopped after {self.seconds:.0f} s"
        finally:
            self._kill(self.process)

    @staticmethod
    def _kill(process: subprocess.Popen[bytes]) -> None:
        """Kills the process group. Waits a few seconds at most, because a hung device can hold a process forever."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(KILL_SECONDS)

    def lines(self) -> list[str]:
        """Returns the lines that the program printed."""
        return self.log.read_text(errors="replace").splitlines() if self.log.exists() else []

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started


def start(command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> Running:
    """Starts ``command`` in the repository's root, in a session of its own; ``environment`` is added to ours."""
    with log.open("ab") as file:
        try:
            process = subprocess.Popen(
                list(command),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
        except OSError as error:
            return Running(None, log, time.monotonic(), f"cannot be started: {error}")
    return Running(process, log, time.monotonic())
