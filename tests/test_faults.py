"""Every kind of fault and warning: a data set that has it, and the whole message."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from analysis_data import AFFINE, SHAPE, DataSet, make_image, make_label, save

from autoseg.algos.rules.images import target_spacing
from autoseg.analyzer import workers
from autoseg.analyzer.case import analyze_case
from autoseg.analyzer.faults import Fault, fault_lines
from autoseg.config.settings import ClassSpec
from autoseg.data.formats.table import SUFFIXES_TEXT, read_stored_volume
from autoseg.errors import DataError

IMAGE, LABEL = "case_2 (images/case_2.nii.gz): ", "case_2 (labels/case_2.nii.gz): "


@pytest.fixture
def data(tmp_path: Path) -> DataSet:
    return DataSet(root=tmp_path)


def faults(data: DataSet, **settings: object) -> list[str]:
    return [str(f) for f in data.analyze(**settings).faults]


def warnings(data: DataSet, **settings: object) -> list[str]:
    return [str(w) for w in data.analyze(**settings).warnings]


def test_a_sound_data_set_has_no_faults(data: DataSet) -> None:
    analysis = data.analyze(strict=True)
    assert analysis.faults == analysis.warnings == ()
    assert analysis.quarantined == ()


def respoil(path: Path, spoil: Callable[[bytes], bytes]) -> None:
    """Change a file's bytes inside its gzip, so that its checksum stays right."""
    path.write_bytes(gzip.compress(spoil(gzip.decompress(path.read_bytes()))))


def header(**fields: object) -> Callable[[bytes], bytes]:
    def spoil(raw: bytes) -> bytes:
        made = nib.Nifti1Header(raw[:348], check=False)
        for key, value in fields.items():
            made[key] = value
        return made.binaryblock + raw[348:]

    return spoil


# -- one file


def test_unreadable(data: DataSet) -> None:
    data.cases[2].images[0].write_bytes(b"no NIfTI at all" * 40)
    assert faults(data) == [IMAGE + "not a NIfTI file (no magic string). Export it again."]


def test_missing(data: DataSet) -> None:
    data.cases[2].images[0].unlink()
    assert faults(data) == [IMAGE + "no such file. Check the path in the datalist and dataroot."]


def test_unknown_format(data: DataSet) -> None:
    other = data.root / "images" / "case_2.mnc"
    other.write_bytes(b"MINC")
    data.cases[2] = replace(data.cases[2], images=(other,))
    expected = f"Expected one of {SUFFIXES_TEXT}, or DICOM. Convert it."
    assert faults(data) == [f"case_2 (images/case_2.mnc): unknown image format '.mnc'. {expected}"]


def test_truncated(data: DataSet) -> None:
    path = data.cases[2].images[0]
    path.write_bytes(path.read_bytes()[:-500])
    assert faults(data) == [
        IMAGE + "the file ends early or is damaged (the gzip stream ends early). Copy or export it again."
    ]


def test_truncated_before_compression(data: DataSet) -> None:
    respoil(data.cases[2].images[0], lambda raw: raw[:-60])
    assert faults(data) == [IMAGE + "the file ends after 3300 of 3360 bytes of voxels. Copy or export it again."]


def test_damaged(data: DataSet) -> None:
    path = data.cases[2].images[0]
    raw = bytearray(path.read_bytes())
    raw[-6] ^= 0x10  # the checksum
    path.write_bytes(bytes(raw))
    found = faults(data)
    assert found == [
        IMAGE + "the file ends early or is damaged (Error -3 while decompressing data: incorrect data check). "
        "Copy or export it again."
    ]


def test_a_header_that_promises_too_much(data: DataSet) -> None:
    respoil(data.cases[2].images[0], header(dim=[3, 30000, 30000, 30000, 1, 1, 1, 1]))
    assert faults(data) == [
        IMAGE + "the header promises 54000000000000 bytes of voxels, more than the file can hold. "
        "Copy or export it again."
    ]


def test_too_large_for_the_memory(tmp_path: Path) -> None:
    path = save(tmp_path / "image.nii.gz", make_image(0))
    with pytest.raises(Exception, match="its voxels take 0.0 GiB and 0.0 GiB of memory are free"):
        read_stored_volume(path, free_bytes=1000)


def test_voxels_that_are_no_numbers(data: DataSet) -> None:
    save(data.cases[2].images[0], np.ones(SHAPE, np.complex64))
    assert faults(data) == [IMAGE + "voxels of type complex64. Expected numbers. Export as int16 or float32."]


