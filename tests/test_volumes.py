"""Geometry round trips, channels, scaling, resampling, and what a faulty file gets."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.transforms import Spacing
from nibabel.orientations import axcodes2ornt, inv_ornt_aff
from scipy.spatial.transform import Rotation

from autoseg.data import streams
from autoseg.data.formats.table import read_grid, stem_of
from autoseg.data.grid import Grid
from autoseg.data.resampling import resample, resampled_shape
from autoseg.data.volumes import read_image, read_label, write_volume
from autoseg.errors import DataError

AXES = [("L", "R"), ("P", "A"), ("I", "S")]
ORIENTATIONS = [
    (AXES[i][a], AXES[j][b], AXES[k][c])
    for i, j, k in [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    for a in (0, 1)
    for b in (0, 1)
    for c in (0, 1)
]


def stored_affine(
    codes: tuple[str, ...], shape: tuple[int, ...], spacing: tuple[float, ...], tilt: float
) -> np.ndarray:
    """An affine whose stored axes point along `codes`, tilted by some degrees about an odd axis."""
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_rotvec(np.radians(tilt) * np.array([0.48, 0.6, 0.64])).as_matrix()
    axes = inv_ornt_aff(axcodes2ornt(codes), shape)  # RAS index -> stored index
    return turn @ np.linalg.inv(axes) @ np.diag([*spacing, 1.0])


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


@settings(max_examples=60)
@given(
    codes=st.sampled_from(ORIENTATIONS),
    shape=st.tuples(*[st.integers(2, 6)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 5.0)] * 3),
    tilt=st.sampled_from([0.0, 12.0, -25.0]),
    num_channels=st.integers(1, 3),
)
def test_every_voxel_comes_back_where_it_was(
    tmp_path_factory: pytest.TempPathFactory,
    codes: tuple[str, ...],
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    tilt: float,
    num_channels: int,
) -> None:
    tmp_path = tmp_path_factory.mktemp("voxels")
    affine = stored_affine(codes, shape, spacing, tilt)
    array = np.arange(np.prod(shape) * num_channels, dtype=np.float32).reshape(*shape, num_channels)
    path = save(tmp_path / "in.nii", array[..., 0] if num_channels == 1 else array, affine)
    volume = read_image((path,))
    ras = volume.grid.to_ras()
    # The same voxel has the same place in the world, read or stored.
    for index in [(0, 0, 0), tuple(s - 1 for s in ras.shape), (1, 0, 1)]:
        world = ras.affine @ [*index, 1]
        stored = np.rint(np.linalg.solve(volume.grid.affine, world)[:3]).astype(int)
        assert volume.array[(0, *index)] == array[(*stored, 0)]
    assert "".join(nib.aff2axcodes(ras.affine)) == "RAS"
    assert volume.array.shape == (num_channels, *ras.shape)
    out = tmp_path / "out.nii.gz"
    for c in range(num_channels):
        write_volume(out, volume.array[c], volume.grid)
        back = nib.load(out)
        np.testing.assert_array_equal(np.asarray(back.dataobj), array[..., c])
        np.testing.assert_allclose(back.affine, affine, atol=1e-5)
        assert read_grid(out)[0].differs_from(read_grid(path)[0]) is None


def test_all_48_orientations_are_tried() -> None:
    assert len(set(ORIENTATIONS)) == 48


def test_scaling_of_the_header_is_applied(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    image = nib.Nifti1Image(array, np.eye(4))
    image.header.set_slope_inter(0.5, -1000.0)
    path = tmp_path / "scaled.nii"
    nib.save(image, path)
    raw = bytearray(path.read_bytes())
    raw[352:] = array.tobytes(order="F")  # nibabel scales when saving; put the plain integers back
    path.write_bytes(raw)
    np.testing.assert_array_equal(read_image((path,)).array[0], array * 0.5 - 1000)


def test_files_become_channels_in_their_order(tmp_path: Path) -> None:
    first = save(tmp_path / "a.nii", np.full((2, 3, 4), 1, np.int16))
    second = save(tmp_path / "b.nii", np.stack([np.full((2, 3, 4), v, np.int16) for v in (2, 3)], axis=-1))
    fifth = save(
        tmp_path / "c.nii", np.stack([np.full((2, 3, 4), v, np.int16) for v in (4, 5)], axis=-1)[:, :, :, None]
    )
    assert read_image((first, second, fifth)).array[:, 0, 0, 0].tolist() == [1, 2, 3, 4, 5]
    assert read_grid(second)[1] == 2


def test_labels_keep_their_values(tmp_path: Path) -> None:
    small = read_label(save(tmp_path / "a.nii", np.array([[[0, 255]]], np.float32)))
    large = read_label(save(tmp_path / "b.nii", np.array([[[0, 300]]], np.int32)))
    assert (small.array.dtype, large.array.dtype) == (np.uint8, np.uint16)
    assert (small.array.max(), large.array.max()) == (255, 300)


@pytest.mark.parametrize("target", [(1.0, 0.8, 1.5), (0.7, 0.6, 0.9)])
def test_refining_equals_monai(target: tuple[float, float, float]) -> None:
    size, spacing = (14, 11, 9), (1.3, 0.8, 2.0)
    array = torch.rand(2, *size, generator=torch.Generator().manual_seed(0))
    shape = resampled_shape(size, spacing, target)
    # MONAI keeps the voxel size and lets the extent go: ask for the size that fills our extent.
    exact = [n * s / m for n, s, m in zip(size, spacing, shape, strict=True)]
    monai = Spacing(exact, mode="bilinear", padding_mode="border", scale_extent=True)
    theirs = monai(MetaTensor(array, affine=torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64))))
    torch.testing.assert_close(resample(array, shape), theirs.as_tensor(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(7, 20, 5), (28, 10, 9), (14, 22, 27)])
def test_resampling_keeps_places(shape: tuple[int, int, int]) -> None:
    """A ramp of the place in mm is the same ramp at the new voxels' centres, but for the border."""
    size = (14, 20, 9)
    for axis in range(3):
        at = torch.arange(size[axis]) + 0.5
        ramp = at.view([-1 if a == axis else 1 for a in range(3)]).expand(size)[None]
        made = resample(ramp, shape).movedim(axis + 1, 0)[:, 0, 0, 0]
        expected = (torch.arange(shape[axis]) + 0.5) * size[axis] / shape[axis]
        inner = (expected > 0.5) & (expected < size[axis] - 0.5)
        torch.testing.assert_close(made[inner], expected[inner], atol=1e-4, rtol=0)


