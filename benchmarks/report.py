"""Runs the benchmarks, keeps and shows the results: ``python -m benchmarks.report``.

On a GPU it runs in 8 minutes the build; then, side by side, the ops' tests, compute-sanitizer and the compilation of
what is timed later; then the benchmarks. On a CPU it runs the benchmarks. Each part has its share of the time, and
what fails or finds no time is reported as not measured. After every part <device>.json is written, at the end
<device>.md and the plots. It prints what lost more than 15 % of its ratio to a peer since the committed results.
``--render`` measures nothing: it writes the pages, the plots and the README's section from the files that exist.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tools import checks, processes

from . import machine, parts, render, results
from .harness import reason
from .parts import PARTS, TOTAL, Share


def summary(name: str, part: dict[str, Any]) -> str:
    """Returns a part in a few lines, for the terminal."""
    lines = [checks.described(check) for check in part.get("checks", [])]
    for check in part.get("checks", []):
        lines += [f"    {line}" for line in check.get("tail", [])]
    if part["rows"]:
        lines += results.aligned(results.cells(part["rows"]))
    lines += [f"not measured: {line}" for line in results.missing(part["not_measured"])]
    return "\n".join([*lines, f"{name} took {part['seconds']:.0f} s"])


def _version(package: str) -> str | None:
    """Returns the version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    """Runs git in the repository's root and returns what it prints."""
    command = ["git", *arguments]
    done = subprocess.run(command, cwd=render.ROOT, capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip()


def _commit() -> str | None:
    """Returns the commit that is measured, with "+" where files differ from it; None outside a checkout."""
    try:
        commit = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "-uno", "dd_kernels", "csrc")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}+" if changed else commit


def environment() -> dict[str, Any]:
    """Returns the versions and the number of cores, as the results name them."""
    import torch

    return {
        "device_kind": machine.DEVICE,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "cores": len(os.sched_getaffinity(0)),
        **{name: _version(name) for name in ("triton", "diffusers", "apex")},
    }


def described() -> dict[str, Any]:
    """Describes the machine; called after each part, because building the libraries changes the description."""
    return {**machine.described(machine.DEVICE), **environment()}