def test_two_dimensions(data: DataSet) -> None:
    for path in (data.cases[2].images[0], data.cases[2].label):
        assert path is not None
        save(path, make_label()[:, :, 0])
    expected = "shape (14, 12) has 2 axes. Expected a 3D volume, or 4D with channels last. Convert it."
    assert faults(data) == [IMAGE + expected, LABEL + expected]


def test_a_single_slice(data: DataSet) -> None:
    save(data.cases[2].images[0], make_image(0)[:, :, :1])
    save(data.root / "labels" / "case_2.nii.gz", make_label()[:, :, :1])
    assert faults(data) == [
        IMAGE + "shape (14, 12, 1) is a single slice, and other cases are volumes. "
        "Stack the slices of a scan into one file, or leave it out."
    ]


def test_single_slices_alone_are_a_data_set(data: DataSet) -> None:
    for number, case in enumerate(data.cases):
        save(case.images[0], make_image(number)[:, :, 4:5])
        save(data.root / "labels" / f"case_{number}.nii.gz", make_label()[:, :, 4:5])
    assert faults(data) == []


def test_five_dimensions(data: DataSet) -> None:
    save(data.cases[2].images[0], make_image(0, (*SHAPE, 2, 3)))
    assert faults(data) == [
        IMAGE + "shape (14, 12, 10, 2, 3) has 5 axes. Expected a 3D volume, or 4D with channels last. Convert it."
    ]


def test_a_label_with_channels(data: DataSet) -> None:
    save(data.root / "labels" / "case_2.nii.gz", np.stack([make_label()] * 2, axis=-1))
    assert faults(data) == [
        LABEL + "a label with 2 channels. Expected one label map. "
        "For overlapping masks give a folder of a file each as the label."
    ]


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan])
def test_spacing_of_zero(data: DataSet, value: float) -> None:
    pixdim = [1, 1, value, 2, 1, 1, 1, 1]
    respoil(data.cases[2].images[0], header(pixdim=pixdim, sform_code=0, qform_code=1))
    assert faults(data) == [IMAGE + f"spacing of 1x{value:.4g}x2 mm. Expected positive sizes. Export it again."]


def test_absurd_spacing(data: DataSet) -> None:
    affine = np.diag([1000.0, 1500.0, 2000.0, 1.0])
    save(data.cases[2].images[0], make_image(2), affine)
    save(data.root / "labels" / "case_2.nii.gz", make_label(), affine)
    expected = "spacing of 1000x1500x2000 mm. Expected at most 50 mm. Correct the units, or export it again."
    assert faults(data) == [IMAGE + expected, LABEL + expected]


def respace(data: DataSet, number: int, factor: float) -> None:
    affine = np.diag([*(np.diag(AFFINE)[:3] * factor), 1.0])
    save(data.cases[number].images[0], make_image(number), affine)
    save(data.root / "labels" / f"case_{number}.nii.gz", make_label(), affine)


def test_a_case_in_metres_among_others(data: DataSet) -> None:
    respace(data, 2, 1e-3)
    expected = "spacing of 0.001x0.0015x0.002 mm, where 1x1.5x2 mm is usual. Correct the units, or leave it out."
    assert faults(data) == [IMAGE + expected]


@pytest.mark.parametrize("factor", [4e-3, 4e-6])
def test_micrometres_and_nanometres_are_planned(data: DataSet, factor: float) -> None:
    for number in range(len(data.cases)):
        respace(data, number, factor)
    assert faults(data) == []
    (warning,) = warnings(data)
    edges = "x".join(f"{edge * factor:.4g}" for edge in (1, 1.5, 2))
    assert warning.startswith(f"data set: spacing of {edges} mm in all cases, most likely micrometres written as mm.")
    fingerprint = data.analyze().fingerprint
    assert fingerprint is not None
    assert target_spacing(fingerprint)[0] == pytest.approx((factor, 1.5 * factor, 2 * factor), rel=1e-3)


def test_a_label_beside_its_image_under_a_microscope(data: DataSet) -> None:
    respace(data, 2, 4e-3)
    affine = np.diag([4e-3, 6e-3, 8e-3, 1.0])
    affine[0, 3] = 2e-3  # half a voxel
    save(data.root / "labels" / "case_2.nii.gz", make_label(), affine)
    assert any("not on the image's grid" in fault for fault in faults(data))


