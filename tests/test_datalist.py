"""The strict reader of datalist.json: what it accepts, and the whole message for each fault."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.model_selection import KFold

from autoseg.data.datalists.cases import Case, Datalist
from autoseg.data.datalists.datalist import read_datalist, write_datalist
from autoseg.data.datalists.folds import make_folds
from autoseg.data.datalists.names import unique_names
from autoseg.errors import ConfigError

Put = Callable[..., Path]


def item(i: int, **more: Any) -> dict[str, Any]:
    return {"image": f"images/c{i}.nii.gz", "label": f"labels/c{i}.nii.gz", **more}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data root with empty files: 8 images, their labels; the reader opens none of them."""
    for i in range(8):
        for folder in ("images", "labels"):
            path = tmp_path / folder / f"c{i}.nii.gz"
            path.parent.mkdir(exist_ok=True)
            path.touch()
    return tmp_path


@pytest.fixture
def put(root: Path) -> Put:
    """Write a datalist.json."""

    def write(training: Any, **more: Any) -> Path:
        path = root / "datalist.json"
        path.write_text(json.dumps({"training": training, **more}))
        return path

    return write


def faults(path: Path, **options: Any) -> list[str]:
    """The messages of a reading that must fail, without the path of the file and of its folder."""
    with pytest.raises(ConfigError) as caught:
        read_datalist(path, path.parent, **options)
    return [m.replace(f"{path}: ", "").replace(str(path.parent), "ROOT") for m in caught.value.messages]


def test_everything_is_read(root: Path, put: Put) -> None:
    path = put(
        [
            item(0, fold=0, annotated=["liver"], group="p0"),
            item(1, fold=1, annotated=["liver", "spleen"], group=7),
            {"image": ["images/c2.nii.gz", "images/c3.nii.gz"], "label": "labels/c2.nii.gz", "fold": 1},
        ],
        testing=[item(4), {"image": "images/c5.nii.gz"}, "images/c6.nii.gz"],
        unlabeled=["./images/c7.nii.gz"],
        labels={"0": "background", "1": "liver", "5": "spleen"},
        modality="CT",
        licence="of another tool",
    )
    data = read_datalist(path, root)
    assert [c.name for c in data.training] == ["c0", "c1", "c2"]
    assert data.training[0] == Case(
        name="c0",
        images=(root / "images/c0.nii.gz",),
        label=root / "labels/c0.nii.gz",
        fold=0,
        annotated=("liver",),
        group="p0",
    )
    assert data.training[1].group == "7"
    assert [p.name for p in data.training[2].images] == ["c2.nii.gz", "c3.nii.gz"]
    assert [(c.name, c.label is not None) for c in data.testing] == [("c4", True), ("c5", False), ("c6", False)]
    assert data.unlabeled[0].images == (root / "images/c7.nii.gz",)
    assert data.labels == {1: "liver", 5: "spleen"}
    assert (data.modality, data.num_fold, data.path) == ("CT", 2, path)
    assert [c.name for c in data.val_cases(1)] == ["c1", "c2"]
    assert [c.name for c in data.train_cases(1)] == ["c0"]


def test_extra_modalities_follow_as_channels(root: Path, put: Put) -> None:
    training = [item(0, fold=0, pet="images/c2.nii.gz"), item(1, fold=1, pet="images/c3.nii.gz")]
    path = put(training)
    data = read_datalist(path, root, extra_modalities=("pet",))
    assert [p.name for p in data.training[0].images] == ["c0.nii.gz", "c2.nii.gz"]
    write_datalist(data, root / "again.json", root, extra_modalities=("pet",))
    assert json.loads((root / "again.json").read_text())["training"] == training
    del training[1]["pet"]
    training[0]["ct2"] = "images/c4.nii.gz"
    assert faults(put(training), extra_modalities=("pet",)) == [
        "training[0]: ct2: images/c4.nii.gz is named like an image. Name the key under extra_modalities to read it "
        "as a channel, or leave it out.",
        "training[1]: no pet. Expected the path of a file.",
    ]


