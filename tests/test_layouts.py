"""Folders without a list: MSD, nnU-Net, pairs of folders, and why others are not recognised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from layout_folders import groups, message, put, touch

from autoseg.data.datalists.datalist import read_datalist
from autoseg.data.datalists.layouts import EXPECTED, find_layout, recognise
from autoseg.data.formats.table import PATTERNS_TEXT
from autoseg.errors import DataError

HIPPOCAMPUS = Path(__file__).resolve().parents[2] / "shared" / "data" / "hippocampus"


def matches(root: Path) -> dict[str, list[str]]:
    """Label file -> image files, as recognised without folds."""
    data = recognise(root, num_fold=None)
    return {c.label.name: [p.name for p in c.images] for c in data.training if c.label}


# -- Medical Segmentation Decathlon


@pytest.fixture
def msd(tmp_path: Path) -> Path:
    names = [f"la_{i:03d}.nii.gz" for i in range(6)]
    touch(tmp_path, *(f"imagesTr/{n}" for n in names), *(f"labelsTr/{n}" for n in names), "imagesTs/la_100.nii.gz")
    touch(tmp_path, "imagesTr/._la_000.nii.gz")
    listed = [{"image": f"./imagesTr/{n}", "label": f"./labelsTr/{n}"} for n in names]
    put(
        tmp_path,
        "dataset.json",
        {
            "name": "Heart",
            "tensorImageSize": "3D",
            "modality": {"0": "MRI"},
            "labels": {"0": "background", "1": "left atrium"},
            "numTraining": 6,
            "numTest": 1,
            "training": [*listed, {"image": "./imagesTr/._la_000.nii.gz", "label": "./labelsTr/._la_000.nii.gz"}],
            "test": ["./imagesTs/la_100.nii.gz", "./imagesTs/._la_100.nii.gz"],
        },
    )
    return tmp_path


def test_msd(msd: Path) -> None:
    data = recognise(msd)
    assert find_layout(msd).kind == "MSD data set"
    assert [c.name for c in data.training] == [f"la_{i:03d}" for i in range(6)]
    assert [c.images for c in data.testing] == [(msd / "imagesTs/la_100.nii.gz",)]
    assert (data.labels, data.modality, data.num_fold) == ({1: "left atrium"}, "MRI", 5)
    assert read_datalist(msd / "dataset.json", msd) == data


def test_msd_with_the_channels_of_nnunet_v1(msd: Path) -> None:
    for i in range(6):
        (msd / f"imagesTr/la_{i:03d}.nii.gz").unlink()
        touch(msd, f"imagesTr/la_{i:03d}_0000.nii.gz", f"imagesTr/la_{i:03d}_0001.nii.gz")
    data = recognise(msd)
    assert [p.name for p in data.training[5].images] == ["la_005_0000.nii.gz", "la_005_0001.nii.gz"]
    assert data.training[5].name == "la_005"


@pytest.mark.skipif(not HIPPOCAMPUS.exists(), reason="the real data lie beside the checkout only where it is developed")
def test_the_real_hippocampus_set() -> None:
    data = recognise(HIPPOCAMPUS)
    assert [len(data.val_cases(f)) for f in range(data.num_fold)] == [40] * 5
    assert (data.labels, data.modality) == ({1: "Anterior", 2: "Posterior"}, "MRI")


# -- nnU-Net v2


def nnunet(root: Path, *, channels: dict[str, str] | None = None, labels: dict[str, Any] | None = None) -> Path:
    channels = channels or {"0": "T1", "1": "T2"}
    for i in range(5):
        touch(
            root, *(f"imagesTr/BR_{i:03d}_{c:04d}.nii.gz" for c in range(len(channels))), f"labelsTr/BR_{i:03d}.nii.gz"
        )
    touch(root, *(f"imagesTs/BR_009_{c:04d}.nii.gz" for c in range(len(channels))))
    labels = labels or {"background": 0, "whole tumor": [1, 2, 3], "core": [2, 3], "enhancing": 3, "ignore": 4}
    put(
        root,
        "dataset.json",
        {
            "channel_names": channels,
            "labels": labels,
            "regions_class_order": [1, 2, 3],
            "numTraining": 5,
            "file_ending": ".nii.gz",
        },
    )
    return root


def test_nnunet_with_regions_and_channels(tmp_path: Path) -> None:
    data = recognise(nnunet(tmp_path))
    assert find_layout(tmp_path).kind == "nnU-Net raw data set"
    assert [c.name for c in data.training] == [f"BR_{i:03d}" for i in range(5)]
    assert [p.name for p in data.training[0].images] == ["BR_000_0000.nii.gz", "BR_000_0001.nii.gz"]
    assert data.regions == {"whole tumor": (1, 2, 3), "core": (2, 3), "enhancing": (3,)}
    assert (data.labels, data.ignore_label, data.modality, data.channels) == ({}, 4, "T1", ("T1", "T2"))
    assert [c.name for c in data.testing] == ["BR_009"]
    assert data.testing[0].label is None
    assert read_datalist(tmp_path / "dataset.json", tmp_path) == data


def test_nnunet_with_plain_labels_test_labels_and_unlabeled(tmp_path: Path) -> None:
    nnunet(tmp_path, channels={"0": "CT"}, labels={"background": 0, "kidney": 1, "tumor": 2})
    touch(tmp_path, "labelsTs/BR_009.nii.gz", "imagesTr/BR_777_0000.nii.gz")
    data = recognise(tmp_path)
    assert data.labels == {1: "kidney", 2: "tumor"}
    assert data.testing[0].label == tmp_path / "labelsTs/BR_009.nii.gz"
    assert [c.name for c in data.unlabeled] == ["BR_777"]


@pytest.mark.parametrize(
    ("ending", "text"),
    [
        (
            ".mhdx",
            r"imagesTr: no case: looked for NAME_0000\.mhdx .*, found BR_000_0000\.nii\.gz, .* 7 more\. autoseg does ",
        ),
        (".nii", r"imagesTr: no case: looked for NAME_0000\.nii .*Correct file_ending in dataset\.json"),
    ],
)
def test_nnunet_with_another_ending_than_its_files(tmp_path: Path, ending: str, text: str) -> None:
    listed = nnunet(tmp_path) / "dataset.json"
    listed.write_text(listed.read_text().replace('".nii.gz"', f'"{ending}"'))
    with pytest.raises(DataError, match=text):
        recognise(tmp_path)
    if ending == ".nii":  # of the test images alone
        listed.write_text(listed.read_text().replace(f'"{ending}"', '".nii.gz"'))
        for path in (tmp_path / "imagesTs").iterdir():
            path.rename(path.with_suffix(""))
        with pytest.raises(DataError, match=r"imagesTs: no case: looked for NAME_0000\.nii\.gz"):
            recognise(tmp_path)


def test_nnunet_splits_become_folds(tmp_path: Path) -> None:
    nnunet(tmp_path)
    names = [f"BR_{i:03d}" for i in range(5)]
    put(tmp_path, "splits_final.json", [{"train": names[2:], "val": names[:2]}, {"train": names[:2], "val": names[2:]}])
    assert [c.fold for c in recognise(tmp_path).training] == [0, 0, 1, 1, 1]
    put(tmp_path, "splits_final.json", [{"train": names[1:], "val": names[:1]}])
    data = recognise(tmp_path)
    assert ([c.name for c in data.val_cases(0)], data.num_fold) == (["BR_000"], 1)


@pytest.mark.parametrize(
    ("splits", "text"),
    [
        ([{"val": ["BR_000", "BR_001"]}, {"val": ["BR_002"]}], "BR_003, BR_004 in no fold"),
        ([{"val": [f"BR_{i:03d}" for i in range(5)]}, {"val": ["BR_000"]}], "a case in two folds"),
        ([{"val": ["XX"]}, {"val": []}], "XX not in the data set"),
        ([], "BR_000, BR_001, BR_002, BR_003, BR_004 in no fold"),
    ],
)
def test_nnunet_splits_that_do_not_fit(tmp_path: Path, splits: list[Any], text: str) -> None:
    put(nnunet(tmp_path), "splits_final.json", splits)
    assert message(tmp_path) == (
        f"ROOT/splits_final.json: {text}. "
        "Expected every training case in the val list of one fold. Correct or remove the file."
    )


@pytest.mark.parametrize("splits", [{"train": []}, [1], [{"train": []}], 3])
def test_nnunet_splits_of_another_form(tmp_path: Path, splits: Any) -> None:
    put(nnunet(tmp_path), "splits_final.json", splits)
    assert message(tmp_path).startswith("ROOT/splits_final.json: not a list of {train, val} (")


def test_nnunet_faults(tmp_path: Path) -> None:
    root = nnunet(tmp_path / "a")
    touch(root, "labelsTr/BR_500.nii.gz")
    assert message(root) == "ROOT/labelsTr: no image BR_500 in imagesTr (expected NAME_0000.nii.gz)."
    (root / "labelsTr/BR_500.nii.gz").unlink()
    (root / "imagesTr/BR_003_0001.nii.gz").unlink()
    assert message(root) == "ROOT/imagesTr: BR_003 has 1 channels. Expected 2, as in channel_names."
    put(tmp_path / "b", "dataset.json", {"channel_names": {"0": "CT"}, "labels": {"background": 0}})
    assert message(tmp_path / "b") == (
        "ROOT/imagesTr: no such folder. Expected it in an nnU-Net raw data set.\n"
        "ROOT/labelsTr: no such folder. Expected it in an nnU-Net raw data set."
    )
    put(tmp_path / "c", "dataset.json", {"channel_names": 3, "labels": {"background": 0}})
    assert message(tmp_path / "c") == ('ROOT/dataset.json: channel_names: 3. Expected an object such as {"0": "CT"}.')


# -- pairs of folders


@pytest.mark.parametrize(
    ("images", "labels"),
    [("images", "labels"), ("imagesTr", "labelsTr"), ("image", "mask"), ("Images", "Segmentations")],
)
def test_pairs_by_the_same_name(tmp_path: Path, images: str, labels: str) -> None:
    touch(tmp_path, *(f"{images}/p{i}.nii.gz" for i in range(6)), *(f"{labels}/p{i}.nii.gz" for i in range(5)))
    data = recognise(tmp_path)
    assert find_layout(tmp_path).kind == f"pair of folders {images}/ and {labels}/"
    assert [(c.name, c.label.name if c.label else None) for c in data.training] == [
        (f"p{i}", f"p{i}.nii.gz") for i in range(5)
    ]
    assert [c.name for c in data.unlabeled] == ["p5"]
    assert data.labels == {}


def test_pairs_by_endings_beginnings_and_channels(tmp_path: Path) -> None:
    endings = touch(tmp_path / "a", "images/x1_image.nii.gz", "images/x2_image.nii.gz")
    touch(endings, "labels/x1_seg.nii", "labels/x2_seg.nii")
    assert matches(endings) == {"x1_seg.nii": ["x1_image.nii.gz"], "x2_seg.nii": ["x2_image.nii.gz"]}
    start = touch(tmp_path / "b", *(f"img/img00{i}.nii.gz" for i in (1, 2, 12)))
    touch(start, *(f"label/label00{i}.nii.gz" for i in (1, 12)))
    assert matches(start) == {"label001.nii.gz": ["img001.nii.gz"], "label0012.nii.gz": ["img0012.nii.gz"]}
    assert [c.name for c in recognise(start, num_fold=None).unlabeled] == ["img002"]
    channels = touch(tmp_path / "c", *(f"images/{n}_{c:04d}.nii.gz" for n in "ab" for c in (0, 1)))
    touch(channels, "labels/a.nii.gz", "labels/b.nii.gz")
    assert matches(channels) == {
        "a.nii.gz": ["a_0000.nii.gz", "a_0001.nii.gz"],
        "b.nii.gz": ["b_0000.nii.gz", "b_0001.nii.gz"],
    }
    numbered = touch(tmp_path / "d", *(f"{f}/case_000{i}.nii.gz" for f in ("images", "labels") for i in (0, 1, 2)))
    assert matches(numbered) == {f"case_000{i}.nii.gz": [f"case_000{i}.nii.gz"] for i in (0, 1, 2)}


def test_pairs_with_test_and_unlabeled_folders(tmp_path: Path) -> None:
    touch(tmp_path, "imagesTr/a.nii.gz", "labelsTr/a.nii.gz", "imagesTr/b.nii.gz", "labelsTr/b.nii.gz")
    touch(tmp_path, "imagesTs/c.nii.gz", "imagesVal/d.nii.gz", "labelsVal/d.nii.gz", "unlabeled/e.nii.gz")
    touch(tmp_path, "imagesTr/._a.nii.gz", "labelsTr/readme.txt")
    data = recognise(tmp_path, num_fold=2)
    assert [(c.name, c.label is not None) for c in data.testing] == [("c", False), ("d", True)]
    assert [c.name for c in data.unlabeled] == ["e"]


def test_a_phantom_folder_is_recognised_with_its_list_or_without(phantom_dataset: Path) -> None:
    listed = recognise(phantom_dataset)
    assert (find_layout(phantom_dataset).kind, len(listed.training), listed.num_fold) == ("datalist.json", 6, 3)
    bare = recognise(phantom_dataset, own_list=False)
    assert (len(bare.training), bare.num_fold, bare.labels) == (8, 5, {})


def test_labels_without_image_are_named(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.nii.gz", "labels/a.nii.gz", "labels/b.nii.gz", "labels/q.nii.gz")
    assert message(tmp_path) == (
        "ROOT/labels: no image in images/ for b.nii.gz, q.nii.gz. Expected the same file name in both, "
        "but for endings such as _image and _seg; found images such as a.nii.gz."
    )


def test_empty_folders_of_a_pair_are_named(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    touch(tmp_path, "labels/notes.txt")
    assert message(tmp_path) == (
        f"ROOT/images: no image files ({PATTERNS_TEXT}).\nROOT/labels: no image files ({PATTERNS_TEXT})."
    )


# -- folders of patients


def test_pairs_with_a_folder_for_each_patient(tmp_path: Path) -> None:
    scans = [f"p{p}/scan{s}.nii.gz" for p in range(5) for s in (1, 2)]
    touch(tmp_path, *(f"{f}/{n}" for f in ("images", "labels") for n in scans), "images/p9/scan1.nii.gz")
    touch(tmp_path, "imagesTs/q1/a.nii.gz", "labelsTs/q1/a.nii.gz", "imagesTs/q2/b.nii.gz", "test/images/c.nii.gz")
    data = recognise(tmp_path)
    assert groups(tmp_path) == {f"labels/{n}": n[:2] for n in scans}
    assert all(len({c.fold for c in data.training if c.group == f"p{p}"}) == 1 for p in range(5))
    assert [(c.name, c.group) for c in data.unlabeled] == [("p9_scan1", "p9")]
    assert [(c.name, c.label is not None) for c in data.testing] == [("a", True), ("b", False)]
    assert find_layout(tmp_path).notes == (
        "11 cases lie in the folders of 6 patients, such as 2 in p0/: no fold splits one (`group` in datalist.json). "
        "Remove `group` and `fold` there if each case stands alone.",
    )


def test_pairs_of_one_image_and_one_label_in_a_folder(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{f}s/p{p}/{f}.nii.gz" for f in ("image", "label") for p in range(3)))
    assert groups(tmp_path) == {f"labels/p{p}/label.nii.gz": None for p in range(3)}
    assert find_layout(tmp_path).notes == ()


def test_pairs_with_folders_that_do_not_fit(tmp_path: Path) -> None:
    flat = touch(tmp_path / "a", "images/p1/x.nii.gz", "labels/p1.nii.gz")
    assert message(flat) == (
        "ROOT/images: images lie in folders such as p1/, and labels/p1/ holds no label. "
        "Expected the same folders in both, or files in both."
    )
    lost = touch(tmp_path / "b", "images/p1/x.nii.gz", "labels/p1/x.nii.gz", "labels/p2/x.nii.gz")
    assert message(lost) == "ROOT/labels: no images in images/ for the folders p2."
    other = touch(tmp_path / "c", "images/p1/x.nii.gz", "images/p1/y.nii.gz", "labels/p1/z.nii.gz")
    assert message(other).startswith("ROOT/labels/p1: no image in p1/ for z.nii.gz. Expected the same file name")
    shares = touch(tmp_path / "d", *(f"{f}/{s}/x.nii.gz" for f in ("images", "labels") for s in ("train", "val")))
    assert message(shares) == (
        "ROOT/images: the folders train/, val/ look like shares of a data set, not like patients. "
        "List the cases in a datalist.json, with the keys `validation` and `testing`."
    )


# -- none


def test_why_nothing_was_recognised(tmp_path: Path) -> None:
    assert message(tmp_path / "no").replace(str(tmp_path), "ROOT") == f"ROOT: no such folder. Expected {EXPECTED}."
    bare = touch(tmp_path / "bare", "a.nii.gz", "photos/x.png", "scans2/y.nii")
    assert message(bare) == (
        "ROOT: no data set recognised, since it has no dataset.json, and folders photos/, scans2/ and 1 image files "
        f"in it, and images below such as scans2/y.nii. Expected {EXPECTED}."
    )
    put(tmp_path / "above" / "Task04", "dataset.json", {})
    assert message(tmp_path / "above") == (
        "ROOT: no data set recognised, since it has no dataset.json, but Task04/ has a list: give that folder. "
        f"Expected {EXPECTED}."
    )
    assert message(tmp_path / "above" / "Task04") == (
        "ROOT: no data set recognised, since its dataset.json has neither `channel_names` (nnU-Net) "
        f"nor `training` and `modality` (MSD). Expected {EXPECTED}."
    )
    (bare / "dataset.json").write_text("{")
    assert message(bare).startswith("ROOT/dataset.json:1:2: not valid JSON (")


def test_nested_labels_without_an_image_are_told_of(tmp_path: Path) -> None:
    scans = [f"p{p}/v1/i.nii.gz" for p in range(3)]
    lost = touch(tmp_path, *(f"{f}/{n}" for f in ("images", "labels") for n in scans), "labels/p1/v2/i.nii.gz")
    assert message(lost) == "ROOT/labels: no images in images/ for the folders p1/v2."


def test_test_images_in_folders_need_no_labels(tmp_path: Path) -> None:
    scans = [f"{f}/{n}.nii.gz" for f in ("imagesTr", "labelsTr") for n in range(5)]
    touch(tmp_path, *scans, "imagesTs/t0/x.nii.gz", "labelsTs/t0.nii.gz")
    data = recognise(tmp_path)
    assert len(data.training) == 5
    assert [case.label for case in data.testing] == [None]
