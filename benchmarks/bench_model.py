"""The forward pass of a whole U-Net, ours and every peer that is installed beside diffusers eager, on a CPU.

``python -m benchmarks.bench_model --model cifar10 --batch 16`` prints one table: times, paired ratios, errors against
float64, the share of the processor's peak rate of multiply-adds, and the time by kind of layer.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor, nn

import dd_kernels as dd
from dd_kernels.compile import kept_filters
from dd_kernels.nn import CONFIGS, UNet

from . import machine, models, tables
from .harness import Case, Plan, Row, Target, measure, reason, rms_error
from .timing import clock_of

SETTLE = 0.03  # seconds in which the threads of another library stop spinning
ROUNDS = 11
BF16 = torch.bfloat16
# Bytes of packed filters. Alone in a process each of our five implementations has 512 MiB of them.
_KEPT = 5 * (512 << 20)
Forward = Callable[[Tensor], Tensor]
RUNS: dict[str, list[tuple[str, int]]] = {"cpu": [("cifar10", 1), ("cifar10", 16)], "cuda": []}


class _Plain(nn.Module):
    """A U-Net of diffusers as a function of images and timesteps that returns a tensor."""

    def __init__(self, model: nn.Module, y: Tensor | None) -> None:
        super().__init__()
        self.model, self.y = model, y

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Returns the model's output."""
        out: Tensor = self.model(x, t, class_labels=self.y, return_dict=False)[0]
        return out


@dataclass(frozen=True)
class Network:
    """Our U-Net, diffusers' with the same weights, and the images, timesteps and labels that they are called with."""

    ours: UNet
    theirs: nn.Module
    x: Tensor
    t: Tensor
    y: Tensor | None

    def copy(self) -> _Plain:
        """Returns a copy of diffusers' model, because some peers change the model that they are given."""
        return _Plain(copy.deepcopy(self.theirs), self.y).eval()


def _eager(net: Network, last: bool = False) -> Forward:
    """Returns diffusers' model as it is, or in channels_last."""
    model = models.channels_last(net.copy()) if last else net.copy()
    return lambda x: model(_channels_last(x) if last else x, net.t)


def _bfloat16(net: Network, accelerated: bool = False) -> Forward:
    """Returns diffusers' model in bfloat16, as it is or accelerated."""
    model = net.copy().to(torch.bfloat16)
    if accelerated:
        model.model = dd.accelerate(model.model)[0]
    return lambda x: model(x.to(torch.bfloat16), net.t).float()


def _channels_last(x: Tensor) -> Tensor:
    """Returns x in channels_last."""
    return x.contiguous(memory_format=torch.channels_last)


def _compiled(net: Network, backend: Any, last: bool = False) -> Forward:
    """Returns diffusers' model compiled by a backend, in channels_last or as it is."""
    model = models.channels_last(net.copy()) if last else net.copy()
    function = torch.compile(model, backend=backend, dynamic=False)
    return lambda x: function(_channels_last(x) if last else x, net.t)


def _inductor(net: Network) -> Forward:
    """Returns torch.compile in channels_last with frozen weights, which is its fastest way."""
    torch._dynamo.reset()
    with torch._inductor.config.patch(freezing=True):
        function = _compiled(net, "inductor", last=True)
        function(net.x)  # compiles while the option holds
    return function


def _ours(net: Network) -> Forward:
    """Returns our U-Net in channels_last."""
    model = models.channels_last(models.sharing(net.ours))
    return lambda x: model(_channels_last(x), net.t, net.y)


def _by_our_compiler(net: Network) -> Forward:
    """Returns diffusers' model under ``torch.compile(model, backend="dd_kernels")``."""
    from dd_kernels.compile import dd_kernels as backend

    return _compiled(net, backend)


def _accelerated(net: Network, **options: Any) -> Forward:
    """Returns diffusers' model accelerated by ``dd_kernels.accelerate``."""
    model = net.copy()
    model.model = dd.accelerate(model.model, **options)[0]
    return lambda x: model(x, net.t)


def _openvino(net: Network, precision: str) -> Forward:
    """Returns diffusers' model compiled by OpenVINO."""
    import openvino  # type: ignore[import-not-found, import-untyped, unused-ignore]

    shapes = [list(net.x.shape), list(net.t.shape)]
    with warnings.catch_warnings(action="ignore"):  # it traces the model, whose shapes are fixed here
        converted = openvino.convert_model(net.copy(), example_input=(net.x, net.t), input=shapes)
    options = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    options["INFERENCE_NUM_THREADS"] = str(torch.get_num_threads())
    compiled = openvino.Core().compile_model(converted, "CPU", options)
    return lambda x: torch.from_numpy(compiled((x.numpy(), net.t.numpy()))[0])


