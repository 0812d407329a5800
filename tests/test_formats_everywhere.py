"""Other formats work where NIfTI works: lists, folders, nnU-Net's raw data, analysis, cache, prediction, scores."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import nrrd
import numpy as np
import pytest
import yaml
from other_formats import PATIENT, WRITERS, write_image, write_series
from plans import tiny_plan
from pydicom.uid import generate_uid
from tiny_jobs import make_job

from autoseg.analyzer import analyze
from autoseg.analyzer.folder import analyze_folder
from autoseg.cli.init import init_data_folder
from autoseg.cli.main import run_command
from autoseg.config.settings import Settings
from autoseg.data.datalists.cases import read_case_label
from autoseg.data.datalists.datalist import read_datalist
from autoseg.data.grid import Grid
from autoseg.data.phantoms import make_phantom
from autoseg.data.volumes import read_label
from autoseg.ensemble.predict import predict_files
from autoseg.errors import ConfigError
from autoseg.evaluation.folders import evaluate
from autoseg.training.cache import load_cases
from autoseg.workspace.workspace import Workspace

AFFINE = np.array([[1.0, 0, 0, -11.5], [0, 1.5, 0, 4], [0, 0, 2, -7], [0, 0, 0, 1]])
"""Numbers that every format can hold exactly: NIfTI's and MGH's have 32 bits, DICOM's are decimal."""
SHAPE = (28, 26, 24)
IMAGES = (".nii.gz", ".nrrd", ".mha", "", ".mgz", ".hdr", ".nhdr", ".mhd")
"""Suffix of the image of each case; none: a DICOM series."""
LABELS = (".nii.gz", ".nrrd", ".mha", ".mgz", ".nrrd", ".mha", ".nii.gz", ".hdr")


