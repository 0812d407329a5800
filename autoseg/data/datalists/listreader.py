"""The strict reading of a datalist.json's content: every fault found, then names and folds given."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from autoseg.config.fields import USUAL_NUM_FOLD
from autoseg.config.types import nearest
from autoseg.data.datalists.cases import Case, Datalist, MetaValue
from autoseg.data.datalists.channels import case_path
from autoseg.data.datalists.folds import deal_folds, fold_faults
from autoseg.data.datalists.listfile import LabelTable, parse_channels, parse_labels
from autoseg.data.datalists.metadata import PATIENT_KEYS, meta_value, misspelt
from autoseg.data.datalists.names import path_hint, unique_names
from autoseg.data.datalists.segments import segment_values, with_values
from autoseg.data.formats.label_files import masks_of
from autoseg.data.formats.table import has_image_suffix, is_image
from autoseg.errors import ConfigError, counted
from autoseg.terminal import printable

logger = logging.getLogger(__name__)

ROLES = ("training", "validation", "testing", "unlabeled")
ITEM_KEYS = ("image", "label", "fold", "annotated", "group")
TOP_KEYS = (*ROLES, "labels", "modality", "channel_names")
OTHER_KEYS = (
    "name",
    "description",
    "reference",
    "licence",
    "license",
    "release",
    "tensorImageSize",
    "numTraining",
    "numTest",
)
"""Keys of MSD's dataset.json that say nothing about the cases. Others that resemble no key of ours are let be too."""
MOST_LINES = 10
"""Missing files named one by one; more are counted, since the data root is then wrong as a rule."""


def build_datalist(
    raw: Any,
    root: Path,
    *,
    path: Path,
    num_fold: int | None = USUAL_NUM_FOLD,
    seed: int = 0,
    extra_modalities: Sequence[str] = (),
    may_be_fewer: bool = False,
) -> Datalist:
    """Check the content of a datalist.json and turn it into cases.

    Args:
        raw: what the file holds.
        root: absolute folder its paths are relative to.
        path: the file or folder to name in messages.
        num_fold: folds made where there are none; None makes none.
        may_be_fewer: whether so many folds are not needed where there are fewer patients.

    Raises:
        ConfigError: All faults at once.
    """
    return _Reader(raw, root, path, tuple(extra_modalities)).read(num_fold, seed, may_be_fewer=may_be_fewer)


