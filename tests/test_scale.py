"""docs/scale.md says what benchmarks/scale.py computes, for the networks that a run trains."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_the_page_says_what_the_simulation_computes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    scale = importlib.import_module("scale")
    page = (ROOT / "docs" / "scale.md").read_text()
    assert f"| {scale.READ_S_PER_MVOXEL}; {scale.PREPARE_S_PER_MVOXEL} core seconds" in page
    for data in scale.DATA_SETS:
        scale.report(data)
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines() if re.match(r" +(8|64) +[14] ", line)]
    assert len(rows) == 6
    # The page leaves out the column before the last: GB a second from the server.
    wanted = [[*row[:7], *row[8:]] for row in rows]
    assert [line.split() for line in page.splitlines() if re.match(r" +(8|64) +[14] ", line)] == wanted
    for hours in re.findall(r"(\d+) h on one A40|together ([\d,]+) GPU hours", printed):
        number = hours[1] or f"{int(hours[0]):,}"
        assert f"{number} h" in page or f"{number} GPU hours" in page, number
