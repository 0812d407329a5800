"""The analysis of a data set, from its files to datastats.yaml: measure every case, judge, group, write.

Datalist -> Measured (one per case, from the store or its files) -> Fault -> Analysis -> three files in work_dir.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from autoseg.analyzer import label_groups as groups_of
from autoseg.analyzer.faults import (
    Fault,
    Measured,
    Role,
    check_channels,
    check_class_counts,
    check_duplicates,
    check_files,
    check_labels,
    check_patients,
    counted,
)
from autoseg.analyzer.outliers import check_outliers, check_sides
from autoseg.analyzer.store import Signature, Store, signature
from autoseg.analyzer.summary import case_entry, data_set_entry, stats_summary
from autoseg.analyzer.workers import Progress, Task, measure
from autoseg.analyzer.yaml_text import yaml_text
from autoseg.config import Settings
from autoseg.data.datalist import Case, Datalist
from autoseg.data.fingerprint import Fingerprint, LabelGroup
from autoseg.data.labels import LabelMap, annotated_classes, make_label_map
from autoseg.errors import ConfigError, DataError
from autoseg.workspace import Workspace, write_json, write_text

logger = logging.getLogger(__name__)

HINT = (
    "The labels look partial: the groups above carry different classes, and nothing says whether a class that does "
    "not occur is absent or was not annotated. Set `partial_labels: infer` in input.yaml to take the classes that "
    "occur in a case as those it was annotated for, or give each case `annotated: [names]` in the datalist and set "
    "`partial_labels: declared`. With `off`, unannotated classes are learned as background."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """What the analysis found."""

    faults: tuple[Fault, ...]
    warnings: tuple[Fault, ...]
    quarantined: tuple[str, ...]
    """Names of the cases that have faults and are set aside."""
    label_groups: tuple[LabelGroup, ...]
    """Training cases by the classes they were annotated for, largest group first."""
    occurring_groups: tuple[LabelGroup, ...]
    """Training cases by the classes that occur in them."""
    hint: str
    """What to set where labels look partial and nothing was declared; else empty."""
    label_map: LabelMap | None
    """None where there is no label."""
    fingerprint: Fingerprint | None
    """None where no training case is sound."""
    datastats: dict[str, Any]
    """Content of datastats.yaml; empty where no case is sound."""
    num_cases: dict[str, int]
    """Role -> cases in the datalist."""
    num_read: int
    """Cases that were read now; the others were known."""
    seconds: float

    def summary(self) -> dict[str, Any]:
        """The summary for scripts, plain data."""
        return {
            "cases": self.num_cases,
            "read": self.num_read,
            "seconds": round(self.seconds, 3),
            "label_groups": _plain_groups(self.label_groups),
            "occurring_groups": _plain_groups(self.occurring_groups),
            "hint": self.hint,
            "quarantined": list(self.quarantined),
            "faults": [asdict(f) for f in self.faults],
            "warnings": [asdict(w) for w in self.warnings],
            "data_set": self.datastats.get("data_set", {}),
        }

    def text(self) -> str:
        """The summary for people."""
        cases = ", ".join(f"{num} {role}" for role, num in self.num_cases.items() if num)
        lines = [f"{cases or 'no cases'}; {self.num_read} read, {self.seconds:.1f} s"]
        data_set = self.datastats.get("data_set")
        if data_set:
            lines += _lines_on(data_set)
        groups = self.label_groups if len(self.label_groups) > 1 else self.occurring_groups
        if groups:
            lines += ["", *groups_of.table(groups, self.num_cases.get("unlabeled", 0))]
        if self.hint:
            lines += ["", self.hint]
        for title, found in (("Faults", self.faults), ("Warnings", self.warnings)):
            if found:
                lines += ["", f"{title} ({len(found)}):", *(f"- {f}" for f in found)]
        if self.quarantined:
            lines += ["", f"Set aside: {', '.join(self.quarantined)}"]
        return "\n".join(lines)


def analyze(
    datalist: Datalist, settings: Settings, workspace: Workspace, *, progress: bool = True, strict: bool = True
) -> Analysis:
    """Analyse a data set and write datastats.yaml, datastats_by_case.yaml and faults.json.

    Cases that were read before, and have not changed, are not read again.

    Args:
        progress: whether to show how far it is.
        strict: whether faults are raised; else they are in the result alone.

    Raises:
        DataError: Faults, all at once, unless settings.on_fault is "skip"; or no training case is left.
        ConfigError: The classes contradict each other.
    """
    start = time.monotonic()
    if settings.class_names or datalist.labels or datalist.regions:
        _label_map(settings, datalist, ())  # contradictions are told before anything is read
    measured, num_read = _measure(datalist, settings, workspace.root / "analysis" / "cases.jsonl", progress)
    analysis, by_case = _judge(measured, datalist, settings, num_read)
    analysis = replace(analysis, seconds=time.monotonic() - start)
    _write(analysis, by_case, workspace)
    if not strict:
        return analysis
    stop = [str(f) for f in analysis.faults if settings.on_fault == "stop" or not f.case]
    if stop:
        raise DataError(stop)
    if datalist.training and analysis.fingerprint is None:
        raise DataError("No training case is sound: " + "; ".join(map(str, analysis.faults)))
    return analysis


def _measure(datalist: Datalist, settings: Settings, store_path: Path, progress: bool) -> tuple[list[Measured], int]:
    """Statistics of every case, from the store or from its files; and how many were read."""
    root = Path(os.path.abspath(settings.dataroot))
    ignore = settings.ignore_label if settings.ignore_label is not None else datalist.ignore_label
    cases: list[tuple[Case, Role]] = [
        *((c, "training") for c in datalist.training),
        *((c, "validation") for c in datalist.validation),
        *((c, "testing") for c in datalist.testing),
        *((c, "unlabeled") for c in datalist.unlabeled),
    ]
    store = Store(store_path)
    signatures: list[Signature | None] = []
    kinds: list[str] = []
    stats = []
    tasks = []
    for number, (case, _) in enumerate(cases):
        files = _files(case)
        kind = f"{len(case.images)} {'label' if case.label is not None else 'bare'} ignore {ignore}"
        mine = signature(files)
        known = store.find(kind, mine) if mine is not None else None
        signatures.append(mine)
        kinds.append(kind)
        stats.append(known)
        if known is None:
            digests = store.digests(kind, mine) if mine is not None else frozenset()
            tasks.append(
                Task(
                    number=number,
                    images=case.images,
                    label=case.label,
                    ignore_label=ignore,
                    num_bytes=sum(s[1] for s in mine or ()),
                    known_digests=digests,
                )
            )
    num_read = 0
    bar = Progress(len(tasks), shown=progress)
    try:
        for result in measure(tasks, settings.num_workers):
            mine, kind = signatures[result.number], kinds[result.number]
            if result.stats is None:
                assert mine is not None, "only files that are there have digests"
                stats[result.number] = store.find_content(kind, mine, result.digests)
            else:
                num_read += 1
                stats[result.number] = result.stats
                if mine is not None and len(result.digests) == len(mine):
                    store.add(kind, mine, result.digests, result.stats)
            bar.step()
    finally:
        bar.close()
    store.tidy()
    measured = []
    for (case, role), found in zip(cases, stats, strict=True):
        assert found is not None, "every case is known or was a task"
        names = tuple(_relative(f, root) for f in _files(case))
        measured.append(Measured(case=case, role=role, stats=found, files=names))
    return measured, num_read


def _files(case: Case) -> tuple[Path, ...]:
    return (*case.images, *(() if case.label is None else (case.label,)))


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


def _label_map(settings: Settings, datalist: Datalist, values: Sequence[int]) -> LabelMap:
    return make_label_map(
        settings, datalist.labels, values, regions=datalist.regions, ignore_label=datalist.ignore_label
    )


def _judge(
    measured: Sequence[Measured], datalist: Datalist, settings: Settings, num_read: int
) -> tuple[Analysis, list[dict[str, Any]]]:
    """Everything that is known once all cases are: faults, groups, statistics; and the cases' entries."""
    found = check_files(measured)
    label_map = None
    values = sorted({v for m in measured for v in m.values})
    if any(m.case.label is not None for m in measured):
        try:
            label_map = _label_map(settings, datalist, values)
            found += check_labels(measured, label_map)
        except ConfigError as error:
            if values and set(values) - {0}:
                raise
            if values:
                found.append(Fault(kind="empty_label", finding="every label is empty", remedy=str(error)))
    found += check_channels(measured) + check_duplicates(measured) + check_patients(measured)
    bad = {f.case for f in found if f.severity == "fault" and f.case}
    sound = [m for m in measured if m.case.name not in bad]
    found += check_outliers(sound)
    if label_map is not None:
        found += check_class_counts(sound, label_map, datalist.num_fold) + check_sides(sound, label_map)
    training = [m for m in sound if m.role == "training"] or [m for m in sound if not datalist.training]
    occurring: dict[str, tuple[str, ...]] = {}
    annotated: dict[str, tuple[str, ...]] = {}
    if label_map is not None:
        occurring = {m.case.name: m.present(label_map) for m in training if m.stats.classes}
        declared = {m.case.name: m.case.annotated for m in training}
        annotated = {
            name: annotated_classes(declared[name], present, label_map.names, settings.partial_labels)
            for name, present in occurring.items()
        }
        found += _check_declarations(training, settings)
    groups, occurring_groups = groups_of.group_cases(annotated), groups_of.group_cases(occurring)
    silent = settings.partial_labels == "off" and all(m.case.annotated is None for m in training)
    partial = label_map is not None and groups_of.look_partial(occurring_groups, label_map.names)
    faults = tuple(f for f in found if f.severity == "fault")
    warnings = tuple(f for f in found if f.severity == "warning")
    datastats: dict[str, Any] = {}
    by_case: list[dict[str, Any]] = []
    if training:
        datastats = {
            "stats_summary": stats_summary(training),
            "data_set": data_set_entry(training, label_map, annotated),
            "label_groups": _plain_groups(groups),
            "occurring_groups": _plain_groups(occurring_groups),
            "faults": [asdict(f) for f in faults],
            "warnings": [asdict(w) for w in warnings],
        }
        by_case = [case_entry(m, annotated.get(m.case.name)) for m in training]
    return Analysis(
        faults=faults,
        warnings=warnings,
        quarantined=tuple(m.case.name for m in measured if m.case.name in bad),
        label_groups=groups,
        occurring_groups=occurring_groups,
        hint=HINT if silent and partial else "",
        label_map=label_map,
        fingerprint=Fingerprint.of(datastats) if training and datalist.training else None,
        datastats=datastats,
        num_cases={role: len(getattr(datalist, role)) for role in ("training", "validation", "testing", "unlabeled")},
        num_read=num_read,
        seconds=0.0,
    ), by_case


