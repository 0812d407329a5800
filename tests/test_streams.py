"""Images read and labels written row by row: the same voxels and files as in one piece."""

from __future__ import annotations

import gzip
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from tiny_jobs import make_job

from autoseg.config.hyperparameters import NormalizeMode
from autoseg.data import streams
from autoseg.data.formats import raw
from autoseg.data.grid import Grid, Volume
from autoseg.data.histograms import Histogram
from autoseg.data.preprocess import ChannelNorm, PreparedRows, Preprocessing, channel_stats, normalize, prepare_image
from autoseg.data.streams import FileImage, LabelRows, MemoryImage, open_image
from autoseg.data.volumes import read_image, write_volume
from autoseg.errors import DataError, ResourceError
from autoseg.inference import restore
from autoseg.inference.predictor import Predictor

AFFINES = {
    "ras": np.diag([1.0, 1.2, 1.5, 1.0]),
    "flipped": np.array([[-1.0, 0, 0, 30], [0, -1.2, 0, 10], [0, 0, -1.5, -7], [0, 0, 0, 1]]),
    "permuted": np.array([[0, 0, -1.1, 0], [-0.9, 0, 0, 4], [0, 2.5, 0, 9], [0, 0, 0, 1.0]]),
    "oblique": np.array([[0.98, 0.17, 0, 3], [-0.17, 0.98, 0.1, -20], [0, -0.1, 1.9, 5], [0, 0, 0, 1]]),
}


def write_image(path: Path, shape, affine: np.ndarray, *, dtype=np.int16, slope: float | None = None, seed=0) -> Path:
    array = np.random.default_rng(seed).integers(-1000, 1000, shape).astype(dtype)
    image = nib.Nifti1Image(array, affine)
    if slope is not None:
        image.header.set_slope_inter(slope, -7.5)
    nib.save(image, path)
    return path


@pytest.mark.parametrize("name", AFFINES)
@pytest.mark.parametrize(("suffix", "slope"), [(".nii.gz", None), (".nii.gz", 0.37), (".nii", 0.37)])
def test_rows_of_a_file_are_those_of_the_whole_image(tmp_path: Path, name: str, suffix: str, slope) -> None:
    path = write_image(tmp_path / f"image{suffix}", (9, 11, 13), AFFINES[name], slope=slope)
    whole = read_image((path,))
    with FileImage([path]) as image:
        assert image.shape == whole.array.shape[1:]
        assert image.num_channels == 1
        np.testing.assert_allclose(image.spacing_mm, whole.spacing_mm)
        size = image.shape[image.axis]
        assert size == 13  # the axis the file is stored by
        pieces = [image.rows(start, min(start + 5, size)) for start in range(0, size, 5)]
    np.testing.assert_array_equal(np.concatenate(pieces, image.axis + 1), whole.array)
    assert pieces[0].dtype == np.float32


def test_channels_in_one_file_and_in_several(tmp_path: Path) -> None:
    both = write_image(tmp_path / "both.nii.gz", (6, 7, 8, 2), AFFINES["flipped"])
    third = write_image(tmp_path / "third.nii", (6, 7, 8), AFFINES["flipped"], seed=1)
    with FileImage([both, third]) as image:
        assert image.num_channels == 3
        np.testing.assert_array_equal(image.rows(2, 5), read_image((both, third)).array[..., 2:5])
    other = write_image(tmp_path / "other.nii", (6, 7, 9), AFFINES["flipped"])
    with pytest.raises(DataError, match=r"other\.nii: not on the grid of both\.nii\.gz \(shape"):
        FileImage([both, other])


def test_what_is_unpacked_has_no_name_so_that_a_kill_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_image(tmp_path / "image.nii.gz", (9, 11, 13), AFFINES["ras"])
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(raw.tempfile, "tempdir", str(folder))
    with FileImage([path]) as image:
        image.rows(0, 3)
        assert not list(folder.iterdir())
    assert not list(folder.iterdir())
    monkeypatch.setattr(raw.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100})())
    with pytest.raises(ResourceError, match=r"image\.nii\.gz: unpacked it takes 0\.0 GB, .* set TMPDIR"):
        FileImage([path])
    assert not list(folder.iterdir())