@pytest.mark.parametrize(("scale", "likely"), [(1.0, "an offset, such as 1024"), (0.2, "grey values")])
def test_a_ct_without_hounsfield_units(data: DataSet, scale: float, likely: str) -> None:
    for number in (0, 1):
        save(data.cases[number].images[0], (make_image(number) * scale).astype(np.int16))
    for number in range(2, len(data.cases)):
        save(data.cases[number].images[0], make_image(number) - 300)
    found = [str(w) for w in data.analyze(modality="CT").warnings if w.kind == "units"]
    assert len(found) == 1
    assert found[0].startswith("data set: no value below 0, and up to ")
    assert "in 2 of 6 cases (case_0, case_1). Expected Hounsfield units" in found[0]
    assert likely in found[0]
    assert not [w for w in data.analyze(modality="MRI").warnings if w.kind == "units"]


def test_a_background_that_is_not_zero(data: DataSet) -> None:
    for number, background in enumerate((-3, -3, -3, 40, 0, 0)):
        image = make_image(number) + 50
        image[:4] = background
        save(data.cases[number].images[0], image)
    found = [str(w) for w in data.analyze().warnings if w.kind == "units"]
    assert len(found) == 1
    assert found[0].startswith(
        "data set: a background that is not 0 in 4 of 6 cases (case_0, case_1, case_2, case_3). Only 0 is known as no "
    )
    assert not [w for w in data.analyze(modality="CT").warnings if "background" in w.finding]


def test_an_affine_that_is_not_invertible(data: DataSet) -> None:
    respoil(data.cases[2].images[0], header(srow_x=[0, 0, 0, 0]))
    assert faults(data) == [IMAGE + "an affine that is not invertible. Expected three axes. Export it again."]


def test_nan(data: DataSet) -> None:
    image = make_image(2).astype(np.float32)
    image[0, 0, :3] = np.nan
    save(data.cases[2].images[0], image)
    assert faults(data) == [IMAGE + "3 voxels are NaN. Replace them, or leave the case out."]


@pytest.mark.parametrize("value", [np.inf, -np.inf, 1e39])
def test_infinity(data: DataSet, value: float) -> None:
    image = make_image(2).astype(np.float64)
    image[0, 0, 0] = value
    save(data.cases[2].images[0], image)
    expected = "voxels are infinite, or beyond 32-bit floats. Replace them, or leave the case out."
    assert faults(data) == [IMAGE + expected]


@pytest.mark.parametrize("value", [3e38, -3e38, 1e7])
def test_one_voxel_that_would_shift_the_statistics_is_named_and_left_out(data: DataSet, value: float) -> None:
    image = make_image(2).astype(np.float32)
    save(data.cases[2].images[0], image)
    clean = data.analyze(strict=True).datastats
    image[3, 4, 5] = value
    save(data.cases[2].images[0], image)
    low, high = (np.percentile(image, q, method=m) for q, m in ((0.5, "lower"), (99.5, "higher")))
    expected = (
        IMAGE + f"1 voxel as far as {value:.4g}, while 99 % lie from {low:.4g} to {high:.4g}. They are left out of all "
        "statistics, and count as the nearest usual value in training and prediction. Correct the export where they "
        "are not meant."
    )
    assert warnings(data) == [expected]
    assert data.analyze(strict=True).quarantined == ()
    with_voxel = data.analyze(strict=True).datastats
    for key in ("mean", "stdev", "max", "min"):
        figures = [stats["stats_summary"]["image_stats"]["intensity"][key] for stats in (clean, with_voxel)]
        assert figures[1] == pytest.approx(figures[0], rel=0.01), key
    image[image < 895] = 0  # most voxels are nothing
    image[3, 4, 5] = value
    save(data.cases[2].images[0], image)
    assert any("as far as" in w for w in warnings(data))
    image[3, 4, 5] = 30_000  # metal
    save(data.cases[2].images[0], image)
    assert not any("as far as" in w for w in warnings(data))


@pytest.mark.parametrize(("value", "of_what"), [(3e38, ""), (9e5, "of the foreground ")])
def test_one_voxel_of_the_foreground_does_not_shift_what_a_ct_is_normalised_by(
    tmp_path: Path, value: float, of_what: str
) -> None:
    """900,000 does not show in the deviation of 13,824 voxels, but in that of the 512 of the foreground."""
    image = make_image(2, (24, 24, 24)).astype(np.float32)
    label = np.zeros(image.shape, np.uint8)
    label[8:16, 8:16, 8:16] = 1
    paths = [tmp_path / "image.nii.gz", tmp_path / "label.nii.gz"]
    save(paths[1], label)
    cases = []
    for voxel in (image[9, 9, 9], value):
        image[9, 9, 9] = voxel
        save(paths[0], image)
        cases.append(analyze_case((paths[0],), paths[1], None))
    clean, stray = cases
    assert clean.findings == ()
    assert [f.finding.partition(" while")[0] for f in stray.findings] == [f"1 voxel as far as {value:.4g},"]
    assert f"99 % {of_what}lie from" in stray.findings[0].finding
    for figures in zip(clean.foreground[0], stray.foreground[0], strict=True):
        assert figures[1] == pytest.approx(figures[0], rel=0.02)
    assert [c.voxels for c in clean.classes] == [c.voxels for c in stray.classes]
    assert clean.pooled[0].total == stray.pooled[0].total + 1


