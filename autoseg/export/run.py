"""Runs exported models: `python -m autoseg.export.run --model a.onnx b.onnx --image scan.nii.gz --output out.nii.gz`.

Needs numpy and onnxruntime (for `.xml` files openvino) and nothing else, so it has readers and resampling of its own; a
copy of this one file is enough to segment. It does what `autoseg predict` does with the same models, but for cleaning,
the split into left and right, the locator and windows that stretch to a small image.

Images are NIfTI. Axes: C channels, then X, Y, Z in RAS+; rows lie along the image's longest axis. Windows,
probabilities and labels go through row by row, so that memory does not grow with an image's length times its classes.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, permutations, product
from pathlib import Path
from typing import Any, cast

import numpy as np

FORMAT = 2
"""Of the description that this program knows; 2 has axes of a data set's own."""
KEY = "autoseg"
LEAST_VOLUME, LARGEST_MM = 1e-9, 4000.0
"""Of a box of axes of length 1; of an image's longest edge. As `autoseg.data.grid` and `autoseg.inference.checks`."""
THICK, NEAR_DEGREES = 2.0, 60.0
"""When an image has slices, and how near they lie to the data set's: as `autoseg.data.frame`."""
SIGMA_SCALE = 0.125
"""Standard deviation of a window's Gaussian weights as a share of its edge. Source: nnU-Net."""

Network = Callable[[dict[str, np.ndarray]], np.ndarray]
Description = dict[str, Any]
Header = dict[str, Any]


class RunError(Exception):
    """What the user can repair."""


# -- models


def load_model(path: Path, threads: int = 0) -> tuple[Network, Description]:
    """An exported model and its description.

    Args:
        threads: 0: as the runtime chooses.

    Raises:
        RunError: It is none.
    """
    if not path.is_file():
        raise RunError(f"{path}: no such file. Expected a .onnx or .xml file of `autoseg export`.")
    load, package = (_openvino, "openvino") if path.suffix == ".xml" else (_onnx, "onnxruntime")
    try:
        network, text = load(path, threads)
    except ImportError as error:
        raise RunError(f"{path}: {package} cannot be imported ({error}). Run `pip install {package}`.") from None
    try:
        description = json.loads(text)
        known = isinstance(description, dict) and isinstance(description.get("format"), int)
    except ValueError:
        known = False
    if not known:
        raise RunError(f"{path}: has no description of autoseg's. Expected a file of `autoseg export`.")
    if description["format"] > FORMAT:
        raise RunError(
            f"{path}: made by autoseg {description.get('version')}, newer than this program. Take its run.py."
        )
    return network, description


def _onnx(path: Path, threads: int) -> tuple[Network, str]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=onnxruntime.get_available_providers())
    except Exception as error:  # noqa: BLE001 - onnxruntime's errors have no base of their own
        raise RunError(f"{path}: no model that onnxruntime can load ({str(error).splitlines()[0][:200]}).") from None
    text = session.get_modelmeta().custom_metadata_map.get(KEY, "")
    return lambda inputs: np.asarray(session.run(None, inputs)[0]), text


def import_openvino() -> Any:
    """OpenVINO, without the package by which it reports each import and conversion to its makers over the internet."""
    cast("dict[str, Any]", sys.modules).setdefault("openvino_telemetry", None)  # to Python: not installed
    import openvino

    return openvino


def _openvino(path: Path, threads: int) -> tuple[Network, str]:
    openvino = import_openvino()
    core = openvino.Core()
    # Its default is bfloat16 where the processor has it, which changes labels.
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    try:
        model = core.read_model(path)
    except RuntimeError as error:
        raise RunError(f"{path}: no model that OpenVINO can load ({str(error).splitlines()[0][:200]}).") from None
    text = str(model.get_rt_info([KEY]).astype(str)) if model.has_rt_info([KEY]) else ""
    compiled = core.compile_model(model, "CPU", settings)
    return lambda inputs: np.asarray(compiled(inputs)[0]), text


# -- NIfTI


