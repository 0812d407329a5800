"""Tables as text."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from autoseg.evaluation.metrics import mean_score


def format_rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a table: the first column to the left, the others to the right."""
    cells = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
    return "\n".join([lines[0].rstrip(), "-" * len(lines[0]), *[line.rstrip() for line in lines[1:]]])


def format_score(value: float) -> str:
    """A score with four digits; a dash for NaN."""
    return "-" if math.isnan(value) else f"{value:.4f}"


def format_table(title: str, names: Sequence[str], scores: Sequence[tuple[int, Sequence[float]]]) -> str:
    """A row per class, a column per fold, then mean and standard deviation; the last row is their mean.

    Args:
        names: classes.
        scores: fold and values per class of each case; NaN does not count.

    Returns:
        Text. A fold's cell is the mean over its cases, `mean` the mean over all cases, `std` the standard
        deviation of the folds' means, `n` the cases that count. The last row averages over classes.

    Source: Table 4 of Myronenko et al., FLARE23, whose mean is over folds; ours does not depend on their sizes.
    """
    folds = sorted({fold for fold, _ in scores})
    by_fold = {f: [list(values) for fold, values in scores if fold == f] for f in folds}
    every = [list(values) for _, values in scores]
    rows = []
    for i, name in enumerate(names):
        cells = [mean_score([[v[i]] for v in by_fold[f]]) for f in folds]
        num = sum(not math.isnan(v[i]) for v in every)
        rows.append([name, *_line(cells, mean_score([[v[i]] for v in every])), str(num)])
    cells = [mean_score(by_fold[f]) for f in folds]
    num = sum(not all(map(math.isnan, values)) for values in every)
    rows.append(["mean", *_line(cells, mean_score(every)), str(num)])
    return f"{title}\n" + format_rows(["class", *[f"fold {f}" for f in folds], "mean", "std", "n"], rows)


def _line(cells: Sequence[float], mean: float) -> list[str]:
    known = [c for c in cells if not math.isnan(c)]
    std = float(np.std(known)) if known else math.nan
    return [format_score(v) for v in (*cells, mean, std)]


def csv_text(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """A table for spreadsheets, with a header; empty cells for None and NaN."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _cell(value) for name, value in row.items()})
    return text.getvalue()


def _cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    # A spreadsheet takes such a text for a formula.
    return f"'{value}" if isinstance(value, str) and value[:1] in "=+-@" and value else value
