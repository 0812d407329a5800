"""Which classes are the left and the right one of a structure, and whether mirrored images can be learned from.

A network sees a patch, not the side of the body that it is from. Mirrored along X, a left kidney is a right one: where
both are classes, the label has to change with the image, else each is taught as the other. Pairs are known by their
names, or, where no name has a side, by their places: one lies where the other's mirror image lies, and they are as
large. Axes: X, Y, Z in RAS+; all in mm.

What is asked of a class or a pair is asked of the cases that have it, never of all: where labels are partial, most
cases lack it, and say nothing of it. Where that leaves too few to be sure, nothing is mirrored along X and a person is
asked, since mirroring without a pair teaches each as the other, and not mirroring only learns a little less.

A class of one side that looks like no other class's counterpart (a spleen, a liver) does not stop mirroring where
pairs are known: a data set that has some structures on both sides has them on both if they are, so what is left has
none, and its mirrored image is still rightly labelled. Where no pair is known, it does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from autoseg.analyzer.faults import Fault, Measured
from autoseg.data.labels import LabelMap
from autoseg.errors import counted, some_of

MOST_CASES = 50
"""Cases that are compared, evenly spread over the data set; more tell nothing new of classes that all cases have."""
ENOUGH_TOGETHER = 10
"""Cases with the same two classes that are compared beside these, where there are: the fewest from which on
`AGREEMENT` lets one differ."""
FEWEST_CASES = 3
"""Cases from which on places can show, or refute, that two classes are a pair."""
FEWEST_ALONE = 5
"""Cases from which on a class can be said to lie on one side: a tumor may be on the left in three by chance."""
AGREEMENT = 0.9
"""Share of the cases with a class, or with both of a pair, that a rule must hold in."""
FEWEST_TO_TILT = 6
"""Pairs from which on the plane between the sides is tilted to fit them."""
MUTUAL = 0.75
"""Share of the cases in which each of a pair must fit the other's mirror image best of all classes."""
ASLANT = 0.25
"""Most that a class of a pair is away from the other's mirror image, as a share of the distance between the two.

A choice: the 17 pairs of eight mouse brains come to at most 0.12 in the median, the 18 of a torso to 0.13; its aorta
and inferior vena cava, which are no pair, to 0.62.
"""
NO_MIRROR_IMAGE = 0.5
"""Height of one class above the other, as a share of their distance along X, from which on names are not believed: a
heart's left and right ventricle are two organs."""
SAME_SIZE, LIKE_SIZE, UNLIKE_SIZE = 1.5, 2.0, 4.0
"""Most that the volumes of a pair differ by, as a factor: of one that is sure, of one that may be, and of one that may
be where each lies wholly on its side.

A choice: of the 61 structures of a torso whose sides are named, no two others are at most 4 apart, mirror images, and
wholly on their sides; its spleen and gallbladder, the nearest to it, are 7 apart.
"""
OFF_CENTRE = 0.1
"""Most that the plane between the sides is away from the image's middle, as a share of its width: two structures that
lie beside each other in one half of a body are no pair."""

NO_PAIR = "no class has a counterpart on the other side"

