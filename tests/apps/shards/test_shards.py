"""Shards of a job: which images each holds, what its file is, what counts, and who draws it."""

import dataclasses
import io
import json
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

import dd_kernels as dd
from dd_kernels.apps.shards import FORMATS, MANIFEST, Job, Manifest, Shard, draw_all, formats, work
from dd_kernels.apps.shards.job import table_digest

NAMES = ("images", "labels")


def draw_to_the_end(manifest, draw):
    counts = []
    draw_all(manifest, draw, counts.append, NAMES)
    return counts


def test_shards_hold_every_image_once(job):
    assert job.shards == [Shard(5, 4), Shard(9, 4), Shard(13, 2)]
    assert [job.name(shard) for shard in job.shards][:2] == ["0000000005-0000000008.npz", "0000000009-0000000012.npz"]
    assert [job.labels_of(shard) for shard in job.shards] == [[8, 7, 8, 7], [8, 7, 8, 7], [8, 7]]
    assert dataclasses.replace(job, labels=None).labels_of(Shard(5, 4)) is None


def test_npz(tmp_path):
    images, path = torch.randint(256, (3, 2, 2, 3), dtype=torch.uint8), tmp_path / "a.npz"
    checksum = formats.write(path, "npz", 0, images, [1, 2, 3], ("arr_0", "arr_1"))
    with np.load(path) as file:
        assert np.array_equal(file["arr_0"], images)
        assert file["arr_1"].tolist() == [1, 2, 3]
    assert formats.digest(path) == checksum


def test_tar(tmp_path):
    images, path = torch.randint(256, (2, 2, 2, 1), dtype=torch.uint8), tmp_path / "a.tar"
    formats.write(path, "tar", 9, images, [4, 5])
    with tarfile.open(path) as archive:
        assert archive.getnames() == [f"{i:010d}.{end}" for i in (9, 10) for end in ("png", "cls")]
        png, label = (archive.extractfile(f"0000000010.{end}").read() for end in ("png", "cls"))
        assert archive.getmembers()[0].mtime == 0
    assert label == b"5"
    with Image.open(io.BytesIO(png)) as picture:
        assert np.array_equal(np.asarray(picture), images[1, :, :, 0])
    formats.write(path, "tar", 9, images, None)
    with tarfile.open(path) as archive:
        assert archive.getnames() == ["0000000009.png", "0000000010.png"]


@pytest.mark.parametrize("kind", FORMATS)
def test_equal_images_are_equal_bytes_and_every_change_shows(tmp_path, kind):
    images = torch.randint(256, (3, 4, 4, 1), dtype=torch.uint8)
    one, two = (tmp_path / f"{name}{FORMATS[kind]}" for name in "ab")
    checksum = formats.write(one, kind, 7, images, [0, 1, 2])
    assert formats.write(two, kind, 7, images, [0, 1, 2]) == checksum == formats.digest(one)
    file = sorted(one.iterdir())[1] if one.is_dir() else one
    content = file.read_bytes()
    for changed in (content[:-1], content + b"\0", content[:-1] + bytes([content[-1] ^ 1])):
        file.write_bytes(changed)
        assert formats.digest(one) != checksum
    file.write_bytes(content)
    assert formats.digest(one) == checksum
    if one.is_dir():
        file.rename(file.with_name("other.png"))
        assert formats.digest(one) != checksum


def test_missing_shards_are_drawn(manifest, draw):
    assert draw_to_the_end(manifest, draw) == [0, 4, 8, 10]
    assert draw.drawn == manifest.job.shards
    assert manifest.missing() == manifest.damaged() == []
    with np.load(manifest.folder / "0000000013-0000000014.npz") as file:
        assert file["images"][:, 0, 0, 0].tolist() == [13, 14]
        assert file["labels"].tolist() == [8, 7]
    draw_to_the_end(manifest, draw)
    assert len(draw.drawn) == 3
    assert [p.name for p in manifest.folder.iterdir() if "lock" in p.name] in ([], [f".{MANIFEST}.lock"])