def test_constant_image(data: DataSet) -> None:
    save(data.cases[2].images[0], np.full(SHAPE, 7, np.int16))
    assert faults(data) == [IMAGE + "every voxel is 7. Export the image again, or leave it out."]


def test_warning_of_a_header_that_contradicts_itself(data: DataSet) -> None:
    respoil(data.cases[2].images[0], header(pixdim=[1, 3, 3, 3, 1, 1, 1, 1]))
    assert warnings(data) == [
        IMAGE + "voxel sizes 3x3x3 mm against 1x1.5x2 mm in its affine. "
        "The affine is used. Export it again if that is wrong."
    ]


def test_warning_of_a_qform_elsewhere_than_the_sform(data: DataSet) -> None:
    turned = AFFINE.copy()
    turned[:2, :2] = [[np.cos(0.3), -1.5 * np.sin(0.3)], [np.sin(0.3), 1.5 * np.cos(0.3)]]
    turned[:3, 3] = 30, 0, 0
    image = nib.load(data.cases[2].images[0])
    image = nib.Nifti1Image(np.asarray(image.dataobj), AFFINE)
    image.set_sform(AFFINE, 1)
    image.set_qform(turned, 1)
    nib.save(image, data.cases[2].images[0])
    assert warnings(data) == [
        IMAGE + "sform (its affine) and qform put corners 30 mm (30 voxels) apart. "
        "The affine is used. Export it again if that is wrong."
    ]
    turned[:2, :2], turned[:3, 3] = AFFINE[:2, :2], (0.05, 0, 0)  # a twentieth of a voxel
    image.set_qform(turned, 1)
    nib.save(image, data.cases[2].images[0])
    assert warnings(data) == []
    respoil(data.cases[2].images[0], header(quatern_b=3.0))
    assert warnings(data) == [
        IMAGE + "a damaged qform beside the sform (its affine). The affine is used. Export it again if that is wrong."
    ]


def test_warning_of_bytes_after_the_voxels(data: DataSet) -> None:
    respoil(data.cases[2].images[0], lambda raw: raw + b"\0" * 40)
    assert warnings(data) == [
        IMAGE + "40 bytes follow the voxels that the header describes. "
        "The header's size or type may be wrong; export it again if the image looks odd."
    ]


def test_warning_of_no_orientation(tmp_path: Path) -> None:
    path = save(tmp_path / "image.nii.gz", make_image(0))
    respoil(path, header(sform_code=0, qform_code=0))
    assert [w.finding for w in read_stored_volume(path).warnings] == ["no orientation in the header"]


def test_warning_of_other_units(tmp_path: Path) -> None:
    path = save(tmp_path / "image.nii.gz", make_image(0))
    respoil(path, header(xyzt_units=3))
    assert [w.finding for w in read_stored_volume(path).warnings] == ["sizes in micrometres"]


# -- image and label


def test_other_shape(data: DataSet) -> None:
    save(data.root / "labels" / "case_2.nii.gz", make_label()[:, :, 1:])
    assert faults(data) == [
        LABEL + "not on the image's grid: shape (14, 12, 9) against (14, 12, 10). Export the label again."
    ]


def test_other_orientation(data: DataSet) -> None:
    flipped = np.diag([-1.0, 1.5, 2.0, 1.0])
    save(data.root / "labels" / "case_2.nii.gz", make_label(), flipped)
    assert faults(data) == [LABEL + "not on the image's grid: orientation LAS against RAS. Export the label again."]


def test_other_affine(data: DataSet) -> None:
    moved = AFFINE.copy()
    moved[:3, 3] = 5
    save(data.root / "labels" / "case_2.nii.gz", make_label(), moved)
    assert faults(data) == [LABEL + "not on the image's grid: corners up to 8.66 mm apart. Export the label again."]


