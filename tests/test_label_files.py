"""Label files in each format that is written, read back by the libraries of each."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import nrrd
import numpy as np
import pytest
import SimpleITK as sitk

from autoseg.data.formats.format import LabelFile
from autoseg.data.formats.label_files import value_names
from autoseg.data.formats.table import WRITERS, read_grid, read_stored_volume, writer_of
from autoseg.data.grid import Grid, corners_apart_mm
from autoseg.data.labels import LabelMap
from autoseg.data.segments import class_colours, layers_of, mask_of, segments_of
from autoseg.data.streams import LabelRows
from autoseg.data.volumes import read_label, write_volume
from autoseg.errors import DataError

OBLIQUE = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.3, -0.2, 0.1) @ np.diag([-0.75, 1.5, 2.5]), [31.5, -20.25, 7.125]
)
SHEARED = np.array([[0.75, 0, 0, 3], [0, 1.5, 0.6, 4], [0, 0, 2.5, 5], [0, 0, 0, 1.0]])
AFFINES = {
    "ras": np.diag([0.7, 0.7, 5.0, 1.0]),
    "lps": np.diag([-1.0, -1.25, 3.0, 1.0]),
    "permuted": np.array([[0, 0, 1.1, 0], [-0.9, 0, 0, 4], [0, 2.5, 0, 9], [0, 0, 0, 1.0]]),
    "oblique": OBLIQUE,
}
SHAPE = (9, 7, 5)
ORGANS = LabelMap(names=("liver", "kidney_left", "Größe"), values=((1,), (2,), (7,)))
REGIONS = LabelMap(names=("whole", "core", "edge"), values=((1,), (2,), (3,)), sigmoid=True)
"""Regions that overlap where no label value says so."""


def labels(high: int = 3, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, high, SHAPE).astype(dtype)


def write(
    path: Path, array: np.ndarray, affine: np.ndarray, label_map: LabelMap = ORGANS, name: str | None = None
) -> Path:
    grid = Grid(shape=array.shape, affine=affine)
    writer_of(path, name).write(path, LabelFile(grid=grid, array=array, segments=segments_of(label_map, {})))
    return path


@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
@pytest.mark.parametrize("suffix", [".nrrd", ".seg.nrrd", ".mha"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_itk_and_the_own_reader_read_the_same_voxels_and_place(
    tmp_path: Path, affine: np.ndarray, suffix: str, dtype: type
) -> None:
    array = labels(3, dtype)
    path = write(tmp_path / f"a{suffix}", array, affine)
    image = sitk.ReadImage(str(path))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image).T, array)
    direction = np.array(image.GetDirection()).reshape(3, 3) @ np.diag(image.GetSpacing())
    np.testing.assert_allclose(np.diag([-1, -1, 1]) @ direction, affine[:3, :3], atol=1e-6)
    np.testing.assert_allclose(np.diag([-1, -1, 1]) @ np.array(image.GetOrigin()), affine[:3, 3], atol=1e-6)
    grid, _ = read_grid(path)
    assert corners_apart_mm(grid.affine, affine, SHAPE) < 1e-4
    own = read_label(path)
    nib.save(nib.Nifti1Image(array, affine), tmp_path / "same.nii")
    np.testing.assert_array_equal(own.array, read_label(tmp_path / "same.nii").array)


@pytest.mark.parametrize("suffix", [".nrrd", ".seg.nrrd", ".mha"])
def test_a_sheared_grid_is_kept(tmp_path: Path, suffix: str) -> None:
    grid, _ = read_grid(write(tmp_path / f"a{suffix}", labels(), SHEARED))
    assert corners_apart_mm(grid.affine, SHEARED, SHAPE) < 1e-4


def test_large_values_in_nrrd_and_mha(tmp_path: Path) -> None:
    array = labels(60000, np.uint16)
    for suffix in (".nrrd", ".mha"):
        path = write(tmp_path / f"a{suffix}", array, OBLIQUE)
        np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(path))).T, array)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".seg.nrrd", ".mha"])
def test_labels_of_the_other_byte_order_are_the_same_file(tmp_path: Path, suffix: str) -> None:
    array = labels(60000, np.uint16) // 7000 * 7000
    classes = LabelMap(names=tuple("abcdefgh"), values=tuple((7000 * n,) for n in range(1, 9)))
    little = write(tmp_path / f"little{suffix}", array.astype("<u2"), OBLIQUE, classes)
    big = write(tmp_path / f"big{suffix}", array.astype(">u2"), OBLIQUE, classes)
    assert big.read_bytes() == little.read_bytes()
    np.testing.assert_array_equal(read_stored_volume(big).array[..., 0], array)


def test_rows_and_a_whole_label_are_one_file_in_every_format(tmp_path: Path) -> None:
    grid = Grid(shape=SHAPE, affine=AFFINES["lps"])
    ras = labels()
    for suffix in (".nii.gz", ".nii", ".nrrd", ".mha"):
        write_volume(tmp_path / f"whole{suffix}", ras, grid)
        with LabelRows(tmp_path / f"rows{suffix}", grid, np.dtype(np.uint8)) as out:
            for start in range(0, SHAPE[2], 2):
                out.write(start, ras[:, :, start : start + 2])
        assert (tmp_path / f"rows{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()


def test_what_slicer_is_told_of_segments(tmp_path: Path) -> None:
    array = np.zeros(SHAPE, np.uint8)
    array[1:4, 2:5, 1:3], array[5:8, 0:2, 4] = 1, 7
    path = write(tmp_path / "a.seg.nrrd", array, OBLIQUE)
    stored, header = nrrd.read(str(path))
    np.testing.assert_array_equal(stored, array)
    assert header["Segmentation_MasterRepresentation"] == "Binary labelmap"
    assert (header["space"], header["dimension"]) == ("left-posterior-superior", 3)
    np.testing.assert_array_equal(header["space directions"], (np.diag([-1, -1, 1]) @ OBLIQUE[:3, :3]).T)
    keys = ("Name", "LabelValue", "Layer", "Extent", "ID")
    assert [[header[f"Segment{n}_{key}"] for key in keys] for n in (0, 1)] == [
        ["liver", "1", "0", "1 3 2 4 1 2", "Segment_1"],
        ["kidney_left", "2", "0", "0 -1 0 -1 0 -1", "Segment_2"],
    ]
    assert header["Segment2_LabelValue"] == "7"
    assert header["Segment2_Extent"] == "5 7 0 1 4 4"
    lists = "Segmentation category and type - 3D Slicer General Anatomy list", "Anatomic codes - DICOM master list"
    assert header["Segment1_Tags"] == (
        f"Segmentation.Status:inprogress|TerminologyEntry:{lists[0]}~SCT^123037004^Anatomical Structure~"
        f"SCT^64033007^Kidney~SCT^7771000^Left~{lists[1]}~^^~^^|"
    )
    colour = [round(float(part) * 255) for part in header["Segment0_Color"].split()]
    assert tuple(colour) == class_colours(1)[0]
    assert value_names(path) == {1: "liver", 2: "kidney_left", 7: "Größe"}


def test_regions_that_overlap_lie_in_layers(tmp_path: Path) -> None:
    target = np.zeros((3, *SHAPE), np.uint8)
    target[0, :6], target[1, 2:8], target[2, 0] = 1, 1, 1
    full = REGIONS.with_overlaps()
    path = write(tmp_path / "a.seg.nrrd", full.decode(target), OBLIQUE, full)
    stored, header = nrrd.read(str(path))
    assert stored.shape == (2, *SHAPE)  # the third overlaps the first alone, so that it lies beside the second
    assert header["kinds"] == ["list", "domain", "domain", "domain"]
    for n, name in enumerate(full.names):
        assert header[f"Segment{n}_Name"] == name
        layer, value = int(header[f"Segment{n}_Layer"]), int(header[f"Segment{n}_LabelValue"])
        np.testing.assert_array_equal(stored[layer] == value, target[n] == 1)
    assert [header[f"Segment{n}_Layer"] for n in range(3)] == ["0", "1", "1"]


@pytest.mark.parametrize("count", [1, 3, 8, 15])
def test_no_set_of_regions_is_lost(count: int) -> None:
    names = tuple(f"r{i}" for i in range(count))
    regions = LabelMap(names=names, values=tuple((i + 1,) for i in range(count)), sigmoid=True)
    full = regions.with_overlaps()
    target = np.random.default_rng(1).integers(0, 2, (count, 6, 5, 4)).astype(np.uint8)
    decoded = full.decode(target)
    np.testing.assert_array_equal(full.encode(decoded), target)
    segments = segments_of(full, {})
    for channel, segment in zip(target, segments, strict=True):
        np.testing.assert_array_equal(mask_of(decoded, segment), channel == 1)
    for layer in layers_of(decoded, segments):
        assert sum(mask_of(decoded, s).astype(int) for s in layer).max() <= 1
    assert sorted(s.name for layer in layers_of(decoded, segments) for s in layer) == sorted(names)


def test_overlaps_that_cannot_be_are_left_alone() -> None:
    assert ORGANS.with_overlaps() is ORGANS
    many = LabelMap(names=tuple(map(str, range(16))), values=tuple((i + 1,) for i in range(16)), sigmoid=True)
    assert many.with_overlaps() is many


def test_colours_differ() -> None:
    colours = class_colours(150)
    assert len(set(colours)) == 150
    assert class_colours(9) == colours[:9]
    few = np.array(class_colours(20), float)
    away = np.linalg.norm(few[:, None] - few, axis=-1) + 999 * np.eye(20)
    assert away.min() > 60


def test_the_writer_is_chosen_by_suffix_and_name() -> None:
    chosen = {"a.nii.gz": "nifti", "a.nii": "nifti", "a.NRRD": "nrrd", "a.seg.nrrd": "seg.nrrd", "a.mha": "mha"}
    chosen |= {"a.dcm": "dicomseg", "a.seg.dcm": "dicomseg", "a.rtstruct.dcm": "rtstruct"}
    for name, writer in chosen.items():
        assert writer_of(Path(name)).name == writer
    assert writer_of(Path("a.dcm"), "rtstruct") is WRITERS["rtstruct"]
    with pytest.raises(DataError, match=r"a\.mhd: label files are not written as \.mhd\. Expected one of \.nii\.gz, "):
        writer_of(Path("a.mhd"))
    message = r"a\.mha: label files are not written as \.mha in the format nrrd\. Expected one of \.nrrd\."
    with pytest.raises(DataError, match=message):
        writer_of(Path("a.mha"), "nrrd")
