"""Labels that models which never saw them contradict: what the label would have to be for the prediction to be right.

For each class of a case some repairs of the label are tried: the class where the prediction alone has it (it was
missing), none where the label alone has it (extra), exchanged with another class (swapped; left and right where their
names say so), moved, mirrored. What a repair would gain in Dice, above what is usual for the class, is the suspicion. A
model's own failure looks like a missing or extra label, too, so this is a list to look through, not a verdict.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.ndimage import binary_opening
from scipy.ndimage import label as connected

from autoseg.data.components import box_of_label
from autoseg.data.grid import Grid
from autoseg.data.labels import LabelMap
from autoseg.data.side_names import sided_pairs

Kind = Literal["missing", "extra", "swapped", "left and right", "shifted", "mirrored"]
LEAST_SUSPICION = 0.05
"""Under it a class of a case is not listed: five points of Dice, without what boundaries differ by."""
LEAST_SHIFT_MM = 2.0
"""Shifts that are shorter are not told from a boundary drawn otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contradiction:
    """What a prediction says against one class of a label."""

    name: str
    """Of the class."""
    kind: Kind
    gain: float
    """Dice that the repair would gain: 0 to 1."""
    partner: str = ""
    """The class it seems to be exchanged with."""
    shift_mm: float = 0.0
    """How far it seems to have been moved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspicion:
    """A class of a case in the list."""

    case: str
    contradiction: Contradiction
    suspicion: float
    """The gain above the median of the class, 0 to 1."""
    parts: tuple[Part, ...] = ()
    """Where to look, the largest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A connected part of what a prediction and a label do not share."""

    voxels: int
    volume_ml: float
    voxel: tuple[int, int, int]
    """One of its voxels, the nearest to its centre, as an index of the label's file."""
    seen: tuple[int, int, int]
    """The same along X, Y, Z of RAS."""
    center_mm: tuple[float, float, float]
    """Its centre in the RAS+ world."""


MOST_PARTS = 3
"""Parts of a class of a case that are told, the largest first."""
LEAST_PART = 0.1
"""Of the largest part's voxels: smaller ones are not told."""


def parts_of(said: Contradiction, pred: np.ndarray, label: np.ndarray, label_map: LabelMap, grid: Grid) -> list[Part]:
    """Where to look: the connected parts that speak against a label, the largest first.

    What is missing lies where the prediction alone has the class, what is extra where the label alone has it; what was
    exchanged, moved or mirrored is the label's class itself.

    Args:
        pred, label: (X, Y, Z) label values in RAS on one grid.
        grid: of the label's file.
    """
    values = dict(zip(label_map.names, label_map.values, strict=True))[said.name]
    p, t = np.isin(pred, values), np.isin(label, values)
    disputed = {"missing": p & ~t, "extra": t & ~p}.get(said.kind, t)
    if label_map.ignore_label is not None:
        disputed &= label != label_map.ignore_label
    thick = binary_opening(disputed)  # thin shells along boundaries join what lies apart
    disputed = thick if thick.any() else disputed
    numbered, num = connected(disputed, np.ones((3, 3, 3)))
    sizes = np.bincount(numbered.ravel(), minlength=num + 1)[1:]
    affine = grid.to_ras().affine
    to_file = np.linalg.inv(grid.affine) @ affine
    parts: list[Part] = []
    for index in np.argsort(-sizes, kind="stable")[:MOST_PARTS]:
        if sizes[index] < LEAST_PART * sizes.max():
            break
        voxels = np.argwhere(numbered == index + 1)
        centre = voxels.mean(axis=0)
        seen = voxels[np.argmin(((voxels - centre) ** 2).sum(axis=1))]
        stored = np.rint(to_file @ [*seen, 1])[:3].astype(int).tolist()
        i, j, k = stored
        x, y, z = seen.tolist()
        right, front, up = (round(float(mm), 2) for mm in (affine @ [*centre, 1])[:3])
        volume_ml = float(sizes[index] * abs(np.linalg.det(affine[:3, :3])) / 1000)
        parts.append(
            Part(
                voxels=int(sizes[index]), volume_ml=round(volume_ml, 4), voxel=(i, j, k), seen=(x, y, z),
                center_mm=(right, front, up),
            )
        )  # fmt: skip
    return parts