def _check_declarations(training: Sequence[Measured], settings: Settings) -> list[Fault]:
    """Declarations in the datalist that the setting leaves unused."""
    num = sum(m.case.annotated is not None for m in training)
    if not num or settings.partial_labels != "off":
        return []
    return [
        Fault(
            kind="annotated",
            finding=f"the datalist declares annotated classes for {counted(num, 'case')}, but partial_labels is off",
            remedy="Set `partial_labels: declared`; until then every case counts as annotated for all classes.",
            severity="warning",
        )
    ]


def _plain_groups(groups: Sequence[LabelGroup]) -> list[dict[str, Any]]:
    return [
        {"num_cases": len(g.cases), "num_classes": len(g.classes), "classes": list(g.classes), "cases": list(g.cases)}
        for g in groups
    ]


def _write(analysis: Analysis, by_case: Sequence[Mapping[str, Any]], workspace: Workspace) -> None:
    if analysis.datastats:
        text = yaml_text(analysis.datastats)
        write_text(workspace.datastats, text)
        head = yaml_text({"stats_summary": analysis.datastats["stats_summary"]})
        write_text(workspace.datastats_by_case, head + yaml_text({"stats_by_cases": list(by_case)}))
    write_json(
        workspace.faults,
        {"faults": [asdict(f) for f in analysis.faults], "warnings": [asdict(w) for w in analysis.warnings]},
    )


