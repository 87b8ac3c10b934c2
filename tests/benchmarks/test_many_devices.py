"""The simulation of many devices, where its outcome has a closed form."""

import dataclasses
import math

import pytest

from benchmarks import many_devices
from benchmarks.many_devices import Device, simulate

EVEN = Device(rate=5.0, load=3.0, write=0.0, commit=(0.0, 0.0), spread=0.0, slow=(0.0, 1.0))


@pytest.mark.parametrize(("devices", "size"), [(1, 7), (3, 7), (8, 100), (64, 10)])
def test_equal_devices_take_turns(devices, size):
    outcome = simulate(EVEN, devices, 1000, size)
    rounds, rest = divmod(math.ceil(1000 / size) - 1, devices)
    last = (1000 % size or size) if rest == 0 else size
    assert outcome.seconds >= 3 + (rounds * size + last) / 5 - 1e-9
    assert outcome.seconds <= 3 + (rounds + 1) * size / 5 + 1e-9
    assert outcome.drawing == pytest.approx(1000 / 5 / devices)
    assert (outcome.writing, outcome.waiting) == (0, 0)  # whoever is ready first writes first
    assert outcome.idle == pytest.approx(outcome.seconds - 3 - 200 / devices)


def test_the_manifest_is_rewritten_by_one_device_at_a_time():
    committing = dataclasses.replace(EVEN, rate=1e9, commit=(0.5, 0.01))
    outcome = simulate(committing, 20, 100, 1)
    assert outcome.seconds == pytest.approx(3 + 100 * 0.5 + 0.01 * 99 * 100 / 2)
    assert outcome.writing == pytest.approx((outcome.seconds - 3) / 20)
    assert outcome.waiting > 10 * outcome.writing


def test_a_shard_is_written_in_proportion_to_its_images():
    outcome = simulate(dataclasses.replace(EVEN, write=5.0), 1, 1000, 100)
    assert outcome.writing == pytest.approx(10.0)
    assert outcome.seconds == pytest.approx(3 + 200 + 10)


def test_slow_devices_hold_up_the_end():
    slow = simulate(dataclasses.replace(EVEN, slow=(0.5, 2.0)), 8, 1000, 125)
    assert slow.seconds == pytest.approx(3 + 2 * 125 / 5)
    assert 0 < slow.idle < slow.drawing
    spread = dataclasses.replace(EVEN, spread=0.3)
    assert simulate(spread, 8, 1000, 125) == simulate(spread, 8, 1000, 125)
    assert simulate(spread, 8, 1000, 125, seed=1) != simulate(spread, 8, 1000, 125)


def test_the_table_starts_from_measured_figures(monkeypatch, capsys):
    write, (first, further) = many_devices.measured_files((1, 2, 2))
    assert min(write, first) > 0
    assert further >= 0
    with pytest.raises(ValueError, match=r"case must be that of a row in .* got 'none'"):
        many_devices.measured_rate(many_devices.RESULTS, "none", 50)
    fast, slow = (many_devices.measured_rate(many_devices.RESULTS, "cifar10 ddim", steps) for steps in (10, 50))
    assert fast == pytest.approx(5 * slow)
    monkeypatch.setattr(many_devices, "measured_files", lambda: (0.1, (0.01, 1e-5)))
    monkeypatch.setattr("sys.argv", ["many_devices", "--devices", "1", "8", "--shard-sizes", "500"])
    many_devices.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"Predicted, not measured. 50000 images; of one device: Device(rate={slow}, ")
    assert [line.split(" | ")[:2] for line in lines[4:]] == [["| 1", "500"], ["| 8", "500"]]
