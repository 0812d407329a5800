"""Folders of binary masks to label files."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from analysis_data import AFFINE, SHAPE, save

from autoseg.analyzer.merge_masks import merge_masks
from autoseg.errors import DataError

NAMES = ("liver", "spleen", "stomach")
LPS = np.array([[0, 0, -2.0, 3], [-1.0, 0, 0, 4], [0, 1.5, 0, -7], [0, 0, 0, 1]])


def boxes(overlap: int = 0) -> dict[str, np.ndarray]:
    """A mask per class, side by side along the first axis, with `overlap` planes of 16 voxels in common."""
    masks = {}
    for place, name in enumerate(NAMES):
        masks[name] = np.zeros(SHAPE, np.uint8)
        masks[name][4 * place : 4 * place + 4 + overlap, 2:6, 2:6] = 1
    return masks


def write(folder: Path, masks: dict[str, np.ndarray], affine: np.ndarray = AFFINE) -> None:
    for name, mask in masks.items():
        save(folder / f"{name}.nii.gz", mask, affine)


def read(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


@pytest.mark.parametrize("inner", ["", "segmentations"])
@pytest.mark.parametrize("affine", [AFFINE, LPS], ids=["RAS", "LPS"])
def test_masks_become_one_label_on_their_own_grid(tmp_path: Path, inner: str, affine: np.ndarray) -> None:
    for case in ("a", "b"):
        write(tmp_path / "masks" / case / inner, boxes(), affine)
    report = merge_masks(tmp_path / "masks", tmp_path / "out")
    assert report.labels == {1: "liver", 2: "spleen", 3: "stomach"}
    assert (report.cases, report.overlaps, report.missing) == (("a", "b"), (), ())
    assert report.text() == "2 label files of 3 classes"
    expected = sum((i + 1) * mask for i, mask in enumerate(boxes().values()))
    np.testing.assert_array_equal(read(tmp_path / "out" / "a.nii.gz"), expected)
    np.testing.assert_allclose(nib.load(tmp_path / "out" / "a.nii.gz").affine, affine)
    assert json.loads((tmp_path / "out" / "labels.json").read_text()) == {"1": "liver", "2": "spleen", "3": "stomach"}


def test_the_order_given_counts_and_other_masks_are_left_out(tmp_path: Path) -> None:
    write(tmp_path / "masks" / "a", boxes())
    report = merge_masks(tmp_path / "masks", tmp_path / "out", classes=["stomach", "liver"])
    assert report.labels == {1: "stomach", 2: "liver"}
    label = read(tmp_path / "out" / "a.nii.gz")
    np.testing.assert_array_equal(label == 1, boxes()["stomach"])
    assert label.max() == 2


def test_overlaps_and_missing_masks_are_reported(tmp_path: Path) -> None:
    write(tmp_path / "masks" / "a", boxes(overlap=1))
    write(tmp_path / "masks" / "b", {n: m for n, m in boxes().items() if n != "spleen"})
    report = merge_masks(tmp_path / "masks", tmp_path / "out")
    assert report.overlaps == (("a", "liver", "spleen", 16), ("a", "spleen", "stomach", 16))
    assert report.missing == (("b", "spleen"),)
    assert report.text().splitlines() == [
        "2 label files of 3 classes",
        "Overlaps (2); the later class keeps the voxels:",
        "- a: liver and spleen, 16 voxels",
        "- a: spleen and stomach, 16 voxels",
        "Masks that are not there (1); taken as empty:",
        "- b: spleen",
    ]
    label = read(tmp_path / "out" / "a.nii.gz")
    assert [(label == v).sum() for v in (1, 2, 3)] == [64, 64, 80]


def test_more_than_255_classes(tmp_path: Path) -> None:
    for number in range(300):
        mask = np.zeros((8, 8, 8), np.uint8)
        mask.flat[number] = 1
        save(tmp_path / "masks" / "a" / f"c{number:03}.nii", mask)
    merge_masks(tmp_path / "masks", tmp_path / "out")
    label = read(tmp_path / "out" / "a.nii.gz")
    assert label.dtype == np.uint16
    np.testing.assert_array_equal(label.ravel()[:300], np.arange(1, 301))


def test_masks_of_255_and_of_bools_stored_as_floats(tmp_path: Path) -> None:
    masks = boxes()
    write(tmp_path / "masks" / "a", {"liver": masks["liver"] * 255, "spleen": masks["spleen"].astype(np.float32)})
    merge_masks(tmp_path / "masks", tmp_path / "out")
    np.testing.assert_array_equal(read(tmp_path / "out" / "a.nii.gz"), masks["liver"] + 2 * masks["spleen"])


def test_all_faults_at_once_and_nothing_half_done(tmp_path: Path) -> None:
    masks = boxes()
    masks["spleen"][0, 0, 0] = 7
    write(tmp_path / "masks" / "a", masks)
    write(tmp_path / "masks" / "b", boxes())
    save(tmp_path / "masks" / "b" / "spleen.nii.gz", boxes()["spleen"][1:])
    (tmp_path / "masks" / "b" / "stomach.nii.gz").write_bytes(b"")
    with pytest.raises(DataError) as error:
        merge_masks(tmp_path / "masks", tmp_path / "out")
    assert error.value.messages == (
        "a (spleen.nii.gz): more than one value besides 0. Expected a binary mask. Is it a label map of all classes?",
        "b (spleen.nii.gz): not on the grid of liver.nii.gz: shape (13, 12, 10) against (14, 12, 10). "
        "Export the masks again.",
        "b (stomach.nii.gz): 0 bytes are too few for a NIfTI header. Export it again.",
    )
    assert not (tmp_path / "out").exists()


def test_wrong_folders_and_names(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none: no such folder"):
        merge_masks(tmp_path / "none", tmp_path / "out")
    (tmp_path / "masks").mkdir()
    with pytest.raises(DataError, match="no mask in it. Expected a folder per case .* masks/case_001/liver.nii.gz"):
        merge_masks(tmp_path / "masks", tmp_path / "out")
    write(tmp_path / "masks" / "a", boxes())
    with pytest.raises(DataError, match="is the folder of the masks"):
        merge_masks(tmp_path / "masks", tmp_path / "masks")
    with pytest.raises(DataError) as error:
        merge_masks(tmp_path / "masks", tmp_path / "out", classes=["liver", "lung", "liver"])
    assert error.value.messages == (
        f"{tmp_path / 'masks'}: no case has a mask lung. Found liver, spleen, stomach.",
        "classes: liver is named twice. Name each class once.",
    )