def test_an_affine_within_tolerance(data: DataSet) -> None:
    moved = AFFINE.copy()
    moved[:3, 3] = 0.005
    save(data.root / "labels" / "case_2.nii.gz", make_label(), moved)
    assert faults(data) == []


def test_channels_on_different_grids(data: DataSet) -> None:
    second = save(data.root / "images" / "second.nii.gz", make_image(50)[1:])
    data.cases[2] = replace(data.cases[2], images=(*data.cases[2].images, second))
    assert faults(data)[0] == (
        "case_2 (images/second.nii.gz): not on the grid of the first channel: shape (13, 12, 10) against "
        "(14, 12, 10). All channels must share one grid, that of case_2.nii.gz. Resample it."
    )


def test_label_that_is_not_integer(data: DataSet) -> None:
    label = make_label().astype(np.float32)
    label[1, 2, 2] = 1.5
    save(data.root / "labels" / "case_2.nii.gz", label)
    assert faults(data) == [
        LABEL + "label value 1.5 is not an integer. Was it interpolated? Resample labels by nearest neighbour."
    ]


def test_integers_stored_as_floats_are_fine(data: DataSet) -> None:
    save(data.root / "labels" / "case_2.nii.gz", make_label().astype(np.float64))
    assert faults(data) == []


def test_label_with_nan(data: DataSet) -> None:
    label = make_label().astype(np.float32)
    label[0, 0, 0] = np.nan
    save(data.root / "labels" / "case_2.nii.gz", label)
    assert faults(data) == [LABEL + "NaN or infinite voxels. Expected integers. Export it again."]


def test_label_values_out_of_range(data: DataSet) -> None:
    save(data.root / "labels" / "case_2.nii.gz", make_label().astype(np.int32) - 1)
    assert faults(data) == [LABEL + "label values from -1 to 1. Expected integers from 0 to 65535."]


def test_undeclared_label_values(data: DataSet) -> None:
    save(data.root / "labels" / "case_2.nii.gz", make_label((1, 2, 7)))
    assert faults(data) == [
        LABEL + "label value 7 not declared. Expected 0, 1, 2. Name them in class_names, or correct the label."
    ]


def test_classes_that_are_left_out_are_background(data: DataSet) -> None:
    """A run for some of the classes that the datalist names, such as the tumor alone."""
    for number, declared in enumerate([("liver",), ("liver", "tumor"), ("tumor",)]):
        values = [v for v, name in data.labels.items() if name in declared]
        save(data.root / "labels" / f"case_{number}.nii.gz", make_label(values))
        data.cases[number] = replace(data.cases[number], annotated=declared)
    chosen = (ClassSpec(name="tumor", index=(2,)),)
    analysis = data.analyze(class_names=chosen, partial_labels="declared")
    assert analysis.faults == ()
    assert [str(w) for w in analysis.warnings if w.kind == "label_values"] == [
        "data set: class_names leave out liver, which the datalist names. They count as background. "
        "Name them, too, if they are to be learned."
    ]
    assert not [w for w in analysis.warnings if w.kind == "empty_label"]
    # What is annotated for the liver alone says nothing of the tumor.
    assert analysis.annotated == {"case_0": ()}
    assert analysis.label_map is not None
    label = make_label((1, 2))
    np.testing.assert_array_equal(analysis.label_map.encode(label)[0], label == 2)


@pytest.mark.parametrize(
    ("name", "index"),
    [("tumor", (1,)), ("lesion", (2,))],  # another value than the datalist's; no name of it
)
def test_classes_that_contradict_the_datalist_leave_nothing_out(
    data: DataSet, name: str, index: tuple[int, ...]
) -> None:
    data.cases[2] = replace(data.cases[2], annotated=("liver", "tumor"))
    found = data.analyze(class_names=(ClassSpec(name=name, index=index),), partial_labels="declared")
    assert {f.kind for f in found.faults} == {"label_values", "annotated"}


def test_the_ignore_label_is_declared(data: DataSet) -> None:
    save(data.root / "labels" / "case_2.nii.gz", make_label((1, 2, 7)))
    assert faults(data, ignore_label=7) == []


def test_empty_label(data: DataSet) -> None:
    save(data.root / "labels" / "case_2.nii.gz", make_label(()))
    assert warnings(data) == [
        LABEL
        + "the label is empty. Check it. If none of the classes is there, say so with `annotated` in the datalist."
    ]
    data.cases[2] = replace(data.cases[2], annotated=("liver", "tumor"))
    assert [w for w in warnings(data, partial_labels="declared") if "empty" in w] == []


