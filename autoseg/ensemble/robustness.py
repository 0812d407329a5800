"""What changed images cost: the Dice of some held-out cases with noise, a bias field, fewer slices, and turned heads.

Each case is predicted by the models of its own fold, so that none of them has learned from it. The result lies in
`ensemble/robustness.json` with a digest of all that it was made from.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy.ndimage import gaussian_filter, rotate, zoom

from autoseg.data.datalists.cases import Case, read_case_label
from autoseg.data.grid import Volume
from autoseg.data.volumes import read_image
from autoseg.ensemble.combine import CaseScore
from autoseg.ensemble.out_of_fold import Progress, case_digest
from autoseg.errors import DataError
from autoseg.evaluation.intervals import mean_interval
from autoseg.evaluation.metrics import dice_per_class, mean_score
from autoseg.evaluation.score_files import ChangeScore, Robustness
from autoseg.inference.ensemble_spec import EnsembleSpec
from autoseg.inference.postprocess import deeds
from autoseg.inference.predictor import Predictor, model_digest
from autoseg.workspace.files import digest
from autoseg.workspace.stored import read_stored, write_stored
from autoseg.workspace.workspace import Workspace

log = logging.getLogger(__name__)

MOST_CASES = 10
FEWEST_CASES = 3
SHARE, SHARE_IN_BUDGET = 0.05, 0.02
"""Of the time that the jobs have trained, for all predictions of changed images; with a budget less, since the stage
has to end in it. A choice."""


def add_noise(image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Normal noise of a tenth of each channel's deviation."""
    deviation = image.std(axis=(1, 2, 3), keepdims=True)
    return image + 0.1 * deviation * rng.standard_normal(image.shape, np.float32), label