def test_validation_cases_without_folds_are_fold_0(root: Path, put: Put) -> None:
    data = read_datalist(put([item(0), item(1)], validation=[item(2)]), root)
    assert data.num_fold == 1
    assert [c.name for c in data.train_cases(0)] == ["c0", "c1"]
    assert [c.name for c in data.val_cases(0)] == ["c2"]
    assert data.validation == ()


def test_folds_win_over_validation_cases(root: Path, put: Put, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        data = read_datalist(put([item(0, fold=0), item(1, fold=1)], validation=[item(2)]), root)
    assert (data.num_fold, [c.name for c in data.validation]) == (2, ["c2"])
    assert "has folds and `validation`: the folds are used, the 1 validation cases are held back." in caplog.text


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"labels": {"1": "a", "7": "b"}, "modality": "MRI"},
        {"labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}, "channel_names": {"0": "T1", "1": "T2"}},
        {"labels": {"background": 0, "a": 1, "ignore": 2}},
        {"testing": [item(4), "images/c5.nii.gz"], "unlabeled": ["images/c6.nii.gz"]},
        {"validation": [item(4), item(5)]},
    ],
)
def test_what_is_written_reads_back_equal(root: Path, put: Put, more: dict[str, Any]) -> None:
    training = [item(0, annotated=["a"], group="p"), item(1, annotated=[]), item(2), item(3)]
    data = read_datalist(put(training, **more), root, num_fold=2, seed=3)
    (root / "deep").mkdir()
    write_datalist(data, root / "deep" / "written.json", root)
    assert read_datalist(root / "deep" / "written.json", root) == data


def test_regions_and_ignore_label_are_kept(root: Path, put: Put) -> None:
    labels = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    data = read_datalist(put([item(0), item(1)], labels=labels), root, num_fold=2)
    assert (data.labels, data.regions, data.ignore_label) == ({}, {"whole": (1, 2), "core": (2,)}, 3)


def test_writing_outside_the_root_is_refused(root: Path) -> None:
    data = Datalist(training=(Case(name="x", images=(root.parent / "x.nii.gz",)),))
    with pytest.raises(ConfigError) as caught:
        write_datalist(data, root / "d.json", root)
    assert str(caught.value) == (
        f"{root / 'd.json'}: {root.parent / 'x.nii.gz'} lies outside dataroot {root}. "
        "Give a folder that holds all images and labels."
    )
    assert not (root / "d.json").exists()


def test_names_are_unique_and_fit_file_names(root: Path, put: Put) -> None:
    paths = ["a/scan.nii.gz", "b/scan.nii.gz", "b/other one_0000.nii.gz", "x/y/SCAN.nii", "z/case_0003.nii.gz"]
    for name in paths:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    training = [{"image": p, "label": "labels/c0.nii.gz"} for p in paths]
    names = [c.name for c in read_datalist(put(training), root).training]
    assert names == ["a_scan", "b_scan", "other one", "y_SCAN", "case_0003"]


def test_links_may_lead_out_of_the_root(tmp_path: Path, root: Path, put: Put) -> None:
    (root / "images" / "link.nii.gz").symlink_to(Path(__file__))
    training = [item(0, fold=0), {"image": "images/link.nii.gz", "label": "labels/c1.nii.gz", "fold": 1}]
    assert read_datalist(put(training), root).training[1].images == (root / "images" / "link.nii.gz",)


# -- faults


