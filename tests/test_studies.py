"""`init` on what leaves an archive: folders of patients with DICOM, pairs by what files say; and folders of masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from other_formats import _item, rtstruct_of, save_dicom, save_slices, seg_of, slices_of, write_series
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from test_dicom import OBLIQUE, localizer, report
from test_segmentations import SHAPE, box, expected, masks, write_masks

from autoseg.analyzer.folder import analyze_folder
from autoseg.cli.init import InitResult, init_data_folder
from autoseg.data.datalists.cases import read_case_label
from autoseg.data.datalists.datalist import read_datalist
from autoseg.data.volumes import read_label
from autoseg.errors import DataError
from autoseg.inference.items import find_items


def scan(number: int, **fields: Any) -> list[Dataset]:
    """A CT; its study, series and patient are told apart by its number."""
    array = np.random.default_rng(number).integers(-900, 900, SHAPE).astype("i2")
    told = {
        "PatientID": f"PID{number}",
        "PatientName": f"ROE{number}^JANE",
        "StudyInstanceUID": f"1.2.826.0.1.3680043.8.498.{number}.1",
        "FrameOfReferenceUID": f"1.2.826.0.1.3680043.8.498.{number}.2",
        "SeriesInstanceUID": f"1.2.826.0.1.3680043.8.498.{number}.3",
    }
    return slices_of(array, OBLIQUE, **told | fields)


def drawn_on(data: Dataset, slices: list[Dataset]) -> Dataset:
    """A segmentation with the fields that say what it belongs to."""
    first = slices[0]
    for name in ("PatientID", "PatientName", "StudyInstanceUID", "FrameOfReferenceUID"):
        setattr(data, name, first[name].value)
    series = _item(SeriesInstanceUID=first.SeriesInstanceUID)
    if data.Modality == "SEG":
        data.ReferencedSeriesSequence = [series]
    else:
        visit = _item(RTReferencedSeriesSequence=[series])
        data.ReferencedFrameOfReferenceSequence = [_item(RTReferencedStudySequence=[visit])]
    return data


def seg() -> Dataset:
    return seg_of(masks(), OBLIQUE)


def archive(root: Path) -> Path:
    """Four patients: SEG, RTSTRUCT, one with a second series and no names that tell, two scans of one patient."""
    one = scan(1)
    save_slices(root / "a" / "x", one)
    save_slices(root / "a" / "scout", [*localizer()])
    save_dicom(root / "a" / "y" / "0001", drawn_on(seg(), one))
    save_dicom(root / "a" / "dose", report())
    two = scan(2)
    contours = {"liver": [box(0.5, 4.5, 2)], "tumor": [box(4.5, 6.5, 2)]}
    save_slices(root / "b", two)
    save_dicom(root / "b" / "RS", drawn_on(rtstruct_of(contours), two))
    three, other = scan(3), scan(13, StudyInstanceUID=scan(3)[0].StudyInstanceUID, Modality="MR")
    save_slices(root / "c" / "1", other)
    save_slices(root / "c" / "2", three)
    save_dicom(root / "c" / "3" / "s", drawn_on(seg(), three))
    again = scan(4, PatientID="PID3")
    save_slices(root / "e" / "1", again)
    data = drawn_on(seg(), again)
    del data.ReferencedSeriesSequence  # then the frame of reference tells
    save_dicom(root / "e" / "2" / "s", data)
    save_slices(root / "f", scan(5))
    return root


def items(output: Path) -> dict[str, list[dict[str, Any]]]:
    plain = json.loads((output / "datalist.json").read_text())
    return {
        role: [{k: v for k, v in i.items() if k != "fold"} for i in plain[role]] for role in plain if role != "labels"
    }


def init(root: Path, output: Path) -> InitResult:
    result = init_data_folder(root, output, num_fold=2)
    written = str(result) + (output / "datalist.json").read_text() + (output / "input.yaml").read_text()
    assert not any(word in written for word in ("PID", "ROE", "JANE", "1952", "3680043"))
    return result


def test_pairs_are_made_by_what_files_say(tmp_path: Path) -> None:
    root = archive(tmp_path / "data")
    result = init(root, tmp_path / "out")
    assert (result.recognised, result.num_training, result.num_unlabeled) == ("DICOM of patients", 4, 1)
    assert items(tmp_path / "out") == {
        "training": [
            {"image": "a/x", "label": "a/y/0001"},
            {"image": "b", "label": "b/RS"},
            {"image": "c/2", "label": "c/3/s", "group": "1"},
            {"image": "e/1", "label": "e/2/s", "group": "1"},
        ],
        "unlabeled": [{"image": "f"}],
    }
    assert result.classes == {"liver": (1,), "tumor": (2,)}
    assert (result.modality, result.modality_reason) == ("CT", "4 images say CT")
    assert [note for note in result.notes if note.startswith("left out")] == [
        "left out, series of studies in which others have the segmentation: 1 MR.",
        "left out, no volumes: 1 CT localizer of 5 images, 1 SR file.",
    ]
    listed = read_datalist(tmp_path / "out" / "datalist.json", root)
    nib.save(nib.Nifti1Image(expected(), OBLIQUE), tmp_path / "same.nii")
    truth = read_label(tmp_path / "same.nii").array
    for case in (listed.training[0], listed.training[2], listed.training[3]):
        np.testing.assert_array_equal(read_case_label(case).array, truth)
    folds = [case.fold for case in listed.training]
    assert folds[2] == folds[3]
    analysis = analyze_folder(root, progress=False)
    assert analysis.faults == ()
    assert analysis.num_cases["training"] == 4


def test_several_segmentations_of_a_scan_are_one_label_where_they_have_a_folder(tmp_path: Path) -> None:
    for number in (1, 2):
        slices = scan(number)
        save_slices(tmp_path / "data" / f"p{number}" / "ct", slices)
        for name, mask in masks().items():
            data = drawn_on(seg_of({name: mask}, OBLIQUE), slices)
            save_dicom(tmp_path / "data" / f"p{number}" / "segs" / name, data)
    init(tmp_path / "data", tmp_path / "out")
    listed = read_datalist(tmp_path / "out" / "datalist.json", tmp_path / "data")
    assert [case.label.name for case in listed.training if case.label] == ["segs", "segs"]
    assert set(np.unique(read_case_label(listed.training[0]).array)) == {0, 1, 2}
    (tmp_path / "data" / "p1" / "segs" / "liver").rename(tmp_path / "data" / "p1" / "ct" / "liver")
    (tmp_path / "data" / "p2" / "segs" / "liver").rename(tmp_path / "data" / "p1" / "other")
    with pytest.raises(DataError, match="one of 2 segmentations of a scan, among other files"):
        init_data_folder(tmp_path / "data", tmp_path / "out2", num_fold=2)


def test_one_number_in_all_files_is_no_patient(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        slices = scan(number, PatientID="ANON", PatientName="ANON")
        save_slices(tmp_path / "data" / f"p{number}" / "ct", slices)
        save_dicom(tmp_path / "data" / f"p{number}" / "seg", drawn_on(seg(), slices))
    init(tmp_path / "data", tmp_path / "out")
    assert all("group" not in item for item in items(tmp_path / "out")["training"])


def test_segmentations_without_their_scan_are_named(tmp_path: Path) -> None:
    root = archive(tmp_path / "data")
    save_dicom(root / "g" / "s", drawn_on(seg(), scan(9)))
    assert "left out, segmentations of scans that are not there: g/s." in init(root, tmp_path / "out").notes


def test_patients_in_names_of_folders_are_told(tmp_path: Path) -> None:
    for number in (1, 2):
        slices = scan(number)
        save_slices(tmp_path / "data" / f"roe{number} jane", slices)
        save_dicom(tmp_path / "data" / f"roe{number} jane" / "seg", drawn_on(seg(), slices))
    notes = init_data_folder(tmp_path / "data", tmp_path / "out", num_fold=2).notes
    assert any(n.startswith("names of folders or files hold a patient's name or number in 2 of 2 cases") for n in notes)


def test_folders_of_images_beside_labels_are_grouped_by_patient_and_know_their_modality(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for number in range(4):
        slices = scan(number, PatientID=f"PID{number % 3}", Modality="MR")
        save_slices(root / "images" / f"p{number}", slices)
        save_dicom(root / "labels" / f"p{number}.dcm", seg())
    result = init(root, tmp_path / "out")
    assert [item.get("group") for item in items(tmp_path / "out")["training"]] == ["1", None, None, "1"]
    assert (result.modality, result.modality_reason) == ("MRI", "4 images say MR")


def test_a_folder_of_cases_with_masks_is_a_data_set(tmp_path: Path) -> None:
    for number in range(3):
        case = tmp_path / "data" / f"s{number}"
        write_masks(case / "segmentations")
        nib.save(nib.Nifti1Image(np.random.default_rng(number).random(SHAPE), OBLIQUE), case / "ct.nii.gz")
    result = init(tmp_path / "data", tmp_path / "out")
    assert (result.recognised, result.num_training) == ("folder of cases with masks", 3)
    assert result.classes == {"liver": (1,), "tumor": (2,)}
    assert analyze_folder(tmp_path / "data", progress=False).faults == ()
    write_masks(tmp_path / "data" / "s3" / "segmentations")
    (tmp_path / "data" / "s3" / "ct.mnc").write_bytes(b"an image that is not read")
    notes = init(tmp_path / "data", tmp_path / "out3").notes
    assert "left out, folders of several images, or of labels alone: s3/segmentations." in notes
    nib.save(nib.Nifti1Image(np.zeros(SHAPE), OBLIQUE), tmp_path / "data" / "s1" / "mr.nii.gz")
    with pytest.raises(
        DataError, match=r"label of a case: s1/ \(ct\.nii\.gz, mr\.nii\.gz, segmentations\)\. Expected one"
    ):
        init_data_folder(tmp_path / "data", tmp_path / "out2", num_fold=2)


PICTURES = (
    " It holds 2D pictures (2 .jpg, .png). autoseg reads medical formats: put the slices of a scan into one file, e.g. "
    "with 3D Slicer, or write each picture as a NIfTI file of one slice."
)


def test_pictures_say_what_works(tmp_path: Path) -> None:
    for folder in ("images", "labels"):
        (tmp_path / "data" / folder).mkdir(parents=True)
        for name in ("a.png", "b.jpg"):
            (tmp_path / "data" / folder / name).write_bytes(b"\x89PNG")
    for raised in (
        lambda: init_data_folder(tmp_path / "data", tmp_path / "out"),
        lambda: analyze_folder(tmp_path / "data" / "images"),
        lambda: find_items(tmp_path / "data" / "images", tmp_path / "out", 1),
    ):
        with pytest.raises(Exception) as caught:
            raised()
        assert PICTURES in str(caught.value)


def test_predictions_of_an_archive_are_called_by_the_folders_that_tell_them_apart(tmp_path: Path) -> None:
    array = np.zeros((6, 5, 4), np.int16)
    for patient in "ab":
        for study in "12":
            write_series(tmp_path / patient / study / "t1", array, np.eye(4), SeriesInstanceUID=generate_uid())
    items = find_items(tmp_path, tmp_path / "out", 1, "nifti")
    assert [item.target.name for item in items] == [f"{p}_{s}_t1.nii.gz" for p in "ab" for s in "12"]


def test_a_medium_with_its_table_of_contents_has_nothing_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_series(tmp_path / "PT000000", np.zeros((6, 5, 4), np.int16), np.eye(4))
    (tmp_path / "DICOMDIR").write_bytes(b"of no account")
    (item,) = find_items(tmp_path, tmp_path / "out", 1, "nifti")
    assert item.target.name == "PT000000.nii.gz"
    assert caplog.text == ""
