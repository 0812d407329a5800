"""Cases that belong together by their names: what is recognised, and what `init` and the analysis do about it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from analysis_data import DataSet, make_image, make_label, save

from autoseg.cli.init import init_data_folder
from autoseg.data.datalists.datalist import read_datalist
from autoseg.data.datalists.groups import are_patients, likely_groups
from autoseg.data.formats.table import stem_of

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
ACDC = [f"patient{p:03d}_frame{f:02d}" for p in range(1, 9) for f in (1, 7 + p)]


def each(patients: Iterable[object], *ends: str) -> list[str]:
    """Every patient with every ending."""
    return [f"{patient}{end}" for patient in patients for end in ends]


def numbered(start: str, num: int, digits: int = 1) -> list[str]:
    return [f"{start}{i:0{digits}d}" for i in range(1, num + 1)]


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
        # BIDS: everything of a subject is its own, and a session may be called by a word.
        (each(numbered("sub-", 2, 2), "_ses-M00", "_ses-M12"), "visits", "sub-01"),
        (each(numbered("sub-", 2, 2), "_ses-A_T1w", "_ses-B_T1w"), "visits", "sub-01"),
        (each(numbered("sub-", 2, 2), "_ses-pre_T1w", "_ses-post_T1w"), "visits", "sub-01"),
        (each(numbered("sub-", 2, 2), "_T1w", "_run-2_T1w"), "scans", "sub-01"),
        (each(numbered("", 2, 2), "_ses-pre", "_ses-M3"), "visits", "01"),
        (each(numbered("sub-pre", 2), "_acq-A", "_acq-B"), "scans", "sub-pre1"),
        # A patient's word: few patients do, and what follows may be anything.
        (each(numbered("patient", 3), "_A", "_B"), "scans", "patient1"),
        (each(numbered("patient", 3), "_t1", "_t2", "_t3"), "scans", "patient1"),
        (each(numbered("patient", 4), "_1", "_2", "_3"), "scans", "patient1"),
        (each(numbered("pat", 2), "_L", "_R"), "scans", "pat1"),
        (each(numbered("patient", 2), "", "_followup"), "scans", "patient1"),
        (each(numbered("site1_patient", 2), "_a", "_b"), "scans", "site1_patient1"),
        (each(numbered("P", 2), "_2019-01-11", "_2019-06-11", "_2019-06-23"), "scans", "P1"),
        (["t1_p1", "t2_p1", "t1_p2", "t2_p2"], "scans", "p1"),
        # Other words: few patients do, where each has few cases.
        (each(numbered("knee_", 2, 3), "_L", "_R"), "scans", "knee_001"),
        (each(numbered("", 3, 2), "_pre", "_post"), "scans", "01"),
        (["pre01", "post01", "pre02", "post02"], "scans", "01"),
        (each(numbered("", 2, 2), "_post1", "_post2"), "scans", "01"),
        (each(numbered("MR_", 3), "_left", "_right"), "scans", "MR_1"),
        (each(numbered("OAS2_", 3, 4), "_MR1", "_MR2"), "scans", "OAS2_0001"),
        (each(numbered("", 2, 3), "_2019-01-11", "_20190611", "_11.02.2020"), "scans", "001"),
        (["fdg_0011f3deaf_03-23-2003", "fdg_0011f3deaf_03-28-2003"], "scans", "fdg_0011f3deaf"),
        (each(numbered("vol", 2), "", "_0064", "_0128"), "scans", "vol1"),
        (each(numbered("ID_", 2, 3), "_Z_0064", "_Z_0142"), "scans", "ID_001"),
        (each(numbered("em_", 2, 3), "_Z_0064", "_Z_0142"), "scans", "em_001"),
        # Bare numbers and letters: five patients, and the same again of each.
        (each(numbered("", 5, 3), "a", "b"), "scans", "001"),
        (each(numbered("UPENN-GBM-", 5, 5), "_11", "_21"), "scans", "UPENN-GBM-00001"),
        (each(numbered("ISLES_", 5, 4), "_24", "_48"), "scans", "ISLES_0001"),
        (each(numbered("", 5, 3), "_1_ct", "_2_ct"), "scans", "001"),
        (each(numbered("", 5, 3), "_1_image", "_2_img"), "scans", "001"),
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
        # The numbering of public sets: MSD, BTCV, KiTS, AMOS, TotalSegmentator, LiTS, CHAOS, MM-WHS, MosMed.
        *(numbered(start, 200, 4) for start in ("case_", "case_0", "img", "s", "amos_", "word_", "Case")),
        *(numbered(start, 50, 3) for start in ("hippocampus_", "BRATS_", "la_", "BraTS20_Training_", "LUNG1-")),
        *(numbered(start, 50) for start in ("liver_", "spleen_", "volume-", "study_", "volume-covid19-A-")),
        each(("CT", "MR"), *numbered("_", 20)),
        each(("ct_train_1", "mr_train_1"), *numbered("", 20, 3)),
        # Sites, shares of a data set and years are no patients.
        each(numbered("site", 8, 2), *numbered("_", 5, 2)),
        each(numbered("center", 6), *numbered("_scan", 3)),
        each(numbered("Hospital_", 6), "_ED", "_ES"),
        each(("siteA", "siteB", "siteC", "siteD", "siteE"), "1_01", "1_02"),
        each(numbered("scanner", 6), "_frame1", "_frame2"),
        each(numbered("Task", 9, 2), *numbered("_", 4, 2)),
        each(range(2014, 2021), *numbered("_", 4, 3)),
        numbered("p1_", 20) + numbered("p2_", 20),  # parts of the data
        # A second number that runs on is the patient's, after that of a site: TCGA, ADNI.
        [f"TCGA-{s:02d}-{37 * s + k:04d}" for s in range(2, 12) for k in range(3)],
        [f"{s:03d}_S_{37 * s + k:04d}" for s in range(2, 12) for k in range(3)],
        # Days alone.
        ["2019-01-03", "2019-01-05", "2019-01-09", "2019-02-01", "2019-02-03"],
        ["scan_2019-01-03", "scan_2019-01-05", "20190111_1", "20190111_2", "patient_2019-01-03", "patient_2019-01-05"],
        # Letters of digests, and of modalities.
        ["00ed12", "00ed34", "00es12", "c3l", "d4l"],
        [f"{i:03d}_T1w" for i in range(9)],
        [],
    ],
)
def test_numbers_of_their_own_are_no_parts(names: list[str]) -> None:
    found = likely_groups(names)
    assert found.of == {}
    assert found.num_units(names) == len(names)


@pytest.mark.parametrize(
    ("folder", "num", "groups"),
    [("acdc", 60, 30), ("em_vnc", 8, 1), ("fetal_brain", 16, 3)]
    + [(name, 0, 0) for name in ("hippocampus", "brats2015_mini", "mouse_brain", "prostate_mr_small", "prostate_trus")],
)
@pytest.mark.skipif(not DATA.exists(), reason="the real data lie beside the checkout only where it is developed")
def test_the_real_sets(folder: str, num: int, groups: int) -> None:
    found = likely_groups([stem_of(path) for path in sorted((DATA / folder / "imagesTr").iterdir())])
    assert (len(found.of), len(found.members)) == (num, groups)


@pytest.mark.parametrize(
    ("names", "pair"),
    [
        (each(numbered("", 3, 3), "_1", "_2"), ("001_1", "001_2")),
        (each(numbered("", 3, 3), "a", "b"), ("001a", "001b")),
        (each(("BraTS19", "BraTS20"), *numbered("_", 15)), ()),
        (numbered("BraTS20_Training_", 4, 3), ()),
        (numbered("case_", 9, 3), ()),
    ],
)
def test_few_bare_numbers_are_not_sure(names: list[str], pair: tuple[str, ...]) -> None:
    found = likely_groups(names)
    assert (found.of, found.unsure) == ({}, pair)


@pytest.mark.parametrize(
    ("folders", "are"),
    [
        ({"101": 2, "202": 6}, True),
        ({"patient1": 30, "patient2": 30}, True),
        ({"sub-a": 30, "sub-b": 30}, True),
        ({"101": 30, "202": 30}, False),
        ({"Oslo": 2, "Bern": 2}, False),
        ({"data": 5}, False),
        ({"site1": 2, "site2": 2}, False),
        ({"p1": 2, "scanner_B": 2}, False),
    ],
)
def test_folders_of_patients(folders: dict[str, int], are: bool) -> None:
    assert are_patients(folders) is are


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


def test_init_says_where_it_is_not_sure(tmp_path: Path) -> None:
    result = init_data_folder(write(tmp_path / "data", each(("001", "002"), "_1", "_2")), tmp_path / "out")
    assert any("cases such as 001_1 and 001_2 may be of one patient; names alone" in note for note in result.notes)
    assert "group" not in result.datalist.read_text()


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


@pytest.mark.parametrize(
    "names",
    [
        [f"ID_{year}_{i:03d}" for year in (2019, 2020) for i in range(8)],
        [f"PT{site}_{i:03d}" for site in (1, 2) for i in range(8)],
        [f"volume{site}_{i}" for site in range(3) for i in range(10)],
        [f"case{i}_T{t}0" for i in range(1, 11) for t in range(10)],
    ],
)
def test_many_cases_of_few_are_asked_about(names: list[str]) -> None:
    """They may be a site's, a year's or a patient's: init says so, and keeps five folds."""
    found = likely_groups(names)
    assert found.of == {}
    assert len(found.unsure) == 2 or "2019" in names[0]


def test_sequences_of_one_patient_belong_together() -> None:
    assert likely_groups(["001_T1w", "001_T2w", "002_T1w", "003_T1w"]).of == {"001_T1w": "001", "001_T2w": "001"}
    assert likely_groups([f"{c:03d}_T1w" for c in range(9)]).of == {}