def test_missing_and_broken_files(root: Path, put: Put) -> None:
    path = root / "datalist.json"
    assert faults(path) == [
        "datalist: ROOT/datalist.json is missing. Expected a datalist.json; `autoseg init DATA_FOLDER` writes one."
    ]
    path.write_text('{"training": [\n  {"image": 1,}]}')
    with pytest.raises(ConfigError) as caught:
        read_datalist(path, root)
    assert str(caught.value).startswith(f"{path}:2:")
    assert str(caught.value).endswith("Correct this place.")
    path.write_text("[]")
    assert faults(path) == ["holds a list. Expected an object with a list `training`."]
    path.write_text('{"training": [], "training": []}')
    assert faults(path) == ["key 'training' stands twice in one object. Keep one."]
    path.write_bytes(b'{"a": "\xff"}')
    assert faults(path) == [
        f"{path}: not UTF-8 text (byte 7). Expected JSON; save it as UTF-8.".replace(f"{path}: ", "")
    ]
    path.write_text("{}")
    assert faults(path)[0] == "no key `training`. Expected a list of {image, label}."
    path.write_text('{"training": []}')
    assert faults(path) == ["training: 0 cases. Expected at least 2, so that one can validate the other."]
    with pytest.raises(ConfigError) as caught:
        read_datalist(put([item(0)]), root / "nowhere")
    assert str(caught.value) == (
        f"dataroot: {root / 'nowhere'} is not a folder. Expected the folder that the paths in datalist.json start from."
    )


def test_all_faults_of_a_file_come_at_once(root: Path, put: Put) -> None:
    (root / "empty").mkdir()
    path = put(
        [
            item(0, fold=0, lable="x"),
            {"image": "images/c1.nii.gz", "fold": -1},
            {"image": "../c2.nii.gz", "label": "/etc/hosts", "fold": True},
            {"image": "images/none.nii.gz", "label": "empty", "fold": 3},
            {"label": "labels/c4.nii.gz", "fold": "1", "annotated": "liver", "group": [1]},
            "images/c5.nii.gz",
            {"image": ["images/c6.nii.gz", 5], "label": "images/c6.nii.gz", "fold": 1},
        ],
        testng=[],
        testing={"image": "x"},
        labels={"1": "a", "2": "a", "x": "b"},
        modality=3,
    )
    assert faults(path) == [
        "testng: unknown key. Did you mean testing?",
        "labels: 'x': 'b': expected label values from 0 to 65535 and names.",
        "labels: 'a' is named 2 times. Give each class its own name.",
        'modality: 3. Expected a name, a list of names or {"0": name}.',
        "training[0]: lable: unknown key. Did you mean label?",
        "training[1]: no label. Give one, or list the case under `unlabeled`.",
        "training[1]: fold: -1. Expected an integer from 0.",
        "training[2].image: ../c2.nii.gz lies outside dataroot ROOT. Move it there, or give a dataroot above it.",
        "training[2].label: /etc/hosts lies outside dataroot ROOT. Move it there, or give a dataroot above it.",
        "training[2]: fold: True. Expected an integer from 0.",
        "training[3].label: empty is a folder without DICOM files. Expected a file, or the folder of a segmentation or "
        "of masks.",
        "training[4]: no image. Expected the path of a file or a list of paths.",
        "training[4]: fold: '1'. Expected an integer from 0.",
        "training[4]: annotated: 'liver'. Expected a list of class names.",
        "training[4]: group: [1]. Expected the patient's name or number.",
        "training[5]: str. Expected an object such as {image, label, fold}.",
        "training[6].image[1]: 5. Expected the path of a file.",
        "training[6]: images/c6.nii.gz is both image and label. Give each its own file.",
        "testing: dict. Expected a list of cases.",
        "training[3].image: no file images/none.nii.gz in ROOT. Copy it there, or correct the path.",
        "training[1], training[2], training[4]: no fold, but other cases have one. "
        "Give every training case a fold, or none.",
        "fold 2 has no case (found folds 0, 1, 3). Number the folds 0, 1, 2, ... without gaps.",
    ]


def test_many_missing_files_are_counted(root: Path, put: Put) -> None:
    training = [item(0), item(1)] + [{"image": f"x/{i}.nii.gz", "label": "labels/c0.nii.gz"} for i in range(30)]
    found = faults(put(training))
    assert len(found) == 11
    assert found[-1] == "20 more files are missing in ROOT."


