"""One page of pictures about diffusion, drawn with a model: a HTML file that needs neither a server nor a network."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..ops import q_sample, randn
from ..ops.reverse_step.table import StepTable
from ..samplers import ddim, ddpm
from ..samplers.named import FEW_STEP_SAMPLERS
from ..sampling import sample, sample_progressive
from ..sampling.guidance import Model
from ..schedules import SCHEDULES, Schedule, named_schedule
from . import plots
from .images import picture_bytes, rows_of

STEPS = (5, 10, 20, 50, 100)
COLUMNS = 11  # images in a strip
TWO = range(2, 4)  # the samples that every sampler draws
STRIP_STEPS = 100  # of the reverse process that is shown

# x_0 of what the model predicts, in TeX.
_X0 = {
    "epsilon": r"\dfrac{x_t - \sqrt{1 - \bar\alpha_t}\, \epsilon_\theta(x_t, t)}{\sqrt{\bar\alpha_t}}",
    "x_start": r"x_\theta(x_t, t)",
    "v": r"\sqrt{\bar\alpha_t}\, x_t - \sqrt{1 - \bar\alpha_t}\, v_\theta(x_t, t)",
}


@dataclass(frozen=True)
class Drawing:
    """What the pictures are drawn with.

    Attributes:
        model: model(x, t, **kwargs).
        schedule: its forward process.
        kind: how tables read its output: ``prediction`` and ``learned_variance``.
        images: real ones, [N, C, H, W] in [-1, 1].
        conditions: range -> the keyword arguments of ``sample`` for the samples of these numbers.
        seed: of all noise.
    """

    model: Model
    schedule: Schedule
    kind: Mapping[str, Any]
    images: Tensor
    conditions: Callable[[range], Mapping[str, Any]]
    seed: int

    def table(self, name: str, steps: int) -> StepTable:
        """Returns the sampler of that name."""
        if name == "ddim":
            return ddim(self.schedule, steps, **self.kind)
        if name == "ddpm":
            variance = "learned_range" if self.kind["learned_variance"] else "fixed_small"
            return ddpm(self.schedule, steps, variance=variance, prediction=self.kind["prediction"])
        return FEW_STEP_SAMPLERS[name](self.schedule, steps, **self.kind)

    def draw(self, name: str, steps: int, numbers: range) -> Tensor:
        """Draws the samples of these numbers."""
        shape, table = (len(numbers), *self.images.shape[1:]), self.table(name, steps)
        at: dict[str, Any] = {"seed": self.seed, "first_sample": numbers.start, "device": self.images.device}
        return sample(self.model, shape, table, **at, **self.conditions(numbers))


class Section(NamedTuple):
    """A picture with its title, two sentences in HTML, and their equation in TeX."""

    title: str
    picture: bytes
    caption: str
    equation: str


def _forward(drawing: Drawing) -> Section:
    schedule, images = drawing.schedule, drawing.images
    timesteps = np.linspace(0, len(schedule) - 1, COLUMNS - 1).round().astype(int).tolist()
    z = randn(images.shape, seed=drawing.seed, device=images.device)
    noisy = [images, *(q_sample(images, t, schedule, z) for t in timesteps)]
    rows = {f"image {i + 1}": torch.stack([x[i] for x in noisy]) for i in range(len(images))}
    return Section(
        "Forward: an image becomes noise",
        picture_bytes(rows_of(rows, ["image", *(f"t = {t}" for t in timesteps)])),
        "The forward process mixes an image x<sub>0</sub> with normal noise, and one step leads to any timestep t. As "
        "ᾱ<sub>t</sub> falls from 1 to almost 0 the details go first, then the form, and in the end only noise is left "
        "(Ho et al., 2020, eq. 4).",
        r"x_t = \sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\, \epsilon, \quad \epsilon \sim N(0, I)",
    )


def _reverse(drawing: Drawing) -> Section:
    steps = min(STRIP_STEPS, len(drawing.schedule))
    table, numbers, shown = drawing.table("ddpm", steps), range(2), []
    x_T = before = randn((2, *drawing.images.shape[1:]), seed=drawing.seed, device=drawing.images.device)
    chosen = set(np.linspace(0, steps - 1, min(COLUMNS, steps)).round().astype(int).tolist())
    for step in sample_progressive(drawing.model, x_T, table, seed=drawing.seed, **drawing.conditions(numbers)):
        if step.index in chosen:
            shown.append((step.timestep, before, step.x0))
        before = step.x
    rows = {}
    for i in numbers:
        rows[f"{i + 1}: x_t"] = torch.stack([x[i] for _, x, _ in shown])
        rows[f"{i + 1}: predicted x_0"] = torch.stack([x0[i] for _, _, x0 in shown if x0 is not None])
    return Section(
        "Reverse: noise becomes an image",
        picture_bytes(rows_of(rows, [f"t = {t}" for t, _, _ in shown])),
        "At every timestep the model's output gives a guess of the image x<sub>0</sub>, and a step goes a little "
        "towards it. Early guesses are coarse, since many images fit so much noise, and the form settles before the "
        "details do (Ho et al., 2020, eq. 15).",
        rf"\hat x_0 = {_X0[drawing.kind['prediction']]}",
    )


def _schedules(drawing: Drawing) -> Section:
    lines = {name: named_schedule(name) for name in SCHEDULES if name != "squaredcos_cap_v2"}  # which is the cosine
    figure = plots.figure(10, 4)
    signal, ratio = figure.subplots(1, 2)
    for name, schedule in (*lines.items(), ("this model's", drawing.schedule)):
        own = {} if name in lines else {"color": "black", "linestyle": "--", "linewidth": 2}
        time = np.arange(len(schedule)) / len(schedule)
        signal.plot(time, schedule.alpha_bar, label=name, **own)
        ratio.plot(time, 10 * np.log10(np.maximum(schedule.snr, 1e-12)), **own)
    signal.set(xlabel="t / T", ylabel="$\\bar\\alpha_t$, what is left of the image")
    ratio.set(xlabel="t / T", ylabel="signal-to-noise ratio in dB", ylim=(-60, 60))
    for axes in (signal, ratio):
        axes.grid(alpha=0.3)
    signal.legend()
    return Section(
        "Schedules: how fast the noise comes",
        plots.png(figure),
        "A schedule says how much of the image is left at each timestep, and the signal-to-noise ratio says it on a "
        "scale without bounds. The linear schedule destroys small images early, which is why the cosine was proposed "
        "(Nichol &amp; Dhariwal, 2021, eq. 17).",
        r"\bar\alpha_t = \prod_{s \leq t} (1 - \beta_s), \quad SNR(t) = \dfrac{\bar\alpha_t}{1 - \bar\alpha_t}",
    )


def _consistency(drawing: Drawing) -> Section:
    rows = {f"{steps} steps": drawing.draw("ddim", steps, range(COLUMNS - 1)) for steps in _numbers(drawing)}
    return Section(
        "DDIM: the same noise gives the same image, in any number of steps",
        picture_bytes(rows_of(rows)),
        "DDIM adds no noise after x<sub>T</sub>, so each column follows one curve from its x<sub>T</sub> to its image, "
        "and more steps follow it more closely. So x<sub>T</sub> is a latent of the image, which can be found from it "
        "and mixed with others (Song et al., 2021, eq. 12 and figure 5).",
        r"x_{prev} = \sqrt{\bar\alpha_{prev}}\, \hat x_0 + \sqrt{1 - \bar\alpha_{prev}}\, "
        r"\dfrac{x_t - \sqrt{\bar\alpha_t}\, \hat x_0}{\sqrt{1 - \bar\alpha_t}}",
    )


def _samplers(drawing: Drawing) -> Section:
    rows, numbers = {}, _numbers(drawing)
    for name in ("ddim", "ddpm", *FEW_STEP_SAMPLERS):
        drawn = [drawing.draw(name, steps, TWO) for steps in numbers]
        rows[name] = torch.stack(drawn, dim=1).flatten(0, 1)  # all numbers of steps of a sample, then of the other
    return Section(
        "Two samples under every sampler and number of steps",
        picture_bytes(rows_of(rows, [*map(str, numbers)] * len(TWO))),
        "From one x<sub>T</sub> all that solve a differential equation (ddim, dpm++, dpm++3m, unipc, euler) "
        "come to one image, and those of higher order need fewer steps. Those that add noise z at each step (ddpm, "
        "dpm++sde, euler_ancestral) end elsewhere with every number of steps (Ho et al., 2020, algorithm 2).",
        r"x_{t-1} = \mu_\theta(x_t, t) + \sigma_t z, \quad z \sim N(0, I)",
    )


def _numbers(drawing: Drawing) -> Sequence[int]:
    return [steps for steps in STEPS if steps <= len(drawing.schedule)] or [len(drawing.schedule)]


def sections(drawing: Drawing) -> Iterator[Section]:
    """Yields the page's sections as they are drawn."""
    for section in (_forward, _reverse, _schedules, _consistency, _samplers):
        yield section(drawing)


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ max-width: 60rem; margin: 2rem auto; padding: 0 1rem; font: 1.05rem/1.5 sans-serif; color: #222; }}
img {{ max-width: 100%; height: auto; }}
.equation {{ text-align: center; }}
footer {{ color: #666; font-size: 0.9rem; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{intro}</p>
{sections}
<footer><p>{footer}</p></footer>
</body>
</html>
"""


def _image(png: bytes, alt: str) -> str:
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def page(title: str, intro: str, parts: Sequence[Section], footer: str) -> str:
    """Returns the page, its pictures within it; title, intro and footer are plain text."""
    bodies = [
        f"<section>\n<h2>{i}. {part.title}</h2>\n{_image(part.picture, part.title)}\n<p>{part.caption}</p>\n"
        f'<p class="equation">{_image(plots.formula(part.equation), part.equation)}</p>\n</section>'
        for i, part in enumerate(parts, 1)
    ]
    texts = {"title": title, "intro": intro, "footer": footer}
    return _PAGE.format(sections="\n".join(bodies), **{name: html.escape(text) for name, text in texts.items()})
