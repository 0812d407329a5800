"""`autoseg init`: from a folder of data to the two files a run needs, input.yaml and datalist.json.

Whatever is guessed is said, in the result and in the files.
"""

from __future__ import annotations

import math
import os
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import yaml

from autoseg.config.fields import USUAL_NUM_FOLD
from autoseg.data.datalists import foreign
from autoseg.data.datalists.cases import Case, Datalist, read_case_label
from autoseg.data.datalists.channels import kind_of
from autoseg.data.datalists.datalist import write_datalist
from autoseg.data.datalists.folds import deal_folds
from autoseg.data.datalists.groups import LikelyGroups, likely_groups
from autoseg.data.datalists.layouts import find_layout
from autoseg.data.datalists.listreader import build_datalist
from autoseg.data.datalists.segments import name_segments
from autoseg.data.formats.format import Origin, word_digests
from autoseg.data.formats.segmentation import Colour
from autoseg.data.formats.table import origin_of, stem_of
from autoseg.data.volumes import read_image
from autoseg.errors import ConfigError, counted, some_of
from autoseg.terminal import printable
from autoseg.workspace.files import write_text

NUM_SAMPLED_IMAGES = 5
"""Images read to guess the modality, evenly spread over the list."""
NUM_SAMPLED_LABELS = 20
"""Labels read to guess the label values, evenly spread over the list."""
AIR_HU = -500.0
"""An image with a value below this is a CT: air is -1000 HU, and no other modality goes below 0 by much."""

TEMPLATE = """\
# Written by `autoseg init`. Then: autoseg run --input {name}
# Paths are relative to this file's folder. input.yaml.example explains every key.

# CT or MRI: chooses how intensities are normalised. Here: {modality_reason}.
modality: {modality}
# The cases and their folds.
datalist: datalist.json
# The folder that the paths in the datalist start from.
dataroot: {dataroot}

{classes}
{extra}# Common settings; remove the # to set them. What is not set is derived from the data and the machine.
# work_dir: work_dir                      # everything the run writes
# algos: [segresnet, swinunetr, dints]    # networks to train; left out: chosen by the data and the device
# folds: [0]                              # train these folds only
# num_epochs: 300
# budget: 2h                              # time for the whole run
# resample_resolution: [1.0, 1.0, 1.0]    # voxel size in mm the networks work at
# roi_size: [96, 96, 96]                  # patch in voxels
# partial_labels: infer                   # off, infer, declared: whether cases were annotated for some classes only
# on_fault: skip                          # set faulty cases aside instead of stopping
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class InitResult:
    """What was found and written. As a string: the lines to show."""

    input_yaml: Path
    datalist: Path
    recognised: str
    """The layout, such as `MSD data set`."""
    num_training: int
    num_testing: int
    num_unlabeled: int
    num_fold: int
    classes: dict[str, tuple[int, ...]]
    """Class or region -> label values."""
    modality: str
    modality_reason: str
    notes: tuple[str, ...]
    """What was guessed, or needs the user's eye."""
    next_command: str

    def __str__(self) -> str:
        classes = ", ".join(f"{n} ({'+'.join(map(str, v))})" for n, v in self.classes.items()) or "none found"
        lines = [
            f"Recognised: {self.recognised}",
            f"Cases:      {self.num_training} training in {self.num_fold} folds, {self.num_testing} testing, "
            f"{self.num_unlabeled} unlabeled",
            f"Classes:    {classes}",
            f"Modality:   {self.modality} ({self.modality_reason})",
            *(f"Note:       {n}" for n in self.notes),
            f"Wrote:      {self.input_yaml} and {self.datalist}",
            f"Next:       {self.next_command}",
        ]
        return "\n".join(printable(line, one_line=True) for line in lines)  # a name makes no line of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class Modality:
    """The modality, and how it is known."""

    name: str
    reason: str
    extra: dict[str, str] = field(default_factory=dict)
    """Where channels differ in kind: key -> normalisation of each channel after the first."""
    notes: tuple[str, ...] = ()
    """What needs the user's eye."""


