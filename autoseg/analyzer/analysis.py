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
from autoseg.analyzer.axes import check_axes, find_axes
from autoseg.analyzer.case import CaseStats
from autoseg.analyzer.faults import (
    Fault,
    Measured,
    Role,
    check_channels,
    check_class_counts,
    check_duplicates,
    check_files,
    check_labels,
    check_likely_groups,
    check_meta,
    check_patients,
    check_shared_labels,
    check_slices,
    check_value_names,
)
from autoseg.analyzer.lateral import Lateral, check_lateral, find_lateral
from autoseg.analyzer.outliers import check_outliers, check_ranges, check_sides
from autoseg.analyzer.result import HINT, Analysis, plain_groups
from autoseg.analyzer.store import Store
from autoseg.analyzer.summary import case_entry, data_set_entry, stats_summary
from autoseg.analyzer.units import check_intensities, check_spacing
from autoseg.analyzer.workers import Task, measure
from autoseg.analyzer.yaml_text import yaml_text
from autoseg.config.settings import Settings
from autoseg.data.datalists.cases import Case, Datalist
from autoseg.data.fingerprint import LabelGroup
from autoseg.data.formats.table import image_signature
from autoseg.data.labels import LabelMap, annotated_classes, make_label_map
from autoseg.errors import ConfigError, DataError, counted
from autoseg.terminal import Progress
from autoseg.workspace.digests import DIGESTS, FileSignature
from autoseg.workspace.files import digest, write_json, write_text
from autoseg.workspace.workspace import Workspace

logger = logging.getLogger(__name__)

READING_SHARE = 0.6
"""Of the time a case takes, reading and unpacking it; the rest is statistics (int16 CT as .nii.gz, on two cores)."""


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
    DIGESTS.open(workspace.digests)
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
    if datalist.training and not analysis.datastats:
        raise DataError("No training case is sound: " + "; ".join(map(str, analysis.faults)))
    return analysis


@dataclass(frozen=True, slots=True, kw_only=True)
class _Listed:
    """A case of the list with its files as they are now."""

    case: Case
    role: Role
    kind: str
    """Which files are what, and what else its statistics depend on."""
    signatures: tuple[FileSignature, ...] | None
    """None where a file is missing."""

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(size for _, size, _, _ in self.signatures or ())

    @property
    def known_digests(self) -> tuple[str, ...] | None:
        """What the files hold, where that is known without reading them."""
        digests = [DIGESTS.known.get(signature, "") for signature in self.signatures or ()]
        return tuple(digests) if digests and all(digests) else None


def _listed(datalist: Datalist, ignore_label: int | None) -> list[_Listed]:
    cases: list[tuple[Case, Role]] = [
        *((c, "training") for c in datalist.training),
        *((c, "validation") for c in datalist.validation),
        *((c, "testing") for c in datalist.testing),
        *((c, "unlabeled") for c in datalist.unlabeled),
    ]
    listed = []
    for case, role in cases:
        kind = f"{len(case.images)} {'label' if case.label is not None else 'bare'} ignore {ignore_label}"
        kind += f" segments {digest([case.segment_values])}" if case.segment_values else ""
        try:
            signatures = tuple(map(image_signature, _files(case)))
        except OSError:
            signatures = None
        listed.append(_Listed(case=case, role=role, kind=kind, signatures=signatures))
    return listed


def _measure(datalist: Datalist, settings: Settings, store_path: Path, progress: bool) -> tuple[list[Measured], int]:
    """Statistics of every case, from the store or from its files; and how many were read."""
    root = Path(os.path.abspath(settings.dataroot))
    ignore = settings.ignore_label if settings.ignore_label is not None else datalist.ignore_label
    listed = _listed(datalist, ignore)
    store = Store(store_path)
    stats: list[CaseStats | None] = []
    tasks = []
    for number, item in enumerate(listed):
        digests = item.known_digests
        known = None if digests is None else store.find(item.kind, digests)
        stats.append(known)
        if known is None:
            tasks.append(
                Task(
                    number=number,
                    images=item.case.images,
                    label=item.case.label,
                    ignore_label=ignore,
                    num_bytes=sum(item.sizes),
                    segment_values=item.case.segment_values,
                    known_digests=store.candidates(item.kind, item.sizes) if item.signatures else frozenset(),
                )
            )
    num_read = 0
    bar = _Bar(tasks, listed, shown=progress)
    try:
        for result in measure(tasks, settings.num_workers, bar.read):
            item = listed[result.number]
            # Only of files that are all there, and all of which were read to their end.
            if item.signatures is not None and len(result.digests) == len(item.signatures):
                DIGESTS.add(zip(item.signatures, result.digests, strict=True))
                if result.stats is not None:
                    store.add(item.kind, item.sizes, result.digests, result.stats)
            num_read += result.stats is not None
            stats[result.number] = result.stats or store.find(item.kind, result.digests)
            bar.measured(result.number)
    finally:
        bar.close()
    store.tidy()
    measured = []
    for item, case_stats in zip(listed, stats, strict=True):
        assert case_stats is not None, "every case is known or was a task"
        names = tuple(_relative(f, root) for f in _files(item.case))
        measured.append(Measured(case=item.case, role=item.role, stats=case_stats, files=names))
    return measured, num_read


