"""What is known of cases besides files, classes and patients: site, scanner, sex, age, whatever a list or a table says.

Keys and values are the user's. They stay in the run's datalist.json, its tables by group and its report; a model, a
bundle and predictions carry none of them.
"""

from __future__ import annotations

import csv
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from autoseg.data.datalists.cases import Case, Datalist, MetaValue
from autoseg.data.formats.table import stem_of
from autoseg.errors import ConfigError, counted, some_of

logger = logging.getLogger(__name__)

CASE_COLUMNS = ("case", "image", "name")
"""Column of a table that says which case a row is of."""
RESERVED = ("label", "fold", "annotated", "group")
"""Keys of a case that a table cannot have."""
PATIENT_KEYS = frozenset(("patient", "patient_id", "patientid", "subject", "subject_id", "subjectid", "participant_id"))
"""Keys that mean a patient, who is called `group` in a datalist."""
MOST_LISTED = 5
"""Rows or cases that are named in a message; more are counted."""


def misspelt(key: str, known: Sequence[str]) -> str | None:
    """The known key that another one was meant to be: one typing error away, two in long words, or in other letters.

    `age` and `stage` are no `image`, which a likeness by shared letters would take them for.
    """
    for word in known:
        most = 0 if len(word) < 4 else 1 if len(word) < 7 else 2
        if key.casefold() == word.casefold() or _errors(key.casefold(), word.casefold()) <= most:
            return word
    return None


def _errors(first: str, second: str) -> int:
    """Letters left out, added, changed or swapped with their neighbour between two words.

    Source: optimal string alignment distance, Damerau 1964.
    """
    rows = [list(range(len(second) + 1))]
    for i, a in enumerate(first, 1):
        row = [i]
        for j, b in enumerate(second, 1):
            cost = min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (a != b))
            if i > 1 and j > 1 and a == second[j - 2] and first[i - 2] == b:
                cost = min(cost, rows[-2][j - 2] + 1)
            row.append(cost)
        rows.append(row)
    return rows[-1][-1]


def meta_value(value: Any) -> MetaValue | None:
    """A value that is kept: text, a number or a truth value; None for nothing and for whatever else there may be."""
    if isinstance(value, str):
        return value.strip() or None
    return value if isinstance(value, bool | int | float) and value == value else None


def add_table(datalist: Datalist, path: Path) -> Datalist:
    """The cases with what a table says of them.

    Args:
        path: CSV with a header; a column `case` (or `image`, or `name`) holds the case's name, or its image's file
            name or path; commas, semicolons or tabs between. Cases without a row keep what the list says.

    Raises:
        ConfigError: The table cannot be read, has no such column, a row twice, or none of the cases.
    """
    by_key = _facts_of(path)
    used: set[str] = set()

    def with_row(case: Case) -> Case:
        keys = (case.name, *(_plain(str(image)) for image in case.images), *(stem_of(i) for i in case.images))
        key = next((k for k in keys if k in by_key), None) or _by_path(case, by_key)
        if key is None:
            return case
        used.add(key)
        return replace(case, meta={**case.meta, **by_key[key]})

    known = datalist.changed(with_row)
    if not used:
        first = datalist.training[0].name if datalist.training else "none"
        raise ConfigError(
            f"meta: {path}: none of its {len(by_key)} rows is of a case. Found {next(iter(by_key), 'none')}, and cases "
            f"such as {first}. Expected names of cases, or of their images' files."
        )
    if unused := [key for key in by_key if key not in used]:
        logger.warning("%s: %d rows are of no case: %s", path.name, len(unused), some_of(unused, MOST_LISTED))
    if without := [c.name for c in known.training if not c.meta]:
        logger.warning(
            "%s: no row for %s: %s", path.name, counted(len(without), "training case"), some_of(without, MOST_LISTED)
        )
    return known


