"""quality.csv beside label files: what is thought of each prediction, the worst first."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autoseg.inference.case_table import CaseTable, Row
from autoseg.inference.quality import Verdict, worst_first

FILE = "quality.csv"
COLUMNS = (
    "case", "class", "predicted_dice", "dice_low", "dice_high", "case_dice", "volume_ml", "volume_low_ml",
    "volume_high_ml", "like_training", "reason",
)  # fmt: skip


def quality_table(path: Path, *, is_shared: bool = False) -> CaseTable:
    """The table of a folder: cases by the mean of their predicted Dice, the lowest first, as `worst_first` says."""
    return CaseTable(path=path, columns=COLUMNS, is_shared=is_shared, order=_worst_first)


def quality_rows(case: str, verdict: Verdict) -> list[Row]:
    """A row for each class; figures that are not known are empty."""
    shared = {
        "case": case,
        "case_dice": _share(verdict.dice),
        "like_training": "no" if verdict.reasons else "yes",
        "reason": "; ".join(verdict.reasons),
    }
    return [
        shared
        | {
            "class": c.name,
            "predicted_dice": _share(c.dice),
            "dice_low": _share(c.low),
            "dice_high": _share(c.high),
            "volume_ml": f"{c.volume_ml:.6g}",
            "volume_low_ml": volume_text(c.volume_low_ml),
            "volume_high_ml": volume_text(c.volume_high_ml),
        }
        for c in verdict.classes
    ]


def volume_text(volume_ml: float | None) -> str:
    """An end of an interval; empty where it is not known."""
    return "" if volume_ml is None else f"{volume_ml:.5g}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _worst_first(row: Mapping[str, Any]) -> tuple[Any, ...]:
    try:
        dice = float(row["case_dice"])
    except ValueError:
        dice = None
    return worst_first(dice, row["like_training"] == "no"), row["case"]
