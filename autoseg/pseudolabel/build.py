"""The stage `pseudolabel`: predict what is missing, judge it, write the labels and the list of the next round.

Every case is predicted once (`predicted/`, `confidence/`, `evidence/`) and completed once (`labels/`); each file is
written whole, and its digest of origins last, so that a stage that was killed goes on and ends with the same labels.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import JsonValue

from autoseg.config.settings import Settings
from autoseg.data.datalists.cases import Case, Datalist, case_digest, read_case_label
from autoseg.data.datalists.completed import read_completed
from autoseg.data.datalists.datalist import read_datalist, write_datalist
from autoseg.data.datastats import StatsByCase
from autoseg.data.labels import UNSURE_VALUE, LabelMap
from autoseg.data.volumes import read_label, write_volume
from autoseg.errors import DataError, ResourceError, WorkspaceError, counted
from autoseg.evaluation.score_files import Scores
from autoseg.inference.ensemble_spec import EnsembleSpec, check_ensemble
from autoseg.inference.predictor import Predictor, model_digest
from autoseg.pseudolabel.audit import Audit, AuditRow, audit_json, make_row
from autoseg.pseudolabel.complete import complete_label, voxel_weights
from autoseg.pseudolabel.evidence import ClassEvidence, Prediction, predict_case
from autoseg.pseudolabel.judge import judge
from autoseg.pseudolabel.rounds import How, cases_to_fill, later_round
from autoseg.version import __version__
from autoseg.workspace.files import digest, write_json
from autoseg.workspace.stored import Stored, read_stored, write_stored
from autoseg.workspace.workspace import Workspace

log = logging.getLogger(__name__)
Progress = Callable[[int, int, str], None]
"""Called with the number of cases done, of all, and the name of the one just done."""

VERSION = 4
"""Raised whenever the meaning of a stored prediction or label changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PseudolabelResult:
    """What the stage came to."""

    text: str
    """A row per class: cases accepted and rejected, with the reasons."""
    joined: tuple[str, ...]
    """Unlabeled cases that train in the next round."""
    failures: tuple[str, ...]
    """Cases that could not be predicted, with the reason."""


def class_dice(source: Workspace) -> dict[str, float | None]:
    """Out-of-fold Dice of each class by a round's ensemble.

    Raises:
        WorkspaceError: The round has no ensemble yet.
    """
    if not source.ensemble_spec.exists():
        raise WorkspaceError(
            f"{source.root}: no ensemble yet to label the other cases with. Run `autoseg ensemble` or `autoseg run`."
        )
    return {c.name: c.mean for c in read_stored(source.scores, Scores).chosen_candidate.classes}


def stage_inputs(source: Workspace, datalist: Datalist, settings: Settings, label_map: LabelMap) -> dict[str, str]:
    """What the pseudo-labels of a round are made from: name -> digest.

    Args:
        source: the round whose models label.
        datalist: the run's own.

    Raises:
        WorkspaceError: `source` has no ensemble yet.
    """
    how = How.of(settings)
    dice = class_dice(source)
    inputs = {f"model {a}_{f}": model_digest(source, a, f) for a, f in _members(source)}
    inputs["settings of pseudo-labels"] = digest([asdict(how), settings.seed])
    inputs["version of pseudo-labels"] = str(VERSION)
    inputs["classes"] = digest([label_map.names, label_map.values, label_map.ignore_label])
    inputs["scores"] = digest(dice)
    inputs["cases"] = digest([[c.name, c.fold] for c in datalist.training])
    for case, _ in cases_to_fill(datalist, label_map.names, how):
        inputs[f"case {case.name}"] = digest([case_digest(case), case.annotated])
    return inputs


def missing_files(target: Workspace) -> list[str]:
    """Completed labels that a round's list names and that are not there."""
    if not target.completed.exists():
        return [target.completed.name]
    files = [file for item in read_completed(target).values() for file in item.files]
    return [file for file in files if not (target.pseudolabels / file).exists()]


