"""200 corrupted files: never a traceback, never a hang, never a wrong statistic that nothing warns of.

Whatever is found wrong is told as a fault or a warning; a file that passes without either must have the statistics
that nibabel and NumPy read from it. Flipped bytes in an uncompressed file's voxels are not to be told from other
voxels, so its statistics are those of what it holds now.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from analysis_data import AFFINE, SHAPE, make_image, make_label, save

from autoseg.analyzer.case import CaseStats, analyze_case

NUM_FILES = 200


def flip_bytes(rng: np.random.Generator, raw: bytes) -> bytes:
    spoilt = bytearray(raw)
    for _ in range(int(rng.integers(1, 6))):
        spoilt[int(rng.integers(len(spoilt)))] ^= int(rng.integers(1, 256))
    return bytes(spoilt)


def truncate(rng: np.random.Generator, raw: bytes) -> bytes:
    return raw[: int(rng.integers(len(raw)))]


def repeat(rng: np.random.Generator, raw: bytes) -> bytes:
    at = int(rng.integers(len(raw)))
    return raw[:at] + raw[at - min(at, 50) :]


def rewrite_header(rng: np.random.Generator, raw: bytes) -> bytes:
    """Random bytes, or telling ones, in one or two fields of the header inside the gzip."""
    plain = bytearray(gzip.decompress(raw))
    fields = {"sizeof": (0, "i"), "dim": (40, "h"), "datatype": (70, "h"), "bitpix": (72, "h"), "pixdim": (76, "f")}
    fields |= {"offset": (108, "f"), "slope": (112, "f"), "units": (123, "b"), "codes": (252, "h"), "srow": (280, "f")}
    for _ in range(int(rng.integers(1, 3))):
        start, kind = fields[str(rng.choice(list(fields)))]
        start += struct.calcsize(kind) * int(rng.integers(4))
        telling = {"f": [0.0, -1.0, np.nan, np.inf, 1e30, 2.0, 1e-30], "b": [0, 1, 3, -128]}
        value = rng.choice(telling.get(kind, [0, 1, 2, -1, 4, 8, 16, 64, 128, 512, 1024, 32767, -32768]))
        struct.pack_into("<" + kind, plain, start, value if kind == "f" else int(value))
    return gzip.compress(bytes(plain))


def flip_inside(rng: np.random.Generator, raw: bytes) -> bytes:
    """Flipped bytes under a checksum that is right."""
    plain = gzip.decompress(raw)
    head = int(rng.integers(2)) * 348
    return gzip.compress(flip_bytes(rng, plain[:head]) + plain[head:] if head else flip_bytes(rng, plain))


WAYS = (flip_bytes, truncate, repeat, rewrite_header, flip_inside)


def check_against_numpy(stats: CaseStats, image_path: Path, label_path: Path) -> None:
    image = nib.as_closest_canonical(nib.load(image_path))
    label = nib.as_closest_canonical(nib.load(label_path))
    voxels = np.asarray(image.dataobj).reshape(*image.shape[:3], -1).astype(np.float64)
    values = np.rint(np.asarray(label.dataobj)).astype(int).reshape(label.shape[:3])
    assert stats.shape == image.shape[:3]
    np.testing.assert_allclose(stats.spacing_mm, nib.affines.voxel_sizes(image.affine), rtol=1e-5)
    assert {c.value: c.voxels for c in stats.classes} == {v: (values == v).sum() for v in np.unique(values)}
    for channel, found in enumerate(stats.foreground):
        inside = voxels[..., channel][values > 0]
        expected = [inside.max(), inside.mean(), np.median(inside), inside.min(), inside.std()]
        np.testing.assert_allclose(found[:5], expected, rtol=1e-5, atol=1e-6 * np.abs(inside).max())


@pytest.mark.parametrize("way", WAYS, ids=lambda w: w.__name__)
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_corrupted_files(way: object, tmp_path: Path) -> None:
    rng = np.random.default_rng(WAYS.index(way))  # type: ignore[arg-type]
    images = {
        "int16": make_image(0),
        "float32": rng.normal(size=SHAPE).astype(np.float32),
        "uint8": rng.integers(0, 256, SHAPE).astype(np.uint8),
    }
    told = 0
    for number in range(NUM_FILES // len(WAYS)):
        kind = str(rng.choice(list(images)))
        image = save(tmp_path / f"{number}_image.nii.gz", images[kind], AFFINE)
        label = save(tmp_path / f"{number}_label.nii.gz", make_label(), AFFINE)
        victim = label if number % 4 == 0 else image
        victim.write_bytes(way(rng, victim.read_bytes()))  # type: ignore[operator]
        stats = analyze_case((image,), label, None)
        if stats.findings:
            told += 1
            assert all(f.finding and f.remedy for f in stats.findings)
            assert stats.is_faulty or stats.shape != (0, 0, 0)
        else:
            check_against_numpy(stats, image, label)
    assert told > 5


def test_uncompressed_files_are_checked_too(tmp_path: Path) -> None:
    rng = np.random.default_rng(9)
    label = save(tmp_path / "label.nii", make_label())
    for number in range(40):
        image = save(tmp_path / f"{number}.nii", make_image(number))
        way = (flip_bytes, truncate, repeat)[number % 3]
        image.write_bytes(way(rng, image.read_bytes()))
        stats = analyze_case((image,), label, None)
        if not stats.findings:
            check_against_numpy(stats, image, label)
        else:
            assert way is not flip_bytes or all(f.kind for f in stats.findings)


def test_a_gzip_bomb_is_refused(tmp_path: Path) -> None:
    """A megabyte that promises a terabyte, and one that really inflates to more than its header says."""
    path = tmp_path / "bomb.nii.gz"
    header = nib.Nifti1Header()
    header.set_data_shape((10000, 10000, 10000))
    header["magic"] = b"n+1"
    path.write_bytes(gzip.compress(header.binaryblock + b"\0" * (1 << 20)))
    assert [f.kind for f in analyze_case((path,), None, None).findings] == ["unreadable"]


def test_several_gzip_members_are_one_file(tmp_path: Path) -> None:
    image = save(tmp_path / "image.nii.gz", make_image(0))
    expected = analyze_case((image,), None, None)
    plain = gzip.decompress(image.read_bytes())
    image.write_bytes(gzip.compress(plain[:1000]) + gzip.compress(plain[1000:]) + b"\0" * 100)
    again = analyze_case((image,), None, None)
    assert again.findings == ()
    assert again.intensity == expected.intensity


def test_a_flipped_bit_in_the_compressed_voxels_is_always_found(tmp_path: Path) -> None:
    image = save(tmp_path / "image.nii.gz", make_image(0))
    raw = image.read_bytes()
    assert zlib.decompressobj(31).decompress(raw)
    for at in range(400, len(raw) - 8, max(1, len(raw) // 40)):
        image.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        assert analyze_case((image,), None, None).is_faulty
