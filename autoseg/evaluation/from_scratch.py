"""What weights to start from were worth: jobs beside their twins that started from random ones, on the same cases."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence

from autoseg.evaluation.intervals import PairedTest, case_means, compare
from autoseg.evaluation.score_files import ValidationFile
from autoseg.workspace.jobs import JobDir
from autoseg.workspace.scratch import scratch_place
from autoseg.workspace.stored import read_stored
from autoseg.workspace.workspace import Workspace


def compare_with_scratch(place: Workspace, patient_of: Mapping[str, Hashable]) -> list[PairedTest]:
    """Test the held-out Dice of each network against that of its twins; empty where there are none.

    Args:
        place: the folder of a run or a round.
        patient_of: case -> patient; a case that is not there stands alone.

    Raises:
        WorkspaceError: A file is damaged.
    """
    twins = scratch_place(place)
    scores: dict[str, dict[str, float]] = {}
    pairs: dict[tuple[str, str], None] = {}
    for twin in twins.jobs():
        if twin.state != "done" or place.read_job(twin.algo, twin.fold).state != "done":
            continue
        first, second = f"{twin.algo} from weights", f"{twin.algo} from scratch"
        scores.setdefault(first, {}).update(_case_dice(place.job_dir(twin.algo, twin.fold)))
        scores.setdefault(second, {}).update(_case_dice(twins.job_dir(twin.algo, twin.fold)))
        pairs[first, second] = None
    return compare(scores, list(pairs), patient_of)


def _case_dice(paths: JobDir) -> dict[str, float]:
    stored = read_stored(paths.validation, ValidationFile)
    return case_means({name: list(dice.values()) for name, dice in stored.dice.items()})


def tests_text(tests: Sequence[PairedTest]) -> str:
    """The tests as a table."""
    rows = [("Mean Dice", "difference", "95 % interval", "better", "worse", "p", "")]
    for test in tests:
        interval = "-" if math.isnan(test.low) else f"{test.low:+.4f} to {test.high:+.4f}"
        p = "-" if test.p is None else "< 0.001" if test.p < 0.001 else f"{test.p:.3f}"
        name = f"{test.first} against scratch"
        rows.append((name, f"{test.difference:+.4f}", interval, str(test.wins), str(test.losses), p, test.words))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(c.ljust(w) if i in (0, 6) else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    title = "Weights to start from, against random ones, on the same held-out cases"
    return "\n".join([title, *map(str.rstrip, lines)])