def not_predicted(target: Workspace) -> list[str]:
    """Cases that could not be predicted when the pseudo-labels of a round were made, and are to be tried again."""
    return list(read_stored(target.audit, Audit).not_predicted) if target.audit.exists() else []


def _members(source: Workspace) -> list[tuple[str, int]]:
    spec = read_stored(source.ensemble_spec, EnsembleSpec)
    check_ensemble(source, spec)
    return list(spec.members)


def make_pseudolabels(
    source: Workspace,
    target: Workspace,
    datalist: Datalist,
    settings: Settings,
    label_map: LabelMap,
    *,
    progress: Progress | None = None,
) -> PseudolabelResult:
    """Complete the labels of all cases for the next round, and write its datalist.

    Args:
        source: the round whose ensemble predicts.
        target: the round that learns from it.
        datalist: the run's own.
        label_map: of the data set.
        progress: called after each case.

    Raises:
        WorkspaceError: `source` has no ensemble.
    """
    how = How.of(settings)
    dice = class_dice(source)
    todo = cases_to_fill(datalist, label_map.names, how)
    models = {f"{a}_{f}": model_digest(source, a, f) for a, f in _members(source)}
    log.info("pseudolabel: %s, %s of round %d", counted(len(todo), "case"), counted(len(models), "model"), source.round)
    maker = _Maker(source, target, settings, label_map, how, models)
    evidence, failures = _predict_cases(maker, todo, progress)
    verdicts = judge(evidence, dice, how)
    labelled_ml = _labelled_volumes(target, label_map)
    completed: dict[str, dict[str, Any]] = {}
    background: dict[str, int] = {}
    rows = []
    for case, _ in todo:
        if case.name not in evidence:
            continue
        accepted = [name for name, rejected in verdicts[case.name].items() if not rejected]
        counts: dict[str, dict[str, int]] = {"filled": {}, "unsure": {}}
        if accepted:
            counts = maker.complete(case, accepted, evidence[case.name])
            background[case.name] = counts["unsure"].get("background", 0)
            completed[case.name] = _completed_entry(case, accepted, label_map, how)
        rows += _rows(case.name, evidence[case.name], verdicts[case.name], counts, labelled_ml, how)
    joined = tuple(c.name for c in datalist.unlabeled if c.name in completed)
    audit = audit_json(rows, dice, how, round_=target.round, joined=joined, background=background)
    reasons = [f"{case}: {message}" for case, messages in failures.items() for message in messages]
    write_json(target.audit, {**audit, "failures": reasons, "not_predicted": list(failures)})
    previous = read_datalist(source.datalist, settings.dataroot)
    listed = later_round(datalist, previous, how, number=target.round, seed=settings.seed)
    write_datalist(listed, target.datalist, settings.dataroot)
    write_json(target.completed, completed)
    maker.tidy(completed)
    return PseudolabelResult(text=_text(audit, len(joined), reasons), joined=joined, failures=tuple(reasons))


def _predict_cases(
    maker: _Maker, todo: Sequence[tuple[Case, tuple[str, ...]]], progress: Progress | None
) -> tuple[dict[str, dict[str, ClassEvidence]], dict[str, tuple[str, ...]]]:
    """What the models say of each case, by its name; and why nothing of those that could not be predicted."""
    evidence: dict[str, dict[str, ClassEvidence]] = {}
    failures: dict[str, tuple[str, ...]] = {}
    for done, (case, wanted) in enumerate(todo, 1):
        try:
            evidence[case.name] = maker.predict(case, wanted)
        except (DataError, ResourceError) as error:
            log.error("%s: no pseudo-labels: %s", case.name, " ".join(error.messages))
            failures[case.name] = error.messages
        if progress is not None:
            progress(done, len(todo), case.name)
    return evidence, failures


def _rows(
    case: str,
    evidence: Mapping[str, ClassEvidence],
    verdicts: Mapping[str, str],
    counts: Mapping[str, Mapping[str, int]],
    labelled_ml: Mapping[str, Sequence[float]],
    how: How,
) -> list[AuditRow]:
    """The audit's rows of a case, one a class."""
    return [
        make_row(
            case,
            name,
            class_evidence,
            rejected=verdicts[name],
            filled=counts["filled"].get(name, 0),
            unsure=counts["unsure"].get(name, 0),
            labelled_ml=labelled_ml.get(name, ()),
            how=how,
        )
        for name, class_evidence in evidence.items()
    ]


