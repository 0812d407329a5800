"""What a job's model says about the cases it never saw, kept so that the ensemble need not ask its network again.

<job>/validation/<case>.nii.gz   the labels, on the image's own grid
<job>/held_out/<case>.json       what they were made from, counts of calibration, time and memory
<job>/held_out/<case>.probs      the probabilities, where there are other algorithms to merge them with

A job writes them while it scores its held-out cases, and removes them with the model. Whoever reads them asks for a
key; what was made from other files, another model or by another version counts as missing, and so does what is damaged.
"""

from __future__ import annotations

import logging
import shutil
import time
import zlib
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import ValidationError

from autoseg.config.fields import Strict
from autoseg.data.datalists.cases import Case, case_digest, read_case_label
from autoseg.data.grid import Volume
from autoseg.data.labels import LabelMap
from autoseg.data.streams import MemoryImage
from autoseg.data.volumes import read_image, write_volume
from autoseg.evaluation.calibration import Calibration
from autoseg.inference.clock import Clock
from autoseg.inference.cost import Cost, facts_for, weights_bytes
from autoseg.inference.prob_files import ProbsGrid, RecordedRows, grid_of
from autoseg.inference.restore import Member, labels_of_means
from autoseg.inference.shortage import within_memory
from autoseg.inference.sides import BodyWatch
from autoseg.inference.traits import Traits
from autoseg.inference.windows import ProbRows, default_batch
from autoseg.workspace.files import digest, write_text
from autoseg.workspace.jobs import JobDir

log = logging.getLogger(__name__)

HELD_OUT_VERSION = 2
"""Raised whenever the meaning of what is kept changes."""
DISK_SHARE = 0.25
"""Of the disk that is free, or taken by a run's probabilities already, that these may take. A choice: the cache, the
checkpoints and the predictions need room as well, and without the probabilities the ensemble takes longer, no more."""

Kept = Literal["labels", "facts", "probabilities"]
"""What is kept of a held-out case: its labels alone; what one algorithm's ensemble needs; what several need."""


class PredictionCost(Strict):
    """What the prediction of a case took, or takes where nothing else is in memory."""

    load_s: float
    """Seconds to read the image."""
    pre_s: float
    """Seconds to preprocess it."""
    network_s: float
    """Seconds in the network."""
    rest_s: float
    """Seconds on the way back to the image's grid."""
    image_bytes: int
    """Of the image and its labels."""
    weights_bytes: int
    window_bytes: int
    """Of one pass, with as many windows as go through together."""
    rows_bytes: int
    """Of what is held for a slab."""


class HeldOut(Strict):
    """What is known of a job's prediction for a case it never saw."""

    made_from: str
    """As `held_out_key` has it."""
    label_crc: int
    """CRC-32 of the label file."""
    midline: float
    """The body's middle along X, in voxels, where classes of two sides were merged; else 0."""
    calibration: list[list[list[float]]]
    """As `Calibration.to_json` has it."""
    cost: PredictionCost
    traits: Traits
    """What the prediction looks like."""
    probs: ProbsGrid | None
    """What the file of probabilities holds; null where there is none."""


def label_file(job: JobDir, case: str) -> Path:
    """A job's labels for a case."""
    return job.predicted / f"{case}.nii.gz"


def probs_file(job: JobDir, case: str) -> Path:
    """A job's probabilities for a case."""
    return job.held_out / f"{case}.probs"


def _facts_file(job: JobDir, case: str) -> Path:
    return job.held_out / f"{case}.json"


def held_out_key(case: Case, model: str, counted: Collection[str] | None) -> str:
    """A digest of everything that a prediction and its calibration are made from.

    Args:
        case: its files must be there.
        model: as `job_digest` has it.
        counted: the model's classes that the case was annotated for; None: all.
    """
    return digest([HELD_OUT_VERSION, case_digest(case), model, None if counted is None else sorted(counted)])