def read_nifti(path: Path) -> tuple[np.ndarray, np.ndarray, Header]:
    """A file's voxels (I, J, K, C) float32 as stored, its affine (4, 4), and its header.

    Raises:
        RunError: It is no NIfTI-1 file, or damaged, or voxels are NaN or infinite.
    """
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError, zlib.error) as error:
        raise RunError(f"{path}: cannot be read ({error}).") from None
    if len(data) < 352 or data[344:347] != b"n+1":
        raise RunError(f"{path}: not NIfTI-1 with its voxels in the same file. Convert the image.")
    order = "<" if struct.unpack("<i", data[:4])[0] == 348 else ">"
    dim = struct.unpack(order + "8h", data[40:56])
    kinds = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
    code = struct.unpack(order + "h", data[70:72])[0]
    if code not in kinds or not 3 <= dim[0] <= 7 or any(n < 1 for n in dim[1 : dim[0] + 1]):
        raise RunError(f"{path}: voxels of type {code} in {dim[0]} dimensions are not read. Expected 3D numbers.")
    shape = (*dim[1:4], math.prod(dim[4 : dim[0] + 1]))
    offset, slope, inter = struct.unpack(order + "3f", data[108:120])
    dtype = np.dtype(order + kinds[code])
    if not 352 <= offset <= len(data):
        raise RunError(f"{path}: its voxels begin at byte {offset:g}, expected 352 or later. Export the image again.")
    if len(data) < int(offset) + math.prod(shape) * dtype.itemsize:
        raise RunError(f"{path}: cut off: fewer voxels than the header says.")
    voxels = np.frombuffer(data, dtype, math.prod(shape), int(offset)).reshape(shape, order="F").astype(np.float32)
    if slope and math.isfinite(slope) and (slope, inter) != (1, 0):  # 0 and NaN: voxels are as stored
        voxels = voxels * np.float32(slope) + np.float32(inter)
    if not np.isfinite(voxels).all():
        raise RunError(f"{path}: voxels are NaN or infinite. Replace them.")
    affine = _affine(data, order)
    if not _has_axes(affine):
        raise RunError(f"{path}: its affine has axes of no length, or in one plane. Export the image again.")
    return voxels, affine, {"bytes": data[:348], "order": order, "shape": shape[:3]}


def _affine(data: bytes, order: str) -> np.ndarray:
    """The sform, else the qform, else the voxel sizes. Source: the NIfTI-1 standard."""
    qform_code, sform_code = struct.unpack(order + "2h", data[252:256])
    affine = np.eye(4)
    if sform_code > 0:
        affine[:3] = np.array(struct.unpack(order + "12f", data[280:328])).reshape(3, 4)
        return affine
    pixdim = struct.unpack(order + "8f", data[76:108])
    if qform_code <= 0:
        affine[:3, :3] = np.diag(pixdim[1:4])
        affine[:3, 3] = -np.array(pixdim[1:4]) * (np.array(struct.unpack(order + "3h", data[42:48])) - 1) / 2
        return affine
    b, c, d, *origin = struct.unpack(order + "6f", data[256:280])
    a = math.sqrt(max(0.0, 1 - b * b - c * c - d * d))
    turn = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * b * c - 2 * a * d, 2 * b * d + 2 * a * c],
            [2 * b * c + 2 * a * d, a * a + c * c - b * b - d * d, 2 * c * d - 2 * a * b],
            [2 * b * d - 2 * a * c, 2 * c * d + 2 * a * b, a * a + d * d - c * c - b * b],
        ]
    )
    affine[:3, :3] = turn * np.array([*pixdim[1:3], pixdim[3] * (-1 if pixdim[0] < 0 else 1)])
    affine[:3, 3] = origin
    return affine


def _has_axes(affine: np.ndarray) -> bool:
    """Whether an affine is finite, and its axes span space."""
    if not np.isfinite(affine).all():
        return False
    edges = np.linalg.norm(affine[:3, :3], axis=0)
    return bool((edges > 0).all()) and bool(abs(np.linalg.det(affine[:3, :3] / edges)) >= LEAST_VOLUME)


def axes_to_ras(affine: np.ndarray) -> list[tuple[int, bool]]:
    """For each stored axis the axis of RAS that it is nearest to, and whether it runs the other way.

    Source: nibabel's `io_orientation`: the nearest rotation, then the clearest axis first.
    """
    linear = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    left, _, right = np.linalg.svd(linear)
    turn = left @ right
    axes: list[tuple[int, bool]] = [(0, False)] * 3
    for stored in np.argsort(np.min(-(turn**2), axis=0)):
        ras = int(np.argmax(np.abs(turn[:, stored])))
        axes[stored] = (ras, bool(turn[ras, stored] < 0))
        turn[ras] = 0
    return axes