def _completed_entry(case: Case, accepted: Sequence[str], label_map: LabelMap, how: How) -> dict[str, Any]:
    """A case's entry in completed.json: its files, and the classes that its label is complete for."""
    annotated = tuple(n for n in label_map.names if n in (*(case.annotated or ()), *accepted))
    return {
        "file": f"labels/{case.name}.nii.gz",
        "annotated": None if annotated == label_map.names else list(annotated),
        **({"weight": f"weights/{case.name}.nii.gz"} if how.soft else {}),
    }


AGAIN = "Undo the edit, or delete the file and run `autoseg pseudolabel` again."
"""What to do about a damaged file of the pseudo-labels."""


class CaseEvidence(Stored):
    """What stands in pseudolabels/evidence/<case>.json."""

    advice: ClassVar[str] = AGAIN

    made_from: str
    """A digest."""
    classes: dict[str, ClassEvidence]


class Completion(Stored):
    """Where a completed label comes from: what stands in pseudolabels/labels/<case>.json."""

    advice: ClassVar[str] = AGAIN

    case: str
    round: int
    models: dict[str, str]
    """Job -> digest of its model."""
    round_of_models: int
    settings: dict[str, JsonValue]
    annotated: tuple[str, ...]
    """Classes whose voxels annotators drew."""
    filled: tuple[str, ...]
    """Classes that models filled in."""
    voxels_filled: dict[str, int]
    voxels_unsure: dict[str, int]
    """By class."""
    unsure_value: int | None
    version: str
    """Of autoseg."""
    made_from: str
    """A digest."""


