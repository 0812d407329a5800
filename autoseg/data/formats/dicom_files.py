"""DICOM files: what their headers say of their images, and their pixels. pydicom's, which is an extra.

Only the fields that are needed are read. A patient's name and number are among them where cases are compared by
patient, and become digests at once; whole headers are read by those who write labels in DICOM (`dicom_sources`).
Messages hold no text of pydicom, which may quote a field.
"""

from __future__ import annotations

import hashlib
import logging
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np

from autoseg.data.formats.format import word_digests
from autoseg.data.formats.stored import FileFaultError
from autoseg.hardware.packages import install_advice
from autoseg.workspace.digests import FileSignature, file_signature
from autoseg.workspace.files import open_regular

PREAMBLE_BYTES, MAGIC = 128, b"DICM"
NO_PREAMBLE = (b"\x08\0\x00\0", b"\x08\0\x05\0", b"\x08\0\x08\0", b"\x08\0\x16\0", b"\x02\0\0\0")
"""What a file begins with that was written without a preamble: a first field of group 8, or of group 2."""
START_BYTES = PREAMBLE_BYTES + len(MAGIC)
IMPLICIT, EXPLICIT = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1"
"""Transfer syntaxes whose pixels are plain and little-endian."""
PIXELS = b"\xe0\x7f\x10\0"
"""The tag of the pixels."""
LOCALIZER, MOSAIC = "LOCALIZER", "MOSAIC"
"""Words of a field ImageType: a scout, and Siemens' slices side by side in one image."""
SEGMENTATIONS = ("SEG", "RTSTRUCT")
"""Modalities that are labels of a scan."""
_TERMS = """
    ANN AR ASMT AU BDUS BI BMD CFM CR CT CTPROTOCOL DG DMS DOC DX ECG EEG EMG EOG EPS ES FID GM HC HD IO IOL IVOCT IVUS
    KER KO LEN LS M3D MG MR NM OAM OCT OP OPM OPT OPTBSV OPTENF OPV OSS OT PA PLAN POS PR PT PX REG RESP RF RG RTDOSE
    RTIMAGE RTINTENT RTPLAN RTRAD RTRECORD RTSEGANN RTSTRUCT RWV SEG SM SMR SR SRF STAIN TEXTUREMAP TG US VA XA
    XAPROTOCOL XC AS CD CF CP CS DD DF DM DS EC FA FS LP MA MS OPR ST VF
"""
MODALITIES = frozenset(_TERMS.split())
"""Defined terms, retired ones last. Source: DICOM PS3.3, C.7.3.1.1.1."""
NO_IMAGES = (*SEGMENTATIONS, "RTPLAN", "RTDOSE", "SR", "PR", "KO", "REG")
"""Modalities that are no scan."""
FIELDS = (
    *("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "Modality", "ImageType", "Rows", "Columns"),
    *("SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "PixelRepresentation", "NumberOfFrames"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "SpacingBetweenSlices"),
    *("RescaleSlope", "RescaleIntercept", "ModalityLUTSequence"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
)
MARKS = {
    "TemporalPositionIdentifier": "time point",
    "TemporalPositionIndex": "time point",
    "TriggerTime": "time point",
    "EchoTime": "echo time",
    "EffectiveEchoTime": "echo time",
    "DiffusionBValue": "b-value",
    "InversionTime": "inversion time",
    "FlipAngle": "flip angle",
    "AcquisitionNumber": "acquisition",
    "ImageType": "kind of image",
}
"""Fields that may differ between images of one place -> what that makes them."""
DAMAGES = (
    *(LookupError, AttributeError, TypeError, ValueError, ArithmeticError, RuntimeError, AssertionError, EOFError),
    *(struct.error, zlib.error),
)
"""Python's own errors that damaged files raise in pydicom and in decoders."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One slice: an image of a file, where it lies in LPS, and how its values become intensities."""

    path: Path
    index: int | None
    """Of the image in a file of several."""
    position: tuple[float, ...]
    """Of the first pixel's centre in mm; empty where the file does not say."""
    orientation: tuple[float, ...]
    """Direction of a row, then of a column."""
    spacing_mm: tuple[float, ...]
    """Between rows, then between columns."""
    thickness_mm: float
    slope: float
    inter: float
    marks: tuple[tuple[str, str], ...]
    """Values of MARKS."""
    segment: int | None = None
    """Number of the segment that it is a mask of, in a segmentation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DicomFile:
    """A file's header."""

    path: Path
    instance: str
    series: str
    """The instance's and the series' UIDs."""
    modality: str
    image_type: tuple[str, ...]
    rows: int
    columns: int
    photometric: str
    dtype: str
    """NumPy's name; empty where the pixels are no numbers of 8, 16 or 32 bits."""
    syntax: str
    """UID of the transfer syntax."""
    has_lut: bool
    pixels_at: int
    """Where the pixels begin, if they are as in memory: not compressed, little-endian; else 0."""
    frames: tuple[Frame, ...]
    """None for a file that is no scan, such as a report or a segmentation."""

    @property
    def is_multi(self) -> bool:
        """Whether the file holds several images."""
        return len(self.frames) > 1


def looks_like_dicom(start: bytes) -> bool:
    """Whether a file's first bytes are those of DICOM."""
    return start[PREAMBLE_BYTES:START_BYTES] == MAGIC or start[:4] in NO_PREAMBLE


def is_dicom(path: Path) -> bool:
    """Whether a file begins as DICOM does."""
    try:
        with open_regular(path) as file:
            return looks_like_dicom(file.read(START_BYTES))
    except OSError:
        return False


def need_pydicom() -> None:
    """Make sure that DICOM can be read.

    Raises:
        FileFaultError: pydicom is not installed; the message says how.
    """
    try:
        import pydicom  # noqa: F401
    except ImportError:
        finding = "DICOM, and pydicom is not installed"
        raise FileFaultError("unreadable", finding, install_advice("formats")) from None


_is_quiet: ContextVar[bool] = ContextVar("_is_quiet", default=False)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what pydicom says of odd fields to itself: it may quote them. Entered once for many files, it costs less."""
    from pydicom import config

    if _is_quiet.get():
        yield
        return
    token = _is_quiet.set(True)
    logger = logging.getLogger("pydicom")
    before, mode = logger.level, config.settings.reading_validation_mode
    logger.setLevel(logging.CRITICAL)
    config.settings.reading_validation_mode = config.IGNORE
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        _is_quiet.reset(token)
        logger.setLevel(before)
        config.settings.reading_validation_mode = mode


def damages() -> tuple[type[Exception], ...]:
    """What pydicom and the decoders below it raise on damaged files; pydicom's own are no errors of Python's."""
    from pydicom.errors import BytesLengthException, InvalidDicomError

    return (*DAMAGES, BytesLengthException, InvalidDicomError)


@contextmanager
def naming_damage(what: str) -> Iterator[None]:
    """Read with pydicom: say what is damaged, and nothing of what pydicom says.

    Raises:
        FileFaultError: It is.
    """
    try:
        with quiet():
            yield
    except damages() as error:
        raise FileFaultError("unreadable", f"{what} ({type(error).__name__})", "Copy or export it again.") from None


def read_dicom(path: Path) -> DicomFile:
    """Read a file's header.

    Raises:
        FileFaultError: It is damaged, or pydicom is not installed.
        OSError: It cannot be read.
    """
    need_pydicom()
    return _read_dicom(path, file_signature(path))


@lru_cache(maxsize=1 << 15)
def _read_dicom(path: Path, signature: FileSignature) -> DicomFile:
    """Read a header once, as long as the file stays as it is."""
    from pydicom import dcmread

    with naming_damage(f"a damaged DICOM header in {path.name}"), open_regular(path) as file:
        data = dcmread(file, stop_before_pixels=True, force=True, specific_tags=[*FIELDS, *MARKS])
        return _header_of(path, data, file)


def read_fields(path: Path, names: Sequence[str]) -> Any:
    """Read some fields of a file's header as pydicom has them, and no others.

    Raises:
        FileFaultError: It is damaged, or pydicom is not installed.
        OSError: It cannot be read.
    """
    need_pydicom()
    from pydicom import dcmread

    with naming_damage(f"a damaged DICOM header in {path.name}"), open_regular(path) as file:
        return dcmread(file, stop_before_pixels=True, force=True, specific_tags=list(names))


def _header_of(path: Path, data: Any, file: IO[bytes]) -> DicomFile:
    """What a header says, in plain values."""
    bits, is_signed = int(value_of(data, "BitsAllocated") or 0), int(value_of(data, "PixelRepresentation") or 0) == 1
    rows, columns = int(value_of(data, "Rows") or 0), int(value_of(data, "Columns") or 0)
    told = str(value_of(data, "Modality"))
    # In a damaged file the patient's name may stand where the modality is looked for, and messages quote it.
    modality = told if told in MODALITIES else "?"
    meta = getattr(data, "file_meta", None)
    syntax = str(meta.get("TransferSyntaxUID", "")) if meta is not None else ""
    frames = tuple(frames_of(path, data)) if value_of(data, "Rows") and modality not in NO_IMAGES else ()
    return DicomFile(
        path=path,
        instance=str(value_of(data, "SOPInstanceUID") or ""),
        series=str(value_of(data, "SeriesInstanceUID") or ""),
        modality=modality,
        image_type=tuple(str(word) for word in several(value_of(data, "ImageType"))),
        rows=rows,
        columns=columns,
        photometric=str(value_of(data, "PhotometricInterpretation") or ""),
        dtype=f"{'i' if is_signed else 'u'}{bits // 8}" if bits in (8, 16, 32) else "",
        syntax=syntax,
        pixels_at=_pixels_at(file, syntax, len(frames) * rows * columns * (bits // 8)) if frames else 0,
        has_lut=value_of(data, "ModalityLUTSequence") is not None,
        frames=frames,
    )


def _pixels_at(file: IO[bytes], syntax: str, num_bytes: int) -> int:
    """Where plain pixels begin; 0 where they are not plain, or not as many as they must be.

    Args:
        file: stands at the pixels' element, where pydicom stopped.
    """
    element = file.read(12)
    if syntax == EXPLICIT and element[:6] in (PIXELS + b"OW", PIXELS + b"OB"):
        size, begin = element[8:12], file.tell()
    elif syntax == IMPLICIT and element[:4] == PIXELS:
        size, begin = element[4:8], file.tell() - 4
    else:
        return 0
    return begin if int.from_bytes(size, "little") in (num_bytes, num_bytes + 1) else 0


def several(value: Any) -> list[Any]:
    """A field's values; none where it is empty, one where it holds one."""
    if value is None or value == "":
        return []
    return [value] if isinstance(value, str) or not hasattr(value, "__iter__") else list(value)


def numbers_of(value: Any) -> tuple[float, ...]:
    """A field's numbers."""
    return tuple(float(v) for v in several(value))


def frames_of(path: Path, data: Any) -> Iterator[Frame]:
    """The images of a file. An enhanced file's are described by groups, of all and of each; the first that has it."""
    per_frame = several(value_of(data, "PerFrameFunctionalGroupsSequence"))
    shared = (several(value_of(data, "SharedFunctionalGroupsSequence")) or [None])[0]
    count = int(value_of(data, "NumberOfFrames") or 1)
    if per_frame and len(per_frame) != count:
        raise ValueError("as many groups as frames")
    for number in range(count):
        groups = [per_frame[number]] if per_frame else []
        groups += [shared] if shared is not None else []
        parts = [data, *(item for group in groups for element in group for item in _items(element))]

        def field(name: str, parts: list[Any] = parts) -> Any:
            """Groups come before the file's own fields, which enhanced files leave empty."""
            tag = _tag(name)
            return next((part[tag].value for part in [*parts[1:], parts[0]] if tag in part), None)

        slope, inter = field("RescaleSlope"), field("RescaleIntercept")
        thickness = field("SpacingBetweenSlices") or field("SliceThickness")
        yield Frame(
            path=path,
            index=number if count > 1 else None,
            position=numbers_of(field("ImagePositionPatient")),
            orientation=numbers_of(field("ImageOrientationPatient")),
            spacing_mm=numbers_of(field("PixelSpacing")),
            thickness_mm=float(thickness) if thickness is not None else 0.0,
            slope=float(slope) if slope is not None else 1.0,
            inter=float(inter) if inter is not None else 0.0,
            marks=tuple((name, str(value)) for name in MARKS if (value := field(name)) is not None),
            segment=None if (segment := field("ReferencedSegmentNumber")) is None else int(segment),
        )


def value_of(data: Any, name: str) -> Any:
    """A field's value; None where it is not there. pydicom's `get` looks the name up each time."""
    tag = _tag(name)
    return data[tag].value if tag in data else None


@lru_cache(maxsize=64)
def _tag(name: str) -> Any:
    """The tag of a field."""
    from pydicom.datadict import tag_for_keyword
    from pydicom.tag import Tag

    number = tag_for_keyword(name)
    assert number is not None, f"{name} is no field of DICOM"
    return Tag(number)


def _items(element: Any) -> list[Any]:
    return list(element.value or ()) if element.VR == "SQ" else []


def patient_digests(path: Path) -> tuple[str, frozenset[str]]:
    """Digests of whom a file is of, to be compared; name and number themselves are let go at once.

    Returns:
        Of the number, empty where there is none; and of the words of name and number, as `word_digests` has them.

    Raises:
        FileFaultError: The file is damaged, or pydicom is not installed.
    """
    data = read_fields(path, ("PatientID", "IssuerOfPatientID", "PatientName"))
    with naming_damage(f"a damaged DICOM header in {path.name}"):
        texts = [str(value_of(data, n) or "").strip() for n in ("PatientID", "IssuerOfPatientID", "PatientName")]
    number, issuer, name = texts
    whole = hashlib.sha256(f"{issuer}\0{number}".encode()).hexdigest() if number else ""
    return whole, word_digests(f"{number} {name}")


def check_decoder(file: DicomFile) -> None:
    """Make sure that a file's pixels can be decoded.

    Raises:
        FileFaultError: No decoder of their compression is installed, or there is none at all.
    """
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.uid import UID

    try:
        with quiet():
            syntax = UID(file.syntax)
            if not syntax.is_compressed or syntax.is_deflated or get_decoder(syntax).is_available:
                return
    except (NotImplementedError, ValueError):
        remedy = "Convert it, e.g. with gdcmconv --raw."
        raise FileFaultError("unreadable", "pixels compressed in a way that is not read", remedy) from None
    finding = f"pixels compressed as {syntax.name}, for which no decoder is installed"
    raise FileFaultError("unreadable", finding, install_advice("formats"))


def read_pixels(path: Path, indices: list[int] | None) -> list[np.ndarray]:
    """The pixels of a file's images.

    Args:
        indices: of the images in a file of several; None: the file has one.

    Returns:
        (rows, columns) of each, as stored: the rescaling is not applied.

    Raises:
        FileFaultError: The pixels are damaged.
    """
    from pydicom.pixels.utils import iter_pixels

    file = read_dicom(path)
    if file.pixels_at and file.dtype:
        # Plain pixels are taken as they are: pydicom would read the header a second time, which takes longer.
        return [_plain_pixels(file, index) for index in indices or [0]]
    with naming_damage(f"damaged pixels in {path.name}"):
        return [np.asarray(array) for array in iter_pixels(path, raw=True, indices=indices)]


def _plain_pixels(file: DicomFile, index: int) -> np.ndarray:
    """(rows, columns) of one image of a file whose pixels are as in memory."""
    dtype, size = np.dtype(f"<{file.dtype}"), file.rows * file.columns
    array = np.fromfile(file.path, dtype, size, offset=file.pixels_at + index * size * dtype.itemsize)
    if array.size < size:
        finding = f"{file.path.name} ends after {array.size} of {size} pixels of an image"
        raise FileFaultError("unreadable", finding, "Copy or export it again.")
    return array.reshape(file.rows, file.columns)
