"""NRRD, MetaImage, MGH and pairs of hdr and img: voxels and grids as the formats' own libraries have them."""

from __future__ import annotations

import gzip
import random
from pathlib import Path

import nibabel as nib
import nrrd
import numpy as np
import pytest
import SimpleITK as sitk
from other_formats import WRITERS, to_itk, write_image, write_itk, write_mgh

from autoseg.analyzer.case import analyze_case
from autoseg.data.formats.table import (
    SUFFIXES,
    can_stream,
    files_of,
    format_of,
    image_digest,
    image_files,
    image_signature,
    read_header,
    read_stored_volume,
    stem_of,
)
from autoseg.data.streams import FileImage
from autoseg.data.volumes import read_image
from autoseg.errors import DataError

OBLIQUE = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.3, -0.2, 0.1) @ np.diag([-0.8, 1.5, 2.25]), [31.5, -20.25, 7.125]
)
FLIPPED = np.array([[0, 0, -1.5, 9], [-0.75, 0, 0, 4], [0, 2.5, 0, -3], [0, 0, 0, 1.0]])
SINGLE = Path(__file__).resolve().parents[2] / "shared" / "data" / "single"
NAMES = {".nrrd": "NRRD", ".nhdr": "NRRD", ".mha": "MetaImage", ".mhd": "MetaImage", ".mgz": "MGH", ".mgh": "MGH"}


def voxels(seed: int = 0, shape: tuple[int, ...] = (6, 7, 5), dtype: str = "i2") -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 200, shape).astype(dtype)


def rows_of(path: Path) -> np.ndarray:
    """All of an image, read slice by slice in two pieces, where its format can be read so."""
    if not can_stream(path):
        return read_image((path,)).array
    with FileImage([path]) as image:
        last = image.shape[image.axis]
        return np.concatenate([image.rows(0, 2), image.rows(2, last)], axis=image.axis + 1)


@pytest.mark.parametrize("affine", [OBLIQUE, FLIPPED], ids=["oblique", "flipped"])
@pytest.mark.parametrize("suffix", WRITERS)
def test_voxels_and_grid_are_those_that_were_written(tmp_path: Path, suffix: str, affine: np.ndarray) -> None:
    for dtype in ("u1", "i2", "f4") if suffix in (".mgz", ".mgh") else ("u1", "i2", "u2", "i4", "f4", "f8"):
        path = write_image(tmp_path / f"{dtype}{suffix}", voxels(dtype=dtype), affine)
        assert format_of(path).name == NAMES.get(suffix, "Analyze")
        stored = read_stored_volume(path)
        np.testing.assert_array_equal(stored.array[..., 0], voxels(dtype=dtype))
        assert stored.array.dtype == np.dtype(dtype)
        assert stored.warnings == ()
        np.testing.assert_allclose(stored.grid.affine, affine, atol=1e-4, rtol=0)
        assert read_header(path).num_bytes == stored.array.nbytes
        np.testing.assert_array_equal(rows_of(path), read_image((path,)).array)
        plain = tmp_path / "plain.nii"
        nib.save(nib.Nifti1Image(voxels(dtype=dtype), affine), plain)
        np.testing.assert_array_equal(read_image((path,)).array, read_image((plain,)).array)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
@pytest.mark.parametrize("packed", [True, False])
def test_channels_side_by_side_are_channels(tmp_path: Path, suffix: str, packed: bool) -> None:
    array = voxels(shape=(6, 7, 5, 2))
    path = tmp_path / f"two{suffix}"
    write_itk(path, array, FLIPPED, packed=packed)
    np.testing.assert_array_equal(read_stored_volume(path).array, array)
    np.testing.assert_array_equal(rows_of(path), read_image((path,)).array)
    assert read_header(path).num_channels == 2


