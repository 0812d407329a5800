"""Synthetic cases for `autoseg demo` and for tests: easy for a network, not for a threshold.

Each case is a "head": a grey body with a bright rim, in it some structures of known brightness, position and
size drawn at random, noise, and a smooth bias field. The rim is nearly as bright as the spheres, so brightness alone
does not tell them apart. Spacings differ between axes and cases; one case is stored flipped (LPS), one with
swapped axes and one oblique. Everything is a function of the seed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from autoseg.data.datalists.cases import Case, Datalist
from autoseg.data.datalists.datalist import write_datalist
from autoseg.data.datalists.folds import make_folds
from autoseg.data.formats.table import LABEL_SUFFIX
from autoseg.data.grid import Grid
from autoseg.data.volumes import write_volume
from autoseg.errors import ConfigError
from autoseg.workspace.files import write_text

BRIGHTNESS = {"sphere": 720.0, "box": 1100.0, "cylinder": 120.0}
"""Intensity of each kind of structure before noise and bias."""
BODY, RIM = 380.0, 520.0
NOISE = 30.0
"""Standard deviation of the noise."""
BASE_SPACING_MM = (1.0, 1.1, 1.4)


def ellipsoid(shape: Sequence[int], centre: Sequence[float], radii: Sequence[float]) -> np.ndarray:
    """Draw a solid ellipsoid.

    Args:
        shape: (X, Y, Z).
        centre: in voxels; 0 is the centre of the first voxel.
        radii: in voxels, > 0.

    Returns:
        Boolean, (X, Y, Z): voxels whose centre lies in or on it.
    """
    axes = [(np.arange(n) - c) / r for n, c, r in zip(shape, centre, radii, strict=True)]
    x, y, z = np.ix_(*axes)
    return x**2 + y**2 + z**2 <= 1.0


def ellipsoid_volume(radii: Sequence[float]) -> float:
    """Volume of an ellipsoid in the cube of the radii's unit."""
    return 4.0 / 3.0 * math.pi * math.prod(radii)


def make_phantoms(
    folder: Path,
    *,
    num_cases: int = 12,
    num_testing: int = 2,
    num_unlabeled: int = 0,
    shape: tuple[int, int, int] = (40, 36, 32),
    seed: int = 0,
    classes: Sequence[str] = ("sphere", "box"),
    num_channels: int = 1,
    num_fold: int | None = 3,
    annotated: Sequence[Sequence[str]] | None = None,
) -> Path:
    """Write a data set of phantoms: images/, labels/, datalist.json and input.yaml.

    Args:
        folder: where to; files of the same name are replaced.
        num_cases: training cases.
        num_testing: testing cases, with labels, so that predictions can be scored.
        num_unlabeled: cases without label.
        shape: voxels along the stored axes of the first case; the others differ by up to 2.
        classes: structures out of sphere, box, cylinder; label values 1, 2, ... in this order.
        num_channels: image files per case, with different contrast.
        num_fold: folds in the datalist; None: none, for the reader to make.
        annotated: class names of case 0, 1, ..., taken in turn: only those are labelled, and declared.

    Returns:
        The path of input.yaml.

    Raises:
        ConfigError: An unknown class, a shape below 24, or fewer cases than folds.
    """
    _check(classes, shape)
    folder = Path(os.path.abspath(folder))
    roles = ["training"] * num_cases + ["testing"] * num_testing + ["unlabeled"] * num_unlabeled
    cases: dict[str, list[Case]] = {"training": [], "testing": [], "unlabeled": []}
    for i, role in enumerate(roles):
        declared = tuple(annotated[i % len(annotated)]) if annotated and role == "training" else None
        rng = np.random.default_rng([seed, i])
        grid = _grid(i, shape, rng)
        channels, label = make_phantom(grid, rng, classes=classes, num_channels=num_channels)
        kept = [v for v, c in enumerate(classes, 1) if declared is None or c in declared]
        drawn = None if role == "unlabeled" else np.where(np.isin(label, kept), label, 0).astype(np.uint8)
        cases[role].append(_write_case(folder, i, grid, channels, drawn, declared))
    training = tuple(cases["training"])
    datalist = Datalist(
        training=training if num_fold is None else _with_folds(training, num_fold, seed),
        testing=tuple(cases["testing"]),
        unlabeled=tuple(cases["unlabeled"]),
        labels=dict(enumerate(classes, 1)),
        modality="MRI",
    )
    write_datalist(datalist, folder / "datalist.json", folder)
    lines = ["modality: MRI", "datalist: datalist.json", "dataroot: ."]
    lines += [f"class_names: [{', '.join(classes)}]"] + (["partial_labels: declared"] if annotated else [])
    write_text(folder / "input.yaml", "\n".join(lines) + "\n")
    return folder / "input.yaml"


def _with_folds(training: Sequence[Case], num_fold: int, seed: int) -> tuple[Case, ...]:
    # Not `deal_folds`, which sorts the names of annotated classes: some data sets would get other folds than before.
    strata = ["\n".join(c.annotated or ()) for c in training]
    names = [c.name for c in training]
    folds = make_folds(names, num_fold=num_fold, seed=seed, groups=[None] * len(training), strata=strata)
    return tuple(replace(c, fold=f) for c, f in zip(training, folds, strict=True))


