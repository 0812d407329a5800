"""DICOM series: read as the volume they are, or refused with the reason, and never a patient's name."""

from __future__ import annotations

import itertools
import random
import sys
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from other_formats import PATIENT, enhanced_of, save_slices, slices_of, write_series
from pydicom.dataset import Dataset
from pydicom.uid import RLELossless, generate_uid

from autoseg.analyzer.case import analyze_case
from autoseg.data.formats import dicom_files
from autoseg.data.formats.table import (
    files_of,
    image_digest,
    image_files,
    image_signature,
    read_header,
    read_stored_volume,
)
from autoseg.data.grid import corners_apart_mm
from autoseg.data.streams import FileImage
from autoseg.data.volumes import read_image
from autoseg.errors import DataError
from autoseg.hardware.packages import install_advice

SINGLE = Path(__file__).resolve().parents[2] / "shared" / "data" / "single"
SHAPE = (7, 6, 5)
SPACING = np.diag([0.75, 1.5, 2.5])
OBLIQUE = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.3, -0.2, 0.1) @ SPACING, [31.5, -20.25, 7.125])
TILTED = np.array([[0.75, 0, 0, 3], [0, 1.5, 0.6, 4], [0, 0, 2.5, 5], [0, 0, 0, 1.0]])


def turned(axes: tuple[int, ...], signs: tuple[int, ...]) -> np.ndarray:
    """An affine whose axes point along others, either way."""
    affine = np.eye(4)
    affine[:3, :3] = (np.eye(3)[list(axes)] * np.array(signs)[:, None]).T @ SPACING
    affine[:3, 3] = [11.5, -3.25, 70]
    return affine


ORIENTATIONS = [
    *(turned((0, 1, 2), signs) for signs in itertools.product((1, -1), repeat=3)),
    *(turned(axes, (1, -1, 1)) for axes in ((1, 2, 0), (2, 0, 1), (0, 2, 1))),
    OBLIQUE,
]


def voxels(seed: int = 0, dtype: str = "i2", low: int = -500) -> np.ndarray:
    return np.random.default_rng(seed).integers(low if dtype[0] == "i" else 0, 200, SHAPE).astype(dtype)


def as_nifti(folder: Path, array: np.ndarray, affine: np.ndarray) -> Path:
    path = folder / "same.nii"
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def assert_same(path: Path, other: Path) -> None:
    """Two files hold the same volume once read: voxels bit by bit, and the place to 1e-4 mm."""
    found, expected = read_image((path,)), read_image((other,))
    np.testing.assert_array_equal(found.array, expected.array)
    grids = found.grid.to_ras(), expected.grid.to_ras()
    assert corners_apart_mm(grids[0].affine, grids[1].affine, grids[0].shape) < 1e-4


def refusal(path: Path) -> str:
    """Why an image is not read; all readers say the same, and none names the patient."""
    with pytest.raises(DataError) as caught:
        read_stored_volume(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert not any(word in text for word in PATIENT)
    assert analyze_case((path,), None, None).is_faulty
    return text.removeprefix(f"{path}: ")


@pytest.mark.parametrize("affine", ORIENTATIONS)
def test_a_series_is_the_volume_whatever_its_orientation_and_the_names_of_its_files(
    tmp_path: Path, affine: np.ndarray
) -> None:
    for dtype in ("i2", "u2", "u1"):
        array = voxels(dtype=dtype)
        series = write_series(tmp_path / dtype, array, affine)
        same = as_nifti(tmp_path, array, affine)
        assert_same(series, same)
        assert read_stored_volume(series).warnings == ()
        assert read_stored_volume(series).array.dtype == np.dtype(dtype)
        with FileImage([series]) as image:
            last = image.shape[image.axis]
            rows = np.concatenate([image.rows(0, 2), image.rows(2, last)], axis=image.axis + 1)
        np.testing.assert_array_equal(rows, read_image((same,)).array)


def test_simpleitk_reads_the_same(tmp_path: Path) -> None:
    series = write_series(tmp_path / "series", voxels(), OBLIQUE, RescaleSlope="1", RescaleIntercept="-1024")
    image = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(series)))
    stored = read_stored_volume(series)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image).T, stored.array[..., 0] + stored.inter)
    np.testing.assert_allclose(np.diag([-1, -1, 1]) @ stored.grid.affine[:3, 3], image.GetOrigin(), atol=1e-6)
    np.testing.assert_allclose(stored.grid.spacing_mm, image.GetSpacing(), atol=1e-6)