def test_damaged_files_and_voxels_that_are_no_number(tmp_path: Path) -> None:
    path = write_image(tmp_path / "image.nii.gz", (30, 30, 30), AFFINES["ras"])
    cut = tmp_path / "cut.nii.gz"
    cut.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(DataError, match=r"cut\.nii\.gz: the file ends early or is damaged"):
        FileImage([cut])
    short = tmp_path / "short.nii.gz"
    short.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-2000]))
    with pytest.raises(DataError, match=r"short\.nii\.gz: the file ends after 52000 of 54000 bytes of voxels"):
        FileImage([short])
    array = np.zeros((5, 5, 5), np.float32)
    array[1, 1, 3] = np.nan
    nib.save(nib.Nifti1Image(array, AFFINES["ras"]), tmp_path / "nan.nii")
    with FileImage([tmp_path / "nan.nii"]) as image:
        image.rows(0, 3)
        with pytest.raises(DataError, match=r"nan\.nii: 1 voxel is NaN or infinite"):
            image.rows(3, 5)


@pytest.mark.parametrize("name", AFFINES)
@pytest.mark.parametrize("suffix", [".nii.gz", ".nii"])
def test_a_label_written_row_by_row_is_the_file_written_at_once(tmp_path: Path, name: str, suffix: str) -> None:
    grid = Grid(shape=(9, 11, 13), affine=AFFINES[name])
    ras = grid.to_ras().shape
    labels = np.random.default_rng(0).integers(0, 300, ras).astype(np.uint16)
    axis = ras.index(13)
    rows = np.moveaxis(labels, axis, 0)
    rows[4:6] = 0  # left out below: background
    write_volume(tmp_path / f"whole{suffix}", labels, grid)
    with LabelRows(tmp_path / f"rows{suffix}", grid, np.dtype(np.uint16)) as out:
        for start, stop in ((0, 4), (6, 7), (7, 13)):
            out.write(start, np.moveaxis(rows[start:stop], 0, axis))
    assert (tmp_path / f"rows{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()
    saved = nib.load(tmp_path / f"rows{suffix}")
    np.testing.assert_allclose(saved.affine, grid.affine, atol=1e-6)
    np.testing.assert_array_equal(read_image((tmp_path / f"rows{suffix}",)).array[0], labels)


def test_a_label_that_was_not_finished_is_not_there(tmp_path: Path) -> None:
    grid = Grid(shape=(4, 5, 6), affine=AFFINES["ras"])
    with suppress(RuntimeError), LabelRows(tmp_path / "label.nii.gz", grid, np.dtype(np.uint8)) as out:
        out.write(0, np.ones((4, 5, 2), np.uint8))
        raise RuntimeError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("mode", ["ct", "mri", "meanstdtanh", "none"])
def test_an_image_prepared_row_by_row_is_the_one_prepared_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode, crop: bool
) -> None:
    monkeypatch.setattr("autoseg.data.preprocess.PART_VOXELS", 300)
    array = np.random.default_rng(0).normal(-20, 100, (12, 9, 20)).astype(np.float32)
    array[:2] = array[:, :, 15:] = 0
    nib.save(nib.Nifti1Image(array, AFFINES["flipped"]), tmp_path / "image.nii.gz")
    norm = ChannelNorm(mode=mode, bounds=(-50, 90), mean=3.0, std=20.0, nonzero=mode == "mri")
    how = Preprocessing(norms=(norm,), spacing_mm=(1.4, 0.9, 1.1), crop_foreground=crop)
    whole = prepare_image(read_image((tmp_path / "image.nii.gz",)), how)
    with FileImage([tmp_path / "image.nii.gz"]) as image:
        rows = PreparedRows(image, how)
        assert rows.box == whole.box
        size = rows.shape[rows.axis]
        pieces = [rows.rows(start, min(start + 3, size)).numpy() for start in range(0, size, 3)]
    found = np.concatenate(pieces, rows.axis + 1)
    np.testing.assert_allclose(found, whole.image.numpy(), atol=1e-4 if mode == "none" else 1e-5)


def test_a_crop_keeps_every_voxel_other_than_zero(tmp_path: Path) -> None:
    """Also those below it: a z-scored MR has half of its voxels there, a phase image may have all."""
    array = np.zeros((12, 9, 20), np.float32)
    array[3:8, 2:7, 5:12] = -np.random.default_rng(0).uniform(0.1, 3, (5, 5, 7))
    nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / "image.nii.gz")
    how = Preprocessing(norms=(ChannelNorm(mode="none"),), spacing_mm=(1, 1, 1), crop_foreground=True)
    with FileImage([tmp_path / "image.nii.gz"]) as image:
        assert PreparedRows(image, how).box == (slice(3, 8), slice(2, 7), slice(5, 12))


