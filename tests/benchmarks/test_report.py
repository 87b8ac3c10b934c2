"""The README shows what is in benchmarks/results, and nothing else."""

import json

import pytest

from benchmarks import report, results


def row(ratio, threads=1, shape=(1, 3, 8, 8), **changes):
    return {
        "op": "reverse_step",
        "case": "ddpm",
        "shape": list(shape),
        "dtype": "float32",
        "layout": "contiguous",
        "threads": threads,
        "device": "Some CPU (R)",
        "isa": "avx2",
        "torch": "2.13.0",
        "peers": {"diffusers": {"ratio": ratio}, "apex": {"not_measured": "apex is not installed"}},
        **changes,
    }


def test_the_readmes_tables_are_those_of_the_committed_results():
    text = (report.ROOT / "README.md").read_text()
    shown = text.split(report.BEGIN)[1].split(report.END)[0].strip()
    assert shown == report.readme_section().strip()


def test_every_committed_result_has_its_plot_and_its_device():
    files = sorted(results.FOLDER.glob("*.json"))
    assert files
    for file in files:
        rows = results.load(file)
        assert {results.file_of(r["device"]) for r in rows} == {file}
        assert file.with_suffix(".png").stat().st_size > 10_000


def test_digest_is_the_median_and_range_over_the_shapes():
    rows = [row(2.0), row(8.0, shape=(2, 3, 8, 8)), row(3.0, shape=(4, 3, 8, 8)), row(30.0, threads=2)]
    one, two = results.digest(rows)
    assert (one["least"], one["median"], one["most"], one["shapes"]) == (2.0, 3.0, 8.0, 3)
    assert (two["threads"], two["median"]) == (2, 30.0)
    table = report.markdown(rows)
    assert "| reverse_step | ddpm | float32 | contiguous | diffusers | 3.0x (2.0 to 8.0) | 30.0x |" in table
    assert "apex" not in table  # a peer that was not measured has no figure


def test_slower_compares_ratios_of_the_same_case():
    before = [row(10.0), row(10.0, threads=2)]
    assert results.slower(before, [row(8.6), row(8.4, threads=2), row(1.0, shape=(9, 9))]) == [
        "reverse_step ddpm 1 3 8 8 float32 contiguous 2: 8.40x diffusers, was 10.00x"
    ]


def test_images_per_second_follow_from_the_time_of_one_step():
    step = row(2.0, shape=(8, 3, 32, 32), op="sample", case="cifar10 ddim", us=1e6)
    step["peers"] = {"diffusers": {"ratio": 2.0, "us": 2e6}, "reference": {"not_measured": "why"}}
    assert results.images_per_second(step, 10) == {"dd_kernels": 0.8, "diffusers": 0.4}
    assert "| cifar10 | DDIM, 20 steps | 8 | 1 | 0.4 |  | 0.2 |" in report.throughput([step, row(3.0)])
    assert report.throughput([row(3.0)]) == ""


def test_results_are_saved_by_device_and_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    (file,) = results.save([row(2.0)])
    assert file.name == "some_cpu_r.json"
    assert results.load(file) == json.loads(file.read_text()) == [row(2.0)]
    report.draw(results.load(file), file.with_suffix(".png"))
    assert file.with_suffix(".png").stat().st_size > 10_000


def test_measure_collects_the_records_of_a_run(monkeypatch):
    def fake(command, **_):
        target = next(part.split("=", 1)[1] for part in command if part.startswith("--benchmark-json="))
        runs = [{"extra_info": {"record": row(2.0)}}, {"extra_info": {}}]
        with open(target, "w") as file:
            json.dump({"benchmarks": runs}, file)

    monkeypatch.setattr(report.subprocess, "run", fake)
    assert report.measure([]) == [row(2.0)]


@pytest.mark.parametrize("text", ["begin", "end"])
def test_the_readme_has_both_marks(text):
    assert (report.ROOT / "README.md").read_text().count(f"<!-- benchmarks: {text} -->") == 1