def write(path: Path, array: np.ndarray) -> None:
    """Write a volume in the format of the path's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.suffix:
        write_series(path, array, AFFINE, SeriesInstanceUID=generate_uid())
    elif path.suffix in WRITERS:
        write_image(path, array, AFFINE)
    else:
        nib.save(nib.Nifti1Image(array, AFFINE), path)


def data_set(folder: Path, images: tuple[str, ...], labels: tuple[str, ...]) -> Path:
    """A data set of eight phantoms, image and label of each with a suffix of their own."""
    items = []
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        (channel,), truth = make_phantom(Grid(shape=SHAPE, affine=AFFINE), np.random.default_rng(number))
        names = {"image": f"images/p{number}{image}", "label": f"labels/p{number}{label}"}
        write(folder / names["image"], channel)
        write(folder / names["label"], truth)
        items.append({**names, "fold": number % 2})
    (folder / "datalist.json").write_text(json.dumps({"training": items, "labels": {"1": "sphere", "2": "box"}}))
    return folder


@pytest.fixture(scope="module")
def nifti(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data_set(tmp_path_factory.mktemp("nifti"), (".nii.gz",) * 8, (".nii.gz",) * 8)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data_set(tmp_path_factory.mktemp("mixed"), IMAGES, LABELS)


def without_paths(data: Any) -> Any:
    if isinstance(data, dict):
        return {k: without_paths(v) for k, v in data.items() if k not in ("image_filepath", "label_filepath")}
    return [without_paths(v) for v in data] if isinstance(data, list) else data


def test_the_analysis_and_the_cache_are_those_of_nifti_bit_by_bit(nifti: Path, mixed: Path, tmp_path: Path) -> None:
    stats, arrays = [], []
    for folder in (nifti, mixed):
        datalist = read_datalist(folder / "datalist.json", folder)
        settings = Settings(modality="MRI", datalist=folder / "datalist.json", dataroot=folder)
        workspace = Workspace(tmp_path / folder.name)
        analysis = analyze(datalist, settings, workspace, progress=False)
        assert (analysis.faults, analysis.warnings) == ((), ())
        # As text, so that every digit counts.
        text = (workspace.root / "datastats.yaml").read_text()
        by_case = (workspace.root / "datastats_by_case.yaml").read_text()
        stats.append([without_paths(yaml.safe_load(t)) for t in (text, by_case)])
        opened = load_cases(tmp_path / f"cache_{folder.name}", tiny_plan(), datalist.training, num_workers=1)
        arrays.append([(np.array(case.image), np.array(case.target)) for case in opened])
        assert analyze(datalist, settings, workspace, progress=False).num_read == 0
    assert stats[0] == stats[1]
    for one, other in zip(*arrays, strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])


def test_init_pairs_folders_of_mixed_formats_and_patients(
    mixed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "data"  # without the list
    for name in ("images", "labels"):
        shutil.copytree(mixed / name, root / name)
    (root / "images" / "scan.mnc").write_bytes(b"MINC")
    (root / "images" / "notes.txt").write_text("notes")
    with caplog.at_level(logging.WARNING, "autoseg"):
        result = init_data_folder(root, tmp_path)
    assert (result.num_training, result.num_unlabeled) == (8, 0)
    datalist = read_datalist(tmp_path / "datalist.json", root)
    assert [c.name for c in datalist.training] == [f"p{n}" for n in range(8)]
    assert [w.getMessage() for w in caplog.records] == [
        f"{root / 'images'}: left out, of no format that is read: scan.mnc. Read are *.nii.gz, *.nii, *.nrrd, *.nhdr, "
        "*.mha, *.mhd, *.mgz, *.mgh, *.hdr, or folders of DICOM files."
    ]
    assert not any(word in str(result) + (tmp_path / "datalist.json").read_text() for word in PATIENT)


def test_init_pairs_patients_by_their_folders(tmp_path: Path) -> None:
    """images/PATIENT/STUDY/SERIES, and a label of each patient."""
    for number in range(3):
        (channel,), truth = make_phantom(Grid(shape=SHAPE, affine=AFFINE), np.random.default_rng(number))
        study = tmp_path / "images" / f"p{number}" / "1.2.840.1"
        write_series(study / "1.2.840.1.7", channel, AFFINE, SeriesInstanceUID=generate_uid())
        write_series(
            study / "1.2.840.1.8", channel[:, :, :1], AFFINE, SeriesInstanceUID=generate_uid(), ImageType=["LOCALIZER"]
        )
        write(tmp_path / "labels" / f"p{number}.nrrd", truth)
    result = init_data_folder(tmp_path, tmp_path / "out", num_fold=2)
    assert (result.num_training, result.num_unlabeled) == (3, 0)
    analysis = analyze_folder(tmp_path, progress=False)
    assert analysis.faults == ()
    assert {w.finding for w in analysis.warnings if w.kind == "header"} == {
        "left out beside the CT series of 24 images: CT localizer of 1 image"
    }


@pytest.mark.parametrize("suffix", [".mha", ".nrrd", ".mgz"])
def test_init_reads_nnunets_raw_data(tmp_path: Path, suffix: str) -> None:
    for number in range(4):
        (channel,), truth = make_phantom(Grid(shape=SHAPE, affine=AFFINE), np.random.default_rng(number))
        write(tmp_path / "imagesTr" / f"n{number}_0000{suffix}", channel)
        write(tmp_path / "labelsTr" / f"n{number}{suffix}", truth)
    words = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "sphere": 1, "box": 2}, "file_ending": suffix}
    (tmp_path / "dataset.json").write_text(json.dumps(words))
    result = init_data_folder(tmp_path, tmp_path / "out", num_fold=2)
    assert (result.recognised, result.num_training) == ("nnU-Net raw data set", 4)
    assert analyze_folder(tmp_path, progress=False).faults == ()


def test_a_folder_of_other_formats_is_analysed_by_itself(mixed: Path) -> None:
    analysis = analyze_folder(mixed / "images", progress=False)
    assert analysis.num_cases["unlabeled"] == 8
    assert analysis.faults == ()


def test_predictions_and_scores_are_those_of_nifti(nifti: Path, mixed: Path, tmp_path: Path) -> None:
    make_job(tmp_path / "work", "segresnet", 0)
    for folder in (nifti, mixed):
        out = tmp_path / folder.name
        more = {"algo": "segresnet", "device": "cpu", "format": "nifti"}
        assert predict_files(tmp_path / "work", folder / "images", out, **more) == 0
    names = [f"p{n}.nii.gz" for n in range(8)]
    assert sorted(p.name for p in (tmp_path / mixed.name).iterdir()) == names
    for name in names:
        one, other = (nib.load(tmp_path / folder.name / name) for folder in (nifti, mixed))
        np.testing.assert_array_equal(np.asarray(one.dataobj), np.asarray(other.dataobj))
        np.testing.assert_array_equal(one.affine, other.affine)
    scores = [evaluate(tmp_path / f.name, f / "labels").scores for f in (nifti, mixed)]
    assert scores[0] == scores[1]


def test_a_series_is_predicted_by_its_folder_or_a_file_of_it(mixed: Path, tmp_path: Path) -> None:
    make_job(tmp_path / "work", "segresnet", 0)
    series = mixed / "images" / "p3"
    for image, output in ((series, "a.nii.gz"), (series / "IM0007", "b.nii.gz"), (series, "folder")):
        more = {"algo": "segresnet", "device": "cpu", "format": "nifti"}
        assert predict_files(tmp_path / "work", image, tmp_path / output, **more) == 0
    written = {(tmp_path / name).read_bytes() for name in ("a.nii.gz", "b.nii.gz", "folder/p3.nii.gz")}
    assert len(written) == 1
    with pytest.raises(ConfigError, match=r"x\.mhd: label files are not written as \.mhd\. Expected one of \.nii\.gz"):
        predict_files(tmp_path / "work", series, tmp_path / "x.mhd", algo="segresnet", device="cpu")
    assert not (tmp_path / "x.mhd").exists()


def test_a_damaged_series_stops_the_analysis_with_its_reason_and_no_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (channel,), _ = make_phantom(Grid(shape=SHAPE, affine=AFFINE), np.random.default_rng(0))
    write_series(tmp_path / "images" / "p0", channel, AFFINE)
    (tmp_path / "images" / "p0" / "IM0011").unlink()
    run_command(["analyze", "--data", str(tmp_path)])
    shown = capsys.readouterr()
    assert "1 of 24 slices are missing, the first gap between IM" in shown.out + shown.err
    assert not any(word in shown.out + shown.err for word in PATIENT)


def write_segmentation(path: Path, array: np.ndarray, names: dict[int, str]) -> None:
    """A label file as 3D Slicer writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header: dict[str, Any] = {
        "space": "RAS",
        "space directions": AFFINE[:3, :3].T,
        "space origin": AFFINE[:3, 3],
        "encoding": "gzip",
    }
    for number, (value, name) in enumerate(names.items()):
        header |= {f"Segment{number}_Name": name, f"Segment{number}_LabelValue": str(value)}
        header[f"Segment{number}_Layer"] = "0"
    nrrd.write(str(path), array, header)


