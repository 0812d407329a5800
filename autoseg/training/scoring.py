"""Scoring a trained model on its fold's held-out cases, and keeping for the ensemble what it says about them."""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from autoseg.config.networks import LOCATOR
from autoseg.config.reader import read_plain
from autoseg.data.datalists.cases import Case, read_case_label
from autoseg.data.volumes import read_image
from autoseg.evaluation.metrics import dice_per_class, summarise, to_plain
from autoseg.hardware.device import Precision, resolve_precision
from autoseg.inference.cost import Cost
from autoseg.inference.held_out import DISK_SHARE, Kept, predict_held_out, probs_room, remove_held_out
from autoseg.inference.options import Options
from autoseg.inference.predictor import Predictor, job_digest
from autoseg.plan import Plan
from autoseg.training.checkpoint import save_weights
from autoseg.training.trainer import Trainer
from autoseg.training.validation import TWICE_SHARE
from autoseg.workspace.files import write_json
from autoseg.workspace.jobs import JobDir
from autoseg.workspace.workspace import Workspace

log = logging.getLogger(__name__)


MOST_LOST_DICE = 0.001
"""Dice against the label, in the mean over a case's classes, that may change for a model to be used in half precision.
A choice: a point of Dice is what networks differ by, this a tenth of one. Voxels with equal labels tell less: along
surfaces that nobody is sure of some change sides without any loss, and a tiny class that is lost has too few of them.
"""


def kept_for_ensemble(paths: JobDir) -> Kept:
    """What the ensemble of a job's run needs to know of its held-out cases.

    Probabilities where several algorithms may be merged by their mean. The locator is in no ensemble, and a sweep's
    trials have none.
    """
    workspace = Workspace(paths.root.parent)
    is_trial = (workspace.root / "trial.json").exists()
    if is_trial or not workspace.settings.exists() or paths.root.name.rpartition("_")[0] == LOCATOR:
        return "labels"
    stored = read_plain(workspace.settings).get("ensemble", {}).get("value")
    if stored is False and workspace.is_last_round:
        return "labels"
    votes_only = isinstance(stored, dict) and stored.get("combine") == "vote"
    algos = {job.algo for job in workspace.jobs()} - {LOCATOR}
    return "probabilities" if len(algos) > 1 and not votes_only else "facts"


class _Scorer:
    """One job's model, loaded once, that scores cases."""

    def __init__(self, paths: JobDir, device: torch.device, precision: Precision | None, kept: Kept) -> None:
        """Load the model.

        Args:
            paths: of the job.
            precision: None: as `load_model` chooses.
            kept: what is kept of each case.
        """
        self.paths, self.kept = paths, kept
        self.cost = Cost(predictor=Predictor([paths], device=device, options=Options(precision=precision)))
        self.label_map = self.cost.predictor.label_map
        self._model = job_digest(paths)
        self.num_without = 0
        """Cases whose probabilities could not be kept."""
        self.why_not = ""

    def score(self, case: Case, most_bytes: int) -> list[float]:
        """Predict a case on its own grid, keep what is to be kept, and score each class.

        Args:
            most_bytes: of its probabilities.
        """
        # `cases_for` has turned a case's classes into merged ones already.
        counted = case.annotated if self.label_map.origin is not None else self.label_map.wholly(case.annotated)
        pred, label, why_not = predict_held_out(
            self.cost,
            case,
            self.paths,
            kept=self.kept,
            model=self._model,
            counted=counted,
            most_bytes=most_bytes,
        )
        if why_not:
            self.num_without, self.why_not = self.num_without + 1, why_not
        return dice_per_class(pred, label.array[0], self.label_map, annotated=case.annotated)


