"""What commands do to start quickly."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import what a command needs, without what would only slow it.

    What imports make lives to the end: looking through it for garbage took 0.05 s. nibabel loads pydicom where that is
    installed, for an extension of NIfTI headers that is not read here: 0.13 s. Commands that read DICOM load it
    themselves. Only for processes that are autoseg's own: other programs may want that extension.
    """
    if "nibabel" in sys.modules:  # no start
        yield
        return
    gc.disable()
    try:
        if "pydicom" not in sys.modules:
            sys.modules["pydicom"] = None  # type: ignore[assignment]  # importing it fails, as if it were not there
            try:
                import nibabel  # noqa: F401
            finally:
                del sys.modules["pydicom"]
        yield
        gc.freeze()
    finally:
        gc.enable()
