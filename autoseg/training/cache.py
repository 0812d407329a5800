"""Preprocessed cases, each made once and shared by all jobs with the same preprocessing.

    cache/<preparation>/<content of the case>/image.npy     (C, X, Y, Z) float16
                                              target.npy    (1 or K, X, Y, Z) uint8
                                              points.npy    (N, 4) int32: class, x, y, z
                                              lost.npy      (L,) int32: classes of the label that the target lacks
                                              weight.npy    (1, X, Y, Z) uint8, where pseudo-labels are soft

Arrays are plain .npy, so patches are cut from memory-mapped files. With `cache: ram` as many cases as fit into half of
the free memory (the container's limit counts) are kept there instead, as the FLARE23 paper does; with `cache: disk`
none; with `cache: off`, and where the disk is full, a case is prepared anew whenever a patch is cut from it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import random
import shutil
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from autoseg.data.datalists.cases import Case, case_digest, read_case_label
from autoseg.data.fingerprint import Fingerprint
from autoseg.data.formats.table import read_grid
from autoseg.data.grid import Grid, in_mm
from autoseg.data.labels import UNSURE, LabelMap
from autoseg.data.preprocess import Region, prepare_image, prepare_label
from autoseg.data.resampling import resampled_shape
from autoseg.data.volumes import read_image, read_label
from autoseg.errors import AutosegError, DataError, counted
from autoseg.hardware.limits import available_memory_bytes, jobs_at_once, workers_for
from autoseg.plan import Plan
from autoseg.workspace.claims import Busy, Claim
from autoseg.workspace.files import digest, is_digest, write_atomic
from autoseg.workspace.workspace import Workspace

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

POINTS_PER_CLASS = 10_000
"""Voxel positions kept of each class. Source: nnU-Net."""
CACHE_VERSION = 4
"""Raised whenever what is stored changes."""
MEMORY_SHARE, DISK_SHARE = 0.5, 0.9
"""Share of the free memory, and of the free disk, that cases may take."""
PREPARING_BYTES = 14
"""Memory that preparing a case takes a voxel and channel, of the image or of what is made of it, whichever is larger.
Source: measured, 3 GB for 512x512x800."""
FRESH_KEPT = 2
"""Cases prepared anew that are kept: image and target of one are read one after the other."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CachedCase:
    """One preprocessed case; arrays are in memory, memory-mapped, or prepared anew where read (`FreshArray`)."""

    name: str
    image: np.ndarray
    """(C, X, Y, Z) float16."""
    target: np.ndarray = field(default_factory=lambda: np.zeros((1, 0, 0, 0), np.uint8))
    """(1 or K, X, Y, Z) uint8, 255 where ignored; empty of a case without a label."""
    points: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), np.int32))
    """(N, 4) int32: class from 0, x, y, z; sorted by class."""
    lost: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    """(L,) int32: classes from 0 that its label has, and of which no voxel is left in the target."""
    annotated: tuple[str, ...] | None = None
    """Classes the case was annotated for; None: all."""
    weight: np.ndarray | None = None
    """(1, X, Y, Z) uint8: what each voxel counts in the loss, in percent; None: all alike."""
    by_annotators: tuple[str, ...] | None = None
    """Classes that its annotators drew, where models filled in the others; None: nothing is filled in."""


def preparation_digest(plan: Plan) -> str:
    """A digest of how a plan prepares cases; plans of one share the cache."""
    label_map = plan.label_map
    return digest(
        [CACHE_VERSION, asdict(plan.preprocessing), label_map.values, label_map.sigmoid, label_map.ignore_label]
    )


def _folder(root: Path, plan: Plan, case: Case) -> Path:
    """Where a case lies: by what it holds, so that a copied or renamed one is found again."""
    return root / preparation_digest(plan) / case_digest(case)