def init_data_folder(
    folder: Path,
    output: Path = Path("."),
    *,
    num_fold: int | None = None,
    seed: int = 0,
    splits: Path | None = None,
    force: bool = False,
) -> InitResult:
    """Recognise a data set and write input.yaml and datalist.json for it.

    Args:
        folder: the data set; nothing in it is changed.
        output: folder for the two files; made if needed.
        num_fold: folds made where the data set brings none; None: as many as is usual, or as there are patients.
        seed: of those folds.
        splits: nnU-Net's splits_final.json, whose folds are taken; cases go by the names of their label files.
        force: replace the two files where they exist.

    Raises:
        ConfigError: A file to write exists (without `force`), or a list in the folder is faulty.
        DataError: No layout fits, a sampled image or label cannot be read, or label files contradict each other.
    """
    root, target = Path(os.path.abspath(folder)), Path(os.path.abspath(output))
    input_yaml, list_path = target / "input.yaml", target / "datalist.json"
    if not force and (there := [p for p in (input_yaml, list_path) if p.exists()]):
        raise ConfigError(
            [f"{p}: exists already. Give another folder with --output, or --force to replace it." for p in there]
        )
    # A datalist.json that is to be replaced is no source: the folder is looked through anew.
    layout = find_layout(root, own_list=list_path != root / "datalist.json")
    if splits is not None:
        items = layout.plain["training"]
        foreign.take_splits(layout.plain, [stem_of(Path(str(item.get("label", "")))) for item in items], splits)
    wanted, may_be_fewer = (USUAL_NUM_FOLD, True) if num_fold is None else (num_fold, False)
    datalist = build_datalist(
        layout.plain, root, path=layout.source, num_fold=wanted, may_be_fewer=may_be_fewer, seed=seed
    )
    modality = _modality(datalist, layout.source)
    datalist, class_notes, colours = _with_class_names(datalist)
    origins = {case.name: origin_of(case.images[0]) for case in datalist.cases}
    datalist, group_notes = _with_groups(datalist, origins, num_fold=wanted, seed=seed)
    write_datalist(datalist, list_path, root, extra_modalities=tuple(modality.extra))
    write_text(input_yaml, _input_text(input_yaml, _dataroot(root, target), datalist, modality, colours))
    path_notes = _names_in_paths(datalist.cases, origins, root)
    shown = os.path.relpath(input_yaml)
    return InitResult(
        input_yaml=input_yaml,
        datalist=list_path,
        recognised=layout.kind,
        num_training=len(datalist.training),
        num_testing=len(datalist.testing),
        num_unlabeled=len(datalist.unlabeled),
        num_fold=datalist.num_fold,
        classes=_classes(datalist),
        modality=modality.name,
        modality_reason=modality.reason,
        notes=(*layout.notes, *modality.notes, *class_notes, *group_notes, *path_notes),
        next_command=shlex.join(["autoseg", "run", "--input", str(input_yaml) if shown.startswith("..") else shown]),
    )


def _with_class_names(datalist: Datalist) -> tuple[Datalist, Sequence[str], dict[str, Colour]]:
    """The list with classes made up from the label files, where it names none; what the user is to know of it; and the
    classes' colours as far as label files say them.
    """
    if _classes(datalist):
        return datalist, [], {}
    datalist, segments = name_segments(datalist)
    if datalist.regions:
        return datalist, segments.notes, segments.colours
    values = _label_values(datalist.training)
    if named := datalist.labels:
        labels = {v: named.get(v, f"class_{v}") for v in sorted({*values, *named})}
        return replace(datalist, labels=labels), segments.notes, segments.colours
    num = min(len(datalist.training), NUM_SAMPLED_LABELS)
    notes = [
        f"class names are made up from the values {some_of(values) or '(none)'} of {num} label files: "
        "put real ones into input.yaml."
    ]
    if 255 in values and len(values) > 1:
        notes.append("label value 255 often marks voxels to ignore: if so, drop its class and set ignore_label: 255.")
    return replace(datalist, labels={v: f"class_{v}" for v in values}), notes, {}


