"""Tests that README and pages show the figures of benchmarks/results, and how a report runs its parts."""

import json
import types

import PIL.Image
import pytest

from benchmarks import parts, render, report, results, tables


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
        "how": "clock",
        "us": 10.0,
        "ns_per_element": 1.0,
        "bytes": 1000,
        "gb_per_s": 0.1,
        "percent_of_copy": 50.0,
        "percent_of_bandwidth": 40.0,
        "peers": {"diffusers": {"ratio": ratio, "ratio_q1": 1.0, "ratio_q3": 9.0, "us": 10.0 * ratio, "how": "clock"}}
        | {"apex": {"not_measured": "apex is not installed"}},
        **changes,
    }


def step(seconds, batch=8, name="cifar10 ddim", **changes):
    one = row(2.0, shape=(batch, 3, 32, 32), op="sample", case=name, us=seconds * 1e6, **changes)
    one["peers"]["diffusers"] = {"ratio": 2.0, "ratio_q1": 2, "ratio_q3": 2, "us": 2e6 * seconds, "how": "clock"}
    return one


def point(axis, value):
    floors = {"flops": 1e9, "floor_bytes_us": 2.0, "floor_flops_us": 5.0, "sizes": {"steps": 1, "batch": 2}}
    return row(2.0, op="growth", case=axis, value=value, us=10.0 * value, **floors)


def full():
    share = {"share": {"group_norm_silu": 0.25, "sampler": 0.05, "rest": 0.7}, "launches": 170, "peak_bytes": 5e6}
    rows = {
        "ops": [row(2.0), row(8.0, shape=(2, 3, 8, 8)), row(3.0, shape=(4, 3, 8, 8)), row(30.0, threads=2)],
        "end_to_end": [step(1.0, breakdown={"dd_kernels": share}), step(5.0, 16), step(0.5, name="cifar10 ddpm")],
        "training": [row(2.0, op="training", case="digits", memory={"dd_kernels": {"saved_bytes": 3e6}})],
        "growth": [point(axis, value) for axis in render.UNITS for value in (1, 2, 4)],
    }
    rows["end_to_end"].append(step(2.0, steps=10))
    stamp = {"date": "2026-01-01 00:00 UTC", "commit": "abc", "seconds": 3.0}
    found = {name: {**stamp, "rows": some, "not_measured": []} for name, some in rows.items()}
    check = {"check": "compute-sanitizer memcheck", "outcome": "ok", "seconds": 4.0, "errors": 0, "ops": 4}
    found["sanitizer"] = {**stamp, "rows": [], "not_measured": [{"name": "x", "reason": "y"}], "checks": [check]}
    return {"machine": {"device": "Some CPU (R)", "torch": "2.13.0", "isa": "avx2", "triton": "3.6"}, "parts": found}


def test_the_readmes_tables_are_those_of_the_committed_results():
    text = (render.ROOT / "README.md").read_text()
    assert text == render.with_sections(text)
    assert "times** as fast as diffusers'" in render.readme_section("headline")


def test_every_committed_result_has_its_page_and_plots_of_the_same_figures():
    files = sorted(results.FOLDER.glob("*.json"))
    assert files
    for file in files:
        found = results.load(file)
        assert {results.file_of(r["device"]) for r in results.rows(found)} == {file}
        assert file.with_suffix(".md").read_text() == render.document(found)
        for suffix in render.drawn(found):
            with PIL.Image.open(file.with_name(f"{file.stem}{suffix}.png")) as picture:
                assert picture.text[render.SOURCE] == results.digest_of(found), f"{file.stem}{suffix}.png"


def test_digest_is_the_median_and_range_over_the_shapes():
    rows = results.rows(full(), "ops")
    one, two = results.digest(rows)
    assert (one["least"], one["median"], one["most"], one["shapes"]) == (2.0, 3.0, 8.0, 3)
    assert (two["threads"], two["median"]) == (2, 30.0)
    table = tables.ops_table(rows)
    assert "| reverse_step | ddpm | float32 | contiguous | diffusers | 3.0x (2.0 to 8.0) | 30.0x |" in table
    assert "apex" not in table  # a peer that was not measured has no figure
    assert "| GPU |" in tables.ops_table([row(2.0, threads=None)])