def to_ras(stored: np.ndarray, axes: Sequence[tuple[int, bool]]) -> np.ndarray:
    """An array (I, J, K, ...) with its axes in the order and direction of RAS, or of those that `axes` leads to."""
    flipped = stored[tuple(slice(None, None, -1 if flip else 1) for _, flip in axes)]
    order = [next(i for i, (ras, _) in enumerate(axes) if ras == target) for target in range(3)]
    return np.moveaxis(flipped, order, (0, 1, 2))


def from_ras(array: np.ndarray, axes: Sequence[tuple[int, bool]]) -> np.ndarray:
    """The way back."""
    turned = np.moveaxis(array, [ras for ras, _ in axes], (0, 1, 2))
    return turned[tuple(slice(None, None, -1 if flip else 1) for _, flip in axes)]


def directions_of(affine: np.ndarray, axes: Sequence[tuple[int, bool]]) -> np.ndarray:
    """(3, 3): a column for each of X, Y, Z in RAS: a step of one voxel, in mm."""
    directions = np.empty((3, 3))
    for stored, (ras, flip) in enumerate(axes):
        directions[:, ras] = -affine[:3, stored] if flip else affine[:3, stored]
    return directions


def axes_to_frame(directions: np.ndarray, frame: dict[str, Any]) -> list[tuple[int, bool]]:
    """For each axis of an image in RAS that of a network with axes of its own, and whether it runs the other way.

    As `autoseg.data.frame.Frame.turn`: slices become slices; the other axes are those that agree best.
    """
    edges = np.linalg.norm(directions, axis=0)
    alike = np.array(frame["axes"]) @ (directions / edges)
    by_length, slices = np.argsort(-edges, kind="stable"), frame["slices"]
    across = int(by_length[0]) if edges[by_length[0]] > THICK * edges[by_length[1]] else None
    fixed = across is not None and abs(alike[slices, across]) >= math.cos(math.radians(NEAR_DEGREES))
    able = [order for order in permutations(range(3)) if not fixed or order[slices] == across]
    order = max(able, key=lambda order: sum(abs(alike[axis, order[axis]]) for axis in range(3)))
    return [(order.index(axis), bool(alike[order.index(axis), axis] < 0)) for axis in range(3)]


def write_nifti(path: Path, labels: np.ndarray, header: Header) -> None:
    """Write labels (I, J, K) on the grid of an image's file; all of the file or nothing.

    Raises:
        RunError: It cannot be written.
    """
    order = header["order"]
    raw = bytearray(header["bytes"])
    labels = np.asfortranarray(labels)
    struct.pack_into(order + "8h", raw, 40, 3, *labels.shape, 1, 1, 1, 1)
    code, bits = (2, 8) if labels.dtype == np.uint8 else (512, 16)
    struct.pack_into(order + "2h", raw, 70, code, bits)
    struct.pack_into(order + "3f", raw, 108, 352.0, 1.0, 0.0)
    struct.pack_into(order + "2f", raw, 124, 0.0, 0.0)  # what a viewer shows as black and white
    raw[344:348] = b"n+1\0"
    data = bytes(raw) + bytes(4) + labels.astype(labels.dtype.newbyteorder(order)).tobytes(order="F")
    part = path.with_name(f".part-{os.getpid()}-{path.name}")
    try:
        part.write_bytes(gzip.compress(data, 1, mtime=0) if path.name.endswith(".gz") else data)
        os.replace(part, path)
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror}). Give another --output.") from None
    finally:
        part.unlink(missing_ok=True)


# -- preprocessing


def nonzero_box(image: np.ndarray) -> tuple[slice, slice, slice]:
    """The smallest box with every voxel that is not 0 in some channel; the whole image where none is."""
    box = []
    inside = (image != 0).any(0)
    for axis in range(3):
        line = np.flatnonzero(inside.any(tuple(a for a in range(3) if a != axis)))
        box.append(slice(int(line[0]), int(line[-1]) + 1) if len(line) else slice(0, inside.shape[axis]))
    return box[0], box[1], box[2]