def segmentations(folder: Path, names: list[dict[int, str]]) -> Path:
    for number, named in enumerate(names):
        (channel,), truth = make_phantom(Grid(shape=SHAPE, affine=AFFINE), np.random.default_rng(number))
        write(folder / "images" / f"p{number}.nrrd", channel)
        write_segmentation(folder / "labels" / f"p{number}.seg.nrrd", truth, named)
    return folder


def test_names_of_segments_become_names_of_classes(tmp_path: Path) -> None:
    root = segmentations(tmp_path, [{1: "left lung", 2: "ribs"}] * 4)
    result = init_data_folder(root, tmp_path / "out", num_fold=2)
    assert result.classes == {"left lung": (1,), "ribs": (2,)}
    assert "class names are those of the segments in the label files." in result.notes
    assert analyze_folder(root, progress=False).faults == ()


def test_segments_that_other_files_number_otherwise_are_known_by_name(tmp_path: Path) -> None:
    root = segmentations(tmp_path, [{1: "left lung", 2: "ribs"}] * 3 + [{1: "ribs", 2: "left lung"}])
    result = init_data_folder(root, tmp_path / "out", num_fold=2)
    assert result.classes == {"left lung": (1,), "ribs": (2,)}
    assert analyze_folder(root, progress=False).faults == ()
    cases = read_datalist(tmp_path / "out" / "datalist.json", root).training
    labels = [read_case_label(case).array for case in cases]
    np.testing.assert_array_equal(labels[3], np.choose(read_label(cases[3].label).array, [0, 2, 1]))
    np.testing.assert_array_equal(labels[0], read_label(cases[0].label).array)


def test_segments_numbered_otherwise_are_a_fault_where_no_names_decide(tmp_path: Path) -> None:
    root = segmentations(tmp_path, [{1: "left lung", 2: "ribs"}] * 3 + [{1: "ribs", 2: "left lung"}])
    items = [{"image": f"images/p{n}.nrrd", "label": f"labels/p{n}.seg.nrrd"} for n in range(4)]
    (root / "datalist.json").write_text(json.dumps({"training": items, "labels": {"1": "a", "2": "b"}}))
    settings = Settings(modality="MRI", datalist=root / "datalist.json", dataroot=root, on_fault="skip")
    datalist = read_datalist(root / "datalist.json", root, num_fold=2)
    (fault,) = analyze(datalist, settings, Workspace(tmp_path / "w"), progress=False).faults
    assert str(fault) == (
        "p3 (labels/p3.seg.nrrd): its segment 'ribs' has the value 1, where in other labels 'ribs' is 2. "
        "Give segments the same names and values in all labels, and export it again."
    )
