"""Which cases train in which round, and the folds they train in."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from autoseg.config.settings import Settings
from autoseg.config.types import suggest
from autoseg.data.datalists.cases import Case, Datalist
from autoseg.data.datalists.folds import count_patients, deal_folds
from autoseg.data.datalists.metadata import text_of
from autoseg.data.labels import LabelMap
from autoseg.errors import ConfigError

log = logging.getLogger(__name__)

AT_ONCE = "Set `strategy: both` or `strategy: marginal`, which train on every labelled case at once."
"""What helps where two_stage cannot begin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class How:
    """`strategy` and `pseudolabel` of the settings, every default settled."""

    strategy: Literal["two_stage", "marginal", "both"]
    exclude: tuple[str, ...]
    rounds: int
    continues: bool
    """Later rounds start from the weights of the one before, and keep its folds."""
    unlabeled: bool
    filters: bool
    confidence: float
    background_confidence: float
    soft: bool
    max_disagreement: float
    reject: float
    min_dice: float
    folds_by: str | None = None
    """Key of the cases whose values are the folds, in every round."""

    @classmethod
    def of(cls, settings: Settings) -> How:
        """Settle the defaults: two_stage as the FLARE23 paper has it, both as seems best."""
        options = settings.pseudolabel
        both = settings.strategy == "both"
        return cls(
            strategy=settings.strategy,
            folds_by=settings.folds_by,
            exclude=options.exclude,
            rounds=options.rounds,
            continues=both if options.start is None else options.start == "previous",
            unlabeled=both if options.unlabeled is None else options.unlabeled,
            filters=both if options.filter is None else options.filter,
            confidence=options.confidence,
            background_confidence=options.background_confidence,
            soft=options.soft,
            max_disagreement=options.max_disagreement,
            reject=options.reject,
            min_dice=options.min_dice,
        )


def known_classes(cases: Sequence[Case], names: Sequence[str]) -> tuple[str, ...]:
    """The classes that some training case is annotated for, so that a model can know them."""
    return tuple(n for n in names if any(c.annotated is None or n in c.annotated for c in cases))


def missing_classes(case: Case, known: Sequence[str], exclude: Sequence[str]) -> tuple[str, ...]:
    """The classes to fill in for a case: those that others are annotated for and it is not."""
    if case.label is not None and case.annotated is None:
        return ()
    have = (*(case.annotated or ()), *exclude) if case.label is not None else exclude
    return tuple(n for n in known if n not in have)


def cases_to_fill(datalist: Datalist, names: Sequence[str], how: How) -> list[tuple[Case, tuple[str, ...]]]:
    """Every case that something is to be filled in for, with these classes."""
    known = known_classes(datalist.training, names)
    cases = (*datalist.training, *(datalist.unlabeled if how.unlabeled else ()))
    missing = [(c, missing_classes(c, known, how.exclude)) for c in cases]
    return [(c, classes) for c, classes in missing if classes]


def why_one_round(datalist: Datalist, label_map: LabelMap, settings: Settings) -> str:
    """Why there is nothing to fill in, in words; empty where there is something."""
    how = How.of(settings)
    if settings.partial_labels == "off":
        return "partial_labels is off"
    if how.strategy == "marginal":
        return "strategy is marginal"
    if cases_to_fill(datalist, label_map.names, how):
        return ""
    if cases_to_fill(datalist, label_map.names, replace(how, exclude=())):
        return "pseudolabel.exclude names all that is missing"
    return "every case is annotated for the same classes"


def count_rounds(datalist: Datalist, label_map: LabelMap, settings: Settings) -> int:
    """How many rounds of training a run has: one where there is nothing to fill in.

    Args:
        datalist: the run's own, with what each case is annotated for.

    Raises:
        ConfigError: The settings of pseudo-labels do not fit the classes, or unlabeled cases would join whose patients
            are tested on.
    """
    how = How.of(settings)
    unknown = [n for n in how.exclude if n not in label_map.names]
    if unknown:
        raise ConfigError([f"pseudolabel.exclude: no class {n}. {suggest(n, label_map.names)}" for n in unknown])
    if why := why_one_round(datalist, label_map, settings):
        if settings.partial_labels != "off":
            log.info("one round of training, since there is nothing to fill in: %s", why)
        return 1
    if how.unlabeled:
        _check_patients(datalist)
    counts = Counter(v for values in label_map.values for v in values)
    if any(n > 1 for n in counts.values()):
        raise ConfigError(
            f"strategy: {how.strategy} fills in missing classes, but label value {counts.most_common(1)[0][0]} belongs "
            "to several regions, so that a label file cannot hold one of them and not the others. "
            "Set `strategy: marginal`, which trains on each case's own regions."
        )
    return how.rounds


def _check_patients(datalist: Datalist) -> None:
    """Refuse unlabeled cases that are to join the training while their patients are held back from it.

    One whose patient trains joins in that patient's fold (`read_cases`).
    """
    joining = {c.group for c in datalist.unlabeled if c.group is not None}
    faults = [
        f"patient {group!r} is in unlabeled and in {role}, and unlabeled images join the training. Keep a patient's "
        "cases together, or set `pseudolabel: {unlabeled: false}`."
        for role, cases in (("validation", datalist.validation), ("testing", datalist.testing))
        for group in sorted({c.group for c in cases if c.group in joining and c.group is not None})
    ]
    if faults:
        raise ConfigError(faults)