class _Maker:
    """Predicts and completes single cases; what was made from the same before is not made again."""

    def __init__(
        self,
        source: Workspace,
        target: Workspace,
        settings: Settings,
        label_map: LabelMap,
        how: How,
        models: Mapping[str, str],
    ) -> None:
        self.source, self.folder, self.label_map, self.how = source, target.pseudolabels, label_map, how
        self.models, self.device, self.round = dict(models), settings.device, target.round
        self.predictor: Predictor | None = None

    def _key(self, case: Case, wanted: Sequence[str]) -> str:
        names = [self.label_map.names, self.label_map.values]
        return digest([VERSION, case_digest(case), case.annotated, list(wanted), self.models, self.how.filters, names])

    def _annotated(self, case: Case) -> tuple[str, ...]:
        return case.annotated or ()

    def predict(self, case: Case, wanted: Sequence[str]) -> dict[str, ClassEvidence]:
        """What the models say about a case.

        Raises:
            DataError: The case cannot be read.
        """
        path = self.folder / "evidence" / f"{case.name}.json"
        files = [self._file("predicted", case), self._file("confidence", case)]
        key = self._key(case, wanted)
        if path.exists() and all(f.exists() for f in files):
            record = read_stored(path, CaseEvidence)
            if record.made_from == key:
                return record.classes
        members = [(a, int(f)) for a, _, f in (name.rpartition("_") for name in self.models)]
        if self.predictor is None:
            self.predictor = Predictor([self.source.job_dir(a, f) for a, f in members], device=self.device)
        label = None if case.label is None else read_case_label(case).array[0]
        prediction: Prediction = predict_case(
            self.predictor,
            [f for _, f in members],
            case.images,
            label,
            wanted=wanted,
            annotated=self._annotated(case),
            conditioned=self.how.filters,
        )
        path.unlink(missing_ok=True)  # killed from here on, an older record must not speak for the new files
        write_volume(files[0], prediction.predicted, prediction.grid)
        write_volume(files[1], prediction.percent, prediction.grid)
        record = CaseEvidence(made_from=key, classes={name: e.rounded() for name, e in prediction.classes.items()})
        write_stored(path, record)
        return record.classes

    def complete(
        self, case: Case, accepted: Sequence[str], evidence: Mapping[str, ClassEvidence]
    ) -> dict[str, dict[str, int]]:
        """Write a case's completed label, and beside it where it comes from.

        Returns:
            Voxels `filled` and `unsure`, by class.
        """
        target, sidecar = self._file("labels", case), self.folder / "labels" / f"{case.name}.json"
        limits = (self.how.confidence, self.how.background_confidence) if self.how.filters else (0.0, 0.0)
        made_from = digest([self._key(case, list(evidence)), list(accepted), limits, self.how.soft])
        weights = self._file("weights", case) if self.how.soft else None
        if sidecar.exists() and target.exists() and (weights is None or weights.exists()):
            record = read_stored(sidecar, Completion)
            if record.made_from == made_from:
                return {"filled": record.voxels_filled, "unsure": record.voxels_unsure}
        original = None if case.label is None else read_case_label(case)
        predicted, percent = (read_label(self._file(kind, case)) for kind in ("predicted", "confidence"))
        label = None if original is None else original.array[0]
        done = complete_label(
            label,
            predicted.array[0],
            percent.array[0],
            label_map=self.label_map,
            accepted=accepted,
            confidence=limits[0],
            background_confidence=limits[1],
        )
        sidecar.unlink(missing_ok=True)  # a label without it is not whole
        write_volume(target, done.label, predicted.grid)
        if weights is not None:
            write_volume(weights, voxel_weights(label, percent.array[0], done.label), predicted.grid)
        origin = Completion(
            case=case.name,
            round=self.round,
            models=self.models,
            round_of_models=self.source.round,
            settings=json.loads(json.dumps(asdict(self.how))),  # lists for tuples, as the file has them
            annotated=self._annotated(case),
            filled=tuple(accepted),
            voxels_filled=done.filled,
            voxels_unsure=done.unsure,
            unsure_value=UNSURE_VALUE if any(limits) else None,
            version=__version__,
            made_from=made_from,
        )
        write_stored(sidecar, origin)
        return {"filled": done.filled, "unsure": done.unsure}

    def tidy(self, completed: Mapping[str, Mapping[str, Any]]) -> None:
        """Take away labels and weights that were made before and that the list of completed ones does not name."""
        kept = {self.folder / "labels" / f"{name}.json" for name in completed}
        kept |= {self.folder / item[key] for item in completed.values() for key in ("file", "weight") if key in item}
        for path in (*self.folder.glob("labels/*"), *self.folder.glob("weights/*")):
            if path not in kept:
                path.unlink()

    def _file(self, kind: str, case: Case) -> Path:
        return self.folder / kind / f"{case.name}.nii.gz"


def _labelled_volumes(target: Workspace, label_map: LabelMap) -> dict[str, list[float]]:
    """Ml of each class in the cases where annotators found it, from the analysis."""
    volumes: dict[str, list[float]] = {}
    for case in read_stored(target.datastats_by_case, StatsByCase).stats_by_cases:
        for name, values in zip(label_map.names, label_map.values, strict=True):
            volume = case.volume_ml(values)
            if volume > 0:
                volumes.setdefault(name, []).append(volume)
    return volumes


def _text(audit: Mapping[str, Any], num_joined: int, failures: Sequence[str]) -> str:
    width = max([len(c["name"]) for c in audit["classes"]] + [5])
    lines = [f"{'class':{width}} | Dice   | accepted | rejected"]
    for c in audit["classes"]:
        why = ", ".join(f"{num} {reason}" for reason, num in c["reasons"].items())
        dice = "     -" if c["dice"] is None else f"{c['dice']:.4f}"
        lines.append(f"{c['name']:{width}} | {dice} | {c['accepted']:8d} | {c['rejected']}{f' ({why})' if why else ''}")
    if num_joined:
        lines.append(counted(num_joined, "unlabeled image joins", "unlabeled images join"))
    if failures:
        lines += ["Not predicted, so without pseudo-labels; the next run tries again:", *failures]
    return "Pseudo-labels, cases by class\n" + "\n".join(lines)