def _with_groups(
    datalist: Datalist, origins: Mapping[str, Origin], *, num_fold: int, seed: int
) -> tuple[Datalist, list[str]]:
    """The list with groups of cases that belong together by their names, and folds that keep them; and what to say."""
    listed = (*datalist.training, *datalist.unlabeled)
    if any(c.group is not None for c in listed) or not datalist.folds_made:
        return datalist, []  # what others decided is left alone; `autoseg analyze` says which groups are split
    likely = _of_one_patient(listed, origins) or likely_groups([c.name for c in listed])
    num_units = likely.num_units([c.name for c in datalist.training])
    if num_units == len(datalist.training):
        return datalist, _unsure_notes(likely)
    members = next(iter(likely.members.values()))
    num, example = f"{len(likely.of)} cases", f"such as {members[0]} and {members[1]}"
    if num_units < 2:
        return datalist, [
            f"the {num} look like {likely.kind} of one object, {example}: folds split it, and scores are too good."
        ]

    def grouped(cases: Sequence[Case]) -> tuple[Case, ...]:
        return tuple(replace(c, group=likely.of.get(c.name)) for c in cases)

    training = deal_folds(grouped(datalist.training), num_fold=min(num_fold, num_units), seed=seed)
    note = f"{num} look like {likely.kind} of {len(likely.members)} patients or objects, {example}: no fold splits one "
    note += "(`group` in datalist.json). Remove `group` and `fold` there if each case stands alone."
    return replace(datalist, training=training, unlabeled=grouped(datalist.unlabeled)), [note]


def _unsure_notes(likely: LikelyGroups) -> list[str]:
    """That cases may belong together, where names alone do not tell."""
    if not likely.unsure:
        return []
    return [
        f"cases such as {likely.unsure[0]} and {likely.unsure[1]} may be of one patient; names alone do not "
        "tell. If they are, give them one `group` in datalist.json and remove `fold` there, "
        "or else scores are too good."
    ]


def _of_one_patient(cases: Sequence[Case], origins: Mapping[str, Origin]) -> LikelyGroups | None:
    """Cases whose files say that they are of one patient, under numbers that say nothing of whom; None where none are.

    One patient in all files is what anonymising leaves, and tells nothing.
    """
    patients = {case.name: origins[case.name].patient for case in cases}
    counts = Counter(patient for patient in patients.values() if patient)
    if len(counts) < 2:
        return None
    numbers = {patient: str(n) for n, patient in enumerate((p for p in counts if counts[p] > 1), start=1)}
    of = {name: numbers[patient] for name, patient in patients.items() if patient in numbers}
    return LikelyGroups(of=of, kind="scans") if of else None


def _names_in_paths(cases: Sequence[Case], origins: Mapping[str, Origin], root: Path) -> list[str]:
    """A note where names of folders or files hold a patient's name or number: cases are called by them."""
    num = 0
    for case in cases:
        words = word_digests(case.images[0].relative_to(root).as_posix())
        num += not words.isdisjoint(origins[case.name].words)
    if not num:
        return []
    return [
        f"names of folders or files hold a patient's name or number in {num} of {counted(len(cases), 'case')}: they "
        "become names of cases in work_dir and reports. Rename them first if these are to be shared."
    ]


def _input_text(
    input_yaml: Path, dataroot: str, datalist: Datalist, modality: Modality, colours: Mapping[str, Colour]
) -> str:
    """The text of input.yaml."""
    return TEMPLATE.format(
        name=input_yaml.name,
        modality=_quoted(modality.name),
        modality_reason=printable(modality.reason, one_line=True),
        dataroot=_quoted(dataroot),
        classes=_class_lines(_classes(datalist), datalist.ignore_label) + _colour_lines(colours),
        extra=_extra_lines(modality.extra),
    )


def _modality(datalist: Datalist, source: Path) -> Modality:
    """What the data set's own files say of its channels, else what some images look like."""
    named = datalist.channels or ((datalist.modality,) if datalist.modality else ())
    if not named or not any(n.strip() for n in named):
        name, reason = _guess_modality(datalist.training)
        return Modality(name=name, reason=reason)
    kinds = [kind_of(n) for n in named]
    reason = f"{'files are called' if source.is_dir() else f'{source.name} says'} {', '.join(named)}"
    num_files = {len(c.images) for c in (*datalist.training, *datalist.testing, *datalist.unlabeled)}
    if len(set(kinds)) == 1:
        return Modality(name=kinds[0], reason=reason)
    if num_files != {len(named)}:
        note = f"the channels differ in kind ({', '.join(named)}) but share a file: all are normalised as {kinds[0]}."
        return Modality(name=kinds[0], reason=reason, notes=(note,))
    keys = [f"image_{c}_{_word(n)}" for c, n in enumerate(named)][1:]
    extra = {key: _normalisation(kind) for key, kind in zip(keys, kinds[1:], strict=True)}
    return Modality(name=kinds[0], reason=reason, extra=extra)


