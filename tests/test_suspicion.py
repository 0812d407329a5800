"""Labels that were spoilt in known ways are found, by their kind, and sound ones are not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from autoseg.data.grid import Grid
from autoseg.data.labels import LabelMap
from autoseg.ensemble.suspicious import rows_to_csv, write_points
from autoseg.evaluation.suspicion import Contradiction, Part, Suspicion, contradictions, parts_of, ranked

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
    header, row, *rest = rows_to_csv([Suspicion(case="=1+1", contradiction=said, suspicion=0.25)]).splitlines()
    assert header == (
        "case,class,suspicion,kind,gain,partner,shift_mm,part,voxels,volume_ml,i,j,k,right_mm,front_mm,up_mm"
    )
    assert row == "'=1+1,'@node,0.25,swapped,0.5,'+liver,0.0,,,,,,,,,"
    assert rest == []


# -- where to look


def test_each_part_has_its_place_in_the_file_and_in_the_world() -> None:
    """Two extra nodes in a file whose first axis points left and whose voxels are 1 x 1 x 2 mm."""
    affine = np.diag([-1.0, 1.0, 2.0, 1.0])
    affine[:3, 3] = 100.0, -50.0, 7.0
    grid = Grid(shape=(40, 30, 20), affine=affine)
    label = np.zeros((40, 30, 20), np.uint8)
    label[10:15, 10:15, 10:15] = 4  # RAS; in the file the first axis runs the other way
    label[30:35, 20:23, 2:5] = 4
    said = Contradiction(name="node", kind="extra", gain=0.5)
    large, small = parts_of(said, np.zeros_like(label), label, ORGANS, grid)
    # The opening by a cross takes corners and edges off: what is left of 5 x 5 x 5 and 5 x 3 x 3 voxels.
    assert (large.voxels, small.voxels) == (81, 17)
    assert large.volume_ml == pytest.approx(81 * 2 / 1000)
    assert (large.seen, large.voxel) == ((12, 12, 12), (39 - 12, 12, 12))
    for part in (large, small):
        np.testing.assert_allclose(affine @ [*part.voxel, 1], [*part.center_mm, 1])
    assert parts_of(Contradiction(name="node", kind="missing", gain=0.5), label, label, ORGANS, grid) == []


def test_points_open_in_slicer_and_those_of_sound_cases_go(tmp_path: Path) -> None:
    part = Part(voxels=9, volume_ml=0.25, voxel=(1, 2, 3), seen=(1, 2, 3), center_mm=(10.5, -20.0, 30.25))
    said = Contradiction(name="liver", kind="missing", gain=0.5)
    write_points(tmp_path, [Suspicion(case="a", contradiction=said, suspicion=0.5, parts=(part, part))])
    (markup,) = json.loads((tmp_path / "a.mrk.json").read_text())["markups"]
    assert (markup["type"], markup["coordinateSystem"], markup["coordinateUnits"]) == ("Fiducial", "RAS", "mm")
    assert [point["position"] for point in markup["controlPoints"]] == [[10.5, -20.0, 30.25]] * 2
    assert {point["label"] for point in markup["controlPoints"]} == {"liver: missing"}
    write_points(tmp_path, [Suspicion(case="b", contradiction=said, suspicion=0.5, parts=(part,))])
    assert [path.name for path in tmp_path.iterdir()] == ["b.mrk.json"]
