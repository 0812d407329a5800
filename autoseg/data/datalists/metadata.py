"""What is known of cases besides files, classes and patients: site, scanner, sex, age, whatever a list or a table says.

Keys and values are the user's. They stay in the run's datalist.json, its tables by group and its report; a model, a
bundle and predictions carry none of them.
"""

from __future__ import annotations

import csv
import logging
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
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
"""Keys of a case that a table cannot have; its image and further channels besides, unless they name the case."""
NOT_GIVEN = ("", "n/a", "nan")
"""Texts that say nothing. Source: BIDS 1.9 has n/a, pandas nan."""
NUMBER = re.compile(r"[+-]?(0|[1-9][0-9]*|(0|[1-9][0-9]*)?\.[0-9]+)([eE][+-]?[0-9]+)?")
"""What counts as a number: not 007, which is a name, nor 1_2, which Python reads as 12."""
PATIENT_KEYS = frozenset(("patient", "patient_id", "patientid", "subject", "subject_id", "subjectid", "participant_id"))
"""Keys that mean a patient, who is called `group` in a datalist."""
MOST_NUMBER = 1e300
"""From which on a number is none: a float holds no much larger ones."""
MOST_LISTED = 5
"""Rows or cases that are named in a message; more are counted."""
FEW_LEVELS = 10
"""Values of a key that `folds_by` takes even where most of them have one case."""


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
        text = value.strip()
        return None if text.casefold() in NOT_GIVEN else text
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, bool | int) else None


def number_of(value: MetaValue) -> float | None:
    """A number, or one that is written as a text; None for what is none."""
    if isinstance(value, str):
        return float(value) if NUMBER.fullmatch(value) and math.isfinite(float(value)) else None
    return float(value) if not isinstance(value, bool) and abs(value) < MOST_NUMBER else None


def text_of(value: MetaValue) -> str:
    """A value as a group of cases is named by it: 3 and 3.0 are one."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def alike(texts: Collection[str]) -> list[tuple[str, str]]:
    """Pairs of texts that differ in upper and lower case, spaces, hyphens and underscores alone."""
    seen: dict[str, str] = {}
    pairs = []
    for text in sorted(texts):
        first = seen.setdefault(re.sub(r"[\s_-]+", " ", text.casefold()), text)
        if first != text:
            pairs.append((first, text))
    return pairs


def add_table(datalist: Datalist, path: Path, *, extra_modalities: Sequence[str] = ()) -> Datalist:
    """The cases with what a table says of them.

    Args:
        path: CSV with a header; a column `case` (or `image`, or `name`) holds the case's name, or its image's file
            name or path; commas, semicolons or tabs between. Cases without a row keep what the list says.
        extra_modalities: keys of the cases' further images, which no column can have.

    Raises:
        ConfigError: The table cannot be read, has no such column, two rows of a case, a row of two cases, or none of
            the cases.
    """
    by_key = _facts_of(path, extra_modalities)
    used: dict[str, str] = {}  # row -> case

    def with_row(case: Case) -> Case:
        keys = (case.name, *(_plain(str(image)) for image in case.images), *(stem_of(i) for i in case.images))
        found = [*dict.fromkeys(k for k in (*keys, *_by_path(case, by_key)) if k in by_key)]
        if not found:
            return case
        if len(found) > 1:
            raise ConfigError(f"meta: {path}: {' and '.join(found)} are two rows of case {case.name}. Keep one.")
        if (other := used.setdefault(found[0], case.name)) != case.name:
            raise ConfigError(
                f"meta: {path}: row {found[0]} may be of case {other} or of {case.name}. Give the case's name, or more "
                "of the image's path."
            )
        return replace(case, meta={**case.meta, **by_key[found[0]]})

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


def _facts_of(path: Path, extra_modalities: Sequence[str]) -> dict[str, dict[str, MetaValue]]:
    """What a table says: name or path of a case -> key -> value, without empty cells."""
    header, rows = _read_table(path)
    column = next((name for known in CASE_COLUMNS for name in header if name.casefold() == known), None)
    if column is None:
        raise ConfigError(f"meta: {path}: no column `case`. Found {', '.join(header)}. Name the cases in one.")
    images = ("image", *extra_modalities)
    reserved = [n for n in header if n != column and (misspelt(n, RESERVED) or n.casefold() in images or n in images)]
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
    if twice := [name for name, num in Counter(header).items() if num > 1 and name]:
        raise ConfigError(f"meta: {path}: column {twice[0]!r} stands twice. Keep one.")
    for number, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise ConfigError(
                f"meta: {path}: row {number} has {len(row)} cells, the header {len(header)}. Correct the row."
            )
    _check_names(header, rows, path)
    named = [{n: _decimal(v, delimiter) for n, v in zip(header, row, strict=True) if n} for row in rows]
    return [name for name in header if name], named


def _check_names(header: Sequence[str], rows: Sequence[Sequence[str]], path: Path) -> None:
    """Refuse a column without a name that has cells."""
    for place, name in enumerate(header):
        if not name and (filled := next((row[place] for row in rows if row[place].strip()), "")):
            raise ConfigError(
                f"meta: {path}: column {place + 1} has no name, and cells such as {filled}. Name it, or remove it."
            )


def _decimal(cell: str, delimiter: str) -> str:
    """A cell with a point in place of a decimal comma, which tables with semicolons have."""
    text = cell.strip()
    return text.replace(",", ".") if delimiter == ";" and re.fullmatch(r"[+-]?[0-9]+,[0-9]+", text) else cell


def _plain(text: str) -> str:
    """A name or path as it is compared."""
    return text.strip().replace("\\", "/").removeprefix("./")


def _by_path(case: Case, by_key: Mapping[str, Any]) -> list[str]:
    """Rows that give the path of a case's first image, from wherever they start."""
    parts = _plain(str(case.images[0])).split("/")
    return [k for i in range(len(parts)) if (k := "/".join(parts[i:])) in by_key]


