"""Trained jobs, loaded once, that turn images into probabilities and labels."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from autoseg.algos.device import pick_device, take_onednn
from autoseg.algos.networks import build_network, divisor
from autoseg.algos.plan import Plan
from autoseg.data.labels import LabelMap
from autoseg.data.preprocess import PreparedRows, Region
from autoseg.data.streams import ImageRows, LabelRows, MemoryImage, open_image
from autoseg.data.volumes import Volume, write_volume
from autoseg.errors import WorkspaceError
from autoseg.inference.restore import Member, labelled_slabs
from autoseg.inference.windows import ProbRows
from autoseg.reader import read_model
from autoseg.workspace import JobDir, Workspace, digest, file_digest

log = logging.getLogger(__name__)
Combine = Literal["mean", "vote"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One trained job."""

    name: str
    """Name of the job's folder."""
    plan: Plan
    network: nn.Module


def load_model(job: JobDir, device: torch.device) -> Model:
    """Read a trained job.

    Raises:
        ConfigError: The plan cannot be read.
        WorkspaceError: The weights are missing, damaged, or of another network than the plan describes.
    """
    name = job.root.name
    if not job.model.exists():
        raise WorkspaceError(f"{job.model}: missing; {name} has not been trained. Run `autoseg train`.")
    plan = read_model(job.plan, Plan)
    again = f"Delete {job.model} and train {name} again."
    try:
        weights = torch.load(job.model, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise WorkspaceError(f"{job.model}: not readable as weights ({_first_line(error)}). {again}") from error
    network = build_network(plan)
    try:
        network.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise WorkspaceError(
            f"{job.model}: not the weights of the network in {job.plan.name} ({_first_line(error)}). "
            f"Undo the change of the plan, or train {name} again."
        ) from error
    network.eval().requires_grad_(False)
    # channels-last: 1.3 times faster on a CPU (measured by the trainer), and tensor cores want it.
    network = network.to(memory_format=torch.channels_last_3d).to(device)  # type: ignore[call-overload]
    take_onednn(network, device, plan.precision)
    return Model(name=name, plan=plan, network=network)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]


def model_digest(workspace: Workspace, algo: str, fold: int) -> str:
    """A digest of a trained job: its weights and its plan."""
    job = workspace.job_dir(algo, fold)
    return digest([file_digest(job.model), read_model(job.plan, Plan).model_dump(mode="json")])


