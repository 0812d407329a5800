"""Which images to segment, and where and how their labels are written: for one image, a folder or a list of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from autoseg.data.datalists.channels import CHANNEL, case_path, split_channel
from autoseg.data.datalists.names import is_label_name, loose_key, path_hint, unique_names
from autoseg.data.formats.format import LabelWriter
from autoseg.data.formats.table import (
    LABEL_SUFFIX,
    PATTERNS_TEXT,
    SUFFIXES,
    WRITERS,
    image_files,
    label_suffix,
    pictures_instead,
    stem_of,
    suffix_of,
    tell_left_out,
    usual_writer,
    writer_of,
)
from autoseg.data.labels import MOST_CODED, LabelMap
from autoseg.errors import ConfigError, DataError
from autoseg.workspace.files import make_folder, open_regular

log = logging.getLogger(__name__)

LIST_SUFFIX = ".txt"
"""Of a file that names images."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One image to segment."""

    name: str
    images: tuple[Path, ...]
    target: Path
    """Label file to write."""
    writer: LabelWriter
    """How it is written."""
    fallback: Path | None = None
    """NIfTI file to write where it turns out that it cannot be written so; None: that is a fault."""

    @property
    def preview(self) -> Path:
        """Its picture."""
        return self.target.with_name(f"{self.target.name[: -len(label_suffix(self.target))]}.preview.png")


def find_items(
    image: Path, output: Path, num_channels: int, format_name: str = "auto", channel_names: Sequence[str] = ()
) -> list[Item]:
    """Say which images to segment and where their labels go.

    Args:
        image: an image, a folder whose images are taken, or a .txt file that names an image a line, relative to
            its own folder; with several channels, files that end in _0000, _0001, ..., or that are called as those of
            training (a_t1, a_flair), are one image, and others hold all channels. A named image that is not there is
            noticed when its turn comes.
        output: a folder, or a label file where `image` is one image.
        num_channels: of an image, as the models were trained.
        format_name: of the label files: a name in `WRITERS`, or auto, which gives each image's own.
        channel_names: as `Plan` has them. With names, a folder without images may have them in folders below it.

    Raises:
        ConfigError: The output does not fit the image or the format.
    """
    name = None if format_name == "auto" else format_name
    if not output.is_dir() and (names_a_file(output) or suffix_of(output) in SUFFIXES):
        try:
            writer_of(output, name)
        except DataError as error:
            raise ConfigError(f"--output: {error}") from None
    groups = _images_of(image, output, num_channels, channel_names)
    root = image if image.is_dir() else None
    names = unique_names([_told_apart_by(case_path(group), root) for group in groups])
    if names_a_file(output):
        items = [Item(name=names[0], images=groups[0], target=output, writer=writer_of(output, name))]
    else:
        writers = [WRITERS[name] if name else own_writer(group) for group in groups]
        items = [
            Item(
                name=stem,
                images=group,
                target=output / f"{stem}{writer.suffixes[0]}",
                writer=writer,
                fallback=output / f"{stem}{LABEL_SUFFIX}" if name is None else None,
            )
            for stem, group, writer in zip(names, groups, writers, strict=True)
        ]
        _tell_changed(items)
    inputs = {path.resolve() for group in groups for path in group}
    if own := [item.target for item in items if item.target.resolve() in inputs]:
        raise ConfigError(f"--output: {own[0]} is an image to segment and would be overwritten. Give another folder.")
    return items


def _told_apart_by(path: Path, root: Path | None) -> Path:
    """What names an image: its file; where that is not unique, the folders above it, up to the one that was given."""
    return path.relative_to(root) if root is not None and path != root else Path(path.name)


def own_writer(images: Sequence[Path]) -> LabelWriter:
    """How the label of an image is written where nobody says: in its format, or as NIfTI where that cannot be."""
    writer = usual_writer(images[0])
    try:
        if writer.check is not None:
            writer.check(images)
    except DataError as error:
        log.warning("%s The label is written as NIfTI.", error)
        return WRITERS["nifti"]
    return writer


def _tell_changed(items: Sequence[Item]) -> None:
    """Warn of label files that are not called as their images, since another image has the name already."""
    for item in items:
        if loose_key(item.name) != loose_key(stem_of(case_path(item.images))):
            log.warning(
                "%s: another image has this name but for its folder, suffix or case, so its label is called %s; "
                "`autoseg evaluate` will not find it by the image's name. Give images names of their own.",
                *(item.images[0], item.target.name),
            )


def _images_of(image: Path, output: Path, num_channels: int, channel_names: Sequence[str]) -> list[tuple[Path, ...]]:
    """The files of each image that a path stands for: a folder, a list, or one image."""
    if image.is_dir() and image_files(image) == [image]:  # a DICOM series
        return [(image,)]
    if not image.is_dir() and image.suffix != LIST_SUFFIX:
        return [_files_of_image(image, num_channels, channel_names)]
    if names_a_file(output):
        what = "a folder" if image.is_dir() else "a list"
        raise ConfigError(f"--output: {output} is a file, but --image {image} is {what}. Give a folder.")
    paths = _in_folder(image, below=bool(channel_names)) if image.is_dir() else _in_list(image)
    return group_channels(paths, channel_names) if num_channels > 1 else [(path,) for path in paths]