@pytest.mark.parametrize(("threads", "title"), [((1, 2), "Some CPU (R), 2 threads:"), ((None,), "Some CPU (R):")])
def test_the_picture_of_the_ops_shows_every_peer_on_the_most_threads(threads, title):
    rows = [row(3.0, threads=n, case=case) for n in threads for case in ("ddpm", "ddim")]
    rows[-1]["peers"]["reference"] = {"ratio": 50.0}
    figure = render.draw_ratios({"machine": full()["machine"], "parts": {"ops": {"rows": rows}}})
    assert figure.get_suptitle().startswith(title)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["diffusers"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["ddpm, fp32", "ddim, fp32"]


def test_slower_compares_ratios_of_the_same_case():
    before = [row(10.0), row(10.0, threads=2)]
    assert results.slower(before, [row(8.6), row(8.4, threads=2), row(1.0, shape=(9, 9))]) == [
        "reverse_step ddpm 1 3 8 8 float32 contiguous 2: 8.40x diffusers, was 10.00x"
    ]
    grown = [point("batch", 1), point("batch", 2)]
    lower = [point("batch", 1), {**point("batch", 2), "peers": {"diffusers": {"ratio": 1.0}}}]
    assert [line.split(":")[0] for line in results.slower(grown, lower)] == [
        "growth batch 2 1 3 8 8 float32 contiguous 1"
    ]


def test_images_per_second_follow_from_the_time_of_one_step_and_from_a_whole_run():
    assert results.images_per_second(step(1.0), 10) == {"dd_kernels": 0.8, "diffusers": 0.4}
    assert results.images_per_second(step(2.0, steps=10), 10) == {"dd_kernels": 4.0, "diffusers": 2.0}
    text = tables.throughput(results.rows(full()), every=True)
    assert "| cifar10 | DDIM-20, extrapolated | 8 | float32 | 0.400 | 0.200 (2.00x) |" in text
    assert "| cifar10 | DDIM-10, whole run, measured | 8 | float32 | 4.00 | 2.00 (2.00x) |" in text
    assert "DDIM-20" not in tables.throughput(results.rows(full()), every=False)
    assert tables.throughput([row(3.0)], every=True) == ""


def model_row():
    peers = {
        "ours": {"us": 5e4, "ratio": 0.5, "ratio_q1": 0.4, "ratio_q3": 0.8, "how": "clock"},
        "OpenVINO": {"not_measured": "ImportError: none"},
    }
    errors = {"diffusers": 1e-6, "ours": 2e-6}
    kinds = {"diffusers": {"convolutions": 0.75, "rest": 0.25}, "ours": {"convolutions": 1.0}}
    peak = {"gflop_per_s": 400.0, "how": "multiply-adds on registers"}
    more = {"errors": errors, "kinds": kinds, "flops": 2e10, "peak": peak, "rounds": 11}
    return row(1.0, op="model", case="cifar10", shape=(16, 3, 32, 32), us=1e5, **more) | {"peers": peers}


def test_a_whole_model_is_compared_with_diffusers_eager():
    text = tables.models([row(2.0), model_row()])
    assert "| diffusers | 100 | 160 | 1 | 1.0e-06 | 200 | 50.0 | 75% | 25% |" in text
    assert "| ours | 50.0 | 320 | 2.00 (1.25 to 2.50) | 2.0e-06 | 400 | 100 | 100% |  |" in text
    assert "Not measured: OpenVINO: ImportError: none." in text
    assert "paired ratios of 11 interleaved rounds" in text
    assert results.ratios(model_row()) == {"ours": 2.0}
    assert tables.models([row(2.0)]) == ""


@pytest.mark.parametrize(("ratios", "times"), [((1.31, 1.34), "1.3"), ((1.3, 2.04), "1.3 to 2.0")])
def test_the_first_numbers_are_a_range_where_its_ends_differ(monkeypatch, ratios, times):
    line = {"op": "group_norm_silu", "peer": "eager", "case": "forward", "dtype": "float32", "layout": "contiguous"}
    monkeypatch.setattr(results, "digest_of_peers", lambda rows: [{**line, "median": ratio} for ratio in ratios])
    assert tables.first_numbers([]) == (
        f"- GroupNorm+SiLU forward: **{times} times** as fast as eager PyTorch's, float32 on a CPU."
    )


def test_the_headline_compares_at_our_best_batch_by_paired_ratios_and_cites_the_paper():
    rows = results.rows(full())
    rows[-1]["peers"]["elsewhere"] = {"us": 1.0, "ratio": 9.0}  # a peer of another row has no figure in this one
    rows.append(step(9.0, 64))
    rows[-1]["peers"] = {"reference": {"us": 1.0, "ratio": 9.0}}
    # The paired ratio is not the quotient of the medians.
    next(r for r in rows if r["op"] == "sample")["peers"]["diffusers"]["ratio"] = 1.75
    text = tables.headline(rows)
    assert "| sampler | batch | dtype | dd_kernels | diffusers | reference |" in text
    assert "| DDIM, 10 steps | 8 | float32 | 17.4 h | 34.7 h (1.75x) |  |" in text
    assert "| DDPM, 1000 steps | 8 | float32 | 868 h | 1,736 h (2.00x) |  |" in text
    assert "the median of paired ratios of interleaved runs, both at the row's batch and dtype" in text
    assert "20 hours" in text
    assert "Song" in text
    assert tables.headline([row(1.0)]) == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3.21, "3.21 s"), (90, "1.50 min"), (72_000, "20.0 h"), (0.5, "0.500 s"), (0.00612, "0.00612 s")],
)
def test_durations(seconds, text):
    assert tables.duration(seconds) == text


