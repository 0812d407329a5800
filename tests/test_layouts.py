"""Folders without a list: MSD, nnU-Net, pairs of folders, and why others are not recognised."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from autoseg.data.datalists.datalist import read_datalist
from autoseg.data.datalists.layouts import EXPECTED, find_layout, recognise
from autoseg.data.formats.table import PATTERNS_TEXT
from autoseg.errors import ConfigError, DataError

HIPPOCAMPUS = Path(__file__).resolve().parents[2] / "shared" / "data" / "hippocampus"


def touch(root: Path, *names: str) -> Path:
    """Make empty files; layouts are recognised by names alone."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def put(root: Path, name: str, data: Any) -> None:
    root.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(json.dumps(data))


def message(root: Path) -> str:
    with pytest.raises((DataError, ConfigError)) as caught:
        recognise(root)
    return str(caught.value).replace(str(root), "ROOT")


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


def groups(root: Path) -> dict[str, str | None]:
    """Label file -> the group of its case, in the training cases."""
    return {c.label.relative_to(root).as_posix(): c.group for c in recognise(root, num_fold=None).training if c.label}


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


def test_images_beside_their_labels(tmp_path: Path) -> None:
    visits = [f"p{p}/visit{v}" for p in range(5) for v in (1, 2)]
    touch(tmp_path, *(f"{v}/{f}.nii.gz" for v in visits for f in ("image", "label")))
    touch(tmp_path, "p5/visit1/image.nii.gz", "p6/a.nii.gz", "p6/b.nii.gz")
    data = recognise(tmp_path)
    assert find_layout(tmp_path).kind == "folder of cases with labels"
    assert groups(tmp_path) == {f"{v}/label.nii.gz": v[:2] for v in visits}
    assert all(len({c.fold for c in data.training if c.group == f"p{p}"}) == 1 for p in range(5))
    assert [c.group for c in data.unlabeled] == ["p5"]
    assert [note[:40] for note in find_layout(tmp_path).notes] == [
        "11 cases lie in the folders of 6 patient",
        "left out, folders of several images, or ",
    ]


def test_a_folder_for_each_case_is_no_group(tmp_path: Path) -> None:
    touch(tmp_path, *(f"c{c}/c{c}_{f}.nii.gz" for c in range(3) for f in ("ct", "seg")))
    assert groups(tmp_path) == {f"c{c}/c{c}_seg.nii.gz": None for c in range(3)}
    assert [p.name for p in recognise(tmp_path, num_fold=None).training[0].images] == ["c0_ct.nii.gz"]


def test_folders_of_sites_are_no_patients(tmp_path: Path) -> None:
    touch(tmp_path, *(f"site{s}/{c}/{f}.nii.gz" for s in (1, 2) for c in "abc" for f in ("image", "label")))
    assert set(groups(tmp_path).values()) == {None}
    assert find_layout(tmp_path).notes[0].startswith("the folders site1/, site2/ are not taken for patients, by their ")


def test_images_beside_labels_that_are_unclear(tmp_path: Path) -> None:
    one = touch(tmp_path / "a", *(f"data/p{p}/{f}.nii.gz" for p in (1, 2) for f in ("image", "label")))
    assert message(one) == "ROOT: all cases are in data/. Give that folder, if those in it are patients."
    several = touch(tmp_path / "b", *(f"p{p}/{f}.nii.gz" for p in (1, 2) for f in ("t1", "t1_mask", "my_seg")))
    assert message(several) == (
        "ROOT: more than one image or label of a case: p1/ (t1.nii.gz, my_seg.nii.gz, t1_mask.nii.gz), p2/ "
        "(t1.nii.gz, my_seg.nii.gz, t1_mask.nii.gz). Expected one label, and one image or images that are called "
        "alike in all cases, such as t1 and flair. Put masks of one case into a folder masks/; list other cases in a "
        "datalist.json."
    )
    unlike = touch(tmp_path / "d", *(f"p{p}/{f}.nii.gz" for p in (1, 2) for f in (f"a{p}", f"b{p}", "seg")))
    assert message(unlike).startswith("ROOT: more than one image or label of a case: p1/ (a1.nii.gz, b1.nii.gz, ")
    shares = touch(tmp_path / "c", *(f"{s}/a/{f}.nii.gz" for s in ("train", "test") for f in ("image", "label")))
    assert message(shares).startswith("ROOT: the folders test/, train/ look like shares of a data set, not like ")


