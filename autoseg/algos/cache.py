"""Preprocessed cases, each made once and shared by all jobs with the same preprocessing.

    cache/<preprocessing>/<case>-<content>/image.npy     (C, X, Y, Z) float16
                                           target.npy    (1 or K, X, Y, Z) uint8
                                           points.npy    (N, 4) int32: class, x, y, z

Arrays are plain .npy, so patches are cut from memory-mapped files; what fits into half of the free memory is
kept there instead.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from autoseg.algos.hardware import available_memory_bytes
from autoseg.algos.plan import Plan
from autoseg.claims import Busy, Claim
from autoseg.data.datalist import Case, files_digest
from autoseg.data.preprocess import prepare_image, prepare_label
from autoseg.data.volumes import read_image, read_label
from autoseg.errors import DataError
from autoseg.workspace import digest, write_atomic

log = logging.getLogger(__name__)

POINTS_PER_CLASS = 10_000
"""Voxel positions kept of each class. Source: nnU-Net."""
CACHE_VERSION = 1
"""Raised whenever what is stored changes."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CachedCase:
    """One preprocessed case; arrays are in memory or memory-mapped."""

    name: str
    image: np.ndarray
    """(C, X, Y, Z) float16."""
    target: np.ndarray
    """(1 or K, X, Y, Z) uint8, 255 where ignored."""
    points: np.ndarray
    """(N, 4) int32: class from 0, x, y, z; sorted by class."""
    annotated: tuple[str, ...] | None = None
    """Classes the case was annotated for; None: all."""


def _folder(root: Path, plan: Plan, case: Case) -> Path:
    label_map = plan.label_map
    how = digest(
        [CACHE_VERSION, asdict(plan.preprocessing), label_map.values, label_map.sigmoid, label_map.ignore_label]
    )
    return root / how / f"{case.name}-{files_digest(case)[:8]}"


def _points(target: np.ndarray, num_classes: int, *, sigmoid: bool) -> np.ndarray:
    """Up to `POINTS_PER_CLASS` voxels of each class, spread evenly over it."""
    found = []
    for c in range(num_classes):
        mask = target[c] == 1 if sigmoid else target[0] == c + 1
        flat = np.flatnonzero(mask)
        if flat.size > POINTS_PER_CLASS:
            flat = flat[np.linspace(0, flat.size - 1, POINTS_PER_CLASS).astype(np.int64)]
        xyz = np.stack(np.unravel_index(flat, mask.shape), axis=1)
        found.append(np.hstack([np.full((len(xyz), 1), c), xyz]).astype(np.int32))
    return np.concatenate(found)


def _make(folder: Path, plan: Plan, case: Case) -> None:
    assert case.label is not None
    label_map = plan.label_map
    image, label = read_image(case.images), read_label(case.label)
    if found := label.grid.differs_from(image.grid):
        raise DataError(f"{case.name}: label and image lie on different grids ({found}). Export the label again.")
    prepared = prepare_image(image, plan.preprocessing)
    target = prepare_label(label_map.encode(label.array[0]), prepared).numpy()
    # A value that float16 cannot hold would become infinite; no normalisation gets near.
    half = prepared.image.numpy().clip(-60000, 60000).astype(np.float16)
    points = _points(target, len(label_map.names), sigmoid=label_map.sigmoid)
    # points.npy comes last: a case that has it is whole.
    for name, array in (("image", half), ("target", target), ("points", points)):
        write_atomic(folder / f"{name}.npy", lambda file, array=array: np.save(file, array))  # type: ignore[misc]


def load_cases(root: Path, plan: Plan, cases: Sequence[Case], *, num_workers: int) -> list[CachedCase]:
    """Preprocess the cases that are not in the cache yet, and open them all.

    Args:
        root: the cache's folder.
        num_workers: threads for reading and preprocessing.

    Raises:
        DataError: Files that cannot be used, all of them in one error.
    """
    folders = [_folder(root, plan, case) for case in cases]
    missing = [(f, c) for f, c in zip(folders, cases, strict=True) if not (f / "points.npy").exists()]
    if missing:
        log.info("preprocessing %d of %d cases into the cache", len(missing), len(cases))
    faults: list[str] = []

    def make(item: tuple[Path, Case], *, wait: bool) -> bool:
        """Preprocess a case; False where another job is about it."""
        folder, case = item
        try:
            with Claim(folder / ".claims", case.name, wait=wait, poll_s=0.2):
                if not (folder / "points.npy").exists():
                    _make(folder, plan, case)
        except Busy:
            return False
        except DataError as error:
            faults.extend(error.messages)
        return True

    # Jobs that start together share the work: each takes what no other has begun, and waits for the rest at the end.
    random.shuffle(missing)
    with ThreadPoolExecutor(num_workers) as pool:
        made = list(pool.map(partial(make, wait=False), missing))
        busy = [item for item, is_made in zip(missing, made, strict=True) if not is_made]
        list(pool.map(partial(make, wait=True), busy))
    if faults:
        raise DataError(sorted(faults))
    size = sum(path.stat().st_size for f in folders for path in f.glob("*.npy"))
    in_memory = size < 0.5 * available_memory_bytes()
    log.info("%d cases, %.1f MiB, %s", len(cases), size / 2**20, "in memory" if in_memory else "memory-mapped")
    mode: Literal["r"] | None = None if in_memory else "r"
    opened = []
    for folder, case in zip(folders, cases, strict=True):
        arrays = {
            n: np.load(folder / f"{n}.npy", mmap_mode=mode, allow_pickle=False) for n in ("image", "target", "points")
        }
        opened.append(CachedCase(name=case.name, annotated=case.annotated, **arrays))
    return opened