def test_rescaling_is_applied_also_where_it_differs_from_slice_to_slice(tmp_path: Path) -> None:
    array = voxels(dtype="u2")
    even = write_series(tmp_path / "even", array, OBLIQUE, RescaleSlope="0.5", RescaleIntercept="-10")
    assert_same(even, as_nifti(tmp_path, array * 0.5 - 10, OBLIQUE))
    slices = slices_of(array, OBLIQUE, Modality="PT")
    for k, data in enumerate(slices):  # as PET has it
        data.RescaleSlope, data.RescaleIntercept = str(0.25 * (k + 1)), "0"
    uneven = save_slices(tmp_path / "uneven", slices)
    assert_same(uneven, as_nifti(tmp_path, (array * 0.25 * np.arange(1, 6)).astype("f4"), OBLIQUE))
    assert read_header(uneven).dtype == read_stored_volume(uneven).array.dtype == np.float32
    with FileImage([uneven]) as image:
        np.testing.assert_array_equal(image.rows(1, 3), read_image((uneven,)).array[..., 1:3])


def test_a_file_of_several_images_is_a_volume(tmp_path: Path) -> None:
    path = tmp_path / "enhanced.dcm"
    enhanced_of(voxels(), OBLIQUE).save_as(path, enforce_file_format=True)
    assert_same(path, as_nifti(tmp_path, voxels(), OBLIQUE))
    with FileImage([path]) as image:
        np.testing.assert_array_equal(image.rows(1, 4), read_image((path,)).array[..., 1:4])
    assert image_files(tmp_path) == [path, tmp_path / "same.nii"]


def test_compressed_slices_are_read(tmp_path: Path) -> None:
    slices = slices_of(voxels(), OBLIQUE)
    for data in slices:
        data.compress(RLELossless, generate_instance_uid=False)
    assert_same(save_slices(tmp_path / "series", slices), as_nifti(tmp_path, voxels(), OBLIQUE))


def test_a_compression_without_a_decoder_names_the_extra(tmp_path: Path) -> None:
    slices = slices_of(voxels(), OBLIQUE)
    for data in slices:
        data.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.201"
        data.PixelData = b"\xfe\xff\x00\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0"
        data["PixelData"].is_undefined_length = True
    text = refusal(save_slices(tmp_path / "series", slices))
    assert text.startswith("pixels compressed as High-Throughput JPEG 2000")
    assert text.endswith("pip install -c constraints.txt -e '.[formats]'")


def test_gantry_tilt_is_read_exactly_with_a_warning(tmp_path: Path) -> None:
    series = write_series(tmp_path / "series", voxels(), TILTED)
    assert_same(series, as_nifti(tmp_path, voxels(), TILTED))
    (warning,) = read_stored_volume(series).warnings
    assert warning.finding == "slices are tilted by 13.5 degrees against their stack (gantry tilt)"


def test_equal_copies_are_used_once_with_a_warning(tmp_path: Path) -> None:
    slices = slices_of(voxels(), OBLIQUE)
    series = save_slices(tmp_path / "series", slices)
    slices[2].save_as(series / "copy", enforce_file_format=True)
    assert_same(series, as_nifti(tmp_path, voxels(), OBLIQUE))
    assert [w.finding for w in read_stored_volume(series).warnings] == ["1 slice is there more than once"]
    assert [w.finding for w in read_header(series).warnings] == ["1 slice is there more than once"]


def second_echo(slices: list[Dataset]) -> None:
    more = slices_of(voxels(1), OBLIQUE, EchoTime="40")
    for data in slices:
        data.EchoTime = "20"
    slices += more


def second_phase(slices: list[Dataset]) -> None:
    slices += slices_of(voxels(1), OBLIQUE)


def without_one(slices: list[Dataset]) -> None:
    del slices[2]


def without_two(slices: list[Dataset]) -> None:
    del slices[1:3]


def closer(slices: list[Dataset]) -> None:
    for data in slices[3:]:
        step = np.subtract([float(v) for v in slices[1].ImagePositionPatient], slices[0].ImagePositionPatient)
        data.ImagePositionPatient = [f"{v:.8g}" for v in np.array(data.ImagePositionPatient, float) - 0.4 * step]


