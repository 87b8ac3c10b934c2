"""The command line: ``python -m dd_kernels COMMAND``, with the commands of ``COMMANDS``."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import NoReturn

import torch

from ... import backend as backends
from ...backend import BackendUnavailableError
from ...ops import randn
from ..training import TrainingDivergedError
from . import edit, evaluate, explain, inpaint, interpolate, reconstruct, sample, train, train_classifier, verify

# A command is a module with a docstring, add_arguments(parser) and run(args) -> exit status.
COMMANDS = {
    "train": train,
    "sample": sample,
    "interpolate": interpolate,
    "reconstruct": reconstruct,
    "edit": edit,
    "inpaint": inpaint,
    "explain": explain,
    "evaluate": evaluate,
    "train-classifier": train_classifier,
    "verify": verify,
}


class _TerminatedError(BaseException):
    """Raised by SIGTERM and SIGHUP. Like KeyboardInterrupt it is no Exception, so that only :func:`main` catches it."""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line; ``--help`` has the rest."""

    def error(self, message: str) -> NoReturn:
        """Exits with status 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands."""
    parser = _Parser(prog="dd_kernels", description="Denoising diffusion: train, and draw samples.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar=" | ".join(COMMANDS), required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=(module.__doc__ or "").splitlines()[0],
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def _line(command: str, kind: str, message: object) -> None:
    with contextlib.suppress(OSError):  # a closed stderr must not hide the exit status
        print(f"dd_kernels {command}: {kind}: {' '.join(str(message).split())}", file=sys.stderr)


def _failed(command: str, status: int, message: object) -> int:
    _line(command, "error", message)
    return status


def _error_text(error: Exception) -> str:
    """Returns an error's text; that of an OSError is its reason and its file."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {str(error.filename)!r}" if error.filename is not None else error.strerror
    return str(error) or type(error).__name__


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP raise in the block, so that temporary files are removed; ``nohup`` keeps its meaning."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, frame: object) -> None:
        raise _TerminatedError(signal.Signals(number))

    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in (getattr(signal, name) for name in names)}
    for number, old in before.items():
        if old is signal.SIG_DFL:
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextlib.contextmanager
def _short_warnings(command: str) -> Iterator[None]:
    """Prints each warning on one line."""
    before = warnings.showwarning

    def show(message: Warning | str, *details: object) -> None:
        _line(command, "warning", message)

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        try:
            yield
        finally:
            warnings.showwarning = before


def _discard_unwritable_output() -> None:
    """Points stdout at nothing where it cannot be written, since Python flushes it once more at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _check_instruction_set() -> None:
    """Raises ``ValueError`` where ``DD_KERNELS_CPU_ISA`` names none that this processor has, which the ops say."""
    if backends.unavailable("cpu") is None:
        try:
            randn((1,), seed=0, backend="cpu")
        except RuntimeError as error:
            raise ValueError(str(error)) from error


def _run(args: argparse.Namespace) -> int:
    try:
        _check_instruction_set()
        status = args.run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return _failed(args.command, 130, "interrupted")
    except _TerminatedError as stop:
        return _failed(args.command, 128 + stop.args[0], f"ended by {stop.args[0].name}")
    except TrainingDivergedError as error:
        return _failed(args.command, 1, error)
    except BrokenPipeError:
        return 141  # as other tools end when their reader has gone: quietly, with the status of SIGPIPE
    except torch.OutOfMemoryError as error:
        return _failed(args.command, 2, f"--batch-size is too large for the device's memory: {error}")
    except MemoryError:
        return _failed(args.command, 2, "the memory of this machine is too small; try a smaller --batch-size")
    except (ValueError, TypeError, OSError, OverflowError, RecursionError, BackendUnavailableError) as error:
        return _failed(args.command, 2, _error_text(error))
    except RuntimeError as error:
        # torch's messages where the CPU's memory is too small, and where a size does not fit 64 bits.
        if not any(words in str(error) for words in ("not enough memory", "can't allocate memory", "overflow")):
            raise
        return _failed(args.command, 2, f"the images take more memory than there is: {str(error).splitlines()[0]}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status.

    0; 1 (training diverged); 2 (bad input, or a file that cannot be read or written; in one line); 128 and the number
    of the signal that ended it: 130 (Ctrl-C), 143 (SIGTERM), 129 (SIGHUP), 141 (the reader of the output has gone).
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name may be no text in the terminal's encoding
    args = build_parser().parse_args(argv)
    with _signals(), _short_warnings(args.command):
        status = _run(args)
    _discard_unwritable_output()
    return status
