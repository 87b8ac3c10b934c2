"""Tests which changes are found in a source, which tests run for a file, and what becomes of a change."""

import random

import pytest

from tools import mutate

SOURCE = '''
"""No change here: 1 < 2."""
def f(x: int = 3, *rest, ready: bool = True, name: tuple[int, 4] = ("é", 5)) -> "1 + 2":
    if x <= 1 < 2 or not ready and x is not None:
        return x // 2 * -1.5
    return [y for y in rest if y not in (x, )] + [name % 7]
'''


def changes(source):
    return [(one.line, one.old, one.new) for one in mutate.Finder("a.py", source).mutations()]


def test_comparisons_constants_operators_booleans_and_defaults_are_changed():
    assert changes(SOURCE) == [
        *((3, "3", "4"), (3, "True", "False"), (3, "5", "6")),
        *((4, "<=", "<"), (4, "1", "2"), (4, "<", "<="), (4, "2", "3"), (4, "or", "and")),
        *((4, "not ", ""), (4, "and", "or"), (4, "is not", "is")),
        *((5, "//", "/"), (5, "2", "3"), (5, "*", "/"), (5, "1.5", "2.5")),
        *((6, "not in", "in"), (6, "+", "-"), (6, "%", "*"), (6, "7", "8")),
    ]


def test_every_change_is_of_its_place_and_still_compiles():
    for one in mutate.Finder("a.py", SOURCE).mutations():
        changed = one.apply(SOURCE)
        compile(changed, "a.py", "exec")
        before, after = SOURCE.splitlines(), changed.splitlines()
        assert [i + 1 for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b] == [one.line]


def test_the_same_seed_chooses_the_same_changes():
    every = mutate.candidates("dd_kernels/samplers")
    assert len(every) > 100
    assert random.Random(3).sample(every, 5) == random.Random(3).sample(mutate.candidates("dd_kernels/samplers"), 5)


def test_a_file_has_the_tests_of_its_name_and_then_those_of_its_folder():
    (near, folder) = mutate.mirrors("dd_kernels/ops/randn/reference.py")
    assert "tests/ops/test_randn.py" in near
    assert folder == ["tests/ops"]
    (near, _) = mutate.mirrors("dd_kernels/integrations/diffusers/unet.py")
    assert "tests/integrations/test_unets.py" in near  # a test that serves several folders lies in the folder above
    assert mutate.mirrors("dd_kernels/schedules.py") == [["tests/test_schedules.py"]]
    assert mutate.mirrors("dd_kernels/nn/__init__.py") == [["tests/nn"]]


@pytest.fixture
def folder(tmp_path):
    """A repository of one function that has one test."""
    (tmp_path / "dd_kernels").mkdir()
    (tmp_path / "dd_kernels" / "__init__.py").touch()
    (tmp_path / "tests").mkdir()
    (tmp_path / "dd_kernels" / "adding.py").write_text("def add(a, b, c=0):\n    return a + b + c\n")
    (tmp_path / "tests" / "test_adding.py").write_text(
        "from dd_kernels.adding import add\ndef test_add(): assert add(1, 2) == 3\n"
    )
    return tmp_path


@pytest.mark.slow
def test_a_change_is_noticed_or_survives_and_is_undone(folder, capsys):
    file = folder / "dd_kernels" / "adding.py"
    source = file.read_text()
    default, plus, last = mutate.Finder("dd_kernels/adding.py", source).mutations()
    assert not mutate.survives(default, folder)
    assert not mutate.survives(plus, folder)
    assert mutate.survives(last, folder)
    assert file.read_text() == source
    lines = capsys.readouterr().out.splitlines()
    assert "dd_kernels/adding.py:1: '0' becomes '1'; noticed by FAILED tests/test_adding.py::test_add" in lines[0]
    assert "dd_kernels/adding.py:2: '+' becomes '-'; SURVIVED" in lines[2]
    assert lines[3] == "    return a + b + c"


@pytest.mark.slow
def test_the_tests_of_the_folder_run_unless_only_the_near_ones_are_wanted(folder):
    (folder / "dd_kernels" / "more").mkdir()
    (folder / "tests" / "more").mkdir()
    (folder / "dd_kernels" / "more" / "one.py").write_text("ONE = 1\n")
    (folder / "tests" / "more" / "test_one.py").write_text("def test_nothing(): pass\n")
    (folder / "tests" / "more" / "test_two.py").write_text(
        "from dd_kernels.more.one import ONE\ndef test_one(): assert ONE == 1\n"
    )
    (change,) = mutate.Finder("dd_kernels/more/one.py", "ONE = 1\n").mutations()
    assert mutate.survives(change, folder, near=True)
    assert not mutate.survives(change, folder)


@pytest.mark.slow
def test_a_change_that_runs_forever_is_noticed(folder, monkeypatch, capsys):
    (folder / "dd_kernels" / "adding.py").write_text("def add(a, b):\n    while a != 3: a += 1\n    return a\n")
    change = mutate.Finder("dd_kernels/adding.py", "def add(a, b):\n    while a != 3: a += 1\n").mutations()[1]
    monkeypatch.setattr(mutate, "_limit", lambda folder, tests: 2)
    assert not mutate.survives(change, folder)
    assert "'3' becomes '4'; noticed by FAILED" in capsys.readouterr().out
    downwards = mutate.Mutation("dd_kernels/adding.py", 2, change.offset, "3", "0")
    assert not mutate.survives(downwards, folder)
    assert "'3' becomes '0'; noticed by running for ever: over 2 s of the processor" in capsys.readouterr().out


def test_a_change_that_sleeps_forever_is_noticed(folder, monkeypatch):
    (folder / "tests" / "test_adding.py").write_text("import time\ndef test_add(): time.sleep(60)\n")
    run = mutate.subprocess.run
    soon = lambda *command, timeout, **options: run(*command, timeout=timeout / 100, **options)  # noqa: E731
    monkeypatch.setattr(mutate.subprocess, "run", soon)
    assert mutate._tested(folder, ["tests"], 1)[0] == "sleeping for ever"


def test_tests_that_fail_without_a_change_are_refused(folder):
    (folder / "tests" / "test_adding.py").write_text("def test_add(): assert 1 == 2\n")
    change = mutate.Finder("dd_kernels/adding.py", "def add(a, b, c=0): pass\n").mutations()[0]
    with pytest.raises(ValueError, match=r"tests/test_adding.py must pass before anything is changed; FAILED"):
        mutate.survives(change, folder)


@pytest.mark.slow
def test_the_command_line_lists_or_runs_in_a_copy(folder, monkeypatch, capsys):
    monkeypatch.setattr(mutate, "ROOT", folder)
    monkeypatch.setattr("sys.argv", ["mutate", "--count", "2", "--list"])
    assert mutate.main() == 0
    assert capsys.readouterr().out.count("becomes") == 2
    monkeypatch.setattr(mutate, "copy", lambda into: mutate.shutil.copytree(folder, into, dirs_exist_ok=True))
    monkeypatch.setattr("sys.argv", ["mutate", "--count", "9"])
    assert mutate.main() == 1
    out = capsys.readouterr().out
    assert "2 of 3 changes were noticed; these survived:" in out
    assert out.splitlines()[-1] == "dd_kernels/adding.py:2: '+' becomes '-'"
