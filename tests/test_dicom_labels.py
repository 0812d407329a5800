"""Labels as DICOM-SEG and RTSTRUCT: read back by highdicom, pydicom and matplotlib, and refused with the reason."""

from __future__ import annotations

import sys
import tracemalloc
from pathlib import Path

import highdicom as hd
import nibabel as nib
import numpy as np
import pytest
from highdicom._standard_utils import get_iod_module_map, get_module_attribute_map
from matplotlib.path import Path as Outline
from other_formats import PATIENT, enhanced_of, save_slices, slices_of, write_series
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import EnhancedCTImageStorage

from autoseg.data.formats.dicom_rtstruct_writer import contours_of
from autoseg.data.formats.format import LabelFile
from autoseg.data.formats.table import WRITERS, read_grid, read_stored_volume
from autoseg.data.labels import LabelMap
from autoseg.data.segments import segments_of
from autoseg.errors import DataError

SHAPE = (24, 20, 9)
SPACING = np.diag([0.75, 1.5, 2.5])
OBLIQUE = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.3, -0.2, 0.1) @ SPACING, [31.5, -20.25, 7.125])
TILTED = np.array([[0.75, 0, 0, 3], [0, 1.5, 0.6, 4], [0, 0, 2.5, 5], [0, 0, 0, 1.0]])
CORONAL = np.array([[-0.75, 0, 0, 3], [0, 0, 2.5, 4], [0, -1.5, 0, 5], [0, 0, 0, 1.0]])
AFFINES = {"oblique": OBLIQUE, "tilted": TILTED, "coronal": CORONAL, "lps": np.diag([-0.75, -1.5, 2.5, 1])}
ORGANS = LabelMap(names=("liver", "kidney_left", "liver tumor", "Größe"), values=((1,), (2,), (4,), (5,)))
REGIONS = LabelMap(names=("whole", "core"), values=((1,), (2,)), sigmoid=True)


def label_of(image: Path, array: np.ndarray, label_map: LabelMap = ORGANS) -> LabelFile:
    """A label on an image's grid."""
    grid, _ = read_grid(image)
    return LabelFile(grid=grid, array=array, segments=segments_of(label_map, {}), images=(image,))


def save(path: Path, name: str, image: Path, array: np.ndarray, label_map: LabelMap = ORGANS) -> Dataset:
    WRITERS[name].check((image,))  # type: ignore[misc]
    WRITERS[name].write(path, label_of(image, array, label_map))
    return dcmread(path)


def organs() -> np.ndarray:
    """Label values, on the grid as a series is read."""
    array = np.random.default_rng(0).choice([0, 0, 1, 2, 4], SHAPE).astype(np.uint8)
    array[:, :, 3] = 0  # a slice without anything
    return array


