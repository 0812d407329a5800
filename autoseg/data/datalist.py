"""The list of cases: Auto3DSeg's datalist.json, and what it says about folds, patients and annotation."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from autoseg.data import foreign
from autoseg.data.folds import make_folds
from autoseg.data.listfile import LabelTable, load_json, parse_channels, parse_labels, unique_names
from autoseg.errors import ConfigError
from autoseg.annotations import nearest, suggest
from autoseg.workspace import write_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One patient's scan: its image files, its label if there is one, and what is known about both."""

    name: str
    """Unique within the data set and fit for a file name; from the image's file name."""
    images: tuple[Path, ...]
    """Absolute paths, one per channel or files with several channels."""
    label: Path | None = None
    fold: int | None = None
    """Validation fold the case belongs to, from 0; None: not in cross-validation."""
    annotated: tuple[str, ...] | None = None
    """Names of the classes its annotators looked for; None: not declared."""
    group: str | None = None
    """Patient; cases of one patient are never split over folds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Datalist:
    """All cases of a data set, sorted by role."""

    training: tuple[Case, ...]
    """Labelled, each with a fold 0..num_fold-1 once read; where the list named `validation` cases instead of
    folds, those come last, with fold 0, and the others have none."""
    validation: tuple[Case, ...] = ()
    """Labelled cases named beside folds; held back from training, not used to choose models."""
    testing: tuple[Case, ...] = ()
    """Predicted by the ensemble; scored where a label is given."""
    unlabeled: tuple[Case, ...] = ()
    labels: dict[int, str] = field(default_factory=dict)
    """Label value -> class name, background left out; empty where the file names none."""
    regions: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Name -> label values, where the list names regions made of several values; then `labels` is empty."""
    ignore_label: int | None = None
    """Value of voxels to leave out, where the list names one (nnU-Net's `ignore`)."""
    modality: str | None = None
    """As a foreign data set names it; None where it does not. Of several channels, the first one's."""
    channels: tuple[str, ...] = ()
    """Names of the channels, as a foreign data set gives them; empty where it does not."""
    path: Path | None = field(default=None, compare=False)

    @property
    def num_fold(self) -> int:
        """Number of folds."""
        return 1 + max((c.fold for c in self.training if c.fold is not None), default=-1)

    def train_cases(self, fold: int) -> tuple[Case, ...]:
        """The cases a fold's model learns from."""
        return tuple(c for c in self.training if c.fold != fold)

    def val_cases(self, fold: int) -> tuple[Case, ...]:
        """The cases a fold's model never sees."""
        return tuple(c for c in self.training if c.fold == fold)


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
"""Keys of MSD's dataset.json that say nothing about the cases; any other that resembles no key of ours is let be too."""
MOST_LINES = 10
"""Missing files named one by one; more are counted, since the data root is then wrong as a rule."""


def read_datalist(
    path: Path, dataroot: Path, *, num_fold: int = 5, seed: int = 0, extra_modalities: Sequence[str] = ()
) -> Datalist:
    """Read a datalist.json, or the dataset.json of MSD or nnU-Net, strictly.

    Args:
        path: the file.
        dataroot: folder its paths are relative to.
        num_fold: folds made where the file has none; they are balanced over the cases' annotated classes.
        seed: of those folds.
        extra_modalities: keys of a case's further images; they follow `image` as channels, in this order.

    Raises:
        ConfigError: The file or anything in it is wrong; all faults at once.
        DataError: The folder of an nnU-Net data set does not hold what its dataset.json says.
    """
    raw = load_json(path)
    root = Path(os.path.abspath(dataroot))
    if not root.is_dir():
        raise ConfigError(
            f"dataroot: {root} is not a folder. Expected the folder that the paths in {path.name} start from."
        )
    if foreign.is_nnunet(raw):
        raw = foreign.nnunet_to_plain(raw, root)
    elif foreign.is_msd(raw):
        raw = foreign.msd_to_plain(raw, root)
    return build_datalist(raw, root, path=path, num_fold=num_fold, seed=seed, extra_modalities=extra_modalities)