def compiled_ahead(seconds: float, folder: Path) -> list[checks.Check]:
    """Fills the caches of Triton and torch.compile with what the other parts call, in several processes."""
    end = time.monotonic() + seconds
    environment = {"TORCHINDUCTOR_COMPILE_THREADS": "2"}
    half = checks.half_the_cores()
    running = []
    for kind, every in (("ops", half), ("models", max(1, half // 2))):
        for first in range(every):
            command = [*parts.WORKER, "--compile", kind, str(first), str(every)]
            running.append(processes.start(command, folder / f"compile.{kind}.{first}.log", environment))
    outcomes = {checks.outcome(one.finish(end)) for one in running}
    lines = [line for one in running for line in one.lines()]
    check: checks.Check = {
        "check": "compiled ahead",
        "outcome": "ok" if outcomes == {"ok"} else f"in part: {', '.join(sorted(outcomes))}",
        "seconds": max(one.seconds for one in running),
        "plans": sum(line.startswith("compiled") for line in lines),
    }
    if outcomes - {"ok"}:
        check["tail"] = [line for line in lines if not line.startswith("compiled")][-checks.TAIL :]
    return [check]


def side_by_side(seconds: float, folder: Path) -> list[checks.Check]:
    """Runs the ops' tests, compute-sanitizer and the compiling ahead at the same time, since none of them is timed."""

    def checked(run: Callable[[float, Path], list[checks.Check]]) -> list[checks.Check]:
        try:
            return run(seconds, folder)
        except Exception as error:
            return [{"check": run.__name__, "outcome": f"not measured: {reason(error)}"}]

    runs = (checks.op_tests, checks.sanitizer, compiled_ahead)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return [check for found in pool.map(checked, runs) for check in found]


def _run_part(name: str, seconds: float, folder: Path, stream: bool) -> dict[str, Any]:
    """Runs one part: its checks, or the measurement of its plans."""
    if name == "build":
        return {"rows": [], "not_measured": [], "checks": checks.build(seconds, folder)}
    if name == "checks":
        return {"rows": [], "not_measured": [], "checks": side_by_side(seconds, folder)}
    return dict(parts.measure_part(name, seconds, folder, stream))


def run_part(name: str, seconds: float, folder: Path, stream: bool) -> dict[str, Any]:
    """Returns the results of one part; they name whatever went wrong."""
    started = time.monotonic()
    part: dict[str, Any] = {"rows": [], "not_measured": []}
    try:
        part |= _run_part(name, seconds, folder, stream)
    except Exception as error:
        part["not_measured"].append({"name": name, "reason": reason(error)})
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return {"date": stamp, "commit": _commit(), "seconds": round(time.monotonic() - started, 1), **part}


def run(names: Sequence[str], budget: float, folder: Path, stream: bool = False) -> results.Results:
    """Runs the parts in order and writes all results after each; keeps the earlier results of other parts."""
    # torch.compile would move the cache in the middle of a process, away from the kernels that were compiled ahead.
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache"))
    share = Share(budget, {name: PARTS[name].seconds[machine.DEVICE] or 60 for name in names})
    now = described()
    file = results.file_of(now["device"], folder)
    try:
        found = results.load(file) if file.exists() else {"parts": {}}
    except Exception as error:
        print(f"not kept: {file.name}: {reason(error)}")
        found = {"parts": {}}
    with tempfile.TemporaryDirectory() as temporary:
        for name in names:
            seconds = share.take(name)
            print(f"== {name}: {seconds:.0f} s", flush=True)
            part = run_part(name, seconds, Path(temporary), stream)
            share.used(name, part["seconds"])
            found["parts"][name] = part
            found["machine"] = described()
            results.save({"machine": found["machine"], "parts": found["parts"]}, folder)
            print(summary(name, part), flush=True)
        for log in (Path(temporary) / name for name in ("build.log", "tests.log")):
            if log.exists():
                shutil.copy(log, folder / f"{results.stem_of(now['device'])}.{log.name}")
    return found


def _committed() -> list[results.Row]:
    """Returns the committed rows of this device; none where no file exists or it cannot be read."""
    file = results.file_of(described()["device"])
    try:
        return results.rows(results.load(file)) if file.exists() else []
    except Exception as error:
        print(f"not compared: {file.name}: {reason(error)}")
        return []


def _arguments() -> argparse.Namespace:
    """Parses the command line."""
    device = machine.DEVICE
    default = [name for name, part in PARTS.items() if part.seconds[device] is not None]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--render", action="store_true", help="measure nothing, draw and write from the files")
    parser.add_argument("--parts", default=",".join(default), help=f"of {','.join(PARTS)}; here: %(default)s")
    parser.add_argument("--budget", type=float, help=f"seconds for all parts; here {TOTAL[device]} for the default")
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="folder of the files (%(default)s)")
    parser.add_argument("--stream", action="store_true", help="capture no CUDA graphs")
    args = parser.parse_args()
    args.parts = [name for name in args.parts.split(",") if name]
    unknown = [name for name in args.parts if name not in PARTS]
    if unknown:
        parser.error(f"--parts must be of {', '.join(PARTS)}; got {', '.join(unknown)}")
    if args.budget is None:
        args.budget = float(sum(PARTS[name].seconds[device] or 60 for name in args.parts))
    if args.budget <= 0:
        parser.error(f"--budget must be above 0; got {args.budget}")
    return args


def main() -> int:
    """Runs the command line; the exit status is not 0 where a check failed."""
    args = _arguments()
    failed = False
    if not args.render:
        # A run is compared with the committed results, also where its own are written elsewhere.
        before = _committed()
        found = run(args.parts, args.budget, args.results, args.stream)
        lost = results.slower(before, results.rows(found, *args.parts))
        print("\n".join(["slower than what was committed:", *lost]) if lost else "nothing got slower by over 15 %")
        outcomes = [check for name in args.parts for check in found["parts"][name].get("checks", [])]
        failed = any(checks.is_bad(check) for check in outcomes)
    for problem in render.everything(args.results):
        print("not rendered:", problem)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