def _makers() -> dict[str, Callable[[Network], Forward]]:
    """Returns by name the function that makes each implementation which is installed, in the order of the table."""
    found: dict[str, Callable[[Network], Forward]] = {
        "diffusers, channels_last": partial(_eager, last=True),
        "torch.compile": _inductor,
        "OpenVINO": partial(_openvino, precision="f32"),
        "dd_kernels, nn.UNet": _ours,
        "dd_kernels, torch.compile": _by_our_compiler,
        "dd_kernels, accelerate": _accelerated,
        "dd_kernels, accelerate, high accuracy": partial(_accelerated, accuracy="high"),
        "dd_kernels, accelerate, bfloat16": partial(_accelerated, dtype="bfloat16"),
        "dd_kernels, accelerate, bfloat16, fast": partial(_accelerated, dtype="bfloat16", accuracy="fast"),
        "diffusers bfloat16": _bfloat16,
        "dd_kernels, accelerate, model in bfloat16": partial(_bfloat16, accelerated=True),
        "OpenVINO bfloat16": partial(_openvino, precision="bf16"),
    }
    installed = importlib.util.find_spec("openvino") is not None
    return {name: make for name, make in found.items() if installed or not name.startswith("OpenVINO")}


def _made(net: Network) -> tuple[dict[str, Forward | str], dict[str, float]]:
    """Makes every implementation, calls it once, and returns the seconds that took; one that fails is its reason."""
    found: dict[str, Forward | str] = {}
    seconds = {}
    for name, make in _makers().items():
        started = time.monotonic()
        try:
            function = make(net)
            function(net.x)
            found[name], seconds[name] = function, time.monotonic() - started
        except Exception as error:
            found[name] = reason(error)
    return found, seconds


def _inspect(net: Network, found: dict[str, Forward | str], seconds: dict[str, float]) -> Row:
    """Returns errors, operations, the peak rate and the time by kind of layer."""
    exact = net.copy().double()(net.x.double(), net.t)
    functions = {name: f for name, f in found.items() if not isinstance(f, str)}
    return {
        "errors": {name: rms_error(f(net.x), exact) for name, f in functions.items()},
        # torch's profiler does not see into OpenVINO.
        "kinds": {n: machine.kinds(partial(f, net.x)) for n, f in functions.items() if "OpenVINO" not in n},
        "flops": machine.flops(partial(net.copy(), net.x, net.t)),
        "peak": machine.peak(),
        "prepared_s": seconds,
    }


def _network(name: str, batch: int, target: Target) -> Network:
    """Returns a model with random weights and its inputs, the same at every run."""
    from dd_kernels.integrations.diffusers.unet import to_diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = models.unet(name, target, torch.float32)
        side = model.config["image_size"]
        x = torch.randn(batch, model.config["in_channels"], side, side)
        t = torch.randint(1000, (batch,))
    # diffusers' model is contiguous, as from_pretrained returns it.
    theirs = to_diffusers(model).to(memory_format=torch.contiguous_format)
    return Network(model, theirs, x, t, models.labels(model, batch, "cpu"))


def _case(target: Target, name: str, batch: int, rounds: int) -> Case:
    """Returns the case of a model, with every implementation already compiled."""
    net = _network(name, batch, target)
    kept_filters.LIMIT = _KEPT
    base = _eager(net)
    found, seconds = _made(net)
    return Case(
        "model",
        name,
        net.x.shape,
        base,
        [(net.x,)],
        models.parameter_bytes(net.ours) + 2 * net.x.nbytes,
        dict(found),
        rounds=rounds,
        settle=SETTLE,
        inspect=lambda: _inspect(net, {"diffusers": base, **found}, seconds),
    )


def plans(target: Target) -> list[Plan]:
    """Returns plans of a CPU with all its threads. They compile whole models."""
    return [
        Plan(f"model {name} {batch}", partial(_case, target, name, batch, ROUNDS), machine.THREADS[-1], "compiled")
        for name, batch in RUNS[target.kind]
    ]


def test_model(compare: Callable[[Plan], Row], plan: Plan) -> None:
    compare(plan)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_model", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--model", choices=CONFIGS, default="cifar10")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=machine.THREADS[-1], help="of torch (%(default)s)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="in which all take turns (%(default)s)")
    options = parser.parse_args()
    for name in ("batch", "threads", "rounds"):
        if (number := getattr(options, name)) < (2 if name == "rounds" else 1):
            parser.error(f"--{name} must be at least {2 if name == 'rounds' else 1}; got {number}")
    target = Target("cpu", "cpu", clock_of("cpu"))
    build = partial(_case, target, options.model, options.batch, options.rounds)
    print(tables.models([measure(Plan(options.model, build, options.threads), target)]))


if __name__ == "__main__":
    main()
