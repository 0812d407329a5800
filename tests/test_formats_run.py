"""A whole run on a data set in which every case has another format: the result of NIfTI, and no patient's name."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import nibabel as nib
import nrrd
import numpy as np
import pytest
import torch
import yaml
from other_formats import save_dicom, seg_of, write_image, write_series
from pydicom.uid import generate_uid
from test_formats_everywhere import AFFINE, without_paths, write_segmentation

from autoseg.cli.main import run_command
from autoseg.data.grid import Grid
from autoseg.data.phantoms import make_phantom
from autoseg.export.targets import export

SHAPE = (26, 24, 20)
PLANTED = {
    "PatientName": "PLANTEDNAME^GIVEN",
    "PatientID": "PLANTEDNUMBER",
    "PatientBirthDate": "19310704",
    "AccessionNumber": "PLANTEDACCESSION",
    "OtherPatientIDs": "PLANTEDOTHER",
    "PatientComments": "PLANTEDCOMMENT",
    "InstitutionName": "PLANTEDHOSPITAL",
    "SeriesDescription": "PLANTEDSERIES",
}
"""Fields of DICOM that must not come up anywhere; the same words stand in the headers of the other formats."""
WORDS = ("PLANTED", "GIVEN", "19310704")
IMAGES = (".nii.gz", ".nrrd", ".mha", "", ".mgz", "")
"""None: a DICOM series. The last one is to test."""
LABELS = (".nii.gz", ".seg.nrrd", ".mha", ".dcm", ".mgz", ".dcm")
NAMES = {1: "sphere", 2: "box"}
SMALL = {
    **{"num_epochs": 2, "batch_size": 2, "num_steps_per_epoch": 2, "num_epochs_per_validation": 1},
    **{"precision": "fp32", "algos": ["segresnet"], "num_workers": 1},
    "segresnet": {"init_filters": 8, "blocks_down": [1, 1], "roi_size": [16, 16, 16], "learning_rate": 0.003},
}


def write(path: Path, array: np.ndarray) -> None:
    """Write a volume in the format of the path's suffix, with a patient in its header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    comment = " ".join(PLANTED.values())
    if path.name.endswith(".seg.nrrd"):
        write_segmentation(path, array, NAMES)
    elif path.suffix == ".dcm":
        masks = {name: array == value for value, name in reversed(NAMES.items())}
        save_dicom(path, seg_of(masks, AFFINE, **PLANTED))
    elif not path.suffix:
        write_series(path, array, AFFINE, SeriesInstanceUID=generate_uid(), **PLANTED)
    elif path.suffix in (".mha", ".mgz"):
        write_image(path, array, AFFINE)
    elif path.suffix == ".nrrd":
        header: dict[str, Any] = {"space": "RAS", "space directions": AFFINE[:3, :3].T, "space origin": AFFINE[:3, 3]}
        nrrd.write(str(path), array, header | {"encoding": "gzip", "content": comment, "patient": comment})
    else:
        image = nib.Nifti1Image(array, AFFINE)
        image.header["descrip"], image.header["intent_name"] = comment[:79], "PLANTED"
        image.header["aux_file"] = "PLANTEDFILE"
        nib.save(image, path)