def test_many_empty_labels_are_one_line(data: DataSet) -> None:
    for number in range(5):
        save(data.root / "labels" / f"case_{number}.nii.gz", make_label(()))
    assert len([w for w in warnings(data) if "the label is empty" in w]) == 5
    alike = [
        Fault(kind="empty_label", finding="the label is empty", remedy="Check it.", case=f"c{i}") for i in range(9)
    ]
    odd = Fault(kind="few_cases", finding="1 class occurs in few", remedy="Add cases.")
    other = Fault(kind="grid", finding="another grid", remedy="Resample it.", case="c1", file="c1.nii")
    assert fault_lines([*alike, odd, other]) == [
        "9 cases (c0, c1, c2, c3, c4, c5 and 3 more): the label is empty. Check it.",
        "data set: 1 class occurs in few. Add cases.",
        "c1 (c1.nii): another grid. Resample it.",
    ]
    assert fault_lines(alike[:3]) == [f"c{i}: the label is empty. Check it." for i in range(3)]


def test_every_label_empty(tmp_path: Path) -> None:
    data = DataSet(root=tmp_path, num=0, labels={})
    for fold in range(2):
        data.add(label=make_label(()), fold=fold)
    assert faults(data) == [
        "data set: every label is empty. class_names: the data set has no class: none is named, and the labels hold "
        "background alone. Check the label files, or name the classes."
    ]


# -- declarations


def test_present_but_not_declared(data: DataSet) -> None:
    data.cases[2] = replace(data.cases[2], annotated=("liver",))
    assert faults(data, partial_labels="declared") == [
        LABEL + "has tumor but is not declared as annotated for it. "
        "Add it to `annotated` in the datalist, or remove it from the label."
    ]


def test_declared_for_no_class(data: DataSet) -> None:
    data.cases[2] = replace(data.cases[2], annotated=("liver", "tumor", "lung"))
    assert faults(data, partial_labels="declared") == [
        "case_2: annotated for lung, no class of the data set. Expected some of liver, tumor. "
        "Correct `annotated` in the datalist."
    ]


def test_a_declaration_that_is_not_used(data: DataSet) -> None:
    data.cases[2] = replace(data.cases[2], annotated=("liver", "tumor"))
    assert warnings(data) == [
        "data set: the datalist declares annotated classes for 1 case, but partial_labels is off. "
        "Set `partial_labels: declared`; until then every case counts as annotated for all classes."
    ]


# -- cases together


def test_channel_counts_that_differ(data: DataSet) -> None:
    save(data.cases[2].images[0], make_image(2, (*SHAPE, 3)))
    assert faults(data) == [
        IMAGE + "3 channels where 5 cases have 1. Give every case the same channels, or leave it out."
    ]


def test_the_same_image_in_two_folds(data: DataSet) -> None:
    save(data.cases[2].images[0], make_image(0))
    assert faults(data) == [
        IMAGE + "the same image as case_0, which is in fold 0 while this one is in fold 2. "
        "Leave one of them out; a model would be scored on what it learned from."
    ]


def test_the_same_image_stored_otherwise(data: DataSet) -> None:
    """Compressed, typed and oriented differently."""
    flipped = np.diag([-1.0, 1.5, 2.0, 1.0])
    flipped[0, 3] = SHAPE[0] - 1
    save(data.cases[2].images[0], make_image(0)[::-1].astype(np.float32), flipped)
    save(data.root / "labels" / "case_2.nii.gz", make_label()[::-1], flipped)
    assert [f.kind for f in data.analyze().faults] == ["duplicate"]


def test_the_same_image_in_one_fold(data: DataSet) -> None:
    save(data.cases[3].images[0], make_image(0))
    assert faults(data) == []
    assert warnings(data) == [
        "case_3 (images/case_3.nii.gz): the same image as case_0. Leave one of them out of the datalist."
    ]


def test_one_label_file_for_several_images(data: DataSet) -> None:
    data.cases[1] = replace(data.cases[1], label=data.cases[0].label)
    assert faults(data) == []
    assert warnings(data) == [
        "case_0 (labels/case_0.nii.gz): the label is also that of case_1. That is right for images of one patient on "
        "one grid alone; else give each its own."
    ]
    data.cases[:] = [replace(case, label=data.cases[0].label) for case in data.cases]
    assert faults(data) == [
        "data set: labels/case_0.nii.gz is the label of all 6 cases. Give each image the label that was drawn on it."
    ]


def test_the_same_image_in_training_and_testing(data: DataSet) -> None:
    data.add(image=make_image(1), role="testing")
    assert faults(data) == [
        "case_6 (images/case_6.nii.gz): the same image as case_1, which is in fold 1 while this one is in testing. "
        "Leave one of them out; a model would be scored on what it learned from."
    ]


