"""`autoseg suggest`: which images to annotate next, by how badly they are likely segmented and how unlike each other.

What is thought of a prediction is what `quality.csv` says of it: predicted Dice, and whether the image is like the
training data. Of an ensemble of too few cases to learn that from, the Dice that the models' probabilities expect.

work_dir/suggest/
  suggestions.csv          the images in the order to annotate them
  doubts/<case>.json       what the models say of an image, with a digest of what it was made from
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

import numpy as np

from autoseg.data.datalists.datalist import read_cases
from autoseg.data.formats.table import image_digest
from autoseg.data.grid import Volume
from autoseg.data.volumes import read_image
from autoseg.ensemble.predict import load_predictor
from autoseg.errors import ConfigError, DataError, WorkspaceError, counted
from autoseg.evaluation.tables import csv_text, format_rows
from autoseg.inference.appearance import mean_expected_dice
from autoseg.inference.chosen import read_ensemble, read_inference, run_at
from autoseg.inference.items import find_items
from autoseg.inference.predictor import Predictor, model_digest
from autoseg.inference.quality import judge, network_indices
from autoseg.workspace.files import digest, write_text
from autoseg.workspace.settings import read_settings
from autoseg.workspace.stored import Stored, read_stored, write_stored
from autoseg.workspace.workspace import Workspace

log = logging.getLogger(__name__)

VERSION = 2
"""Raised whenever the meaning of a stored doubt changes."""
PREDICTED = "Dice is predicted as in quality.csv; an image that is not like the training data counts by the low end."
EXPECTED = (
    "Dice is what the probabilities expect: the ensemble has no quality.json, which takes cases out of fold "
    "(docs/quality.md)."
)
EVIDENCE = (
    "Evidence: in the one comparison that was made, by expected Dice and before quality.csv, such an order did not "
    "beat drawing images at random (docs/results.md#what-to-annotate-next). `--order random` draws them."
)


class Doubt(Stored):
    """What the models say of one image."""

    advice: ClassVar[str] = "Undo the edit, or delete the file and run `autoseg suggest` again."

    made_from: str
    """A digest of the image, the models and this version."""
    predicted_dice: dict[str, float]
    """Class -> the Dice that is expected; classes of which nothing is known are left out."""
    low: dict[str, float]
    """Class -> the lower end of its interval; the same where there is none."""
    reasons: tuple[str, ...]
    """Why the image is not like the training data, in words; none where it is, or where that is not known."""
    features: tuple[float, ...]
    """What the image is like: sizes, intensities, volumes."""

    @property
    def mean_dice(self) -> float:
        """Over the classes; 0 where nothing is known."""
        return _mean(self.predicted_dice)

    @property
    def loss(self) -> float:
        """Of Dice, that is expected: of an image unlike the training data the most that is."""
        return 1 - (_mean(self.low) if self.reasons else self.mean_dice)


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values) if values else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An image that could be annotated."""

    name: str
    images: tuple[Path, ...]
    group: str | None = None
    """The patient, where the list says so."""


def doubt_about(predictor: Predictor, images: Sequence[Path], made_from: str = "") -> Doubt:
    """How good a prediction is expected to be, and what the image is like.

    Args:
        predictor: the chosen ensemble, which counts what its predictions look like (`watches_traits`).

    Raises:
        DataError: The image cannot be read, or does not have the models' channels.
    """
    volume = read_image(tuple(images))
    predictor.check(volume, images[0].name)
    appearance = predictor.appearance(predictor.predict_labels(volume), volume.spacing_mm)
    names = predictor.label_map.named.names
    dice: dict[str, float] = {}
    low: dict[str, float] = {}
    reasons: tuple[str, ...] = ()
    if predictor.quality is not None:
        verdict = judge(predictor.quality, appearance)
        dice = {c.name: c.dice for c in verdict.classes if c.dice is not None}
        low = {c.name: c.dice if c.low is None else c.low for c in verdict.classes if c.dice is not None}
        reasons = verdict.reasons
    else:
        expected = [mean_expected_dice(appearance, i) for i in network_indices(predictor.label_map)]
        dice = low = {name: value for name, value in zip(names, expected, strict=True) if not math.isnan(value)}
    log_ml = np.log1p([shape.volume_ml for shape in appearance.shapes])
    return Doubt(
        made_from=made_from,
        predicted_dice={name: round(value, 6) for name, value in dice.items()},
        low={name: round(value, 6) for name, value in low.items()},
        reasons=reasons,
        features=tuple(round(float(v), 5) for v in (*_looks(volume), *log_ml)),
    )


def _looks(volume: Volume) -> list[float]:
    """Extent, voxel size, and of each channel how intensities spread; as logarithms where they are sizes."""
    values = [math.log(n * mm) for n, mm in zip(volume.grid.shape, volume.spacing_mm, strict=True)]
    values += [math.log(mm) for mm in volume.spacing_mm]
    for channel in volume.array:
        low, quarter, middle, high_quarter, high = np.percentile(channel, (0.5, 25, 50, 75, 99.5))
        spread = max(float(high - low), 1e-6)
        values += [math.log10(spread), *(float(v - low) / spread for v in (quarter, middle, high_quarter))]
    return values


