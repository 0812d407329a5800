"""Segmentations as labels: DICOM-SEG, RTSTRUCT, Slicer's layers, folders of masks; on the image's voxels or refused."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import nrrd
import numpy as np
import pydicom
import pytest
from other_formats import PATIENT, rtstruct_of, save_dicom, seg_of, slices_of, write_series
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from test_dicom import OBLIQUE, ORIENTATIONS, TILTED

from autoseg.analyzer.case import analyze_case
from autoseg.analyzer.folder import analyze_folder
from autoseg.analyzer.merge_masks import merge_masks
from autoseg.cli.init import init_data_folder
from autoseg.data.datalists.cases import Case, case_digest, read_case_label
from autoseg.data.datalists.datalist import read_datalist
from autoseg.data.datalists.segments import segment_values, table_of
from autoseg.data.formats.label_files import label_files, open_segmentation, own_grid, read_stored_label
from autoseg.data.formats.stored import FileFaultError
from autoseg.data.formats.table import read_header, read_stored_volume
from autoseg.data.grid import Grid
from autoseg.data.volumes import read_image, read_label
from autoseg.errors import DataError
from autoseg.evaluation.folders import evaluate
from autoseg.hardware.packages import install_advice

SINGLE = Path(__file__).resolve().parents[2] / "shared" / "data" / "single"
SHAPE = (9, 8, 7)
VALUES = (("liver", (1,)), ("tumor", (2,)))
REGIONS = (("liver", (1, 3)), ("tumor", (2, 3)))
"""Value 3: both."""


def masks(overlap: int = 0) -> dict[str, np.ndarray]:
    """Two boxes, asymmetric, with gaps along the third axis, that share `overlap` columns."""
    liver, tumor = np.zeros(SHAPE, bool), np.zeros(SHAPE, bool)
    liver[1:5, 2:7, [1, 2, 5]] = True
    liver[1, 2, 1] = False
    tumor[5 - overlap : 8, 3:5, 2:4] = True
    return {"liver": liver, "tumor": tumor}


def expected(overlap: int = 0) -> np.ndarray:
    liver, tumor = masks(overlap).values()
    return (liver + 2 * tumor).astype("u1")


def image(folder: Path, affine: np.ndarray) -> Path:
    array = np.random.default_rng(0).integers(-500, 200, SHAPE).astype("i2")
    return write_series(folder / "image", array, affine)


def label_on(path: Path, image: Path | Grid, values: Any = VALUES) -> np.ndarray:
    grid = image if isinstance(image, Grid) else read_header(image).grid
    array: np.ndarray = read_stored_label(path, grid=grid, values=values).array[..., 0]
    return array


def refusal(path: Path, grid: Grid, values: Any = VALUES) -> str:
    with pytest.raises(FileFaultError) as caught:
        read_stored_label(path, grid=grid, values=values)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert not any(word in text for word in PATIENT)
    return text.removeprefix(f"{path}: ")


GRID = Grid(shape=SHAPE, affine=OBLIQUE)


# -- DICOM-SEG


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP", "FRACTIONAL"])
@pytest.mark.parametrize("affine", [*ORIENTATIONS, TILTED])
def test_frames_are_put_on_the_images_slices_by_their_place(tmp_path: Path, affine: np.ndarray, kind: str) -> None:
    series = image(tmp_path, affine)
    shares = {name: mask * (255 if kind == "FRACTIONAL" else 1) for name, mask in masks().items()}
    path = save_dicom(tmp_path / "seg.dcm", seg_of(shares, affine, kind))
    case = Case(name="p", images=(series,), label=path, segment_values=VALUES)
    nib.save(nib.Nifti1Image(expected(), affine), tmp_path / "same.nii")
    np.testing.assert_array_equal(read_case_label(case).array, read_label(tmp_path / "same.nii").array)
    assert not analyze_case(case.images, path, None, segment_values=VALUES).is_faulty
    np.testing.assert_array_equal(
        read_case_label(case).grid.to_ras().affine, read_image((series,)).grid.to_ras().affine
    )


def test_a_nifti_with_other_axes_takes_the_same_voxels(tmp_path: Path) -> None:
    """The image was converted: its axes are turned and flipped, its place is the same."""
    path = save_dicom(tmp_path / "seg.dcm", seg_of(masks(), OBLIQUE))
    labelled = nib.Nifti1Image(expected(), OBLIQUE)
    for ornt in ([[0, -1], [1, 1], [2, -1]], [[2, 1], [0, -1], [1, -1]]):
        turned = labelled.as_reoriented(np.array(ornt))
        grid = Grid(shape=turned.shape, affine=turned.affine)
        np.testing.assert_array_equal(label_on(path, grid), np.asarray(turned.dataobj))


def test_a_segmentation_of_a_part_of_the_image_is_placed_in_it(tmp_path: Path) -> None:
    part = OBLIQUE @ nib.affines.from_matvec(np.eye(3), [1, 2, 0])
    cut = {name: mask[1:, 2:7] for name, mask in masks().items()}
    path = save_dicom(tmp_path / "seg.dcm", seg_of(cut, part))
    np.testing.assert_array_equal(label_on(path, GRID), expected())


def test_probabilities_are_cut_at_a_half_with_a_warning(tmp_path: Path) -> None:
    shares = {"liver": np.where(masks()["liver"], 128, 127).astype("u1"), "tumor": np.zeros(SHAPE, "u1")}
    path = save_dicom(tmp_path / "seg.dcm", seg_of(shares, OBLIQUE, "FRACTIONAL"))
    volume = read_stored_label(path, grid=GRID, values=VALUES)
    np.testing.assert_array_equal(volume.array[..., 0], masks()["liver"])
    assert [w.finding for w in volume.warnings] == ["a segmentation of shares or probabilities (FRACTIONAL)"]


def test_segments_of_one_name_are_one_class(tmp_path: Path) -> None:
    data = seg_of(masks(), OBLIQUE)
    data.SegmentSequence[1].SegmentLabel = "liver"
    path = save_dicom(tmp_path / "seg.dcm", data)
    np.testing.assert_array_equal(label_on(path, GRID), expected() > 0)


def moved(share: float) -> Callable[[], Dataset]:
    return lambda: seg_of(masks(), OBLIQUE @ nib.affines.from_matvec(np.eye(3), [share, 0, 0]))


def coarser() -> Dataset:
    return seg_of(masks(), OBLIQUE @ np.diag([1.5, 1, 1, 1]))


def turned() -> Dataset:
    return seg_of(masks(), OBLIQUE @ nib.affines.from_matvec(nib.eulerangles.euler2mat(0.4), [0, 0, 0]))


def fewer_frames() -> Dataset:
    data = seg_of(masks(), OBLIQUE)
    del data.PerFrameFunctionalGroupsSequence[0]
    return data


def placeless() -> Dataset:
    data = seg_of(masks(), OBLIQUE)
    for group in data.PerFrameFunctionalGroupsSequence:
        del group.PlanePositionSequence
    return data


def unknown_segment() -> Dataset:
    data = seg_of(masks(), OBLIQUE)
    del data.SegmentSequence[1]
    return data


def of_another_kind() -> Dataset:
    return seg_of(masks(), OBLIQUE, SegmentationType="SURFACE")


def segmentless() -> Dataset:
    return seg_of(masks(), OBLIQUE, SegmentSequence=[])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (moved(0.4), "segment 'liver' is not on the image's voxels (up to 0.4 voxels away). Nothing is resampled."),
        (moved(3), "segment 'tumor' reaches beyond the image. Check"),
        (coarser, "segment 'liver' is not on the image's voxels"),
        (turned, "segment 'liver' is not on the image's voxels"),
        (fewer_frames, "4 frames described and 5 stored. Copy"),
        (placeless, "a segmentation whose frames have no place in the patient. Expected one of a scan"),
        (unknown_segment, "frames of a segment 2 that it does not describe"),
        (of_another_kind, "a segmentation of type SURFACE"),
        (segmentless, "a segmentation without segments"),
    ],
)
def test_what_does_not_lie_on_the_image_says_why(tmp_path: Path, make: Callable[[], Dataset], message: str) -> None:
    path = save_dicom(tmp_path / "seg.dcm", make())
    text = refusal(path, GRID)
    assert text.startswith(message) or text.replace("'tumor'", "'liver'").startswith(message)


def test_a_segmentation_of_a_few_voxels_beside_is_placed(tmp_path: Path) -> None:
    path = save_dicom(tmp_path / "seg.dcm", moved(0.05)())
    np.testing.assert_array_equal(label_on(path, GRID), expected())


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP"])
def test_what_highdicom_writes_is_read(tmp_path: Path, kind: str) -> None:
    highdicom = pytest.importorskip("highdicom")
    from pydicom.sr.codedict import codes

    slices = slices_of(np.zeros(SHAPE, "i2"), OBLIQUE, PatientSex="", StudyID="", AccessionNumber="", StudyDate="")
    for data in slices:
        data.StudyTime = data.ReferringPhysicianName = ""
    described = [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=name,
            segmented_property_category=codes.SCT.Organ,
            segmented_property_type=codes.SCT.Liver,
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.MANUAL,
        )
        for number, name in enumerate(masks(), 1)
    ]
    data = highdicom.seg.Segmentation(
        source_images=slices,
        pixel_array=expected().transpose(2, 1, 0),
        segmentation_type=kind,
        segment_descriptions=described,
        series_instance_uid=generate_uid(),
        series_number=9,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="m",
        manufacturer_model_name="m",
        software_versions="1",
        device_serial_number="1",
    )
    path = save_dicom(tmp_path / "seg.dcm", data)
    np.testing.assert_array_equal(label_on(path, GRID), expected())


# -- RTSTRUCT


def outline(corners: list[tuple[float, float]], k: float, affine: np.ndarray = OBLIQUE) -> np.ndarray:
    """A contour through points given in voxels of slice k, in mm."""
    points = np.array([(*corner, k) for corner in corners])
    return np.asarray(nib.affines.apply_affine(affine, points))


def box(low: float, high: float, k: float, affine: np.ndarray = OBLIQUE) -> np.ndarray:
    return outline([(low, low), (high, low), (high, high), (low, high)], k, affine)


@pytest.mark.parametrize("affine", [*ORIENTATIONS, TILTED])
def test_contours_are_filled_on_their_slices_and_holes_stay_empty(tmp_path: Path, affine: np.ndarray) -> None:
    keyhole = [(0.5, 0.5), (6.5, 0.5), (6.5, 6.5), (0.5, 6.5), (0.5, 3.5)]
    keyhole += [(2.5, 3.5), (2.5, 4.5), (4.5, 4.5), (4.5, 2.5), (2.5, 2.5), (2.5, 3.5), (0.5, 3.5)]
    contours = {
        "liver": [box(0.5, 6.5, 2, affine), box(2.5, 4.5, 2, affine), outline(keyhole, 4, affine)],
        "tumor": [box(2.5, 4.5, 2, affine), box(6.5, 7.5, 5, affine)],
    }
    path = save_dicom(tmp_path / "rs.dcm", rtstruct_of(contours))
    label = np.zeros(SHAPE, "u1")
    for k in (2, 4):
        label[1:7, 1:7, k] = 1
        label[3:5, 3:5, k] = 2 if k == 2 else 0
    label[7, 7, 5] = 2
    np.testing.assert_array_equal(label_on(path, Grid(shape=SHAPE, affine=affine)), label)
    turned = nib.Nifti1Image(label, affine).as_reoriented(np.array([[2, -1], [0, 1], [1, -1]]))
    grid = Grid(shape=turned.shape, affine=turned.affine)
    np.testing.assert_array_equal(label_on(path, grid), np.asarray(turned.dataobj))


def test_voxels_are_those_whose_centre_lies_within(tmp_path: Path) -> None:
    angles = np.linspace(0, 2 * np.pi, 400, endpoint=False)
    circle = [(20.3 + 9.4 * np.cos(a), 17.8 + 9.4 * np.sin(a)) for a in angles]
    path = save_dicom(tmp_path / "rs.dcm", rtstruct_of({"liver": [outline(circle, 1)]}))
    label = label_on(path, Grid(shape=(40, 30, 3), affine=OBLIQUE))
    i, j = np.meshgrid(np.arange(40), np.arange(30), indexing="ij")
    away = np.hypot(i - 20.3, j - 17.8)
    sure = np.abs(away - 9.4) > 0.01  # the circle has corners
    np.testing.assert_array_equal(label[..., 1][sure], (away < 9.4)[sure])
    assert label[..., [0, 2]].sum() == 0


def test_points_are_left_out_with_a_warning_and_regions_of_points_are_none(tmp_path: Path) -> None:
    data = rtstruct_of({"liver": [box(0.5, 6.5, 2)], "isocenter": [box(1, 2, 3)]})
    data.ROIContourSequence[1].ContourSequence[0].ContourGeometricType = "POINT"
    segmentation = open_segmentation(save_dicom(tmp_path / "rs.dcm", data))
    assert segmentation is not None
    assert segmentation.numbers == {"liver": 1}
    assert [w.finding for w in segmentation.warnings] == ["1 points or open contours left out"]


@pytest.mark.parametrize(
    ("contours", "message"),
    [
        ([box(0.5, 6.5, 2.4)], "a contour of 'liver' is not on a slice of the image"),
        ([box(0.5, 6.5, 7)], "a contour of 'liver' is on a slice that the image does not have"),
        ([outline([(1, 1), (5, 1)], 2)], "a structure set without closed contours"),
        ([box(1e10, 2e10, 2)], "contours that lie nowhere"),
    ],
)
def test_contours_of_another_image_say_so(tmp_path: Path, contours: list[np.ndarray], message: str) -> None:
    path = save_dicom(tmp_path / "rs.dcm", rtstruct_of({"liver": contours}))
    assert refusal(path, GRID).startswith(message)


# -- Slicer and folders of masks


def write_layers(path: Path, layers: list[np.ndarray], named: list[tuple[str, int, int]]) -> Path:
    """A file as Slicer writes it. named: (segment, value, layer)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    directions = OBLIQUE[:3, :3].T.tolist()
    header: dict[str, Any] = {"space": "RAS", "space origin": OBLIQUE[:3, 3].tolist(), "encoding": "gzip"}
    header["space directions"] = [[np.nan] * 3, *directions] if len(layers) > 1 else directions
    header["kinds"] = ["list", *["domain"] * 3] if len(layers) > 1 else ["domain"] * 3
    for number, (name, value, layer) in enumerate(named):
        header |= {f"Segment{number}_Name": name, f"Segment{number}_LabelValue": value, f"Segment{number}_Layer": layer}
    nrrd.write(str(path), np.stack(layers) if len(layers) > 1 else layers[0], header)
    return path


