"""Bits per dimension of held-out images under a model: a figure with its error, and every term of the bound."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ...likelihood import Process, Split, split_bound
from .. import plots
from ..data import ImageData


@dataclasses.dataclass(frozen=True)
class BitsPerDim:
    """The variational bound of images, in bits per dimension and in nats per image, averaged over images.

    Attributes:
        bits_per_dim, nats: the whole bound.
        standard_error: of ``bits_per_dim``: the standard deviation of the images' bounds over the root of their number.
        images, dimensions: how many images, and how many values each has.
        terms, terms_nats: of every timestep: L_0, L_1 ...
        prior, prior_nats: L_T.
        settings: the other options that decide the figures, as plain JSON values.
    """

    bits_per_dim: float
    nats: float
    standard_error: float
    images: int
    dimensions: int
    terms: list[float]
    terms_nats: list[float]
    prior: float
    prior_nats: float
    settings: dict[str, Any]


def bits_per_dim(
    process: Process,
    data: ImageData,
    *,
    n: int,
    labels: Tensor | None = None,
    seed: int = 0,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> BitsPerDim:
    """Returns the bound of the first ``n`` images of ``data``, n >= 2.

    Args:
        process: the model, without the grey levels, which are those of ``data``, and without labels.
        data: held-out images.
        n: how many of them, at most all.
        labels: [n], what the model is called with as ``y``, or None.
        seed: of the noise; that of an image depends on its index alone.
        batch_size: images per model call.
        device: where the model is.
        progress: show a tqdm bar.

    Raises:
        ValueError, TypeError: an argument that does not fit; a bound that is not a number.
    """
    if not 2 <= n <= len(data):
        raise ValueError(f"n must be in [2, {len(data)}], the held-out images there are; got {n}")
    process, parts = process._replace(levels=data.maximum + 1), []
    with tqdm(total=n * len(process.schedule), desc="measuring", unit="call", disable=not progress) as bar:
        for first in range(0, n, batch_size):
            index = torch.arange(first, min(first + batch_size, n))
            kwargs = {} if labels is None else {"y": labels[index].to(device)}
            x_start = data.batch(index)[0].to(device)
            bound = split_bound(
                process._replace(kwargs=kwargs),
                x_start,
                seed=seed,
                first_sample=first,
                callback=bar.update,
            )
            parts.append(Split(*(part.double().cpu() for part in bound)))
    split = Split(*(torch.cat(each) for each in zip(*parts, strict=True)))
    settings = {"seed": seed, "levels": process.levels, "prediction": process.prediction}
    settings |= {"variance": process.variance, "clip": process.clip, "timesteps": len(process.schedule)}
    return _averaged(split, data.images[0].numel(), settings)


def _averaged(split: Split, dimensions: int, settings: dict[str, Any]) -> BitsPerDim:
    total, to_nats = split.total, dimensions * math.log(2.0)
    if not total.isfinite().all():
        raise ValueError("model must give a finite bound; got NaN or inf")
    bits, terms, prior = float(total.mean()), split.terms.mean(dim=0), float(split.prior.mean())
    return BitsPerDim(
        bits_per_dim=bits,
        nats=bits * to_nats,
        standard_error=float(total.std() / len(total) ** 0.5),
        images=len(total),
        dimensions=dimensions,
        terms=terms.tolist(),
        terms_nats=(terms * to_nats).tolist(),
        prior=prior,
        prior_nats=prior * to_nats,
        settings=settings,
    )


def likelihood_markdown(result: BitsPerDim, run: dict[str, Any]) -> str:
    """Returns the result as a Markdown table, and how it was measured; ``run`` as in :func:`markdown`."""
    later = (math.fsum(result.terms[1:]), math.fsum(result.terms_nats[1:]))
    rows = [
        ("L_0, decoder", result.terms[0], result.terms_nats[0]),
        (f"L_1 to L_{len(result.terms) - 1}, sum", *later),
        ("L_T, prior", result.prior, result.prior_nats),
        ("bound", result.bits_per_dim, result.nats),
    ]
    table = ["|                   | bits/dim | nats per image |", "| ----------------- | -------: | -------------: |"]
    table += [f"| {name:17} | {bits:8.4f} | {nats:14.3f} |" for name, bits, nats in rows]
    notes = [
        f"{result.bits_per_dim:.4f} +- {result.standard_error:.4f} bits/dim (standard error over images) on "
        f"{result.images} held-out images of {result.dimensions} values of {result.settings['levels']} grey levels.",
        "Variance {variance}, x_0 clipped to {clip}, seed {seed}, {timesteps} timesteps.".format(**result.settings),
        "Measured in {seconds:.0f} s on {device}, {threads} threads, backend {backend}, torch {torch}; "
        "model {model}, {dtype}, batches of {batch_size}.".format(**run),
    ]
    return "\n".join([*table, "", *(f"- {note}" for note in notes)]) + "\n"


def likelihood_json(result: BitsPerDim, run: dict[str, Any]) -> str:
    """Returns the result and ``run`` as JSON."""
    return json.dumps({**dataclasses.asdict(result), "run": run}, indent=2) + "\n"


def terms_png(result: BitsPerDim) -> bytes:
    """Returns a plot of the terms by timestep, as in figure 2 of Nichol & Dhariwal (2021), as a PNG.

    Raises:
        ValueError: matplotlib is not installed.
    """
    figure = plots.figure(7, 4)
    axes = figure.add_subplot()
    axes.semilogy(range(1, len(result.terms)), result.terms[1:], linewidth=1, label="$L_{t-1}$")
    axes.semilogy([0], result.terms[:1], "o", label="$L_0$, decoder")
    axes.semilogy([len(result.terms)], [result.prior], "s", label="$L_T$, prior")
    axes.set(xlabel="timestep t", ylabel="bits/dim", title=f"Terms of the bound, {result.bits_per_dim:.3f} bits/dim")
    axes.grid(alpha=0.3)
    axes.legend()
    return plots.png(figure)