# -- several channels of a case


def channels_of(root: Path) -> dict[str, list[str]]:
    """Label -> images, as paths below the folder."""
    data = recognise(root, num_fold=None)
    return {
        c.label.relative_to(root).as_posix(): [p.relative_to(root).as_posix() for p in c.images]
        for c in data.training
        if c.label
    }


def test_channels_in_a_folder_for_each_case(tmp_path: Path) -> None:
    """BraTS' layout; the last case lacks a channel, the one before a label."""
    words = ("t2", "t1ce", "flair", "t1")
    touch(tmp_path, *(f"B_{c}/B_{c}_{w}.nii.gz" for c in range(12) for w in (*words, "seg")))
    touch(tmp_path, *(f"B_12/B_12_{w}.nii.gz" for w in words), *(f"B_13/B_13_{w}.nii.gz" for w in ("t1", "t2", "seg")))
    layout = find_layout(tmp_path)
    assert layout.kind == "folder of cases with labels"
    assert channels_of(tmp_path) == {
        f"B_{c}/B_{c}_seg.nii.gz": [f"B_{c}/B_{c}_{w}.nii.gz" for w in ("flair", "t1", "t1ce", "t2")] for c in range(12)
    }
    assert [len(item["image"]) for item in layout.plain["unlabeled"]] == [4]
    assert layout.plain["modality"] == {"0": "flair", "1": "t1", "2": "t1ce", "3": "t2"}
    assert layout.notes == (
        "each case has 4 channels: flair, t1, t1ce, t2 (`image` in datalist.json).",
        "left out, cases without all channels (flair, t1, t1ce, t2), or of labels alone: B_13.",
    )


@pytest.mark.parametrize(
    "names",
    [
        ("{c}/T1.nii.gz", "{c}/FLAIR.nii.gz", "{c}/wmh.nii.gz"),  # the WMH challenge
        ("{c}/FLAIR_{c}.nii.gz", "{c}/T1_{c}.nii.gz", "{c}/mask_{c}.nii.gz"),
        ("{c}/orig/T1.nii.gz", "{c}/orig/FLAIR.nii.gz", "{c}/orig/mask.nii.gz"),
        ("{c}/brain_FLAIR.nii.gz", "{c}/brain_T1.nii.gz", "{c}/brainmask.nii.gz", "{c}/lesion.nii.gz"),
        ("{c}_flair.mha", "{c}_t1.mha", "{c}_seg.mha"),
        ("{c}-FLAIR.nrrd", "{c}-T1.nrrd", "{c}.seg.nrrd"),
        ("{c}_0000.nii.gz", "{c}_0001.nii.gz", "{c}_seg.nii.gz"),
        ("images/{c}_flair.nii.gz", "images/{c}_t1.nii.gz", "labels/{c}.nii.gz"),
        ("images/{c}_FLAIR.nii.gz", "images/{c}_T1.nii.gz", "labels/{c}_seg.nii.gz"),
        (
            "sub-{c}/anat/sub-{c}_FLAIR.nii.gz",
            "sub-{c}/anat/sub-{c}_T1w.nii.gz",
            "derivatives/lesions/sub-{c}/anat/sub-{c}_label-lesion_mask.nii.gz",
            "derivatives/bet/sub-{c}/anat/sub-{c}_desc-brain_mask.nii.gz",
            "derivatives/bet/sub-{c}/anat/sub-{c}_desc-brain_T1w.nii.gz",
        ),
        (
            "rawdata/sub-{c}/ses-1/sub-{c}_ses-1_adc.nii.gz",
            "rawdata/sub-{c}/ses-1/sub-{c}_ses-1_dwi.nii.gz",
            "derivatives/sub-{c}/ses-1/sub-{c}_ses-1_msk.nii.gz",  # ISLES 2022
        ),
    ],
    ids=lambda names: names[-1],
)
def test_two_channels_in_other_layouts(names: tuple[str, ...], tmp_path: Path) -> None:
    touch(tmp_path, *(name.format(c=c) for c in "abcde" for name in names))
    found = channels_of(tmp_path)
    assert sorted(found.values()) == [sorted(name.format(c=c) for name in names[:2]) for c in "abcde"]
    label = next(name for name in names if re.search(r"wmh|seg|label|msk|lesion|mask_|/mask", name))
    assert sorted(found) == [label.format(c=c) for c in "abcde"]
    notes = find_layout(tmp_path).notes
    numbers = "0000, 0001" in notes[0] if notes else True  # files of nnU-Net's numbers
    assert numbers or notes[0].lower().startswith("each case has 2 channels: ")