def contradictions(
    pred: np.ndarray,
    label: np.ndarray,
    label_map: LabelMap,
    spacing_mm: Sequence[float],
    *,
    annotated: Collection[str] | None = None,
) -> list[Contradiction]:
    """The repairs of each kind that a prediction speaks for, for every class that counts.

    Args:
        pred, label: (X, Y, Z) label values in RAS on one grid; voxels the label marks as ignored do not count.
        annotated: classes that the case was annotated for; None: all.
    """
    if label_map.ignore_label is not None:
        pred = np.where(label == label_map.ignore_label, 0, pred)
    box = box_of_label((pred > 0) | (label > 0))
    pred, label = pred[box], label[box]
    names = [n for n in label_map.names if annotated is None or n in annotated]
    values = dict(zip(label_map.names, label_map.values, strict=True))
    masks = {n: (np.isin(pred, values[n]), np.isin(label, values[n])) for n in names}
    sizes = {n: (int(p.sum()), int(t.sum())) for n, (p, t) in masks.items()}
    partners = _lateral_partners(names)
    listed: list[Contradiction] = []
    for name in names:
        p, t = masks[name]
        if not any(sizes[name]):
            continue
        before = _dice(p, t)
        # Of the voxels in dispute only those count that the other one calls background: the rest is an exchange.
        alone, bare = (_parts(m & (other == 0), all(sizes[name])) for m, other in ((p, label), (t, pred)))
        both, total = int((p & t).sum()), sum(sizes[name])
        without = 2 * both / (total - bare) if total > bare else 1.0
        listed.append(Contradiction(name=name, kind="missing", gain=2 * (both + alone) / (total + alone) - before))
        listed.append(Contradiction(name=name, kind="extra", gain=without - before))
        exchanges = _exchanges(name, masks, before, partners)
        listed += exchanges
        if all(sizes[name]):
            # An exchange of two sides is also a move of each; what it explains needs no other reason.
            explained = before + max([0.0, *(c.gain for c in exchanges)])
            listed += _moves(name, p, t, explained, spacing_mm)
    return listed


def _parts(disputed: np.ndarray, both: bool) -> int:
    """Voxels of parts that are thick, since two boundaries differ by thin shells; all where one has no voxel at all."""
    return int((binary_opening(disputed) if both else disputed).sum())


def _lateral_partners(names: Sequence[str]) -> set[frozenset[str]]:
    return {frozenset((names[pair.left], names[pair.right])) for pair in sided_pairs(names)}


def _dice(pred: np.ndarray, label: np.ndarray) -> float:
    total = int(pred.sum()) + int(label.sum())
    return 2 * int((pred & label).sum()) / total if total else math.nan


def _exchanges(
    name: str,
    masks: Mapping[str, tuple[np.ndarray, np.ndarray]],
    before: float,
    lateral: Collection[frozenset[str]],
) -> list[Contradiction]:
    """What exchanging the class with another one gains for the one of both that gains less."""
    p, t = masks[name]
    best: Contradiction | None = None
    for other, (q, u) in masks.items():
        if other == name or not (p & u).any() or not (q & t).any():
            continue
        gain = min(_dice(p, u) - before, _dice(q, t) - _dice(q, u))
        kind: Kind = "left and right" if frozenset((name, other)) in lateral else "swapped"
        if best is None or gain > best.gain:
            best = Contradiction(name=name, kind=kind, gain=gain, partner=other)
    return [] if best is None else [best]


def _moves(
    name: str, pred: np.ndarray, label: np.ndarray, before: float, spacing_mm: Sequence[float]
) -> list[Contradiction]:
    """What moving the class onto the prediction's centre gains, and what mirroring it gains above that."""
    shift, moved = _overlaid(pred, label)
    distance_mm = math.dist([0, 0, 0], [n * s for n, s in zip(shift, spacing_mm, strict=True)])
    moves = []
    if distance_mm >= LEAST_SHIFT_MM:
        moves.append(Contradiction(name=name, kind="shifted", gain=moved - before, shift_mm=round(distance_mm, 2)))
    _, mirrored = _overlaid(pred, label[::-1])
    moves.append(Contradiction(name=name, kind="mirrored", gain=mirrored - max(before, moved)))
    return moves


def _overlaid(pred: np.ndarray, label: np.ndarray) -> tuple[list[int], float]:
    """Voxels from a label's centre to the prediction's, and their Dice once it is moved there."""
    at, to = np.argwhere(label), np.argwhere(pred)
    shift = np.rint(to.mean(axis=0) - at.mean(axis=0)).astype(int)
    at = at + shift
    inside = ((at >= 0) & (at < pred.shape)).all(axis=1)
    shared = int(pred[tuple(at[inside].T)].sum())
    return shift.tolist(), 2 * shared / (len(at) + len(to))


def ranked(by_case: Mapping[str, Sequence[Contradiction]]) -> list[Suspicion]:
    """The list: of each class of each case the kind that is furthest above what is usual, the most suspicious first.

    Args:
        by_case: case -> what `contradictions` gives.
    """
    usual: dict[tuple[str, str], float] = {}
    every: dict[tuple[str, str], list[float]] = {}
    num_cases: dict[str, int] = {}
    for listed in by_case.values():
        for name in {c.name for c in listed}:
            num_cases[name] = num_cases.get(name, 0) + 1
        for c in listed:
            every.setdefault((c.name, c.kind), []).append(max(0.0, c.gain))
    for (name, kind), gains in every.items():
        # A repair that could not be tried gains nothing.
        usual[name, kind] = float(np.median([*gains, *[0.0] * (num_cases[name] - len(gains))]))
    rows: list[Suspicion] = []
    for case, listed in by_case.items():
        best: dict[str, Suspicion] = {}
        for c in listed:
            above = (c.gain - usual[c.name, c.kind]) / max(1e-6, 1 - usual[c.name, c.kind])
            if above >= LEAST_SUSPICION and (c.name not in best or above > best[c.name].suspicion):
                best[c.name] = Suspicion(case=case, contradiction=c, suspicion=round(above, 6))
        rows += best.values()
    return sorted(rows, key=lambda row: (-row.suspicion, row.case, row.contradiction.name))
