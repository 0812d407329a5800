"""What is wrong with a data set, and what looks odd, case by case and over the cases together.

A fault makes a case unusable or its scores untrue; a warning is for a person to look at. Each says what was
found and what to do.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from autoseg.analyzer.case import LABEL_FILE, CaseStats
from autoseg.data.datalists.cases import Case
from autoseg.data.datalists.groups import likely_groups
from autoseg.data.datalists.metadata import alike, text_of
from autoseg.data.formats.label_files import value_names
from autoseg.data.labels import LabelMap
from autoseg.errors import counted, some_of

Role = Literal["training", "validation", "testing", "unlabeled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A fault or a warning."""

    kind: str
    """A word for programs, such as `grid` or `duplicate`; docs/analyze.md lists them."""
    finding: str
    remedy: str
    case: str = ""
    """Name of the case; empty: the data set as a whole."""
    file: str = ""
    """Relative to dataroot; empty: the case as a whole."""
    severity: Literal["fault", "warning"] = "fault"

    def __str__(self) -> str:
        place = f"{self.case} ({self.file})" if self.file else self.case or "data set"
        return f"{place}: {self.finding}. {self.remedy}"


MOST_ALIKE = 3
"""Cases with the same finding that have a line each; more are named in one."""


def fault_lines(faults: Sequence[Fault]) -> list[str]:
    """Faults for people: a line each, or one for all cases with the same finding where these are many."""
    alike: dict[tuple[str, str, str], list[Fault]] = defaultdict(list)
    for fault in faults:
        alike[fault.kind, fault.finding, fault.remedy].append(fault)
    lines = list[str]()
    for group in alike.values():
        if len(group) <= MOST_ALIKE or not all(f.case for f in group):
            lines += map(str, group)
        else:
            cases = some_of((f.case for f in group), 6)
            lines.append(f"{len(group)} cases ({cases}): {group[0].finding}. {group[0].remedy}")
    return lines


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Measured:
    """A case of the datalist with its statistics."""

    case: Case
    role: Role
    stats: CaseStats
    files: tuple[str, ...]
    """Images, then the label, relative to dataroot."""

    @property
    def place(self) -> str:
        """Where the datalist has it, such as `fold 2` or `testing`."""
        return f"fold {self.case.fold}" if self.role == "training" and self.case.fold is not None else self.role

    @property
    def label_file(self) -> str:
        """The label's path."""
        return self.files[-1] if self.case.label is not None else ""

    @property
    def values(self) -> tuple[int, ...]:
        """Label values that occur, background included."""
        return tuple(c.value for c in self.stats.classes)

    def present(self, label_map: LabelMap) -> tuple[str, ...]:
        """Names of the classes that occur."""
        present = set(self.values)
        return tuple(n for n, vs in zip(label_map.names, label_map.values, strict=True) if present & set(vs))


def check_files(measured: Sequence[Measured]) -> list[Fault]:
    """What was found in each case's own files."""
    faults = []
    for m in measured:
        for finding in m.stats.findings:
            file = m.label_file if finding.file == LABEL_FILE else m.files[finding.file] if finding.file >= 0 else ""
            faults.append(
                Fault(
                    kind=finding.kind,
                    finding=finding.finding,
                    remedy=finding.remedy,
                    case=m.case.name,
                    file=file,
                    severity="fault" if finding.is_fault else "warning",
                )
            )
    return faults


def check_labels(measured: Sequence[Measured], label_map: LabelMap, named: Mapping[str, Sequence[int]]) -> list[Fault]:
    """Values nobody named, classes against the declaration, empty labels.

    Args:
        label_map: the classes of the run.
        named: classes and their values as the datalist has them, where class_names are given. If those of the run are
            some of them, the others are background of this run, and no fault.
    """
    left_out = _left_out(label_map, named)
    known = label_map.known_values
    others = {value for values in left_out.values() for value in values}
    faults = _check_regions(label_map)
    if left_out:
        faults.append(
            Fault(
                kind="label_values",
                finding=f"class_names leave out {some_of(left_out)}, which the datalist names",
                remedy="They count as background. Name them, too, if they are to be learned.",
                severity="warning",
            )
        )
    for m in measured:
        faults += _check_names(m, {*label_map.names, *left_out}, label_map)
        if m.case.label is None or m.stats.is_faulty:
            continue
        odd = [v for v in m.values if v not in known and v not in others]
        if odd:
            values = "value" if len(odd) == 1 else "values"
            faults.append(
                Fault(
                    kind="label_values",
                    finding=f"label {values} {some_of(odd)} not declared",
                    remedy=f"Expected {some_of(sorted(known))}. Name them in class_names, or correct the label.",
                    case=m.case.name,
                    file=m.label_file,
                )
            )
        faults += _check_present(m, label_map)
    return faults


