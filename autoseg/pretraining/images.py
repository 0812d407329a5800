"""Which images a pretraining learns from, so that no score is flattered by it.

Cases that are scored are those of the folds, and labelled ones that were held back (`testing`, `validation`). An image
counts as such a case's, too, where it is of the same patient or holds the same voxels.

- Images of no such case make one pretraining for all folds, where there are as many of them as cases in the folds.
- Else each fold has its own: those, and the images of the cases that its models learn from. It takes as many times the
  time, so that a run with many images beside its labels does not do it.
- `pretrain.all_images` makes one of all images, also of those that are scored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from autoseg.config.settings import PretrainSettings
from autoseg.data.datalists.cases import Case, Datalist, images_digest, without_label
from autoseg.errors import ConfigError, counted
from autoseg.workspace.pretraining import ROLES, Lesson

VALIDATION_SHARE = 171 / 771
"""Of the images: those by which the best weights are found. Source: Clara's split of 771 images."""
FEWEST_IMAGES = 2
"""One to learn from, one to find the best weights by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSet:
    """Images of one pretraining."""

    fold: int | None
    """Whose jobs start from it; None: those of all folds."""
    cases: tuple[Case, ...]
    """Without labels."""
    scored: tuple[str, ...] = ()
    """Of these, the cases that models are scored on."""


def image_sets(datalist: Datalist, folds: Sequence[int], *, all_images: bool, has_rounds: bool) -> list[ImageSet]:
    """The images of each pretraining that a run needs.

    Args:
        datalist: the run's.
        folds: that are trained.
        all_images: learn from images of scored cases, too.
        has_rounds: the run has rounds of training, which may have other folds each: then one pretraining serves all.

    Raises:
        ConfigError: There are too few images.
    """
    by_fold = [case for case in datalist.training if case.fold is not None]
    held_back = [*datalist.validation, *(case for case in datalist.testing if case.label is not None)]
    scored = [*by_fold, *held_back]
    if all_images:
        chosen = tuple(map(without_label, _once(datalist.cases)))
        names = {case.name for case in _like(chosen, scored)}
        return _checked([ImageSet(fold=None, cases=chosen, scored=tuple(sorted(names)))])
    names_scored = {case.name for case in scored}
    beside = _unlike([case for case in datalist.cases if case.name not in names_scored], scored)
    if len(beside) >= len(by_fold) or has_rounds:
        return _checked([ImageSet(fold=None, cases=tuple(map(without_label, beside)))])
    rest = [case for case in datalist.cases if case.name not in names_scored] + by_fold
    sets = []
    for fold in folds:
        unseen = [case for case in by_fold if case.fold == fold] + held_back
        names = {case.name for case in unseen}
        cases = _unlike([case for case in rest if case.name not in names], unseen)
        sets.append(ImageSet(fold=fold, cases=tuple(map(without_label, cases))))
    return _checked(sets)


def _checked(sets: list[ImageSet]) -> list[ImageSet]:
    least = min(len(images.cases) for images in sets)
    if least < FEWEST_IMAGES:
        raise ConfigError(
            f"pretrain: found {counted(least, 'image')} that may be learned from, expected at least {FEWEST_IMAGES}. "
            "List images without labels under `unlabeled` in the datalist, or set pretrain.all_images: true to learn "
            "from the images of cases that models are scored on."
        )
    return sets


def _like(cases: Iterable[Case], others: Iterable[Case]) -> list[Case]:
    """Cases that are of the patient, or hold the voxels, of one of the others."""
    patients, contents = {case.group for case in others} - {None}, {images_digest(case) for case in others}
    return [case for case in cases if case.group in patients or images_digest(case) in contents]


def _unlike(cases: Sequence[Case], others: Sequence[Case]) -> list[Case]:
    """All that are not, each content once."""
    like = {case.name for case in _like(cases, others)}
    return _once(case for case in cases if case.name not in like)


def _once(cases: Iterable[Case]) -> list[Case]:
    """The first case of each content."""
    return list({images_digest(case): case for case in reversed([*cases])}.values())[::-1]


def lesson_of(images: ImageSet, datalist: Datalist, settings: PretrainSettings, seed: int) -> Lesson:
    """What is learned from some images, and which of them find the best weights: whole patients.

    Args:
        datalist: that says which role each case has.
        settings: with a method.
        seed: of the choice.
    """
    assert settings.method != "none"
    patients: dict[str, list[str]] = {}
    for case in sorted(images.cases, key=lambda case: case.name):
        patients.setdefault(f"case {case.name}" if case.group is None else f"patient {case.group}", []).append(
            case.name
        )
    groups = list(patients.values()) if len(patients) > 1 else [[name] for names in patients.values() for name in names]
    wanted = max(1, round(VALIDATION_SHARE * len(images.cases)))
    validation: list[str] = []
    for number in np.random.default_rng([seed, 104_729]).permutation(len(groups))[:-1]:
        if len(validation) >= wanted:
            break
        validation += groups[number]
    role_of = {case.name: role for role in ROLES for case in getattr(datalist, role)}
    counts = Counter(role_of[case.name] for case in images.cases)
    return Lesson(
        method=settings.method,
        mask_share=settings.mask_share,
        mask_block=settings.mask_block,
        temperature=settings.temperature,
        for_all_folds=images.fold is None,
        all_images=settings.all_images,
        training=tuple(case.name for case in images.cases if case.name not in validation),
        validation=tuple(sorted(validation)),
        roles={role: counts[role] for role in ROLES},
        scored=images.scored,
    )


def images_named(datalist: Datalist, names: Iterable[str]) -> tuple[Case, ...]:
    """Cases by name, without labels.

    Raises:
        ConfigError: One of them is not in the list any more.
    """
    known = {case.name: case for case in datalist.cases}
    names = [*names]
    if missing := [name for name in names if name not in known]:
        raise ConfigError(
            f"pretrain: {missing[0]} is not in the datalist any more. Run `autoseg pretrain` or `autoseg run` again."
        )
    return tuple(without_label(known[name]) for name in names)