def test_layers_of_slicer_that_overlap_are_regions(tmp_path: Path) -> None:
    liver, tumor = masks(1).values()
    path = write_layers(tmp_path / "a.seg.nrrd", [liver * 4, tumor * 2], [("liver", 4, 0), ("tumor", 2, 1)])
    both = np.select([liver & tumor, tumor, liver], [3, 2, 1])
    np.testing.assert_array_equal(label_on(path, GRID, REGIONS), both)
    assert refusal(path, GRID).startswith("liver and tumor share 2 voxels, for which there is no label value. Correct")


def test_an_order_and_a_word_for_segments_that_only_touch(tmp_path: Path) -> None:
    liver, tumor = np.zeros((2, 20, 20, 4), bool)
    liver[:11], tumor[10:] = True, True
    liver[10, 1:] = False  # 4 of 804 and 800 voxels
    path = save_dicom(tmp_path / "seg.dcm", seg_of({"liver": liver, "tumor": tumor}, OBLIQUE))
    volume = read_stored_label(path, grid=Grid(shape=liver.shape, affine=OBLIQUE), values=VALUES)
    np.testing.assert_array_equal(volume.array[..., 0], np.where(tumor, 2, liver))
    assert [w.finding for w in volume.warnings] == ["liver and tumor share 4 voxels, for which there is no label value"]
    assert volume.warnings[0].remedy.startswith("They count as tumor, which comes last.")


