"""The chosen ensemble's out-of-fold labels as they are handed out, written and scored by every metric."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autoseg.data.formats.table import stem_of
from autoseg.data.volumes import write_volume
from autoseg.ensemble.labels import OutOfFoldLabels, Speaking, rules_key
from autoseg.ensemble.records import read_case_record
from autoseg.evaluation.score_files import floats
from autoseg.evaluation.scores import DICE, METRICS
from autoseg.evaluation.tolerances import Tolerance
from autoseg.inference.files import writing
from autoseg.inference.postprocess import ClassRule
from autoseg.workspace.files import write_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The chosen ensemble's out-of-fold labels as they will be handed out."""

    rules: tuple[ClassRule, ...]
    """What is done to them."""
    tolerance_mm: Tolerance
    """Of surfaces."""
    raw: dict[str, list[float]]
    """Case -> Dice per class before that, NaN where not counted."""
    scores: dict[str, dict[str, list[float]]]
    """Metric -> case -> value per class, NaN where not counted."""
    calibration: dict[str, Any]
    """Case -> counts; None for a vote."""

    @property
    def dice(self) -> dict[str, list[float]]:
        """Case -> Dice per class."""
        return self.scores[DICE.name]


def finish_out_of_fold(
    labels: OutOfFoldLabels, cases: Mapping[str, Speaking], rules: tuple[ClassRule, ...]
) -> Finished:
    """Write the labels with rules applied to out_of_fold/ensemble/ and measure them; what is there stays.

    Args:
        labels: of the run.
        cases: name -> the case, and the combination that speaks for it.
        rules: what is done to the labels.
    """
    folder = labels.workspace.out_of_fold / "ensemble"
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if stem_of(path) not in cases:
            path.unlink()
    finished = Finished(
        rules=rules,
        tolerance_mm=labels.tolerance_mm,
        raw={},
        scores={metric.name: {} for metric in METRICS},
        calibration={},
    )
    for name, speaking in cases.items():
        for metric_name, values in labels.scores(speaking, rules, METRICS).items():
            finished.scores[metric_name][name] = values
        path, target = labels.record_file(name), folder / f"{name}.nii.gz"
        record = read_case_record(path)
        key = rules_key(speaking[1], rules)
        if record.get("in_ensemble") != key or not target.exists():
            cleaned, pred = labels.cleaned(speaking, rules)
            with writing(target):
                write_volume(target, cleaned, pred.grid)
            record["in_ensemble"] = key
            write_json(path, record)
        finished.raw[name] = floats(record["dice"][speaking[1]])
        finished.calibration[name] = record["calibration"].get(speaking[1])
    return finished