def test_resampled_labels_keep_values_and_volume(phantom_case) -> None:  # type: ignore[no-untyped-def]
    label = torch.from_numpy(read_label(phantom_case().label).array)
    finer = resample(label, tuple(2 * s for s in label.shape[1:]), nearest=True)
    assert finer.dtype == label.dtype
    for value in (1, 2):
        assert (finer == value).sum() == 8 * (label == value).sum()
    torch.testing.assert_close(resample(finer, tuple(label.shape[1:]), nearest=True), label)


def test_grids_that_differ_say_how() -> None:
    grid = Grid(shape=(10, 10, 10), affine=np.eye(4))
    moved, finer = np.eye(4), np.diag([1, 1, 0.5, 1.0])
    moved[0, 3] = 3
    assert grid.differs_from(Grid(shape=(10, 10, 9), affine=np.eye(4))) == "shape (10, 10, 10) against (10, 10, 9)"
    assert grid.differs_from(Grid(shape=(10, 10, 10), affine=moved)) == "corners up to 3 mm apart"
    assert grid.differs_from(Grid(shape=(10, 10, 10), affine=finer)) == "spacing 1x1x1 against 1x1x0.5 mm"
    assert grid.differs_from(Grid(shape=(10, 10, 10), affine=np.diag([-1, 1, 1, 1.0]))) == "orientation RAS against LAS"
    assert grid.differs_from(Grid(shape=(10, 10, 10), affine=np.eye(4) + 1e-5)) is None