def test_the_same_image_in_unlabeled_and_testing(data: DataSet) -> None:
    """No fault: whether unlabeled images are learned from is the strategy's to say."""
    data.add(image=make_image(7), role="testing")
    data.add(image=make_image(7), role="unlabeled")
    assert faults(data) == []
    assert warnings(data) == [
        "case_7 (images/case_7.nii.gz): the same image as case_6, which is in testing while this one is in unlabeled. "
        "Leave one of them out of the datalist: where unlabeled images join the training, they are learned from."
    ]


def test_a_patient_in_two_folds(data: DataSet) -> None:
    data.cases[0] = replace(data.cases[0], group="p7")
    data.cases[2] = replace(data.cases[2], group="p7")
    data.cases[3] = replace(data.cases[3], group="p7")
    assert faults(data) == [
        "case_2: patient p7 is in fold 2 and, as case_0, in fold 0. "
        "Put all cases of a patient in one fold; remove `fold` to have folds made."
    ]


def test_a_patient_in_training_and_testing(data: DataSet) -> None:
    data.cases[0] = replace(data.cases[0], group="p7")
    data.add(role="testing", group="p7")
    assert [f.kind for f in data.analyze().faults] == ["patient"]


def test_a_ct_among_mris(data: DataSet) -> None:
    save(data.cases[2].images[0], (make_image(2) - 1000).astype(np.int16))
    assert warnings(data) == [
        IMAGE + "intensities from -994 to -106, while 4 to 894.8 is usual. "
        "Is it of another modality or scale? Leave it out if so."
    ]


def test_a_label_a_share_of_a_voxel_off_or_stored_flipped_is_sound(data: DataSet) -> None:
    before = data.analyze(strict=True)
    moved = AFFINE.copy()
    moved[:3, 3] += 0.05
    labels = [case.label for case in data.cases if case.label is not None]
    save(labels[0], make_label(), moved)
    flipped = np.diag([-1.0, -1.5, 2.0, 1.0])
    flipped[:2, 3] = (SHAPE[0] - 1) * 1.0, (SHAPE[1] - 1) * 1.5
    save(labels[1], make_label()[::-1, ::-1], flipped)
    swapped = AFFINE[:, [2, 0, 1, 3]]
    save(labels[2], make_label().transpose(2, 0, 1), swapped)
    after = data.analyze(strict=True)
    assert after.warnings == ()
    assert after.datastats["data_set"] == before.datastats["data_set"]
    moved[0, 3] += 0.1
    save(labels[0], make_label(), moved)
    assert faults(data) == [
        "case_0 (labels/case_0.nii.gz): not on the image's grid: corners up to 0.166 mm apart. Export the label again."
    ]


def test_a_testing_case_outside_of_the_training_images(tmp_path: Path) -> None:
    data = DataSet(root=tmp_path, num=2)
    data.add(image=make_image(2), role="testing")
    data.add(image=(make_image(3) + 1500).astype(np.int16), role="testing")
    assert not any("case_" in w for w in warnings(data, modality="MRI"))
    found = [w for w in warnings(data, modality="CT") if "case_" in w]
    assert found == [
        "case_3 (images/case_3.nii.gz): intensities from 1502 to 2399, half of them and more outside of 6 to 896.9, "
        "where the training images lie. Is it of another modality, or not in Hounsfield units? Do not trust its "
        "labels if so."
    ]


def test_another_size(data: DataSet) -> None:
    affine = np.diag([8.0, 12.0, 16.0, 1.0])
    save(data.cases[2].images[0], make_image(2), affine)
    save(data.root / "labels" / "case_2.nii.gz", make_label(), affine)
    remedy = "Check the header's spacing, and whether the case belongs here."
    assert warnings(data) == [
        IMAGE + f"field of view of 112x144x160 mm, while 14x18x20 mm is usual. {remedy}",
        IMAGE + f"spacing of 8x12x16 mm, while 1x1.5x2 mm is usual. {remedy}",
    ]


def test_classes_with_few_cases(data: DataSet) -> None:
    data.labels[5] = "spleen"
    for case in data.cases[2:]:
        assert case.label is not None
        save(case.label, make_label((1,)))
    assert warnings(data) == [
        "data set: 1 class in no training case: spleen. What does not occur cannot be learned. "
        "Check class_names and the labels, or leave it out.",
        "data set: 1 class occurs in fewer training cases than the 3 folds: tumor (in 2). "
        "Some folds cannot score what is so rare. Use fewer folds, or add cases.",
    ]


