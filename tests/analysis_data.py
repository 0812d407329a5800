"""Small data sets for the tests of the analyzer, made file by file so that any one can be spoilt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from autoseg.analyzer import Analysis, analyze
from autoseg.config.settings import Settings
from autoseg.data.datalists.cases import Case, Datalist
from autoseg.workspace.workspace import Workspace

SHAPE = (14, 12, 10)
AFFINE = np.diag([1.0, 1.5, 2.0, 1.0])


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    """Write a NIfTI file as it is, without any of autoseg."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def make_image(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """An MRI of sorts: int16, hundreds of values, none below 0."""
    return np.random.default_rng(seed).integers(1, 900, shape).astype(np.int16)


def make_label(values: Sequence[int] = (1, 2), shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """A box of 27 voxels for each value, side by side along X."""
    label = np.zeros(shape, np.uint8)
    for place, value in enumerate(values):
        label[1 + 4 * place : 4 + 4 * place, 2:5, 2:5] = value
    return label


@dataclass(kw_only=True)
class DataSet:
    """A data set below a folder; sound unless a test spoils it."""

    root: Path
    num: int = 6
    num_fold: int = 3
    cases: list[Case] = field(default_factory=list)
    labels: dict[int, str] = field(default_factory=lambda: {1: "liver", 2: "tumor"})
    testing: list[Case] = field(default_factory=list)
    unlabeled: list[Case] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for number in range(self.num):
            self.add(fold=number % self.num_fold)

    def add(
        self,
        image: np.ndarray | None = None,
        label: np.ndarray | None = None,
        affine: np.ndarray = AFFINE,
        role: str = "training",
        **known: Any,
    ) -> Case:
        """One more case; of training by default, named case_0, case_1, ..."""
        number = len(self.cases) + len(self.testing) + len(self.unlabeled)
        name = f"case_{number}"
        path = save(self.root / "images" / f"{name}.nii.gz", make_image(number) if image is None else image, affine)
        answer = None
        if role == "training":
            answer = save(self.root / "labels" / f"{name}.nii.gz", make_label() if label is None else label, affine)
        case = Case(name=name, images=(path,), label=answer, **known)
        {"training": self.cases, "testing": self.testing, "unlabeled": self.unlabeled}[role].append(case)
        return case

    @property
    def datalist(self) -> Datalist:
        """The list as the reader would give it."""
        return Datalist(
            training=tuple(self.cases),
            testing=tuple(self.testing),
            unlabeled=tuple(self.unlabeled),
            labels=self.labels,
        )

    @property
    def workspace(self) -> Workspace:
        """The run's folder."""
        return Workspace(self.root / "work")

    def analyze(self, *, strict: bool = False, **settings: Any) -> Analysis:
        """Analyse it; faults are in the result unless `strict`."""
        given = {"modality": "MRI", "datalist": self.root / "datalist.json", "dataroot": self.root}
        made = Settings(**{**given, **self.settings, **settings})
        return analyze(self.datalist, made, self.workspace, progress=False, strict=strict)
