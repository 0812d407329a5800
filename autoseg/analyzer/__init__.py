"""Statistics of a data set, its faults, and which classes its cases were annotated for.

This package must not import torch or monai: the analysis is done before they are loaded.
"""

from autoseg.analyzer.analysis import analyze
from autoseg.analyzer.folder import analyze_folder
from autoseg.analyzer.result import Analysis

__all__ = ["Analysis", "analyze", "analyze_folder"]