@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".mgz"])
def test_volumes_one_after_the_other_are_channels(tmp_path: Path, suffix: str) -> None:
    array = voxels(shape=(6, 7, 5, 3))
    path = tmp_path / f"three{suffix}"
    if suffix == ".mgz":
        write_mgh(path, array, OBLIQUE)
    else:
        volumes = [to_itk(volume, OBLIQUE) for volume in np.moveaxis(array, 3, 0)]
        sitk.WriteImage(sitk.JoinSeries(volumes), str(path))
    stored = read_stored_volume(path)
    np.testing.assert_array_equal(stored.array, array)
    np.testing.assert_allclose(stored.grid.affine, OBLIQUE, atol=1e-4, rtol=0)
    np.testing.assert_array_equal(rows_of(path), read_image((path,)).array)


@pytest.mark.parametrize("space", ["left-posterior-superior", "RAS", "LAS", "left-anterior-superior"])
@pytest.mark.parametrize("encoding", ["raw", "gzip"])
@pytest.mark.parametrize("order", "<>")
def test_nrrd_of_any_space_encoding_and_byte_order(tmp_path: Path, space: str, encoding: str, order: str) -> None:
    path = tmp_path / "image.nrrd"
    signs = {"le": (-1, -1), "la": (-1, 1), "ra": (1, 1)}[space[:2].lower()]
    signs = (-1, 1) if space == "left-anterior-superior" else signs
    world = np.diag([*signs, 1, 1]) @ OBLIQUE
    header = {"space": space, "space directions": world[:3, :3].T, "space origin": world[:3, 3], "encoding": encoding}
    nrrd.write(str(path), voxels(dtype=f"{order}i2"), header)
    stored = read_stored_volume(path)
    np.testing.assert_array_equal(stored.array[..., 0], voxels())
    np.testing.assert_allclose(stored.grid.affine, OBLIQUE, atol=1e-9)
    # The same through an independent reader.
    image = sitk.ReadImage(str(path))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image).T, stored.array[..., 0])
    np.testing.assert_allclose((np.diag([-1, -1, 1, 1]) @ stored.grid.affine)[:3, 3], image.GetOrigin(), atol=1e-9)


def test_nrrd_and_metaimage_without_a_direction_are_read_as_itk_does_with_a_warning(tmp_path: Path) -> None:
    (tmp_path / "a.nrrd").write_bytes(
        b"NRRD0004\ntype: uchar\ndimension: 3\nsizes: 2 3 4\nspacings: 1 2 3\nencoding: raw\n\n" + bytes(range(24))
    )
    (tmp_path / "a.mha").write_bytes(
        b"ObjectType = Image\nNDims = 3\nDimSize = 2 3 4\nElementSpacing = 1 2 3\nElementType = MET_UCHAR\n"
        b"ElementDataFile = LOCAL\n" + bytes(range(24))
    )
    for name in ("a.nrrd", "a.mha"):
        stored = read_stored_volume(tmp_path / name)
        np.testing.assert_array_equal(stored.grid.affine, np.diag([-1, -2, 3, 1]))
        np.testing.assert_array_equal(stored.array.ravel(order="F"), np.arange(24))
        assert [w.finding for w in stored.warnings] == ["no orientation in the header"]


def test_analyze_is_read_as_nibabel_does_with_a_warning(tmp_path: Path) -> None:
    image = nib.Spm2AnalyzeImage(voxels(), None)
    image.header.set_zooms((1, 2, 3))
    nib.save(image, tmp_path / "old.hdr")
    stored = read_stored_volume(tmp_path / "old.hdr")
    np.testing.assert_array_equal(stored.array[..., 0], voxels())
    np.testing.assert_allclose(stored.grid.affine, nib.load(tmp_path / "old.hdr").affine)
    assert [w.finding for w in stored.warnings] == ["no orientation in the header"]
    np.testing.assert_array_equal(read_stored_volume(tmp_path / "old.img").array, stored.array)
    (tmp_path / "old.mat").write_bytes(b"MATLAB")
    with pytest.raises(DataError, match=r"old\.hdr: its affine is in old\.mat, which is not read\. Convert the pair"):
        read_stored_volume(tmp_path / "old.hdr")


def test_content_comes_before_the_suffix(tmp_path: Path) -> None:
    for suffix, other in ((".nrrd", ".mha"), (".mha", ".nii.gz"), (".mgz", ".nrrd")):
        path = write_image(tmp_path / f"image{suffix}", voxels(), OBLIQUE)
        moved = path.rename(tmp_path / f"moved{other}")
        np.testing.assert_array_equal(read_stored_volume(moved).array[..., 0], voxels())