@pytest.mark.parametrize("kind", FORMATS)
def test_altered_shards_are_found_and_drawn_again(job, tmp_path, draw, kind):
    manifest = Manifest(tmp_path / "out", dataclasses.replace(job, format=kind))
    manifest.start()
    draw_to_the_end(manifest, draw)
    before = manifest.checksums()
    first, second, _ = (manifest.folder / name for name in sorted(before))
    if kind == "png":
        (first / "stray").write_bytes(b"")
        next(second.iterdir()).unlink()
    else:
        first.write_bytes(first.read_bytes()[:-3])
        second.unlink()
    assert manifest.damaged() == [first.name, second.name]
    manifest.forget(manifest.damaged())
    draw_to_the_end(manifest, draw)
    assert draw.drawn[3:] == manifest.job.shards[:2]
    assert manifest.checksums() == before
    assert manifest.damaged() == []


def test_a_shard_that_another_process_draws_is_left_to_it(manifest, draw, monkeypatch):
    """The holder of its lock is waited for; where it died, the shard is drawn here."""
    shard = manifest.job.shards[0]
    lock = FileLock(manifest.folder / f".{manifest.job.name(shard)}.lock", is_singleton=False)
    lock.acquire()
    waited = []

    def pause(seconds):
        waited.append(list(draw.drawn))
        lock.release()

    monkeypatch.setattr(work.time, "sleep", pause)
    draw_to_the_end(manifest, draw)
    assert waited == [manifest.job.shards[1:]]
    assert draw.drawn == [*manifest.job.shards[1:], shard]


def test_a_shard_that_was_written_meanwhile_is_not_drawn_again(manifest, draw, monkeypatch):
    claim = work._claim

    def late(folder, name):
        if name not in manifest.checksums():
            manifest.add(next(s for s in manifest.job.shards if manifest.job.name(s) == name), "0" * 64)
        return claim(folder, name)

    monkeypatch.setattr(work, "_claim", late)
    draw_to_the_end(manifest, draw)
    assert draw.drawn == []


def test_another_job_is_refused_with_the_difference(manifest):
    job = dataclasses.replace(manifest.job, seed=3, options={"steps": 4})
    with pytest.raises(ValueError, match="holds another job; seed is 0 there and 3 here, steps is 3 there and 4 here"):
        Manifest(manifest.folder, job).start()
    Manifest(manifest.folder, manifest.job).start()


DAMAGES = {
    "no JSON": lambda content: "{",
    "job and shards": lambda content: {"job": content["job"]},
    "job must hold": lambda content: {**content, "job": {"seed": 1}},
    "must be integers": lambda content: {**content, "job": {**content["job"], "shard_size": 0}},
    "must be integers;": lambda content: {**content, "job": {**content["job"], "seed": "1"}},
    "format must be one of": lambda content: {**content, "job": {**content["job"], "format": "exe"}},
    "those of the job": lambda content: {**content, "shards": {"../../a.npz": "0" * 64}},
    "a SHA-256": lambda content: {**content, "shards": {"0000000005-0000000008.npz": "0"}},
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_a_damaged_manifest_is_one_error(manifest, reason):
    changed = DAMAGES[reason](json.loads(manifest.file.read_bytes()))
    manifest.file.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(ValueError, match="is damaged: " + ("" if reason == "no JSON" else f".*{reason}")):
        Manifest.read(manifest.folder)


def test_no_manifest(tmp_path):
    with pytest.raises(ValueError, match="there is no manifest"):
        Manifest.read(tmp_path)


@pytest.mark.slow
def test_processes_that_add_at_the_same_time_lose_nothing(tmp_path):
    job = Job("1", "m", {}, "t", None, 0, 0, 60, [1, 2, 2], 1, "npz")
    Manifest(tmp_path, job).start()
    code = (
        "import sys, pathlib; from dd_kernels.apps.shards import Manifest\n"
        "m = Manifest.read(pathlib.Path(sys.argv[1]))\n"
        "for s in m.job.shards[int(sys.argv[2])::2]: m.add(s, '0' * 64)"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(i)]) for i in range(2)]
    assert [process.wait(60) for process in running] == [0, 0]
    assert len(Manifest.read(tmp_path).checksums()) == 60


def test_a_tables_digest_changes_with_all_that_changes_images():
    schedule = dd.linear_schedule(20)
    tables = [
        dd.ddim(schedule, 5),
        dd.ddim(schedule, 6),
        dd.ddim(schedule, 5, eta=0.5),
        dd.ddim(schedule, 5, clip=None),
        dd.ddim(schedule, 5, clip=dd.DynamicThreshold()),
        dd.euler(schedule, 5),
    ]
    assert len({table_digest(table) for table in tables}) == len(tables)
    assert table_digest(dd.ddim(schedule, 5)) == table_digest(tables[0])