def _check_regions(label_map: LabelMap) -> list[Fault]:
    """Regions that a model may find at one place, though no label value can say so."""
    pairs = label_map.untold_overlaps
    if not pairs:
        return []
    first, second = pairs[0]
    more = f", nor for {counted(len(pairs) - 1, 'other pair')}" if len(pairs) > 1 else ""
    return [
        Fault(
            kind="regions",
            finding=f"no label value stands for {first} and {second} together{more}",
            remedy="Where models find both, a label file shows the smaller. Leave `sigmoid` out if none overlap.",
            severity="warning",
        )
    ]


def _check_names(m: Measured, known: Collection[str], label_map: LabelMap) -> list[Fault]:
    """Declared classes that there are not."""
    unknown = [n for n in m.case.annotated or () if n not in known]
    if not unknown:
        return []
    return [
        Fault(
            kind="annotated",
            finding=f"annotated for {', '.join(unknown)}, no class of the data set",
            remedy=f"Expected some of {some_of(label_map.names)}. Correct `annotated` in the datalist.",
            case=m.case.name,
        )
    ]


def _check_present(m: Measured, label_map: LabelMap) -> list[Fault]:
    """Classes that occur against the declaration, and labels that hold nothing."""
    declared, present, faults = m.case.annotated, m.present(label_map), list[Fault]()
    if declared is not None and (extra := [n for n in present if n not in declared]):
        faults.append(
            Fault(
                kind="annotated",
                finding=f"has {some_of(extra)} but is not declared as annotated for it",
                remedy="Add it to `annotated` in the datalist, or remove it from the label.",
                case=m.case.name,
                file=m.label_file,
            )
        )
    if declared is None and set(m.values) <= {0, label_map.ignore_label}:
        faults.append(
            Fault(
                kind="empty_label",
                finding="the label is empty",
                remedy="Check it. If none of the classes is there, say so with `annotated` in the datalist.",
                case=m.case.name,
                file=m.label_file,
                severity="warning",
            )
        )
    return faults


