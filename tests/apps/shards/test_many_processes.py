"""A job among several processes of torchrun, killed at random and resumed: always the same bytes."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from tqdm import tqdm

from dd_kernels.apps import checkpoint, cli
from dd_kernels.apps.checkpoint import ModelInfo
from dd_kernels.apps.shards import MANIFEST, Manifest
from dd_kernels.nn import UNet

pytestmark = pytest.mark.slow
COMMAND = ["sample", "-n", "23", "--steps", "3", "--batch-size", "3", "--shard-size", "4", "--no-progress"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    tiny = UNet.from_config("digits", channels=(8, 16), num_heads=2, num_groups=4, num_classes=None, null_class=False)
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    checkpoint.save_model(path, tiny.state_dict(), ModelInfo(tiny.config, "cosine", 20, "v", (), {}))
    return str(path)


@pytest.fixture(scope="module")
def straight(model, tmp_path_factory):
    """The bytes of every file of a job that nobody disturbed."""
    folder = tmp_path_factory.mktemp("straight") / "out"
    assert cli.main([*COMMAND, "--model", model, "--out", str(folder)]) == 0
    return contents(folder)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if not file.name.startswith(".")}


def torchrun(processes, model, folder):
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*run, "-m", "dd_kernels", *COMMAND, "--model", model, "--out", str(folder)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_any_number_of_processes_draws_the_same_bytes(processes, model, straight, tmp_path):
    output = torchrun(processes, model, tmp_path / "out").communicate(timeout=300)[0]
    assert contents(tmp_path / "out") == straight, output
    assert f"by {processes} processes" in output


def workers(folder):
    """Returns the processes whose command line names the folder, without torchrun's own."""
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_text().split("\0")
            except OSError:
                continue
            if str(folder) in words and "torch.distributed.run" not in words:
                found.append(int(entry.name))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("whole", [False, True])
def test_killed_processes_leave_a_job_that_goes_on(whole, model, straight, tmp_path):
    """One rank is killed, or all and torchrun with them, as soon as the first shards are there."""
    folder = tmp_path / "out"
    running = torchrun(2, model, folder)
    while running.poll() is None and not (folder.exists() and len(contents(folder)) > 2):
        time.sleep(0.01)
    if whole:
        os.killpg(running.pid, signal.SIGKILL)
    for process in workers(folder)[: None if whole else 1]:
        os.kill(process, signal.SIGKILL)
    running.communicate(timeout=120)
    output = torchrun(3, model, folder).communicate(timeout=300)[0]
    assert contents(folder) == straight, output


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_a_hundred_kills_at_random_moments(model, straight, tmp_path, monkeypatch):
    """Each run is killed somewhere in its first tenths of a second, and the next one goes on."""
    # tqdm's own lock is one semaphore of all forked processes: a child killed within it would never let it go.
    monkeypatch.setattr(tqdm, "_lock", threading.RLock(), raising=False)
    folder, moments, finished = tmp_path / "out", random.Random(0), 0
    shards = sorted(set(straight) - {MANIFEST})
    for _ in range(100):
        child = os.fork()
        if child == 0:
            os._exit(cli.main([*COMMAND, "--model", model, "--out", str(folder)]))
        time.sleep(moments.uniform(0, 0.06))
        os.kill(child, signal.SIGKILL)
        finished += os.waitpid(child, 0)[1] == 0
        if folder.exists() and contents(folder) == straight:
            for name in moments.sample(shards, 2):
                (folder / name).unlink()
    assert cli.main([*COMMAND, "--model", model, "--out", str(folder)]) == 0
    assert contents(folder) == straight
    assert not list(folder.glob(".*.part"))
    assert Manifest.read(folder).damaged() == []
    assert finished < 100


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_number_of_images(model, tmp_path):
    code = (
        "import sys; from dd_kernels.apps import cli; assert cli.main(sys.argv[1:]) == 0; "
        "print(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])"
    )

    def peak(count):
        arguments = ["sample", "-n", str(count), "--steps", "1", "--shard-size", "100", "--no-progress"]
        arguments += ["--model", model, "--out", str(tmp_path / str(count))]
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        return int(done.stdout.split()[-1]) / 1024

    few, many = peak(100), peak(20_000)
    print(f"peak of 100 images {few:.0f} MB, of 20,000 {many:.0f} MB")
    assert many < few + 8  # 20,000 images take 5 MB as float32


def test_shards_of_several_processes_read_as_one_set(model, straight, tmp_path):
    """Every image is there once: the shards together are what one piece gives, but for roundings of a grey level."""
    run = torchrun(2, model, tmp_path / "out")
    output = run.communicate(timeout=300)[0]
    assert run.returncode == 0, output
    files = sorted((tmp_path / "out").glob("*.npz"))
    shards = np.concatenate([np.load(file)["images"] for file in files])
    one = tmp_path / "one.npz"
    assert cli.main([*COMMAND[:3], "--steps", "3", "--model", model, "--no-progress", "--out", str(one)]) == 0
    assert np.abs(shards.astype(int) - np.load(one)["images"]).max() <= 1
