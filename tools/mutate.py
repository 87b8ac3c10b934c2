"""Changes single tokens of the package's Python at random and runs the tests: ``python -m tools.mutate --count 60``.

A change that no test notices survives: either a test is missing, or the changed program is equivalent. The changes
are to comparisons, numbers, operators, booleans and the defaults of arguments. They are made in a copy of the
repository, one at a time. The tests of the changed file run first; if they pass, the tests of its whole folder run.
Tests that take several times as long as without the change, which is measured first, have noticed it too.
The same seed, count and sources give the same changes.
"""

from __future__ import annotations

import argparse
import ast
import functools
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import processes

ROOT = processes.ROOT
OPERATORS: dict[type[ast.AST], tuple[str, str]] = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
    ast.And: ("and", "or"),
    ast.Or: ("or", "and"),
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "/"),
    ast.Mod: ("%", "*"),
}


@dataclass(frozen=True)
class Mutation:
    """Replaces ``old`` by ``new`` at an offset of a file."""

    path: str
    line: int
    offset: int
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.old!r} becomes {self.new!r}"

    def apply(self, source: str) -> str:
        """Returns the changed source."""
        return source[: self.offset] + self.new + source[self.offset + len(self.old) :]


class Finder:
    """Finds the possible mutations of one file."""

    def __init__(self, path: str, source: str) -> None:
        self.path, self.source = path, source
        self.starts = [0]
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))

    def _offset(self, line: int, column: int) -> int:
        """Returns the offset of a position in the tree, whose columns count bytes of UTF-8."""
        text = self.source[self.starts[line - 1] : self.starts[line]]
        return self.starts[line - 1] + len(text.encode()[:column].decode())

    def _start(self, node: ast.expr) -> int:
        return self._offset(node.lineno, node.col_offset)

    def _end(self, node: ast.expr) -> int:
        return self._offset(node.end_lineno or node.lineno, node.end_col_offset or 0)

    def _between(self, left: ast.expr, operator: ast.AST, right: ast.expr) -> Iterator[Mutation]:
        """Yields the change of the operator that stands between two operands."""
        if type(operator) not in OPERATORS:
            return
        old, new = OPERATORS[type(operator)]
        start = self.source.find(old, self._end(left), self._start(right))
        if start >= 0:
            yield self._mutation(start, old, new)

    def _mutation(self, offset: int, old: str, new: str) -> Mutation:
        return Mutation(self.path, self.source.count("\n", 0, offset) + 1, offset, old, new)

    def _constant(self, node: ast.Constant) -> Iterator[Mutation]:
        """Yields the change of a boolean to the other one, and of a number to itself plus one."""
        old = self.source[self._start(node) : self._end(node)]
        if isinstance(node.value, bool):
            yield self._mutation(self._start(node), old, str(not node.value))
        elif isinstance(node.value, int | float):
            yield self._mutation(self._start(node), old, repr(node.value + 1))

    def _of(self, node: ast.AST) -> Iterator[Mutation]:
        """Yields the mutations of one node."""
        if isinstance(node, ast.Compare):
            for left, operator, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
                yield from self._between(left, operator, right)
        elif isinstance(node, ast.BinOp):
            yield from self._between(node.left, node.op, node.right)
        elif isinstance(node, ast.BoolOp):
            for left, right in zip(node.values, node.values[1:], strict=False):
                yield from self._between(left, node.op, right)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield self._mutation(self._start(node), "not ", "")
        elif isinstance(node, ast.Constant):
            yield from self._constant(node)

    def _visit(self, node: ast.AST) -> Iterator[Mutation]:
        """Yields the mutations below a node, without those in annotations."""
        yield from self._of(node)
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from self._visit(child)

    def mutations(self) -> list[Mutation]:
        """Returns every possible mutation, in the order of the file."""
        return sorted(self._visit(ast.parse(self.source)), key=lambda one: one.offset)


def mirrors(path: str, root: Path = ROOT) -> list[list[str]]:
    """Returns the tests of a file of the package: those named as the file or its folder, then all of the folder.

    The second list holds the tests that run where the first ones pass. A file beside the rings has only one list.
    """
    *folders, stem = Path(path).with_suffix("").parts[1:]
    names = [stem] if stem != "__init__" else []
    names += folders[-1:]
    here = root.joinpath("tests", *folders)
    while not here.is_dir():
        here = here.parent
    places = (
        [place for place in (here, *here.parents) if place.is_relative_to(root / "tests" / folders[0])]
        if folders
        else [here]
    )
    found = {file for place in places for name in names for file in place.glob(f"test_{name}*.py")}
    near = sorted(str(file.relative_to(root)) for file in found)
    folder = [str(here.relative_to(root))]
    return [near] if near and not folders else [near, folder] if near else [folder]