class Predictor:
    """One model or several of the same classes and channels; images go in, labels come out.

    The mean is of probabilities, as nnU-Net ensembles its configurations; models that work at different spacings meet
    on the image's own grid.
    """

    def __init__(
        self, jobs: Sequence[JobDir], *, device: str | torch.device = "auto", combine: Combine = "mean"
    ) -> None:
        """Load models.

        Args:
            jobs: folders of trained jobs.
            device: auto, cpu, cuda, or a device.
            combine: mean of the probabilities, or the majority of the labels; in a tie, the label of the model
                that comes first in `jobs`.

        Raises:
            WorkspaceError: A model cannot be loaded, or the models do not belong together.
        """
        if not jobs:
            raise WorkspaceError("no trained model to predict with. Run `autoseg train`.")
        self.device = pick_device(device) if isinstance(device, str) else device
        self.combine = combine
        self.models = tuple(load_model(job, self.device) for job in jobs)
        first = self.models[0]
        for other in self.models[1:]:
            if other.plan.label_map != first.plan.label_map or len(other.plan.channels) != len(first.plan.channels):
                raise WorkspaceError(
                    f"{first.name} and {other.name} were trained for different classes or channels. "
                    "Generate and train them again from one input.yaml."
                )
        self.label_map: LabelMap = first.plan.label_map
        self.num_channels = len(first.plan.channels)
        self._groups: dict[tuple[Any, ...], list[int]] = {}
        for i, model in enumerate(self.models):
            plan = model.plan
            alike = (plan.preprocessing, plan.roi_size, plan.overlap, plan.tta, plan.precision, divisor(plan))
            self._groups.setdefault(alike, []).append(i)

    def _member(self, image: ImageRows, indices: Sequence[int]) -> Member:
        """What some models with the same preprocessing and windows say about an image; computed as it is asked for."""
        plan = self.models[indices[0]].plan
        prepared = PreparedRows(image, plan.preprocessing)
        shift = 0 if self.label_map.sigmoid else 1
        rows = ProbRows(
            [self.models[i].network for i in indices],
            prepared.rows,
            prepared.shape,
            prepared.axis,
            roi_size=plan.roi_size,
            overlap=plan.overlap,
            num_outputs=plan.num_outputs,
            sigmoid=self.label_map.sigmoid,
            device=self.device,
            precision=plan.precision,
            divisor=divisor(plan),
            mirror_axes=plan.mirror_axes if plan.tta else (),
            mirrored_pairs=[(a + shift, b + shift) for a, b in self.label_map.left_right_pairs],
        )
        return Member(rows=rows, box=prepared.box, num_models=len(indices))

    def each(self, image: ImageRows) -> list[Member]:
        """Every model by itself, in the order of the jobs."""
        return [self._member(image, [i]) for i in range(len(self.models))]

    def grouped(self, image: ImageRows) -> list[Member]:
        """The models, those with the same preprocessing and windows as one: their mean costs no memory."""
        return [self._member(image, indices) for indices in self._groups.values()]

    def labelled(self, image: ImageRows) -> Iterator[tuple[Region, np.ndarray]]:
        """Label values of an image, slab by slab along its rows.

        Yields:
            Where a slab lies in the RAS volume, and its label values. Places left out are background.

        Raises:
            DataError: The image does not have the channels the models were trained with.
        """
        if self.combine == "mean" or len(self.models) == 1:
            members = self.grouped(image)
            for region, (labels,) in labelled_slabs(members, [tuple(range(len(members)))], self.label_map):
                yield region, labels
        else:
            for region, found in labelled_slabs(
                self.each(image), [(i,) for i in range(len(self.models))], self.label_map
            ):
                yield region, vote(found, self.label_map)

    def predict_labels(self, volume: Volume) -> np.ndarray:
        """Label values (X, Y, Z) in RAS on the image's grid.

        Raises:
            DataError: The image does not have the channels the models were trained with.
        """
        labels = np.zeros(volume.array.shape[1:], self.label_map.dtype)
        for region, part in self.labelled(MemoryImage(volume)):
            labels[region] = part
        return labels

    def predict_file(self, images: Sequence[Path], target: Path) -> None:
        """Segment an image from its files to a label file on its own grid; a large one never lies in memory.

        Raises:
            DataError: The image cannot be read, or does not have the channels the models were trained with.
            OSError: The label file cannot be written.
        """
        image = open_image(images)
        if isinstance(image, MemoryImage):
            labels = np.zeros(image.shape, self.label_map.dtype)
            for region, part in self.labelled(image):
                labels[region] = part
            write_volume(target, labels, image.grid)
            return
        with image, LabelRows(target, image.grid, np.dtype(self.label_map.dtype)) as out:
            for region, part in self.labelled(image):
                planes = list(image.shape)
                planes[image.axis] = part.shape[image.axis]
                whole = np.zeros(planes, part.dtype)
                inner = list(region)
                inner[image.axis] = slice(None)
                whole[tuple(inner)] = part
                out.write(region[image.axis].start, whole)


def vote(labels: Sequence[np.ndarray], label_map: LabelMap) -> np.ndarray:
    """The majority of label maps, voxel by voxel.

    Exclusive classes: the most frequent label; in a tie, the earliest label map's. Regions: where more than half
    of the label maps have them.

    Args:
        labels: (X, Y, Z) label values each, on one grid.
    """
    if label_map.sigmoid:
        result = np.zeros((len(label_map.names), *labels[0].shape), np.uint8)
        counts = np.zeros(result.shape, np.uint8)
        for label in labels:
            counts += np.stack(label_map.masks(label))
        result[2 * counts.astype(np.uint16) > len(labels)] = 1
        return label_map.decode(result)
    best, most = labels[0].copy(), np.zeros(labels[0].shape, np.uint8)
    for label in labels:
        agree = np.zeros(label.shape, np.uint8)
        for other in labels:
            agree += label == other
        better = agree > most
        best[better], most[better] = label[better], agree[better]
    return best