def write_masks(folder: Path, overlap: int = 0) -> Path:
    folder.mkdir(parents=True)
    for name, mask in masks(overlap).items():
        nib.save(nib.Nifti1Image(mask.astype("u1"), OBLIQUE), folder / f"{name}.nii.gz")
    return folder


def test_a_folder_of_masks_is_a_label_and_what_merge_masks_makes_of_it(tmp_path: Path) -> None:
    folder = write_masks(tmp_path / "cases" / "p0" / "segmentations").parent
    np.testing.assert_array_equal(label_on(folder, GRID), expected())
    assert label_files(folder.parent) == [folder]
    merge_masks(folder.parent, tmp_path / "out")
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "out" / "p0.nii.gz").dataobj), expected())
    (folder / "segmentations" / "tumor.nii.gz").write_bytes(b"no")
    assert refusal(folder, GRID).startswith("tumor.nii.gz: ")


def test_names_without_values_say_what_to_write(tmp_path: Path) -> None:
    folder = write_masks(tmp_path / "p0")
    assert refusal(folder, GRID, ()) == (
        "its segments are known by name (liver, tumor), and no label values are named. "
        'Expected `labels` in the datalist, such as {"1": "liver"}; `autoseg init` writes them.'
    )
    volume = read_stored_label(folder, grid=GRID, values=VALUES[:1])
    assert [w.finding for w in volume.warnings] == ["segments that are no class: tumor"]
    np.testing.assert_array_equal(volume.array[..., 0], masks()["liver"])