def test_names_of_files(tmp_path: Path) -> None:
    assert stem_of(Path("a.b.seg.nrrd")) == "a.b"
    for suffix in WRITERS:
        write_image(tmp_path / f"x{suffix}", voxels(), OBLIQUE)
    # The voxels of a header are no image of their own.
    assert [p.name for p in image_files(tmp_path)] == sorted(f"x{suffix}" for suffix in WRITERS)
    assert set(WRITERS) < set(SUFFIXES)


@pytest.mark.parametrize(("suffix", "beside"), [(".nhdr", ".raw.gz"), (".mhd", ".zraw"), (".hdr", ".img")])
def test_voxels_in_another_file_belong_to_the_images_identity(tmp_path: Path, suffix: str, beside: str) -> None:
    path = write_image(tmp_path / f"image{suffix}", voxels(), OBLIQUE)
    digest, signature = image_digest(path), image_signature(path)
    assert files_of(path) == (path, tmp_path / f"image{beside}")
    assert read_stored_volume(path, with_digest=True).digest == digest
    write_image(tmp_path / "other" / f"image{suffix}", voxels(1), OBLIQUE)
    (tmp_path / "other" / f"image{beside}").replace(tmp_path / f"image{beside}")
    assert image_digest(path) != digest
    assert image_signature(path) != signature
    (tmp_path / f"image{beside}").unlink()
    with pytest.raises(DataError, match=rf"image{suffix}: its voxels, image\{beside}, are not there"):
        read_stored_volume(path)
    assert analyze_case((path,), None, None).is_faulty


