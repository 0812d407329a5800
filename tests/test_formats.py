"""One reader for every command: a file's content decides, all of it is checked, and its voxels are nibabel's."""

from __future__ import annotations

import gzip
import itertools
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from analysis_data import AFFINE, make_image, make_label, save

from autoseg.analyzer.case import analyze_case
from autoseg.data.formats.stored import FileFaultError
from autoseg.data.formats.table import LABEL_SUFFIXES, SUFFIXES, read_header, read_stored_volume, stem_of, suffix_of
from autoseg.data.grid import Grid
from autoseg.data.streams import FileImage
from autoseg.data.volumes import read_image, read_label, write_volume
from autoseg.errors import DataError


def read_rows(path: Path) -> np.ndarray:
    """An image read slice by slice."""
    with FileImage([path]) as image:
        return image.rows(0, image.shape[image.axis])


READERS: dict[str, Callable[[Path], object]] = {
    "image": lambda path: read_image((path,)),
    "label": read_label,
    "rows": read_rows,
    "stored": lambda path: read_stored_volume(path, with_digest=True),
}


def refusals(path: Path) -> dict[str, bool]:
    """Which readers refuse a file; the analysis among them."""
    refused = {"analysis": analyze_case((path,), None, None).is_faulty}
    for name, read in READERS.items():
        try:
            read(path)
        except DataError:
            refused[name] = True
        else:
            refused[name] = False
    return refused


def is_whole(packed: bytes, plain: bytes) -> bool:
    """Whether a gzip stream still holds what it should, as where the bit that was flipped is one of padding."""
    try:
        return gzip.decompress(packed) == plain
    except (OSError, EOFError, zlib.error):
        return False


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("order", "<>")
def test_voxels_are_those_of_nibabel_bit_by_bit(tmp_path: Path, suffix: str, order: str) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / f"image{suffix}"
    kinds = ("u1", "i2", "u2", "i4", "i8", "f4", "f8")
    for kind, scaling in itertools.product(kinds, [(1.0, 0.0), (0.37, -1024.0), (2.0, 0.0), (1.0, 3.5)]):
        array = rng.integers(0, 200, (5, 4, 6, 2)).astype(order + kind)
        header = nib.Nifti1Header(endianness=order)
        header.set_data_dtype(array.dtype)
        header.set_data_shape(array.shape)
        header.set_sform(AFFINE, 1)
        header["magic"], header["vox_offset"] = b"n+1", 352
        header["scl_slope"], header["scl_inter"] = scaling
        raw = header.binaryblock + bytes(4) + array.tobytes(order="F")
        path.write_bytes(gzip.compress(raw) if suffix == ".nii.gz" else raw)
        expected = np.moveaxis(np.asarray(nib.load(path).dataobj, np.float32), 3, 0)
        np.testing.assert_array_equal(read_image((path,)).array, expected)
        np.testing.assert_array_equal(read_rows(path), expected)
        np.testing.assert_array_equal(read_header(path).grid.affine, nib.load(path).affine)


@pytest.mark.parametrize(("name", "other"), [("image.nii", "image.nii.gz"), ("image.nii.gz", "image.nii")])
def test_a_file_with_the_other_suffix_is_read_by_its_content_everywhere(tmp_path: Path, name: str, other: str) -> None:
    image, label = save(tmp_path / name, make_image(0)), save(tmp_path / f"label_{name}", make_label())
    expected, expected_label = read_image((image,)).array, read_label(label).array
    image, label = image.rename(tmp_path / other), label.rename(tmp_path / f"label_{other}")
    assert analyze_case((image,), label, None).findings == ()
    np.testing.assert_array_equal(read_image((image,)).array, expected)
    np.testing.assert_array_equal(read_label(label).array, expected_label)
    np.testing.assert_array_equal(read_rows(image), expected)


def test_every_command_refuses_the_same_damaged_gzip_streams(tmp_path: Path) -> None:
    """A flipped bit behind the header: the checksum tells, also where the stream can still be inflated."""
    path = save(tmp_path / "image.nii.gz", make_label())
    whole = path.read_bytes()
    plain = gzip.decompress(whole)
    num_damaged = 0
    places = [*range(len(whole) - 8, len(whole)), *range(30, len(whole) - 8, max(1, len(whole) // 25))]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(bytes(damaged))
        is_damaged = not is_whole(damaged, plain)
        num_damaged += is_damaged
        assert set(refusals(path).values()) == {is_damaged}, place
    assert num_damaged > 20
    for cut in (1, 8, len(whole) // 2):
        path.write_bytes(whole[:-cut])
        assert set(refusals(path).values()) == {True}, cut
    path.write_bytes(whole)
    assert set(refusals(path).values()) == {False}


def test_a_message_is_the_same_in_every_command(tmp_path: Path) -> None:
    path = save(tmp_path / "image.nii.gz", make_label())
    raw = bytearray(path.read_bytes())
    raw[-6] ^= 0x10  # of the checksum
    path.write_bytes(bytes(raw))
    messages = set()
    for read in READERS.values():
        with pytest.raises(DataError) as caught:
            read(path)
        messages.add(str(caught.value))
    fault = analyze_case((path,), None, None).findings[0]
    assert messages == {f"{path}: {fault.finding}. {fault.remedy}"}
    assert "incorrect data check" in fault.finding


def test_a_fault_comes_back_from_another_process() -> None:
    fault = FileFaultError("missing", "no such file", "Check the path.", Path("x.nii"))
    remade = pickle.loads(pickle.dumps(fault))  # noqa: S301 - our own
    assert (remade.fault, str(remade), remade.messages) == (fault.fault, str(fault), fault.messages)
    assert str(remade) == "x.nii: no such file. Check the path."


def test_a_digest_is_of_the_bytes_and_only_where_asked_for(tmp_path: Path) -> None:
    first, second = (save(tmp_path / f"{n}.nii.gz", make_image(n)) for n in (0, 1))
    digests = [read_stored_volume(path, with_digest=True).digest for path in (first, second, first)]
    assert len(digests[0]) == 32
    assert digests[0] == digests[2] != digests[1]
    assert read_stored_volume(first).digest == ""


def test_suffixes_come_from_the_table(tmp_path: Path) -> None:
    assert SUFFIXES[:2] == LABEL_SUFFIXES[:2] == (".nii.gz", ".nii")
    names = ["a.b.nii.gz", "A.NII.GZ", "a.nii", "a.gz", "a", "a.MHA", "1.2.840"]
    assert [suffix_of(Path(n)) for n in names] == [".nii.gz", ".nii.gz", ".nii", ".gz", "", ".mha", ""]
    assert [stem_of(Path(n)) for n in names] == ["a.b", "A", "a", "a", "a", "a", "1.2.840"]
    with pytest.raises(DataError, match=r"x\.mhd: label files are not written as \.mhd\. Expected one of \.nii\.gz"):
        write_volume(tmp_path / "x.mhd", np.zeros((3, 4, 5), np.uint8), Grid(shape=(3, 4, 5), affine=np.eye(4)))
    assert not list(tmp_path.iterdir())