def remove_unused(root: Path, plans: Iterable[Plan], cases: Iterable[Case]) -> int:
    """Remove what lies in the cache for cases and preparations that a run has no longer.

    A job that works at the same time has its arrays open, which the system keeps until it closes them, and finds what
    it is to open: its cases and its plan are among those of the run.

    Args:
        root: the cache's folder.
        plans: of all jobs of the run, in all its rounds and sweeps.
        cases: all that they learn from or are scored on.

    Returns:
        How many entries were removed.
    """
    preparations = {preparation_digest(plan) for plan in plans}
    used = {case_digest(case) for case in cases}
    entries = [entry for entry in root.glob("*/*") if is_digest(entry.parent.name) and is_digest(entry.name)]
    unused = [entry for entry in entries if entry.parent.name not in preparations or entry.name not in used]
    for entry in unused:
        shutil.rmtree(entry, ignore_errors=True)  # another job may be removing it, too
    for folder in root.glob("*"):
        with contextlib.suppress(OSError):  # not empty
            folder.rmdir()
    return len(unused)


def _points(target: np.ndarray, num_classes: int, *, sigmoid: bool) -> np.ndarray:
    """Up to `POINTS_PER_CLASS` voxels of each class, spread evenly over it."""
    points = []
    for c in range(num_classes):
        mask = target[c] == 1 if sigmoid else target[0] == c + 1
        flat = np.flatnonzero(mask)
        if flat.size > POINTS_PER_CLASS:
            flat = flat[np.linspace(0, flat.size - 1, POINTS_PER_CLASS).astype(np.int64)]
        xyz = np.stack(np.unravel_index(flat, mask.shape), axis=1)
        points.append(np.hstack([np.full((len(xyz), 1), c), xyz]).astype(np.int32))
    return np.concatenate(points)


def _prepare(plan: Plan, case: Case) -> dict[str, np.ndarray]:
    """Read and preprocess a case: image, target, lost, points and any weight, as `CachedCase` has them.

    Of one without a label, as pretraining takes it, the image alone, and no points.
    """
    label_map = plan.label_map
    image = read_image(case.images)
    if (num_channels := len(image.array)) != len(plan.channels):
        raise DataError(
            f"{case.name}: {num_channels} channels, but the plan's `channels` has {len(plan.channels)}. "
            "Undo the edit of the plan."
        )
    prepared = prepare_image(image, plan.preprocessing)
    if case.label is None:
        return {"image": _half(prepared.image), "points": np.zeros((0, 4), np.int32)}
    label = read_case_label(case)
    if differs := label.grid.differs_from(image.grid):
        raise DataError(f"{case.name}: label and image lie on different grids ({differs}). Export the label again.")
    encoded = label_map.encode(label.array[0])
    if plan.crop_foreground and (num_lost := _num_outside(encoded, prepared.box)):
        log.warning(
            "%s: %d labelled voxels lie outside the box around voxels other than 0, so it is not cropped. Predictions "
            "are background there; with crop_foreground: false they are not.",
            case.name,
            num_lost,
        )
        prepared = prepare_image(image, replace(plan.preprocessing, crop_foreground=False))
    target = prepare_label(encoded, prepared).numpy()
    arrays = {"image": _half(prepared.image), "target": target}
    if case.weight is not None:
        arrays["weight"] = prepare_label(read_label(case.weight).array.astype(np.uint8), prepared).numpy()
    points = _points(target, len(label_map.names), sigmoid=label_map.sigmoid)
    return {**arrays, "lost": _lost(label.array[0], points, label_map), "points": points}


def _half(image: torch.Tensor) -> np.ndarray:
    """A prepared image as float16; what that cannot hold would become infinite, and no normalisation gets near."""
    half: np.ndarray = image.numpy().clip(-60000, 60000).astype(np.float16)
    return half


