"""The command line: ``python -m dd_kernels train | sample | interpolate | evaluate``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from ...backend import BackendUnavailableError
from ..training import TrainingDivergedError
from . import evaluate, interpolate, sample, train

# A command is a module with a docstring, add_arguments(parser) and run(args) -> exit status.
COMMANDS = {"train": train, "sample": sample, "interpolate": interpolate, "evaluate": evaluate}


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(prog="dd_kernels", description="Denoising diffusion: train, and draw samples.")
    commands = parser.add_subparsers(dest="command", metavar=" | ".join(COMMANDS), required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=(module.__doc__ or "").splitlines()[0],
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def _failed(command: str, status: int, message: object) -> int:
    line = " ".join(str(message).split())
    print(f"dd_kernels {command}: error: {line}", file=sys.stderr)
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit status: 0, 1 (training diverged), 2 (bad input, in one line), 128 + a signal's."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        return _failed(args.command, 130, "interrupted")
    except TrainingDivergedError as error:
        return _failed(args.command, 1, error)
    except (ValueError, TypeError, OSError, BackendUnavailableError) as error:
        return _failed(args.command, 2, error)
    except torch.OutOfMemoryError as error:
        return _failed(args.command, 2, f"--batch-size is too large for the device's memory: {error}")