def shifted(slices: list[Dataset]) -> None:
    row = np.array(slices[2].ImageOrientationPatient[:3], float)
    slices[2].ImagePositionPatient = [f"{v:.8g}" for v in np.array(slices[2].ImagePositionPatient, float) + 3 * row]


def turned_one(slices: list[Dataset]) -> None:
    slices[2].ImageOrientationPatient = [1, 0, 0, 0, 1, 0]


def smaller_one(slices: list[Dataset]) -> None:
    slices[2].Rows, slices[2].PixelData = 4, bytes(4 * 7 * 2)


def zoomed_one(slices: list[Dataset]) -> None:
    slices[2].PixelSpacing = [1, 1]


def placeless(slices: list[Dataset]) -> None:
    del slices[2].ImagePositionPatient


def mosaic(slices: list[Dataset]) -> None:
    for data in slices:
        data.ImageType = ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]


def coloured(slices: list[Dataset]) -> None:
    for data in slices:
        data.PhotometricInterpretation, data.SamplesPerPixel = "RGB", 3


def by_table(slices: list[Dataset]) -> None:
    for data in slices:
        data.ModalityLUTSequence = [Dataset()]


def no_direction(slices: list[Dataset]) -> None:
    for data in slices:
        data.ImageOrientationPatient = [0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (second_echo, "up to 2 different images at each of 5 places, which differ in echo time"),
        (second_phase, "up to 2 different images at each of 5 places. Expected one volume"),
        (without_one, "1 of 5 slices are missing, the first gap between IM"),
        (without_two, "2 of 5 slices are missing, the first gap between IM"),
        (closer, "slices lie from 1.5 to 2.5 mm apart"),
        (shifted, "slices lie up to 2"),
        (turned_one, "images of 2 orientations in one series (4, 1 images)"),
        (smaller_one, "images of different sizes (4 of 7x6, 1 of 7x4)"),
        (zoomed_one, "images of different pixel spacing in one series"),
        (placeless, "images without position, direction or pixel spacing"),
        (mosaic, "each of its images is a mosaic of slices"),
        (coloured, "voxels of type RGB"),
        (by_table, "intensities by a table (Modality LUT)"),
        (no_direction, "directions or spacings that no image has"),
    ],
)
def test_what_is_no_volume_says_why(tmp_path: Path, spoil: Callable[[list[Dataset]], None], message: str) -> None:
    slices = slices_of(voxels(), OBLIQUE)
    assert read_stored_volume(save_slices(tmp_path / "sound", slices)).grid.shape == SHAPE
    spoil(slices)
    assert refusal(save_slices(tmp_path / "series", slices)).startswith(message)


def test_a_series_of_one_slice_is_read(tmp_path: Path) -> None:
    series = save_slices(tmp_path / "series", slices_of(voxels(), OBLIQUE)[:1])
    assert read_stored_volume(series).grid.shape == (7, 6, 1)
    assert analyze_case((series,), None, None).shape == (7, 6, 1)


def localizer() -> list[Dataset]:
    return slices_of(
        voxels(3), turned((1, 2, 0), (1, 1, 1)), SeriesInstanceUID=generate_uid(), ImageType=["ORIGINAL", "LOCALIZER"]
    )


def report() -> Dataset:
    data = slices_of(voxels(), OBLIQUE, Modality="SR")[0]
    for name in ("Rows", "Columns", "PixelData", "ImagePositionPatient"):
        delattr(data, name)
    return data