Pair = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lateral:
    """What is known of the sides of a data set's classes."""

    pairs: tuple[tuple[str, str], ...] = ()
    """Classes that are mirror images of each other."""
    pairs_rule: str = NO_PAIR
    """How they are known, or why there are none."""
    unsure: tuple[str, ...] = ()
    """Classes of one side whose counterpart is not known: images that are mirrored along X would teach them wrongly."""
    unsure_rule: str = ""
    """What was seen of them."""
    is_warned_of: bool = False
    """Whether a person had better look: there seems to be a counterpart among the classes."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Places:
    """Where each class lies in each case; NaN where it does not occur. N cases, K classes."""

    centre: np.ndarray
    """(N, K, 3)."""
    volume: np.ndarray
    """(N, K), mm3."""
    half_width: np.ndarray
    """(N, K), along X, of the largest component."""
    image_centre: np.ndarray
    """(N, 3)."""
    width: np.ndarray
    """(N,), field of view along X."""

    @classmethod
    def of(cls, measured: Sequence[Measured], label_map: LabelMap) -> Places:
        """The places of a label map's classes in cases that have labels and no fault."""
        num = len(measured), len(label_map.names)
        centre, volume, half = np.full((*num, 3), np.nan), np.full(num, np.nan), np.full(num, np.nan)
        image_centre, width = np.zeros((num[0], 3)), np.zeros(num[0])
        for row, m in enumerate(measured):
            stats = m.stats
            by_value = {c.value: c for c in stats.classes}
            # Every voxel has a value, background included, so all their centres together are the image's.
            voxels = np.array([c.voxels for c in stats.classes])
            image_centre[row] = voxels @ np.array([c.centre_mm for c in stats.classes]) / voxels.sum()
            width[row] = stats.size_mm[0]
            for column, values in enumerate(label_map.values):
                classes = [by_value[v] for v in values if v in by_value]
                if classes:
                    voxels = np.array([c.voxels for c in classes])
                    centre[row, column] = voxels @ np.array([c.centre_mm for c in classes]) / voxels.sum()
                    volume[row, column] = voxels.sum() * float(np.prod(stats.spacing_mm))
                    half[row, column] = max(c.component_shapes[0][0] for c in classes) * stats.spacing_mm[0] / 2
        return cls(centre=centre, volume=volume, half_width=half, image_centre=image_centre, width=width)

    @property
    def num_classes(self) -> int:
        """K."""
        return self.volume.shape[1]

    def common(self, a: int, b: int | slice | np.ndarray) -> np.ndarray:
        """In which cases both occur."""
        return np.isfinite(self.volume[:, b].T + self.volume[:, a]).T

    def size_ratio(self, a: int, b: int | slice | np.ndarray) -> np.ndarray:
        """By what factor the larger one is larger, case by case."""
        ratio: np.ndarray = np.exp(np.abs(np.log(self.volume[:, b].T / self.volume[:, a]))).T
        return ratio

    @property
    def filled(self) -> Places:
        """The same, with each class that a case lacks where its other classes say that it would lie.

        That is where it lies in other cases, moved by the median that the case's own classes are moved by; as large as
        in the median case. So two classes can be compared that never occur in one case.
        """

        def median(values: np.ndarray, axis: int) -> np.ndarray:
            """Over those there are; NaN where there is none."""
            found: np.ndarray = np.ma.median(np.ma.masked_invalid(values), axis=axis).filled(np.nan)
            return found

        moved = self.image_centre[:, None]
        for _ in range(3):  # more passes move the organs of simulated partial abdomens by under a millimetre
            usual = median(self.centre - moved, 0)
            moved = median(self.centre - usual, 1)[:, None]
        there = np.isfinite(self.volume)
        centre = np.where(there[..., None], self.centre, moved + usual)
        return replace(self, centre=centre, volume=np.where(there, self.volume, median(self.volume, 0)))

    def plane(self, pairs: Sequence[Pair], others: Sequence[Pair] = ()) -> Plane:
        """The plane halfway between the classes of pairs, tilted where there are enough; else the image's middle.

        Args:
            pairs: what is gone by.
            others: what is gone by in cases that have none of these.
        """
        num = len(self.width)
        normal, offset = np.tile([1.0, 0.0, 0.0], (num, 1)), self.image_centre[:, 0].copy()
        columns = [np.array(some, int).reshape(-1, 2) for some in (pairs, others)]
        for row in range(num):
            halfway = np.empty((0, 3))
            for some in columns:
                if not len(halfway):
                    halfway = self.centre[row, some].mean(1)
                    halfway = halfway[np.isfinite(halfway[:, 0])]
            if len(halfway) >= FEWEST_TO_TILT:
                # Some of the pairs may be none: the far half is left out, and the rest is fitted again.
                for _ in range(2):
                    terms = np.column_stack([np.ones(len(halfway)), halfway[:, 1:]])
                    at, *slopes = np.linalg.lstsq(terms, halfway[:, 0], rcond=None)[0].tolist()
                    away = np.abs(halfway[:, 0] - terms @ [at, *slopes])
                    halfway = halfway[away <= 2 * np.median(away)]
                length = math.hypot(1.0, *slopes)
                normal[row] = np.array([1.0, *(-s for s in slopes)]) / length
                offset[row] = at / length
            elif len(halfway):
                offset[row] = np.median(halfway[:, 0])
        return Plane(normal=normal, offset=offset)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plane:
    """The plane between the sides, case by case."""

    normal: np.ndarray
    """(N, 3), of length 1, to the right."""
    offset: np.ndarray
    """(N,), of the plane from the origin along the normal."""

    def distance(self, centre: np.ndarray) -> np.ndarray:
        """(N, K) of (N, K, 3) from the plane, above 0 to the right."""
        away: np.ndarray = (centre @ self.normal[:, :, None])[..., 0] - self.offset[:, None]
        return away

    def mirrored(self, centre: np.ndarray) -> np.ndarray:
        """The mirror images of (N, K, 3)."""
        image: np.ndarray = centre - 2 * self.distance(centre)[..., None] * self.normal[:, None]
        return image