def test_values_are_part_of_what_a_case_is(tmp_path: Path) -> None:
    path = save_dicom(tmp_path / "seg.dcm", seg_of(masks(), OBLIQUE))
    swapped = (("tumor", (1,)), ("liver", (2,)))
    cases = [Case(name="p", images=(path,), label=path, segment_values=v) for v in (VALUES, swapped, ())]
    assert len({case_digest(case) for case in cases}) == 3


def test_without_pydicom_a_segmentation_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_dicom(tmp_path / "labels" / "seg.dcm", seg_of(masks(), OBLIQUE))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    assert refusal(path, GRID) == f"DICOM, and pydicom is not installed. {install_advice('formats')}"
    assert label_files(path.parent) == [path.parent]  # not silently left out


# -- data sets


def data_set(root: Path, write_label: Callable[[Path, int], object], num: int = 4) -> Path:
    """images/pN, series; labels/pN as the function writes them, without suffix."""
    for number in range(num):
        array = np.random.default_rng(number).integers(-900, 900, SHAPE).astype("i2")
        write_series(root / "images" / f"p{number}", array, OBLIQUE, SeriesInstanceUID=generate_uid())
        write_label(root / "labels" / f"p{number}", number)
    return root


def as_seg(overlap: int = 0) -> Callable[[Path, int], object]:
    def write(path: Path, number: int) -> None:
        order = ("liver", "tumor") if number % 2 else ("tumor", "liver")
        chosen = {name: masks(overlap)[name] for name in order}
        save_dicom(path.with_suffix(".dcm"), seg_of(chosen, OBLIQUE))

    return write