def two_forms(
    path: Path, array: np.ndarray, *, codes: tuple[int, int], apart: bool, kind: type = nib.Nifti1Image
) -> Path:
    """A file whose qform is its sform, or turned by 20 degrees and moved by 30 mm."""
    sform = stored_affine(("L", "A", "S"), array.shape, (0.7, 0.8, 2.0), 12.0)
    qform = stored_affine(("L", "A", "S"), array.shape, (0.7, 0.8, 2.0), 32.0 if apart else 12.0)
    qform[:3, 3] += 30.0 * apart
    image = kind(array, sform)
    image.set_sform(sform, codes[0])
    image.set_qform(qform, codes[1])
    image.header.set_xyzt_units("micron" if apart else "mm", "sec")
    nib.save(image, path)
    return path


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("codes", [(1, 1), (4, 2), (2, 0), (0, 1), (0, 0)])
def test_a_label_has_both_forms_and_codes_of_its_image(tmp_path: Path, codes, apart: bool, kind: type) -> None:
    array = np.arange(120, dtype=np.int16).reshape(6, 5, 4)
    path = two_forms(tmp_path / "image.nii.gz", array, codes=codes, apart=apart, kind=kind)
    volume = read_image((path,))
    write_volume(tmp_path / "whole.nii.gz", volume.array[0].astype(np.int16), volume.grid)
    with streams.FileImage([path]) as image, streams.LabelRows(tmp_path / "rows.nii", image.grid, np.int16) as out:
        for row in range(image.shape[image.axis]):
            out.write(row, image.rows(row, row + 1)[0])
    image, places = nib.load(path), ("sform_code", "qform_code", "srow_x", "srow_y", "srow_z")
    places = (*places, "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z")
    for name in ("whole.nii.gz", "rows.nii"):
        label = nib.load(tmp_path / name)
        np.testing.assert_array_equal(np.asarray(label.dataobj), array)
        for place in places:
            np.testing.assert_array_equal(label.header[place], image.header[place].astype(np.float32), err_msg=place)
        np.testing.assert_array_equal(label.header["pixdim"][:4], image.header["pixdim"][:4].astype(np.float32))
        assert label.header.get_xyzt_units()[0] == image.header.get_xyzt_units()[0]
        assert read_grid(tmp_path / name)[0].differs_from(volume.grid) is None


SHEARED = np.array([[0.7, 0.1, 0.2, 5], [0, 0.8, -0.3, -60.5], [0, 0, 2.5, 1000.25], [0, 0, 0, 1]])
FRAMES = {"plain": np.diag([1.0, 1.5, 2.0, 1.0]), "sheared": SHEARED, "left-handed": SHEARED @ np.diag([1, -1, 1, 1])}
TYPES = [order + kind for kind in ("u1", "i1", "i2", "u2", "i4", "u4", "f4", "f8") for order in "<>"]


def any_file(
    path: Path, array: np.ndarray, affine: np.ndarray, kind: str, *, slope: float = 1.0, ahead: int = 0
) -> Path:
    """A file of a type and byte order; scaled; NIfTI-2 where the type has 8 bytes; with axes of one volume behind."""
    header = (nib.Nifti2Header if kind[1] == "f" and kind[2] == "8" else nib.Nifti1Header)(endianness=kind[0])
    header.set_data_dtype(np.dtype(kind))
    header.set_data_shape((*array.shape, *[1] * ahead))
    header.set_sform(affine, 1)
    header.set_qform(np.diag([*np.linalg.norm(affine[:3, :3], axis=0), 1.0]), 0)
    header["magic"] = b"n+1" if header.sizeof_hdr == 348 else b"n+2"
    header["vox_offset"] = header.single_vox_offset
    header["scl_slope"], header["scl_inter"] = slope, 0
    raw = header.binaryblock + bytes(4) + np.rint(array / slope).astype(kind).tobytes(order="F")
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("kind", TYPES)
def test_labels_of_any_type_and_frame_are_equal_and_come_back_in_place(tmp_path: Path, kind: str, frame: str) -> None:
    array = np.random.default_rng(0).integers(0, 4, (6, 5, 4))
    expected = read_label(any_file(tmp_path / "plain.nii", array, FRAMES[frame], "<u1"))
    forms = {"x.nii.gz": {}, "four.nii": {"ahead": 1}, "five.nii": {"ahead": 2}, "half.nii.gz": {"slope": 0.5}}
    for name, form in forms.items():
        path = any_file(tmp_path / name, array, FRAMES[frame], kind, **form)  # type: ignore[arg-type]
        label = read_label(path)
        np.testing.assert_array_equal(label.array, expected.array)
        assert label.array.dtype == np.uint8
        np.testing.assert_array_equal(read_image((path,)).array, expected.array)
        write_volume(tmp_path / "out.nii.gz", label.array[0], label.grid)
        back = nib.load(tmp_path / "out.nii.gz")
        np.testing.assert_array_equal(np.asarray(back.dataobj), array)
        np.testing.assert_array_equal(back.affine, nib.load(path).affine.astype(np.float32))