def statistics(image: np.ndarray, channels: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation (C,) float32 of each channel that is normalised by them; 0 and 1 of the others."""
    mean, std = np.zeros(len(channels), np.float32), np.ones(len(channels), np.float32)
    for place, (values, norm) in enumerate(zip(image, channels, strict=True)):
        if norm["mode"] not in ("none", "ct", "range"):
            inside = values[values != 0] if norm["nonzero"] else values
            if inside.size:
                mean[place], std[place] = inside.mean(dtype=np.float64), inside.std(dtype=np.float64)
    return mean, std


def normalized(image: np.ndarray, channels: Sequence[dict[str, Any]]) -> np.ndarray:
    """An image (C, X, Y, Z) as the network learned it."""
    mean, std = statistics(image, channels)
    out = np.empty_like(image)
    for place, (values, norm) in enumerate(zip(image, channels, strict=True)):
        mode = norm["mode"]
        if mode == "none":
            out[place] = values
        elif mode in ("ct", "range"):
            low, high = norm["bounds"]
            minus, over = (norm["mean"], norm["std"]) if mode == "ct" else (low, high - low)
            out[place] = (np.clip(values, low, high) - minus) / max(over, 1e-6)
        else:
            out[place] = (values - mean[place]) / max(float(std[place]), 1e-6)
            if norm["nonzero"]:
                out[place][values == 0] = 0
            if mode == "meanstdtanh":
                out[place] = 3 * np.tanh(out[place] / 3)
    return out


def levelled(image: np.ndarray, channels: Sequence[dict[str, Any]]) -> np.ndarray:
    """Intensities as stored that a graph normalises once resampled, such that it might as well have done so before.

    Training clips, and sets what is 0 to the mean, before it resamples; the rest is a factor and an offset, which an
    interpolation keeps. The tanh of meanstdtanh does not commute, and makes a small difference.
    """
    out, (mean, _) = image.copy(), statistics(image, channels)
    for place, norm in enumerate(channels):
        if norm["mode"] in ("ct", "range"):
            np.clip(out[place], *norm["bounds"], out=out[place])
        elif norm["mode"] != "none" and norm["nonzero"]:
            out[place][out[place] == 0] = mean[place]
    return out


def padding_of(image: np.ndarray, about: Description) -> np.ndarray:
    """What windows are padded with (C,): 0 once normalised."""
    if not about["whole"]:
        return np.zeros(len(image), np.float32)
    values, (mean, _) = [], statistics(image, about["channels"])
    for place, norm in enumerate(about["channels"]):
        own = {"ct": norm["mean"], "range": norm["bounds"][0] if norm["bounds"] else 0.0, "none": 0.0}
        values.append(own.get(norm["mode"], 0.0 if norm["nonzero"] else mean[place]))
    return np.array(values, np.float32)


def between(size: int, new_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Between which of `size` rows each of `new_size` lies, and the share of the upper one: centres map to centres."""
    at = np.clip((np.arange(new_size) + 0.5) * (size / new_size) - 0.5, 0, None)
    below = np.minimum(np.floor(at).astype(np.int64), size - 1)
    return below, np.minimum(below + 1, size - 1), (at - below).astype(np.float32)


def resampled(array: np.ndarray, axis: int, new_size: int) -> np.ndarray:
    """An array with another number of rows along an axis, interpolated linearly over the same field of view."""
    if array.shape[axis] == new_size:
        return array
    below, above, share = between(array.shape[axis], new_size)
    share = share.reshape([-1 if a == axis else 1 for a in range(array.ndim)])
    lower = np.take(array, below, axis)
    return lower + (np.take(array, above, axis) - lower) * share


# -- windows


def window_starts(size: int, window: int, overlap: float) -> list[int]:
    """Where windows start: as few as keep the overlap, evenly spread. Source: nnU-Net."""
    step = max(1, int(window * (1 - overlap)))
    count = math.ceil((size - window) / step) + 1
    return [round(i * (size - window) / max(1, count - 1)) for i in range(count)]


def window_weights(size: int, window: int, overlap: float) -> list[np.ndarray]:
    """Gaussian weights (window,) of each window; over every voxel they sum to one."""
    bell = np.exp(-0.5 * ((np.arange(window) - (window - 1) / 2) / (window * SIGMA_SCALE)) ** 2)
    starts, total = window_starts(size, window, overlap), np.zeros(size)
    for start in starts:
        total[start : start + window] += bell
    return [(bell / total[start : start + window]).astype(np.float32) for start in starts]


class Timed:
    """A network, when it was first asked, and how long it took in all."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self.began, self.seconds = math.inf, 0.0

    def __call__(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Its logits."""
        begin = time.perf_counter()
        self.began = min(self.began, begin)
        logits = self._network(inputs)
        self.seconds += time.perf_counter() - begin
        return logits


class Group:
    """Models whose logits are averaged, on one image: probabilities of the image's rows, in order."""

    def __init__(self, networks: Sequence[Network], about: Description, image: np.ndarray, mm: np.ndarray) -> None:
        """Prepare the image.

        Args:
            networks: of one group.
            about: their description; that of any of them.
            image: (C, X, Y, Z) float32 in the networks' axes, as stored.
            mm: its voxel sizes.
        """
        if len(image) != len(about["channels"]):
            raise RunError(
                f"the image has {len(image)} channels, the models were trained with {len(about['channels'])}."
            )
        self.networks, self.about, self.shape = networks, about, image.shape[1:]
        whole: tuple[slice, ...] = tuple(slice(0, size) for size in self.shape)
        self.box = nonzero_box(image) if about["crop_foreground"] else whole
        image = image[(slice(None), *self.box)]
        self.inputs: dict[str, np.ndarray] = {}
        if about["whole"] and any(norm["mode"] not in ("none", "ct", "range") for norm in about["channels"]):
            self.inputs = dict(zip(("mean", "std"), statistics(image, about["channels"]), strict=True))
        self.padding = padding_of(image, about)
        image = (levelled if about["whole"] else normalized)(image, about["channels"])
        for axis in range(3):
            new_size = max(1, round(image.shape[axis + 1] * mm[axis] / about["spacing_mm"][axis]))
            image = resampled(image, axis + 1, new_size)
        self.prepared = image
        self.axis = int(np.argmax(self.shape))

    def rows(self) -> Iterator[np.ndarray]:
        """Probabilities (K, H, W) of each row of the image; H and W are its other two axes."""
        axis, box = self.axis, self.box[self.axis]
        plane = [a for a in range(3) if a != axis]
        background = np.zeros((self.num_outputs, *(self.shape[a] for a in plane)), np.float32)
        background[: 0 if self.about["sigmoid"] else 1] = 1
        for _ in range(box.start):
            yield background
        below, above, share = between(self.prepared.shape[axis + 1], box.stop - box.start)
        held: dict[int, np.ndarray] = {}
        source = enumerate(self._network_rows())
        for low, high, part in zip(below, above, share, strict=True):
            while high not in held:
                place, row = next(source)
                held[place] = self._on_plane(row, background, plane)
            for place in [place for place in held if place < low]:
                del held[place]
            yield held[low] + (held[high] - held[low]) * part
        for _ in range(box.stop, self.shape[axis]):
            yield background

    @property
    def num_outputs(self) -> int:
        """K."""
        return len(self.about["classes"]) + (0 if self.about["sigmoid"] else 1)

    def _on_plane(self, row: np.ndarray, background: np.ndarray, plane: Sequence[int]) -> np.ndarray:
        """A row of the network's grid (K, h, w) on the image's plane (K, H, W)."""
        inner = [self.box[a] for a in plane]
        for place, part in enumerate(inner):
            row = resampled(row, place + 1, part.stop - part.start)
        if row.shape == background.shape:
            return row
        result = background.copy()
        result[(slice(None), *inner)] = row
        return result

    def _network_rows(self) -> Iterator[np.ndarray]:
        """Probabilities (K, h, w) of each row of the network's grid, as soon as no further window changes it."""
        axis, window, overlap = self.axis, self.about["window"], self.about["overlap"]
        image, before = self._padded()
        sizes = image.shape[1:]
        starts = [window_starts(size, edge, overlap) for size, edge in zip(sizes, window, strict=True)]
        weights = [window_weights(size, edge, overlap) for size, edge in zip(sizes, window, strict=True)]
        plane = [a for a in range(3) if a != axis]
        buffer = np.zeros((self.num_outputs, *(window[a] if a == axis else sizes[a] for a in range(3))), np.float32)
        first, last = before[axis], before[axis] + self.prepared.shape[axis + 1]
        cut = [slice(before[a], before[a] + self.prepared.shape[a + 1]) for a in plane]
        for place, start in enumerate(starts[axis]):
            for others in product(*(range(len(starts[a])) for a in plane)):
                chosen = {axis: place, **dict(zip(plane, others, strict=True))}
                corner = [starts[a][chosen[a]] for a in range(3)]
                region = tuple(slice(c, c + edge) for c, edge in zip(corner, window, strict=True))
                x, y, z = (weights[a][chosen[a]] for a in range(3))
                logits = self._logits(image[(slice(None), *region)]) * (x[:, None, None] * y[:, None] * z)
                inside = [slice(0, window[axis]) if a == axis else region[a] for a in range(3)]
                buffer[(slice(None), *inside)] += logits
            stop = starts[axis][place + 1] if place + 1 < len(starts[axis]) else start + window[axis]
            for row in range(start, stop):
                if first <= row < last:
                    taken = np.take(buffer, row - start, axis + 1)
                    yield self._probabilities(taken[(slice(None), *cut)])
            buffer = np.moveaxis(buffer, axis + 1, 0)
            kept = buffer[stop - start :].copy()
            buffer[: len(kept)], buffer[len(kept) :] = kept, 0
            buffer = np.moveaxis(buffer, 0, axis + 1)

    def _padded(self) -> tuple[np.ndarray, list[int]]:
        """The prepared image, padded on both sides to a window where it is smaller, and what was put before it."""
        lacking = [
            max(0, edge - size) for edge, size in zip(self.about["window"], self.prepared.shape[1:], strict=True)
        ]
        before = [missing // 2 for missing in lacking]
        if not any(lacking):
            return self.prepared, before
        pads = [(b, missing - b) for b, missing in zip(before, lacking, strict=True)]
        channels = zip(self.prepared, self.padding, strict=True)
        return np.stack([np.pad(channel, pads, constant_values=value) for channel, value in channels]), before

    def _logits(self, window: np.ndarray) -> np.ndarray:
        """The mean of the models' logits (K, x, y, z) for a window, mirrored as they were planned."""
        axes = self.about["mirror_axes"]
        flips = [flip for count in range(len(axes) + 1) for flip in combinations(axes, count)]
        order = list(range(self.num_outputs))
        for a, b in self.about["mirrored_pairs"]:
            order[a], order[b] = b, a
        total = 0.0
        for flip in flips:
            dims = tuple(axis + 1 for axis in flip)
            batch = np.ascontiguousarray(np.flip(window, dims)[None])
            for network in self.networks:
                logits = np.flip(network({"image": batch, **self.inputs})[0], dims)
                total = total + (logits[order] if 0 in flip else logits)
        return np.asarray(total / (len(flips) * len(self.networks)))

    def _probabilities(self, logits: np.ndarray) -> np.ndarray:
        if self.about["sigmoid"]:
            return np.asarray(1 / (1 + np.exp(-logits)))
        powers = np.exp(logits - logits.max(0))
        return np.asarray(powers / powers.sum(0))


def segment(models: Sequence[tuple[Network, Description]], image: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Label values (X, Y, Z) of an image, by the mean of the models.

    Args:
        models: as `load_model` gives them.
        image: (C, X, Y, Z) float32 in RAS, as stored.
        directions: as `directions_of` gives them.

    Raises:
        RunError: The models do not belong together, or the image has other channels.
    """
    frame = models[0][1].get("frame")
    if any(about.get("frame") != frame for _, about in models):
        raise RunError("the models work in different axes. Give models of one run.")
    if frame is None:
        return _segment(models, image, np.linalg.norm(directions, axis=0))
    axes = axes_to_frame(directions, frame)
    turned = np.ascontiguousarray(np.moveaxis(to_ras(np.moveaxis(image, 0, 3), axes), 3, 0))
    sizes = np.empty(3)
    for axis, (target, _) in enumerate(axes):
        sizes[target] = np.linalg.norm(directions[:, axis])
    return from_ras(_segment(models, turned, sizes), axes)


def _segment(models: Sequence[tuple[Network, Description]], image: np.ndarray, mm: np.ndarray) -> np.ndarray:
    """The same in the networks' axes, of voxels of these edges."""
    about = models[0][1]
    by_group: dict[str, list[tuple[Network, Description]]] = {}
    for network, other in models:
        if other["classes"] != about["classes"] or other["sigmoid"] != about["sigmoid"]:
            raise RunError(f"{about['name']} and {other['name']} were trained for different classes.")
        by_group.setdefault(f"{other['group']}{other['whole']}", []).append((network, other))
    groups = [Group([n for n, _ in members], members[0][1], image, mm) for members in by_group.values()]
    counts = [len(members) for members in by_group.values()]
    rows = []
    for parts in zip(*(group.rows() for group in groups), strict=True):
        probabilities = sum(part * count for part, count in zip(parts, counts, strict=True)) / sum(counts)
        rows.append(_painted(np.asarray(probabilities), about))
    return np.stack(rows, groups[0].axis)


def _painted(probabilities: np.ndarray, about: Description) -> np.ndarray:
    """Label values (H, W) of probabilities (K, H, W); of regions that overlap the smallest one's is on top."""
    values = [c["written_as"] for c in about["classes"]]
    dtype = np.uint8 if max(v for c in about["classes"] for v in c["values"]) < 256 else np.uint16
    if not about["sigmoid"]:
        return np.array([0, *values], dtype)[probabilities.argmax(0)]
    labels = np.zeros(probabilities.shape[1:], dtype)
    for place in about["paint_order"]:
        labels[probabilities[place] > 0.5] = values[place]
    for regions, value in about["overlaps"]:
        exactly = np.ones(labels.shape, bool)
        for place in range(len(values)):
            exactly &= (probabilities[place] > 0.5) == (place in regions)
        labels[exactly] = value
    return labels


def main(words: Sequence[str] | None = None) -> int:
    """Segment one image; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m autoseg.export.run", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", nargs="+", type=Path, required=True, help="one or more .onnx or .xml files")
    parser.add_argument("--image", nargs="+", type=Path, required=True, help="NIfTI; a file for each channel")
    parser.add_argument("--output", type=Path, required=True, help="the label file, .nii or .nii.gz")
    parser.add_argument("--threads", type=int, default=0, help="of the runtime; 0: as it chooses")
    parser.add_argument("--timing", action="store_true", help="print the seconds of each phase as JSON")
    options = parser.parse_args(words)
    try:
        times = run(options.model, options.image, options.output, options.threads)
    except RunError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    if options.timing:
        sys.stdout.write(json.dumps(times) + "\n")
    return 0


def _check_output(output: Path) -> None:
    """Make sure that labels can be written, before time is spent on them; makes their folder."""
    if not output.name.endswith((".nii", ".nii.gz")):
        raise RunError(f"{output}: labels are written as .nii.gz or .nii. Give such a name.")
    if output.is_dir():
        raise RunError(f"{output}: is a folder. Give the name of a file.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{output.parent}: cannot be made ({error.strerror}). Give another --output.") from None


def run(models: Sequence[Path], images: Sequence[Path], output: Path, threads: int = 0) -> dict[str, float]:
    """Segment an image from its files to a label file; returns the seconds of each phase."""
    _check_output(output)
    if threads < 0:
        raise RunError(f"--threads: found {threads}, expected 0 (as the runtime chooses) or more.")
    clock = [time.perf_counter()]
    loaded = [(Timed(network), about) for network, about in (load_model(path, threads) for path in models)]
    clock.append(time.perf_counter())
    files = [read_nifti(path) for path in images]
    _, affine, header = files[0]
    for path, (_, other, own) in zip(images, files, strict=True):
        if own["shape"] != header["shape"] or not np.allclose(other, affine, atol=1e-3):
            raise RunError(f"{path}: not on the grid of {images[0].name}.")
    extent_mm = float(np.max(np.linalg.norm(affine[:3, :3], axis=0) * header["shape"]))
    if extent_mm > LARGEST_MM:
        raise RunError(f"{images[0]}: {extent_mm / 1000:.4g} m long. Correct the spacing in its header; it is in mm.")
    axes = axes_to_ras(affine)
    stored = np.concatenate([voxels for voxels, _, _ in files], 3)
    image = np.ascontiguousarray(np.moveaxis(to_ras(stored, axes), 3, 0))
    clock.append(time.perf_counter())
    labels = segment(loaded, image, directions_of(affine, axes))
    clock.append(time.perf_counter())
    write_nifti(output, from_ras(labels, axes), header)
    clock.append(time.perf_counter())
    networks = [network for network, _ in loaded]
    began, infer_s = min(network.began for network in networks), sum(network.seconds for network in networks)
    seconds = {"load_models": clock[1] - clock[0], "load": clock[2] - clock[1], "pre": began - clock[2]}
    seconds |= {"infer": infer_s, "post": clock[3] - began - infer_s, "write": clock[4] - clock[3]}
    return {phase: round(value, 4) for phase, value in seconds.items()}


if __name__ == "__main__":
    raise SystemExit(main())
