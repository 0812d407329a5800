"""`autoseg suggest`: which images to annotate next, by how doubtful the models are of them and how unlike each other.

work_dir/suggest/
  suggestions.csv          the images in the order to annotate them
  doubts/<case>.json       what the models say of an image, with a digest of what it was made from

`doubt_of` alone says how good a prediction is expected to be; whatever predicts a Dice better can take its place.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from autoseg.data.datalists.datalist import read_cases
from autoseg.data.formats.table import image_digest
from autoseg.data.streams import FileImage, open_image
from autoseg.data.volumes import read_image
from autoseg.errors import ConfigError, DataError, WorkspaceError
from autoseg.evaluation.tables import csv_text, format_rows
from autoseg.inference.chosen import own_jobs, read_ensemble, run_at
from autoseg.inference.ensemble_spec import check_ensemble
from autoseg.inference.items import find_items
from autoseg.inference.predictor import Predictor, model_digest
from autoseg.inference.restore import labels_of_means
from autoseg.inference.seals import check_jobs
from autoseg.pseudolabel.evidence import disagreements
from autoseg.workspace.files import digest, write_text
from autoseg.workspace.settings import read_settings
from autoseg.workspace.stored import Stored, read_stored, write_stored
from autoseg.workspace.workspace import Workspace

log = logging.getLogger(__name__)

VERSION = 1
"""Raised whenever the meaning of a stored doubt changes."""
EVIDENCE = (
    "Evidence: in the one comparison that was made this order did not beat drawing images at random "
    "(docs/results.md#what-to-annotate-next). `--order random` draws them."
)


class Doubt(Stored):
    """What the models say of one image."""

    advice: ClassVar[str] = "Undo the edit, or delete the file and run `autoseg suggest` again."

    made_from: str
    """A digest of the image, the models and this version."""
    predicted_dice: dict[str, float]
    """Class -> the Dice that is expected; classes that neither the labels nor the probabilities hold are left out."""
    disagreement: float | None
    """Of the folds' models, mean over classes, 0 to 2; None with one fold alone."""
    features: tuple[float, ...]
    """What the image is like: sizes, intensities, volumes."""

    @property
    def mean_dice(self) -> float:
        """Over the classes; 0 where nothing is expected to be found."""
        values = self.predicted_dice.values()
        return sum(values) / len(values) if values else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An image that could be annotated."""

    name: str
    images: tuple[Path, ...]
    group: str | None = None


def doubt_of(predictor: Predictor, folds: Sequence[int], images: Sequence[Path], made_from: str = "") -> Doubt:
    """How good a prediction is expected to be, and what the image is like.

    The expected Dice of a class is the mean of two: that of its probabilities, 2 sum(p in the mask) / (mask + sum(p)),
    as if they were right; and the Dice of the folds' predictions with each other.

    Args:
        predictor: all models of the chosen combination.
        folds: of each.

    Raises:
        DataError: The image cannot be read, or does not have the models' channels.
    """
    label_map = predictor.label_map
    num = len(label_map.names)
    inside, everywhere, voxels = np.zeros(num), np.zeros(num), np.zeros(num)

    def watch(subset: int, place: tuple[slice, slice, slice], probs: torch.Tensor) -> None:
        if subset:
            return
        winner = None if label_map.sigmoid else probs.argmax(0)
        for k in range(num):
            p = probs[k] if winner is None else probs[k + 1]
            mask = p > 0.5 if winner is None else winner == k + 1
            inside[k] += float(p[mask].sum())
            everywhere[k] += float(p.sum())
            voxels[k] += int(mask.sum())

    by_fold = [tuple(i for i, f in enumerate(folds) if f == fold) for fold in sorted(set(folds))]
    with ExitStack() as stack:
        image = open_image(list(images))
        if isinstance(image, FileImage):
            stack.enter_context(image)
        subsets = [tuple(range(len(folds))), *(by_fold if len(by_fold) > 1 else [])]
        labels = labels_of_means(predictor.each(image), subsets, image.shape, label_map, watch=watch)
        spacing, shape = image.spacing_mm, image.shape
    apart = disagreements(labels[1:], label_map, range(num))
    predicted = {}
    for k, name in enumerate(label_map.names):
        # Probabilities of a few thousandths everywhere are no class that is there.
        if not voxels[k] and everywhere[k] < 1:
            continue
        of_probs = 2 * inside[k] / (voxels[k] + everywhere[k])
        of_folds = apart[k]
        predicted[name] = float(of_probs if of_folds is None else (of_probs + 1 - of_folds / 2) / 2)
    known = [v for v in apart.values() if v is not None]
    ml = voxels * math.prod(spacing) / 1000
    return Doubt(
        made_from=made_from,
        predicted_dice={name: round(value, 6) for name, value in predicted.items()},
        disagreement=round(sum(known) / len(known), 6) if known else None,
        features=tuple(round(float(v), 5) for v in (*_looks(images, shape, spacing), *np.log1p(ml))),
    )


def _looks(images: Sequence[Path], shape: Sequence[int], spacing_mm: Sequence[float]) -> list[float]:
    """Extent, voxel size, and of each channel how intensities spread; as logarithms where they are sizes."""
    values = [math.log(n * mm) for n, mm in zip(shape, spacing_mm, strict=True)]
    values += [math.log(mm) for mm in spacing_mm]
    for channel in read_image(tuple(images)).array:
        low, quarter, middle, high_quarter, high = np.percentile(channel, (0.5, 25, 50, 75, 99.5))
        spread = max(float(high - low), 1e-6)
        values += [math.log10(spread), *(float(v - low) / spread for v in (quarter, middle, high_quarter))]
    return values


def chosen_order(doubts: Mapping[str, Doubt], num: int) -> list[tuple[str, float]]:
    """Images to annotate, each with its distance to those before it.

    The most doubtful one first; then each time the one whose expected loss of Dice, times the distance to the nearest
    that was taken, is largest: a k-centre search weighted by doubt.

    Args:
        doubts: image -> what the models say of it.
        num: how many to take.

    Source: k-centre as a core set: Sener and Savarese 2018; the weight is a choice.
    """
    names = sorted(doubts)
    loss = np.array([1 - doubts[name].mean_dice for name in names])
    features = np.array([doubts[name].features for name in names], float)
    middle = np.median(features, axis=0)
    deviation = 1.4826 * np.median(np.abs(features - middle), axis=0)
    usual = np.where(deviation > 1e-9, deviation, np.maximum(features.std(axis=0), 1e-9))
    # An odd image counts as odd, but one feature alone must not decide.
    scaled = np.clip((features - middle) / usual, -5, 5) / math.sqrt(max(1, features.shape[1]))
    taken: list[tuple[str, float]] = []
    nearest = np.full(len(names), np.inf)
    left = np.ones(len(names), bool)
    for _ in range(min(num, len(names))):
        gain = np.where(left, loss * (1 if not taken else nearest), -1.0)
        best = int(np.argmax(gain))
        taken.append((names[best], float("nan") if not taken else float(nearest[best])))
        left[best] = False
        nearest = np.minimum(nearest, np.linalg.norm(scaled - scaled[best], axis=1))
    return taken


def candidates(workspace: Workspace, images: Path | None, num_channels: int) -> list[Candidate]:
    """The images that could be annotated: a folder's, else the list's unlabeled ones and testing ones without label.

    Raises:
        ConfigError: There is none.
    """
    if images is not None:
        if not images.exists():
            raise ConfigError(f"--images: {images}: no such file or folder.")
        items = find_items(images, workspace.run / "suggest" / "labels", num_channels)
        return [Candidate(name=item.name, images=item.images) for item in items]
    settings = read_settings(Workspace(workspace.run))
    stored = settings["dataroot"].value if "dataroot" in settings else "."
    datalist = read_cases(workspace, workspace.run / str(stored))
    listed = [*datalist.unlabeled, *(case for case in datalist.testing if case.label is None)]
    joined = {case.name for case in datalist.training}
    cases = [Candidate(name=c.name, images=c.images, group=c.group) for c in listed if c.name not in joined]
    if not cases:
        raise ConfigError(
            f"{workspace.datalist}: no unlabeled image, and no testing case without a label. List some under "
            "`unlabeled`, or give a folder with --images."
        )
    return cases


def suggest(
    work_dir: Path,
    *,
    num: int = 10,
    images: Path | None = None,
    order: str = "doubt",
    seed: int = 0,
    device: str = "auto",
) -> str:
    """Say which images to annotate next, and write the list.

    Args:
        work_dir: folder of a finished run.
        num: images to suggest.
        images: a folder, an image or a .txt list in place of the run's unlabeled cases.
        order: doubt, or random: drawn by the seed, without a prediction.

    Returns:
        A table, and what evidence there is for the order.

    Raises:
        ConfigError, WorkspaceError: There is no image, or no ensemble.
    """
    if num < 1:
        raise ConfigError(f"--n: expected a whole number >= 1, found {num}.")
    workspace = run_at(Workspace(Path(work_dir))).finished()
    spec = read_ensemble(workspace)
    jobs = own_jobs(workspace, spec.members)
    check_ensemble(workspace, spec)
    check_jobs(jobs)
    predictor = Predictor(jobs, device=device)
    found = candidates(workspace, images, predictor.num_channels)
    rows: list[dict[str, object]]
    failures: list[str] = []
    if order == "random":
        drawn = np.random.default_rng(seed).permutation(len(found))[:num]
        rows = [{"rank": n, "case": found[i].name} for n, i in enumerate(drawn, 1)]
    else:
        models = {f"{a}_{f}": model_digest(workspace, a, f) for a, f in spec.members}
        doubts: dict[str, Doubt] = {}
        for done, candidate in enumerate(found, 1):
            try:
                doubts[candidate.name] = _kept_doubt(
                    workspace, predictor, [f for _, f in spec.members], models, candidate
                )
            except DataError as error:
                failures += [f"{candidate.name}: left out: {message}" for message in error.messages]
            log.debug("suggest: %d of %d: %s", done, len(found), candidate.name)
        if not doubts:
            raise WorkspaceError([f"{workspace.run}: no image could be predicted.", *failures])
        rows = [_row(rank, name, doubts[name], away) for rank, (name, away) in enumerate(chosen_order(doubts, num), 1)]
    folder = workspace.run / "suggest"
    write_text(folder / "suggestions.csv", csv_text(COLUMNS, [{**dict.fromkeys(COLUMNS, ""), **row} for row in rows]))
    table = format_rows(list(COLUMNS), [[_shown(row.get(key, "")) for key in COLUMNS] for row in rows])
    title = f"{len(rows)} of {len(found)} images to annotate next; {folder / 'suggestions.csv'}"
    return "\n".join([title, table, EVIDENCE, *failures])


COLUMNS = ("rank", "case", "predicted_dice", "disagreement", "distance")


def _shown(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _row(rank: int, name: str, doubt: Doubt, away: float) -> dict[str, object]:
    distance = "" if math.isnan(away) else round(away, 4)
    disagreement = "" if doubt.disagreement is None else doubt.disagreement
    dice = round(doubt.mean_dice, 4)
    return {"rank": rank, "case": name, "predicted_dice": dice, "disagreement": disagreement, "distance": distance}


def _kept_doubt(
    workspace: Workspace, predictor: Predictor, folds: Sequence[int], models: Mapping[str, str], candidate: Candidate
) -> Doubt:
    """The doubt of an image; what was made from the same before is not made again."""
    path = workspace.run / "suggest" / "doubts" / f"{candidate.name}.json"
    if lost := [image for image in candidate.images if not image.exists()]:
        raise DataError(f"{lost[0]}: no such file.")
    key = digest([VERSION, dict(models), [image_digest(image) for image in candidate.images]])
    if path.exists() and (stored := read_stored(path, Doubt)).made_from == key:
        return stored
    doubt = doubt_of(predictor, folds, candidate.images, key)
    write_stored(path, doubt)
    return doubt