def _num_outside(encoded: np.ndarray, box: Region) -> int:
    """Voxels outside a box that a target, (1 or K, X, Y, Z), gives a class."""
    has_class: np.ndarray = np.any((encoded > 0) & (encoded < UNSURE), axis=0)
    return int(has_class.sum()) - int(has_class[box].sum())


def _lost(label: np.ndarray, points: np.ndarray, label_map: LabelMap) -> np.ndarray:
    """Classes that a label file has, and of which resampling or cropping left no voxel."""
    gone = sorted(set(range(len(label_map.names))) - set(points[:, 0].tolist()))
    # Most cases have all classes, or lack few: the label is looked through for these alone.
    values = [value for c in gone for value in label_map.values[c]]
    there = set(np.unique(label[np.isin(label, values)]).tolist()) if values else set()
    return np.array([c for c in gone if there & set(label_map.values[c])], np.int32)


def resampling_warnings(cases: Sequence[CachedCase], plan: Plan) -> list[str]:
    """Say which classes are too small for the plan's voxels, so that cases cannot teach them; empty where none is."""
    names = plan.label_map.names
    having = Counter(c for case in cases for c in np.unique(case.points[:, 0]).tolist())
    without: dict[int, list[str]] = {}
    for case in cases:
        for c in case.lost.tolist():
            without.setdefault(c, []).append(case.name)
    spacing = in_mm(plan.resample_resolution)
    return [
        f"at {spacing} mm no voxel of {names[c]} is left in {len(lost)} of the {len(lost) + having[c]} cases that "
        f"have it ({', '.join(lost[:3])}{', ...' if len(lost) > 3 else ''}), so they cannot teach it. Set a finer "
        "resample_resolution."
        for c, lost in sorted(without.items())
    ]


def _make(folder: Path, plan: Plan, case: Case) -> None:
    # points.npy comes last: a case that has it is whole.
    for name, array in _prepare(plan, case).items():
        write_atomic(folder / f"{name}.npy", lambda file, array=array: np.save(file, array))  # type: ignore[misc]


class FreshArray:
    """An array of a case that is prepared anew when it is read; the last few cases are kept."""

    _kept: OrderedDict[Callable[[], dict[str, np.ndarray]], dict[str, np.ndarray]] = OrderedDict()
    _lock = threading.Lock()

    def __init__(self, make: Callable[[], dict[str, np.ndarray]], which: str, shape: tuple[int, ...]) -> None:
        """Give what makes the case's arrays, which of them this is, and its shape."""
        self._make, self._which, self.shape = make, which, shape

    def _array(self) -> np.ndarray:
        key = self._make
        with self._lock:
            if key not in self._kept:
                self._kept[key] = self._make()
                while len(self._kept) > FRESH_KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            return self._kept[key][self._which]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        return self._array()[index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self._array(), dtype=dtype, copy=copy)


def expected_bytes(plan: Plan, case: Case) -> int:
    """What a case takes in the cache as a whole, from its header alone; points come on top, mostly a hundredth."""
    voxels = math.prod(_resampled_shape(plan, read_grid(case.images[0])[0]))
    label = 0 if case.label is None else len(plan.classes) if plan.sigmoid else 1
    return voxels * (2 * len(plan.channels) + label + (case.weight is not None))


def preparing_bytes(plan: Plan, case: Case) -> int:
    """Memory that preparing a case takes at most, from its header alone."""
    grid = read_grid(case.images[0])[0]
    return PREPARING_BYTES * len(plan.channels) * max(math.prod(grid.shape), math.prod(_resampled_shape(plan, grid)))


def _resampled_shape(plan: Plan, grid: Grid) -> tuple[int, int, int]:
    """Of an image on a grid, at the plan's spacing."""
    ras, turn = grid.to_ras(), plan.preprocessing.turn_of(grid)
    return resampled_shape(ras.shape, ras.spacing_mm, turn.triple_back(plan.resample_resolution))


