"""Segment every image below /input with the model inside the container; labels go to /output. Needs no network.

As challenges lay it: /input/images/NAME/CASE.mha, a label file of the same name in /output/images/LABELS/. One
image, or one folder of a DICOM series, is one case of one channel.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import autoseg
from autoseg.data.formats.table import image_files, stem_of
from autoseg.errors import AutosegError, counted


def segment(images: Path, labels: Path, model: Path, suffix: str) -> int:
    """Segment all images of a folder and those in it; return how many.

    Raises:
        AutosegError: No image, one that cannot be read, or no model.
    """
    paths = image_files(images, deep=True)
    names = [stem_of(path) for path in paths]
    if not paths:
        raise AutosegError(f"{images}: no image in a format that is read. Expected images/NAME/CASE.mha in it.")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise AutosegError(f"{images}: several images are called {', '.join(twice)}. Expected a name for each case.")
    segmenter = autoseg.Segmenter(model)
    labels.mkdir(parents=True, exist_ok=True)
    for path, name in zip(paths, names, strict=True):
        segmenter.predict(path).save(labels / f"{name}{suffix}")
    return len(paths)


def main(words: list[str] | None = None) -> int:
    """The container's entry."""
    parser = argparse.ArgumentParser(description="Segment every image below a folder with one model.")
    parser.add_argument("--input", type=Path, default=Path("/input"))
    parser.add_argument("--output", type=Path, default=Path("/output"))
    parser.add_argument("--labels", default="segmentation", help="Name of the folder below OUTPUT/images.")
    parser.add_argument("--suffix", default=".mha")
    parser.add_argument("--model", type=Path, default=Path("/opt/model/model.zip"))
    given = parser.parse_args(words)
    try:
        number = segment(given.input, given.output / "images" / given.labels, given.model, given.suffix)
    except AutosegError as error:
        for message in error.messages:
            print(f"error: {message}", file=sys.stderr)
        return 2
    print(f"{counted(number, 'image')} segmented")
    return 0


if __name__ == "__main__":
    sys.exit(main())