def build_datalist(
    raw: Any,
    root: Path,
    *,
    path: Path,
    num_fold: int | None = 5,
    seed: int = 0,
    extra_modalities: Sequence[str] = (),
) -> Datalist:
    """Check the content of a datalist.json and turn it into cases.

    Args:
        raw: what the file holds.
        root: absolute folder its paths are relative to.
        path: the file or folder to name in messages.
        num_fold: folds made where there are none; None makes none.

    Raises:
        ConfigError: All faults at once.
    """
    return _Reader(raw, root, path, tuple(extra_modalities)).read(num_fold, seed)


def write_datalist(datalist: Datalist, path: Path, dataroot: Path, *, extra_modalities: Sequence[str] = ()) -> None:
    """Write a datalist.json that reads back as an equal Datalist; all of the file or nothing.

    Args:
        dataroot: the paths in the file are relative to it.
        extra_modalities: keys for the last images of each case; the first ones stay under `image`.

    Raises:
        ConfigError: An image lies outside dataroot.
    """
    root = Path(os.path.abspath(dataroot))

    def relative(file: Path) -> str:
        if not file.is_relative_to(root):
            raise ConfigError(
                f"{path}: {file} lies outside dataroot {root}. Give a folder that holds all images and labels."
            )
        return file.relative_to(root).as_posix()

    def item(case: Case, *, with_fold: bool) -> dict[str, Any]:
        files = [relative(i) for i in case.images]
        main = files[: len(files) - len(extra_modalities)]
        made: dict[str, Any] = {"image": main[0] if len(main) == 1 else main}
        made |= dict(zip(extra_modalities, files[len(main) :], strict=True))
        if case.label is not None:
            made["label"] = relative(case.label)
        if with_fold and case.fold is not None:
            made["fold"] = case.fold
        if case.annotated is not None:
            made["annotated"] = list(case.annotated)
        return made | ({"group": case.group} if case.group is not None else {})

    data: dict[str, Any] = {}
    if datalist.channels:
        data["channel_names"] = list(datalist.channels)
    elif datalist.modality is not None:
        data["modality"] = datalist.modality
    if datalist.regions or datalist.ignore_label is not None:
        named: dict[str, Any] = {"background": 0, **{n: v for v, n in datalist.labels.items()}}
        named |= {n: list(v) for n, v in datalist.regions.items()}
        data["labels"] = named | ({"ignore": datalist.ignore_label} if datalist.ignore_label is not None else {})
    elif datalist.labels:
        data["labels"] = {str(v): n for v, n in datalist.labels.items()}
    folds = {c.fold for c in datalist.training}
    if None in folds and len(folds) > 1:
        data["training"] = [item(c, with_fold=False) for c in datalist.train_cases(0)]
        data["validation"] = [item(c, with_fold=False) for c in datalist.val_cases(0)]
    else:
        data["training"] = [item(c, with_fold=True) for c in datalist.training]
        data["validation"] = [item(c, with_fold=True) for c in datalist.validation]
    data["testing"] = [item(c, with_fold=True) for c in datalist.testing]
    data["unlabeled"] = [item(c, with_fold=True) for c in datalist.unlabeled]
    write_json(path, {k: v for k, v in data.items() if v != [] or k == "training"})


