"""Makes the Markdown tables of results: ops, whole samplers, models, training and growth; all from the JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from . import results
from .results import Row, figure, markdown

STEPS = {"ddim": (10, 20, 50, 100), "ddpm": (1000,)}
README_STEPS = {"ddim": 50, "ddpm": 1000}
HEADLINE_IMAGES = 50_000
SHARES = ("group_norm_silu", "sampler", "rest")
QUOTE = (
    "Song, Meng and Ermon (DDIM, ICLR 2021, arXiv 2010.02502, section 1): “it takes around 20 hours to sample 50k "
    "images of size 32 x 32 from a DDPM, but less than a minute to do so from a GAN on a Nvidia 2080 Ti GPU.”"
)


PAIRED = (
    "in brackets how many times longer than ours that takes: the median of paired ratios of interleaved runs, "
    "both at the row's batch and dtype"
)


def _ratio(line: Row | None) -> str:
    """Returns a line of the digest as the median over the shapes, with the range."""
    if line is None:
        return ""
    if line["shapes"] == 1:
        return f"{line['median']:.1f}x"
    return f"{line['median']:.1f}x ({line['least']:.1f} to {line['most']:.1f})"


def _threads(number: int | None) -> str:
    return "GPU" if number is None else f"{number} thread{'s' if number > 1 else ''}"


def ops_table(rows: Sequence[Row]) -> str:
    """Returns the digest of the ops."""
    lines = results.digest_of_peers(rows)
    if not lines:
        return ""
    threads = sorted({line["threads"] for line in lines}, key=lambda n: n or 0)
    names = ("op", "case", "dtype", "layout", "peer")
    table: dict[tuple[Any, ...], dict[int | None, Row]] = {}
    for line in lines:
        table.setdefault(tuple(line[name] for name in names), {})[line["threads"]] = line
    head = [*names[:4], "against", *(_threads(n) for n in threads)]
    cells = [head, *([*key, *(_ratio(by.get(n)) for n in threads)] for key, by in table.items())]
    note = (
        "How many times longer the peer takes at the same shape and dtype: the median of paired ratios of interleaved "
        "runs; of several shapes the median (and the range)"
    )
    return f"{note}:\n\n{markdown(cells)}"


def first_numbers(rows: Sequence[Row]) -> str:
    """Returns the README's first numbers: a sampler's step, GroupNorm+SiLU, and each whole model that was measured."""
    lines = []
    for what, op, cases, peer in (
        ("A sampler's step", "reverse_step", ("ddpm", "ddim"), "diffusers'"),
        ("GroupNorm+SiLU forward", "group_norm_silu", ("forward",), "eager PyTorch's"),
    ):
        found = [
            line["median"]
            for line in results.digest_of_peers(rows)
            if (line["op"], line["peer"]) == (op, peer.split("'")[0].split()[0])
            and (line["case"] in cases and (line["dtype"], line["layout"]) == ("float32", "contiguous"))
        ]
        if found:
            times = " to ".join(dict.fromkeys(f"{ratio:.1f}" for ratio in (min(found), max(found))))
            lines.append(f"- {what}: **{times} times** as fast as {peer}, float32 on a CPU.")
    for row in rows:
        line = row["peers"].get("dd_kernels, accelerate", {}) if row["op"] == "model" else {}
        if "ratio" in line:
            times = f"**{1 / line['ratio']:.1f} times** as fast as diffusers'"
            lines.append(
                f"- The {row['case']} U-Net by the one line, batch {row['shape'][0]}: {times} in eager PyTorch."
            )
    return "\n".join(lines)


def implementations(rows: Iterable[Row]) -> list[str]:
    """Returns the implementations that were measured in any of the rows, ours first."""
    names: dict[str, None] = {"dd_kernels": None}
    for row in rows:
        names |= dict.fromkeys(name for name, peer in row["peers"].items() if "us" in peer)
    return list(names)


def _paired(row: Row, name: str, value: str) -> str:
    """Returns the value of an implementation, followed by its paired ratio to ours where it is a peer."""
    ratio = results.ratios(row).get(name)
    return value if ratio is None else f"{value} ({ratio:.2f}x)"


def throughput(rows: Sequence[Row], every: bool) -> str:
    """Returns images/s of whole samplers, measured in whole runs or extrapolated from the time of one step."""
    rows = [row for row in rows if row["op"] == "sample"]
    if not rows:
        return ""
    names = implementations(rows)
    cells = [["model", "sampler", "batch", "dtype", *names]]
    for row in rows:
        model, sampler = row["case"].rsplit(" ", 1)
        whole = row.get("steps")
        steps_of = (whole,) if whole else STEPS[sampler] if every else (README_STEPS[sampler],)
        for steps in steps_of:
            rates = results.images_per_second(row, steps)
            how = "whole run, measured" if whole else "extrapolated"
            cells.append([model, f"{sampler.upper()}-{steps}, {how}", str(row["shape"][0]), row["dtype"]])
            cells[-1] += [_paired(row, name, figure(rates[name])) if name in rates else "" for name in names]
    note = "Images/s, random weights; extrapolated: from the measured time of one step (model and update)"
    return f"{note}; {PAIRED}:\n\n{markdown(cells)}"


def duration(seconds: float) -> str:
    """Returns seconds in the largest unit of which there is at least one."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{figure(seconds / size)} {unit}"
    return f"{figure(seconds)} s"