def find_lateral(measured: Sequence[Measured], label_map: LabelMap) -> Lateral:
    """Judge the sides of the classes by names and places.

    Args:
        measured: training cases.
        label_map: the classes as the user named them.
    """
    labelled = [m for m in measured if m.stats.classes and not m.stats.is_faulty]
    if not labelled:
        return Lateral()
    chosen, names = _chosen(labelled, label_map), label_map.names
    places = Places.of(chosen, label_map)
    named = [(pair.left, pair.right) for pair in label_map.sided_pairs]
    pairs = [pair for pair in named if not _are_aslant(places, pair)]
    refuted = [pair for pair in named if pair not in pairs]
    rules = []
    plane = _sought_plane(places, pairs)
    if pairs:
        rules.append(f"{counted(len(pairs), 'pair')} by names")
    elif pairs := _mirrored_pairs(places, plane):
        rules.append(f"{counted(len(pairs), 'pair')} by places and volumes in {counted(len(chosen), 'case')}")
    if refuted:
        rules.append(f"{_couples(names, refuted)} are named so, but are no mirror images of each other")
    unsure, seen, is_likely = _unsure(places, plane, names, pairs, named)
    return Lateral(
        pairs=tuple((names[a], names[b]) for a, b in pairs),
        pairs_rule="; ".join(rules) or NO_PAIR,
        unsure=tuple(names[k] for k in unsure),
        unsure_rule=seen,
        is_warned_of=is_likely,
    )


def _chosen(labelled: Sequence[Measured], label_map: LabelMap) -> list[Measured]:
    """Cases evenly spread, and of the rest those with two classes that are rare together, so that no pair is missed."""
    num = len(labelled)
    spread = np.unique(np.linspace(0, num - 1, min(num, MOST_CASES)).astype(int))
    rest = np.random.default_rng(0).permutation(np.setdiff1d(np.arange(num), spread))
    together = np.zeros((len(label_map.names),) * 2, int)
    chosen: list[Measured] = []
    for place in (*spread, *rest):
        has = np.isin(label_map.names, labelled[place].present(label_map))
        both = np.ix_(has, has)
        if len(chosen) < len(spread) or (together[both] < ENOUGH_TOGETHER).any():
            together[both] += 1
            chosen.append(labelled[place])
    return chosen