def test_the_page_of_a_device_says_everything():
    text = render.document(full())
    for words in (
        "compute-sanitizer memcheck: ok; 4 s; 0 errors, 4 groups of ops",
        "| cifar10 ddim | 8 | float32 | dd_kernels | 170 | 25.0% | 5.0% | 70.0% | 5.00 |",
        "| digits | 1 | float32 | dd_kernels | 100,000 | 3.00 |  |",
        "| batch | 2 | 1.00 | 0.00200 | 0.00500 | 0.0200 | 0.0200 (2.00x) |",
        "- sanitizer, y (1): x",
        "triton 3.6",
        "apex: not measured (apex is not installed)",
    ):
        assert words in text
    render.document({"machine": full()["machine"], "parts": {}})


def test_results_are_saved_by_device_and_drawn(tmp_path):
    file = results.save(full(), tmp_path)
    assert file.name == "some_cpu_r.json"
    assert results.load(file) == json.loads(file.read_text()) == full()
    assert render.everything(tmp_path) == []
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == ["some_cpu_r.png", "some_cpu_r_growth.png", "some_cpu_r_throughput.png"]
    assert all((tmp_path / name).stat().st_size > 10_000 for name in pictures)


def test_what_cannot_be_drawn_is_said_and_the_rest_is_drawn(tmp_path, monkeypatch):
    results.save(full(), tmp_path)
    (tmp_path / "broken.json").write_text("{")
    monkeypatch.setitem(render.PLOTS, "_growth", ("growth", lambda found: 1 / 0, "growth"))
    problems = render.everything(tmp_path)
    assert len(problems) == 2
    assert "division by zero" in problems[1]
    assert (tmp_path / "some_cpu_r_throughput.png").exists()
    assert (tmp_path / "some_cpu_r.md").exists()


@pytest.mark.parametrize("text", ["begin", "end"])
def test_the_readme_has_both_marks(text):
    assert (render.ROOT / "README.md").read_text().count(f"<!-- benchmarks: {text} -->") == 1