def compare_precision(plan: Plan, paths: JobDir, case: Case, device: torch.device) -> dict[str, Any] | None:
    """Predict a case in half precision and in fp32, where the plan leaves it to the hardware and that has it.

    Returns:
        What `validation.json` keeps: the Dice that half precision gains or loses, the share of the foreground voxels
        of either prediction that have equal labels, and whether it is close enough; None where there is nothing to
        compare.
    """
    half = resolve_precision(device, plan.precision)
    if plan.precision != "auto" or half == "fp32":
        return None
    image = read_image(case.images)
    in_half, exact = (
        Predictor([paths], device=device, options=Options(precision=p)).predict_labels(image) for p in (half, "fp32")
    )
    either = (in_half > 0) | (exact > 0)
    share = float((in_half == exact)[either].mean()) if either.any() else 1.0
    label, label_map = read_case_label(case), plan.label_map
    counted = case.annotated if label_map.origin is not None else label_map.wholly(case.annotated)
    scores = [dice_per_class(pred, label.array[0], label_map, annotated=counted) for pred in (in_half, exact)]
    changes = [a - b for a, b in zip(*scores, strict=True) if not math.isnan(a - b)]
    change = math.fsum(changes) / len(changes) if changes else 0.0
    is_equal = abs(change) < MOST_LOST_DICE
    if not is_equal:
        log.warning(
            "%s: %s changes the Dice of %s by %+.4f (up to %.3f is allowed), with %.2f%% of the foreground voxels' "
            "labels as in fp32; predicting in fp32.",
            paths.root.name, half, case.name, change, MOST_LOST_DICE, 100 * share,
        )  # fmt: skip
    return {"precision": half, "dice_change": change, "equal_labels": share, "is_equal": is_equal}


def score_validation(
    plan: Plan,
    paths: JobDir,
    cases: tuple[Case, ...],
    device: torch.device,
    compared: dict[str, Any] | None = None,
) -> float:
    """Predict the fold's held-out cases on their own grids; store labels, scores, and what the ensemble needs.

    Args:
        plan: of the job.
        paths: of the job.
        cases: as `cases_for` has them, each with a label.
        device: where the network runs.
        compared: as `compare_precision` returned it.

    Returns:
        Mean foreground Dice: over cases, then classes.
    """
    label_map = plan.label_map
    precision: Precision | None = None
    if compared is not None:
        precision = compared["precision"] if compared["is_equal"] else "fp32"
    remove_held_out(paths)
    scorer = _Scorer(paths, device, precision, kept_for_ensemble(paths))
    scores = []
    for case in cases:
        scores.append(scorer.score(case, probs_room(paths)))
    if scorer.num_without:
        log.warning(
            "%s: the probabilities of %d of %d held-out cases are not kept (%s); the ensemble predicts these cases "
            "again. Such files may take up to %.0f%% of the free disk.",
            paths.root.name, scorer.num_without, len(cases), scorer.why_not, 100 * DISK_SHARE,
        )  # fmt: skip
    summary = summarise(scores, label_map.names, patients=[case.group for case in cases])
    table = {
        case.name: to_plain(dict(zip(label_map.names, row, strict=True)))
        for case, row in zip(cases, scores, strict=True)
    }
    half = {"half_precision": compared} if compared is not None else {}
    write_json(paths.validation, {"summary": summary.to_json(), "dice": table, **half})
    return summary.mean


def time_scoring(trainer: Trainer, paths: JobDir, case: Case) -> float:
    """Seconds that `score_validation` takes for a case, with the weights as they are now.

    In fp32 where `compare_precision` will choose: whether half precision may be taken is known only in the end, and a
    budget must hold the longer of both. The first prediction of a model chooses kernels, as none of the final ones does
    again, and takes up to three times as long: where that is little of the budget, the second is timed.
    """
    precision: Precision | None = "fp32" if trainer.plan.precision == "auto" else None
    with tempfile.TemporaryDirectory() as folder:
        scratch = JobDir(Path(folder) / paths.root.name)
        scratch.plan.parent.mkdir(parents=True)
        shutil.copy(paths.plan, scratch.plan)
        save_weights(trainer.average, scratch)
        scorer = _Scorer(scratch, trainer.device, precision, kept_for_ensemble(paths))

        def seconds() -> float:
            begin = time.monotonic()
            scorer.score(case, probs_room(scratch))
            return time.monotonic() - begin

        first_s = seconds()
        is_little = first_s <= TWICE_SHARE * (trainer.plan.budget_s or 0.0)
        return seconds() if is_little or trainer.device.type != "cpu" else first_s