class _Reader:
    """One reading of a list: collects faults on the way."""

    def __init__(self, raw: Any, root: Path, path: Path, extra: tuple[str, ...]) -> None:
        self.raw, self.root, self.path, self.extra = raw, root, path, extra
        self.faults: list[str] = []
        self.missing: list[str] = []
        self.num_files = 0

    def fault(self, where: str, text: str) -> None:
        self.faults.append(f"{self.path}: {where}: {text}" if where else f"{self.path}: {text}")

    def read(self, num_fold: int | None, seed: int) -> Datalist:
        if not isinstance(self.raw, dict):
            raise ConfigError(
                f"{self.path}: holds a {type(self.raw).__name__}. Expected an object with a list `training`."
            )
        table, channels = self.head()
        cases = {role: self.role(role) for role in ROLES}
        self.check_files()
        self.check_twice(cases)
        whole = not self.faults
        flat = [c for role in ROLES for c in cases[role]]
        names = iter(unique_names([c.images[0].relative_to(self.root) for c in flat]) if whole else [])
        if whole:
            cases = {role: [replace(c, name=next(names)) for c in cases[role]] for role in ROLES}
        training = self.folds(cases, num_fold, seed)
        validation = () if any(c.fold is None for c in cases["training"]) else tuple(cases["validation"])
        if self.faults:
            raise ConfigError(self.faults)
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
                found = parse_channels(self.raw[key])
                if found is None:
                    self.fault(key, f'{self.raw[key]!r}. Expected a name, a list of names or {{"0": name}}.')
                channels = found or channels
        return table, channels

    def role(self, role: str) -> list[Case]:
        items = self.raw.get(role, [])
        if not isinstance(items, list):
            self.fault(role, f"{type(items).__name__}. Expected a list of cases.")
            return []
        made = [self.item(role, f"{role}[{i}]", item) for i, item in enumerate(items)]
        return [case for case in made if case is not None]

    def item(self, role: str, where: str, raw: Any) -> Case | None:
        """One case, named by its place for now; None where it is no object."""
        if isinstance(raw, str) and role in ("testing", "unlabeled"):
            raw = {"image": raw}
        if not isinstance(raw, dict):
            self.fault(where, f"{type(raw).__name__}. Expected an object such as {{image, label, fold}}.")
            return None
        valid = (*ITEM_KEYS, *self.extra)
        for key in raw:
            if key not in valid:
                remedy = suggest(key, valid)
                remedy += "" if nearest(key, valid) else " For another image, name the key under extra_modalities."
                self.fault(where, f"{key}: unknown key. {remedy}")
        images = self.images(where, raw)
        label = self.file(f"{where}.label", raw["label"]) if raw.get("label") not in (None, "") else None
        if label is None and role in ("training", "validation") and raw.get("label") in (None, ""):
            self.fault(where, "no label. Give one, or list the case under `unlabeled`.")
        if label is not None and label in images:
            self.fault(where, f"{raw['label']} is both image and label. Give each its own file.")
        fold = raw.get("fold")
        if fold is not None and (isinstance(fold, bool) or not isinstance(fold, int) or fold < 0):
            self.fault(where, f"fold: {fold!r}. Expected an integer from 0.")
            fold = None
        annotated = raw.get("annotated")
        if annotated is not None and not (isinstance(annotated, list) and all(isinstance(a, str) for a in annotated)):
            self.fault(where, f"annotated: {annotated!r}. Expected a list of class names.")
            annotated = None
        group = raw.get("group")
        if group is not None and (isinstance(group, bool) or not isinstance(group, str | int)):
            self.fault(where, f"group: {group!r}. Expected the patient's name or number.")
            group = None
        return Case(
            name=where,
            images=images,
            label=label,
            fold=fold,
            annotated=None if annotated is None else tuple(annotated),
            group=None if group is None else str(group),
        )

    def images(self, where: str, raw: dict[str, Any]) -> tuple[Path, ...]:
        """Image files of a case: those of `image`, then one of each extra modality."""
        found: list[Path | None] = []
        for key in ("image", *self.extra):
            value = raw.get(key)
            if value in (None, "", []):
                self.fault(
                    where,
                    f"no {key}. Expected the path of a file" + (" or a list of paths." if key == "image" else "."),
                )
            elif isinstance(value, list) and key == "image":
                found += [self.file(f"{where}.image[{c}]", v) for c, v in enumerate(value)]
            else:
                found.append(self.file(f"{where}.{key}", value))
        return tuple(f for f in found if f is not None)

    def file(self, where: str, value: Any) -> Path | None:
        """A path below the data root; links in it may lead anywhere."""
        if not isinstance(value, str) or not value:
            self.fault(where, f"{value!r}. Expected the path of a file.")
            return None
        path = Path(os.path.normpath(self.root / value))
        if not path.is_relative_to(self.root):
            self.fault(where, f"{value} lies outside dataroot {self.root}. Move it there, or give a dataroot above it.")
            return None
        self.num_files += 1
        if path.is_dir():
            self.fault(where, f"{value} is a folder. Expected a file.")
        elif not path.exists():
            self.missing.append(f"{self.path}: {where}: no file {value} in {self.root}.")
        return path

    def check_files(self) -> None:
        """Name the files that are not there; when none is, the data root is what is wrong."""
        if self.missing and len(self.missing) == self.num_files and self.num_files > 1:
            self.faults.append(
                f"{self.path}: none of its {self.num_files} files is in dataroot {self.root}, "
                f"not even the first: {self.missing[0].split('no file ', 1)[1].split(' in ', 1)[0]}. "
                "Set dataroot to the folder the paths start from."
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
        learnt: dict[str, set[str]] = {}
        for role in ("training", "validation", "testing"):
            for group in sorted({c.group for c in cases[role] if c.group is not None}):
                learnt.setdefault(group, set()).add(role)
        for group, roles in learnt.items():
            if len(roles) > 1:
                words = " and in ".join(r for r in ROLES if r in roles)
                self.fault("", f"patient {group!r} is in {words}. Keep a patient's cases together.")

    def folds(self, cases: dict[str, list[Case]], num_fold: int | None, seed: int) -> tuple[Case, ...]:
        """Check the folds, or make them; where the list names validation cases instead, those are fold 0."""
        training, validation = cases["training"], cases["validation"]
        listed = self.raw.get("training")
        if not isinstance(listed, list):
            return ()
        without = [c.name for c in training if c.fold is None]
        if not without or len(without) < len(training):
            self.check_folds(training, without)
            if validation and not without:
                logger.warning(
                    "%s: has folds and `validation`: the folds are used, the %d validation cases are held back.",
                    self.path,
                    len(validation),
                )
            return tuple(training)
        if validation:
            return (*training, *(replace(c, fold=0) for c in validation))
        if len(listed) < 2 and num_fold is not None:
            self.fault("training", f"{len(listed)} case. Expected at least 2, so that one can validate the other.")
        if self.faults or num_fold is None:
            return tuple(training)
        folds = make_folds(
            [c.name for c in training],
            num_fold=num_fold,
            seed=seed,
            groups=[c.group for c in training],
            strata=["" if c.annotated is None else "\n".join(sorted(c.annotated)) for c in training],
        )
        return tuple(replace(c, fold=f) for c, f in zip(training, folds, strict=True))

    def check_folds(self, training: Sequence[Case], without: Sequence[str]) -> None:
        if len(self.raw["training"]) < 2:
            self.fault(
                "training",
                f"{len(self.raw['training'])} case. Expected at least 2, so that one can validate the other.",
            )
            return
        if without:
            some = ", ".join(without[:3]) + (f" and {len(without) - 3} more" if len(without) > 3 else "")
            self.fault("", f"{some}: no fold, but other cases have one. Give every training case a fold, or none.")
        counts = Counter(c.fold for c in training if c.fold is not None)
        if len(counts) == 1 and not without:
            self.fault(
                "", f"all {len(training)} training cases are in fold {next(iter(counts))}. Expected at least 2 folds."
            )
        elif empty := [f for f in range(min(max(counts, default=0), len(training))) if f not in counts]:
            found = ", ".join(str(f) for f in sorted(counts))
            words = (
                f"fold {empty[0]} has" if len(empty) == 1 else f"folds {', '.join(map(str, empty[:MOST_LINES]))} have"
            )
            self.fault("", f"{words} no case (found folds {found}). Number the folds 0, 1, 2, ... without gaps.")
        where: dict[str, dict[int, str]] = {}
        for case in training:
            if case.group is not None and case.fold is not None:
                where.setdefault(case.group, {}).setdefault(case.fold, case.name)
        for group, by_fold in where.items():
            if len(by_fold) > 1:
                words = ", ".join(f"fold {f} ({name})" for f, name in sorted(by_fold.items()))
                self.fault("", f"patient {group!r} is in {words}. Put all cases of a patient into one fold.")