def as_rtstruct(path: Path, number: int) -> None:
    save_dicom(path / "RS.dcm", rtstruct_of({"liver": [box(0.5, 4.5, 2)], "tumor": [box(4.5, 6.5, 2)]}))


def as_layers(path: Path, number: int) -> None:
    liver, tumor = masks(1).values()
    named = [("tumor", 1, 0), ("liver", 1, 1)]
    if number == 0:  # of which none overlap, so that Slicer makes one layer
        write_layers(path.with_suffix(".seg.nrrd"), [expected()], [("liver", 1, 0), ("tumor", 2, 0)])
    else:
        write_layers(path.with_suffix(".seg.nrrd"), [tumor.astype("u1"), liver.astype("u1")], named)


def as_masks(path: Path, number: int) -> None:
    write_masks(path)


@pytest.mark.parametrize(
    ("write_label", "label"), [(as_seg(), expected()), (as_rtstruct, None), (as_masks, expected())]
)
def test_init_names_the_classes_and_all_stages_read_the_labels(
    tmp_path: Path, write_label: Callable[[Path, int], object], label: np.ndarray | None
) -> None:
    root = data_set(tmp_path, write_label)
    result = init_data_folder(root, tmp_path / "out", num_fold=2)
    assert (result.num_training, result.classes) == (4, {"liver": (1,), "tumor": (2,)})
    listed = read_datalist(tmp_path / "out" / "datalist.json", root)
    for case in listed.training:
        found = read_case_label(case)
        if label is not None:
            same = nib.Nifti1Image(label, OBLIQUE)
            nib.save(same, tmp_path / "same.nii")
            np.testing.assert_array_equal(found.array, read_label(tmp_path / "same.nii").array)
        assert found.array.shape[1:] == read_image(case.images).array.shape[1:]
        assert set(np.unique(found.array)) == {0, 1, 2}
    assert analyze_folder(root, progress=False).faults == ()


@pytest.mark.parametrize("write_label", [as_seg(1), as_layers])
def test_overlapping_segments_become_regions_learned_with_sigmoid(
    tmp_path: Path, write_label: Callable[[Path, int], object]
) -> None:
    root = data_set(tmp_path, write_label)
    result = init_data_folder(root, tmp_path / "out", num_fold=2)
    assert result.classes == {"liver": (1, 3), "tumor": (2, 3)}
    first = "p0" if "seg" in repr(write_label) and write_label is not as_layers else "p1"
    assert f"segments overlap (liver and tumor in {first}): classes are regions, learned with sigmoid." in result.notes
    assert "sigmoid: true" in (tmp_path / "out" / "input.yaml").read_text()
    listed = read_datalist(tmp_path / "out" / "datalist.json", root)
    analysis = analyze_folder(root, progress=False)
    assert analysis.faults == ()
    assert analysis.label_map is not None
    assert analysis.label_map.sigmoid
    liver, tumor = masks(1).values()
    nib.save(
        nib.Nifti1Image(np.select([liver & tumor, tumor, liver], [3, 2, 1]).astype("u1"), OBLIQUE), tmp_path / "s.nii"
    )
    found = read_case_label(listed.training[1])
    np.testing.assert_array_equal(found.array, read_label(tmp_path / "s.nii").array)
    target = analysis.label_map.encode(found.array[0])
    assert target.sum((1, 2, 3)).tolist() == [liver.sum(), tumor.sum()]
    np.testing.assert_array_equal(analysis.label_map.decode(target), found.array[0])


