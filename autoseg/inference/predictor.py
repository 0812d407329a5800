"""Trained jobs, loaded once, that turn images into probabilities and labels."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn

from autoseg.algos.device import pick_device
from autoseg.algos.networks import build_network, divisor
from autoseg.algos.plan import Plan
from autoseg.data.labels import LabelMap
from autoseg.data.preprocess import Prepared, Preprocessing, prepare_image
from autoseg.data.volumes import Volume
from autoseg.errors import WorkspaceError
from autoseg.inference.restore import Probs, labels_of_means, mean_labels, to_probs
from autoseg.inference.windows import predict_logits
from autoseg.reader import read_model
from autoseg.workspace import JobDir

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
    return Model(name=name, plan=plan, network=network)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]


class Predictor:
    """One model or several of the same classes and channels; images go in, labels come out.

    Models with the same preprocessing share the prepared image. The mean is of probabilities, as nnU-Net
    ensembles its configurations; models that work at different spacings meet on the image's own grid.
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
        self._groups: dict[Preprocessing, list[int]] = {}
        for i, model in enumerate(self.models):
            self._groups.setdefault(model.plan.preprocessing, []).append(i)

    def _each(self, volume: Volume) -> Iterator[tuple[int, Prepared, torch.Tensor]]:
        """Yield (index of the model, prepared image, probabilities), group by group."""
        for how, members in self._groups.items():
            prepared = prepare_image(volume, how)
            for i in members:
                yield i, prepared, self._probs(self.models[i], prepared.image)

    def _probs(self, model: Model, image: torch.Tensor) -> torch.Tensor:
        plan = model.plan
        label_map = self.label_map
        shift = 0 if label_map.sigmoid else 1
        logits = predict_logits(
            model.network,
            image,
            roi_size=plan.roi_size,
            overlap=plan.overlap,
            num_outputs=plan.num_outputs,
            device=self.device,
            precision=plan.precision,
            divisor=divisor(plan),
            mirror_axes=plan.mirror_axes if plan.tta else (),
            mirrored_pairs=[(a + shift, b + shift) for a, b in label_map.left_right_pairs],
        )
        return to_probs(logits, sigmoid=label_map.sigmoid)

    def predict_each(self, volume: Volume) -> list[Probs]:
        """Probabilities of every model, in the order of the jobs."""
        found = {i: Probs(values=probs, box=prepared.box) for i, prepared, probs in self._each(volume)}
        return [found[i] for i in range(len(self.models))]

    def predict_probs(self, volume: Volume) -> list[Probs]:
        """The mean of the probabilities, one for each group of models with the same preprocessing.

        Models of a group are added up in place; `restore.mean_labels` makes labels of the whole.
        """
        groups: dict[Preprocessing, Probs] = {}
        for i, prepared, probs in self._each(volume):
            how = self.models[i].plan.preprocessing
            if (mean := groups.get(how)) is None:
                num = len(self._groups[how])
                groups[how] = Probs(values=probs.div_(num), box=prepared.box, num_models=num)
            else:
                mean.values.add_(probs, alpha=1 / mean.num_models)
        return list(groups.values())

    def predict_labels(self, volume: Volume) -> np.ndarray:
        """Label values (X, Y, Z) in RAS on the image's grid.

        Raises:
            DataError: The image does not have the channels the models were trained with.
        """
        shape: tuple[int, int, int] = volume.array.shape[1:]
        if self.combine == "mean" or len(self.models) == 1:
            return mean_labels(self.predict_probs(volume), shape, self.label_map)
        labels: list[np.ndarray] = [np.empty(0)] * len(self.models)
        for i, prepared, probs in self._each(volume):
            labels[i] = labels_of_means([Probs(values=probs, box=prepared.box)], [(0,)], shape, self.label_map)[0]
        return vote(labels, self.label_map)


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
