"""What `predict` writes: label files in each format, statistics and pictures; and whose names are in none of them."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any

import highdicom as hd
import nibabel as nib
import nrrd
import numpy as np
import pytest
import SimpleITK as sitk
from other_formats import PATIENT, write_image, write_series
from PIL import Image
from pydicom import config, dcmread
from tiny_jobs import make_job

import autoseg
from autoseg.cli.main import run_command
from autoseg.data import streams
from autoseg.data.volumes import read_label
from autoseg.ensemble.predict import predict_files
from autoseg.errors import ConfigError, DataError
from autoseg.inference import statistics
from autoseg.workspace.settings import write_settings
from autoseg.workspace.workspace import Workspace

SHAPE = (20, 18, 16)
AFFINE = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.2, 0.1, -0.3) @ np.diag([-1, -1, 1.9]), [3, -20, 5])
CLASSES = [{"name": "liver", "values": [1]}, {"name": "kidney_left", "values": [2]}]
REGIONS = [{"name": "whole", "values": [1]}, {"name": "core", "values": [2]}]


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One trained job for a CT of two organs."""
    root = tmp_path_factory.mktemp("work")
    make_job(root, "segresnet", 0, classes=CLASSES, channels=[{"mode": "ct", "bounds": [-500, 500]}])
    return root


@pytest.fixture(scope="module")
def regions_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One trained job for two regions whose overlap no label value stands for."""
    root = tmp_path_factory.mktemp("regions")
    make_job(root, "segresnet", 0, classes=REGIONS, sigmoid=True)
    return root


def voxels() -> np.ndarray:
    return np.random.default_rng(0).integers(-400, 400, SHAPE).astype(np.int16)


def save_nifti(path: Path, array: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels() if array is None else array, AFFINE), path)
    return path


def predict(work_dir: Path, image: Path, output: Path, **more: Any) -> int:
    return predict_files(work_dir, image, output, algo="segresnet", device="cpu", **more)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# -- formats


def test_auto_gives_what_came_in(work_dir: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    save_nifti(images / "a.nii.gz")
    for suffix in (".nrrd", ".mha", ".mgz"):
        write_image(images / f"{suffix[1:]}{suffix}", voxels(), AFFINE)
    write_series(images / "scan", voxels(), AFFINE)
    assert predict(work_dir, images, tmp_path / "out") == 0
    assert names(tmp_path / "out") == ["a.nii.gz", "mgz.nii.gz", "mha.mha", "nrrd.nrrd", "scan.seg.dcm"]
    first = read_label(tmp_path / "out" / "a.nii.gz").array
    assert {*np.unique(first)} == {0, 1, 2}
    for other in ("mgz.nii.gz", "mha.mha", "nrrd.nrrd"):
        np.testing.assert_array_equal(read_label(tmp_path / "out" / other).array, first)
    segments = hd.seg.segread(tmp_path / "out" / "scan.seg.dcm").SegmentSequence
    assert [s.SegmentLabel for s in segments] == ["liver", "kidney_left"]


@pytest.mark.parametrize("name", ["nifti", "nrrd", "seg.nrrd", "mha"])
def test_every_image_can_have_its_label_in_a_chosen_format(work_dir: Path, tmp_path: Path, name: str) -> None:
    image = save_nifti(tmp_path / "a.nii")
    suffix = {"nifti": ".nii.gz"}.get(name, f".{name}")
    assert predict(work_dir, image, tmp_path / "out", format=name) == 0
    assert names(tmp_path / "out") == [f"a{suffix}"]
    assert predict(work_dir, image, tmp_path / f"one{suffix}") == 0  # by the suffix alone
    assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / "out" / f"a{suffix}").read_bytes()
    assert predict(work_dir, image, tmp_path / "plain.nii.gz") == 0
    array = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / f"one{suffix}"))).T
    np.testing.assert_array_equal(array, np.asarray(nib.load(tmp_path / "plain.nii.gz").dataobj))


def test_a_large_image_has_the_same_files(work_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    series = write_series(tmp_path / "scan", voxels(), AFFINE)
    more: dict[str, Any] = {"statistics": True, "preview": True}
    for name in ("seg.nrrd", "dicomseg"):
        assert predict(work_dir, series, tmp_path / "memory", format=name, **more) == 0
        with monkeypatch.context() as patch:
            patch.setattr(streams, "STREAM_VOXELS", 100)
            patch.setattr(statistics, "SLAB_VOXELS", 1000)
            assert predict(work_dir, series, tmp_path / "stream", format=name, **more) == 0
    for name in ("scan.seg.nrrd", "scan.preview.png", "statistics.csv"):
        assert (tmp_path / "stream" / name).read_bytes() == (tmp_path / "memory" / name).read_bytes()
    pixels = [dcmread(tmp_path / folder / "scan.seg.dcm").PixelData for folder in ("memory", "stream")]
    assert pixels[0] == pixels[1]


def test_dicom_comes_back_to_the_viewer(work_dir: Path, tmp_path: Path) -> None:
    """Image to DICOM to label to DICOM-SEG: voxel-equal to the same image's label as NIfTI."""
    series = write_series(tmp_path / "scan", voxels(), AFFINE)
    assert predict(work_dir, series, tmp_path / "a.nii.gz") == 0
    assert predict(work_dir, series, tmp_path / "a.dcm") == 0
    assert predict(work_dir, series, tmp_path / "r.dcm", format="rtstruct") == 0
    plain = nib.load(tmp_path / "a.nii.gz")
    uids = {
        tuple(np.round(np.array(data.ImagePositionPatient, float), 3)): data.SOPInstanceUID
        for data in map(dcmread, series.iterdir())
    }
    lps = np.diag([-1, -1, 1, 1]) @ plain.affine
    order = [min(uids, key=lambda p: np.linalg.norm(np.array(p) - (lps @ [0, 0, k, 1])[:3])) for k in range(SHAPE[2])]
    seg = hd.seg.segread(tmp_path / "a.dcm")
    masks = seg.get_pixels_by_source_instance([uids[p] for p in order], combine_segments=True)
    np.testing.assert_array_equal(masks.T, np.asarray(plain.dataobj))
    assert [r.ROIName for r in dcmread(tmp_path / "r.dcm").StructureSetROISequence] == ["liver", "kidney_left"]


