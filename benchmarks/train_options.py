"""Measures what each option of ``train`` does to the samples, on the bundled model's recipe at a tenth of its length.

``python -m benchmarks.train_options --out FOLDER`` trains a model for each line of the table and evaluates it: the
Fréchet distance of 500 samples to held-out images, by DDIM and by DDPM of 25 steps (DDPM with the learned variance of a
model that has one). A training run of the default length takes 6 minutes of two cores. Stopped at any time, the same
command goes on where it was, and each line is printed once it is measured. FOLDER/figures.json holds what is measured:
lines that it holds need no model, so that the run goes on from that file alone on another machine.
``benchmarks/results/train_options`` holds what has been measured so far.

An error is a standard error over the samples of one model. What another seed of training does, which the error does not
know of, is a line of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dd_kernels.apps.checkpoint import load_model
from dd_kernels.apps.cli import main as command
from dd_kernels.apps.evaluate import Measures
from dd_kernels.apps.evaluate.report import distance, share
from dd_kernels.apps.files import atomic_write

from .results import markdown

RECIPE = "fashion-mnist"
STEPS, SAMPLER_STEPS, SAMPLES = 1000, 25, 500
AVERAGES = "--ema 0.999 0.9 0"  # the recipe's, and two of which its run keeps the weights too
KEPT = ("cells", "columns", "run")  # of an evaluation
HEADS = ("option of `train`", "DDIM: distance", "of the class asked for", "DDPM: distance", "of the class asked for")


@dataclass(frozen=True)
class Line:
    """A line of the table.

    Args:
        flags: of ``train``, beside those of the recipe.
        ema: the average that is evaluated, where the run keeps several.
        about: what the flags mean, for a reader.
    """

    flags: str
    about: str
    ema: float | None = None

    @property
    def name(self) -> str:
        """Returns what the line's files begin with; lines of equal flags share a model."""
        return re.sub(r"[^a-z0-9.]+", "-", self.flags.lower()).strip("-")

    @property
    def shown(self) -> str:
        """Returns the line's flags as the table shows them, which no other line has."""
        return self.flags if self.ema is None else f"--ema {self.ema:g}"

    @property
    def learns_variance(self) -> bool:
        """Whether the model has a variance of its own."""
        return "learn_variance=true" in self.flags


LINES = (
    Line(AVERAGES, "the recipe", 0.999),
    Line("--seed 1", "the recipe, another seed"),
    Line("--set learn_variance=true", "learned variance, hybrid loss"),
    Line("--prediction v", "v"),
    Line("--prediction x_start", "x_0"),
    Line("--loss-weight min-snr", "min-SNR weight"),
    Line("--timesteps loss-second-moment", "timesteps by their losses"),
    Line("--input-perturbation 0.1", "input perturbation"),
    Line("--label-drop 0", "no dropped labels"),
    Line("--set self_conditioning=true", "self-conditioning"),
    Line(AVERAGES, "a shorter average", 0.9),
    Line(AVERAGES, "no average", 0.0),
    Line("--lr-schedule constant", "a constant learning rate"),
    Line("--warmup 0", "no warm-up"),
    Line("--clip-grad inf", "no clipping"),
    Line("--precision fp32", "no 16 bits"),
)


@dataclass(frozen=True)
class Lengths:
    """How long the runs are: training steps, steps of the samplers, samples."""

    steps: int = STEPS
    sampler_steps: int = SAMPLER_STEPS
    samples: int = SAMPLES


def _run(arguments: Sequence[str]) -> None:
    """Runs a command of this package without what it prints; ends the program where it fails or is stopped."""
    with contextlib.redirect_stdout(io.StringIO()):
        status = command([*arguments, "--no-progress"])
    if status:
        raise SystemExit(status)


def train(line: Line, folder: Path, lengths: Lengths) -> Path:
    """Returns the line's model file, after it was trained as far as it was not yet."""
    out = folder / f"{line.name}.safetensors"
    if out.exists() and load_model(out)[1].training["step"] == lengths.steps:
        return out
    # The warm-up takes a 20th of the run, as in the recipe.
    base = f"--steps {lengths.steps} --warmup {lengths.steps // 20} --save-every 100 --sample-every 0 --no-state"
    _run(["train", "--data", RECIPE, "--out", str(out), "--resume-if-there", *base.split(), *line.flags.split()])
    return out


def evaluate(line: Line, model: Path, folder: Path, lengths: Lengths) -> dict[str, Any]:
    """Returns the evaluation of the line's samples, by DDIM and by DDPM: its figures, and what it ran on."""
    out = folder / f"{line.name}{'' if line.ema is None else f'.at-{line.ema:g}'}.json"
    rows = ("0", "learned_range" if line.learns_variance else "1")
    size = f"--steps {lengths.sampler_steps} -n {lengths.samples} --accelerate --resume-if-there"
    ema = [] if line.ema is None else ["--ema", str(line.ema)]
    _run(["evaluate", "--model", str(model), "--rows", *rows, *size.split(), *ema, "--out", str(out)])
    found: dict[str, Any] = json.loads(out.read_text())
    return {name: found[name] for name in KEPT}


def texts(line: Line, found: dict[str, Any]) -> tuple[str, ...]:
    """Returns a line of the table."""
    cells = [Measures(**cell["measures"]) for cell in found["cells"]]
    return (f"`{line.shown}`, {line.about}", *(text for each in cells for text in (distance(each), share(each.right))))


def measured(path: Path, lengths: Lengths) -> dict[str, Any]:
    """Returns the evaluations that a file of figures holds, by the line's flags; none where there is no file.

    Raises:
        SystemExit: the file is of other lengths.
    """
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    if found["lengths"] != asdict(lengths):
        raise SystemExit(f"{path} is of other lengths: {found['lengths']}; wanted {asdict(lengths)}")
    lines: dict[str, Any] = found["lines"]
    return lines


def measure(lines: Sequence[Line], folder: Path, lengths: Lengths) -> str:
    """Trains and evaluates all lines, and prints each that is ready; returns the table and how it was measured."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "figures.json"
    known = measured(path, lengths)
    table: list[tuple[str, ...]] = [HEADS]
    for line in lines:
        if line.shown not in known:
            known[line.shown] = evaluate(line, train(line, folder, lengths), folder, lengths)
            figures = {"lengths": asdict(lengths), "lines": known}
            atomic_write(path, (json.dumps(figures, indent=1) + "\n").encode())
        found = known[line.shown]
        table.append(texts(line, found))
        print(" | ".join(table[-1]), flush=True)
    floor = Measures(**found["columns"][0]["floor"])
    return (
        f"{markdown(table)}\n\n{lengths.steps} steps of training; {lengths.samples} samples of {lengths.sampler_steps} "
        f"steps, of which real images have a distance of {distance(floor)}."
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder for models and figures, from which to go on")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of training (default: {STEPS})")
    parser.add_argument("--sampler-steps", type=int, default=SAMPLER_STEPS, help=f"(default: {SAMPLER_STEPS})")
    parser.add_argument("-n", "--num-samples", type=int, default=SAMPLES, help=f"of each line (default: {SAMPLES})")
    parser.add_argument("--only", nargs="+", metavar="WORD", default=[""], help="lines whose flags hold one of these")
    args = parser.parse_args()
    lines = [line for line in LINES if any(word in line.flags for word in args.only)]
    if not lines:
        parser.error(f"--only must name words of the lines' flags; got {' '.join(args.only)}")
    print("\n" + measure(lines, args.out, Lengths(args.steps, args.sampler_steps, args.num_samples)))


if __name__ == "__main__":
    main()