def _normalisation(kind: str) -> str:
    return {"CT": "ct", "MRI": "mri", "PET": "pet"}.get(kind, "meanstd")


def _word(name: str) -> str:
    return "".join(c if c.isalnum() and c.isascii() else "_" for c in name.lower()).strip("_") or "channel"


def _guess_modality(cases: Sequence[Case]) -> tuple[str, str]:
    sample = _spread(cases, NUM_SAMPLED_IMAGES)
    written = {origin_of(c.images[0]).modality for c in sample}
    if len(written) == 1 and (name := next(iter(written))):
        return kind_of(name), f"{counted(len(sample), 'image says', 'images say')} {name}"
    lowest = min((float(read_image(c.images).array.min()) for c in sample), default=0.0)
    seen = f"guessed from {counted(len(sample), 'image')}, whose lowest value is {lowest:g}"
    if lowest < AIR_HU:
        return "CT", f"{seen}, below {AIR_HU:g} as only in Hounsfield units"
    return "MRI", f"{seen}, not below {AIR_HU:g} as in a CT; correct it if these are not MRI"


def _classes(datalist: Datalist) -> dict[str, tuple[int, ...]]:
    return dict(datalist.regions) or {n: (v,) for v, n in datalist.labels.items()}


def _label_values(cases: Sequence[Case]) -> list[int]:
    """The foreground values of some label files."""
    values: set[int] = set()
    for case in _spread(cases, NUM_SAMPLED_LABELS):
        if case.label is not None:
            values |= {int(v) for v in np.unique(read_case_label(case).array)}
    return sorted(values - {0})


def _spread(cases: Sequence[Case], most: int) -> list[Case]:
    """At most that many cases, evenly spread over the list."""
    return [cases[i] for i in np.unique(np.linspace(0, len(cases) - 1, min(most, len(cases))).astype(int))]


def _class_lines(classes: dict[str, tuple[int, ...]], ignore: int | None) -> str:
    """The part of input.yaml about classes: plain names for values 1, 2, ..., else each with its values."""
    if not classes:
        return "# class_names: [name of value 1, name of value 2]\n"
    if list(classes.values()) == [(i + 1,) for i in range(len(classes))]:
        lines = ["# Names of the label values 1, 2, ...", f"class_names: [{', '.join(map(_quoted, classes))}]"]
    else:
        lines = ["# Classes and the label values that belong to them.", "class_names:"]
        lines += [f"  - {{name: {_quoted(n)}, index: {list(v)}}}" for n, v in classes.items()]
    flat = [v for values in classes.values() for v in values]
    if len(set(flat)) < len(flat):
        lines += ["# The regions overlap.", "sigmoid: true"]
    if ignore is not None:
        lines += ["# Voxels of this value are left out of loss and metrics.", f"ignore_label: {ignore}"]
    return "\n".join(lines) + "\n"


def _colour_lines(colours: Mapping[str, Colour]) -> str:
    if not colours:
        return ""
    lines = ["# Red, green and blue of the segments in the label files; predictions have them, too.", "colours:"]
    return "\n".join([*lines, *(f"  {_quoted(name)}: {list(colour)}" for name, colour in colours.items())]) + "\n"


def _extra_lines(extra: dict[str, str]) -> str:
    if not extra:
        return ""
    lines = ["# Further images of each case, and how they are normalised.", "extra_modalities:"]
    return "\n".join([*lines, *(f"  {_quoted(k)}: {v}" for k, v in extra.items())]) + "\n\n"


def _dataroot(root: Path, target: Path) -> str:
    """Relative where the data lie near the file, so that both can be moved together; else absolute."""
    relative = os.path.relpath(root, target)
    return relative if not relative.startswith(os.path.join("..", "..", "..")) else str(root)


def _quoted(text: str) -> str:
    """A YAML scalar on one line, that may stand anywhere; what cannot be seen in it is escaped."""
    style = None if text == printable(text, one_line=True) else '"'
    dumped = yaml.safe_dump(
        [text], default_style=style, default_flow_style=True, allow_unicode=style is None, width=math.inf
    )
    return str(dumped).strip()[1:-1]
