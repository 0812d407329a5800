"""The analysis of a folder that nobody has described: with labels where a layout is recognised, else images alone."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path

from autoseg.analyzer.analysis import analyze
from autoseg.analyzer.result import Analysis
from autoseg.config.settings import Settings
from autoseg.data.datalists.cases import Case, Datalist
from autoseg.data.datalists.layouts import recognise
from autoseg.data.datalists.names import unique_names
from autoseg.data.datalists.segments import name_segments
from autoseg.data.formats.table import PATTERNS_TEXT, image_files, pictures_instead
from autoseg.errors import DataError
from autoseg.workspace.workspace import Workspace


def analyze_folder(folder: Path, *, progress: bool = True) -> Analysis:
    """Analyse a folder without an input.yaml. Nothing is kept; faults are told in the result, never raised.

    Raises:
        DataError: The folder is not there, or holds no image.
    """
    root = Path(os.path.abspath(folder))
    if not root.is_dir():
        raise DataError(f"{folder}: no such folder. Give the folder that holds the images.")
    datalist = _datalist(root)
    settings = Settings(modality=datalist.modality or "unknown", datalist=root, dataroot=root, on_fault="skip")
    with tempfile.TemporaryDirectory(prefix="autoseg-analyze-") as scratch:
        return analyze(datalist, settings, Workspace(Path(scratch)), progress=progress, strict=False)


def _datalist(root: Path) -> Datalist:
    """The cases: as a recognised layout has them, else every image as a case of its own."""
    try:
        datalist = recognise(root, num_fold=None)
        return _with_names(replace(datalist, training=tuple(replace(c, fold=None) for c in datalist.training)))
    except DataError:
        images = image_files(root, deep=True)
        if not images:
            raise DataError(f"{root}: no image in it. Expected {PATTERNS_TEXT}.{pictures_instead(root)}") from None
    names = unique_names([p.relative_to(root) for p in images])
    return Datalist(training=(), unlabeled=tuple(Case(name=n, images=(p,)) for n, p in zip(names, images, strict=True)))


def _with_names(datalist: Datalist) -> Datalist:
    """The list with the classes that its labels name, as far as they can be read: the analysis says what is wrong."""
    try:
        return name_segments(datalist)[0]
    except DataError:
        return datalist