def headline(rows: Sequence[Row]) -> str:
    """Returns the time for 50,000 images of 32 x 32, each sampler at the batch that is best for ours."""
    rows = [row for row in rows if row["op"] == "sample" and row["case"].startswith("cifar10 ") and "steps" not in row]
    if not rows:
        return ""
    names = implementations(rows)
    cells = [["sampler", "batch", "dtype", *names]]
    for sampler, counts in STEPS.items():
        mine = [row for row in rows if row["case"].endswith(sampler)]
        if not mine:
            continue
        best = max(mine, key=lambda row: row["shape"][0] / row["us"])
        for steps in counts:
            rates = results.images_per_second(best, steps)
            times = {name: duration(HEADLINE_IMAGES / rate) for name, rate in rates.items()}
            cells.append([f"{sampler.upper()}, {steps} steps", str(best["shape"][0]), best["dtype"]])
            cells[-1] += [_paired(best, name, times[name]) if name in times else "" for name in names]
    note = f"Time for {HEADLINE_IMAGES:,} images of 32 x 32 with the cifar10 U-Net (35.7 M parameters, random weights)"
    return f"{note}, extrapolated from one step; {PAIRED}:\n\n{markdown(cells)}\n\n{QUOTE}"


def breakdown(rows: Sequence[Row]) -> str:
    """Returns the launches of a step, the shares of its time, and its peak of memory without the weights."""
    cells = [["model", "batch", "dtype", "implementation", "launches", "GroupNorm+SiLU", "sampler", "rest", "peak MB"]]
    for row in rows:
        for name, one in row.get("breakdown", {}).items():
            if "not_measured" in one:
                continue
            share = one.get("share", {})
            shares = [f"{100 * share[key]:.1f}%" if key in share else "" for key in SHARES]
            launches = "" if one.get("launches") is None else str(one["launches"])
            peak = figure(one["peak_bytes"] / 1e6) if "peak_bytes" in one else ""
            cells.append([row["case"], str(row["shape"][0]), row["dtype"], name, launches, *shares, peak])
    if len(cells) == 1:
        return ""
    note = "What a step consists of, by the profiler: kernel launches (on a GPU), shares of the time, memory."
    return f"{note}\n\n{markdown(cells)}"


def training(rows: Sequence[Row]) -> str:
    """Returns images/s of training steps, the bytes that the forward pass keeps, and the peak of memory."""
    rows = [row for row in rows if row["op"] == "training"]
    cells = [["model", "batch", "dtype", "implementation", "images/s", "kept for backward, MB", "peak, MB"]]
    for row in rows:
        memory = row.get("memory", {})
        for name, seconds in results.seconds_of(row).items():
            sizes = [memory.get(name, {}).get(key) for key in ("saved_bytes", "peak_bytes")]
            rate = _paired(row, name, figure(row["shape"][0] / seconds))
            cells.append([row["case"], str(row["shape"][0]), row["dtype"], name, rate])
            cells[-1] += ["" if size is None else figure(size / 1e6) for size in sizes]
    if len(cells) == 1:
        return ""
    return f"Training, a step of q_sample, forward, backward and AdamW; {PAIRED}:\n\n{markdown(cells)}"