def test_one_image_beside_its_label_in_one_folder(tmp_path: Path) -> None:
    touch(tmp_path, *(f"case_{c:04d}{e}.nii.gz" for c in range(5) for e in ("", "_seg")), "case_0007.nii.gz")
    assert channels_of(tmp_path) == {f"case_{c:04d}_seg.nii.gz": [f"case_{c:04d}.nii.gz"] for c in range(5)}
    assert find_layout(tmp_path).kind == "folder of images beside labels"
    assert [c.name for c in recognise(tmp_path).unlabeled] == ["case_0007"]


def test_frames_with_a_label_each_in_a_folder(tmp_path: Path) -> None:
    """ACDC's layout; the film has no label."""
    frames = [f"p{p}/p{p}_frame{f:02d}" for p in range(5) for f in (1, 12 - p)]
    touch(tmp_path, *(f"{f}{e}.nii.gz" for f in frames for e in ("", "_gt")))
    touch(tmp_path, *(f"p{p}/p{p}_4d.nii.gz" for p in range(5)))
    data = recognise(tmp_path)
    assert channels_of(tmp_path) == {f"{f}_gt.nii.gz": [f"{f}.nii.gz"] for f in frames}
    assert {c.group for c in data.training} == {f"p{p}" for p in range(5)}
    assert data.unlabeled == ()
    assert find_layout(tmp_path).notes[1] == (
        "left out, images without a label, beside or below some with one: p0/p0_4d.nii.gz, p1/p1_4d.nii.gz, "
        "p2/p2_4d.nii.gz, p3/p3_4d.nii.gz, p4/p4_4d.nii.gz."
    )


