"""Write datalist.json for the FLARE23 data: which classes each case was annotated for, from the labels themselves.

    python make_datalist.py flare23 --output datalist.json

FLARE23 says nowhere which classes a case was annotated for; the paper took those that occur, and found three kinds of
cases: all 14 classes, six, and the tumor alone. A case is declared to be of the smallest kind that holds all classes
that occur in it, so that a healthy patient of a fully annotated source counts as annotated for tumors.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from autoseg.data.formats.table import stem_of
from autoseg.data.volumes import read_label
from autoseg.evaluation.flare23 import TOLERANCES_MM
from autoseg.workspace.files import write_json

NAMES = [name.replace(" ", "_") for name in TOLERANCES_MM]
SIX = ("liver", "right_kidney", "spleen", "pancreas", "left_kidney", "tumor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataroot", type=Path)
    parser.add_argument("--images", default="imagesTr2200", help="labelled cases, in dataroot")
    parser.add_argument("--labels", default="labelsTr2200")
    parser.add_argument("--unlabeled", default="unlabeledTr1800", help="left out where it is not there")
    parser.add_argument("--testing", default="imagesVal", help="to be predicted; left out where it is not there")
    parser.add_argument("--output", type=Path, default=Path("datalist.json"))
    words = parser.parse_args()
    labels = sorted((words.dataroot / words.labels).glob("*.nii.gz"))
    if not labels:
        raise SystemExit(f"{words.dataroot / words.labels}: no label files. Give their folder with --labels.")
    with ProcessPoolExecutor() as pool:
        kinds = list(pool.map(annotated_classes, labels, chunksize=8))
    training = []
    for path, kind in zip(labels, kinds, strict=True):
        image = image_of(path, words.dataroot / words.images)
        if image is None:
            raise SystemExit(f"{path}: no image of that name in {words.dataroot / words.images}.")
        training.append({"image": relative(image, words.dataroot), "label": relative(path, words.dataroot)})
        training[-1]["annotated"] = kind
    others = {
        role: [{"image": relative(p, words.dataroot)} for p in sorted((words.dataroot / folder).glob("*.nii.gz"))]
        for role, folder in (("unlabeled", words.unlabeled), ("testing", words.testing))
    }
    named = {str(value): name for value, name in enumerate(NAMES, start=1)}
    write_json(words.output, {"labels": named, "training": training, **others})
    counts = {n: sum(len(k) == n for k in kinds) for n in (len(NAMES), len(SIX), 1)}
    print(json.dumps({"cases by annotated classes": counts, **{role: len(v) for role, v in others.items()}}))


def image_of(label: Path, folder: Path) -> Path | None:
    """The image of a label: of its name with the challenge's _0000, or of its name alone; None where there is none."""
    candidates = [folder / f"{stem_of(label)}{end}.nii.gz" for end in ("_0000", "")]
    return next((path for path in candidates if path.is_file()), None)


def annotated_classes(label: Path) -> list[str]:
    """The smallest kind of case that holds every class of a label."""
    values = set(np.unique(read_label(label).array).tolist()) - {0}
    occurring = {NAMES[int(v) - 1] for v in values if v <= len(NAMES)}
    if occurring <= {"tumor"}:
        return ["tumor"]
    return list(SIX) if occurring <= set(SIX) else NAMES


def relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


if __name__ == "__main__":
    main()