def test_time_that_is_left_or_overdrawn_is_shared_by_the_rest():
    share = parts.Share(100.0, {"ops": 50, "growth": 25, "training": 25})
    assert share.take("ops") == 50
    share.used("ops", 20.0)
    assert share.take("growth") == 40
    share.used("growth", 70.0)
    assert share.take("training") == 10
    share.used("training", 15.0)
    share.weights["shapes"] = 1
    assert share.take("shapes") == 0
    # A build may take half of the time, which is more than its share.
    assert parts.Share(100.0, {"build": 20, "ops": 80}).take("build") == 50
    assert parts.Share(100.0, {"build": 20}).take("build") == 100


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Returns report.run with measuring replaced, on a made-up machine."""
    monkeypatch.setattr(report, "described", lambda: {"device": "Some CPU (R)", "torch": "2.13.0", "isa": "avx2"})
    seen = []

    def measure(name, seconds, folder, stream):
        seen.append((name, stream))
        if name == "growth":
            raise RuntimeError("a part that breaks")
        return {"rows": [row(2.0)], "not_measured": []}

    monkeypatch.setattr(parts, "measure_part", measure)
    return types.SimpleNamespace(seen=seen, folder=tmp_path, run=lambda *names: report.run(names, 60, tmp_path))


def test_results_are_written_after_every_part_and_a_part_that_breaks_stops_nothing(run, monkeypatch):
    written = []
    save = results.save
    monkeypatch.setattr(
        results, "save", lambda found, folder: written.append(list(found["parts"])) or save(found, folder)
    )
    found = run.run("ops", "growth", "training")
    assert written == [["ops"], ["ops", "growth"], ["ops", "growth", "training"]]
    reason = "RuntimeError: a part that breaks"
    assert found["parts"]["growth"]["not_measured"] == [{"name": "growth", "reason": reason}]
    assert results.load(run.folder / "some_cpu_r.json")["parts"]["training"]["rows"] == [row(2.0)]
    again = run.run("ops")
    assert list(again["parts"]) == ["ops", "growth", "training"]


def test_a_file_that_cannot_be_read_is_replaced(run):
    (run.folder / "some_cpu_r.json").write_text("[")
    assert list(run.run("ops")["parts"]) == ["ops"]


def test_the_command_line(run, monkeypatch, capsys):
    monkeypatch.setattr(results, "FOLDER", run.folder / "committed")
    results.save({"machine": full()["machine"], "parts": {"ops": {"rows": [row(9.0)]}}})
    monkeypatch.setattr("sys.argv", ["report", "--parts", "ops", "--budget", "10", "--results", str(run.folder)])
    assert report.main() == 0
    assert "reverse_step ddpm 1 3 8 8 float32 contiguous 1: 2.00x diffusers, was 9.00x" in capsys.readouterr().out
    assert (run.folder / "some_cpu_r.md").exists()
    for bad in (["--parts", "nothing"], ["--budget", "0"]):
        monkeypatch.setattr("sys.argv", ["report", *bad])
        with pytest.raises(SystemExit):
            report.main()
        assert bad[0] in capsys.readouterr().err


def test_a_failed_check_is_the_exit_status(run, monkeypatch, capsys):
    bad = {"check": "compute-sanitizer memcheck", "outcome": "exit status 9", "errors": 2, "ops": 4, "tail": ["where"]}
    ahead = {"check": "compiled ahead", "outcome": "in part: stopped after 9 s", "seconds": 9.0, "plans": 7}

    def checked(seconds, folder):
        (folder / "tests.log").write_text("what pytest said")
        return [bad, ahead]

    monkeypatch.setattr(report, "side_by_side", checked)
    monkeypatch.setattr("sys.argv", ["report", "--parts", "checks", "--results", str(run.folder)])
    assert report.main() == 1
    out = capsys.readouterr().out
    assert "    where" in out
    assert "compiled ahead: in part: stopped after 9 s; 9 s; 7 plans" in out
    assert (run.folder / "some_cpu_r.tests.log").read_text() == "what pytest said"