def ball(shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    away = np.indices(shape).T / (np.array(shape) - 1) - 0.5
    return (np.linalg.norm(away, axis=-1) < 0.4).T.astype(np.uint8)


def instances(series: Path, array: np.ndarray) -> list[str]:
    """The images' UIDs in the order of the slices of a volume."""
    grid, _ = read_grid(series)
    lps = np.diag([-1, -1, 1, 1]) @ grid.affine
    by_place = {
        tuple(np.round(np.array(data.ImagePositionPatient, float), 3)): data.SOPInstanceUID
        for data in (dcmread(p, stop_before_pixels=True) for p in series.iterdir())
    }
    return [by_place[tuple(np.round((lps @ [0, 0, k, 1])[:3], 3))] for k in range(array.shape[2])]


@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
def test_a_segmentation_is_the_label_voxel_by_voxel(tmp_path: Path, affine: np.ndarray) -> None:
    series = write_series(tmp_path / "series", np.zeros(SHAPE, np.int16), affine)
    array = organs()
    save(tmp_path / "a.dcm", "dicomseg", series, array)
    seg = hd.seg.segread(tmp_path / "a.dcm")
    uids = instances(series, array)
    masks = seg.get_pixels_by_source_instance(uids, assert_missing_frames_are_empty=True)
    for number, value in enumerate((1, 2, 4, 5)):
        np.testing.assert_array_equal(masks[..., number].astype(bool).T.swapaxes(0, 0), (array == value))
    # The frames say where they lie, too: the volume of the masks has the label's grid.
    volume = seg.get_volume(combine_segments=True) if affine is not TILTED else None
    if volume is not None:
        lps = np.diag([-1, -1, 1, 1]) @ read_grid(series)[0].affine
        places = np.argwhere(volume.array > 0)
        mm = places @ volume.affine[:3, :3].T + volume.affine[:3, 3]
        own = np.argwhere(array > 0) @ lps[:3, :3].T + lps[:3, 3]
        order, own_order = (np.lexsort(np.round(p, 2).T) for p in (mm, own))
        np.testing.assert_allclose(mm[order], own[own_order], atol=1e-3)


def test_a_segmentation_says_what_it_is_of(tmp_path: Path) -> None:
    series = write_series(tmp_path / "series", np.zeros(SHAPE, np.int16), OBLIQUE, SeriesNumber=7)
    array = organs()
    data = save(tmp_path / "a.dcm", "dicomseg", series, array)
    source = dcmread(next(series.iterdir()))
    assert (data.SegmentationType, data.SegmentsOverlap, data.Modality) == ("BINARY", "NO", "SEG")
    assert data.StudyInstanceUID == source.StudyInstanceUID
    assert data.FrameOfReferenceUID == source.FrameOfReferenceUID
    assert data.SeriesInstanceUID != source.SeriesInstanceUID
    # The patient's record: the standard has the segmentation carry whose it is.
    assert (data.PatientName, data.PatientID, data.PatientBirthDate) == PATIENT
    referred = data.ReferencedSeriesSequence[0]
    assert referred.SeriesInstanceUID == source.SeriesInstanceUID
    assert {item.ReferencedSOPInstanceUID for item in referred.ReferencedInstanceSequence} == {
        *instances(series, array)
    }
    liver, kidney, tumor, other = data.SegmentSequence
    for item, name in zip((liver, kidney, tumor, other), ORGANS.names, strict=True):
        assert (item.SegmentLabel, item.SegmentAlgorithmType) == (name, "AUTOMATIC")
        algorithm = item.SegmentationAlgorithmIdentificationSequence[0]
        assert (algorithm.AlgorithmName, algorithm.AlgorithmFamilyCodeSequence[0].CodeValue) == ("autoseg3d", "123109")
    coded = liver.SegmentedPropertyTypeCodeSequence[0]
    assert (coded.CodingSchemeDesignator, coded.CodeValue, coded.CodeMeaning) == ("SCT", "10200004", "Liver")
    assert liver.SegmentedPropertyCategoryCodeSequence[0].CodeValue == "123037004"
    side = kidney.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence[0]
    assert (side.CodeValue, side.CodeMeaning) == ("7771000", "Left")
    assert tumor.SegmentedPropertyTypeCodeSequence[0].CodeValue == "108369006"
    assert tumor.SegmentedPropertyCategoryCodeSequence[0].CodeValue == "49755003"
    assert tumor.AnatomicRegionSequence[0].CodeValue == "10200004"
    assert other.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Tissue"
    lab = hd.color.CIELabColor.from_dicom_value(tuple(liver.RecommendedDisplayCIELabValue))
    np.testing.assert_allclose(lab.to_rgb(), segments_of(ORGANS, {})[0].colour, atol=1)


def test_overlapping_regions_take_little_more_memory_than_their_masks(tmp_path: Path) -> None:
    shape = (512, 512, 6)
    label_map = LabelMap(names=("whole", "core", "rim"), values=((1, 2, 3), (2, 3), (1, 3)), sigmoid=True)
    series = write_series(tmp_path / "series", np.zeros(shape, np.int16), OBLIQUE)
    array = np.random.default_rng(0).integers(0, 4, shape).astype(np.uint8)
    save(tmp_path / "first.dcm", "dicomseg", series, array[:, :, ::-1], label_map)  # what is imported does not count
    label = label_of(series, array, label_map)
    tracemalloc.start()
    WRITERS["dicomseg"].write(tmp_path / "a.dcm", label)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 2 * array.size * len(label_map.names)
    seg = hd.seg.segread(tmp_path / "a.dcm")
    assert seg.SegmentsOverlap == "YES"
    masks = seg.get_pixels_by_source_instance(instances(series, array))
    for number, values in enumerate(label_map.values):
        np.testing.assert_array_equal(masks[..., number].astype(bool).T.swapaxes(0, 0), np.isin(array, values))


def test_regions_stay_overlapping(tmp_path: Path) -> None:
    series = write_series(tmp_path / "series", np.zeros(SHAPE, np.int16), OBLIQUE)
    full = REGIONS.with_overlaps()
    target = np.random.default_rng(2).integers(0, 2, (2, *SHAPE)).astype(np.uint8)
    data = save(tmp_path / "a.dcm", "dicomseg", series, full.decode(target), full)
    assert data.SegmentsOverlap == "YES"
    masks = hd.seg.segread(tmp_path / "a.dcm").get_pixels_by_source_instance(instances(series, target[0]))
    np.testing.assert_array_equal(np.moveaxis(masks, -1, 0).swapaxes(1, 3), target)


def test_an_empty_label_is_a_segmentation_without_anything(tmp_path: Path) -> None:
    series = write_series(tmp_path / "series", np.zeros(SHAPE, np.int16), OBLIQUE)
    array = np.zeros(SHAPE, np.uint8)
    save(tmp_path / "a.dcm", "dicomseg", series, array)
    masks = hd.seg.segread(tmp_path / "a.dcm").get_pixels_by_source_instance(instances(series, array))
    assert masks.shape == (SHAPE[2], SHAPE[1], SHAPE[0], 4)
    assert not masks.any()
    structures = save(tmp_path / "r.dcm", "rtstruct", series, array)
    assert [roi.ROIName for roi in structures.StructureSetROISequence] == [*ORGANS.names]
    assert not any("ContourSequence" in item for item in structures.ROIContourSequence)


def test_a_file_of_several_images_is_referred_to_by_frame(tmp_path: Path) -> None:
    path = tmp_path / "enhanced.dcm"
    enhanced = enhanced_of(np.zeros(SHAPE, np.int16), OBLIQUE)
    enhanced.SOPClassUID = enhanced.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    enhanced.save_as(path, enforce_file_format=True)
    array = organs()
    data = save(tmp_path / "a.dcm", "dicomseg", path, array)
    uid = dcmread(path).SOPInstanceUID
    frames = list(range(SHAPE[2], 0, -1))  # the file has its slices from the last to the first
    masks = hd.seg.segread(tmp_path / "a.dcm").get_pixels_by_source_frame(
        uid, frames, assert_missing_frames_are_empty=True
    )
    np.testing.assert_array_equal(masks[..., 0].T, array == 1)
    assert data.ReferencedSeriesSequence[0].ReferencedInstanceSequence[0].ReferencedSOPInstanceUID == uid
    structures = save(tmp_path / "r.dcm", "rtstruct", path, array)
    numbers = {
        int(contour.ContourImageSequence[0].ReferencedFrameNumber)
        for contour in structures.ROIContourSequence[0].ContourSequence
    }
    assert numbers == {9, 8, 7, 5, 4, 3, 2, 1}  # the fourth slice is empty, the sixth frame


# -- RTSTRUCT


def filled(structures: Dataset, roi: int, series: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A region's contours as voxels: those whose centre lies inside; contours in a slice add up by exclusive or."""
    grid, _ = read_grid(series)
    to_voxel = np.linalg.inv(np.diag([-1, -1, 1, 1]) @ grid.affine)
    mask = np.zeros(shape, bool)
    centres = np.indices(shape[:2]).reshape(2, -1).T
    images = instances(series, mask)
    for contour in structures.ROIContourSequence[roi].get("ContourSequence", []):
        points = np.array(contour.ContourData, float).reshape(-1, 3)
        assert contour.NumberOfContourPoints == len(points)
        assert contour.ContourGeometricType == "CLOSED_PLANAR"
        voxels = points @ to_voxel[:3, :3].T + to_voxel[:3, 3]
        k = round(float(voxels[0, 2]))
        np.testing.assert_allclose(voxels[:, 2], k, atol=1e-4)  # on the slice
        assert contour.ContourImageSequence[0].ReferencedSOPInstanceUID == images[k]
        mask[:, :, k] ^= Outline(voxels[:, :2]).contains_points(centres).reshape(shape[:2])
    return mask


@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
def test_contours_hold_the_voxels_of_the_label(tmp_path: Path, affine: np.ndarray) -> None:
    series = write_series(tmp_path / "series", np.zeros(SHAPE, np.int16), affine)
    smooth = ball() + 3 * (np.roll(ball(), 2, axis=0) & ball())  # one and its rest: 1 and 4
    structures = save(tmp_path / "r.dcm", "rtstruct", series, smooth)
    for roi, value in ((0, 1), (2, 4)):
        found = filled(structures, roi, series, SHAPE)
        truth = smooth == value
        assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) >= 0.999


def test_what_a_structure_set_says(tmp_path: Path) -> None:
    series = write_series(tmp_path / "series", np.zeros(SHAPE, np.int16), OBLIQUE)
    data = save(tmp_path / "r.dcm", "rtstruct", series, organs())
    source = dcmread(next(series.iterdir()))
    assert (data.Modality, data.StudyInstanceUID) == ("RTSTRUCT", source.StudyInstanceUID)
    assert (data.PatientName, data.PatientID, data.PatientBirthDate) == PATIENT
    frame = data.ReferencedFrameOfReferenceSequence[0]
    assert frame.FrameOfReferenceUID == source.FrameOfReferenceUID
    referred = frame.RTReferencedStudySequence[0].RTReferencedSeriesSequence[0]
    assert referred.SeriesInstanceUID == source.SeriesInstanceUID
    assert [i.ReferencedSOPInstanceUID for i in referred.ContourImageSequence] == instances(series, organs())
    assert [(roi.ROINumber, roi.ROIName) for roi in data.StructureSetROISequence] == [*enumerate(ORGANS.names, 1)]
    assert all(roi.ReferencedFrameOfReferenceUID == source.FrameOfReferenceUID for roi in data.StructureSetROISequence)
    assert [tuple(item.ROIDisplayColor) for item in data.ROIContourSequence] == [
        s.colour for s in segments_of(ORGANS, {})
    ]
    kidney = data.RTROIObservationsSequence[1]
    assert (kidney.ReferencedROINumber, kidney.RTROIInterpretedType) == (2, "ORGAN")
    coded = kidney.RTROIIdentificationCodeSequence[0]
    assert (coded.CodeValue, coded.SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning) == ("64033007", "Left")


def test_a_structure_set_has_what_the_standard_asks_for_and_nothing_else(tmp_path: Path) -> None:
    series = write_series(tmp_path / "series", np.zeros(SHAPE, np.int16), OBLIQUE)
    data = save(tmp_path / "r.dcm", "rtstruct", series, organs())
    attributes = get_module_attribute_map()
    allowed: dict[tuple[str, ...], set[str]] = {}
    for module in get_iod_module_map()["rt-structure-set"]:
        for attribute in attributes[module["key"]]:
            allowed.setdefault(tuple(attribute["path"]), set()).add(attribute["keyword"])
            levels = [data]
            for name in attribute["path"]:
                levels = [item for level in levels if name in level for item in level[name].value]
            if module["usage"] == "M" and attribute["type"] in ("1", "2"):
                for level in levels:
                    assert attribute["keyword"] in level, (module["key"], attribute)
                    assert attribute["type"] == "2" or level[attribute["keyword"]].value not in ("", None), attribute
    todo: list[tuple[tuple[str, ...], Dataset]] = [((), data)]
    while todo:
        path, level = todo.pop()
        for element in level:
            assert element.keyword in allowed[path], (path, element.keyword)
            if element.VR == "SQ":
                todo += [((*path, element.keyword), item) for item in element.value]


@pytest.mark.parametrize("seed", range(4))
def test_keyholes_join_holes_without_losing_a_voxel(seed: int) -> None:
    """Even-odd and non-zero winding, the two rules that readers fill by, both give the mask back."""
    rng = np.random.default_rng(seed)
    mask = rng.random((40, 30)) < (0.6 if seed else 0)
    mask[5:35, 5:25] |= rng.random((30, 20)) < 0.9
    if not seed:  # rings within rings, and holes above each other
        mask[2:38, 2:28] = True
        mask[4:36, 4:26] = False
        mask[6:34, 6:24] = True
        mask[10:14, 8:10] = mask[10:14, 12:14] = mask[20, 15] = False
    centres = np.indices(mask.shape).reshape(2, -1).T
    even_odd, winding = np.zeros(mask.shape, bool), np.zeros(mask.shape, int)
    for polygon in contours_of(mask):
        inside = Outline(polygon).contains_points(centres).reshape(mask.shape)
        assert not (even_odd & inside).any()  # no contour lies within another: no reader has to know of holes
        even_odd |= inside
        winding += winding_numbers(polygon, centres).reshape(mask.shape)
    np.testing.assert_array_equal(even_odd, mask)
    np.testing.assert_array_equal(winding != 0, mask)


def winding_numbers(polygon: np.ndarray, points: np.ndarray) -> np.ndarray:
    """How often a polygon goes around points; counted by the edges that a line to the right crosses."""
    total = np.zeros(len(points), int)
    for (ax, ay), (bx, by) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        if ay == by:
            continue
        x, y = points.T
        at = ax + (y - ay) * (bx - ax) / (by - ay)
        total += ((ay <= y) & (y < by) & (at > x)).astype(int) - ((by <= y) & (y < ay) & (at > x)).astype(int)
    return total


# -- what is refused


def test_only_a_dicom_image_has_dicom_labels(tmp_path: Path) -> None:
    path = tmp_path / "a.nii"
    nib.save(nib.Nifti1Image(np.zeros(SHAPE, np.int16), OBLIQUE), path)
    for name, words in (("dicomseg", "DICOM-SEG"), ("rtstruct", "RTSTRUCT")):
        with pytest.raises(DataError, match=rf"a\.nii: no DICOM series, and {words} refers to the DICOM images"):
            WRITERS[name].check((path,))  # type: ignore[misc]


@pytest.mark.parametrize("name", ["dicomseg", "rtstruct"])
def test_images_that_cannot_be_referred_to_are_refused(tmp_path: Path, name: str) -> None:
    slices = slices_of(np.zeros(SHAPE, np.int16), OBLIQUE)
    for data in slices:
        del data.FrameOfReferenceUID
    series = save_slices(tmp_path / "series", slices)
    with pytest.raises(DataError, match=r"needs FrameOfReferenceUID, which the images do not have\. Choose") as caught:
        WRITERS[name].check((series,))  # type: ignore[misc]
    assert not any(word in str(caught.value) for word in PATIENT)
    slices = slices_of(np.zeros(SHAPE, np.int16), OBLIQUE)
    slices[-1].StudyInstanceUID = "1.2.3"
    other = save_slices(tmp_path / "other", slices)
    WRITERS[name].check((other,))  # type: ignore[misc]
    with pytest.raises(DataError, match=r"another StudyInstanceUID than IM"):
        WRITERS[name].write(tmp_path / "a.dcm", label_of(other, organs()))
    assert not (tmp_path / "a.dcm").exists()


@pytest.mark.parametrize("name", ["dicomseg", "rtstruct"])
def test_a_damaged_field_that_reading_does_not_need_is_named_without_its_value(tmp_path: Path, name: str) -> None:
    slices = slices_of(np.zeros(SHAPE, np.int16), OBLIQUE)
    for data in slices:
        data.add_new("SmallestImagePixelValue", "SS", 5)
    series = save_slices(tmp_path / "series", slices)
    last = sorted(series.iterdir())[-1]
    field = b"\x28\0\x06\1SS"
    last.write_bytes(last.read_bytes().replace(field + b"\2\0\5\0", field + b"\3\0\5\0\0"))  # three bytes, not two
    assert read_grid(series)[0].shape == SHAPE
    with pytest.raises(DataError) as caught:
        WRITERS[name].write(tmp_path / "a.dcm", label_of(series, organs()))
    assert str(caught.value) == f"{last}: a damaged DICOM header (BytesLengthException). Copy or export it again."
    assert not (tmp_path / "a.dcm").exists()


def test_odd_fields_of_a_patient_neither_stop_nor_leave_the_file(tmp_path: Path) -> None:
    """Names in another alphabet come through; a sex is written as the standard has it, or left empty."""
    slices = slices_of(np.zeros(SHAPE, np.int16), OBLIQUE, SpecificCharacterSet="ISO_IR 100", PatientSex="FEMALE")
    for data in slices:
        data.PatientName = "Müller^Jörg"
    series = save_slices(tmp_path / "series", slices)
    for name in ("dicomseg", "rtstruct"):
        data = save(tmp_path / f"{name}.dcm", name, series, organs())
        assert str(data.PatientName) == "Müller^Jörg"
        assert data.PatientSex == "F"
        assert data.StudyDate == data.AccessionNumber == ""


def test_a_library_that_cannot_says_no_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    series = write_series(tmp_path / "series", np.zeros(SHAPE, np.int16), OBLIQUE)

    def broken(*args: object, **kwargs: object) -> None:
        raise ValueError(f"odd value {PATIENT[0]}")

    monkeypatch.setattr("autoseg.data.formats.dicom_seg_writer._segmentation", broken)
    with pytest.raises(DataError) as caught:
        WRITERS["dicomseg"].write(tmp_path / "a.dcm", label_of(series, organs()))
    assert str(caught.value) == (
        f"{series}: DICOM-SEG cannot be made of the fields of these images (ValueError). Choose another --format."
    )


def test_without_highdicom_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    series = write_series(tmp_path / "series", np.zeros(SHAPE, np.int16), OBLIQUE)
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(DataError, match=r"highdicom, which is not installed\. .* pip install .*'\.\[formats\]'"):
        WRITERS["dicomseg"].check((series,))  # type: ignore[misc]
    WRITERS["rtstruct"].check((series,))  # type: ignore[misc]


def test_names_that_dicom_cannot_tell_apart_are_refused(tmp_path: Path) -> None:
    series = write_series(tmp_path / "series", np.zeros(SHAPE, np.int16), OBLIQUE)
    label_map = LabelMap(names=("x" * 64 + "a", "x" * 64 + "b"), values=((1,), (2,)))
    with pytest.raises(DataError, match="have their first 64 letters in common, and DICOM has no more"):
        save(tmp_path / "a.dcm", "dicomseg", series, organs(), label_map)


SINGLE = Path(__file__).resolve().parents[2] / "shared" / "data" / "single"


@pytest.mark.skipif(not SINGLE.is_dir(), reason="the real files are not in the repository")
@pytest.mark.parametrize("name", ["dicom_ct_3slice_liver", "dcmqi_23x38x3/image", "highdicom/ct_image.dcm"])
def test_real_series_come_back(tmp_path: Path, name: str) -> None:
    image = SINGLE / name
    shape = read_stored_volume(image).array.shape[:3]
    array = np.zeros(shape, np.uint8)
    array[shape[0] // 4 : shape[0] // 2, shape[1] // 4 :], array[shape[0] // 2 :, : shape[1] // 2, 1:] = 1, 2
    save(tmp_path / "a.dcm", "dicomseg", image, array)
    volume = hd.seg.segread(tmp_path / "a.dcm").get_volume(combine_segments=True)
    assert {value: int((volume.array == value).sum()) for value in (1, 2, 3, 4)} == {
        **{value: int((array == value).sum()) for value in (1, 2)},
        **{3: 0, 4: 0},
    }
    structures = save(tmp_path / "r.dcm", "rtstruct", image, array)
    assert [len(item.get("ContourSequence", [])) for item in structures.ROIContourSequence] == [
        *(shape[2], shape[2] - 1, 0, 0)
    ]