def header_of_nrrd(**changes: str) -> bytes:
    fields = {"type": "uchar", "dimension": "3", "sizes": "2 3 4", "encoding": "raw", "space": "RAS"}
    fields |= {"space directions": "(1,0,0) (0,1,0) (0,0,1)"} | {k.replace("_", " "): v for k, v in changes.items()}
    return ("NRRD0005\n" + "".join(f"{k}: {v}\n" for k, v in fields.items() if v) + "\n").encode() + bytes(24)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kinds": "RGB-color domain domain domain", "dimension": "4", "sizes": "3 2 2 2"}, "space directions and 4"),
        ({"type": "block"}, "voxels of type block. Expected numbers"),
        ({"kinds": "domain domain complex"}, "voxels of type complex. Expected numbers"),
        ({"encoding": "bzip2"}, "voxels stored as bzip2. Save it as raw or gzip"),
        ({"type": "short"}, "no endian"),
        ({"sizes": "2 3 5"}, "the file ends after 24 of 30 bytes of voxels"),
        ({"sizes": "2 3 4000000000000000000000"}, "the file ends after 24 of"),
        ({"sizes": "2 3 -4"}, "has 3 axes"),
        ({"space_directions": "(1,0,0) (1,0,0) (0,0,1)"}, "an affine that is not invertible"),
        ({"space_directions": "(1,0,0) (nan,0,0) (0,0,1)"}, "an affine that is not invertible"),
        ({"space_directions": "(1,0,0) (0,1,0) none"}, "2 axes of space"),
        ({"space_directions": ""}, "no spacing in the header"),
        ({"data_file": "/etc/passwd"}, "its voxels are said to be in /etc/passwd"),
        ({"data_file": "../x.raw"}, r"its voxels are said to be in \.\./x\.raw"),
        ({"data_file": "LIST"}, "its voxels are in several files"),
        ({"sizes": "2 three 4"}, "damaged"),
    ],
)
def test_a_nrrd_that_is_not_read_says_why(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    path = tmp_path / "image.nrrd"
    path.write_bytes(header_of_nrrd())
    assert read_stored_volume(path).grid.shape == (2, 3, 4)
    path.write_bytes(header_of_nrrd(**changes))
    with pytest.raises(DataError, match=rf"image\.nrrd: .*{message}"):
        read_stored_volume(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("NDims = 3", "NDims = 2", "NDims 2 and 3 sizes"),
        ("MET_SHORT", "MET_SHORT_ARRAY", "voxels of type MET_SHORT_ARRAY"),
        ("BinaryData = True", "BinaryData = False", "voxels stored as text"),
        ("LOCAL", "../x.raw", r"its voxels are said to be in \.\./x\.raw"),
        ("LOCAL", "LIST", "its voxels are in several files"),
        ("DimSize = 6 7 5", "DimSize = 6 7 500", "the file ends after 420 of 42000 bytes"),
        ("ElementSpacing = 1", "ElementSpacing = 0", "an affine that is not invertible"),
        ("ElementDataFile", "ElementDatFile", "no ElementDataFile"),
    ],
)
def test_a_metaimage_that_is_not_read_says_why(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "image.mha"
    write_itk(path, voxels(), np.eye(4), packed=False)
    raw = path.read_bytes()
    assert raw.count(old.encode()) == 1, raw[:500]
    path.write_bytes(raw.replace(old.encode(), new.encode()))
    with pytest.raises(DataError, match=rf"image\.mha: .*{message}"):
        read_stored_volume(path)


def mutated(raw: bytes, chosen: random.Random) -> bytes:
    """A file with a few bytes changed, inserted or cut off, in its header mostly."""
    damaged = bytearray(raw)
    for _ in range(chosen.randint(1, 4)):
        place = min(chosen.choice([chosen.randrange(400), chosen.randrange(len(damaged))]), len(damaged) - 1)
        kind = chosen.randrange(4)
        if kind == 0:
            damaged[place] = chosen.randrange(256)
        elif kind == 1:
            damaged[place] = ord(chosen.choice("0123456789-. \n:=()"))
        elif kind == 2:
            del damaged[place : place + chosen.randint(1, 9)]
        else:
            damaged[place:place] = chosen.choice([b"9999999999", b"\n", b"-", b"nan", b"\0\0", b"e308"])
        if not damaged:
            damaged = bytearray(raw)
    return bytes(damaged)


def refusal(path: Path) -> str | None:
    """Why an image is not read."""
    try:
        read_stored_volume(path, with_digest=True)
    except DataError as error:
        return str(error)
    return None


@pytest.mark.parametrize("suffix", WRITERS)
def test_damaged_files_are_refused_by_name_or_read_never_a_bug(tmp_path: Path, suffix: str) -> None:
    path = write_image(tmp_path / f"image{suffix}", voxels(), OBLIQUE)
    raw = path.read_bytes()
    chosen = random.Random(suffix)
    num_refused = 0
    for number in range(300):
        if suffix == ".mgz" and number % 2:  # its header is packed, too
            path.write_bytes(gzip.compress(mutated(gzip.decompress(raw), chosen)))
        else:
            path.write_bytes(mutated(raw, chosen))
        message = refusal(path)
        assert message is None or str(path) in message
        num_refused += message is not None
        assert analyze_case((path,), None, None).is_faulty >= (message is not None)
    assert num_refused > 50


@pytest.mark.skipif(not SINGLE.is_dir(), reason="the real files are not here")
def test_real_files_are_those_of_simpleitk_and_nibabel() -> None:
    num_read = 0
    for path in sorted(p for p in SINGLE.rglob("*") if p.suffix in (".nrrd", ".mha", ".mgz", ".hdr")):
        stored = read_stored_volume(path)
        if path.suffix in (".nrrd", ".mha"):
            image = sitk.ReadImage(str(path))
            array = sitk.GetArrayFromImage(image)
            expected = np.moveaxis(array, 3, 0).T if array.ndim == 4 else array.T[..., None]
            affine = np.eye(4)
            affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
            affine[:3, 3] = image.GetOrigin()
            affine = np.diag([-1, -1, 1, 1]) @ affine
        else:
            other = nib.load(path)
            expected = np.asarray(other.dataobj).reshape(stored.array.shape)
            affine = other.affine
        np.testing.assert_array_equal(stored.array, expected, err_msg=path.name)
        np.testing.assert_allclose(stored.grid.affine, affine, atol=1e-4, rtol=0, err_msg=path.name)
        num_read += 1
    assert num_read == 27
