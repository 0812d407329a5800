"""The report: all of a run on one page, made from the files under work_dir alone."""

from autoseg.report.page import make_report

__all__ = ["make_report"]
