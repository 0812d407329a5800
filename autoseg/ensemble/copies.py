"""Predictions of corrupted copies of training cases by the models that never saw these: `ensemble/spoilt.json`.

Quality is learned from some, robustness measured by others. Each is made once, and all of them end in time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import numpy as np

from autoseg.data.datalists.cases import Case, read_case_label
from autoseg.data.labels import LabelMap
from autoseg.data.streams import is_streamed
from autoseg.data.volumes import read_image
from autoseg.ensemble.corruptions import SHARE, TRYING_SHARE, corrupt
from autoseg.ensemble.out_of_fold import case_digest
from autoseg.errors import DataError
from autoseg.evaluation.metrics import dice_per_class
from autoseg.evaluation.shapes import ClassShape, shapes_of
from autoseg.inference.ensemble_spec import EnsembleSpec
from autoseg.inference.postprocess import deeds
from autoseg.inference.predictor import Predictor, model_digest
from autoseg.inference.traits import Traits
from autoseg.workspace.files import digest
from autoseg.workspace.stored import Stored, read_stored, write_stored
from autoseg.workspace.workspace import Workspace

VERSION = 2
"""Raised whenever copies are corrupted in another way, or something else is kept of them."""


class StoredCopy(Stored):
    """A prediction of a corrupted copy."""

    case: str
    fold: int
    kind: str
    traits: dict[str, Traits]
    """By job."""
    shapes: tuple[ClassShape, ...]
    truth: tuple[ClassShape | None, ...]
    dice: tuple[float | None, ...]
    spacing_mm: tuple[float, float, float]
    shape: tuple[int, int, int]


class StoredCopies(Stored):
    """What stands in ensemble/spoilt.json."""

    made_from: str
    """A digest of the models, and of how their predictions are combined and cleaned."""
    copies: dict[str, StoredCopy]
    """By a digest of the case, the corruption and what it drew from."""


class Copies:
    """Predicts corrupted copies, as long as there is time."""

    def __init__(
        self,
        workspace: Workspace,
        spec: EnsembleSpec,
        *,
        device: str,
        image_s: float,
        spare_s: Callable[[], float] | None = None,
    ) -> None:
        """Take up what was predicted before by the same models.

        Args:
            spec: the chosen ensemble, of which each fold's models predict that fold's cases.
            device: where networks run.
            image_s: that such a prediction is expected to take.
            spare_s: how much of the run's budget is left to them; None: there is no budget.
        """
        self.workspace, self.spec, self.device = workspace, spec, device
        self.image_s, self.spare_s = image_s, spare_s
        self._took_s: list[float] = []
        trained_s = sum(job.seconds for job in workspace.jobs() if job.state == "done")
        # Between rounds nobody asks for them.
        self.trained_s = trained_s if workspace.is_last_round else 0.0
        self.spent_s = 0.0
        self.kept_s = 0.0
        """Of the budget, for what is yet to come after them."""
        self.models = {f"{a}_{f}": model_digest(workspace, a, f) for a, f in spec.members}
        self.made_from = digest([VERSION, self.models, spec.combine, deeds(spec.postprocessing)])
        self._predictors: dict[int, Predictor] = {}
        self.copies: dict[str, StoredCopy] = {}
        if workspace.spoilt.exists():
            stored = read_stored(workspace.spoilt, StoredCopies)
            if stored.made_from == self.made_from:
                self.copies = stored.copies

    @property
    def expected_s(self) -> float:
        """Seconds that a copy takes: the mean of those before."""
        return sum(self._took_s) / len(self._took_s) if self._took_s else self.image_s

    @property
    def learning_s(self) -> float:
        """Seconds left for what quality is learned from, so that robustness has its share."""
        return self.left_s - TRYING_SHARE * self.trained_s

    @property
    def left_s(self) -> float:
        """Seconds left for all copies."""
        left_s = SHARE * self.trained_s - self.spent_s
        return left_s if self.spare_s is None else min(left_s, self.spare_s() - self.kept_s)

    def can_predict(self, case: Case, fold: int) -> bool:
        """Whether a case's image may be held whole, and models of the ensemble have not seen it."""
        return any(f == fold for _, f in self.spec.members) and not is_streamed(case.images)

    def key(self, case: Case, kind: str, seeds: Sequence[int], strength: float | None = None) -> str:
        """What a copy is known by.

        Raises:
            DataError: A file is missing.
        """
        return digest([case_digest(case, {}, ""), kind, list(seeds), strength])

    def predict(
        self, case: Case, fold: int, kind: str, seeds: Sequence[int], strength: float | None = None
    ) -> StoredCopy:
        """The prediction of a copy; what is there is not made again.

        Args:
            kind, strength: as `corrupt` takes them.
            seeds: what is drawn is drawn by.

        Raises:
            DataError: A file cannot be read, or the copy is refused.
        """
        key = self.key(case, kind, seeds, strength)
        if key not in self.copies:
            begin = time.monotonic()
            predictor = self._predictor(fold)
            loaded = time.monotonic()
            try:
                self.copies[key] = _predicted(predictor, case, fold, kind, seeds, strength)
            finally:
                ended = time.monotonic()
                self._took_s.append(ended - loaded)
                self.spent_s += ended - begin
        return self.copies[key]

    def save(self) -> None:
        """Store all."""
        write_stored(self.workspace.spoilt, StoredCopies(made_from=self.made_from, copies=self.copies))

    def _predictor(self, fold: int) -> Predictor:
        if fold not in self._predictors:
            jobs = [self.workspace.job_dir(algo, f) for algo, f in self.spec.members if f == fold]
            self._predictors[fold] = Predictor(
                jobs, device=self.device, combine=self.spec.combine, rules=self.spec.postprocessing
            )
            self._predictors[fold].watches_traits = True
        return self._predictors[fold]


def truth_shapes(
    case: Case, label: np.ndarray, label_map: LabelMap, spacing_mm: tuple[float, float, float]
) -> tuple[ClassShape | None, ...]:
    """Shapes of a label's classes; None for those that the case is not annotated for."""
    shapes = shapes_of(label, label_map, spacing_mm)
    counted = label_map.names if case.annotated is None else case.annotated
    return tuple(s if n in counted else None for n, s in zip(label_map.names, shapes, strict=True))


def _predicted(
    predictor: Predictor, case: Case, fold: int, kind: str, seeds: Sequence[int], strength: float | None
) -> StoredCopy:
    image, truth = read_image(case.images), read_case_label(case).array[0]
    if image.array.shape[1:] != truth.shape:
        raise DataError(f"{case.label}: not on the grid of {case.images[0].name}. Export the label again.")
    copy, label = corrupt(kind, image, truth, np.random.default_rng([*seeds]), strength)
    said = predictor.predict_labels(copy)
    label_map = predictor.label_map.named
    x, y, z = said.shape
    return StoredCopy(
        case=case.name,
        fold=fold,
        kind=kind,
        traits=predictor.traits(),
        shapes=tuple(shapes_of(said, label_map, copy.spacing_mm)),
        truth=truth_shapes(case, label, label_map, copy.spacing_mm),
        dice=tuple(
            None if math.isnan(d) else d for d in dice_per_class(said, label, label_map, annotated=case.annotated)
        ),
        spacing_mm=copy.spacing_mm,
        shape=(x, y, z),
    )