def read_held_out(job: JobDir, case: str, key: str) -> HeldOut | None:
    """What a job kept of a case; None where it kept nothing, something else, or where it was damaged."""
    path = _facts_file(job, case)
    try:
        kept = HeldOut.model_validate_json(path.read_bytes())
        is_same = kept.made_from == key and kept.label_crc == zlib.crc32(label_file(job, case).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        log.info("%s: not readable (%s); %s is predicted again", path, str(error).splitlines()[0], case)
        return None
    return kept if is_same else None


def remove_held_out(job: JobDir) -> None:
    """Remove what was kept with a model before."""
    shutil.rmtree(job.held_out, ignore_errors=True)


def probs_room(job: JobDir) -> int:
    """Bytes that further probabilities of the job's run may take, by `DISK_SHARE`."""
    taken = sum(path.stat().st_size for path in job.root.parent.glob("*_*/held_out/*.probs"))
    return int(DISK_SHARE * (shutil.disk_usage(job.root).free + taken)) - taken


class LivePrediction:
    """One model's prediction of an image: its network runs as rows are asked for."""

    def __init__(self, cost: Cost, image: Volume, load_s: float) -> None:
        """Prepare the image.

        Args:
            cost: of a predictor with one model.
            image: as `read_image` gives it.
            load_s: seconds that took.

        Raises:
            DataError: The image does not have the channels that the model was trained with.
        """
        self._cost, self._image, self._load_s = cost, image, load_s
        self._clock = cost.predictor.clock = Clock()
        cost.predictor.watches_traits = True
        self._watched = BodyWatch(MemoryImage(image))
        (self.member,) = cost.predictor.each(self._watched)
        self._traits = cost.predictor.traits_watches()[0]

    @property
    def label_map(self) -> LabelMap:
        """The network's classes."""
        return self._cost.predictor.label_map

    @property
    def grid(self) -> ProbsGrid:
        """Of the probabilities."""
        return grid_of(self.member.rows, self.member.box, independent=self.label_map.sigmoid)

    def midline(self) -> float:
        """The body's middle along X in voxels, once all rows have passed; 0 where nobody needs it."""
        return self._watched.midline() if self.label_map.merged_sides else 0.0

    def traits(self) -> Traits:
        """What the prediction looks like, once all rows have passed."""
        (traits,) = self._traits.traits()
        return traits

    def took(self) -> PredictionCost:
        """What the prediction took, once all rows have passed."""
        predictor, rows, image = self._cost.predictor, self.member.rows, self._image
        assert isinstance(rows, ProbRows)
        facts = facts_for(predictor.models[0].plan, image.grid, len(image.array), self._watched.axis)
        on_cpu = predictor.device.type == "cpu"
        window = predictor.models[0].plan.preprocessing.turn_of(image.grid).triple(rows.window)
        return PredictionCost(
            load_s=self._load_s + self._clock.seconds["load"],
            pre_s=self._clock.seconds["pre"],
            network_s=rows.network_s,
            rest_s=self._cost.rest_s * facts.voxels,
            image_bytes=self._cost.image_bytes(facts) if on_cpu else 0,
            weights_bytes=weights_bytes(predictor.models[0]),
            window_bytes=self._cost.pass_bytes(0, window, default_batch(window, predictor.device)),
            rows_bytes=self._cost.rows_bytes([0], facts, predictor.options) if on_cpu else 0,
        )


def merge(
    members: Sequence[Member],
    subsets: Sequence[tuple[int, ...]],
    label: np.ndarray,
    label_map: LabelMap,
    counted: Collection[str] | None,
) -> tuple[list[np.ndarray], list[list[list[list[float]]]]]:
    """Labels of the means of subsets of predictions, and how well these know what they know.

    Args:
        members: the predictions.
        subsets: indices into `members`.
        label: (X, Y, Z) reference in RAS on the image's grid.
        label_map: the networks' classes.
        counted: those that the case was annotated for; None: all.

    Returns:
        For each subset labels (X, Y, Z), sides not split, and counts as `Calibration.to_json` has them.
    """
    target = label_map.encode(label)
    counts = [Calibration(target, label_map, counted) for _ in subsets]
    shape: tuple[int, int, int] = label.shape
    labels = labels_of_means(
        members, subsets, shape, label_map, watch=lambda k, place, probs: counts[k].add(place, probs)
    )
    return labels, [count.to_json() for count in counts]


def predict_held_out(
    cost: Cost, case: Case, job: JobDir, *, kept: Kept, model: str, counted: Collection[str] | None, most_bytes: int
) -> tuple[np.ndarray, Volume, str]:
    """Predict a case on its own grid and keep what is asked for.

    Args:
        cost: of a predictor with the job's model alone.
        case: with a label.
        job: whose folder it is kept in.
        kept: what is kept.
        model: digest of the job, as `job_digest` has it.
        counted: the model's classes that the case was annotated for; None: all.
        most_bytes: size of the file of probabilities above which none is kept.

    Returns:
        Labels (X, Y, Z) in RAS, the reference, and why there are no probabilities though they were asked for.

    Raises:
        ResourceError: Memory does not suffice.
    """
    predictor = cost.predictor
    begin = time.perf_counter()
    image = read_image(case.images)
    load_s = time.perf_counter() - begin
    label = read_case_label(case)
    target = label_file(job, case.name)
    if kept == "labels":
        pred = predictor.predict_labels(image)
        write_volume(target, pred, image.grid)
        return pred, label, ""
    path = probs_file(job, case.name) if kept == "probabilities" else None

    def passed() -> tuple[LivePrediction, np.ndarray, list[list[list[float]]], str]:
        live = LivePrediction(cost, image, load_s)
        recorded: RecordedRows | None = None
        with ExitStack() as stack:
            member = live.member
            if path is not None:
                recorded = stack.enter_context(RecordedRows(member.rows, live.grid, path, most_bytes=most_bytes))
                member = replace(member, rows=recorded)
            (pred,), (calibration,) = merge([member], [(0,)], label.array[0], live.label_map, counted)
        return live, pred, calibration, recorded.why_not if recorded is not None else ""

    live, pred, calibration, why_not = within_memory([predictor], case.name, passed)
    midline = live.midline()
    predictor.finish(pred, image.spacing_mm, midline)
    write_volume(target, pred, image.grid)
    held_out = HeldOut(
        made_from=held_out_key(case, model, counted),
        label_crc=zlib.crc32(target.read_bytes()),
        midline=midline,
        calibration=calibration,
        cost=live.took(),
        traits=live.traits(),
        probs=live.grid if path is not None and not why_not else None,
    )
    write_text(_facts_file(job, case.name), held_out.model_dump_json())  # last: the others are whole once it is there
    return pred, label, why_not