def _lines_on(data_set: Mapping[str, Any]) -> list[str]:
    """The data set's geometry, intensities and classes in a few lines."""

    def triple(values: Sequence[float]) -> str:
        return "x".join(f"{v:.4g}" for v in values)

    lines = []
    for key, what in (("shape", "voxels"), ("spacing_mm", "spacing in mm"), ("size_mm", "field of view in mm")):
        figures = data_set[key]
        low, median, high = (triple(figures[k]) for k in ("min", "median", "max"))
        lines.append(f"{what}: {median}" + ("" if low == high else f" (from {low} to {high})"))
    lines.append("orientation: " + ", ".join(f"{o} {n}" for o, n in data_set["orientations"].items()))
    for number, channel in enumerate(data_set["foreground_intensity"]):
        if channel["num_voxels"]:
            low, mid, high = (f"{channel[k]:.4g}" for k in ("percentile_00_5", "median", "percentile_99_5"))
            lines.append(f"foreground of channel {number}: {low} to {high} (0.5 to 99.5 %), median {mid}")
    classes = data_set["classes"]
    if classes:
        width = max(len(c["name"]) for c in classes)
        lines += ["", f"{'class':{width}} | cases | median ml | components | share of voxels"]
    for c in classes:
        volume = f"{c['volume_ml']['median']:9.3g}" if c["volume_ml"] else " " * 9
        parts = f"{c['num_components']['median']:10.3g}" if c["num_components"] else " " * 10
        share = f"{100 * c['voxel_fraction']:.3g} %"
        lines.append(f"{c['name']:{width}} | {c['num_cases']:5d} | {volume} | {parts} | {share}")
    return lines
