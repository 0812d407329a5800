"""A table beside label files, as CSV: rows of each case, written anew with every image that is done."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoseg.workspace.claims import Claim
from autoseg.workspace.files import open_regular, write_text

Row = dict[str, str]


def _by_case(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return (row["case"],)


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseTable:
    """The table of a folder of label files: some rows for each case."""

    path: Path
    columns: tuple[str, ...]
    """`case` is one of them."""
    is_shared: bool = False
    """Whether other processes write rows, too."""
    order: Callable[[Mapping[str, Any]], tuple[Any, ...]] = _by_case
    """What rows are sorted by; those of a case stay as they came."""

    def put(self, case: str, rows: Sequence[Row]) -> None:
        """Write the rows of a case in the place of those that it has.

        Raises:
            OSError: The file cannot be written.
        """
        claim = Claim(self.path.parent / ".claims" / f".{self.path.name}", self.path.name, wait=True)
        with claim if self.is_shared else nullcontext():
            self._write([*(row for row in self.read() if row["case"] != case), *rows])

    def hold(self, rows: Iterable[Row]) -> None:
        """Have these rows and no others in the table; one that has them stays untouched, one without any goes.

        Raises:
            OSError: The file cannot be written.
        """
        wanted = sorted(rows, key=self.order)
        if not wanted:
            self.path.unlink(missing_ok=True)
        elif wanted != self.read():
            self._write(wanted)

    def _write(self, rows: Iterable[Row]) -> None:
        text = io.StringIO()
        table = csv.DictWriter(text, self.columns, lineterminator="\n")
        table.writeheader()
        table.writerows(sorted(rows, key=self.order))
        write_text(self.path, text.getvalue())

    def read(self) -> list[Row]:
        """The rows that are there; none of a file that is not this table, which is replaced."""
        try:
            with open_regular(self.path) as file:
                table = csv.DictReader(io.StringIO(file.read().decode("utf-8")))
                return [*table] if tuple(table.fieldnames or ()) == self.columns else []
        except (FileNotFoundError, UnicodeDecodeError):
            return []