def _check(classes: Sequence[str], shape: tuple[int, int, int]) -> None:
    """Refuse what cannot be drawn."""
    if not classes or min(shape) < 24 or any(c not in BRIGHTNESS for c in classes):
        raise ConfigError(
            f"phantoms: classes {', '.join(classes) or '(none)'} of shape {shape}. "
            f"Expected classes out of {', '.join(BRIGHTNESS)} and at least 24 voxels along each axis."
        )


def _write_case(
    folder: Path,
    number: int,
    grid: Grid,
    channels: Sequence[np.ndarray],
    label: np.ndarray | None,
    annotated: tuple[str, ...] | None,
) -> Case:
    """Write a case's files: an image for each channel and, where it has one, the label."""
    name = f"phantom_{number:03d}"
    endings = [""] if len(channels) == 1 else [f"_{c:04d}" for c in range(len(channels))]
    images = tuple(folder / "images" / f"{name}{ending}{LABEL_SUFFIX}" for ending in endings)
    for path, channel in zip(images, channels, strict=True):
        write_volume(path, channel, grid)
    path = folder / "labels" / f"{name}{LABEL_SUFFIX}"
    if label is not None:
        write_volume(path, label, grid)
    return Case(name=name, images=images, label=None if label is None else path, annotated=annotated)


def make_phantom(
    grid: Grid, rng: np.random.Generator, *, classes: Sequence[str] = ("sphere", "box"), num_channels: int = 1
) -> tuple[list[np.ndarray], np.ndarray]:
    """Draw one case.

    Args:
        grid: where its voxels lie, in any orientation.
        rng: of pose, size, noise and bias.

    Returns:
        Channels, each (X, Y, Z) int16 in RAS+, and the label, (X, Y, Z) uint8: 1, 2, ... as in `classes`.
    """
    ras = grid.to_ras()
    half_mm = np.array(ras.shape) * ras.spacing_mm / 2
    index = np.stack(np.meshgrid(*[np.arange(n) for n in ras.shape], indexing="ij"), axis=-1)
    # Millimetres from the middle along the voxel axes: an oblique grid then shows the same head, turned.
    at_mm = (index + 0.5) * ras.spacing_mm - half_mm  # (X, Y, Z, 3)
    scale = half_mm.min() / 20.0
    away = np.linalg.norm(at_mm / half_mm, axis=-1)
    clean = np.where(away < 0.93, np.where(away > 0.83, RIM, BODY), 20.0)
    label = np.zeros(ras.shape, np.uint8)
    turn = Rotation.random(random_state=rng)
    start = rng.uniform(0, 2 * math.pi)
    for i, kind in enumerate(classes):
        angle = start + 2 * math.pi * i / len(classes) + rng.uniform(-0.2, 0.2)
        centre = turn.apply([math.cos(angle), math.sin(angle), 0.0]) * rng.uniform(8.5, 10.0) * scale
        own = Rotation.random(random_state=rng).apply((at_mm - centre).reshape(-1, 3)).reshape(at_mm.shape)
        inside = _inside(kind, own / scale, rng) & (label == 0) & (away < 0.8)
        label[inside] = i + 1
        clean[inside] = BRIGHTNESS[kind]
    bias = np.exp(np.tensordot(at_mm / half_mm, rng.uniform(-0.12, 0.12, 3), axes=1))
    gain = rng.uniform(0.7, 1.4)
    channels = []
    for c in range(num_channels):
        contrast = clean if c % 2 == 0 else np.where(away < 0.93, 1100.0 - 0.8 * clean, clean)
        noisy = np.abs(contrast * bias + rng.normal(0, NOISE, ras.shape))
        channels.append(np.rint(noisy * gain).astype(np.int16))
    return channels, label


def _inside(kind: str, own_mm: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Voxels of a structure in its own coordinates, (X, Y, Z, 3) mm from its centre; its size is drawn."""
    x, y, z = own_mm[..., 0], own_mm[..., 1], own_mm[..., 2]
    if kind == "sphere":
        rx, ry, rz = rng.uniform(7.0, 9.0, 3)
        return (x / rx) ** 2 + (y / ry) ** 2 + (z / rz) ** 2 <= 1.0
    if kind == "box":
        a, b, c = rng.uniform(5.5, 7.5, 3)
        return (np.abs(x) <= a) & (np.abs(y) <= b) & (np.abs(z) <= c)
    radius, half = rng.uniform(5.0, 6.5), rng.uniform(6.0, 8.0)
    return (x**2 + y**2 <= radius**2) & (np.abs(z) <= half)


def _grid(case: int, shape: tuple[int, int, int], rng: np.random.Generator) -> Grid:
    """The grid of a case: spacing and size vary; of six cases one is flipped, one oblique, one has swapped axes."""
    sizes = shape if case == 0 else tuple(int(n + d) for n, d in zip(shape, rng.integers(-2, 3, 3), strict=True))
    spacing = np.array(BASE_SPACING_MM) * rng.uniform(0.92, 1.08, 3)
    axes = np.eye(3)
    if case % 6 == 1:
        axes = np.diag([-1.0, -1.0, 1.0])
    elif case % 6 == 2:
        axes = Rotation.from_rotvec(math.radians(15) * np.array([0.6, 0.0, 0.8])).as_matrix()
    elif case % 6 == 3:
        # Stored axes point backwards, down and to the right: PIR.
        axes = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
    affine = np.eye(4)
    affine[:3, :3] = axes * spacing
    affine[:3, 3] = rng.uniform(-80, 80, 3)
    return Grid(shape=sizes, affine=affine)  # type: ignore[arg-type]