def test_names_that_differ_in_spelling_alone_are_refused(tmp_path: Path) -> None:
    def write_label(path: Path, number: int) -> None:
        name = "Liver" if number == 2 else "liver"
        save_dicom(path.with_suffix(".dcm"), seg_of({name: masks()["liver"]}, OBLIQUE))

    root = data_set(tmp_path, write_label)
    with pytest.raises(
        DataError, match=r"p2\.dcm: segment 'Liver' differs from 'liver' in .*p0\.dcm in spelling alone"
    ):
        init_data_folder(root, tmp_path / "out", num_fold=2)


def test_labels_of_names_and_of_numbers_do_not_mix_where_they_contradict(tmp_path: Path) -> None:
    def write_label(path: Path, number: int) -> None:
        if number:
            as_seg()(path, number)
        else:
            path.parent.mkdir()
            nib.save(nib.Nifti1Image(expected(), OBLIQUE), path.with_suffix(".nii.gz"))

    root = data_set(tmp_path, write_label)
    with pytest.raises(DataError, match="have different numbers, while 1 label files hold values without names"):
        init_data_folder(root, tmp_path / "out", num_fold=2)


def test_a_hand_written_list_decides(tmp_path: Path) -> None:
    root = data_set(tmp_path, as_seg(1))
    items = [{"image": f"images/p{n}", "label": f"labels/p{n}.dcm"} for n in range(4)]
    table = {"background": 0, "liver": [7, 9], "tumor": [9]}
    (root / "datalist.json").write_text(json.dumps({"training": items, "labels": table}))
    listed = read_datalist(root / "datalist.json", root, num_fold=2)
    with pytest.raises(DataError, match="of tumor alone, for which there is no label value"):
        read_case_label(listed.training[0])
    table["tumor"] = [8, 9]
    (root / "datalist.json").write_text(json.dumps({"training": items, "labels": table}))
    listed = read_datalist(root / "datalist.json", root, num_fold=2)
    assert set(np.unique(read_case_label(listed.training[0]).array)) == {0, 7, 8, 9}


@pytest.mark.parametrize("kinds", [("dcm", "dcm"), ("nii", "dcm"), ("dcm", "nii")])
def test_segmentations_are_scored_by_name(tmp_path: Path, kinds: tuple[str, str]) -> None:
    for kind, folder, overlap in zip(kinds, ("preds", "labels"), (1, 0), strict=True):
        parts = masks(overlap)
        if kind == "dcm":  # of the prediction, frames that the label has not
            save_dicom(
                tmp_path / folder / "a.dcm", seg_of({**parts, "liver": parts["liver"] & ~parts["tumor"]}, OBLIQUE)
            )
        else:
            (tmp_path / folder).mkdir()
            array = np.where(parts["tumor"], 2, parts["liver"]).astype("u1")
            nib.save(nib.Nifti1Image(array, OBLIQUE), tmp_path / folder / "a.nii.gz")
    result = evaluate(tmp_path / "preds", tmp_path / "labels")
    assert result.classes == ("liver", "tumor")
    found, true = (masks(overlap)["tumor"] for overlap in (1, 0))
    dice = 2 * (found & true).sum() / (found.sum() + true.sum())
    assert result.scores["dice"]["a"][1] == pytest.approx(dice)
    assert (
        result.scores["dice"]["a"]
        == evaluate(tmp_path / "preds", tmp_path / "labels", classes=("liver", "tumor")).scores["dice"]["a"]
    )