def _unsure(
    places: Places, plane: Plane, names: Sequence[str], pairs: Sequence[Pair], named: Sequence[Pair]
) -> tuple[list[int], str, bool]:
    """Classes whose counterpart is not known, what was seen of them, and whether it seems to be among the classes.

    Args:
        pairs: those that are sure.
        named: those by names, some of which may have been refuted.
    """
    rest = [k for k in range(len(names)) if all(k not in pair for pair in pairs)]
    lone = [k for k in rest if _is_on_one_side(places, plane, k)]
    # Who names sides at all names them all: then classes near the middle, such as an aorta and a vein, are asked about
    # only if they could not look more like a pair, and a spleen and a large gallbladder are not.
    alike = _alike(places, plane, rest, *((ASLANT, SAME_SIZE) if named else (NO_MIRROR_IMAGE, LIKE_SIZE)))
    alike += _alike(places, plane, lone, NO_MIRROR_IMAGE, LIKE_SIZE if named else UNLIKE_SIZE)
    likely = sorted({*alike} - {*named})
    unsure, seen = {k for pair in likely for k in pair}, []
    few = [(a, b) for a, b in likely if places.common(a, b).sum() < FEWEST_CASES]
    for couples, why in (
        ([pair for pair in likely if pair not in few], "are not surely a pair"),
        (few, f"occur together in fewer than {FEWEST_CASES} cases"),
    ):
        if couples:
            seen.append(f"{_couples(names, couples)} look like left and right of one structure, but {why}")
    if alone := [] if pairs else [k for k in lone if k not in unsure]:
        num = np.isfinite(places.volume).sum(0)
        words = some_of((f"{names[k]} (in {counted(int(num[k]), 'case')})" for k in alone), most=4)
        seen.append(f"always on one side, and without a known counterpart: {words}")
    return sorted(unsure | {*alone}), "; ".join(seen), bool(likely)


def check_lateral(lateral: Lateral, given: Sequence[tuple[str, str]] | None) -> list[Fault]:
    """A warning where classes seem to be a pair and nobody says so.

    Args:
        given: the user's pairs; None: the user leaves them to the analysis.
    """
    if not lateral.is_warned_of or given is not None:
        return []
    return [
        Fault(
            kind="lateral",
            finding=f"{lateral.unsure_rule}, so a plan mirrors no image along X by itself",
            remedy="Name the sides in class_names, or give lateral_pairs: the pairs, or [] if there are none.",
            severity="warning",
        )
    ]


def _are_aslant(places: Places, pair: Pair) -> bool:
    """Whether two classes lie at different heights in most cases, so that neither is the other's mirror image."""
    a, b = pair
    common = places.common(a, b)
    if common.sum() < FEWEST_CASES:
        return False
    apart = np.abs(places.centre[common, a] - places.centre[common, b])
    return bool(np.median(np.hypot(apart[:, 1], apart[:, 2]) / np.maximum(apart[:, 0], 1e-9)) > NO_MIRROR_IMAGE)


def _level_pairs(places: Places) -> list[Pair]:
    """Classes that lie at one height and are as large as each other, in most cases; what the plane is sought by."""
    pairs = []
    for a in range(places.num_classes - 1):
        later = slice(a + 1, None)
        apart = np.abs(places.centre[:, later] - places.centre[:, a, None])  # (N, K - a - 1, 3)
        aslant = np.hypot(apart[..., 1], apart[..., 2]) / np.maximum(apart[..., 0], 1e-9)
        fits = (aslant <= NO_MIRROR_IMAGE) & (places.size_ratio(a, later) <= SAME_SIZE)
        num = places.common(a, later).sum(0)
        often = (num >= min(FEWEST_CASES, len(apart))) & (fits.sum(0) > num / 2)
        pairs += [(a, a + 1 + int(k)) for k in np.flatnonzero(often)]
    return pairs


def _sought_plane(places: Places, pairs: Sequence[Pair]) -> Plane:
    """The plane between known pairs; in cases without, the one that classes show which may be pairs.

    In cases where that is not near the image's middle, the image's middle.
    """
    sought, sure = places.plane(pairs, _level_pairs(places)), places.plane(pairs)
    away = sought.distance(places.image_centre[:, None])[:, 0] / places.width
    is_near = np.abs(away) <= OFF_CENTRE
    return Plane(
        normal=np.where(is_near[:, None], sought.normal, sure.normal),
        offset=np.where(is_near, sought.offset, sure.offset),
    )


