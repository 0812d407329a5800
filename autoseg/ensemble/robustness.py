"""What changed images cost: the Dice of some held-out cases with noise, a bias field, fewer voxels, and turned heads.

Each case is predicted by the models of its own fold, so that none of them has learned from it, and compared with its
Dice out of fold. The result lies in `ensemble/robustness.json` with a digest of all that it was made from.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

import numpy as np

from autoseg.data.datalists.cases import Case
from autoseg.ensemble.combine import CaseScore
from autoseg.ensemble.copies import Copies
from autoseg.ensemble.corruptions import CORRUPTIONS, MOST_TRIED, USUAL
from autoseg.ensemble.out_of_fold import Progress, case_digest
from autoseg.errors import DataError, counted
from autoseg.evaluation.intervals import mean_interval
from autoseg.evaluation.metrics import mean_score
from autoseg.evaluation.score_files import ChangeScore, Robustness
from autoseg.workspace.files import digest
from autoseg.workspace.stored import read_stored, write_stored

log = logging.getLogger(__name__)

FEWEST_CASES = 3
"""That a mean is told of."""


def chosen_cases(cases: Sequence[CaseScore], seconds: float, image_s: float) -> list[str]:
    """Names of the cases to try: evenly from the worst to the best, as many as the time allows.

    Args:
        seconds: for all predictions.
        image_s: that a prediction takes.
    """
    allowed = int(seconds / max(image_s * len(USUAL), 1e-9))
    num = min(MOST_TRIED, allowed, len(cases))
    if num < min(FEWEST_CASES, len(cases)) or not cases:
        return []
    ranked = sorted(cases, key=lambda c: (mean_score([*c.dice.values()]), c.name))
    return [ranked[round(i)].name for i in np.linspace(0, len(ranked) - 1, num)]


def held_out_robustness(
    copies: Copies,
    scored: Sequence[CaseScore],
    by_name: Mapping[str, Case],
    dice: Mapping[str, Sequence[float]],
    *,
    seed: int,
    progress: Progress | None = None,
) -> Robustness | None:
    """Measure it as far as the time allows; None, and no file, where that is too little.

    What was measured with the same models, files and rules stays.

    Args:
        copies: what predicts changed images.
        scored: cases out of fold.
        by_name: all cases.
        dice: case -> Dice per class of the image as it is, out of fold, NaN where not counted.
        seed: of noise and bias fields.
    """
    workspace = copies.workspace
    folds = {c.name: c.fold for c in scored if c.name in by_name and c.name in dice}
    able = [c for c in scored if c.name in folds and copies.can_predict(by_name[c.name], c.fold)]
    key = digest([copies.made_from, seed, USUAL, [case_digest(by_name[c.name], {}, "") for c in able]])
    path = workspace.robustness
    if path.exists() and (stored := read_stored(path, Robustness)).made_from == key:
        return stored
    path.unlink(missing_ok=True)
    names = chosen_cases(able, copies.left_s, copies.expected_s)
    if not names:
        log.info("ensemble: robustness is not measured: there is no time left for it")
        return None
    names.sort(key=lambda name: folds[name])  # a fold's models are loaded once
    scores: dict[str, list[float]] = {name: [] for name in USUAL}
    try:
        for done, name in enumerate(names, 1):
            for number, (kind, strength) in enumerate(USUAL.items()):
                copy = copies.predict(by_name[name], folds[name], kind, [seed, number], strength)
                scores[kind].append(mean_score([[math.nan if d is None else d for d in copy.dice]]))
            if progress is not None:
                progress(done, len(names), name)
    except DataError as error:
        log.warning("ensemble: robustness is not measured: %s", error)
        return None
    finally:
        copies.save()
    plain = np.array([mean_score([dice[name]]) for name in names])
    patients = [by_name[name].group for name in names]
    result = Robustness(
        made_from=key,
        cases=tuple(names),
        dice=_plain(float(np.nanmean(plain))),
        changes=tuple(_change(name, np.array(values), plain, patients) for name, values in scores.items()),
    )
    write_stored(path, result)
    worst = min(result.changes, key=lambda change: math.inf if change.difference is None else change.difference)
    log.info("ensemble: of changed images of %s, %s costs most Dice: %+.4f", counted(len(names), "case"), worst.name,
             math.nan if worst.difference is None else worst.difference)  # fmt: skip
    return result


def _change(name: str, values: np.ndarray, plain: np.ndarray, patients: Sequence[str | None]) -> ChangeScore:
    difference = values - plain
    low, high = mean_interval(difference[:, None], patients)
    mean, change = float(np.nanmean(values)), float(np.nanmean(difference))
    return ChangeScore(
        name=name, words=CORRUPTIONS[name].words, dice=_plain(mean), difference=_plain(change), low=_plain(low),
        high=_plain(high),
    )  # fmt: skip


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 6)