def test_values_without_names_need_names_where_segments_are_numbered_otherwise(tmp_path: Path) -> None:
    parts = masks(0)
    save_dicom(tmp_path / "labels" / "a.dcm", seg_of({name: parts[name] for name in ("tumor", "liver")}, OBLIQUE))
    (tmp_path / "preds").mkdir()
    nib.save(nib.Nifti1Image(expected(), OBLIQUE), tmp_path / "preds" / "a.nii.gz")
    save_dicom(tmp_path / "labels" / "b.dcm", seg_of(parts, OBLIQUE))
    with pytest.raises(DataError, match="order: --classes liver,tumor") as caught:
        evaluate(tmp_path / "preds", tmp_path / "labels")
    assert "while 1 label files hold values without names" in str(caught.value)
    scores = evaluate(tmp_path / "preds", tmp_path / "labels", classes=("liver", "tumor")).scores["dice"]
    assert scores == {"a": [1.0, 1.0], "b": [0.0, 0.0]}


# -- damage


def mutated(raw: bytes, chosen: random.Random, first: int) -> bytes:
    """A file with a few bytes changed, cut out or put in, after the first ones."""
    damaged = bytearray(raw)
    for _ in range(chosen.randint(1, 6)):
        place = chosen.randrange(first, len(damaged))
        if (kind := chosen.random()) < 0.6:
            damaged[place] = chosen.randrange(256)
        elif kind < 0.8:
            del damaged[place : place + chosen.randint(1, 30)]
        else:
            damaged[place:place] = chosen.choice([b"9999999999", b"-1", b"nan", b"\0\0", b"e308", b"\\", b"\xff\xff"])
        if len(damaged) <= first + 1:
            return raw[: first + 1]
    return bytes(damaged)


def write_damageable(path: Path) -> None:
    """A segmentation of the kind of the file's name."""
    if path.suffix == ".nrrd":
        liver, tumor = masks(1).values()
        write_layers(path, [liver.astype("u1"), tumor.astype("u1")], [("liver", 1, 0), ("tumor", 1, 1)])
    elif path.stem == "RTSTRUCT":
        save_dicom(path, rtstruct_of({"liver": [box(0.5, 6.5, 2), box(2.5, 4.5, 2)], "tumor": [box(2.5, 4.5, 3)]}))
    else:
        save_dicom(path, seg_of(masks(), OBLIQUE, path.stem))