def _mirrored_pairs(places: Places, plane: Plane) -> list[Pair]:
    """Pairs that are sure: in most cases each is, of all classes, what fits the other's mirror image best."""
    num_cases, num_classes = places.volume.shape
    if num_cases < FEWEST_CASES:
        return []
    best = np.full((num_cases, num_classes), -1)
    radius = np.cbrt(places.volume * 3 / (4 * math.pi))
    for a in range(num_classes):
        away = _away(places, plane, a) / (radius + radius[:, a, None]) * 2
        misfit = np.hypot(away, np.log2(places.size_ratio(a, slice(None))))
        misfit[:, a] = np.inf
        misfit[np.isnan(misfit)] = np.inf
        best[:, a] = np.where(np.isfinite(misfit.min(1)), misfit.argmin(1), -1)
    pairs = []
    for a, b in _alike(places, plane, range(num_classes), ASLANT, SAME_SIZE):
        common = places.common(a, b)
        mutual = (best[common, a] == b) & (best[common, b] == a)
        if common.sum() >= FEWEST_CASES and mutual.mean() >= MUTUAL:
            pairs.append((a, b))
    # A class that fits two others, each in cases that lack the other one, is not surely of either.
    fitted = [k for pair in pairs for k in pair]
    return [pair for pair in pairs if fitted.count(pair[0]) == fitted.count(pair[1]) == 1]


def _alike(places: Places, plane: Plane, classes: Sequence[int], aslant: float, factor: float) -> list[Pair]:
    """Pairs of some classes that lie where the other's mirror image does, and are as large, in most cases.

    That is asked of the cases that have both, each on its own side, the same in nearly all; where these are too few, of
    those that have either, with the other one where it would lie (`Places.filled`).

    Args:
        aslant: most that one is away from the other's mirror image, as a share of the distance between the two.
        factor: most that their volumes differ by.
    """
    pairs = []
    there, filled = np.isfinite(places.volume), places.filled
    off = plane.distance(filled.centre)
    for place, a in enumerate(classes):
        later = np.array(classes[place + 1 :], int)
        common = places.common(a, later)
        seen = np.where(common.sum(0) < FEWEST_CASES, there[:, later] | there[:, a, None], common)
        num = seen.sum(0)
        mirrored = _away(filled, plane, a)[:, later] <= aslant * np.abs(off[:, later] - off[:, a, None])
        opposite = seen & (off[:, later] * off[:, a, None] < 0)
        right = off[:, a, None] > 0
        often = np.maximum((opposite & right).sum(0), (opposite & ~right).sum(0))
        fits = (num > 0) & (often >= AGREEMENT * num) & ((seen & mirrored).sum(0) >= num / 2)
        fits &= (seen & (filled.size_ratio(a, later) <= factor)).sum(0) >= num / 2
        pairs += [(a, int(b)) for b in later[fits]]
    return pairs


def _away(places: Places, plane: Plane, a: int) -> np.ndarray:
    """(N, K) distance of each class from the mirror image of one."""
    away: np.ndarray = np.linalg.norm(places.centre - plane.mirrored(places.centre[:, a, None]), axis=2)
    return away


def _is_on_one_side(places: Places, plane: Plane, k: int) -> bool:
    """Whether a class lies wholly on one side of the plane, the same in nearly all cases that have it.

    What a crop is made around reaches over the crop's middle, which says nothing of the body's.
    """
    off = plane.distance(places.centre[:, k, None])[:, 0]
    seen = np.isfinite(off)
    if seen.sum() < FEWEST_ALONE:
        return False
    clear = np.abs(off[seen]) >= places.half_width[seen, k]
    return bool(max((clear & (off[seen] > 0)).mean(), (clear & (off[seen] < 0)).mean()) >= AGREEMENT)


def _couples(names: Sequence[str], pairs: Sequence[Pair]) -> str:
    return some_of((f"{names[a]} and {names[b]}" for a, b in pairs), most=4)
