"""Cases that belong together by their names: what is recognised, and what `init` and the analysis do about it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from analysis_data import DataSet, make_image, make_label, save

from autoseg.cli.init import init_data_folder
from autoseg.data.datalists.datalist import read_datalist
from autoseg.data.datalists.groups import likely_groups

ACDC = [f"patient{p:03d}_frame{f:02d}" for p in range(1, 9) for f in (1, 7 + p)]


@pytest.mark.parametrize(
    ("names", "kind", "group"),
    [
        (ACDC, "frames", "patient001"),
        (["vnc_r0c0", "vnc_r0c2", "vnc_r1c0"], "tiles", "vnc"),
        (["em_x0_y1", "em_x1_y1"], "tiles", "em"),
        (["liver_tile1", "liver_tile2"], "tiles", "liver"),
        (["harvard_HarvardSTA22_Study1", "harvard_HarvardSTA24_Study1"], "weeks", "harvard_Harvard_Study1"),
        (["SB_GA22_op", "SB_GA24_op"], "weeks", "SB_op"),
        (["sub-01_ses-01_run-1", "sub-01_ses-02_run-1", "sub-01_ses-02_run-2"], "visits", "sub-01"),
        ([f"p{i}_{s}" for i in range(5) for s in ("ED", "ES")], "scans", "p0"),
        ([f"OAS3{i:04d}_MR_d{d}" for i in range(5) for d in (12, 340)], "scans", "OAS30000_MR"),
        ([f"{i:03d}_{k}" for i in range(5) for k in (1, 2)], "scans", "000"),
        ([f"BraTS-GLI-{i:05d}-{k:03d}" for i in range(5) for k in (0, 1)], "scans", "BraTS-GLI-00000"),
    ],
)
def test_parts_of_one_thing(names: list[str], kind: str, group: str) -> None:
    found = likely_groups(names)
    assert found.kind == kind
    assert found.of[names[0]] == found.of[names[1]] == group
    assert len(found.of) == len(names)


@pytest.mark.parametrize("name", ["ä", "患者", "-", "?!", "", "é é"])
def test_names_without_a_word_in_latin_letters_are_names(name: str) -> None:
    assert not likely_groups([name, f"{name}b", "case_1"]).of


@pytest.mark.parametrize(
    "names",
    [
        ["case_001", "case_002", "case_010"],
        [f"FLARE22_Tr_{i:04d}" for i in range(20)],
        [f"BraTS{y}_{i:02d}" for y in (19, 20) for i in range(15)],  # years, not patients
        [f"site{s}_scan{i:02d}" for s in range(3) for i in range(20)],
        [f"IXI{i:03d}-Guys-{700 + 7 * i:04d}" for i in range(12)],
        [f"scan_{i}" for i in range(9)],
        ["frame01", "frame02"],  # of what?
        [f"brats_2013_pat{i:04d}_1" for i in range(9)],
        [f"case{i}_t1" for i in range(9)],
        [f"A{i}S9V9" for i in range(9)],
        [],
    ],
)
def test_numbers_of_their_own_are_no_parts(names: list[str]) -> None:
    found = likely_groups(names)
    assert found.of == {}
    assert found.num_units(names) == len(names)


def write(root: Path, names: list[str]) -> Path:
    for i, name in enumerate(names):
        save(root / "images" / f"{name}.nii.gz", make_image(i))
        save(root / "labels" / f"{name}.nii.gz", make_label())
    return root


def test_init_keeps_frames_of_a_patient_in_one_fold(tmp_path: Path) -> None:
    data = write(tmp_path / "data", ACDC)
    result = init_data_folder(data, tmp_path / "out")
    assert any(
        "16 cases look like frames of 8 patients or objects, such as patient001_frame01" in n for n in result.notes
    )
    listed = read_datalist(result.datalist, data).training
    folds: dict[str | None, set[int | None]] = {}
    for case in listed:
        folds.setdefault(case.group, set()).add(case.fold)
    assert len(folds) == 8
    assert all(len(own) == 1 for own in folds.values())
    assert set.union(*folds.values()) == {0, 1, 2, 3, 4}


def test_few_patients_make_fewer_folds(tmp_path: Path) -> None:
    result = init_data_folder(write(tmp_path / "data", ACDC[:6]), tmp_path / "out")
    assert result.num_fold == 3


def test_one_stack_cannot_be_kept_whole(tmp_path: Path) -> None:
    result = init_data_folder(write(tmp_path / "data", [f"vnc_r{i}c0" for i in range(5)]), tmp_path / "out")
    assert any("the 5 cases look like tiles of one object" in note for note in result.notes)
    assert "group" not in result.datalist.read_text()


def test_a_lists_own_folds_and_groups_are_left_alone(tmp_path: Path) -> None:
    data = write(tmp_path / "data", ACDC[:4])
    items = [{"image": f"images/{n}.nii.gz", "label": f"labels/{n}.nii.gz"} for n in ACDC[:4]]
    for key, values in (("fold", [0, 1, 0, 1]), ("group", ["a", "b", "c", "d"])):
        (data / "datalist.json").write_text(
            json.dumps({"training": [i | {key: v} for i, v in zip(items, values, strict=True)]})
        )
        result = init_data_folder(data, tmp_path / key, num_fold=2)
        assert not any("look like" in note for note in result.notes)
        assert [i[key] for i in json.loads(result.datalist.read_text())["training"]] == values


def test_the_analysis_warns_of_frames_that_are_split(tmp_path: Path) -> None:
    data = DataSet(root=tmp_path)
    data.cases = [replace(case, name=name) for case, name in zip(data.cases, ACDC, strict=False)]
    found = [str(w) for w in data.analyze().warnings if w.kind == "patient"]
    assert found == [
        "data set: 6 cases look like frames of 3 patients or objects, and are split, such as patient001_frame01 in "
        "fold 0 and patient001_frame08 in fold 1. If they are, scores are too good. Give each case its `group` in the "
        "datalist, and no `fold`, to have folds made that keep groups whole; `autoseg init` writes such a list."
    ]
    data.cases = [replace(case, group=f"patient {i}") for i, case in enumerate(data.cases)]
    assert not [w for w in data.analyze().warnings if w.kind == "patient"]
