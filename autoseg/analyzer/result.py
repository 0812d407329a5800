"""What an analysis found, for programs and for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from autoseg.analyzer import label_groups as groups_of
from autoseg.analyzer.faults import Fault, fault_lines
from autoseg.data.datastats import DataStats
from autoseg.data.fingerprint import Fingerprint, LabelGroup
from autoseg.data.labels import LabelMap

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
    annotated: dict[str, tuple[str, ...]]
    """Labelled case of any role -> the classes it was annotated for; one that is annotated for all is left out."""
    hint: str
    """What to set where labels look partial and nothing was declared; else empty."""
    label_map: LabelMap | None
    """None where there is no label."""
    datastats: dict[str, Any]
    """Content of datastats.yaml; empty where no case is sound."""
    num_cases: dict[str, int]
    """Role -> cases in the datalist."""
    num_read: int
    """Cases that were read now; the others were known."""
    seconds: float

    @property
    def fingerprint(self) -> Fingerprint | None:
        """What plans are made of; None where no training case is sound."""
        if not self.datastats or not self.num_cases["training"]:
            return None
        return Fingerprint.of(DataStats.model_validate(self.datastats))

    def summary(self) -> dict[str, Any]:
        """The summary for scripts, plain data."""
        return {
            "cases": self.num_cases,
            "read": self.num_read,
            "seconds": round(self.seconds, 3),
            "label_groups": plain_groups(self.label_groups),
            "occurring_groups": plain_groups(self.occurring_groups),
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
        for title, faults in (("Faults", self.faults), ("Warnings", self.warnings)):
            if faults:
                lines += ["", f"{title} ({len(faults)}):", *(f"- {line}" for line in fault_lines(faults))]
        if self.quarantined:
            lines += ["", f"Set aside: {', '.join(self.quarantined)}"]
        return "\n".join(lines)


def plain_groups(groups: Sequence[LabelGroup]) -> list[dict[str, Any]]:
    """Label groups as plain data."""
    return [
        {"num_cases": len(g.cases), "num_classes": len(g.classes), "classes": list(g.classes), "cases": list(g.cases)}
        for g in groups
    ]


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
    if data_set["frame_rule"]:
        lines.append(f"axes: {data_set['frame_rule']}")
    for number, channel in enumerate(data_set["foreground_intensity"]):
        if channel["num_voxels"]:
            low, mid, high = (f"{channel[k]:.4g}" for k in ("percentile_00_5", "median", "percentile_99_5"))
            lines.append(f"foreground of channel {number}: {low} to {high} (0.5 to 99.5 %), median {mid}")
    lateral = data_set["lateral"]
    if lateral["pairs"]:
        lines.append(f"left and right: {lateral['pairs_rule']}")
    if lateral["unsure"]:
        why = f"nothing is mirrored along X, unless lateral_pairs or mirror_axes say so: {lateral['unsure_rule']}"
        lines.append(f"left and right: {why}")
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
