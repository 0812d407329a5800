"""Label groups: which classes the cases carry, as in Table 1 of the FLARE23 paper."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from autoseg.data.fingerprint import LabelGroup

SHARE_MISSING = 0.25
"""Share of all classes, and at least two, that a repeated group must lack to look partially labelled."""


def group_cases(classes_of: Mapping[str, Sequence[str]]) -> tuple[LabelGroup, ...]:
    """Group cases by their classes.

    Args:
        classes_of: case -> its classes, in the data set's order.

    Returns:
        Largest group first.
    """
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for case, classes in classes_of.items():
        groups[tuple(classes)].append(case)
    label_groups = [LabelGroup(classes=classes, cases=tuple(cases)) for classes, cases in groups.items()]
    return tuple(sorted(label_groups, key=lambda g: (-len(g.cases), -len(g.classes))))


def look_partial(groups: Sequence[LabelGroup], names: Sequence[str]) -> bool:
    """Whether labels seem to have been made for different classes in different cases.

    An organ outside the field of view or a missing tumor leaves out few classes, and not always the same; an
    annotator who was asked for less leaves out the same many classes in several cases.

    Args:
        groups: cases by the classes that occur in them; cases without any are not considered.
    """
    occurring = {n for g in groups for n in g.classes}
    fewest = max(2.0, SHARE_MISSING * len(names))
    return any(len(g.cases) >= 2 and g.classes and len(occurring - set(g.classes)) >= fewest for g in groups)


def table(groups: Sequence[LabelGroup], num_unlabeled: int = 0) -> list[str]:
    """The groups as lines of text: number of cases, number and names of their classes."""
    width = max([len(str(len(g.cases))) for g in groups] + [len(str(num_unlabeled)), 5])
    lines = [f"{'cases':>{width}} | classes"]
    for group in groups:
        names = ", ".join(group.classes)
        num = f"{len(group.classes)} labeled class{'' if len(group.classes) == 1 else 'es'}"
        lines.append(f"{len(group.cases):>{width}} | {num}{': ' + names if names else ''}")
    if num_unlabeled:
        lines.append(f"{num_unlabeled:>{width}} | unlabeled")
    return lines