class _Reader:
    """One reading of a list: collects faults on the way."""

    def __init__(self, raw: Any, root: Path, path: Path, extra: tuple[str, ...]) -> None:
        self.raw, self.root, self.path, self.extra = raw, root, path, extra
        self.faults: list[str] = []
        self.dropped: set[str] = set()
        self.missing: list[str] = []
        self.first_missing = ""
        self.num_files = 0

    def fault(self, where: str, text: str) -> None:
        self.faults.append(f"{self.path}: {where}: {text}" if where else f"{self.path}: {text}")

    def read(self, num_fold: int | None, seed: int, *, may_be_fewer: bool) -> Datalist:
        if not isinstance(self.raw, dict):
            raise ConfigError(
                f"{self.path}: holds a {type(self.raw).__name__}. Expected an object with a list `training`."
            )
        table, channels = self.head()
        cases = {role: self.role(role) for role in ROLES}
        self.check_files()
        self.check_twice(cases)
        self.check_folds(cases, num_fold)
        if self.faults:
            raise ConfigError(self.faults)
        values = segment_values(table.labels, table.regions)
        cases = {role: [with_values(case, values) for case in cases[role]] for role in ROLES}
        self.warn(cases)
        called = [case_path(case.images).relative_to(self.root) for role in ROLES for case in cases[role]]
        names = iter(unique_names(called))
        cases = {role: [replace(case, name=next(names)) for case in cases[role]] for role in ROLES}
        chosen = bool(cases["validation"]) and all(c.fold is None for c in cases["training"])
        training = self.folds(cases, num_fold, seed, may_be_fewer=may_be_fewer)
        validation = () if chosen else tuple(cases["validation"])
        return Datalist(
            training=training,
            validation=validation,
            testing=tuple(cases["testing"]),
            unlabeled=tuple(cases["unlabeled"]),
            labels=table.labels,
            regions=table.regions,
            ignore_label=table.ignore_label,
            modality=channels[0] if channels else None,
            channels=channels if len(channels) > 1 else (),
            path=self.path,
            folds_made=not chosen and num_fold is not None and all(c.fold is None for c in cases["training"]),
        )

    def head(self) -> tuple[LabelTable, tuple[str, ...]]:
        """Everything but the cases. Keys of other tools (name, licence, ...) are let be unless they look misspelt."""
        for key in self.raw:
            if key not in (*TOP_KEYS, *OTHER_KEYS) and (valid := nearest(key, TOP_KEYS)):
                self.fault("", f"{key}: unknown key. Did you mean {valid}?")
        if "training" not in self.raw:
            self.fault("", "no key `training`. Expected a list of {image, label}.")
        table = LabelTable()
        if "labels" in self.raw:
            table, faults = parse_labels(self.raw["labels"])
            for text in faults:
                self.fault("", text)
        channels: tuple[str, ...] = ()
        for key in ("modality", "channel_names"):
            if key in self.raw:
                named = parse_channels(self.raw[key])
                if named is None:
                    self.fault(key, f'{self.raw[key]!r}. Expected a name, a list of names or {{"0": name}}.')
                channels = named or channels
        return table, channels

    def role(self, role: str) -> list[Case]:
        items = self.raw.get(role, [])
        if not isinstance(items, list):
            self.fault(role, f"{type(items).__name__}. Expected a list of cases.")
            return []
        cases = [self.item(role, f"{role}[{i}]", item) for i, item in enumerate(items)]
        return [case for case in cases if case is not None]

    def item(self, role: str, where: str, raw: Any) -> Case | None:
        """One case, named by its place for now; None where it is no object."""
        if isinstance(raw, str) and role in ("testing", "unlabeled"):
            raw = {"image": raw}
        if not isinstance(raw, dict):
            self.fault(where, f"{type(raw).__name__}. Expected an object such as {{image, label, fold}}.")
            return None
        meta = self.meta(where, raw)
        images = self.images(where, raw)
        return Case(
            name=where,
            images=images,
            label=self.label(role, where, raw, images),
            fold=self.fold(where, raw),
            annotated=self.annotated(where, raw),
            group=self.group(where, raw),
            meta=meta,
        )

    def meta(self, where: str, raw: dict[str, Any]) -> dict[str, MetaValue]:
        """Further keys of a case; those that look like a misspelt key of ours, or name an image, are faults."""
        valid = (*ITEM_KEYS, *self.extra)
        meta: dict[str, MetaValue] = {}
        for key, value in raw.items():
            if key in valid:
                continue
            if known := misspelt(key, valid):
                self.fault(where, f"{key}: unknown key. Did you mean {known}?")
            elif isinstance(value, str) and has_image_suffix(Path(value)):
                self.fault(
                    where,
                    f"{key}: {value} is named like an image. Name the key under extra_modalities to read it as a "
                    "channel, or leave it out.",
                )
            elif (kept := meta_value(value)) is not None:
                meta[key] = kept
            elif isinstance(value, list | dict) or value in (math.inf, -math.inf):
                self.dropped.add(key)
        return meta

    def warn(self, cases: dict[str, list[Case]]) -> None:
        """Say what is not kept of further keys, and which of them means a patient."""
        for key in sorted(self.dropped):
            logger.warning(
                "%s: %s: lists, objects and infinite numbers are not kept of further keys of a case.", self.path, key
            )
        for key in sorted({k for role in ROLES for c in cases[role] for k in c.meta if k.casefold() in PATIENT_KEYS}):
            if not any(c.group for role in ROLES for c in cases[role]):
                logger.warning(
                    "%s: %s is kept as metadata alone. Call it `group` for scans of one patient to stay in one fold.",
                    self.path,
                    key,
                )

    def label(self, role: str, where: str, raw: dict[str, Any], images: tuple[Path, ...]) -> Path | None:
        """The label file, which cases to learn from must have."""
        if raw.get("label") in (None, ""):
            if role in ("training", "validation"):
                self.fault(where, "no label. Give one, or list the case under `unlabeled`.")
            return None
        label = self.file(f"{where}.label", raw["label"], is_label=True)
        if label is not None and label in images:
            self.fault(where, f"{raw['label']} is both image and label. Give each its own file.")
        return label

    def fold(self, where: str, raw: dict[str, Any]) -> int | None:
        """The case's own fold."""
        fold = raw.get("fold")
        if fold is None or (isinstance(fold, int) and not isinstance(fold, bool) and fold >= 0):
            return fold
        self.fault(where, f"fold: {fold!r}. Expected an integer from 0.")
        return None

    def annotated(self, where: str, raw: dict[str, Any]) -> tuple[str, ...] | None:
        """The classes that the case declares to be annotated."""
        names = raw.get("annotated")
        if names is None:
            return None
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return tuple(names)
        self.fault(where, f"annotated: {names!r}. Expected a list of class names.")
        return None

    def group(self, where: str, raw: dict[str, Any]) -> str | None:
        """The patient."""
        group = raw.get("group")
        if group is None:
            return None
        if isinstance(group, str | int) and not isinstance(group, bool):
            return str(group)
        self.fault(where, f"group: {group!r}. Expected the patient's name or number.")
        return None

    def images(self, where: str, raw: dict[str, Any]) -> tuple[Path, ...]:
        """Image files of a case: those of `image`, then one of each extra modality."""
        files: list[Path | None] = []
        for key in ("image", *self.extra):
            value = raw.get(key)
            if value in (None, "", []):
                self.fault(
                    where,
                    f"no {key}. Expected the path of a file" + (" or a list of paths." if key == "image" else "."),
                )
            elif isinstance(value, list) and key == "image":
                files += [self.file(f"{where}.image[{c}]", v) for c, v in enumerate(value)]
            else:
                files.append(self.file(f"{where}.{key}", value))
        return tuple(f for f in files if f is not None)

    def file(self, where: str, value: Any, *, is_label: bool = False) -> Path | None:
        """A path below the data root; links in it may lead anywhere. A label may be a folder of masks, too."""
        if not isinstance(value, str) or not value:
            self.fault(where, f"{value!r}. Expected the path of a file.")
            return None
        try:
            value.encode()
        except UnicodeEncodeError:
            self.fault(where, f"{printable(value)}: the name is not UTF-8. Rename the file.")
            return None
        path = Path(os.path.normpath(self.root / value))
        if not path.is_relative_to(self.root):
            self.fault(where, f"{value} lies outside dataroot {self.root}. Move it there, or give a dataroot above it.")
            return None
        self.num_files += 1
        try:
            exists = path.exists()
            is_folder = path.is_dir() and not is_image(path) and not (is_label and masks_of(path))
        except OSError as error:  # a name that is too long, a folder that may not be read
            self.fault(where, f"{value[:100]}: cannot be looked at ({error.strerror}). Correct the path.")
            return None
        if is_folder:
            expected = "the folder of a segmentation or of masks" if is_label else "the folder of a series"
            self.fault(where, f"{value} is a folder without DICOM files. Expected a file, or {expected}.")
        elif not exists:
            self.first_missing = self.first_missing or value
            self.missing.append(f"{self.path}: {where}: no file {value} in {self.root}.{path_hint(value)}")
        return path

    def check_files(self) -> None:
        """Name the files that are not there; when none is, the data root is what is wrong."""
        if self.missing and len(self.missing) == self.num_files and self.num_files > 1:
            self.faults.append(
                f"{self.path}: none of its {self.num_files} files is in dataroot {self.root}, "
                f"not even the first: {self.first_missing}. "
                f"{path_hint(self.first_missing).strip() or 'Set dataroot to the folder the paths start from.'}"
            )
            return
        self.faults += [f"{m} Copy it there, or correct the path." for m in self.missing[:MOST_LINES]]
        if len(self.missing) > MOST_LINES:
            self.faults.append(f"{self.path}: {len(self.missing) - MOST_LINES} more files are missing in {self.root}.")

    def check_twice(self, cases: dict[str, list[Case]]) -> None:
        """The same image, or the same patient, in two places."""
        seen: dict[Path, str] = {}
        for case in (c for role in ROLES for c in cases[role]):
            for image in case.images:
                if image in seen:
                    file = image.relative_to(self.root).as_posix()
                    self.fault(case.name, f"{file} is also the image of {seen[image]}. List it once.")
                seen.setdefault(image, case.name)
        # Whether unlabeled cases are learned from is known later: rounds of training then look at their patients, too.
        learnt: dict[str, set[str]] = {}
        for role in ("training", "validation", "testing"):
            for group in sorted({c.group for c in cases[role] if c.group is not None}):
                learnt.setdefault(group, set()).add(role)
        for group, roles in learnt.items():
            if len(roles) > 1:
                words = " and in ".join(r for r in ROLES if r in roles)
                self.fault("", f"patient {group!r} is in {words}. Keep a patient's cases together.")

    def folds(
        self, cases: dict[str, list[Case]], num_fold: int | None, seed: int, *, may_be_fewer: bool
    ) -> tuple[Case, ...]:
        """The training cases, each with a fold: its own, or one made; validation cases without folds are fold 0."""
        training, validation = cases["training"], cases["validation"]
        has_folds = any(c.fold is not None for c in training)
        if has_folds and validation:
            logger.warning(
                "%s: has folds and `validation`: the folds are used, the %d validation cases are held back.",
                self.path,
                len(validation),
            )
        if not has_folds and validation:
            return (*training, *(replace(c, fold=0) for c in validation))
        if has_folds or num_fold is None:
            return tuple(training)
        return deal_folds(training, num_fold=num_fold, seed=seed, may_be_fewer=may_be_fewer)

    def check_folds(self, cases: dict[str, list[Case]], num_fold: int | None) -> None:
        """Folds that leave nothing to learn from, or that let a patient be learnt and validated."""
        training, listed = cases["training"], self.raw.get("training")
        if not isinstance(listed, list):
            return
        fewest = 1 if cases["validation"] or num_fold is None else 2
        if len(listed) < fewest:
            words = "at least 2, so that one can validate the other" if fewest == 2 else "at least 1"
            self.fault("training", f"{counted(len(listed), 'case')}. Expected {words}.")
            return
        for text in fold_faults(training):
            self.fault("", text)