def _left_out(label_map: LabelMap, named: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    """Classes that a run leaves out of those that the datalist names; none where its own are not among them."""
    regions = dict(zip(label_map.names, label_map.values, strict=True))
    if any(set(named.get(name, ())) != set(values) for name, values in regions.items()):
        return {}
    ignored = label_map.ignore_label
    return {name: values for name, values in named.items() if name not in regions and ignored not in values}


def check_channels(measured: Sequence[Measured]) -> list[Fault]:
    """Cases with another number of channels than most."""
    sound = [m for m in measured if not m.stats.is_faulty]
    counts = Counter(m.stats.num_channels for m in sound)
    if len(counts) < 2:
        return []
    usual, num = counts.most_common(1)[0]
    return [
        Fault(
            kind="channels",
            finding=f"{counted(m.stats.num_channels, 'channel')} where {counted(num, 'case')} {_have(num)} {usual}",
            remedy="Give every case the same channels, or leave it out.",
            case=m.case.name,
            file=m.files[0],
        )
        for m in sound
        if m.stats.num_channels != usual
    ]


def check_slices(measured: Sequence[Measured]) -> list[Fault]:
    """Single slices among volumes, such as localizers. Where there are no volumes, slices are the data."""
    sound = [m for m in measured if not m.stats.is_faulty]
    thin = [m for m in sound if min(m.stats.shape) == 1]
    if len(thin) == len(sound):
        return []
    return [
        Fault(
            kind="not_3d",
            finding=f"shape {m.stats.shape} is a single slice, and other cases are volumes",
            remedy="Stack the slices of a scan into one file, or leave it out.",
            case=m.case.name,
            file=m.files[0],
        )
        for m in thin
    ]


def check_value_names(measured: Sequence[Measured]) -> list[Fault]:
    """Label maps that give a value another name than most, or a name another value: Slicer numbers segments anew.

    Only files that name their values are opened; where names decide, there is nothing to compare.
    """
    labels = [(m, m.case.label) for m in measured if m.case.label is not None and not m.case.segment_values]
    named = [(m, names) for m, label in labels if (names := value_names(label))]
    counts = Counter(pair for _, names in named for pair in names.items())
    value_of, name_of = {}, {}
    for (value, name), _ in counts.most_common():  # the most common first
        if value not in name_of and name not in value_of:
            name_of[value], value_of[name] = name, value
    faults = []
    for m, names in named:
        odd = [(value, name) for value, name in sorted(names.items()) if name_of.get(value) != name]
        if odd:
            value, name = odd[0]
            usual = f"{name!r} is {value_of[name]}" if name in value_of else f"{value} is {name_of[value]!r}"
            faults.append(
                Fault(
                    kind="label_names",
                    finding=f"its segment {name!r} has the value {value}, where in other labels {usual}",
                    remedy="Give segments the same names and values in all labels, and export it again.",
                    case=m.case.name,
                    file=m.label_file,
                )
            )
    return faults


def check_duplicates(measured: Sequence[Measured]) -> list[Fault]:
    """The same image under two names; a fault where one teaches and the other is scored."""
    faults = []
    groups: dict[str, list[Measured]] = defaultdict(list)
    for m in measured:
        if m.stats.identity and not m.stats.is_faulty:
            groups[m.stats.identity].append(m)
    for group in groups.values():
        first = group[0]
        for m in group[1:]:
            leaks = _leaks(first, m)
            may_leak = (first.role == "unlabeled") != (m.role == "unlabeled")
            what = f"the same image as {first.case.name}"
            if leaks or may_leak:
                what += f", which is in {first.place} while this one is in {m.place}"
            remedy = "Leave one of them out"
            remedy += "; a model would be scored on what it learned from" if leaks else " of the datalist"
            remedy += ": where unlabeled images join the training, they are learned from" if may_leak else ""
            faults.append(
                Fault(
                    kind="duplicate",
                    finding=what,
                    remedy=f"{remedy}.",
                    case=m.case.name,
                    file=m.files[0],
                    severity="fault" if leaks else "warning",
                )
            )
    return faults


def check_shared_labels(measured: Sequence[Measured]) -> list[Fault]:
    """One label file for several images: a fault where all of them have it, since then nothing was drawn for each."""
    faults = []
    groups: dict[str, list[Measured]] = defaultdict(list)
    for m in measured:
        if m.label_file:
            groups[m.label_file].append(m)
    for file, (first, *others) in groups.items():
        if not others:
            continue
        names = some_of(m.case.name for m in others)
        if len(groups) == 1:
            faults.append(
                Fault(
                    kind="shared_label",
                    finding=f"{file} is the label of all {len(others) + 1} cases",
                    remedy="Give each image the label that was drawn on it.",
                )
            )
        else:
            faults.append(
                Fault(
                    kind="shared_label",
                    finding=f"the label is also that of {names}",
                    remedy="That is right for images of one patient on one grid alone; else give each its own.",
                    case=first.case.name,
                    file=file,
                    severity="warning",
                )
            )
    return faults


def check_patients(measured: Sequence[Measured]) -> list[Fault]:
    """A patient in two folds, or in training and testing."""
    faults = []
    groups: dict[str, list[Measured]] = defaultdict(list)
    for m in measured:
        if m.case.group is not None:
            groups[m.case.group].append(m)
    for patient, group in groups.items():
        first = group[0]
        for m in group[1:]:
            if _leaks(first, m):
                faults.append(
                    Fault(
                        kind="patient",
                        finding=f"patient {patient} is in {m.place} and, as {first.case.name}, in {first.place}",
                        remedy="Put all cases of a patient in one fold; remove `fold` to have folds made.",
                        case=m.case.name,
                    )
                )
    return faults


def check_likely_groups(measured: Sequence[Measured]) -> list[Fault]:
    """Cases that look like parts of one thing by their names and are split, where not all of them have a group."""
    scored = [m for m in measured if m.role != "unlabeled"]
    likely = likely_groups([m.case.name for m in scored])
    groups: dict[str, list[Measured]] = defaultdict(list)
    for m in scored:
        if (group := m.case.group or likely.of.get(m.case.name)) is not None:
            groups[group].append(m)
    split = [
        group
        for group in groups.values()
        if any(_leaks(group[0], m) for m in group) and any(m.case.group is None for m in group)
    ]
    if not split:
        return []
    first = split[0][0]
    other = next(m for m in split[0] if _leaks(first, m))
    remedy = "If they are, scores are too good. "
    if len(split[0]) < len(scored):
        remedy += (
            "Give each case its `group` in the datalist, and no `fold`, to have folds made that keep groups whole; "
        )
        remedy += "`autoseg init` writes such a list."
    else:
        remedy += "No folds can keep them whole: score on cases of another one, in `testing`."
    num, of = counted(sum(map(len, split)), "case"), counted(len(split), "patient or object", "patients or objects")
    return [
        Fault(
            kind="patient",
            finding=f"{num} look like {likely.kind} of {of}, and are split, such as {first.case.name} in "
            f"{first.place} and {other.case.name} in {other.place}",
            remedy=remedy,
            severity="warning",
        )
    ]


def check_meta(measured: Sequence[Measured]) -> list[Fault]:
    """Values of a further key that seem to be one, spelt twice: they would be two groups."""
    texts: dict[str, Counter[str]] = defaultdict(Counter)
    for m in measured:
        for key, value in m.case.meta.items():
            texts[key][text_of(value)] += 1
    return [
        Fault(
            kind="metadata",
            finding=f"{key}: {first!r} ({counted(of[first], 'case')}) and {second!r} ({of[second]}) seem to be one",
            remedy="Spell them alike, or they are two groups.",
            severity="warning",
        )
        for key, of in texts.items()
        for first, second in alike(of)
    ]


def check_class_counts(measured: Sequence[Measured], label_map: LabelMap, num_fold: int) -> list[Fault]:
    """Classes that occur in no case, or in fewer than there are folds."""
    training = [m for m in measured if m.role == "training" and not m.stats.is_faulty]
    if not training:
        return []
    faults = []
    having = Counter(n for m in training for n in m.present(label_map))
    num_having = {n: having[n] for n in label_map.names}
    never = [n for n, num in num_having.items() if num == 0]
    if never:
        faults.append(
            Fault(
                kind="few_cases",
                finding=f"{counted(len(never), 'class', 'classes')} in no training case: {some_of(never)}",
                remedy="What does not occur cannot be learned. Check class_names and the labels, or leave it out.",
                severity="warning",
            )
        )
    few = [f"{name} (in {num})" for name, num in num_having.items() if 0 < num < num_fold]
    if few:
        found = "occurs" if len(few) == 1 else "occur"
        faults.append(
            Fault(
                kind="few_cases",
                finding=f"{counted(len(few), 'class', 'classes')} {found} in fewer training cases than the {num_fold} "
                f"folds: {some_of(few)}",
                remedy="Some folds cannot score what is so rare. Use fewer folds, or add cases.",
                severity="warning",
            )
        )
    return faults


def _leaks(a: Measured, b: Measured) -> bool:
    """Whether a model that learns from one of two cases could be scored on the other.

    What is learned from unlabeled cases is the strategy's to say: where they join, `pseudolabel.rounds` looks at their
    patients.
    """
    if "unlabeled" in (a.role, b.role):
        return False
    if a.role == b.role == "training":
        return a.case.fold != b.case.fold
    return "training" in (a.role, b.role)


def _have(number: int) -> str:
    return "has" if number == 1 else "have"
