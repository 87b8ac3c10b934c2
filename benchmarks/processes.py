"""Runs other programs: with a limit of time, their output in a file, and their children gone with them."""

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
LAST_WAIT = 5.0


@dataclass
class Running:
    """A program that has been started; ``log`` holds what it prints."""

    process: subprocess.Popen[bytes] | None
    log: Path
    started: float
    why_not: str | None = None

    def finish(self, end: float) -> int | str:
        """Its exit status, or why there is none; killed with its children when the monotonic clock shows ``end``."""
        if self.process is None:
            return self.why_not or "not started"
        try:
            return self.process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            return f"stopped after {time.monotonic() - self.started:.0f} s"
        finally:
            self.kill()

    def kill(self) -> None:
        """Ends it and what it started; does not wait for ever, as a device that hangs may hold it."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(LAST_WAIT)

    def lines(self) -> list[str]:
        """What it printed."""
        return self.log.read_text(errors="replace").splitlines() if self.log.exists() else []

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


def start(command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> Running:
    """Starts ``command`` in the repository's root, in a session of its own."""
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
