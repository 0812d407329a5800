"""Labels that were spoilt in known ways are found, by their kind, and sound ones are not."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from autoseg.data.labels import LabelMap
from autoseg.ensemble.suspicious import rows_to_csv
from autoseg.evaluation.suspicion import Contradiction, Suspicion, contradictions, ranked

ORGANS = LabelMap(names=("left lung", "right lung", "liver", "node"), values=((1,), (2,), (3,), (4,)))
MM = (1.0, 1.0, 2.0)
NUM = 40


def patient(rng: np.random.Generator) -> np.ndarray:
    """Two lungs, a liver on one side, a node."""
    label = np.zeros((40, 30, 20), np.uint8)
    x, y = rng.integers(0, 3, 2)
    label[4 + x : 14 + x, 6 + y : 18 + y, 8:16] = 1
    label[24 + x : 34 + x, 6 + y : 18 + y, 8:16] = 2
    label[20 + x : 36 + x, 8 + y : 16 + y, 1:6] = 3
    label[16 + x : 19 + x, 20 + y : 23 + y, 9:12] = 4
    return label


def predicted(label: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The label as a model would have it, with other boundaries."""
    chances = [gaussian_filter((label == v).astype(float), 0.8) for v in range(5)]
    noise = [0.12 * gaussian_filter(rng.standard_normal(label.shape), 1.0) * 3 for _ in chances]
    return np.argmax(np.add(chances, noise), axis=0).astype(np.uint8)


def spoilt(label: np.ndarray, way: str) -> np.ndarray:
    wrong = label.copy()
    if way == "missing":
        wrong[label == 3] = 0
    elif way == "extra":
        wrong[2:9, 22:29, 2:9] = 3
    elif way == "swapped":
        wrong[label == 3], wrong[label == 1] = 1, 3
    elif way == "left and right":
        wrong[label == 1], wrong[label == 2] = 2, 1
    elif way == "shifted":
        wrong = np.roll(label, 6, axis=1)
    return wrong


def test_spoilt_labels_come_first_with_their_kinds() -> None:
    rng = np.random.default_rng(0)
    ways = ("missing", "extra", "swapped", "left and right", "shifted")
    found = {}
    for i in range(NUM):
        label = patient(rng)
        pred = predicted(label, rng)
        if i < len(ways):
            label = spoilt(label, ways[i])
        found[f"case_{i}"] = contradictions(pred, label, ORGANS, MM)
    rows = ranked(found)
    first = {row.case: row.contradiction for row in reversed(rows)}
    assert set(first) >= {f"case_{i}" for i in range(len(ways))}
    assert [first[f"case_{i}"].kind for i in range(len(ways))] == [*ways]
    assert (first["case_0"].name, first["case_1"].name) == ("liver", "liver")
    assert {first["case_2"].name, first["case_2"].partner} == {"left lung", "liver"}
    assert {first["case_3"].name, first["case_3"].partner} == {"left lung", "right lung"}
    assert first["case_4"].shift_mm == pytest.approx(6, abs=1)
    worst_sound = max((row.suspicion for row in rows if int(row.case.rpartition("_")[2]) >= len(ways)), default=0)
    best = {row.case: row.suspicion for row in reversed(rows)}
    assert all(best[f"case_{i}"] > worst_sound for i in range(len(ways)))


def test_a_mirrored_label_is_told_from_a_shifted_one() -> None:
    label = np.zeros((24, 12, 12), np.uint8)
    label[4:16, 4:8, 4:8], label[4:8, 4:8, 8:11] = 3, 3  # an L, which has a side
    kinds = {c.kind: c.gain for c in contradictions(label[::-1], label, ORGANS, MM)}
    assert kinds["mirrored"] > 0.1
    assert kinds["mirrored"] > kinds.get("swapped", 0)
    moved = {c.kind: c.gain for c in contradictions(np.roll(label, 5, axis=0), label, ORGANS, MM)}
    assert moved["shifted"] > 0.5 > moved["mirrored"]


def test_what_does_not_count_is_not_judged() -> None:
    label, pred = np.zeros((10, 10, 10), np.uint8), np.zeros((10, 10, 10), np.uint8)
    pred[2:8, 2:8, 2:8] = 3
    assert contradictions(pred, label, ORGANS, MM, annotated=["node"]) == []
    ignoring = LabelMap(names=("a",), values=((3,),), ignore_label=255)
    assert contradictions(pred, np.where(pred, 255, 0).astype(np.uint8), ignoring, MM) == []
    (missing, extra) = contradictions(pred, label, ignoring, MM)
    assert (missing.kind, missing.gain, extra.gain) == ("missing", 1.0, 0.0)
    assert ranked({}) == []


def test_names_are_no_formulas_in_a_spreadsheet() -> None:
    said = Contradiction(name="@node", kind="swapped", gain=0.5, partner="+liver")
    text = rows_to_csv([Suspicion(case="=1+1", contradiction=said, suspicion=0.25)])
    assert text == "case,class,suspicion,kind,gain,partner,shift_mm\n'=1+1,'@node,0.25,swapped,0.5,'+liver,0.0\n"