def test_no_file_at_all_means_a_wrong_root(root: Path, put: Put) -> None:
    path = put([item(0), item(1)])
    (root / "elsewhere").mkdir()
    with pytest.raises(ConfigError) as caught:
        read_datalist(path, root / "elsewhere")
    assert str(caught.value) == (
        f"{path}: none of its 4 files is in dataroot {root / 'elsewhere'}, not even the first: images/c0.nii.gz. "
        "Set dataroot to the folder the paths start from."
    )


@pytest.mark.parametrize(
    ("folds", "text"),
    [
        ([0, 0, 0], "all 3 training cases are in fold 0. Expected at least 2 folds."),
        ([1, 2, 2], "fold 0 has no case (found folds 1, 2). Number the folds 0, 1, 2, ... without gaps."),
        (
            [0, 10**9, 0],
            "folds 1, 2 have no case (found folds 0, 1000000000). Number the folds 0, 1, 2, ... without gaps.",
        ),
        ([0, None, 1], "training[1]: no fold, but other cases have one. Give every training case a fold, or none."),
        ([0], "training: 1 case. Expected at least 2, so that one can validate the other."),
        ([None], "training: 1 case. Expected at least 2, so that one can validate the other."),
    ],
)
def test_faulty_folds(put: Put, folds: list[int | None], text: str) -> None:
    training = [item(i) if f is None else item(i, fold=f) for i, f in enumerate(folds)]
    assert faults(put(training)) == [text]


def test_the_same_image_or_patient_in_two_places(put: Put) -> None:
    twice = [item(0, fold=0), item(1, fold=1), item(2, fold=1) | {"image": "images/../images/c0.nii.gz"}]
    assert faults(put(twice)) == ["training[2]: images/c0.nii.gz is also the image of training[0]. List it once."]
    tested = put([item(0, fold=0), item(1, fold=1)], testing=["images/c1.nii.gz"])
    assert faults(tested) == ["testing[0]: images/c1.nii.gz is also the image of training[1]. List it once."]
    split = [item(0, fold=0, group="p"), item(1, fold=1, group="p")]
    assert faults(put(split)) == [
        "patient 'p' is in fold 0 (training[0]), fold 1 (training[1]). Put all cases of a patient into one fold."
    ]
    leak = put([item(0, fold=0, group="p"), item(1, fold=1)], testing=[item(2, group="p")])
    assert faults(leak) == ["patient 'p' is in training and in testing. Keep a patient's cases together."]


def test_too_few_cases_for_the_folds(put: Put) -> None:
    assert faults(put([item(0), item(1), item(2)])) == [
        "num_fold: 5 folds cannot be made of 3 training cases. Set num_fold: 3, or add cases."
    ]
    grouped = put([item(i, group=f"p{i % 3}") for i in range(6)])
    assert faults(grouped) == [
        "num_fold: 5 folds cannot be made of 6 training cases of 3 patients. Set num_fold: 3, or add cases."
    ]


def test_fewer_folds_where_nobody_asked_for_so_many(root: Path, put: Put, caplog: pytest.LogCaptureFixture) -> None:
    data = read_datalist(put([item(i, group=f"p{i % 3}") for i in range(6)]), root, may_be_fewer=True)
    assert data.num_fold == 3
    assert {c.fold for c in data.training} == {0, 1, 2}
    assert "3 folds in place of 5: there are 3 patients or cases." in caplog.text
    assert read_datalist(put([item(i) for i in range(8)]), root, may_be_fewer=True).num_fold == 5
    one = put([item(i, group="p") for i in range(6)])
    with pytest.raises(ConfigError, match=r"folds cannot be made of 6 training cases of 1 patient\. Add cases"):
        read_datalist(one, root, may_be_fewer=True)


# -- folds


