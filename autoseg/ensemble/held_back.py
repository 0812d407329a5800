"""Predictions of the cases that no model has learned from or was chosen by, and their scores where they have labels."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autoseg.config.settings import FormatName, Settings
from autoseg.data.datalists.cases import Case
from autoseg.data.formats.format import LabelWriter
from autoseg.data.formats.table import WRITERS
from autoseg.data.labels import LabelMap
from autoseg.data.streams import ImageRows
from autoseg.data.volumes import read_label
from autoseg.ensemble.out_of_fold import (
    Progress,
    case_digest,
    comparison_of,
    label_on_image,
    metric_key,
    read_record,
)
from autoseg.ensemble.records import CaseRecord, StoredShapes, read_case_record
from autoseg.errors import DataError, ResourceError
from autoseg.evaluation.metrics import to_plain
from autoseg.evaluation.score_files import floats
from autoseg.evaluation.scores import DICE, METRICS, score_case
from autoseg.evaluation.tolerances import Tolerance
from autoseg.inference.appearance import Appearance
from autoseg.inference.ensemble_spec import EnsembleSpec
from autoseg.inference.files import segment, segment_twice
from autoseg.inference.items import own_writer
from autoseg.inference.postprocess import deeds
from autoseg.inference.predictor import Predictor, model_digest
from autoseg.inference.quality import QualityModel, Verdict, judge
from autoseg.inference.quality_file import FILE as QUALITY
from autoseg.inference.quality_file import quality_rows, quality_table
from autoseg.workspace.files import digest, write_json
from autoseg.workspace.workspace import Workspace

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldBack:
    """What predictions of held-back cases came to."""

    scores: dict[str, dict[str, list[float]]]
    """Case -> metric -> value per class, of those with a label."""
    verdicts: dict[str, Verdict]
    """Case -> what is thought of its prediction."""
    failures: list[str]
    """A message for each case that could not be predicted or scored."""


def predict_held_back(
    workspace: Workspace,
    cases: Sequence[Case],
    spec: EnsembleSpec,
    settings: Settings,
    label_map: LabelMap,
    tolerance_mm: Tolerance,
    quality: QualityModel | None,
    progress: Progress | None,
) -> HeldBack:
    """Predict the cases with the ensemble, say what is thought of them, and score those with a label.

    Args:
        label_map: of the user's classes.
        tolerance_mm: of surfaces.
        quality: what tells how good predictions are; None: nothing does.
    """
    models = {f"{a}_{f}": model_digest(workspace, a, f) for a, f in spec.members}
    shown = settings.model_dump(mode="json", include={"codes", "colours"})
    predictor: Predictor | None = None
    scores: dict[str, dict[str, list[float]]] = {}
    verdicts: dict[str, Verdict] = {}
    failures: list[str] = []
    for done, case in enumerate(cases, 1):
        target = workspace.predictions / f"{case.name}.nii.gz"
        writer = _other_writer(case, settings.inference.format)
        converted = None if writer is None else workspace.converted / f"{case.name}{writer.suffixes[0]}"
        path = workspace.ensemble / "records" / f"{case.name}.json"
        try:
            how = digest([spec.combine, deeds(spec.postprocessing)])
            key = case_digest(case, models, how if writer is None else digest([how, writer.name, shown]))
            if read_record(path, key, [target, *([converted] if converted else [])]) is None:
                if predictor is None:
                    jobs = [workspace.job_dir(a, f) for a, f in spec.members]
                    predictor = Predictor(
                        jobs,
                        device=settings.device,
                        combine=spec.combine,
                        rules=spec.postprocessing,
                        codes=settings.codes,
                        colours=settings.colours,
                    )
                    predictor.watches_traits = True
                _remove_converted(workspace, case)
                other = None if writer is None or converted is None else (converted, writer)
                write_json(path, {"made_from": key, "dice": None, **_predicted(predictor, case, target, other)})
            if quality is not None:
                verdicts[case.name] = judge(quality, _appearance(path))
            if case.label is not None:
                scores[case.name] = _scores(case, path, key, target, label_map, tolerance_mm)
        except (DataError, ResourceError) as error:
            log.error("%s: not predicted: %s", case.name, " ".join(error.messages))
            failures.extend(f"{case.name}: {message}" for message in error.messages)
        if progress is not None:
            progress(done, len(cases), case.name)
    rows = [row for name, verdict in verdicts.items() for row in quality_rows(name, verdict)]
    quality_table(workspace.predictions / QUALITY).hold(rows)
    return HeldBack(scores=scores, verdicts=verdicts, failures=failures)


def _predicted(
    predictor: Predictor, case: Case, target: Path, other: tuple[Path, LabelWriter] | None
) -> dict[str, Any]:
    """Write a case's labels, maybe in another format, too; what its record says of how they look."""
    seen: list[Appearance] = []

    def look(image: ImageRows, labels: np.ndarray) -> None:
        seen.append(predictor.appearance(labels, image.spacing_mm))

    if other is None:
        segment(predictor, case.images, target, look=look)
    else:
        segment_twice(predictor, case.images, target, *other, look=look)
    shapes = StoredShapes(truth=(), said=tuple(seen[0].shapes), spacing_mm=seen[0].spacing_mm, shape=seen[0].shape)
    traits = {job: of_job.model_dump(mode="json") for job, of_job in seen[0].traits.items()}
    return {"traits": traits, "shapes": {"": shapes.model_dump(mode="json")}}


def _appearance(path: Path) -> Appearance:
    """What a record says of how a prediction looks."""
    record = CaseRecord.model_validate(read_case_record(path))
    shapes = record.shapes[""]
    return Appearance(traits=record.traits, shapes=shapes.said, spacing_mm=shapes.spacing_mm, shape=shapes.shape)


def _other_writer(case: Case, name: FormatName | None) -> LabelWriter | None:
    """How a case's prediction is written besides NIfTI, as the setting of inference says; None: not at all."""
    if name is None:
        return None
    writer = own_writer(case.images) if name == "auto" else WRITERS[name]
    if writer is WRITERS["nifti"]:
        return None
    try:
        if writer.check is not None:
            writer.check(case.images)
    except DataError as error:
        log.warning("%s The label is there as NIfTI alone.", error)
        return None
    return writer


def _remove_converted(workspace: Workspace, case: Case) -> None:
    """Remove what an earlier run wrote, maybe in another format."""
    for writer in WRITERS.values():
        (workspace.converted / f"{case.name}{writer.suffixes[0]}").unlink(missing_ok=True)


def _scores(
    case: Case, path: Path, key: str, target: Path, label_map: LabelMap, tolerance_mm: Tolerance
) -> dict[str, list[float]]:
    """Metric -> value per class of a prediction, kept in the case's record."""
    record = read_record(path, key, [target])
    assert record is not None
    stores = {m.name: record.setdefault(m.name, {}) for m in METRICS if m is not DICE}
    keys = {m.name: metric_key(m, tolerance_mm) for m in METRICS}
    lacking = [m for m in METRICS if (record["dice"] is None if m is DICE else keys[m.name] not in stores[m.name])]
    if lacking:
        label, pred = label_on_image(case), read_label(target).array[0]
        for name, values in score_case(comparison_of(case, pred, label, label_map, tolerance_mm), lacking).items():
            if name == DICE.name:
                record["dice"] = to_plain(values)
            else:
                stores[name][keys[name]] = to_plain(values)
        write_json(path, record)
    return {m.name: floats(record["dice"] if m is DICE else stores[m.name][keys[m.name]]) for m in METRICS}