def first_round(datalist: Datalist, label_map: LabelMap, settings: Settings) -> Datalist:
    """The cases of the first round: the fully annotated ones for two_stage, else all.

    They get new folds, unless the list names its validation cases: that split is kept in all rounds.

    Raises:
        ConfigError: two_stage, and too few cases are fully annotated to train on some and validate on others.
    """
    if settings.strategy != "two_stage":
        return datalist
    known = known_classes(datalist.training, label_map.names)
    full = [c for c in datalist.training if c.annotated is None or set(known) <= set(c.annotated)]
    num_fold = min(datalist.num_fold, count_patients(full))
    if datalist.num_fold == 1:
        if {c.fold for c in full} != {None, 0}:
            raise ConfigError(_too_few(datalist, known, full))
        return replace(datalist, training=tuple(full))
    if num_fold < 2:
        raise ConfigError(_too_few(datalist, known, full))
    if settings.folds_by is not None:
        return replace(datalist, training=_renumbered(full, datalist, settings.folds_by))
    return replace(datalist, training=deal_folds(full, num_fold=num_fold, seed=settings.seed))


def _renumbered(cases: Sequence[Case], datalist: Datalist, key: str) -> tuple[Case, ...]:
    """Some of the cases, whose folds are values of a key, in as many folds as they have values.

    Raises:
        ConfigError: They have one value alone.
    """
    folds = sorted({c.fold for c in cases if c.fold is not None})
    if len(folds) < 2:
        raise ConfigError(
            f"folds_by: {key}: the fully annotated cases, which train first, have one value alone. {AT_ONCE}"
        )
    return tuple(replace(c, fold=None if c.fold is None else folds.index(c.fold)) for c in cases)


def _too_few(datalist: Datalist, known: Sequence[str], full: Sequence[Case]) -> str:
    """Why two_stage cannot begin with the fully annotated cases, and what can."""
    most = max(datalist.training, key=lambda c: len(set(known) & set(known if c.annotated is None else c.annotated)))
    lacking = [n for n in known if most.annotated is not None and n not in most.annotated]
    if not full:
        complete = f"none is; the most complete one, {most.name}, lacks {', '.join(lacking)}"
    elif datalist.num_fold == 1:
        complete = f"none of the {'validation' if full[0].fold is None else 'training'} cases is"
    else:
        complete = "one patient alone is, which leaves none to validate on"
    return (
        f"strategy: two_stage begins with the cases that are annotated for all {len(known)} classes, but {complete}. "
        f"{AT_ONCE}"
    )


def _by_value(cases: Sequence[Case], previous: Datalist, key: str) -> tuple[Case, ...]:
    """All cases in the folds that the values of a key have in the round before; new values are dealt out in turn."""
    fold_of = {text_of(c.meta[key]): c.fold for c in previous.training if key in c.meta}
    new = sorted({text_of(c.meta[key]) for c in cases if key in c.meta} - set(fold_of))
    fold_of |= {value: i % previous.num_fold for i, value in enumerate(new)}
    return tuple(replace(c, fold=fold_of[text_of(c.meta[key])]) if key in c.meta else c for c in cases)


def later_round(datalist: Datalist, previous: Datalist, how: How, *, number: int, seed: int) -> Datalist:
    """The cases of a round after the first: all, in new folds unless it goes on from the previous one's weights.

    A model that has begun on some cases must go on with them, or its score on the others would flatter it: so where
    weights are kept, folds are, too, and only cases that are new are dealt out. Validation cases that the list names
    stay what they are.

    Args:
        datalist: the run's own.
        previous: of the round before.

    Source: the FLARE23 paper splits at random for each of its two trainings.
    """
    if datalist.num_fold == 1:
        return datalist
    if not how.continues:
        if how.folds_by is not None:
            return datalist
        dealt = deal_folds(datalist.training, num_fold=datalist.num_fold, seed=seed + number - 1)
        return replace(datalist, training=dealt)
    if how.folds_by is not None:
        return replace(datalist, training=_by_value(datalist.training, previous, how.folds_by))
    fold_of = {c.name: c.fold for c in previous.training}
    fold_of_patient: dict[str | None, int | None] = {c.group: c.fold for c in previous.training if c.group is not None}
    new = [c for c in datalist.training if c.name not in fold_of and c.group not in fold_of_patient]
    num_fold = min(datalist.num_fold, count_patients(new))
    if num_fold > 1:
        fold_of |= {c.name: c.fold for c in deal_folds(new, num_fold=num_fold, seed=seed + number - 1)}
    else:
        fold_of |= dict.fromkeys((c.name for c in new), 0)
    fold_of |= {c.name: fold_of_patient[c.group] for c in datalist.training if c.group in fold_of_patient}
    training = tuple(replace(c, fold=fold_of[c.name]) for c in datalist.training)
    return replace(datalist, training=training)