@pytest.mark.parametrize(
    ("names", "image", "label", "note"),
    [
        (("volume-{c}", "segmentation-{c}"), "volume-{c}", "segmentation-{c}", ""),  # LiTS
        (("{c}/{c}_ana", "{c}/{c}_seg_ana", "{c}/{c}_ana_brainmask"), "{c}/{c}_ana", "{c}/{c}_seg_ana", ""),  # IBSR
        (("{c}/my_roi", "{c}/label"), "{c}/my_roi", "{c}/label", ""),
        (("{c}", "{c}_seg", "{c}_pred"), "{c}", "{c}_seg", "left out, called like predictions: 5 files."),
        (
            ("{c}/image", "{c}/segmentation", "{c}/instances/kidney_annotation-1"),  # KiTS23
            "{c}/image",
            "{c}/segmentation",
            "left out, images without a label, beside or below some with one: 000/instances/kidney_annotation-1.nii.gz",
        ),
        (
            ("images/{c}/{c}_9_t2w", "images/{c}/{c}_9_adc", "images/{c}/{c}_9_cor", "labels/{c}_9"),  # PI-CAI
            "images/{c}/{c}_9_adc images/{c}/{c}_9_t2w",
            "labels/{c}_9",
            "left out, images without a label that lack channels, or are no channel: images/000/000_9_cor.nii.gz, ",
        ),
        (
            ("{c}/{c}_FLAIR", "{c}/{c}_T1", "{c}/{c}_T1_bias", "{c}/{c}_tumor_seg"),  # UCSF-PDGM
            "{c}/{c}_FLAIR {c}/{c}_T1",
            "{c}/{c}_tumor_seg",
            "left out, images of no known kind: t1_bias. To learn from them, list them in datalist.json.",
        ),
        (
            ("imagesTr/{c}__CT", "imagesTr/{c}__PT", "labelsTr/{c}"),
            "imagesTr/{c}__CT imagesTr/{c}__PT",
            "labelsTr/{c}",
            "",
        ),
        (("images/{c}/t1", "images/{c}/t2", "labels/{c}/seg"), "images/{c}/t1 images/{c}/t2", "labels/{c}/seg", ""),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_layouts_of_public_data_sets(names: tuple[str, ...], image: str, label: str, note: str, tmp_path: Path) -> None:
    cases = [f"00{c}" for c in range(5)]
    touch(tmp_path, *(f"{name.format(c=c)}.nii.gz" for c in cases for name in names))
    assert channels_of(tmp_path) == {
        f"{label.format(c=c)}.nii.gz": [f"{i.format(c=c)}.nii.gz" for i in image.split()] for c in cases
    }
    assert recognise(tmp_path).unlabeled == ()
    assert not note or any(n.startswith(note) for n in find_layout(tmp_path).notes)


def test_channels_of_pairs_are_in_one_order_and_nothing_is_mixed(tmp_path: Path) -> None:
    """Upper case sorts before lower case; cases that lack a channel are left out; files of two patients are none."""
    words = [("T1", "flair"), ("t1", "flair"), ("T1", "FLAIR")] * 6
    touch(tmp_path / "a", *(f"images/{c}_{w}.nii.gz" for c, pair in enumerate(words) for w in pair))
    touch(tmp_path / "a", *(f"labels/{c}.nii.gz" for c in range(19)), "images/18_t1.nii.gz", "images/18_t2.nii.gz")
    found = channels_of(tmp_path / "a")
    assert found == {
        f"labels/{c}.nii.gz": [f"images/{c}_{w}.nii.gz" for w in pair[::-1]] for c, pair in enumerate(words)
    }
    assert find_layout(tmp_path / "a").notes == (
        "each case has 2 channels: flair, t1 (`image` in datalist.json).",
        "left out, cases without all channels (flair, t1): labels/18.nii.gz.",
        "left out, images that not all cases have, or of another grid: t2.",
    )
    touch(tmp_path / "b", *(f"images/site{s}/{c}.nii.gz" for s in "AB" for c in range(3)))
    touch(tmp_path / "b", *(f"labels/{c}.nii.gz" for c in range(3)))
    assert message(tmp_path / "b").startswith(
        "ROOT/labels: several images for 0.nii.gz: images/siteA/0.nii.gz, images/s"
    )


def test_test_images_have_the_channels_of_training(tmp_path: Path) -> None:
    pairs = [f"{f}Tr/{c}_{w}.nii.gz" for f in ("images", "labels") for c in range(5) for w in ("ct", "mr")]
    touch(tmp_path / "a", *pairs, "imagesTs/9_ct.nii.gz", "imagesTs/9_mr.nii.gz")
    assert [len(c.images) for c in recognise(tmp_path / "a").testing] == [1, 1]
    touch(tmp_path / "b", *(f"imagesTr/{c}_{w}.nii.gz" for c in range(5) for w in ("CT", "PT")))
    touch(tmp_path / "b", *(f"labelsTr/{c}.nii.gz" for c in range(5)))
    touch(tmp_path / "b", "imagesTs/9_PT.nii.gz", "imagesTs/9_CT.nii.gz", "imagesTs/10_CT.nii.gz")
    assert [[p.name for p in c.images] for c in recognise(tmp_path / "b").testing] == [["9_CT.nii.gz", "9_PT.nii.gz"]]
    assert find_layout(tmp_path / "b").notes[1].endswith("lack channels, or are no channel: imagesTs/10_CT.nii.gz.")


def test_sessions_in_folders_alone_are_not_mixed(tmp_path: Path) -> None:
    """The label of one session is not that of another's image."""
    for c in range(5):
        touch(tmp_path, *(f"sub-{c}/ses-{s}/anat/sub-{c}_T1w.nii.gz" for s in (1, 2)))
        touch(tmp_path, f"sub-{c}/ses-1/anat/sub-{c}_seg.nii.gz")
    where = "sub-{}/ses-1/anat/sub-{}_{}.nii.gz"
    assert channels_of(tmp_path) == {where.format(c, c, "seg"): [where.format(c, c, "T1w")] for c in range(5)}


def test_an_image_made_of_another_is_no_channel_and_dropped_labels_are_told_of(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{c}/{n}.nii.gz" for c in range(5) for n in ("T1w", "T1w_brain", "brain_mask", "lesion_mask")))
    assert channels_of(tmp_path)["0/lesion_mask.nii.gz"] == ["0/T1w.nii.gz"]
    notes = find_layout(tmp_path).notes
    assert "left out, images of no known kind: t1w_brain. To learn from them, list them in datalist.json." in notes
    assert notes[-1].startswith("left out, labels beside others, such as masks of the brain: 0/brain_mask.nii.gz, 1/")


def test_an_image_beside_one_that_has_the_label_is_no_case_of_its_own(tmp_path: Path) -> None:
    touch(tmp_path, *(f"p{c}_{n}.nii.gz" for c in range(5) for n in ("ct", "pet", "ct_seg")), "p9_ct.nii.gz")
    assert channels_of(tmp_path) == {f"p{c}_ct_seg.nii.gz": [f"p{c}_ct.nii.gz"] for c in range(5)}
    assert [c.name for c in recognise(tmp_path).unlabeled] == ["p9_ct"]
    assert (
        find_layout(tmp_path)
        .notes[0]
        .startswith("left out, images without a label, beside or below some with one: p0_pet.nii.gz, p1_pet.nii.gz, ")
    )


def test_the_way_with_most_cases_is_taken(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{c}{e}.nii.gz" for c in range(8) for e in ("", "_seg")))
    touch(tmp_path, *(f"extra/{c}/{n}.nii.gz" for c in "ab" for n in ("ct", "seg")))
    assert len(recognise(tmp_path).training) == 8


def test_all_cases_in_one_folder_are_told_of(tmp_path: Path) -> None:
    touch(tmp_path, *(f"training/c_{c}_{name}.nii.gz" for c in range(5) for name in ("ceT1", "hrT2", "Label")))
    assert message(tmp_path) == "ROOT: all cases are in training/. Give that folder, if those in it are patients."
    assert set(map(len, channels_of(tmp_path / "training").values())) == {2}


def test_images_that_few_cases_have_are_no_channels(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{c}/{name}.nii.gz" for c in "abcde" for name in ("t1", "t2", "seg")), "a/swi.nii.gz")
    assert channels_of(tmp_path)["a/seg.nii.gz"] == ["a/t1.nii.gz", "a/t2.nii.gz"]
    assert find_layout(tmp_path).notes[1] == "left out, images that not all cases have: swi (1 case)."


def write(path: Path, shape: tuple[int, int, int] = (8, 8, 8), *, label: bool = False) -> None:
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image((values > 0).astype(np.uint8) if label else values, np.eye(4)), path)


def test_what_lies_on_another_grid_or_looks_like_a_label_is_no_channel(tmp_path: Path) -> None:
    for case in "abcde":
        for name in ("one", "two"):
            write(tmp_path / case / f"{name}.nii.gz")
        write(tmp_path / case / "three.nii.gz", (9, 9, 9))
        write(tmp_path / case / "liver.nii.gz", label=True)
        write(tmp_path / case / "seg.nii.gz", label=True)
    assert channels_of(tmp_path)["a/seg.nii.gz"] == ["a/one.nii.gz", "a/two.nii.gz"]
    assert find_layout(tmp_path).notes == (
        "each case has 2 channels: one, two (`image` in datalist.json).",
        "left out, images that hold few whole numbers, as labels do: liver. If they are masks of classes, put all of a "
        "case into a folder masks/.",
        "left out, images that do not lie on their label's grid: three, as in a/three.nii.gz (shape (9, 9, 9) against "
        "(8, 8, 8)). Resample them to it to learn from them.",
    )


def test_a_mask_is_not_taken_for_the_image_of_its_label(tmp_path: Path) -> None:
    for case in "abc":
        write(tmp_path / case / "ct.nii.gz")
        for name in ("liver", "liver_mask"):
            write(tmp_path / case / f"{name}.nii.gz", label=True)
    assert message(tmp_path) == (
        "ROOT/a/liver.nii.gz: its label would be liver_mask.nii.gz, by its name, but it looks like a label itself: it "
        "holds few whole numbers. List the cases in a datalist.json."
    )


def test_masks_in_a_folder_are_the_label_where_a_map_lies_beside_them(tmp_path: Path) -> None:
    """AbdomenAtlas' layout."""
    organs = ("liver", "spleen")
    for case in "abcde":
        touch(tmp_path, f"{case}/ct.nii.gz", f"{case}/combined_labels.nii.gz")
        touch(tmp_path, *(f"{case}/segmentations/{o}.nii.gz" for o in organs))
    assert find_layout(tmp_path).kind == "folder of cases with masks"
    assert find_layout(tmp_path).plain["training"][0] == {"image": "a/ct.nii.gz", "label": "a/segmentations"}


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
