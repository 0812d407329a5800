"""How values are shown on the report's page: the filters of report.html.j2."""

from __future__ import annotations

import math
from typing import Any

from markupsafe import Markup

from autoseg.config.units import format_duration
from autoseg.report.figures import Plot


def score(value: float | None, digits: int = 3) -> str:
    """A score; a dash for None and NaN, as in the others."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def interval(item: Any) -> str:
    """`low` and `high` of a summary or a row; a dash where too few patients say nothing."""
    low, high = (item["low"], item["high"]) if isinstance(item, dict) else (item.low, item.high)
    return "-" if score(low) == "-" else f"{score(low)} to {score(high)}"


def quartiles(row: dict[str, float]) -> str:
    """`q25` and `q75` of a row of scores; a dash where no case has one."""
    return "-" if score(row["q25"]) == "-" else f"{score(row['q25'])} to {score(row['q75'])}"


def signed(value: float | None) -> str:
    """A difference of scores."""
    return "-" if value is None or math.isnan(value) else f"{value:+.4f}"


def signed_interval(low: float | None, high: float | None) -> str:
    """The interval of a difference."""
    return "-" if signed(low) == "-" else f"{signed(low)} to {signed(high)}"


def pvalue(value: float | None) -> str:
    """A p value."""
    return "-" if value is None else "< 0.001" if value < 0.001 else score(value)


def number(value: float | None) -> str:
    """A figure with four digits; thousands in full."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def size(num_bytes: float | None) -> str:
    """Bytes in the unit that fits."""
    if num_bytes is None:
        return "-"
    for unit in ("B", "KB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def figure(plot: Plot, caption: str) -> Markup:
    """A plot and what it shows."""
    return Markup(
        '<figure class="plot"><img src="data:image/svg+xml;base64,{}" alt="{}"><figcaption>{}</figcaption></figure>'
    ).format(plot.svg, plot.alt, caption)


def breakable(text: str) -> Markup:
    """A name with + that may be broken after it."""
    return Markup("+<wbr>").join(text.split("+"))


FILTERS = {
    "score": score,
    "interval": interval,
    "quartiles": quartiles,
    "signed": signed,
    "signed_interval": signed_interval,
    "pvalue": pvalue,
    "number": number,
    "size": size,
    "duration": format_duration,
    "figure": figure,
    "breakable": breakable,
}
