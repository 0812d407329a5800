"""The report: all of a run on one page, made from the files under work_dir alone."""

from autoseg.report.page import is_current, make_report

__all__ = ["is_current", "make_report"]