def _workers(plan: Plan, cases: Sequence[Case], wanted: int | None) -> int:
    """Threads that prepare cases at once, so that all of them may be at their largest case."""
    sizes = [0]
    for case in cases:
        with contextlib.suppress(DataError):  # told by whoever reads it
            sizes.append(preparing_bytes(plan, case))
    workers = workers_for(max(sizes), most=wanted)
    if wanted is not None and workers < wanted:
        log.info("preprocessing with %d threads instead of %d, since memory is short", workers, wanted)
    return min(workers, max(1, len(cases)))


def _stored_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.npy"))


def load_cases(root: Path, plan: Plan, cases: Sequence[Case], *, num_workers: int | None) -> list[CachedCase]:
    """Preprocess the cases that are not in the cache yet, and open them all.

    Args:
        root: the cache's folder.
        cases: those that come first are kept in memory first.
        num_workers: threads for reading and preprocessing; None: this process' share of the cores. Fewer where memory
            is short.

    Raises:
        DataError: Files that cannot be used, all of them in one error.
    """
    folders = [_folder(root, plan, case) for case in cases]
    missing = [(f, c) for f, c in zip(folders, cases, strict=True) if not _is_whole(f, c)]
    if damaged := [c.name for f, c in missing if (f / "points.npy").exists()]:
        log.warning("cache: damaged files of %s, made anew: %s", counted(len(damaged), "case"), ", ".join(damaged[:5]))
    faults: list[str] = []
    if plan.cache != "off" and missing:
        missing = _affordable(root, plan, missing, faults)
        if missing:
            log.info("preprocessing %s, once for all jobs of such a plan", counted(len(missing), "case"))
        _fill(missing, plan, num_workers, faults)
    fresh = [(f, c) for f, c in zip(folders, cases, strict=True) if plan.cache == "off" or not _is_whole(f, c)]
    by_folder = dict(zip((f for f, _ in fresh), _prepare_fresh(fresh, plan, num_workers, faults), strict=True))
    if faults:
        raise DataError(sorted(set(faults)))
    limit = 0.0
    if plan.cache == "ram":
        share = MEMORY_SHARE / jobs_at_once()
        limit = share * available_memory_bytes() if plan.cache_gib is None else plan.cache_gib * 2**30
    opened, num_in_memory, taken, total = [], 0, 0, 0
    for folder, case in zip(folders, cases, strict=True):
        if folder in by_folder:
            opened.append(by_folder[folder])
            continue
        size = _stored_bytes(folder)
        in_memory = taken + size <= limit
        arrays = {
            n: np.load(folder / f"{n}.npy", mmap_mode=None if in_memory else "r", allow_pickle=False)
            for n in _array_names(case)
        }
        opened.append(CachedCase(name=case.name, annotated=case.annotated, by_annotators=case.by_annotators, **arrays))
        total += size
        if in_memory:
            taken, num_in_memory = taken + size, num_in_memory + 1
    where = [f"{num_in_memory} in memory", f"{len(cases) - len(by_folder) - num_in_memory} memory-mapped"]
    where += [f"{len(by_folder)} prepared anew at each use"] if by_folder else []
    log.info("%s, %.1f MiB in the cache: %s", counted(len(cases), "case"), total / 2**20, ", ".join(where))
    return opened


def _array_names(case: Case) -> tuple[str, ...]:
    """What is stored of a case, in the order in which it is written."""
    if case.label is None:
        return ("image", "points")
    return ("image", "target", *(("weight",) if case.weight is not None else ()), "lost", "points")


def _is_whole(folder: Path, case: Case) -> bool:
    """Whether every array of a case is there in its full length, by the headers alone."""
    try:
        for name in reversed(_array_names(case)):
            np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):  # missing; cut off; empty
        return False
    return True


def _share_seen(root: Path, plan: Plan) -> float:
    """Share of an image that is left where it is cropped to its voxels other than 0: the median, as analysed.

    1 where images stay whole, or nobody has analysed them.
    """
    if not plan.crop_foreground:
        return 1.0
    try:
        return Fingerprint.read(Workspace(root.parent).datastats).nonzero_crop_ratio
    except AutosegError:
        return 1.0