@pytest.mark.parametrize("name", ["BINARY.dcm", "LABELMAP.dcm", "FRACTIONAL.dcm", "RTSTRUCT.dcm", "layers.seg.nrrd"])
def test_damaged_segmentations_are_refused_by_name_or_read(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    num = 300
    path = tmp_path / name
    write_damageable(path)
    raw = path.read_bytes()
    chosen = random.Random(name)
    num_refused = 0
    for _ in range(num):
        path.write_bytes(mutated(raw, chosen, 132 if path.suffix == ".dcm" else 8))
        try:
            array = read_stored_label(path, grid=GRID, values=REGIONS).array
            assert array.shape == (*SHAPE, 1)
            assert set(np.unique(array)) <= {0, 1, 2, 3}
            text = ""
        except DataError as error:
            text = str(error)
            num_refused += 1
        assert not text or str(path) in text
        assert not any(word in text for word in PATIENT)
    assert num_refused > num / 10
    assert not any(word in caplog.text for word in PATIENT)


def test_what_stands_for_a_modality_is_not_repeated(tmp_path: Path) -> None:
    """In a damaged file the patient's fields may slip to where the modality is looked for."""
    data = seg_of(masks(), OBLIQUE, "BINARY")
    del data.Rows
    for word in PATIENT[1:]:  # the name is no term that pydicom would write
        data.Modality = word
        save_dicom(tmp_path / "a.dcm", data)
        with pytest.raises(DataError) as raised:
            read_stored_label(tmp_path / "a.dcm", grid=GRID, values=REGIONS)
        assert "a DICOM file of modality ?. Expected a scan; or, as a label, SEG or RTSTRUCT." in str(raised.value)
        assert word not in str(raised.value)


# -- real files


REAL = [
    ("dcmqi_23x38x3/seg/label.seg", "dcmqi_23x38x3/image", [2300, 322]),
    ("dcmqi_24x38x3/seg", "dcmqi_24x38x3/multiframe", [2421, 315]),
    ("dicom_ct_3slice_liver_segs/liver.dcm", "dicom_ct_3slice_liver", [679334, 107098]),
]


@pytest.mark.skipif(not SINGLE.is_dir(), reason="the real files are not here")
@pytest.mark.parametrize(("name", "series", "counts"), REAL)
def test_real_segmentations_lie_on_their_series(name: str, series: str, counts: list[int]) -> None:
    label = label_on(SINGLE / name, SINGLE / series, (("Liver", (1,)),))
    assert np.bincount(label.ravel()).tolist() == counts
    folder = Path(name).parts[0]
    dcmqi = SINGLE / folder / ("liver_seg.nrrd" if "segs" in folder else "nrrd/label.nrrd")
    np.testing.assert_array_equal(label, read_stored_volume(dcmqi).array[..., 0] != 0)


@pytest.mark.skipif(not SINGLE.is_dir(), reason="the real files are not here")
def test_every_real_segmentation_is_read_as_pydicom_has_its_frames_or_refused() -> None:
    """By pydicom's own arrays and positions, frame by frame; 11 files are read, one is damaged."""
    num_read = 0
    files = (p for p in sorted(SINGLE.rglob("*")) if p.is_file() and p.suffix in (".dcm", ".seg"))
    for path in files:
        data = pydicom.dcmread(path, force=True)
        if data.get("Modality") != "SEG":
            continue
        if path.name == "liver_1frame.dcm":
            assert refusal(path, GRID).startswith("3 frames described and 1 stored.")
            continue
        segmentation = open_segmentation(path)
        assert segmentation is not None
        grid = own_grid(segmentation)
        classes = table_of([(path, lambda grid=grid: grid)])  # type: ignore[misc]
        labels, regions = classes.labels, classes.regions
        values = segment_values(labels, regions)
        label = label_on(path, grid, values)
        expected = {name: np.zeros(grid.shape, bool) for name, _ in values}
        arrays = data.pixel_array.reshape(-1, data.Rows, data.Columns)
        for array, group in zip(arrays, data.PerFrameFunctionalGroupsSequence, strict=True):
            place = np.array(group.PlanePositionSequence[0].ImagePositionPatient, float) * [-1, -1, 1]
            i, j, k = np.rint(np.linalg.inv(grid.affine) @ [*place, 1])[:3].astype(int)
            assert (i, j) == (0, 0)
            for segment in data.SegmentSequence:
                if segment.SegmentLabel == "Background":
                    continue
                if data.SegmentationType == "LABELMAP":
                    mask = array == segment.SegmentNumber
                elif group.SegmentIdentificationSequence[0].ReferencedSegmentNumber != segment.SegmentNumber:
                    continue
                else:
                    mask = array >= 127.5 if data.SegmentationType == "FRACTIONAL" else array == 1
                expected[segment.SegmentLabel][:, :, k] |= mask.T
        for name, numbers in values:
            np.testing.assert_array_equal(np.isin(label, numbers), expected[name], err_msg=f"{path.name} {name}")
        num_read += 1
    assert num_read == 11


@pytest.mark.skipif(not SINGLE.is_dir(), reason="the real files are not here")
def test_the_real_structure_set_is_filled_on_its_slices() -> None:
    """A box of 400 x 300 mm on three slices; no image of it is there."""
    path = SINGLE / "pydicom" / "rtstruct.dcm"
    affine = np.array([[-5.0, 0, 0, 252.5], [0, -5.0, 0, 202.5], [0, 0, 200, -200], [0, 0, 0, 1]])
    label = label_on(path, Grid(shape=(101, 81, 3), affine=affine), (("patient", (1,)),))
    assert label[..., 0].sum() == 80 * 60
    assert refusal(path, read_header(SINGLE / "dicom_ct_3slice_liver").grid, (("patient", (1,)),)).startswith(
        "a contour of 'patient' is not on a slice of the image"
    )


@pytest.mark.skipif(not SINGLE.is_dir(), reason="the real files are not here")
def test_the_real_layers_of_slicer_are_regions() -> None:
    path = SINGLE / "slicer_seg_nrrd" / "SegmentationOverlapping.seg.nrrd"
    grid = read_header(SINGLE / "slicer_seg_nrrd" / "CTChest4.nrrd").grid
    classes = table_of([(path, lambda: grid)])
    labels, regions, notes = classes.labels, classes.regions, classes.notes
    assert labels == {}
    label = label_on(path, grid, segment_values(labels, regions))
    array, header = nrrd.read(str(path))
    for number in range(8):
        layer, value = (int(header[f"Segment{number}_{key}"]) for key in ("Layer", "LabelValue"))
        mask = np.isin(label, regions[header[f"Segment{number}_Name"]])
        np.testing.assert_array_equal(mask, array[layer] == value)
    assert notes[-1].startswith("segments overlap (")