def test_made_folds_are_balanced_and_do_not_depend_on_the_order(root: Path, put: Put) -> None:
    data = read_datalist(put([item(i, annotated=["a"] if i < 4 else ["a", "b"]) for i in range(8)]), root, num_fold=2)
    assert Counter((c.annotated, c.fold) for c in data.training) == {
        (kind, fold): 2 for kind in (("a",), ("a", "b")) for fold in (0, 1)
    }
    turned = read_datalist(
        put([item(i, annotated=["a"] if i < 4 else ["b", "a"]) for i in reversed(range(8))]), root, num_fold=2
    )
    assert {c.name: c.fold for c in turned.training} == {c.name: c.fold for c in data.training}
    other = read_datalist(put([item(i) for i in range(8)]), root, num_fold=2, seed=1)
    assert [c.fold for c in other.training] != [c.fold for c in data.training]


@pytest.mark.parametrize(
    ("num", "num_fold", "seed"), [(2, 2, 0), (7, 3, 1), (23, 5, 0), (200, 5, 42), (64, 64, 2**32 - 1)]
)
def test_folds_of_equal_cases_are_those_of_scikit_learn(num: int, num_fold: int, seed: int) -> None:
    """What lists without classes or patients got before, and what other tools deal, stays."""
    names = [f"n{i:03}" for i in range(num)]
    folds = make_folds(names, num_fold=num_fold, seed=seed, groups=[None] * num, strata=[""] * num)
    splits = KFold(num_fold, shuffle=True, random_state=seed).split(names)
    assert [np.flatnonzero(np.array(folds) == fold).tolist() for fold in range(num_fold)] == [
        part.tolist() for _, part in splits
    ]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("seed", range(5))
def test_patients_are_never_split_and_no_fold_is_empty(seed: int) -> None:
    names = [f"n{i}" for i in range(40)]
    # Patients of 1 to 12 scans, rare and common strata.
    groups = [f"p{min(i // 12, 1) * 50 + (i if i >= 12 else 0) // 3}" for i in range(40)]
    strata = ["common" if i % 5 else "rare" if i % 10 else "rarer" for i in range(40)]
    folds = make_folds(names, num_fold=5, seed=seed, groups=groups, strata=strata)
    assert set(folds) == set(range(5))
    assert all(len({f for f, g in zip(folds, groups, strict=True) if g == p}) == 1 for p in groups)


def test_four_patients_of_unlike_size_fill_four_folds() -> None:
    """The splitter that balances classes leaves one of these folds empty; then patients alone are balanced."""
    sizes, classes = (21, 2, 1, 2), "10100001111111000011010100"
    groups = [f"p{patient}" for patient, size in enumerate(sizes) for _ in range(size)]
    folds = make_folds([f"n{i:02}" for i in range(26)], num_fold=4, seed=0, groups=groups, strata=classes)
    assert sorted(Counter(folds).values()) == [1, 2, 2, 21]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/b_0000.nii.gz", "a/c_0003.nii.gz"], ["b", "c_0003"]),
        (["x/b.nii.gz", "y/b.nii.gz"], ["x_b", "y_b"]),
        (["a/b.nii.gz", "a/b.nii"], ["a_b_1", "a_b_2"]),
        (["B.nii.gz", "b.nii.gz"], ["B_1", "b_2"]),
        (["a/b.nii.gz", "a/b.nii", "a_b_1.nii.gz"], ["a_b_2", "a_b_3", "a_b_1"]),
    ],
)
def test_names_of_cases_are_unique(paths: list[str], names: list[str]) -> None:
    """By the folders above where they differ; where nothing else does, by a number that no other case has."""
    assert unique_names([Path(path) for path in paths]) == names


@pytest.mark.filterwarnings("error")
def test_rare_strata_do_not_stop_the_making() -> None:
    strata = ["one", "two", "three"] + ["common"] * 9
    folds = make_folds([str(i) for i in range(12)], num_fold=4, seed=0, groups=[None] * 12, strata=strata)
    assert sorted(Counter(folds).values()) == [3, 3, 3, 3]


def test_a_list_of_other_folds_is_kept(root: Path, put: Put) -> None:
    data = read_datalist(put([item(i, fold=i % 2) for i in range(4)]), root, num_fold=5)
    assert data.num_fold == 2
    assert replace(data, path=None) == data