def data_set(folder: Path, images: tuple[str, ...], labels: tuple[str, ...]) -> Path:
    """A list of training cases and one to test, whose suffixes are given, and an input.yaml."""
    items = []
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        (channel,), truth = make_phantom(Grid(shape=SHAPE, affine=AFFINE), np.random.default_rng(number))
        names = {"image": f"images/p{number}{image}", "label": f"labels/p{number}{label}"}
        write(folder / names["image"], np.rint(channel * 100).astype("i2"))
        write(folder / names["label"], truth)
        items.append({**names, "fold": number % 2})
    testing = [{k: v for k, v in items.pop().items() if k != "fold"}]
    labelled = {str(value): name for value, name in NAMES.items()}
    listed = {"training": items, "testing": testing, "labels": labelled}
    (folder / "datalist.json").write_text(json.dumps(listed))
    settings = {"modality": "MRI", "datalist": "datalist.json", "dataroot": ".", **SMALL}
    (folder / "input.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Finished runs of the all-NIfTI data set and of the mixed one."""
    folder = tmp_path_factory.mktemp("runs")
    nifti = data_set(folder / "nifti", (".nii.gz",) * 6, (".nii.gz",) * 6)
    mixed = data_set(folder / "mixed", IMAGES, LABELS)
    for root in (nifti, mixed):
        assert run_command(["run", "--input", str(root / "input.yaml")]) == 0
        predictions = root / "predictions"
        command = ["predict", "--work_dir", str(root / "work_dir"), "--image", str(root / "images")]
        assert run_command([*command, "--output", str(predictions), "--format", "nifti"]) == 0
    return nifti, mixed


def test_training_and_scores_are_those_of_nifti_bit_by_bit(runs: tuple[Path, Path]) -> None:
    nifti, mixed = (root / "work_dir" for root in runs)
    for name in ("datastats.yaml", "datastats_by_case.yaml"):
        one, other = (without_paths(yaml.safe_load((work / name).read_text())) for work in (nifti, mixed))
        assert one == other, name
    for fold in range(2):
        one, other = (
            torch.load(w / f"segresnet_{fold}" / "models" / "model.pt", weights_only=True) for w in (nifti, mixed)
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    one, other = (json.loads((work / "ensemble" / "scores.json").read_text()) for work in (nifti, mixed))
    assert one["cases"] == other["cases"]
    assert len(one["cases"]) == 5
    assert one["testing"] == other["testing"]
    for name in sorted(p.name for p in (runs[0] / "predictions").iterdir()):
        images = [nib.load(root / "predictions" / name) for root in runs]
        np.testing.assert_array_equal(*(np.asarray(image.dataobj) for image in images))
        np.testing.assert_array_equal(*(image.affine for image in images))
    assert len(list((runs[1] / "predictions").glob("p*.nii.gz"))) == 6


def test_a_data_set_for_nnunet_has_the_labels_of_nifti(runs: tuple[Path, Path], tmp_path: Path) -> None:
    written = []
    for root in runs:
        (folder,) = export(root / "work_dir", "nnunet_raw", output=tmp_path / root.name)
        labels = sorted(folder.glob("labelsT*/*.nii.gz"))
        written.append({path.name: np.asarray(nib.load(path).dataobj) for path in labels})
    nifti, mixed = written
    assert [*nifti] == [*mixed] == [f"p{number}.nii.gz" for number in range(6)]
    for name, array in nifti.items():
        assert set(np.unique(array)) == {0, 1, 2}
        np.testing.assert_array_equal(mixed[name], array)


def test_no_patient_comes_up_in_what_a_run_writes(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    root = runs[1]
    with caplog.at_level(logging.DEBUG):
        (root / "images" / "p3" / "IM0001").rename(root / "images" / "p3" / "kept")
        assert run_command(["analyze", "--data", str(root / "images")]) == 0
        for command in ("status", "explain", "report"):
            assert run_command([command, "--work_dir", str(root / "work_dir")]) == 0
        assert run_command(["init", str(root), "--output", str(root / "again")]) == 0
    shown = capsys.readouterr()
    texts = {"terminal": (shown.out + shown.err + caplog.text).encode()}
    planted = 0
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if raw.startswith(b"\x1f\x8b") else raw
        if path.relative_to(root).parts[0] in ("images", "labels"):
            planted += any(word.encode() in raw for word in WORDS)
        else:
            texts[str(path.relative_to(root))] = str(path.relative_to(root)).encode() + raw
    assert planted >= 20 + 3  # the slices, the segmentation, two more
    assert len(texts) > 50
    assert [name for name, text in texts.items() if any(word.encode() in text for word in WORDS)] == []