def copy(folder: Path) -> None:
    """Copies the tracked and the new files, and the libraries that are built."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    built = [str(path.relative_to(ROOT)) for path in (ROOT / "dd_kernels").rglob("*.so")]
    for name in {*listed, *built}:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def _tested(folder: Path, tests: Sequence[str], processor_seconds: int | None = None) -> tuple[str | None, float]:
    """Runs tests in the copy until one fails.

    Returns the name of the failed test or another reason (None where all pass), and the processor's seconds. A process
    that takes more than ``processor_seconds`` is ended: other work on the machine does not count, as it would on a
    clock. What sleeps for ever is ended after a hundred times as long.
    """
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "--tb=no", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    limit = None if processor_seconds is None else functools.partial(_limit_processor, processor_seconds)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=None if processor_seconds is None else 100 * processor_seconds,
            check=False,
            preexec_fn=limit,
        )
    except subprocess.TimeoutExpired:
        return "sleeping for ever", 0.0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if done.returncode in (0, 5):  # passed, or no tests collected
        return None, used
    if done.returncode == -signal.SIGXCPU:
        return f"running for ever: over {processor_seconds} s of the processor", used
    failures = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failures[0] if failures else f"exit status {done.returncode}", used


def _limit_processor(seconds: int) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))


@functools.cache
def _limit(folder: Path, tests: tuple[str, ...]) -> int:
    """Returns the processor's seconds that tests may take with a change: many times those that they take without it.

    Raises:
        ValueError: they fail without a change.
    """
    failure, used = _tested(folder, tests)
    if failure is not None:
        raise ValueError(f"{' '.join(tests)} must pass before anything is changed; {failure}")
    return 60 + round(4 * used)


def _failure(mutation: Mutation, folder: Path, tests: Sequence[str]) -> str | None:
    """Makes one change in the copy, runs tests, and undoes it; returns what failed."""
    limit = _limit(folder, tuple(tests))
    file = folder / mutation.path
    source = file.read_text()
    file.write_text(mutation.apply(source))
    try:
        return _tested(folder, tests, limit)[0]
    finally:
        file.write_text(source)


def survives(mutation: Mutation, folder: Path, near: bool = False) -> bool:
    """Prints and returns whether no test notices a change.

    ``near``: the tests of the folder do not run where the file has tests of its own.
    """
    started = time.monotonic()
    lists = mirrors(mutation.path, folder)[: 1 if near else None]
    failures = (_failure(mutation, folder, tests) for tests in lists)
    failure = next((one for one in failures if one is not None), None)
    outcome = "SURVIVED" if failure is None else f"noticed by {failure}"
    print(f"{mutation}; {outcome} ({time.monotonic() - started:.0f} s)", flush=True)
    if failure is None:
        print(f"    {(folder / mutation.path).read_text().splitlines()[mutation.line - 1].strip()}", flush=True)
    return failure is None


def candidates(under: str) -> list[Mutation]:
    """Returns every possible mutation of the package's files below a folder."""
    files = sorted(path.relative_to(ROOT) for path in (ROOT / under).rglob("*.py"))
    return [one for path in files for one in Finder(str(path), (ROOT / path).read_text()).mutations()]


def main() -> int:
    """Runs the command line; the exit status is 1 where a change survived."""
    parser = argparse.ArgumentParser(prog="python -m tools.mutate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=60, help="number of changes (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="chooses the changes (%(default)s)")
    parser.add_argument("--under", default="dd_kernels", help="folder whose files are changed (%(default)s)")
    parser.add_argument("--near", action="store_true", help="run only the tests of the changed file where it has any")
    parser.add_argument("--list", action="store_true", help="print the changes and run nothing")
    options = parser.parse_args()
    every = candidates(options.under)
    chosen = random.Random(options.seed).sample(every, min(options.count, len(every)))
    if options.list:
        print(*chosen, sep="\n")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        copy(Path(folder))
        survived = [one for one in chosen if survives(one, Path(folder), options.near)]
    print(f"{len(chosen) - len(survived)} of {len(chosen)} changes were noticed; these survived:")
    print(*survived, sep="\n")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