def _facts_of(path: Path) -> dict[str, dict[str, MetaValue]]:
    """What a table says: name or path of a case -> key -> value, without empty cells."""
    header, rows = _read_table(path)
    column = next((name for name in header if name.casefold() in CASE_COLUMNS), None)
    if column is None:
        raise ConfigError(f"meta: {path}: no column `case`. Found {', '.join(header)}. Name the cases in one.")
    reserved = [n for n in header if n != column and (n in RESERVED or misspelt(n, RESERVED))]
    if reserved:
        raise ConfigError(
            f"meta: {path}: column {reserved[0]}: the datalist has this for each case. Move it there, or rename it."
        )
    by_key: dict[str, dict[str, MetaValue]] = {}
    for row in rows:
        key = _plain(row[column])
        if key in by_key:
            raise ConfigError(f"meta: {path}: {row[column]} has two rows. Keep one.")
        values = {name: _number(text) for name, text in row.items() if name != column}
        by_key[key] = {name: value for name, value in values.items() if value is not None}
    return by_key


def _read_table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"meta: {path}: cannot be read ({error.strerror}). Expected a CSV file.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"meta: {path}: not UTF-8 text (byte {error.start}). Save it as UTF-8.") from None
    lines = text.splitlines()
    if not lines:
        raise ConfigError(f"meta: {path}: the file is empty. Expected a header and a row for each case.")
    delimiter = max(",;\t", key=lines[0].count)
    try:
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        header = [name.strip() for name in next(reader)]
        rows = [row for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise ConfigError(f"meta: {path}: not a CSV table ({error}). Correct it.") from None
    if twice := [name for name, num in Counter(header).items() if num > 1]:
        raise ConfigError(f"meta: {path}: column {twice[0]!r} stands twice. Keep one.")
    for number, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise ConfigError(
                f"meta: {path}: row {number} has {len(row)} cells, the header {len(header)}. Correct the row."
            )
    return header, [dict(zip(header, row, strict=True)) for row in rows]


def _plain(text: str) -> str:
    """A name or path as it is compared."""
    return text.strip().replace("\\", "/").removeprefix("./")


def _by_path(case: Case, by_key: Mapping[str, Any]) -> str | None:
    """A row that gives the path of a case's first image, from wherever it starts."""
    path = _plain(str(case.images[0]))
    parts = path.split("/")
    return next((k for i in range(len(parts)) if (k := "/".join(parts[i:])) in by_key), None)


def _number(text: str) -> MetaValue | None:
    """A cell: a number where it is one, else its text; None where it is empty."""
    for kind in (int, float):
        try:
            return meta_value(kind(text))
        except ValueError:
            continue
    return meta_value(text)


def folds_by(cases: Sequence[Case], key: str, *, path: Path) -> tuple[Case, ...]:
    """The cases with a fold for each value of a key, such as each site: models are scored where they never were.

    Raises:
        ConfigError: Cases have folds of their own, lack the key or all have one value, or a patient has several.
    """
    if any(case.fold is not None for case in cases):
        raise ConfigError(f"folds_by: {path.name} has folds of its own. Leave one of the two out.")
    lacking = [case.name for case in cases if key not in case.meta]
    if lacking:
        known = sorted({k for case in cases for k in case.meta})
        has = f"Found {', '.join(known)}." if known else "The cases have no further keys."
        raise ConfigError(
            f"folds_by: {key}: {len(lacking)} of {len(cases)} training cases do not have it: "
            f"{some_of(lacking, MOST_LISTED)}. {has}"
        )
    levels = sorted({str(case.meta[key]) for case in cases})
    if len(levels) < 2:
        raise ConfigError(f"folds_by: {key}: all {len(cases)} training cases have {levels[0]}. Expected two values.")
    of_patient: dict[str, set[str]] = {}
    for case in cases:
        if case.group is not None:
            of_patient.setdefault(case.group, set()).add(str(case.meta[key]))
    if several := [patient for patient, of in of_patient.items() if len(of) > 1]:
        raise ConfigError(
            f"folds_by: {key}: patient {several[0]!r} has cases of {' and '.join(sorted(of_patient[several[0]]))}. "
            "Cases of a patient must be in one fold."
        )
    logger.info("folds by %s: %s", key, ", ".join(f"{fold} {level}" for fold, level in enumerate(levels)))
    return tuple(replace(case, fold=levels.index(str(case.meta[key]))) for case in cases)
