"""Folders of data that need no list: which layout they follow, or why none fits."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from autoseg.config.fields import USUAL_NUM_FOLD
from autoseg.data.datalists import foreign
from autoseg.data.datalists.beside import beside_to_plain
from autoseg.data.datalists.cases import Datalist
from autoseg.data.datalists.listfile import Plain, load_json
from autoseg.data.datalists.listreader import build_datalist
from autoseg.data.datalists.pairs import pairs_to_plain
from autoseg.data.datalists.studies import dicom_to_plain
from autoseg.data.formats.table import image_files, pictures_instead
from autoseg.errors import DataError, some_of
from autoseg.workspace.files import subfolders

EXPECTED = (
    "an MSD data set (dataset.json with `training`), an nnU-Net raw data set (dataset.json with `channel_names`, "
    "imagesTr, labelsTr), a datalist.json, a pair of folders such as images/ and labels/ with the same file names, a "
    "folder per case with its images and a folder of masks or a label such as label.nii.gz, files such as a_t1.nii.gz "
    "and a_seg.nii.gz in one folder or in BIDS, or DICOM with segmentations (SEG, RTSTRUCT)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A folder whose layout was recognised."""

    kind: str
    """What it is, for people: `MSD data set`, ..."""
    source: Path
    """The file or folder that told."""
    plain: Plain
    """Its cases in the form of a datalist.json, paths relative to the folder."""
    notes: tuple[str, ...] = ()
    """What was left out."""


def find_layout(folder: Path, *, own_list: bool = True) -> Layout:
    """Recognise a folder's layout; the cases are not checked yet.

    Tried in turn: datalist.json, dataset.json of nnU-Net v2, dataset.json of MSD, a pair of folders, images beside
    their masks or labels (BIDS, a folder for each case, one folder), DICOM with segmentations.

    Args:
        own_list: whether a datalist.json in the folder counts.

    Raises:
        ConfigError: A JSON file is damaged.
        DataError: No layout fits, or the files do not fit the layout; with the reason.
    """
    root = Path(os.path.abspath(folder))
    if not root.is_dir():
        raise DataError(f"{root}: no such folder. Expected {EXPECTED}.")
    if own_list and (root / "datalist.json").is_file():
        return Layout(kind="datalist.json", source=root / "datalist.json", plain=load_json(root / "datalist.json"))
    reasons = []
    if (path := root / "dataset.json").is_file():
        raw = load_json(path)
        if foreign.is_nnunet(raw):
            return Layout(kind="nnU-Net raw data set", source=path, plain=foreign.nnunet_to_plain(raw, root))
        if foreign.is_msd(raw):
            return Layout(kind="MSD data set", source=path, plain=foreign.msd_to_plain(raw, root))
        reasons.append("its dataset.json has neither `channel_names` (nnU-Net) nor `training` and `modality` (MSD)")
    if (pair := pairs_to_plain(root)) is not None:
        return Layout(kind=f"pair of folders {pair[1]}", source=root, plain=pair[0], notes=tuple(pair[2]))
    if (beside := beside_to_plain(root)) is not None:
        return Layout(kind=beside[1], source=root, plain=beside[0], notes=tuple(beside[2]))
    if (studies := dicom_to_plain(root)) is not None:
        return Layout(kind="DICOM of patients", source=root, plain=studies[0], notes=tuple(studies[1]))
    reason = "; ".join(reasons or [_contents(root)])
    pictures = pictures_instead(root)
    raise DataError(f"{root}: no data set recognised, since {reason}. Expected {EXPECTED}.{pictures}")


def recognise(folder: Path, *, num_fold: int | None = USUAL_NUM_FOLD, seed: int = 0, own_list: bool = True) -> Datalist:
    """Read a folder of data that has no list of ours.

    Args:
        num_fold: folds made where the data set brings none; None makes none.
        seed: of those folds.
        own_list: whether a datalist.json in the folder counts.

    Raises:
        ConfigError: A list in the folder is faulty; all faults at once.
        DataError: No layout fits, or files do not fit it; with the reason and what is expected.
    """
    layout = find_layout(folder, own_list=own_list)
    root = Path(os.path.abspath(folder))
    return build_datalist(layout.plain, root, path=layout.source, num_fold=num_fold, seed=seed)


def _contents(root: Path) -> str:
    """What is in the folder instead, and whether a folder below would do."""
    folders = subfolders(root)
    if inside := next((p for p in folders if (p / "dataset.json").is_file() or (p / "datalist.json").is_file()), None):
        return f"it has no dataset.json, but {inside.name}/ has a list: give that folder"
    num_images = len(image_files(root))
    below = next((p for p in image_files(root, deep=True) if p.parent != root), None)
    names = f"folders {some_of((f'{p.name}/' for p in folders), most=5)}" if folders else "no folders"
    example = f", and images below such as {below.relative_to(root).as_posix()}" if below else ""
    return f"it has no dataset.json, and {names} and {num_images} image files in it{example}"
