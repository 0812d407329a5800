"""AutoML for 3D medical image segmentation: from a folder of volumes to an ensemble and its scores.

`autoseg.run`, `autoseg.predict`, `autoseg.Segmenter` and `autoseg.load_result` are loaded when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autoseg.version import __version__

if TYPE_CHECKING:
    from autoseg.api import Prediction, RunResult, Segmenter, load_result, predict, run

_API = ("Prediction", "RunResult", "Segmenter", "load_result", "predict", "run")
__all__ = ["Prediction", "RunResult", "Segmenter", "__version__", "load_result", "predict", "run"]


def __getattr__(name: str) -> Any:
    """Load the Python API when one of its names is asked for."""
    if name in _API:
        from autoseg import api

        return getattr(api, name)
    raise AttributeError(f"module 'autoseg' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