def _number(text: str) -> MetaValue | None:
    """A cell: a number where it is one, else its text; None where it says nothing."""
    value = meta_value(text)
    if not isinstance(value, str) or number_of(value) is None:
        return value
    return int(value) if re.fullmatch(r"[+-]?[0-9]+", value) else float(value)


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
    levels = sorted({text_of(case.meta[key]) for case in cases})
    if pairs := alike(levels):
        raise ConfigError(
            f"folds_by: {key}: found {pairs[0][0]!r} and {pairs[0][1]!r}, which seem to be one. Spell them alike: else "
            "models learn from what they are scored on."
        )
    if len(levels) < 2:
        raise ConfigError(f"folds_by: {key}: all {len(cases)} training cases have {levels[0]}. Expected two values.")
    if len(levels) > FEW_LEVELS and 2 * len(levels) > len(cases):
        raise ConfigError(
            f"folds_by: {key}: found {len(levels)} values in {len(cases)} training cases, such as "
            f"{some_of(levels, MOST_LISTED)}: {len(levels)} folds, most of one case. Give a key that many cases share, "
            "such as a site."
        )
    of_patient: dict[str, set[str]] = {}
    for case in cases:
        if case.group is not None:
            of_patient.setdefault(case.group, set()).add(text_of(case.meta[key]))
    if several := [patient for patient, of in of_patient.items() if len(of) > 1]:
        raise ConfigError(
            f"folds_by: {key}: patient {several[0]!r} has cases of {' and '.join(sorted(of_patient[several[0]]))}. "
            "Cases of a patient must be in one fold."
        )
    logger.info("folds by %s: %s", key, ", ".join(f"{fold} {level}" for fold, level in enumerate(levels)))
    return tuple(replace(case, fold=levels.index(text_of(case.meta[key]))) for case in cases)
