"""Segmentations as others' tools see them: slicerio of 3D Slicer, dcmqi, and dciodvfy, which knows DICOM."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from other_formats import enhanced_of, slices_of
from pydicom import dcmread
from pydicom.uid import EnhancedCTImageStorage, generate_uid

from autoseg.data.formats.format import LabelFile
from autoseg.data.formats.segmentation import Colour
from autoseg.data.formats.table import WRITERS, read_grid
from autoseg.data.labels import LabelMap
from autoseg.data.segments import segments_of

SHAPE = (20, 18, 6)
AFFINE = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.2, 0.1, -0.3) @ np.diag([-1, -0.9, 1.8]), [3, -20, 5])
NAMES = ("liver", "kidney_left", "liver tumor")
ORGANS = LabelMap(names=NAMES, values=((1,), (2,), (7,)))
REGIONS = LabelMap(names=NAMES, values=((1,), (2,), (7,)), sigmoid=True).with_overlaps()
COLOURS: dict[str, Colour] = {"kidney_left": (20, 200, 90)}
STUDY = {"StudyDate": "20240101", "StudyTime": "101500", "StudyID": "1", "SeriesNumber": 3, "InstanceNumber": 1}


def series(folder: Path, *, is_enhanced: bool = False) -> Path:
    """A series whose fields are all that the standard asks for of a study."""
    folder.mkdir()
    uids = {name: generate_uid() for name in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")}
    array = np.random.default_rng(0).integers(-400, 400, SHAPE).astype(np.int16)
    files = slices_of(array, AFFINE)
    if is_enhanced:
        files = [enhanced_of(array, AFFINE)]
        files[0].SOPClassUID = files[0].file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    for number, data in enumerate(files):
        for name, value in {**STUDY, **uids}.items():
            setattr(data, name, value)
        data.save_as(folder / f"{number}.dcm", enforce_file_format=True)
    return folder


def masks(label_map: LabelMap) -> np.ndarray:
    """(classes, I, J, K): where each class is; regions overlap."""
    target = np.zeros((3, *SHAPE), np.uint8)
    target[0, 2:10, 3:9, 1:5], target[1, 12:15, 3:9, 2:4], target[2, 4:6, 4:6, 2:6] = 1, 1, 1
    if not label_map.sigmoid:
        target[0] &= 1 - target[2]
    return target


def write(path: Path, name: str, label_map: LabelMap, images: Path) -> Path:
    grid = read_grid(images)[0]
    segments = segments_of(label_map, {}, COLOURS)
    target = masks(label_map)
    array = (
        label_map.decode(target)
        if label_map.sigmoid
        else sum(
            (mask * value for mask, (value,) in zip(target, label_map.values, strict=True)), np.zeros(SHAPE, np.uint8)
        )
    )
    WRITERS[name].write(path, LabelFile(grid=grid, array=array, segments=segments, images=(images,)))
    return path


def tool(package: str, name: str) -> Path:
    """A program that a package brings."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    return Path(str(spec.origin)).parent / "bin" / name


@pytest.mark.extra("slicerio")
@pytest.mark.parametrize("label_map", [ORGANS, REGIONS], ids=["classes", "regions"])
def test_slicerio_reads_names_values_codes_and_colours(tmp_path: Path, label_map: LabelMap) -> None:
    import slicerio

    path = write(tmp_path / "a.seg.nrrd", "seg.nrrd", label_map, series(tmp_path / "images"))
    segmentation = slicerio.read_segmentation(str(path))
    assert [segment["name"] for segment in segmentation["segments"]] == list(NAMES)
    for segment, mask in zip(segmentation["segments"], masks(label_map), strict=True):
        voxels = segmentation["voxels"]
        layer = voxels[segment["layer"]] if voxels.ndim == 4 else voxels
        np.testing.assert_array_equal(layer == segment["labelValue"], mask)
    liver, kidney, tumor = segmentation["segments"]
    assert liver["terminology"]["type"] == ["SCT", "10200004", "Liver"]
    assert kidney["terminology"]["typeModifier"] == ["SCT", "7771000", "Left"]
    assert tumor["terminology"]["anatomicRegion"] == ["SCT", "10200004", "Liver"]
    np.testing.assert_allclose(np.array(kidney["color"]) * 255, COLOURS["kidney_left"], atol=0.01)
    lps = np.diag([-1.0, -1, 1, 1]) @ AFFINE
    np.testing.assert_allclose(segmentation["ijkToLPS"], lps, atol=1e-6)


@pytest.mark.extra("dicom3tools")
@pytest.mark.parametrize("is_enhanced", [False, True], ids=["slices", "enhanced"])
@pytest.mark.parametrize("label_map", [ORGANS, REGIONS], ids=["classes", "regions"])
@pytest.mark.parametrize("name", ["dicomseg", "rtstruct"])
def test_dciodvfy_has_nothing_to_say(tmp_path: Path, name: str, label_map: LabelMap, is_enhanced: bool) -> None:
    path = write(tmp_path / "a.dcm", name, label_map, series(tmp_path / "images", is_enhanced=is_enhanced))
    run = subprocess.run([tool("dicom3tools", "dciodvfy"), path], capture_output=True, text=True, check=False)
    kind = {"dicomseg": "Segmentation", "rtstruct": "RTStructureSet"}[name]
    assert (run.stdout + run.stderr).split() == [kind]


@pytest.mark.extra("dcmqi")
@pytest.mark.parametrize("label_map", [ORGANS, REGIONS], ids=["classes", "regions"])
def test_dcmqi_makes_the_same_masks_of_it(tmp_path: Path, label_map: LabelMap) -> None:
    path = write(tmp_path / "a.dcm", "dicomseg", label_map, series(tmp_path / "images"))
    out = tmp_path / "out"
    out.mkdir()
    command = [tool("dcmqi", "segimage2itkimage"), "--inputDICOM", path, "--outputDirectory", out, "-t", "nrrd"]
    subprocess.run(command, check=True, capture_output=True)
    for number, mask in enumerate(masks(label_map), 1):
        image = sitk.ReadImage(str(out / f"{number}.nrrd"))
        whole = sitk.Resample(image, sitk_grid(), sitk.Transform(), sitk.sitkNearestNeighbor)
        np.testing.assert_array_equal(sitk.GetArrayFromImage(whole).T != 0, mask)
    about = json.loads((out / "meta.json").read_text())
    segments = [segment for group in about["segmentAttributes"] for segment in group]
    assert [segment["SegmentLabel"] for segment in segments] == list(NAMES)
    kidney = segments[1]
    assert kidney["SegmentedPropertyTypeModifierCodeSequence"]["CodeMeaning"] == "Left"
    assert kidney["recommendedDisplayRGBValue"] == list(COLOURS["kidney_left"])
    assert dcmread(path).SegmentSequence[2].AnatomicRegionSequence[0].CodeMeaning == "Liver"


def sitk_grid() -> sitk.Image:
    """An image of the series' grid."""
    image = sitk.Image(*SHAPE, sitk.sitkUInt8)
    lps = np.diag([-1.0, -1, 1, 1]) @ AFFINE
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    return image
