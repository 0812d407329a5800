"""When a job validates, on which cases, and what that takes."""

from __future__ import annotations

COMPARISON = 2.0
"""Predictions of a case that the comparison of half precision with fp32 takes: one in each, of which that in fp32, as
`scoring` times it, takes the longer."""

NEW_STEPS = 0.02
"""Share of all steps that must lie since the last validation for another one at the end. A choice: the cosine's last
fiftieth is done at a thousandth of the highest learning rate."""

MEASURED_STEP = 3
"""Step after which a budgeted job measures what validation and final scores take: the first steps allocate."""

TWICE_SHARE, SCORED_SHARE = 0.01, 0.05
"""Share of a budget up to which a case is predicted twice to time it, and up to which its final score is timed, too."""