def test_regions_stay_overlapping(regions_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image = save_nifti(tmp_path / "a.nii", np.random.default_rng(0).normal(size=SHAPE).astype(np.float32))
    assert predict(regions_dir, image, tmp_path / "a.seg.nrrd") == 0
    stored, header = nrrd.read(str(tmp_path / "a.seg.nrrd"))
    segmenter = autoseg.Segmenter(regions_dir, algo="segresnet", device="cpu")
    prediction = segmenter.predict(image)
    masks = [stored[int(header[f"Segment{n}_Layer"])] == int(header[f"Segment{n}_LabelValue"]) for n in range(2)]
    assert (masks[0] & masks[1]).any()
    for name, mask in zip(("whole", "core"), masks, strict=True):
        np.testing.assert_array_equal(prediction.mask(name), mask)
    # A label map gives such a voxel to one of them, as before.
    assert predict(regions_dir, image, tmp_path / "a.nii.gz") == 0
    plain = np.asarray(nib.load(tmp_path / "a.nii.gz").dataobj)
    np.testing.assert_array_equal(plain, prediction.labels)
    np.testing.assert_array_equal(plain > 0, masks[0] | masks[1])
    prediction.save(tmp_path / "b.seg.nrrd")
    assert (tmp_path / "b.seg.nrrd").read_bytes() == (tmp_path / "a.seg.nrrd").read_bytes()


def test_python_writes_the_same_files(work_dir: Path, tmp_path: Path) -> None:
    series = write_series(tmp_path / "scan", voxels(), AFFINE)
    prediction = autoseg.predict(series, tmp_path / "a.dcm", work_dir=work_dir, algo="segresnet", device="cpu")
    for name in ("a.mha", "a.nrrd", "a.nii.gz"):
        prediction.save(tmp_path / name)
        assert predict(work_dir, series, tmp_path / "cli" / name) == 0
        assert (tmp_path / name).read_bytes() == (tmp_path / "cli" / name).read_bytes()
    assert predict(work_dir, series, tmp_path / "cli.dcm") == 0
    assert dcmread(tmp_path / "a.dcm").PixelData == dcmread(tmp_path / "cli.dcm").PixelData
    prediction.save(tmp_path / "r.dcm", format="rtstruct")
    assert dcmread(tmp_path / "r.dcm").Modality == "RTSTRUCT"
    array = autoseg.Segmenter(work_dir, algo="segresnet", device="cpu").predict(voxels(), affine=AFFINE)
    with pytest.raises(DataError, match="DICOM refers to the images it was made from, and this was an array"):
        array.save(tmp_path / "c.dcm")


def test_the_users_codes_are_written(tmp_path: Path) -> None:
    root = tmp_path / "work"
    make_job(root, "segresnet", 0, classes=CLASSES)
    write_settings(Workspace(root), {"codes": {"liver": {"type": "metastasis", "region": "liver"}}}, {})
    image = save_nifti(tmp_path / "a.nii")
    assert predict(root, image, tmp_path / "a.seg.nrrd") == 0
    _, header = nrrd.read(str(tmp_path / "a.seg.nrrd"))
    assert "SCT^14799000^Neoplasm, Secondary" in header["Segment0_Tags"]
    assert "SCT^10200004^Liver" in header["Segment0_Tags"]
    assert "SCT^64033007^Kidney~SCT^7771000^Left" in header["Segment1_Tags"]


def test_what_cannot_be_written_is_said_before_any_work(
    work_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = save_nifti(tmp_path / "a.nii")
    with pytest.raises(ConfigError, match=r"--output: .*x\.mha: label files are not written as \.mha in the format n"):
        predict(work_dir, image, tmp_path / "x.mha", format="nrrd")
    for suffix in (".mhd", ".nhdr", ".mgz"):
        with pytest.raises(ConfigError, match=rf"--output: .*x\{suffix}: label files are not written as \{suffix}\. E"):
            predict(work_dir, image, tmp_path / f"x{suffix}")
    assert predict(work_dir, image, tmp_path / "out", format="dicomseg") == 2
    assert "skipped: " in caplog.text
    assert "a.nii: no DICOM series, and DICOM-SEG refers to the DICOM images it was made from. Choose" in caplog.text
    assert names(tmp_path / "out") == []


def test_auto_falls_back_to_nifti_and_says_why(
    work_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    series = write_series(tmp_path / "scan", voxels(), AFFINE, FrameOfReferenceUID="")
    assert predict(work_dir, series, tmp_path / "out") == 0
    assert names(tmp_path / "out") == ["scan.nii.gz"]
    assert "DICOM-SEG needs FrameOfReferenceUID, which the images do not have." in caplog.text
    assert "The label is written as NIfTI." in caplog.text


def test_auto_falls_back_to_nifti_where_only_writing_shows_that_it_must(
    regions_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    series = write_series(tmp_path / "scan", voxels(), AFFINE)
    assert predict(regions_dir, series, tmp_path / "plain", format="nifti") == 0

    def broken(*_: object) -> None:
        raise AttributeError("a field of the patient")

    monkeypatch.setattr("autoseg.data.formats.dicom_seg_writer._segmentation", broken)
    with caplog.at_level(logging.INFO):
        assert predict(regions_dir, series, tmp_path / "out", preview=True) == 0
    assert names(tmp_path / "out") == ["scan.nii.gz", "scan.preview.png"]
    # Regions that overlap have the values of a label map, as if NIfTI had been asked for.
    assert (tmp_path / "out" / "scan.nii.gz").read_bytes() == (tmp_path / "plain" / "scan.nii.gz").read_bytes()
    assert "(AttributeError). Choose another --format. The label is written as NIfTI." in caplog.text
    assert "scan -> " + str(tmp_path / "out" / "scan.nii.gz") in caplog.text
    assert predict(regions_dir, series, tmp_path / "out", share=True) == 0  # it is there
    assert predict(regions_dir, series, tmp_path / "x.dcm") == 2


def test_dates_and_times_that_are_none_are_left_empty(work_dir: Path, tmp_path: Path) -> None:
    odd = {"StudyDate": "2024-1-1", "StudyTime": "1", "PatientBirthDate": "unknown"}
    series = write_series(tmp_path / "scan", voxels(), AFFINE)
    for path in series.iterdir():
        data = dcmread(path)
        with config.disable_value_validation():
            for name, value in odd.items():
                setattr(data, name, value)
            data.save_as(path)
    for name in ("dicomseg", "rtstruct"):
        assert predict(work_dir, series, tmp_path / f"{name}.dcm", format=name) == 0
        data = dcmread(tmp_path / f"{name}.dcm")
        assert [str(data[field].value or "") for field in odd] == ["", "", ""]


def test_the_command_has_the_flags(work_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = save_nifti(tmp_path / "a.nii")
    command = ["predict", "--work_dir", str(work_dir), "--image", str(image), "--algo", "segresnet", "--device", "cpu"]
    out = ["--output", str(tmp_path / "out"), "--format", "seg.nrrd", "--statistics", "--preview"]
    assert run_command([*command, *out]) == 0
    assert names(tmp_path / "out") == ["a.preview.png", "a.seg.nrrd", "statistics.csv"]
    assert run_command([*command, *out[:3], "tiff"]) == 2
    assert "--format: expected" in capsys.readouterr().err


# -- statistics


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_statistics_are_those_of_numpy(work_dir: Path, tmp_path: Path) -> None:
    for name in "ba":
        save_nifti(tmp_path / "images" / f"{name}.nii.gz", voxels() + (name == "b"))
    assert predict(work_dir, tmp_path / "images", tmp_path / "out", statistics=True) == 0
    rows = read_table(tmp_path / "out" / "statistics.csv")
    assert [(r["case"], r["class"], r["channel"], r["unit"]) for r in rows] == [
        (case, name, "0", "HU") for case in "ab" for name in ("liver", "kidney_left")
    ]
    voxel_ml = abs(np.linalg.det(AFFINE[:3, :3])) / 1000
    for row in rows:
        label = np.asarray(nib.load(tmp_path / "out" / f"{row['case']}.nii.gz").dataobj)
        image = np.asarray(nib.load(tmp_path / "images" / f"{row['case']}.nii.gz").dataobj)
        inside = image[label == {"liver": 1, "kidney_left": 2}[row["class"]]].astype(float)
        assert int(row["voxels"]) == len(inside) > 0
        expected = {"volume_ml": len(inside) * voxel_ml, "mean": inside.mean(), "std": inside.std()}
        expected |= {"min": inside.min(), "median": np.median(inside), "max": inside.max()}
        quantiles = {"percentile_00_5": 0.5, "percentile_10": 10, "percentile_90": 90, "percentile_99_5": 99.5}
        expected |= {column: np.percentile(inside, q) for column, q in quantiles.items()}
        assert {key: float(row[key]) for key in expected} == pytest.approx(expected, rel=1e-4)


def test_statistics_of_channels_overlaps_and_classes_that_are_not_there(regions_dir: Path, tmp_path: Path) -> None:
    root = tmp_path / "work"
    make_job(root, "segresnet", 0, classes=CLASSES, channels=[{"mode": "meanstd"}, {"mode": "meanstd"}])
    two = np.random.default_rng(0).normal(size=(*SHAPE, 2)).astype(np.float32)
    assert predict(root, save_nifti(tmp_path / "two.nii", two), tmp_path / "two.mha", statistics=True) == 0
    rows = read_table(tmp_path / "two.statistics.csv")
    assert [(r["class"], r["channel"], r["unit"]) for r in rows] == [
        (name, channel, "as stored") for name in ("liver", "kidney_left") for channel in "01"
    ]
    label = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "two.mha"))).T
    for row in rows:
        inside = two[..., int(row["channel"])][label == {"liver": 1, "kidney_left": 2}[row["class"]]]
        assert float(row["mean"]) == pytest.approx(inside.mean(), rel=1e-4, abs=1e-6)
    image = save_nifti(tmp_path / "a.nii", two[..., 0])
    assert predict(regions_dir, image, tmp_path / "a.seg.nrrd", statistics=True) == 0
    stored, header = nrrd.read(str(tmp_path / "a.seg.nrrd"))
    for n, row in enumerate(read_table(tmp_path / "a.statistics.csv")):
        mask = stored[int(header[f"Segment{n}_Layer"])] == int(header[f"Segment{n}_LabelValue"])
        assert int(row["voxels"]) == mask.sum()
        assert float(row["max"]) == pytest.approx(two[..., 0][mask].max(), rel=1e-5)


class Rows:
    """An image in memory, as little of one as the statistics need."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape, self.axis, self.num_channels = array, array.shape[1:], 2, len(array)
        self.spacing_mm = (1.0, 1.0, 1.0)
        self.grid = type("Grid", (), {"affine": np.eye(4)})

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self.array[..., start:stop]


def test_a_class_without_a_voxel_has_no_intensities(tmp_path: Path) -> None:
    from autoseg.data.labels import LabelMap
    from autoseg.data.segments import segments_of

    label_map = LabelMap(names=("a", "b"), values=((1,), (2,)))
    label = np.zeros((3, 3, 3), np.uint8)
    label[0, 0, 0] = 2
    rows = statistics.measure("x", Rows(np.ones((1, 3, 3, 3), np.float32)), label, segments_of(label_map, {}), ["HU"])
    assert [(r["voxels"], r["volume_ml"], r["mean"], r["max"]) for r in rows] == [
        ("0", "0", "", ""),
        ("1", "0.001", "1", "1"),
    ]
    table = statistics.StatisticsFile(path=tmp_path / "s.csv", is_shared=True)
    table.put("x", rows)
    table.put('a, "b"', [{**row, "case": 'a, "b"'} for row in rows])  # a comma and quotes in a name
    table.put("x", rows[:1])
    assert [(r["case"], r["class"]) for r in table.read()] == [('a, "b"', "a"), ('a, "b"', "b"), ("x", "a")]
    (tmp_path / "s.csv").write_text("another table\n1\n")
    table.put("x", rows)
    assert len(table.read()) == 2


def test_processes_that_share_a_folder_share_the_table(work_dir: Path, tmp_path: Path) -> None:
    for name in "ab":
        save_nifti(tmp_path / "images" / f"{name}.nii.gz")
    more: dict[str, Any] = {"statistics": True, "share": True}
    assert predict(work_dir, tmp_path / "images" / "a.nii.gz", tmp_path / "out", **more) == 0
    assert predict(work_dir, tmp_path / "images", tmp_path / "out", **more) == 0
    assert [r["case"] for r in read_table(tmp_path / "out" / "statistics.csv")] == ["a", "a", "b", "b"]


# -- pictures


def test_a_picture_shows_image_and_classes(work_dir: Path, tmp_path: Path) -> None:
    image = save_nifti(tmp_path / "case é.nii")
    assert predict(work_dir, image, tmp_path / "one.nii.gz", preview=True) == 0
    with Image.open(tmp_path / "one.preview.png") as picture:
        assert picture.info == {}  # no words in the file beside its pixels
        pixels = np.asarray(picture)
    from autoseg.data.segments import class_colours

    for colour in class_colours(2):
        assert (pixels == colour).all(axis=-1).sum() > 50
    gray = pixels[(pixels[..., 0] == pixels[..., 1]) & (pixels[..., 1] == pixels[..., 2])]
    assert len(np.unique(gray)) > 20


# -- privacy


def test_no_patient_is_named_outside_the_patients_own_record(
    work_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    series = write_series(tmp_path / "scan_17", voxels(), AFFINE)
    more: dict[str, Any] = {"statistics": True, "preview": True, "timing": True}
    with caplog.at_level(logging.DEBUG):
        for name in ("auto", "nifti", "nrrd", "seg.nrrd", "mha", "rtstruct"):
            assert predict(work_dir, series, tmp_path / "out", format=name, **more) == 0
    records = {"scan_17.seg.dcm", "scan_17.rtstruct.dcm"}
    files = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert {p.name for p in files} == {
        *records,
        *("scan_17.nii.gz", "scan_17.nrrd", "scan_17.seg.nrrd", "scan_17.mha"),
        *("scan_17.preview.png", "statistics.csv", "timing.json"),
    }
    printed = capfd.readouterr()
    texts = {p.name: p.read_bytes() for p in files} | {"log": caplog.text.encode(), "out": printed.out.encode()}
    texts["err"] = printed.err.encode()
    with nib.openers.ImageOpener(tmp_path / "out" / "scan_17.nii.gz") as file:
        texts["unpacked"] = file.read()
    for name, content in texts.items():
        for secret in PATIENT:
            assert (secret.encode() in content) == (name in records), (name, secret)
        assert name in records or b"1.2.826.0.1.3680043" not in content, name  # nor a UID of the study