def turned_file(path: Path, array: np.ndarray, affine: np.ndarray, codes: tuple[str, ...]) -> Path:
    """A file with the same voxels in the same places, its axes stored along other directions."""
    other = nib.orientations.ornt_transform(nib.io_orientation(affine), axcodes2ornt(codes))
    turned = nib.orientations.apply_orientation(array, other)
    return save(path, turned, affine @ inv_ornt_aff(other, array.shape[:3]))


@pytest.mark.parametrize("codes", ["LPS", "RAS", "SLA", "PIR"])
def test_files_of_one_grid_may_be_stored_in_other_directions(tmp_path: Path, codes: str) -> None:
    affine = stored_affine(("R", "A", "S"), (6, 5, 4), (0.7, 0.8, 2.0), 12.0)
    array = np.random.default_rng(0).integers(0, 900, (6, 5, 4)).astype(np.int16)
    first = save(tmp_path / "first.nii", array, affine)
    moved = affine.copy()
    moved[:3, 3] += 0.02  # of a voxel of 0.7 mm
    other = turned_file(tmp_path / "other.nii", array, moved, tuple(codes))
    assert read_grid(other)[0].differs_from(read_grid(first)[0]) is None
    both = read_image((first, other)).array
    np.testing.assert_array_equal(both[0], both[1])
    moved[:3, 3] += 0.06
    apart = read_grid(turned_file(other, array, moved, tuple(codes)))[0].differs_from(read_grid(first)[0])
    assert apart == ("corners up to 0.139 mm apart" if codes == "RAS" else f"orientation {codes} against RAS")


@pytest.mark.parametrize("streamed", [False, True])
def test_channels_stored_in_other_directions_are_read_alike_when_large(tmp_path, monkeypatch, streamed: bool) -> None:
    affine = np.diag([0.7, 0.8, 2.0, 1.0])
    array = np.random.default_rng(0).integers(0, 900, (6, 5, 4)).astype(np.int16)
    paths = [save(tmp_path / "a.nii", array, affine), turned_file(tmp_path / "b.nii", array, affine, tuple("SPL"))]
    if streamed:
        monkeypatch.setattr(streams, "STREAM_VOXELS", 10)
    image = streams.open_image(paths)
    rows = image.rows(0, image.shape[image.axis])
    np.testing.assert_array_equal(rows[0], rows[1])


def message(path: Path, read: str = "image") -> str:
    with pytest.raises(DataError) as caught:
        read_image((path,)) if read == "image" else read_label(path)
    return str(caught.value)


