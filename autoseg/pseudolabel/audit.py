"""What became of the pseudo-labels, by case and class: the accepted first, the most suspicious of them on top."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Annotated, Any, ClassVar

from pydantic import AliasChoices, Field, JsonValue

from autoseg.pseudolabel.evidence import ClassEvidence
from autoseg.pseudolabel.rounds import How
from autoseg.workspace.stored import Score, Stored

UnsureVoxels = Annotated[int, Field(validation_alias=AliasChoices("voxels_unsure", "voxels_ignored"))]
"""Early files of version 0.1 call them ignored."""

LEAST_SPREAD = 0.15
"""Spread of the logarithm of a volume that is taken at least: organs of adults differ by this much anyway."""
LEAST_CONFIDENCE = 0.7
"""Mean probability of a class' voxels at which it is as suspicious as with too much disagreement."""
MOST_Z = 3.0
"""Standard deviations from the labelled cases at which a volume is as suspicious as too much disagreement."""


class AuditRow(Stored):
    """One class of one case."""

    case: str
    name: str
    """Of the class."""
    rejected: str
    """Why it was rejected; empty: accepted."""
    voxels_filled: int
    voxels_unsure: UnsureVoxels
    volume_ml: float
    volume_z: float | None
    """Robust standard deviations of the logarithm of the volume from the labelled cases; None where they are few, or
    where nothing was found."""
    confidence: float | None
    disagreement: float | None
    suspicion: float
    """The largest of: disagreement and lack of confidence as shares of their limits, volume_z over 3. 1: at a limit."""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {k: round(v, 4) if isinstance(v, float) else v for k, v in self}


class ClassAudit(Stored):
    """One class over all cases."""

    name: str
    dice: Score
    """Out of fold, in the round before."""
    accepted: int
    rejected: int
    """Cases."""
    reasons: dict[str, int]
    """Why -> cases that were rejected for it."""
    voxels_filled: int
    voxels_unsure: UnsureVoxels


class BackgroundAudit(Stored):
    """Unsure voxels that lean to no accepted class."""

    voxels_unsure: UnsureVoxels = 0
    by_case: dict[str, int] = Field(default_factory=dict)


class Audit(Stored):
    """What stands in pseudolabels/audit.json."""

    advice: ClassVar[str] = "Undo the edit, or delete the file and run `autoseg pseudolabel` again."

    round: int
    """The one that learns from the labels."""
    settings: dict[str, JsonValue]
    joined: tuple[str, ...]
    """Unlabeled cases that train in it."""
    classes: tuple[ClassAudit, ...]
    background: BackgroundAudit = BackgroundAudit()
    rows: tuple[AuditRow, ...]
    failures: tuple[str, ...] = ()
    """Cases that could not be predicted, in words."""
    not_predicted: tuple[str, ...] = ()
    """Their names."""


def volume_z(volume_ml: float, labelled_ml: Sequence[float]) -> float | None:
    """How far a volume lies from those of the labelled cases: in robust standard deviations of the logarithm.

    Args:
        labelled_ml: of the cases in which annotators found the class; three at least, or there is no answer.
    """
    known = [math.log(v) for v in labelled_ml if v > 0]
    if len(known) < 3:
        return None
    middle = median(known)
    # 1.4826 times the median deviation is the standard deviation of a normal distribution.
    spread = max(LEAST_SPREAD, 1.4826 * median(abs(v - middle) for v in known))
    return (math.log(max(volume_ml, 1e-3)) - middle) / spread


def suspicion(evidence: ClassEvidence, z: float | None, how: How) -> float:
    """How much is to be said against a pseudo-label; 1 where one figure is at its limit."""
    reasons = [0.0 if z is None else abs(z) / MOST_Z]
    if evidence.disagreement is not None:
        reasons.append(evidence.disagreement / how.max_disagreement)
    if evidence.confidence is not None:
        reasons.append((1 - evidence.confidence) / (1 - LEAST_CONFIDENCE))
    return max(reasons)


def make_row(
    case: str,
    name: str,
    evidence: ClassEvidence,
    *,
    rejected: str,
    filled: int,
    unsure: int,
    labelled_ml: Sequence[float],
    how: How,
) -> AuditRow:
    """All that is known of one class in one case."""
    z = volume_z(evidence.volume_ml, labelled_ml) if evidence.voxels else None
    return AuditRow(
        case=case,
        name=name,
        rejected=rejected,
        voxels_filled=filled,
        voxels_unsure=unsure,
        volume_ml=evidence.volume_ml,
        volume_z=z,
        confidence=evidence.confidence,
        disagreement=evidence.disagreement,
        suspicion=suspicion(evidence, z, how),
    )


def audit_json(
    rows: Sequence[AuditRow],
    dice: Mapping[str, float | None],
    how: How,
    *,
    round_: int,
    joined: Sequence[str],
    background: Mapping[str, int],
) -> dict[str, Any]:
    """The audit as plain data.

    Args:
        rows: of all cases.
        dice: out-of-fold Dice of each class in the previous round.
        round_: the round that learns from the labels.
        joined: unlabeled cases that train in it.
        background: case -> unsure voxels that lean to no accepted class, so that no row counts them.
    """
    names = list(dict.fromkeys(row.name for row in rows))
    classes = []
    for name in names:
        of_class = [row for row in rows if row.name == name]
        reasons: dict[str, int] = {}
        for row in of_class:
            if row.rejected:
                kind = row.rejected.partition(":")[0]
                reasons[kind] = reasons.get(kind, 0) + 1
        classes.append(
            {
                "name": name,
                "dice": dice.get(name),
                "accepted": sum(not row.rejected for row in of_class),
                "rejected": sum(bool(row.rejected) for row in of_class),
                "reasons": reasons,
                "voxels_filled": sum(row.voxels_filled for row in of_class),
                "voxels_unsure": sum(row.voxels_unsure for row in of_class),
            }
        )
    # What was rejected harms nothing, so it comes last.
    ordered = sorted(rows, key=lambda row: (bool(row.rejected), -row.suspicion, row.case, row.name))
    return {
        "round": round_,
        "settings": asdict(how),
        "joined": list(joined),
        "classes": classes,
        "background": {"voxels_unsure": sum(background.values()), "by_case": dict(background)},
        "rows": [row.to_json() for row in ordered],
    }