def test_left_and_right_swapped_in_a_case(data: DataSet) -> None:
    data.labels = {1: "kidney_left", 2: "kidney_right"}
    save(data.root / "labels" / "case_2.nii.gz", make_label((2, 1)))
    assert warnings(data) == [
        LABEL + "left and right are swapped: its left structures lie to the right of its right ones. "
        "Check the affine of image and label, and the class names."
    ]


def test_left_and_right_swapped_everywhere(data: DataSet) -> None:
    data.labels = {1: "kidney_right", 2: "kidney_left"}
    assert warnings(data) == [
        "data set: in 6 of 6 cases left structures lie to the right of right ones. "
        "Are the class names swapped, or the images stored mirrored? Correct names or affines."
    ]


def test_a_mirrored_case_without_sides_in_the_names(data: DataSet) -> None:
    for _ in range(5):
        data.add(fold=0)
    save(data.root / "labels" / "case_2.nii.gz", make_label((2, 1)))
    assert warnings(data) == [
        LABEL + "left and right are the other way round than in the other cases. "
        "Check the affine of image and label, and the class names."
    ]


# -- what becomes of them


def test_all_faults_are_raised_at_once(data: DataSet) -> None:
    data.cases[2].images[0].write_bytes(b"")
    save(data.cases[4].images[0], np.full(SHAPE, 7, np.int16))
    with pytest.raises(DataError) as error:
        data.analyze(strict=True)
    assert error.value.messages == (
        IMAGE + "0 bytes are too few for a NIfTI header. Export it again.",
        "case_4 (images/case_4.nii.gz): every voxel is 7. Export the image again, or leave it out.",
    )
    listed = json.loads(data.workspace.faults.read_text())
    assert listed["warnings"] == []
    assert listed["faults"][1] == {
        "kind": "constant",
        "finding": "every voxel is 7",
        "remedy": "Export the image again, or leave it out.",
        "case": "case_4",
        "file": "images/case_4.nii.gz",
        "severity": "fault",
    }


def test_warnings_never_raise(data: DataSet) -> None:
    save(data.root / "labels" / "case_2.nii.gz", make_label(()))
    assert len(data.analyze(strict=True).warnings) == 1


def test_faulty_cases_are_quarantined(data: DataSet) -> None:
    save(data.cases[4].images[0], np.full(SHAPE, 7, np.int16))
    analysis = data.analyze(strict=True, on_fault="skip")
    assert analysis.quarantined == ("case_4",)
    assert analysis.fingerprint is not None
    assert analysis.fingerprint.num_cases == 5
    assert "case_4" not in data.workspace.datastats_by_case.read_text()


def test_no_sound_case_is_left(tmp_path: Path) -> None:
    data = DataSet(root=tmp_path, num=0)
    data.add(image=np.full(SHAPE, 7, np.int16), fold=0)
    with pytest.raises(DataError, match="No training case is sound: case_0 .*every voxel is 7"):
        data.analyze(strict=True, on_fault="skip")


def test_a_case_that_kills_its_process_is_named(data: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "IN_PROCESS_BYTES", 0)
    monkeypatch.setattr(workers, "analyze_case", _die_on_case_2)
    # A fork, so that the line above counts, whatever threads earlier tests have left.
    monkeypatch.setattr(workers.threading, "enumerate", lambda: [threading.current_thread()])
    found = faults(data, num_workers=2)
    assert found == [
        "case_2: the process that read it was killed, as happens when memory runs out. "
        "Analyse it on a machine with more memory, or leave it out."
    ]


_analyze_case = workers.analyze_case


def _die_on_case_2(images: tuple[Path, ...], *rest: object) -> object:
    if images[0].name.startswith("case_2"):
        import os

        os._exit(9)
    return _analyze_case(images, *rest)  # type: ignore[arg-type]


def test_regions_that_no_value_holds_together_are_said(data: DataSet) -> None:
    for i in range(2):
        data.add(fold=i)
    names = [{"name": "a", "index": [1]}, {"name": "b", "index": [2]}]
    analysis = data.analyze(class_names=names, sigmoid=True)
    said = [str(w) for w in analysis.warnings if w.kind == "regions"]
    assert said == [
        "data set: no label value stands for a and b together. Where models find both, a label file shows the smaller. "
        "Leave `sigmoid` out if none overlap."
    ]
    assert not [w for w in data.analyze(class_names=names).warnings if w.kind == "regions"]
