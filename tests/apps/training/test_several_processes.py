"""Real processes that train together, over gloo: they equal one process on the same batch, stop together and resume.

What is not a rounding is as large in float64 as in float32: an image that is missing or seen twice, the noise of
another position, a wrong weight of a mean. So whole runs are compared in float64. AdamW divides by sqrt(v) + 1e-8:
where gradients differ by d, its steps, of size lr, differ by at most 4 lr d / 1e-8 (a change of m and of sqrt(v), and
|m| / sqrt(v) <= (1 - 0.9) / sqrt(1 - 0.999) < 3.2). A gradient is at most 1 here and a sum of some hundred products of
three passes, so that d is below 1,000 roundings of 2^-53; what a difference of weights adds to the next gradient is
left out. Measured are 1e-12, and 5e-4 in float32, where the same bound says nothing.
"""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import torch
from several import can_fork, in_processes
from training_runs import CPU, load_file, metadata, options, same

from dd_kernels.apps import cli, training
from dd_kernels.apps.processes import Processes
from dd_kernels.apps.training import Parallel, Trainer, grid_path
from dd_kernels.apps.training.sharded import Sharded

pytestmark = [pytest.mark.slow, can_fork]
MODEL = {
    "channels": [4],
    "num_groups": 2,
    "num_heads": 1,
    "num_res_blocks": 1,
    "attention_resolutions": [8],
    "dropout": 0.0,
}
STEPS, LR = 100, 1e-2
BOUND = STEPS * 4 * LR * (1000 * 2**-53) / 1e-8


def several(count, out, images, how=Parallel, accumulate=1, resume=False, sample_every=0, **changes):
    """Trains in ``count`` processes, or in this one where it is 0; returns what they ended with."""

    def work():
        with Processes.joined() as processes:
            training.train(
                options(**{"model": MODEL, "batch_size": 7, "lr": LR, "steps": STEPS, "warmup": 10, **changes}),
                out,
                dataset=images,
                resume=resume,
                save_every=0,
                sample_every=sample_every,
                parallel=how(processes, accumulate),
            )

    return in_processes(count, work) if count else [work() or 0]