class _Bar(Progress):
    """How far the analysis is: by bytes, since one case may be as long as a hundred others."""

    def __init__(self, tasks: Sequence[Task], listed: Sequence[_Listed], *, shown: bool) -> None:
        super().__init__("analyze", float(sum(t.num_bytes for t in tasks)) or 1.0, unit="", shown=shown)
        self.num_cases, self.num_measured = len(tasks), 0
        self._listed, self._read, self._measured = listed, 0, 0

    def read(self, num_bytes: int) -> None:
        """So many more bytes of files were read."""
        self._read += num_bytes
        of_open_cases = READING_SHARE * max(0, self._read - self._measured)
        far = min(self._measured + of_open_cases, self.total)
        self.to(max(far, self.done), f"{self.num_measured} of {self.num_cases} cases")

    def measured(self, number: int) -> None:
        """A case is done."""
        self.num_measured += 1
        self._measured += sum(self._listed[number].sizes)
        self.read(0)


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
    label_map, judged = _judge_labels(measured, datalist, settings)
    axes = find_axes(measured)
    judged += check_channels(measured) + check_slices(measured) + check_duplicates(measured)
    judged += check_spacing(measured) + check_meta(measured)
    judged += check_patients(measured) + check_likely_groups(measured) + check_shared_labels(measured)
    bad = {f.case for f in judged if f.severity == "fault" and f.case}
    sound = [m for m in measured if m.case.name not in bad]
    judged += check_axes(axes.of(sound), axes) + check_outliers(axes.of(sound))
    judged += check_ranges(sound, settings.modality) + check_intensities(sound, settings)
    training = [m for m in sound if m.role == "training"] or [m for m in sound if not datalist.training]
    settled: dict[str, tuple[str, ...]] = {}
    partly: dict[str, tuple[str, ...]] = {}  # cases that are not annotated for all classes
    occurring: dict[str, tuple[str, ...]] = {}
    lateral = Lateral() if label_map is None else find_lateral(training, label_map)
    if label_map is not None:
        judged += check_class_counts(sound, label_map, datalist.num_fold) + check_sides(sound, label_map)
        judged += check_lateral(lateral, settings.lateral_pairs)
        settled = _settled_classes(sound, label_map, settings)
        partly = {name: classes for name, classes in settled.items() if classes != label_map.names}
        occurring = {m.case.name: m.present(label_map) for m in training if m.stats.classes}
        judged += _check_declarations(training, settings)
    annotated = {name: settled[name] for name in occurring}
    groups, occurring_groups = groups_of.group_cases(annotated), groups_of.group_cases(occurring)
    faults, warnings = (tuple(f for f in judged if f.severity == s) for s in ("fault", "warning"))
    datastats: dict[str, Any] = {}
    training = axes.of(training)
    if training:
        datastats = {
            "stats_summary": stats_summary(training),
            "data_set": data_set_entry(training, label_map, annotated, lateral, axes),
            "label_groups": plain_groups(groups),
            "occurring_groups": plain_groups(occurring_groups),
            **_plain_faults(faults, warnings),
        }
    analysis = Analysis(
        faults=faults,
        warnings=warnings,
        quarantined=tuple(m.case.name for m in measured if m.case.name in bad),
        label_groups=groups,
        occurring_groups=occurring_groups,
        annotated=partly,
        hint=_hint(training, occurring_groups, label_map, settings),
        label_map=label_map,
        datastats=datastats,
        num_cases={role: len(getattr(datalist, role)) for role in ("training", "validation", "testing", "unlabeled")},
        num_read=num_read,
        seconds=0.0,
    )
    return analysis, [case_entry(m, annotated.get(m.case.name)) for m in training]


def _hint(
    training: Sequence[Measured],
    occurring_groups: Sequence[LabelGroup],
    label_map: LabelMap | None,
    settings: Settings,
) -> str:
    """What to set where labels look partial and nobody said so; else nothing."""
    if label_map is None or settings.partial_labels != "off" or any(m.case.annotated is not None for m in training):
        return ""
    return HINT if groups_of.look_partial(occurring_groups, label_map.names) else ""


def _judge_labels(
    measured: Sequence[Measured], datalist: Datalist, settings: Settings
) -> tuple[LabelMap | None, list[Fault]]:
    """The classes, None where no case has a label, and the faults of files and labels.

    Raises:
        ConfigError: The classes contradict each other.
    """
    faults = check_files(measured) + check_value_names(measured)
    if all(m.case.label is None for m in measured):
        return None, faults
    values = sorted({v for m in measured for v in m.values})
    try:
        label_map = _label_map(settings, datalist, values)
    except ConfigError as error:
        if set(values) - {0}:
            raise
        if values:
            faults.append(Fault(kind="empty_label", finding="every label is empty", remedy=str(error)))
        return None, faults
    named = {n: (v,) for v, n in datalist.labels.items()} | datalist.regions
    return label_map, faults + check_labels(measured, label_map, named if settings.class_names else {})


def _settled_classes(sound: Sequence[Measured], label_map: LabelMap, settings: Settings) -> dict[str, tuple[str, ...]]:
    """Case -> the classes that its annotators looked for."""
    return {
        m.case.name: annotated_classes(m.case.annotated, m.present(label_map), label_map.names, settings.partial_labels)
        for m in sound
        if m.stats.classes
    }


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


def _write(analysis: Analysis, by_case: Sequence[Mapping[str, Any]], workspace: Workspace) -> None:
    if analysis.datastats:
        text = yaml_text(analysis.datastats)
        write_text(workspace.datastats, text)
        head = yaml_text({"stats_summary": analysis.datastats["stats_summary"]})
        write_text(workspace.datastats_by_case, head + yaml_text({"stats_by_cases": list(by_case)}))
    write_json(
        workspace.faults,
        _plain_faults(analysis.faults, analysis.warnings),
    )


def _plain_faults(faults: Sequence[Fault], warnings: Sequence[Fault]) -> dict[str, Any]:
    return {"faults": [asdict(f) for f in faults], "warnings": [asdict(w) for w in warnings]}