def _affordable(root: Path, plan: Plan, missing: list[tuple[Path, Case]], faults: list[str]) -> list[tuple[Path, Case]]:
    """Say what the missing cases will take, and leave out those for which the limit or the disk has no room."""
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    limit = DISK_SHARE * free
    if plan.cache == "disk" and plan.cache_gib is not None:
        there = sum(_stored_bytes(path.parent) for path in root.glob("*/*/points.npy"))
        limit = min(limit, plan.cache_gib * 2**30 - there)
    sizes, seen = [], _share_seen(root, plan)
    for _, case in missing:
        try:
            sizes.append(int(seen * expected_bytes(plan, case)))
        except DataError as error:  # told by whoever reads it
            faults.extend(error.messages)
            sizes.append(0)
    log.info(
        "preprocessing %s: about %.2f GiB to write into %s, %.1f GiB free",
        counted(len(missing), "case"), sum(sizes) / 2**30, root.name, free / 2**30,
    )  # fmt: skip
    total, kept = 0, []
    for item, size in zip(missing, sizes, strict=True):
        if total + size <= limit:
            kept.append(item)
            total += size
    if len(kept) < len(missing):
        log.warning(
            "no room for %d of %d cases in the cache: they are prepared anew at each use, which is slow. Free some "
            "space in %s, or raise cache_gib.", len(missing) - len(kept), len(missing), root,
        )  # fmt: skip
    return kept


def _fill(missing: list[tuple[Path, Case]], plan: Plan, num_workers: int | None, faults: list[str]) -> None:
    """Write the missing cases; several jobs share the work."""

    def make(item: tuple[Path, Case], *, wait: bool) -> bool:
        """Preprocess a case; False where another job is working on it."""
        folder, case = item
        try:
            with Claim(folder / ".claims", case.name, wait=wait, poll_s=0.2):
                if not _is_whole(folder, case):
                    _make(folder, plan, case)
        except Busy:
            return False
        except DataError as error:
            faults.extend(error.messages)
        return True

    # Jobs that start together share the work: each takes what no other has begun, and waits for the rest at the end.
    missing = list(missing)
    random.shuffle(missing)
    with ThreadPoolExecutor(_workers(plan, [case for _, case in missing], num_workers)) as pool:
        filled = list(pool.map(partial(make, wait=False), missing))
        busy = [item for item, is_made in zip(missing, filled, strict=True) if not is_made]
        list(pool.map(partial(make, wait=True), busy))


def _prepare_fresh(
    items: Sequence[tuple[Path, Case]], plan: Plan, num_workers: int | None, faults: list[str]
) -> list[CachedCase]:
    """Cases whose arrays are prepared anew at each use; their points, which sampling needs of all, are found once."""

    def open_fresh(item: tuple[Path, Case]) -> CachedCase:
        case = item[1]

        def make() -> dict[str, np.ndarray]:
            return _prepare(plan, case)

        try:
            prepared = make()
        except DataError as error:
            faults.extend(error.messages)
            prepared = dict.fromkeys(("image", "target", "points", "lost"), np.zeros((1, 1, 1, 1)))
        known: dict[str, Any] = {"annotated": case.annotated, "by_annotators": case.by_annotators}
        known |= {name: prepared.pop(name) for name in ("points", "lost") if name in prepared}
        known |= {n: cast(np.ndarray, FreshArray(make, n, array.shape)) for n, array in prepared.items()}
        return CachedCase(name=case.name, **known)

    if items:
        log.info("looking through %s not kept", counted(len(items), "case"))
    with ThreadPoolExecutor(_workers(plan, [case for _, case in items], num_workers)) as pool:
        return list(pool.map(open_fresh, items))