def test_a_study_is_its_one_volume_and_says_what_is_left_out(tmp_path: Path) -> None:
    slices = slices_of(voxels(), OBLIQUE)
    study = tmp_path / "study"
    save_slices(study / "a", slices[:2])
    save_slices(study / "b" / "c", slices[2:])
    save_slices(study / "scout", localizer())
    report().save_as(study / "dose", enforce_file_format=True)
    (study / "notes.txt").write_text("no DICOM")
    assert_same(study, as_nifti(tmp_path, voxels(), OBLIQUE))
    (warning,) = read_stored_volume(study).warnings
    assert warning.finding == "left out beside the CT series of 5 images: CT localizer of 5 images, 1 SR files"
    (study / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    assert_same(study / "DICOMDIR", study)


def test_a_screenshot_of_the_dose_is_left_out(tmp_path: Path) -> None:
    save_slices(tmp_path, slices_of(voxels(), OBLIQUE))
    picture = slices_of(voxels(), OBLIQUE, SeriesInstanceUID=generate_uid(), Modality="OT", SamplesPerPixel=3)[0]
    picture.PhotometricInterpretation, picture.PixelData = "RGB", bytes(3 * 6 * 7 * 2)
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        delattr(picture, name)
    picture.save_as(tmp_path / "dose", enforce_file_format=True)
    (warning,) = read_stored_volume(tmp_path).warnings
    assert warning.finding == "left out beside the CT series of 5 images: OT series of 1 image"


def long_series(folder: Path, num_slices: int) -> Path:
    """Slices of 32 kB each."""
    array = np.random.default_rng(0).integers(0, 200, (128, 128, num_slices)).astype("u2")
    return write_series(folder / f"n{num_slices}", array, OBLIQUE)


def peak_bytes(work: Callable[[], object]) -> int:
    """The most memory that work took at once, as Python and NumPy count it."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_stays_flat_however_many_slices_a_series_has(tmp_path: Path) -> None:
    def stream(series: Path) -> None:
        with FileImage([series]) as image:
            for start in range(0, image.shape[image.axis], 4):
                image.rows(start, min(start + 4, image.shape[image.axis]))

    stream(long_series(tmp_path, 5))  # imports
    short, long = (peak_bytes(partial(stream, long_series(tmp_path, num))) for num in (20, 100))
    slice_bytes = 128 * 128 * 2
    assert (long - short) / 80 < slice_bytes / 4  # a header for each slice, and no pixels
    # The analysis holds a case's voxels once, whatever their format.
    series = tmp_path / "n100"
    same = as_nifti(tmp_path, read_stored_volume(series).array[..., 0], OBLIQUE)
    by_format = [peak_bytes(partial(analyze_case, (path,), None, None)) for path in (same, series)]
    assert by_format[1] < by_format[0] + 20 * slice_bytes


def test_of_two_volumes_the_one_that_is_meant_is_named_by_a_file(tmp_path: Path) -> None:
    study = tmp_path / "study"
    save_slices(study, slices_of(voxels(), OBLIQUE))
    second = slices_of(voxels(1), TILTED, SeriesInstanceUID=generate_uid())
    save_slices(study, second, [f"X{n}" for n in range(5)])
    text = refusal(study)
    assert text.startswith(
        "a folder of 2 DICOM series: CT series of 5 images (IM0000), CT series of 5 images (X0). Give"
    )
    assert_same(study / "IM0003", as_nifti(tmp_path, voxels(), OBLIQUE))
    assert_same(study / "X1", as_nifti(tmp_path, voxels(1), TILTED))
    assert [p.name for p in image_files(study)] == ["IM0000", "X0"]


def test_the_images_of_a_folder(tmp_path: Path) -> None:
    for name in ("p1", "p2/study/series"):
        write_series(tmp_path / name, voxels(), OBLIQUE)
    write_series(tmp_path / "p3" / "ct", voxels(), OBLIQUE)
    write_series(tmp_path / "p3" / "mr", voxels(1), OBLIQUE, SeriesInstanceUID=generate_uid())
    (tmp_path / "empty").mkdir()
    as_nifti(tmp_path, voxels(), OBLIQUE)
    found = [p.relative_to(tmp_path).as_posix() for p in image_files(tmp_path)]
    assert found == ["p1", "p2", "p3/ct", "p3/mr", "same.nii"]
    assert image_files(tmp_path / "p1") == [tmp_path / "p1"]
    assert [p.name for p in image_files(tmp_path.parent, deep=True) if p.is_relative_to(tmp_path)]


def test_a_series_is_known_by_its_content(tmp_path: Path) -> None:
    series = write_series(tmp_path / "series", voxels(), OBLIQUE)
    digest, signature = image_digest(series), image_signature(series)
    assert read_stored_volume(series, with_digest=True).digest == digest == image_digest(series / "IM0000")
    assert len(files_of(series)) == 5
    (series / "IM0000").rename(series / "renamed")
    assert image_digest(series) == digest
    raw = bytearray((series / "renamed").read_bytes())
    raw[-1] ^= 1
    (series / "renamed").write_bytes(bytes(raw))
    assert image_digest(series) != digest
    assert image_signature(series) != signature


def test_damaged_files_are_named_whatever_is_wrong_and_the_patient_never_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    series = write_series(tmp_path / "series", voxels(), OBLIQUE)
    path = series / "IM0002"
    raw = path.read_bytes()
    path.write_bytes(raw[:-40])
    assert refusal(series).startswith("IM0002 ends after 22 of 42 pixels of an image. Copy")
    chosen = random.Random(0)
    num_refused = 0
    for _ in range(300):
        damaged = bytearray(raw)
        for _ in range(chosen.randint(1, 6)):
            place = chosen.randrange(128, len(damaged))
            if chosen.random() < 0.7:
                damaged[place] = chosen.randrange(256)
            else:
                del damaged[place : place + chosen.randint(1, 30)]
        path.write_bytes(bytes(damaged))
        dicom_files.read_dicom.__globals__["_read_dicom"].cache_clear()
        try:
            read_stored_volume(series)
        except DataError as error:
            text = str(error)
        else:
            text = ""
        num_refused += bool(text)
        assert not text or str(series) in text
        assert not any(word in text for word in PATIENT)
    assert num_refused > 100
    assert not any(word in caplog.text for word in PATIENT)


def test_no_field_that_names_a_patient_is_read() -> None:
    fields = {*dicom_files.FIELDS, *dicom_files.MARKS}
    odd = (
        "Patient",
        "Name",
        "Birth",
        "Date",
        "Address",
        "Institution",
        "Physician",
        "Operator",
        "Accession",
        "Comment",
    )
    assert {f for f in fields if any(word in f for word in odd)} == {"ImagePositionPatient", "ImageOrientationPatient"}


def test_without_pydicom_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    series = write_series(tmp_path / "images" / "series", voxels(), OBLIQUE)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    text = refusal(series)
    assert text == f"DICOM, and pydicom is not installed. {install_advice('formats')}"
    assert image_files(tmp_path / "images") == [series]  # not silently left out


@pytest.mark.skipif(not SINGLE.is_dir(), reason="the real files are not here")
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("dcmqi_23x38x3/image", (23, 38, 3)),
        ("dcmqi_23x38x3/multiframe", (23, 38, 3)),
        ("dcmqi_24x38x3/image", (24, 38, 3)),
        ("dcmqi_24x38x3/multiframe", (24, 38, 3)),
        ("dicom_ct_3slice_liver", (512, 512, 3)),
        ("niivue/dicom", (512, 512, 3)),
        ("niivue/enh.dcm", (64, 64, 6)),
        ("pydicom/dicomdir_98892001/CT5N", (16, 16, 5)),
    ],
)
def test_real_series_are_those_of_simpleitk(name: str, shape: tuple[int, ...]) -> None:
    path = SINGLE / name
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(path)) if path.is_dir() else (str(path),)
    image = sitk.ReadImage(names if len(names) > 1 else names[0])
    stored = read_stored_volume(path)
    assert stored.grid.shape == shape
    np.testing.assert_array_equal(stored.array[..., 0] * stored.slope + stored.inter, sitk.GetArrayFromImage(image).T)
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    np.testing.assert_allclose(stored.grid.affine, np.diag([-1, -1, 1, 1]) @ affine, atol=1e-4)


@pytest.mark.skipif(not SINGLE.is_dir(), reason="the real files are not here")
@pytest.mark.extra("gdcm")
def test_one_real_slice_in_six_encodings_is_the_same() -> None:
    """Plain, padded, big-endian, RLE, JPEG 2000 and JPEG-LS: copies of each other, as only equal pixels are."""
    assert [w.finding for w in read_stored_volume(SINGLE / "pydicom" / "MR_small.dcm").warnings] == [
        "5 slices are there more than once"
    ]


@pytest.mark.skipif(not SINGLE.is_dir(), reason="the real files are not here")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dicom_ct_gantry_tilt_ge", "slices lie from 1.081 to 6.999 mm apart"),
        ("nibabel", "each of its images is a mosaic of slices"),
        ("dcmqi_23x38x3/seg", "a folder without a scan in DICOM (1 SEG files)"),
        ("pydicom/dicomdir_98892001/CT2N", "images of 2 orientations in one series"),
        ("pydicom/dicomdir_98892003/MR1", "a folder of 3 DICOM series"),
        ("pydicom/dicomdir_98892003/MR700", "images of 7 orientations in one series"),
        ("pydicom/rtstruct.dcm", "a DICOM file of modality RTSTRUCT"),
    ],
)
def test_real_folders_that_are_no_volume_say_why(name: str, message: str) -> None:
    assert refusal(SINGLE / name).startswith(message)