def assert_equal_but_for_rounding(a, b):
    first, second = load_file(a), load_file(b)
    assert first.keys() == second.keys()
    assert {value.dtype for name, value in first.items() if "model." in name} == {torch.float64}
    worst = max(float((first[name] - second[name]).abs().max()) for name in first)
    assert worst < BOUND
    assert metadata(a)["loss"] == pytest.approx(metadata(b)["loss"], rel=1e-6)  # it is summed in float32


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Files of runs of one process, made once for each of their options."""
    folder, made = tmp_path_factory.mktemp("alone"), {}

    def run(images, **changes):
        key = str(changes)
        if key not in made:
            made[key] = folder / f"{len(made)}.safetensors"
            several(0, made[key], images, **changes)
        return made[key]

    return run


BY_LOSS = {"timesteps": "loss-second-moment", "num_timesteps": 2, "steps": 12}


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(
    ("count", "how", "accumulate", "changes"),
    [
        (2, Parallel, 1, {}),
        (3, Parallel, 1, {}),
        (3, Parallel, 2, BY_LOSS),
        (2, Sharded, 2, {"steps": 8}),
        (3, Sharded, 1, {"steps": 8}),
        (3, Parallel, 2, {"model": {**MODEL, "self_conditioning": True}, "steps": 8}),
        (3, Sharded, 2, {"model": {**MODEL, "self_conditioning": True}, "steps": 8}),
    ],
)
def test_processes_equal_one_on_the_same_batch(count, how, accumulate, changes, alone, images, tmp_path):
    out = tmp_path / "a.safetensors"
    assert several(count, out, images, how, accumulate, **changes) == [0] * count
    assert_equal_but_for_rounding(out, alone(images, **changes))


@pytest.mark.usefixtures("in_float64")
def test_any_number_of_processes_resumes(alone, images, tmp_path):
    """Three processes, then two that share the weights out, one alone, and two; the first draws the grids."""
    out = tmp_path / "a.safetensors"
    several(3, out, images, steps=5)
    assert several(2, out, images, Sharded, resume=True, steps=8, sample_every=3) == [0, 0]
    assert grid_path(out).stat().st_size > 100
    several(0, out, images, resume=True, steps=11)
    assert several(2, out, images, resume=True, steps=14) == [0, 0]
    assert_equal_but_for_rounding(out, alone(images, steps=14))


@pytest.mark.parametrize("count", [2, 3])
def test_a_gradient_is_the_weighted_mean_of_the_processes(count, images, tmp_path):
    """In float32: ``count`` terms of what each process computes alone, with a rounding for each sum and quotient."""

    def gradients(run):
        step, found = run._update, {}
        run._update = lambda: (found.update({n: p.grad.clone() for n, p in run.model.named_parameters()}), step())[1]
        run.train_step()
        return found

    def work():
        with Processes.joined() as processes:
            run, mine = (Trainer(options(model=MODEL, batch_size=7), images, CPU, Parallel(processes)) for _ in "ab")
            mine.connected = mine.model  # which exchanges nothing
            for _ in range(5):
                together, own = gradients(run), gradients(mine)
                for name, gradient in own.items():
                    terms = processes.summed(gradient.double()), processes.summed(gradient.double().abs())
                    error = (together[name].double() - terms[0] / count).abs()
                    assert (error <= (count + 1) * 2**-24 * terms[1] / count).all()
                assert any(gradient.any() for gradient in own.values())
                mine.model.load_state_dict(run.model.state_dict())

    assert in_processes(count, work) == [0] * count


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_signal_to_one_process_stops_all_after_the_same_step(stopped, images, tmp_path, monkeypatch):
    out, whole, step = tmp_path / "a.safetensors", tmp_path / "whole.safetensors", Trainer.train_step

    def interrupted(self):
        if self.step == 2 and self.parallel.processes.rank == stopped:
            signal.raise_signal(signal.SIGTERM)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupted)
        assert several(2, out, images, steps=6) == [0, 0]
    assert metadata(out)["step"] == 3
    assert several(2, out, images, resume=True, steps=6) == [0, 0]
    several(2, whole, images, steps=6)
    assert same(out, whole)


def command(out, *arguments, **model):
    model = [f"{name}={str(value).replace(' ', '')}" for name, value in (MODEL | model).items()]
    chosen = ["--data", "digits", "--out", str(out), "--no-progress", "--batch-size", "5", "--sample-every", "0"]
    return ["train", *chosen, "--num-timesteps", "4", *arguments, "--set", *model]


def test_what_fails_is_said_once(tmp_path, capfd, monkeypatch):
    out = tmp_path / "a.safetensors"
    assert in_processes(2, lambda: cli.main(command(out, "--batch-size", "1"))) == [2, 2]
    assert in_processes(2, lambda: cli.main(command(out, num_heads=3))) == [2, 2]
    assert in_processes(2, lambda: cli.main(command(tmp_path / "no" / "a.safetensors"))) == [2, 2]
    step = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda self: tuple(v * float("nan") for v in step(self)))
    assert in_processes(2, lambda: cli.main(command(out, "--steps", "3"))) == [1, 1]
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("dd_kernels")]
    wanted = [
        "batch_size must be at least 2",
        "num_heads must divide",
        "cannot write",
        "the loss of step 1 is not",
    ]
    assert len(lines) == 4, lines
    assert all(words in line for words, line in zip(wanted, lines, strict=True)), lines
    assert not out.exists()


def of_worker(rank, out):
    """Returns the process id of a worker of torchrun that trains ``out``."""
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words, environment = ((entry / name).read_text().split("\0") for name in ("cmdline", "environ"))
            except (OSError, UnicodeDecodeError):
                continue
            if str(out) in words and f"RANK={rank}" in environment:
                return int(entry.name)
    return None


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("restarts", [[], ["--max-restarts=3"]], ids=["the same command", "torchrun's restart"])
def test_after_a_kill_training_goes_on_from_the_last_save(restarts, tmp_path):
    out, whole = tmp_path / "a.safetensors", tmp_path / "whole.safetensors"
    train = command(out, "--steps", "60", "--save-every", "10", "--resume-if-there")
    run = [sys.executable, "-m", "torch.distributed.run", *restarts, "--nproc-per-node=2", "-m", "dd_kernels"]
    options = {"env": {**os.environ, "OMP_NUM_THREADS": "1"}, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen([*run, *train], text=True, **options) as running:
        while running.poll() is None and not out.exists():
            time.sleep(0.01)
        os.kill(of_worker(1, out), signal.SIGKILL)
        output = running.communicate(timeout=100)[0]
    assert (running.returncode == 0) == bool(restarts), output
    if not restarts:
        assert 10 <= metadata(out)["step"] < 60
        assert in_processes(2, lambda: cli.main(train)) == [0, 0]
    assert in_processes(2, lambda: cli.main(command(whole, "--steps", "60"))) == [0, 0]
    assert same(out, whole)