def chosen_order(
    doubts: Mapping[str, Doubt], num: int, patients: Mapping[str, str] = MappingProxyType({})
) -> list[tuple[str, float]]:
    """Images to annotate, each with its distance to those before it.

    The most doubtful one first; then each time the one whose expected loss of Dice, times the distance to the nearest
    that was taken, is largest: a k-centre search weighted by doubt. No patient gets a second image before all have one.

    Args:
        doubts: image -> what the models say of it.
        num: how many to take.
        patients: image -> its patient; an image without one is of a patient of its own.

    Source: k-centre as a core set: Sener and Savarese 2018; the weight is a choice.
    """
    names = sorted(doubts)
    loss = np.array([doubts[name].loss for name in names])
    features = np.array([doubts[name].features for name in names], float)
    middle = np.median(features, axis=0)
    deviation = 1.4826 * np.median(np.abs(features - middle), axis=0)
    usual = np.where(deviation > 1e-9, deviation, np.maximum(features.std(axis=0), 1e-9))
    # An odd image counts as odd, but one feature alone must not decide.
    scaled = np.clip((features - middle) / usual, -5, 5) / math.sqrt(max(1, features.shape[1]))
    taken: list[tuple[str, float]] = []
    nearest = np.full(len(names), np.inf)
    left = set(range(len(names)))
    num_taken: Counter[str] = Counter()  # of each patient
    patient_of = [patients.get(name, name) for name in names]
    for _ in range(min(num, len(names))):
        fewest = min(num_taken[patient_of[i]] for i in left)
        gain = loss * (1 if not taken else nearest)
        best = max((i for i in sorted(left) if num_taken[patient_of[i]] == fewest), key=lambda i: float(gain[i]))
        taken.append((names[best], float("nan") if not taken else float(nearest[best])))
        left.remove(best)
        num_taken[patient_of[best]] += 1
        nearest = np.minimum(nearest, np.linalg.norm(scaled - scaled[best], axis=1))
    return taken


def one_of_each_patient(drawn: Sequence[Candidate]) -> list[Candidate]:
    """The same images; no patient has a second one before all have one."""
    num_before: Counter[str] = Counter()
    rounds = []
    for candidate in drawn:
        patient = candidate.group or candidate.name
        rounds.append(num_before[patient])
        num_before[patient] += 1
    return [drawn[i] for i in sorted(range(len(drawn)), key=lambda i: rounds[i])]


def candidates(workspace: Workspace, images: Path | None, predictor: Predictor) -> list[Candidate]:
    """The images that could be annotated: a folder's, else the list's unlabeled ones and testing ones without label.

    Raises:
        ConfigError: There is none.
    """
    if images is not None:
        if not images.exists():
            raise ConfigError(f"--images: {images}: no such file or folder.")
        output, names = workspace.run / "suggest" / "labels", predictor.channel_names
        items = find_items(images, output, predictor.num_channels, channel_names=names)
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
    predictor = load_predictor(workspace, device=device)
    predictor.watches_traits = True
    spec, quality = read_ensemble(workspace), predictor.quality
    found = candidates(workspace, images, predictor)
    rows: list[dict[str, object]]
    failures: list[str] = []
    if order == "random":
        drawn = one_of_each_patient([found[i] for i in np.random.default_rng(seed).permutation(len(found))])
        rows = [{"rank": n, "case": candidate.name} for n, candidate in enumerate(drawn[:num], 1)]
    else:
        models = {f"{a}_{f}": model_digest(workspace, a, f) for a, f in spec.members}
        inference = read_inference(workspace).model_dump(mode="json")
        made_from = [models, spec.key, inference, None if quality is None else quality.model_dump(mode="json")]
        doubts: dict[str, Doubt] = {}
        for done, candidate in enumerate(found, 1):
            try:
                doubts[candidate.name] = _kept_doubt(workspace, predictor, made_from, candidate)
            except DataError as error:
                failures += [f"{candidate.name}: left out: {message}" for message in error.messages]
            log.debug("suggest: %d of %d: %s", done, len(found), candidate.name)
        patients = {candidate.name: candidate.group for candidate in found if candidate.group is not None}
        if not doubts:
            raise WorkspaceError([f"{workspace.run}: no image could be predicted.", *failures])
        rows = [
            _row(rank, name, doubts[name], away, is_judged=quality is not None)
            for rank, (name, away) in enumerate(chosen_order(doubts, num, patients), 1)
        ]
    folder = workspace.run / "suggest"
    write_text(folder / "suggestions.csv", csv_text(COLUMNS, [{**dict.fromkeys(COLUMNS, ""), **row} for row in rows]))
    shown = COLUMNS[:-1]  # reasons are long
    table = format_rows(list(shown), [[_shown(row.get(key, "")) for key in shown] for row in rows])
    title = f"{len(rows)} of {counted(len(found), 'image')} to annotate next; {folder / 'suggestions.csv'}"
    told_by = [] if order == "random" else [EXPECTED if quality is None else PREDICTED]
    return "\n".join([title, table, *told_by, EVIDENCE, *failures])


COLUMNS = ("rank", "case", "predicted_dice", "like_training", "distance", "reason")


def _shown(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _row(rank: int, name: str, doubt: Doubt, away: float, *, is_judged: bool) -> dict[str, object]:
    return {
        "rank": rank,
        "case": name,
        "predicted_dice": round(doubt.mean_dice, 4),
        "like_training": "" if not is_judged else "no" if doubt.reasons else "yes",
        "distance": "" if math.isnan(away) else round(away, 4),
        "reason": "; ".join(doubt.reasons),
    }


def _kept_doubt(workspace: Workspace, predictor: Predictor, made_from: Sequence[object], candidate: Candidate) -> Doubt:
    """The doubt of an image; what was made from the same before is not made again."""
    path = workspace.run / "suggest" / "doubts" / f"{candidate.name}.json"
    if lost := [image for image in candidate.images if not image.exists()]:
        raise DataError(f"{lost[0]}: no such file.")
    key = digest([VERSION, *made_from, [image_digest(image) for image in candidate.images]])
    if path.exists() and (stored := read_stored(path, Doubt)).made_from == key:
        return stored
    doubt = doubt_about(predictor, candidate.images, key)
    write_stored(path, doubt)
    return doubt