def add_bias(image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A smooth field that brightens and darkens by up to 30 %; intensities are taken from the lowest one on."""
    field = gaussian_filter(
        rng.standard_normal(image.shape[1:], np.float32), [n / 4 for n in image.shape[1:]], mode="nearest"
    )
    field /= max(float(np.abs(field).max()), 1e-12)
    lowest = image.min(axis=(1, 2, 3), keepdims=True)
    return (image - lowest) * (1 + 0.3 * field) + lowest, label


def thin_out(image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Half the voxels along each axis, and linearly back to as many as there were."""
    shape = image.shape[1:]
    few = [_zoomed(channel, [max(2, n // 2) for n in shape]) for channel in image]
    return np.stack([_zoomed(channel, shape) for channel in few]), label


def _zoomed(channel: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    factors = [n / m for n, m in zip(shape, channel.shape, strict=True)]
    zoomed: np.ndarray = zoom(channel, factors, order=1, grid_mode=True, mode="nearest")
    return zoomed


def turn(image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Ten degrees about the third axis, image and label alike."""
    turned = [rotate(c, 10, axes=(0, 1), reshape=False, order=1, mode="constant", cval=float(c.min())) for c in image]
    return np.stack(turned), rotate(label, 10, axes=(0, 1), reshape=False, order=0)


Change = Callable[[np.ndarray, np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]]
CHANGES: dict[str, tuple[str, Change]] = {
    "noise": ("noise of 10 % of the deviation", add_noise),
    "bias field": ("a bias field of up to 30 %", add_bias),
    "resampling": ("half the voxels along each axis", thin_out),
    "rotation": ("turned by 10 degrees", turn),
}
"""Name -> what it is, and the function. Strengths are a choice: what scanners and positioning do on a bad day."""


def chosen_cases(cases: Sequence[CaseScore], seconds: float, image_s: float) -> list[str]:
    """Names of the cases to try: evenly from the worst to the best, as many as the time allows.

    Args:
        seconds: for all predictions.
        image_s: that a prediction takes.
    """
    allowed = int(seconds / max(image_s * (len(CHANGES) + 1), 1e-9))
    num = min(MOST_CASES, allowed, len(cases))
    if num < min(FEWEST_CASES, len(cases)) or not cases:
        return []
    ranked = sorted(cases, key=lambda c: (mean_score([*c.dice.values()]), c.name))
    return [ranked[round(i)].name for i in np.linspace(0, len(ranked) - 1, num)]


def measure_robustness(
    workspace: Workspace,
    cases: Mapping[str, tuple[Case, int]],
    spec: EnsembleSpec,
    *,
    device: str,
    seed: int,
    progress: Progress | None = None,
) -> Robustness:
    """Predict changed images of some held-out cases; what was done with the same models, files and rules stays.

    Args:
        cases: name -> the case and its fold.
        seed: of noise and bias fields.

    Raises:
        DataError: A file cannot be read.
    """
    models = {f"{a}_{f}": model_digest(workspace, a, f) for a, f in spec.members}
    rules = digest([spec.combine, deeds(spec.postprocessing), seed, [*CHANGES]])
    key = digest([case_digest(case, models, rules) for case, _ in cases.values()])
    path = workspace.robustness
    if path.exists() and (stored := read_stored(path, Robustness)).made_from == key:
        return stored
    scores: dict[str, list[float]] = {name: [] for name in ("", *CHANGES)}
    predictors: dict[int, Predictor] = {}
    for done, (case, fold) in enumerate(cases.values(), 1):
        if fold not in predictors:
            jobs = [workspace.job_dir(a, f) for a, f in spec.members if f == fold]
            predictors = {fold: Predictor(jobs, device=device, combine=spec.combine, rules=spec.postprocessing)}
        for name, dice in _scores(predictors[fold], case, seed).items():
            scores[name].append(dice)
        if progress is not None:
            progress(done, len(cases), case.name)
    plain = np.array(scores.pop(""))
    patients = [case.group for case, _ in cases.values()]
    result = Robustness(
        made_from=key,
        cases=tuple(cases),
        dice=_plain(float(np.nanmean(plain))),
        changes=tuple(_change(name, np.array(values), plain, patients) for name, values in scores.items()),
    )
    write_stored(path, result)
    return result


def held_out_robustness(
    workspace: Workspace,
    scored: Sequence[CaseScore],
    by_name: Mapping[str, Case],
    spec: EnsembleSpec,
    *,
    device: str,
    seed: int,
    in_budget: bool,
    progress: Progress | None = None,
) -> Robustness | None:
    """Measure it as far as the time allows; None, and no file, where that is too little."""
    share = SHARE_IN_BUDGET if in_budget else SHARE
    members = {fold: [m for m in spec.members if m[1] == fold] for _, fold in spec.members}
    costs = [c.cost.of(members[c.fold])[0] for c in scored if c.cost is not None and c.fold in members]
    trained_s = sum(job.seconds for job in workspace.jobs() if job.state == "done")
    able = [c for c in scored if c.fold in members and c.name in by_name]
    names = chosen_cases(able, share * trained_s, sum(costs) / len(costs)) if costs else []
    folds = {c.name: c.fold for c in scored}
    if not names:
        log.info("ensemble: robustness is not measured: it would take over %.0f %% of the training's time", 100 * share)
        workspace.robustness.unlink(missing_ok=True)
        return None
    names.sort(key=lambda name: folds[name])  # a fold's models are loaded once
    cases = {name: (by_name[name], folds[name]) for name in names}
    try:
        result = measure_robustness(workspace, cases, spec, device=device, seed=seed, progress=progress)
    except DataError as error:
        log.warning("ensemble: robustness is not measured: %s", error)
        workspace.robustness.unlink(missing_ok=True)
        return None
    worst = min(result.changes, key=lambda change: math.inf if change.difference is None else change.difference)
    log.info("ensemble: of changed images of %d cases, %s costs most Dice: %+.4f", len(names), worst.name,
             math.nan if worst.difference is None else worst.difference)  # fmt: skip
    return result


def _scores(predictor: Predictor, case: Case, seed: int) -> dict[str, float]:
    """Mean Dice over the classes of the image as it is (an empty name) and after each change."""
    image, label = read_image(case.images), read_case_label(case).array[0]
    if image.array.shape[1:] != label.shape:
        raise DataError(f"{case.label}: not on the grid of {case.images[0].name}. Export the label again.")
    scores: dict[str, float] = {}
    changes: dict[str, Change] = {"": lambda i, t, r: (i, t), **{name: change for name, (_, change) in CHANGES.items()}}
    for name, change in changes.items():
        changed, truth = change(image.array, label, np.random.default_rng([seed, len(scores)]))
        volume = Volume(array=changed.astype(np.float32), grid=image.grid)
        pred = predictor.predict_labels(volume)
        values = dice_per_class(pred, truth, predictor.label_map.named, annotated=case.annotated)
        known = [v for v in values if not math.isnan(v)]
        scores[name] = sum(known) / len(known) if known else math.nan
    return scores


def _change(name: str, values: np.ndarray, plain: np.ndarray, patients: Sequence[str | None]) -> ChangeScore:
    difference = values - plain
    low, high = mean_interval(difference[:, None], patients)
    mean, change = float(np.nanmean(values)), float(np.nanmean(difference))
    return ChangeScore(
        name=name, words=CHANGES[name][0], dice=_plain(mean), difference=_plain(change), low=_plain(low),
        high=_plain(high),
    )  # fmt: skip


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 6)