def test_statistics_in_pieces_are_those_of_the_whole() -> None:
    array = (1e4 + np.random.default_rng(1).normal(size=(40, 30, 20))).astype(np.float32)
    array[5:9] = 0
    for nonzero in (False, True):
        norm = ChannelNorm(mode="mri", nonzero=nonzero)
        inside = array[array != 0] if nonzero else array
        found = channel_stats(partial(np.array_split, array, 7), norm, array.size)
        assert found is not None
        np.testing.assert_allclose(found.mean, inside.mean(dtype=np.float64), rtol=1e-12)
        np.testing.assert_allclose(found.std, inside.std(dtype=np.float64), rtol=1e-9)
    empty = np.zeros((3, 3, 3), np.float32)
    assert channel_stats(lambda: [empty], ChannelNorm(mode="mri", nonzero=True), empty.size) is None
    assert not normalize(empty, ChannelNorm(mode="mri", nonzero=True), None).any()


@pytest.mark.parametrize("name", AFFINES)
def test_a_large_file_gets_the_labels_of_a_small_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    jobs = [
        make_job(tmp_path, "segresnet", i, seed=i, resample_resolution=s)
        for i, s in enumerate([(1.4, 1.3, 1.6), (1.0, 1.0, 2.0), (1.4, 1.3, 1.6)])
    ]
    path = write_image(tmp_path / "image.nii.gz", (22, 31, 45), AFFINES[name])
    for combine in ("mean", "vote"):
        predictor = Predictor(jobs, device="cpu", combine=combine)
        predictor.predict_file([path], tmp_path / "small.nii.gz")
        with monkeypatch.context() as patch:
            patch.setattr(streams, "STREAM_VOXELS", 1)
            patch.setattr(restore, "SLAB_ROWS", 7)
            with open_image([path]) as opened:
                assert isinstance(opened, FileImage)
            predictor.predict_file([path], tmp_path / "large.nii.gz")
        small, large = (np.asarray(nib.load(tmp_path / f"{n}.nii.gz").dataobj) for n in ("small", "large"))
        assert len(np.unique(small)) > 1
        assert (small != large).mean() < 1e-3  # rounding may turn a tie
    assert not list(tmp_path.glob(".part*"))


def test_memory_images_give_views(tmp_path: Path) -> None:
    array = np.zeros((2, 3, 9, 4), np.float32)
    image = MemoryImage(Volume(array=array, grid=Grid(shape=(3, 9, 4), affine=np.eye(4))))
    assert image.axis == 1
    assert image.rows(2, 5).shape == (2, 3, 3, 4)
    assert np.shares_memory(image.rows(2, 5), array)


def test_images_of_few_values_have_no_stray_voxels() -> None:
    """However few voxels have the other value: 39 to 41 of 8,000 are about a two-hundredth."""
    for few in (1, 2, 39, 40, 41, 200):
        array = np.full((20, 20, 20), 100, np.float32)
        array.flat[:few] = 0
        stats = channel_stats(lambda array=array: [array], ChannelNorm(mode="meanstd"), array.size)
        assert stats is not None
        assert stats.usual is None
        values, counts = np.array([0.0, 100.0]), np.array([few, array.size - few])
        assert Histogram(values=values, counts=counts).usual() is None


@pytest.mark.parametrize("value", [3e38, -3e38, 1e7])
@pytest.mark.parametrize("mode", ["meanstd", "mri", "meanstdtanh"])
@pytest.mark.parametrize("streamed", [True, False])
def test_a_stray_voxel_leaves_the_others_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, mode: NormalizeMode, streamed: bool
) -> None:
    rng = np.random.default_rng(0)
    array = rng.normal(100, 20, (16, 18, 20)).astype(np.float32)
    array[:4] = 0
    grid = Grid(shape=array.shape, affine=np.eye(4))
    how = Preprocessing(norms=(ChannelNorm(mode=mode, nonzero=mode == "mri"),), spacing_mm=(1.0, 1.0, 1.0))
    if streamed:
        monkeypatch.setattr(streams, "STREAM_VOXELS", 1)
    prepared = []
    for voxel in (array[8, 9, 10], value):
        array[8, 9, 10] = voxel
        path = tmp_path / "a.nii.gz"
        write_volume(path, array, grid)
        with ExitStack() as stack:
            image = open_image([path])
            if not isinstance(image, MemoryImage):
                stack.enter_context(image)
            rows = PreparedRows(image, how)
            prepared.append(rows.rows(0, rows.shape[rows.axis])[0].numpy())
    assert np.isfinite(prepared[1]).all()
    there = np.zeros(prepared[0].shape, bool)
    there[np.unravel_index(np.argmax(np.abs(prepared[0] - prepared[1])), there.shape)] = True
    np.testing.assert_allclose(prepared[0][~there], prepared[1][~there], atol=0.01)
    assert abs(prepared[1][there][0]) < 5