def models(rows: Sequence[Row]) -> str:
    """Returns a table for the forward pass of each whole model: speed, error, share of the peak, kinds of layers."""
    return "\n\n".join(_model(row) for row in rows if row["op"] == "model")


def _model(row: Row) -> str:
    """Returns one model's forward pass in every implementation beside diffusers eager."""
    own = {"us": row["us"], "ratio": 1.0}
    peak, kinds = row["peak"], list(dict.fromkeys(kind for one in row["kinds"].values() for kind in one))
    cells = [["implementation", "ms", "images/s", "times diffusers", "RMS error", "GFLOP/s", "% of peak", *kinds]]
    lacking = []
    for name, one in {"diffusers": own, **row["peers"]}.items():
        if "not_measured" in one:
            lacking.append(f"{name}: {one['not_measured']}")
            continue
        rate = row["flops"] / one["us"] / 1e3
        cells.append([name, figure(one["us"] / 1e3), figure(row["shape"][0] / one["us"] * 1e6), _speed(one)])
        cells[-1] += [f"{row['errors'][name]:.1e}", figure(rate), figure(100 * rate / peak["gflop_per_s"])]
        cells[-1] += [f"{100 * row['kinds'].get(name, {}).get(kind, math.nan):.0f}%" for kind in kinds]
    cells = [[cell.replace("nan%", "") for cell in line] for line in cells]
    shape = "x".join(map(str, row["shape"]))
    note = (
        f"A forward pass of the {row['case']} U-Net, {shape}, {_threads(row['threads'])}, {row['device']}, "
        f"{row['isa']}, torch {row['torch']}, random weights; diffusers: eager, float32, contiguous. Times diffusers: "
        f"the median (and quartiles) of paired ratios of {row['rounds']} interleaved rounds. RMS error: against "
        f"float64, relative. GFLOP/s: the {figure(row['flops'] / 1e9)} GFLOP of direct convolutions and products, of "
        f"which Winograd's algorithm needs fewer, over the time; peak: {figure(peak['gflop_per_s'])} GFLOP/s of "
        f"float32, measured in the same run ({peak['how']}). Then shares of the time by kind of layer"
    )
    return "\n\n".join([f"{note}:", markdown(cells), *[f"Not measured: {'; '.join(lacking)}." for _ in lacking[:1]]])


def _speed(one: Row) -> str:
    """Returns how many times faster than diffusers an implementation is, with the quartiles of a measured ratio."""
    if "ratio_q1" not in one:
        return "1"
    return f"{1 / one['ratio']:.2f} ({1 / one['ratio_q3']:.2f} to {1 / one['ratio_q1']:.2f})"


def growth(rows: Sequence[Row]) -> str:
    """Returns the points of the growth plot."""
    rows = [row for row in rows if row["op"] == "growth"]
    names = implementations(rows)
    heads = ["axis", "value", "GFLOP", "floor of bytes, ms", "floor of FLOPs, ms", *(f"{name}, ms" for name in names)]
    cells = [heads]
    for row in rows:
        times = results.seconds_of(row)
        floors = [row.get(key, math.nan) for key in ("floor_bytes_us", "floor_flops_us")]
        cells.append([row["case"], str(row["value"]), figure(row.get("flops", math.nan) / 1e9)])
        cells[-1] += [figure(floor / 1e3) for floor in floors]
        cells[-1] += [_paired(row, name, figure(times[name] * 1e3)) if name in times else "" for name in names]
    if len(cells) == 1:
        return ""
    return f"How the time of a step (steps: of a run) grows along one axis at a time; {PAIRED}:\n\n{markdown(cells)}"