def test_faulty_files_are_named(tmp_path: Path) -> None:
    p = tmp_path / "x.nii"
    assert message(p) == f"{p}: no such file. Check the path in the datalist and dataroot."
    odd = tmp_path / "x.xyz"
    odd.write_bytes(b"")
    assert "unknown image format '.xyz'" in message(odd)
    odd.rename(tmp_path / "x.png")
    assert message(tmp_path / "x.png").startswith(
        f"{tmp_path / 'x.png'}: a 2D picture (.png). autoseg reads medical formats: "
    )
    p.write_bytes(b"not an image")
    assert message(p) == f"{p}: 12 bytes are too few for a NIfTI header. Export it again."
    p.write_bytes(b"not an image" * 40)
    assert message(p) == f"{p}: not a NIfTI file (no magic string). Export it again."
    save(p, np.zeros((4, 4), np.int16))
    assert message(p) == f"{p}: shape (4, 4) has 2 axes. Expected a 3D volume, or 4D with channels last. Convert it."
    save(p, np.zeros((4, 4, 4, 2, 2), np.int16))
    assert (
        message(p)
        == f"{p}: shape (4, 4, 4, 2, 2) has 5 axes. Expected a 3D volume, or 4D with channels last. Convert it."
    )
    save(p, np.zeros((4, 4, 4), np.complex64))
    assert message(p) == f"{p}: voxels of type complex64. Expected numbers. Export as int16 or float32."
    save(p, np.array([[[0, np.nan, np.inf]]], np.float32))
    assert message(p) == f"{p}: 2 voxels are NaN or infinite. Replace them, or leave the case out."
    assert message(p, "label") == f"{p}: the label has NaN or infinite voxels. Expected integers. Export it again."
    save(p, np.array([[[0, 1.5]]], np.float32))
    assert "label value 1.5 is not an integer. Was it interpolated?" in message(p, "label")
    save(p, np.array([[[0, -3]]], np.int16))
    assert message(p, "label") == f"{p}: label values from -3 to 0. Expected integers from 0 to 65535."
    save(p, np.zeros((4, 4, 4, 2), np.uint8))
    assert message(p, "label") == f"{p}: a label with 2 channels. Expected one label map."


def test_singular_affine_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "x.nii", np.zeros((4, 4, 4), np.int16))
    raw = bytearray(path.read_bytes())
    raw[280:328] = bytes(48)  # srow_x, srow_y, srow_z
    path.write_bytes(raw)
    assert message(path) == (f"{path}: an affine that is not invertible. Expected three axes. Export it again.")


def test_channels_on_two_grids_are_named(tmp_path: Path) -> None:
    a = save(tmp_path / "a.nii", np.zeros((4, 4, 4), np.int16))
    b = save(tmp_path / "b.nii", np.zeros((4, 4, 5), np.int16))
    with pytest.raises(DataError) as caught:
        read_image((a, b))
    assert str(caught.value) == (
        f"{b}: not on the grid of a.nii (shape (4, 4, 5) against (4, 4, 4)). Channels of a case must share one grid."
    )


def test_truncated_file_is_found_by_its_header_alone(tmp_path: Path) -> None:
    path = save(tmp_path / "x.nii", np.zeros((4, 4, 4), np.int16))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError) as caught:
        read_grid(path)
    assert str(caught.value) == (f"{path}: the file ends after 127 of 128 bytes of voxels. Copy or export it again.")


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_never_give_a_traceback(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    whole = save(
        tmp_path / "x.nii", rng.integers(0, 3, (6, 5, 4)).astype(np.int16), np.diag([1, 2, 3, 1.0])
    ).read_bytes()
    num_faults = 0
    for i in range(200):
        raw = bytearray(whole)
        if i % 3 == 0:
            raw = raw[: rng.integers(len(raw))]
        else:
            at = int(rng.integers(348))
            raw[at : at + 4] = rng.bytes(4)
        path = tmp_path / ("y.nii.gz" if i % 2 else "y.nii")
        path.write_bytes(gzip.compress(bytes(raw), 1) if i % 2 else bytes(raw))
        try:
            read_image((path,))
            read_label(path)
        except DataError:
            num_faults += 1
    assert num_faults > 60


def test_writing_checks_the_shape_and_leaves_nothing_half_done(tmp_path: Path) -> None:
    grid = Grid(shape=(4, 5, 6), affine=np.eye(4))
    with pytest.raises(DataError, match=r"array of shape \(4, 5, 5\) for a grid of \(4, 5, 6\) in RAS"):
        write_volume(tmp_path / "out" / "x.nii.gz", np.zeros((4, 5, 5), np.uint8), grid)
    write_volume(tmp_path / "out" / "x.nii.gz", np.zeros((4, 5, 6), np.uint8), grid)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["x.nii.gz"]
    assert nib.load(tmp_path / "out" / "x.nii.gz").get_data_dtype() == np.uint8


def test_stems() -> None:
    assert [stem_of(Path(n)) for n in ("a.b.nii.gz", "A.NII.GZ", "a.nii")] == ["a.b", "A", "a"]
