"""Folds of a cross-validation, where the user's list has none. They are those that scikit-learn deals."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from autoseg.data.datalists.cases import Case
from autoseg.errors import ConfigError, counted, some_of

MOST_FOLDS = 10
"""Folds without a case that are listed."""

logger = logging.getLogger(__name__)


def deal_folds(cases: Sequence[Case], *, num_fold: int, seed: int, may_be_fewer: bool = False) -> tuple[Case, ...]:
    """The cases with new folds, balanced over the classes they are annotated for, never splitting a patient.

    Args:
        num_fold: folds, at least 2.
        may_be_fewer: make one fold a patient where there are fewer patients than folds.

    Raises:
        ConfigError: As `make_folds`.
    """
    if may_be_fewer and 2 <= (num := count_patients(cases)) < num_fold:
        logger.warning("%d folds in place of %d: there are %d patients or cases.", num, num_fold, num)
        num_fold = num
    folds = make_folds(
        [c.name for c in cases],
        num_fold=num_fold,
        seed=seed,
        groups=[c.group for c in cases],
        strata=["" if c.annotated is None else "\n".join(sorted(c.annotated)) for c in cases],
    )
    return tuple(replace(c, fold=f) for c, f in zip(cases, folds, strict=True))


def count_patients(cases: Sequence[Case]) -> int:
    """Patients of some cases; a case that names none is of one of its own."""
    return len(set(_patients([c.name for c in cases], [c.group for c in cases])))


def _patients(names: Sequence[str], groups: Sequence[str | None]) -> list[str]:
    """The patient of each case; prefixes keep one who is called like another patient's case apart from it."""
    return [f"case {n}" if g is None else f"group {g}" for n, g in zip(names, groups, strict=True)]


def fold_faults(training: Sequence[Case]) -> list[str]:
    """What is wrong with the folds that a list gives its training cases; nothing where it gives none."""
    without = [c.name for c in training if c.fold is None]
    if len(without) == len(training):
        return []
    faults = []
    if without:
        faults.append(
            f"{some_of(without, most=3)}: no fold, but other cases have one. Give every training case a fold, or none."
        )
    return faults + _number_faults(training, is_whole=not without) + _patient_faults(training)


def _number_faults(training: Sequence[Case], *, is_whole: bool) -> list[str]:
    """A single fold, which leaves nothing to learn from, or numbers left out; `is_whole`: every case has a fold."""
    folds = sorted({c.fold for c in training if c.fold is not None})
    if len(folds) == 1 and is_whole:
        return [f"all {len(training)} training cases are in fold {folds[0]}. Expected at least 2 folds."]
    # No more are listed than there are cases, since a fold may be a large number by mistake.
    empty = [fold for fold in range(min(folds[-1], len(training))) if fold not in folds]
    if not empty:
        return []
    words = f"fold {empty[0]} has" if len(empty) == 1 else f"folds {', '.join(map(str, empty[:MOST_FOLDS]))} have"
    listed = ", ".join(map(str, folds))
    return [f"{words} no case (found folds {listed}). Number the folds 0, 1, 2, ... without gaps."]


def _patient_faults(training: Sequence[Case]) -> list[str]:
    """Patients that a model would both learn from and be validated on."""
    folds_of: dict[str, dict[int, str]] = {}
    for case in training:
        if case.group is not None and case.fold is not None:
            folds_of.setdefault(case.group, {}).setdefault(case.fold, case.name)
    faults = []
    for group, folds in folds_of.items():
        if len(folds) > 1:
            words = ", ".join(f"fold {fold} ({name})" for fold, name in sorted(folds.items()))
            faults.append(f"patient {group!r} is in {words}. Put all cases of a patient into one fold.")
    return faults


def make_folds(
    names: Sequence[str], *, num_fold: int, seed: int, groups: Sequence[str | None], strata: Sequence[str]
) -> list[int]:
    """Deal cases into folds of nearly equal size, balanced over strata, never splitting a patient.

    Args:
        names: unique names of the cases; the result does not depend on their order.
        num_fold: folds, at least 2.
        groups: patient of each case, or None where the case stands alone.
        strata: for each case, what is to be balanced over the folds, such as its annotated classes.

    Returns:
        Fold of each case, 0..num_fold-1, in the order of `names`; every fold has a case.

    Raises:
        ConfigError: Fewer cases or patients than folds.
    """
    patients = _patients(names, groups)
    grouped = len(set(patients)) < len(names)
    if num_fold < 2:
        raise ConfigError(f"num_fold: {num_fold}. Expected at least 2.")
    if len(set(patients)) < num_fold:
        found = counted(len(names), "training case")
        found += f" of {counted(len(set(patients)), 'patient')}" if grouped else ""
        remedy = f"Set num_fold: {len(set(patients))}, or add cases." if len(set(patients)) > 1 else "Add cases."
        raise ConfigError(f"num_fold: {num_fold} folds cannot be made of {found}. {remedy}")

    order = sorted(range(len(names)), key=lambda i: names[i])
    y = np.array(_merge_rare([strata[i] for i in order], num_fold))
    by = np.array([patients[i] for i in order])
    if grouped or len(set(y)) > 1:
        parts = _balanced_parts(y, by if grouped else None, num_fold, seed)
    else:
        parts = _shuffled_parts(len(names), num_fold, seed)
    folds = np.full(len(names), -1)
    for fold, part in enumerate(parts):
        folds[np.array(order)[part]] = fold
    return [int(f) for f in folds]


def _shuffled_parts(num: int, num_fold: int, seed: int) -> list[np.ndarray]:
    """Cases of each fold, where nothing is to be balanced: as scikit-learn's `KFold` deals them.

    Loading scikit-learn takes longer than analysing 200 small cases; most data sets need no more than this.
    """
    legacy = np.random.RandomState(seed)
    return np.array_split(legacy.permutation(num), num_fold)


def _balanced_parts(strata: np.ndarray, patients: np.ndarray | None, num_fold: int, seed: int) -> list[np.ndarray]:
    """Cases of each fold, balanced over strata; `patients`, None where each has one case, are never split."""
    from sklearn.model_selection import GroupKFold, StratifiedGroupKFold, StratifiedKFold

    options = {"n_splits": num_fold, "shuffle": True, "random_state": seed}
    if patients is None:
        splits = list(StratifiedKFold(**options).split(strata, strata))
    else:
        splits = list(StratifiedGroupKFold(**options).split(strata, strata, patients))
        if any(len(part) == 0 for _, part in splits):
            # The stratified splitter may leave a fold empty where patients differ much in size.
            splits = list(GroupKFold(**options).split(strata, strata, patients))
    return [part for _, part in splits]


def _merge_rare(strata: Sequence[str], num_fold: int) -> list[int]:
    """Number the strata; those with fewer cases than folds become one, or join the largest where that is rare too."""
    counts = Counter(strata)
    common = sorted((s for s in counts if counts[s] >= num_fold), key=lambda s: (-counts[s], s))
    number = {s: i for i, s in enumerate(common)}
    num_rare = sum(counts[s] for s in counts if s not in number)
    rare = len(common) if num_rare >= num_fold else 0
    return [number.get(s, rare) for s in strata]
