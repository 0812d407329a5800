"""Texts of a run as parts of a Markdown page."""

from __future__ import annotations

import re
from collections.abc import Sequence

from autoseg.terminal import printable


def cell(text: str) -> str:
    """A name as a cell of a Markdown table, and as nothing else: no markup, no control characters."""
    return re.sub(r"([\\`*_{}\[\]<>|#!~])", r"\\\1", printable(text, one_line=True).strip())


def listed(words: Sequence[str]) -> str:
    """Words as a list in a sentence."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def plain(text: str) -> str:
    """A sentence without what Markdown adds: citations, footnotes, emphasis, escapes."""
    text = re.sub(r" ?\[[@^][a-z0-9_]+\]", "", text)
    return re.sub(r"\\(.)", r"\1", text.replace("**", "").replace("`", ""))
