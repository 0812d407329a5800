"""Which pseudo-labels are accepted, by the evidence of all cases together. Pure functions of figures."""

from __future__ import annotations

from collections.abc import Mapping

from autoseg.pseudolabel.evidence import ClassEvidence
from autoseg.pseudolabel.rounds import How

Evidence = Mapping[str, Mapping[str, ClassEvidence]]
"""Case -> class -> what the models say."""


def judge(evidence: Evidence, dice: Mapping[str, float | None], how: How) -> dict[str, dict[str, str]]:
    """Decide about every class of every case.

    Args:
        dice: out-of-fold Dice of each class in the round that made the evidence; None where nothing was scored.

    Returns:
        Case -> class -> why it is rejected, the kind of reason before a colon; empty where it is accepted.

    A class that the models do not find in a case is not taken for absent: that a model misses an organ is no evidence
    that it is not there.
    """
    if not how.filters:
        return {case: dict.fromkeys(classes, "") for case, classes in evidence.items()}
    verdicts = {
        case: {c: _reason(e, dice.get(c), how) for c, e in classes.items()} for case, classes in evidence.items()
    }
    for name in {c for classes in evidence.values() for c in classes}:
        kept = [case for case, classes in verdicts.items() if classes.get(name) == ""]
        known = {case: u for case in kept if (u := evidence[case][name].disagreement) is not None}
        worst = sorted(known, key=lambda case: (-known[case], case))[: int(how.reject * len(kept))]
        for case in worst:
            verdicts[case][name] = f"worst: among the {how.reject:.0%} of the cases with most disagreement"
    return verdicts


def _reason(evidence: ClassEvidence, dice: float | None, how: How) -> str:
    if dice is None:
        return "no score: the class has no out-of-fold Dice"
    if dice < how.min_dice:
        return f"low score: out-of-fold Dice {dice:.2f} of the class, below {how.min_dice:g}"
    if evidence.voxels == 0:
        return "not found: the models see none of it"
    if evidence.disagreement is not None and evidence.disagreement > how.max_disagreement:
        return f"disagreement: {evidence.disagreement:.2f} between the models, above {how.max_disagreement:g}"
    return ""