def _in_folder(folder: Path, *, below: bool) -> list[Path]:
    """The images of a folder, or where it has none, and that is asked for, of those below it."""
    paths = image_files(folder) or (image_files(folder, deep=True) if below else [])
    if not paths:
        inside = next(iter(image_files(folder, deep=True)), None)
        hint = (
            f" Below it are some, such as {inside}: give a .txt file with the path of one on each line."
            if inside
            else ""
        )
        raise ConfigError(f"--image: {folder} holds no image files ({PATTERNS_TEXT}).{hint}{pictures_instead(folder)}")
    tell_left_out(folder, paths)
    return paths


def _in_list(path: Path) -> list[Path]:
    try:
        with open_regular(path) as file:
            text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"--image: {path}: byte {error.start} is not UTF-8. Expected the path of an image on each line; save it as "
            "plain text in UTF-8."
        ) from None
    except OSError as error:
        raise ConfigError(f"--image: {path}: cannot be read ({error.strerror}). Give a file.") from None
    if "\0" in text:
        raise ConfigError(f"--image: {path}: holds a NUL character, so it is no text. Expected a path on each line.")
    lines = [line.strip() for line in text.splitlines()]
    named = [line for line in lines if line and not line.startswith("#")]
    if lost := next((line for line in named if path_hint(line) and not (path.parent / line).exists()), ""):
        raise ConfigError(f"--image: {path} names {lost}, which is not there.{path_hint(lost)}")
    paths = [path.parent / line for line in named]
    if not paths:
        raise ConfigError(f"--image: {path} names no image. Expected the path of one on each line.")
    return paths


def _files_of_image(path: Path, num_channels: int, channel_names: Sequence[str]) -> tuple[Path, ...]:
    """An image's file, with those of its other channels where it is one of several."""
    if num_channels > 1 and (split := split_channel(path)) is not None and split[1] in channel_names:
        return next(group for group in group_channels(image_files(path.parent), channel_names) if path in group)
    if num_channels == 1 or not CHANNEL.search(stem_of(path)):
        return (path,)
    beside = [p for p in image_files(path.parent) if _base(p) == _base(path) and CHANNEL.search(stem_of(p))]
    return next(image for image in _numbered_from_0(beside) if path in image)


def names_a_file(output: Path) -> bool:
    """Whether an output is meant to be a file, whether or not it is there."""
    return bool(label_suffix(output)) and not output.is_dir()


def _base(path: Path) -> str:
    return CHANNEL.sub("", stem_of(path))


def group_channels(paths: Sequence[Path], names: Sequence[str]) -> list[tuple[Path, ...]]:
    """Put files together, in the channels' order, that differ by a channel's name, or by nnU-Net's number of the
    channel, alone. Labels beside files with such names are left out.

    Args:
        names: as `Plan.channel_names` has them.
    """
    splits = {p: split for p in paths if (split := split_channel(p)) is not None and split[1] in names}
    groups: dict[str, list[Path]] = {}
    for path in sorted(paths, key=lambda p: (names.index(splits[p][1]) if p in splits else 0, p)):
        if path in splits:
            key = f"{path.parent}/{splits[path][0]}"
        elif splits and is_label_name(stem_of(path)):
            log.info("%s: left out, called like a label", path)
            continue
        else:
            key = _base(path) if CHANNEL.search(stem_of(path)) else path.name
        groups.setdefault(key, []).append(path)
    return [part for group in groups.values() for part in _numbered_from_0(group)]


def _numbered_from_0(group: list[Path]) -> list[tuple[Path, ...]]:
    """The files as one image, or each as its own where they have numbers that are no channels': case_0007."""
    numbers = [int(match.group(1)) for p in group if (match := CHANNEL.search(stem_of(p)))]
    return [tuple(group)] if numbers in ([], [*range(len(group))]) else [(path,) for path in group]


def check_output(output: Path) -> None:
    """Make sure before any work that the output can be written.

    Raises:
        ConfigError: It cannot.
    """
    folder = output.parent if names_a_file(output) else output
    try:
        make_folder(folder)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"--output: {folder} cannot be made ({reason}). Give a folder you may write to.") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"--output: {folder} is not writable. Give a folder you may write to.")


def beside(output: Path, name: str) -> Path:
    """A file beside the label files: in their folder, or with the name of the one label file before its own."""
    if not names_a_file(output):
        return output / name
    return output.with_name(f"{output.name[: -len(label_suffix(output))]}.{name}")


def warn_of_lost_overlaps(label_map: LabelMap) -> None:
    """Say which overlaps of regions are lost where there are too many regions to keep all."""
    if label_map.with_overlaps() is label_map and label_map.untold_overlaps:
        log.warning(
            "%d regions: where more than %d may overlap, a voxel of several that no label value stands for together is "
            "given to one of them. Give such voxels a value in class_names to keep them.",
            *(len(label_map.names), MOST_CODED),
        )
