"""Stored state is typed: a file that is cut off, edited, or of a newer autoseg is named in a sentence, never a bug."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from autoseg.cli.main import run_command
from autoseg.errors import WorkspaceError
from autoseg.workspace.layout import LAYOUT, check_readable, check_writable, layout_of, layout_path
from autoseg.workspace.stored import Stored, read_stored, read_stored_lines

FILES = (
    "segresnet_0/job.json",
    "segresnet_0/validation.json",
    "segresnet_0/metrics.jsonl",
    "ensemble/scores.json",
    "ensemble/ensemble.json",
    "state/analyze.json",
    "state/summary.json",
    "state/usage.jsonl",
    "state/commands.jsonl",
    "faults.json",
    "datastats.yaml",
    "settings.yaml",
)


def cut_off(text: str) -> bytes:
    return text[: len(text) // 2].encode()


def no_text(text: str) -> bytes:
    return b"\xff\xfe" + text.encode()[5:]


def with_an_unknown_key(text: str) -> bytes:
    return text.replace("{", '{"surprise": 1, ', 1).encode() if "{" in text[:3] else (text + "\nsurprise: 1\n").encode()


def another_type(text: str) -> bytes:
    return b"[1, 2, 3]\n"


def shuffled_figures(text: str) -> bytes:
    """Every figure replaced by text: what a hand may do."""
    chosen = random.Random(0)
    return "".join(chosen.choice("x9") if c.isdigit() else c for c in text).encode()


DAMAGES: tuple[Callable[[str], bytes], ...] = (cut_off, no_text, with_an_unknown_key, another_type, shuffled_figures)


@pytest.fixture(scope="module")
def copy_of_run(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damaged") / "run"
    shutil.copytree(finished_run, folder, copy_function=shutil.copy2)
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_no_bug(
    copy_of_run: Path, capsys: pytest.CaptureFixture[str], name: str, damage: Callable[[str], bytes]
) -> None:
    work_dir = copy_of_run / "work_dir"
    path = work_dir / name
    assert path.exists(), f"{name} is no file of a run any more: correct FILES"
    good = path.read_bytes()
    path.write_bytes(damage(good.decode()))
    try:
        codes = {words: run_command([words, "--work_dir", str(work_dir)]) for words in ("status",)}
        if damage is with_an_unknown_key:
            codes["report"] = run_command(["report", "--work_dir", str(work_dir)])
        shown = capsys.readouterr()
        assert set(codes.values()) <= {0, 2}, shown.err
        assert "Traceback" not in shown.err
        assert "bug" not in shown.err
    finally:
        path.write_bytes(good)


def test_an_unknown_key_of_a_job_says_where_and_what_to_do(
    copy_of_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy_of_run / "work_dir" / "segresnet_0" / "job.json"
    good = path.read_text()
    path.write_text(good.replace('"state"', '"stat": "done", "state"', 1))
    try:
        assert run_command(["train", "--input", str(copy_of_run / "input.yaml"), "--algo", "segresnet"]) == 2
    finally:
        path.write_text(good)
    said = capsys.readouterr().err
    assert f"{path}: unknown key stat (Did you mean state?)" in said
    assert "Undo the edit" in said


class Two(Stored):
    a: int
    b: str = ""


def test_the_reader_says_what_was_found_and_expected(tmp_path: Path) -> None:
    path = tmp_path / "two.json"
    for text, words in (
        ('{"a": "x"}', "a: found 'x', expected a valid integer"),
        ("{}", "a is missing"),
        ('{"a": 1, "bb": ""}', "unknown key bb (Did you mean b?)"),
        ('{"a": 1', "JSON"),
        ('{"a": 1, "version": "99.0.0"}', "newer"),
    ):
        path.write_text(text)
        with pytest.raises(WorkspaceError) as error:
            read_stored(path, Two)
        assert str(error.value).startswith(str(path))
        assert words in str(error.value), error.value
    path.write_text('{"a": 1, "b": "x"}')
    assert read_stored(path, Two) == Two(a=1, b="x")
    lines = tmp_path / "two.jsonl"
    lines.write_text('{"a": 1}\n{"a": 2}\n{"a": 3')
    assert [two.a for two in read_stored_lines(lines, Two)] == [1, 2]


@pytest.mark.parametrize("name", ["input.yaml", "datalist.json", "cache/mine.txt", "ensemble/mine.txt"])
def test_a_work_dir_of_others_is_not_written_over(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """`work_dir: .` wrote the run's datalist.json over the user's, and a run tidies its cache."""
    other = tmp_path / "other"
    (other / name).parent.mkdir(parents=True)
    (other / name).write_text("mine")
    assert run_command(["analyze", "--input", str(finished_run / "input.yaml"), "--work_dir", str(other)]) == 2
    said = capsys.readouterr().err
    assert f"{other}: holds no run, but {name.partition('/')[0]}, which a run would write over or tidy up." in said
    assert [path for path in other.rglob("*") if path.is_file()] == [other / name]
    assert (other / name).read_text() == "mine"


def test_a_work_dir_of_the_first_version_is_read_and_not_written(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished_run, tmp_path / "run", copy_function=shutil.copy2)
    work_dir = tmp_path / "run" / "work_dir"
    layout_path(work_dir).unlink()  # 0.1 had none
    assert layout_of(work_dir) == 1
    check_readable(work_dir)
    with pytest.raises(WorkspaceError):
        check_writable(work_dir)
    assert run_command(["status", "--work_dir", str(work_dir)]) == 0
    capsys.readouterr()
    before = {p: p.read_bytes() for p in work_dir.rglob("*.json")}
    assert run_command(["run", "--input", str(tmp_path / "run" / "input.yaml")]) == 2
    said = capsys.readouterr().err
    assert "0.1" in said
    assert "work_dir" in said
    assert before == {p: p.read_bytes() for p in work_dir.rglob("*.json")}
    layout_path(work_dir).write_text(json.dumps({"layout": LAYOUT + 1, "version": "9.9"}))
    assert run_command(["status", "--work_dir", str(work_dir)]) == 2
    assert "9.9" in capsys.readouterr().err
