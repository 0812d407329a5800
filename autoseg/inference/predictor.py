"""Trained jobs, loaded once, that turn images into probabilities and labels."""

from __future__ import annotations

import logging
import math
import pickle
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from autoseg.config.reader import read_model
from autoseg.config.settings import ClassCodes, FormatName
from autoseg.data.formats.format import LabelFile
from autoseg.data.formats.table import write_label
from autoseg.data.frame import Turn
from autoseg.data.grid import Volume
from autoseg.data.labels import LabelMap
from autoseg.data.preprocess import PreparedRows, Region
from autoseg.data.resampling import resampled_shape
from autoseg.data.stray import Usual
from autoseg.data.streams import ImageRows, LabelRows, MemoryImage, open_image
from autoseg.data.volumes import write_volume
from autoseg.data.windowing import fit_window
from autoseg.errors import ConfigError, WorkspaceError, counted
from autoseg.evaluation.score_files import ValidationFile
from autoseg.evaluation.shapes import shapes_of
from autoseg.hardware.device import Precision, pick_device, resolve_precision, to_device
from autoseg.inference.appearance import Appearance
from autoseg.inference.checks import check_image
from autoseg.inference.clock import Clock
from autoseg.inference.maps import MapFiles
from autoseg.inference.options import Options
from autoseg.inference.postprocess import BODY_AXIS, ClassRule, clean
from autoseg.inference.quality import QualityModel, Verdict, judge, network_indices
from autoseg.inference.regions import KeptRows, can_keep, located, region_of
from autoseg.inference.restore import Member, Watch, labelled_slabs
from autoseg.inference.seals import check_jobs
from autoseg.inference.shortage import within_memory
from autoseg.inference.sides import BodyWatch, split_sides
from autoseg.inference.threads import Behind
from autoseg.inference.traits import Traits, TraitsWatch
from autoseg.inference.windows import ProbRows, WindowModel, count_windows
from autoseg.networks import build_network, divisor, heads, plan_faults
from autoseg.plan import Plan
from autoseg.workspace.digests import content_digest
from autoseg.workspace.files import digest
from autoseg.workspace.jobs import JobDir
from autoseg.workspace.stored import read_stored
from autoseg.workspace.workspace import Workspace

log = logging.getLogger(__name__)
PutProbs = Callable[[Region, torch.Tensor], None]
"""(place in the RAS volume, probabilities (K, X, Y, Z) there)."""
Combine = Literal["mean", "vote"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One trained job."""

    name: str
    """Name of the job's folder."""
    plan: Plan
    network: nn.Module
    heads: tuple[nn.Module, ...]
    """Of the network, as `networks.heads` gives them."""


def load_model(job: JobDir, device: torch.device, precision: Precision | None = None) -> Model:
    """Read a trained job.

    Args:
        precision: to compute in; None: the plan's, and fp32 where the job found that half precision changes labels.

    Raises:
        ConfigError: The plan cannot be read, or no network can be built by it.
        WorkspaceError: The weights are missing, damaged, or of another network than the plan describes.
    """
    name = job.root.name
    if job.weights is None:
        raise WorkspaceError(f"{job.model}: missing; {name} has not been trained. Run `autoseg train`.")
    plan = read_model(job.plan, Plan)
    if faults := plan_faults(plan):
        raise ConfigError([f"{job.plan}: {fault}" for fault in faults])
    if precision is not None:
        plan = plan.model_copy(update={"precision": precision})
    elif plan.precision == "auto" and resolve_precision(device, "auto") != "fp32" and job.validation.exists():
        # A job that was trained where there is no half precision has not compared.
        compared = read_stored(job.validation, ValidationFile).half_precision
        if compared is not None and not compared.is_equal:
            plan = plan.model_copy(update={"precision": "fp32"})
    layout = plan.channels_last
    network = to_device(load_network(job, plan), device, plan.precision, trained=False, channels_last=layout)
    return Model(name=name, plan=plan, network=network, heads=heads(plan.algo, network))


def load_network(job: JobDir, plan: Plan) -> nn.Module:
    """A job's network with its weights on the CPU, none of its layers replaced, in evaluation mode.

    Raises:
        ConfigError: No network can be built by the plan.
        WorkspaceError: The weights are damaged, or of another network than the plan describes.
    """
    weights = read_weights(job)
    network = build_network(plan)
    try:
        network.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise WorkspaceError(
            f"{job.model}: not the weights of the network in {job.plan.name} ({_first_line(error)}). "
            f"Undo the change of the plan, or train {job.root.name} again."
        ) from error
    own = network.state_dict()
    if odd := [n for n, t in own.items() if n in weights and weights[n].is_floating_point() != t.is_floating_point()]:
        kinds = [str(tensor.dtype).removeprefix("torch.") for tensor in (weights[odd[0]], own[odd[0]])]
        raise WorkspaceError(f"{job.model}: {odd[0]} is {kinds[0]}, expected {kinds[1]}. {_again(job)}")
    if broken := [name for name, tensor in own.items() if not torch.isfinite(tensor).all()]:
        raise WorkspaceError(
            f"{job.model}: {counted(len(broken), 'weight is', 'weights are')} NaN or infinite ({broken[0]} first). "
            f"{_again(job)}"
        )
    return network.eval().requires_grad_(False)


def read_weights(job: JobDir) -> dict[str, torch.Tensor]:
    """The weights of a trained job, or of one in a packed model.

    Raises:
        WorkspaceError: The file is damaged, or holds no weights.
    """
    path = job.weights or job.model
    try:
        if path == job.packed_model:
            return load_file(path)
        weights: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise WorkspaceError(f"{path}: not readable as weights ({_first_line(error)}). {_again(job)}") from error
    return weights


def _again(job: JobDir) -> str:
    algo, _, fold = job.root.name.rpartition("_")
    return f"Copy it anew, or train {job.root.name} again: `autoseg train --algo {algo} --fold {fold} --again`."


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]


def group_key(plan: Plan) -> tuple[Any, ...]:
    """Models of one key share network, preprocessing and windows, so that their mean is made window by window."""
    windows = plan.roi_size, plan.overlap, divisor(plan)
    mirroring = plan.tta and (plan.mirror_axes, plan.mirrored_classes)
    return plan.algo, plan.preprocessing, windows, mirroring, plan.precision


def model_digest(workspace: Workspace, algo: str, fold: int) -> str:
    """A digest of a trained job: its weights and its plan."""
    return job_digest(workspace.job_dir(algo, fold))


def job_digest(job: JobDir) -> str:
    """The same of the job in a folder; what changes neither weights nor predictions is left out."""
    plan = read_model(job.plan, Plan)
    return digest([content_digest(job.model), {**plan.identity(), **plan.prediction()}])


def check_alike(plans: Mapping[str, Plan]) -> None:
    """Make sure that models can be merged.

    Args:
        plans: name of a job -> its plan.

    Raises:
        WorkspaceError: Two were trained for different classes or channels.
    """
    (first, plan), *others = plans.items()
    for name, other in others:
        if other.label_map != plan.label_map or len(other.channels) != len(plan.channels):
            raise WorkspaceError(
                f"{first} and {name} were trained for different classes or channels. "
                "Generate and train them again from one input.yaml."
            )


class Predictor:
    """Models that agree on their classes and channels, ready to segment images."""

    def __init__(
        self,
        jobs: Sequence[JobDir],
        *,
        device: str | torch.device = "auto",
        combine: Combine = "mean",
        rules: Sequence[ClassRule] = (),
        locator: JobDir | None = None,
        options: Options = Options(),  # noqa: B008 - frozen
        codes: Mapping[str, str | ClassCodes] | None = None,
        colours: Mapping[str, tuple[int, int, int]] | None = None,
        format: FormatName = "auto",
        quality: QualityModel | None = None,
    ) -> None:
        """Load the models.

        Args:
            jobs: folders of trained jobs.
            device: auto, cpu, cuda, or a device.
            combine: mean of the probabilities, or the majority of the labels; in a tie, the label of the model
                that comes first in `jobs`.
            rules: how the labels are cleaned at the end.
            locator: folder of the job that finds the region to look at.
            options: how an image is gone through.
            codes, colours: of classes, as the settings of these names have them; None: as their names say, and
                as many colours as classes.
            format: of label files, where nobody names one.
            quality: what tells how good predictions are; None: nothing does.

        Raises:
            WorkspaceError: A model was changed since it was trained, cannot be loaded, or the models do not belong
                together.
        """
        if not jobs:
            raise WorkspaceError("no trained model to predict with. Run `autoseg train`.")
        self.device = pick_device(device) if isinstance(device, str) else device
        self.combine, self.rules, self.options = combine, tuple(rules), options
        self.codes, self.colours, self.format = codes or {}, colours or {}, format
        self.quality = quality
        self.watches_traits = quality is not None
        """Whether it is counted what each model's prediction looks like."""
        self._watched: list[tuple[tuple[int, ...], TraitsWatch]] = []
        self._reading = threading.Lock()
        """Of an image's rows, for which models of several grids may ask at once, each ahead of its windows."""
        self.clock = Clock()
        """Of the image at hand; whoever wants an image's own time gives a new one before it."""
        self._usual: tuple[Usual | None, ...] = ()
        check_jobs([*jobs, *([locator] if locator else [])])
        self.models = tuple(load_model(job, self.device, options.precision) for job in jobs)
        self.locator = load_model(locator, self.device, options.precision) if locator else None
        first = self.models[0]
        check_alike({model.name: model.plan for model in self.models})
        self.label_map: LabelMap = first.plan.label_map
        """The networks' classes; labels come in those of `label_map.named`."""
        self.num_channels = len(first.plan.channels)
        self.channel_names = first.plan.channel_names
        if quality is not None and [c.network_index for c in quality.classes] != network_indices(self.label_map):
            raise WorkspaceError(f"quality.json: not of the classes of {first.name}. {QualityModel.advice}")

    @property
    def num_models(self) -> int:
        """Models that take part."""
        return min(self.options.num_models or len(self.models), len(self.models))

    @property
    def needs_volume(self) -> bool:
        """Whether the labels of a whole image are looked at again at the end."""
        return bool(self.rules or self.label_map.merged_sides)

    def groups(self, start: int = 0, num: int | None = None) -> list[tuple[int, ...]]:
        """Models from one on, those with the same preprocessing and windows together.

        Args:
            num: of models that take part; None: as the options say.
        """
        by_key: dict[tuple[Any, ...], list[int]] = {}
        for i, model in enumerate(self.models[start : num or self.num_models], start):
            by_key.setdefault(group_key(model.plan), []).append(i)
        return [tuple(indices) for indices in by_key.values()]

    def _member(self, image: ImageRows, indices: Sequence[int], region: Region | None = None) -> Member:
        """What some models with the same preprocessing and windows say about an image; computed as it is asked for."""
        rows, box = self._rows(image, [self.models[i] for i in indices], region, self._watch(indices, region))
        return Member(rows=rows, box=box, num_models=len(indices))

    def window_model(
        self, models: Sequence[Model], options: Options | None = None, turn: Turn | None = None
    ) -> WindowModel:
        """What windows are passed through, for models of one group.

        Args:
            options: None: the predictor's.
            turn: from the windows' axes to the networks'; None: they are the same.
        """
        options = options or self.options
        plan = models[0].plan
        label_map = plan.label_map
        shift = 0 if label_map.sigmoid else 1
        mirror = plan.tta if options.mirror is None else options.mirror
        return WindowModel(
            [model.network for model in models],
            [model.heads for model in models],
            num_outputs=plan.num_outputs,
            sigmoid=label_map.sigmoid,
            device=self.device,
            precision=options.precision or plan.precision,
            mirror_axes=plan.mirror_axes if mirror else (),
            mirrored_pairs=[(a + shift, b + shift) for a, b in plan.mirrored_classes],
            turn=turn or Turn(),
            usual_window=plan.roi_size,
        )

    def _watch(self, indices: Sequence[int], region: Region | None) -> TraitsWatch | None:
        """What counts while some models look at an image, or a region of it; None where nothing is counted."""
        if not self.watches_traits:
            return None
        label_map = self.label_map
        watch = TraitsWatch(
            len(indices), label_map.num_outputs, independent=label_map.sigmoid, sees_image=region is None
        )
        self._watched.append((tuple(indices), watch))
        return watch

    def traits_watches(self) -> list[TraitsWatch]:
        """What counts while the last image's rows pass, one for each of its members."""
        return [watch for _, watch in self._watched]

    def traits(self) -> dict[str, Traits]:
        """Name of a job -> what its prediction of the last image looks like, once all rows of that have passed."""
        named: dict[str, Traits] = {}
        for indices, watch in self._watched:
            named.update(zip((self.models[i].name for i in indices), watch.traits(), strict=True))
        return named

    def _rows(
        self, image: ImageRows, models: Sequence[Model], region: Region | None, watch: TraitsWatch | None = None
    ) -> tuple[ProbRows, Region]:
        plan, options = models[0].plan, self.options
        with self.clock.at("pre"):
            prepared = PreparedRows(_Timed(image, self.clock, self._reading), plan.preprocessing, region)
        self._usual = prepared.usual

        def fetch(start: int, stop: int) -> torch.Tensor:
            with self.clock.at("pre"):
                return prepared.rows(start, stop, rows.device)

        rows = ProbRows(
            self.window_model(models, turn=prepared.turn),
            fetch,
            prepared.shape,
            prepared.axis,
            roi_size=prepared.turn.triple_back(plan.roi_size),
            overlap=plan.overlap if options.overlap is None else options.overlap,
            divisor=prepared.turn.triple_back(divisor(plan)),
            window_batch=options.window_batch,
            background=prepared.background if options.skip_empty else None,
            clock=self.clock,
            watch=watch,
            on_device=options.on_device,
        )
        return rows, prepared.box

    def each(self, image: ImageRows, region: Region | None = None) -> list[Member]:
        """Every model by itself, in the order of the jobs."""
        self._watched.clear()
        return [self._member(image, [i], region) for i in range(self.num_models)]

    def grouped(self, image: ImageRows, region: Region | None = None) -> list[Member]:
        """The models, an algorithm's folds as one: the mean of their logits, which costs no memory.

        Source: nnU-Net averages the logits of folds, and the probabilities of different networks.
        """
        return [self._member(image, indices, region) for indices in self.groups()]

    def _window_of(self, image: ImageRows) -> tuple[int, int, int]:
        """Voxels of an image that the models' largest window covers."""
        sizes = [1, 1, 1]
        for model in self.models[: self.num_models]:
            plan = model.plan
            turn = plan.preprocessing.turn_of(image.grid)
            roi, target_mm = turn.triple_back(plan.roi_size), turn.triple_back(plan.resample_resolution)
            each = zip(sizes, roi, target_mm, image.spacing_mm, strict=True)
            sizes = [max(size, math.ceil(edge * mm / own_mm)) for size, edge, mm, own_mm in each]
        return sizes[0], sizes[1], sizes[2]

    def locate(self, image: ImageRows) -> Region | None:
        """The region that the locator finds; None where it finds nothing, or there is none."""
        if self.locator is None or not self.options.locate:
            return None
        rows, box = self._rows(image, [self.locator], None)
        whole = bool(self.options.anywhere)
        region = located(rows, whole, box, image.spacing_mm, image.shape, self._window_of(image))
        if region is None:
            log.info("the locator finds nothing; the whole image is looked at")
        return region

    def _foreseen_voxels(self, image: ImageRows, groups: Sequence[Sequence[int]], region: Region | None = None) -> int:
        """Voxels that pass through the networks of some groups where nothing more is cropped; see `Clock`."""
        shape = image.shape if region is None else tuple(part.stop - part.start for part in region)
        total = 0
        for models in ([self.models[i] for i in indices] for indices in groups):
            plan = models[0].plan
            turn = plan.preprocessing.turn_of(image.grid)
            own = resampled_shape(turn.triple(shape), turn.triple(image.spacing_mm), plan.resample_resolution)
            window = fit_window(own, plan.roi_size, divisor(plan))
            overlap = plan.overlap if self.options.overlap is None else self.options.overlap
            num_windows = count_windows(own, window, overlap)
            total += num_windows * math.prod(window) * self.window_model(models).num_passes
        return total

    def _members(self, image: ImageRows) -> list[Member]:
        """The models' members, one for each where they vote, over what is left of the image by cropping."""
        apart = self.combine == "vote"
        crops = self.options.crop_to_first and self.num_models > 1
        if self.options.locate and self.locator is not None:
            every = [(0,), *self.groups()] if crops else self.groups()
            self.clock.foreseen_voxels = self._foreseen_voxels(image, every)
        self._watched.clear()
        region = self.locate(image)
        self.clock.foreseen_voxels = 0
        if not crops:
            return self.each(image, region) if apart else self.grouped(image, region)
        rows, box = self._rows(image, self.models[:1], region, self._watch((0,), region))
        self.clock.foreseen_voxels = self._foreseen_voxels(image, self.groups(int(can_keep(rows))), region)
        first = KeptRows(rows)
        self.clock.foreseen_voxels = 0
        others = [a for a in range(3) if a != BODY_AXIS]
        smaller = region_of(
            first.foreground, box, image.shape, image.spacing_mm, self._window_of(image), keep=(others[0], others[1])
        )
        if smaller is None:
            smaller = region
        if not first.are_kept:
            self._watched.clear()
            return self.each(image, smaller) if apart else self.grouped(image, smaller)
        groups = [(i,) for i in range(1, self.num_models)] if apart else self.groups(1)
        kept = Member(rows=first, box=box, num_models=1)
        return [kept, *(self._member(image, indices, smaller) for indices in groups)]

    def labelled(self, image: ImageRows, put: PutProbs | None = None) -> Iterator[tuple[Region, np.ndarray]]:
        """Label values of an image, slab by slab along its rows; neither split into sides nor cleaned.

        Args:
            image: to be segmented.
            put: is given each slab's mean probabilities, (K, X, Y, Z), before its labels; where models vote, too. They
                lie on the device.

        Yields:
            Where a slab lies in the RAS volume, and its label values. Places left out are background.

        Raises:
            DataError: The image does not have the channels the models were trained with.
        """
        members = self._members(image)
        voting = self.combine == "vote" and len(members) > 1
        whole = tuple(range(len(members)))
        subsets = [(i,) for i in whole] if voting else [whole]
        watch: Watch | None = None
        if put is not None:
            subsets += [whole] if voting else []

            def watch(place: int, region: Region, probs: torch.Tensor) -> None:
                if place == len(subsets) - 1:
                    put(region, probs)

        slabs = labelled_slabs(members, subsets, self.label_map, watch, slab_values=self.options.slab_values)
        while True:
            with self.clock.at("invert"):
                pending = next(slabs, None)
                if pending is None:
                    return
                region, labels = pending
                slab = vote(labels[: len(members)], self.label_map) if voting else labels[0]
            yield region, slab

    def finish(
        self, labels: np.ndarray, spacing_mm: tuple[float, float, float], midline: float, *, cleaned: bool = True
    ) -> None:
        """Split the labels of a whole image into sides and clean them, in place.

        Args:
            labels: (X, Y, Z) in RAS.
            midline: of the body along X, in voxels.
            cleaned: apply the rules, too.
        """
        with self.clock.at("post"):
            split_sides(labels, self.label_map, midline)
            if cleaned:
                clean(labels, self.label_map.named, self.rules, spacing_mm)

    def _whole(self, image: MemoryImage, put: PutProbs | None = None) -> np.ndarray:
        """Labels (X, Y, Z) of an image in memory, finished."""
        watched = BodyWatch(image) if self.label_map.merged_sides else None
        labels = np.zeros(image.shape, self.label_map.dtype)
        for region, part in self.labelled(watched or image, put):
            labels[region] = part
        self.finish(labels, image.spacing_mm, watched.midline() if watched else 0.0)
        return labels

    def appearance(self, labels: np.ndarray, spacing_mm: tuple[float, float, float]) -> Appearance:
        """What the prediction of the last image looks like, where `watches_traits` is set.

        Args:
            labels: (X, Y, Z) label values in RAS as they are handed out.
            spacing_mm: of the voxels.
        """
        x, y, z = labels.shape
        shapes = shapes_of(labels, self.label_map.named, spacing_mm)
        return Appearance(traits=self.traits(), shapes=shapes, spacing_mm=spacing_mm, shape=(x, y, z))

    def verdict(self, labels: np.ndarray, spacing_mm: tuple[float, float, float]) -> Verdict | None:
        """What is thought of the prediction of the last image; None where nothing tells. See `appearance`."""
        return None if self.quality is None else judge(self.quality, self.appearance(labels, spacing_mm))

    def check(self, volume: Volume, name: str) -> None:
        """Refuse an image in memory that cannot come out right.

        Raises:
            DataError: As `check_image` says.
        """
        check_image(name, MemoryImage(volume), self.models[0].plan)

    def predict_labels(self, volume: Volume) -> np.ndarray:
        """Label values (X, Y, Z) in RAS on the image's grid.

        Raises:
            DataError: The image does not have the channels the models were trained with.
            ResourceError: Memory does not suffice.
        """
        return within_memory([self], "the image", lambda: self._whole(MemoryImage(volume)))

    def predict_file(
        self,
        images: Sequence[Path],
        target: Path,
        *,
        write: Callable[[Path, LabelFile], None] = write_label,
        look: Callable[[ImageRows, np.ndarray], None] | None = None,
        maps: Callable[[ImageRows], MapFiles] | None = None,
    ) -> None:
        """Segment an image from its files to a label file on its own grid; a large one never lies in memory.

        Args:
            images: the image's files.
            target: the label file.
            write: it, from its grid and voxels; as its suffix says unless another is given.
            look: is shown the image and its labels (X, Y, Z) in RAS before they are written; they may be mapped from a
                file.
            maps: makes the maps of probabilities that are written with it.

        Raises:
            DataError: The image cannot be read, cannot be of the kind the models know, or does not have the
                channels they were trained with.
            OSError: The label file cannot be written.
            ResourceError: Memory does not suffice.
        """
        within_memory([self], images[0], lambda: self._predict_file(images, target, write, look, maps))

    def _predict_file(
        self,
        images: Sequence[Path],
        target: Path,
        write: Callable[[Path, LabelFile], None],
        look: Callable[[ImageRows, np.ndarray], None] | None,
        maps: Callable[[ImageRows], MapFiles] | None,
    ) -> None:
        with self.clock.at("load"):
            image = open_image(images)
        if isinstance(image, MemoryImage):
            check_image(str(images[0]), _Timed(image, self.clock, self._reading), self.models[0].plan)
            with ExitStack() as stack:
                files = stack.enter_context(maps(image)) if maps is not None else None
                labels = self._whole(image, files.put if files is not None else None)
            self._tell_strays(images[0])
            with self.clock.at("write"):
                if look is not None:
                    look(image, labels)
                write_volume(target, labels, image.grid, write)
            return
        with image:
            check_image(str(images[0]), _Timed(image, self.clock, self._reading), self.models[0].plan)
            with ExitStack() as stack:
                stack.enter_context(self.clock.at("write"))
                rows = stack.enter_context(LabelRows(target, image.grid, np.dtype(self.label_map.dtype), write))
                files = stack.enter_context(maps(image)) if maps is not None else None
                self._write_rows(image, rows, files)
                self._tell_strays(images[0])
                if look is not None:
                    look(image, rows.volume())

    def _write_rows(self, image: ImageRows, rows: LabelRows, files: MapFiles | None) -> None:
        """Write an image's labels, and maps, slab by slab as they come."""
        watched = BodyWatch(image) if self.label_map.merged_sides else None

        def put(region: Region, part: np.ndarray) -> None:
            planes = list(image.shape)
            planes[image.axis] = part.shape[image.axis]
            whole = np.zeros(planes, part.dtype)
            inner = list(region)
            inner[image.axis] = slice(None)
            whole[tuple(inner)] = part
            with self.clock.at("write"):
                rows.write(region[image.axis].start, whole)

        with Behind(put, threaded=self.device.type != "cpu") as behind:
            for region, part in self.labelled(watched or image, files.put if files is not None else None):
                behind.put(region, part)
        if self.needs_volume:
            self.finish(rows.volume(), image.spacing_mm, watched.midline() if watched else 0.0)

    def _tell_strays(self, name: Path) -> None:
        """Warn of stray voxels in the image at hand, which the networks did not see as they are."""
        for channel, usual in enumerate(self._usual):
            if usual is not None:
                which = "" if len(self._usual) == 1 else f"channel {channel}: "
                log.warning(
                    "%s: %sa few voxels lie far outside of %.4g to %.4g, where 99 %% are; they count as the nearest of "
                    "these. Is the image damaged?",
                    *(name, which, usual.low, usual.high),
                )


class _Timed:
    """An image whose reading is counted, and done by one thread at a time."""

    def __init__(self, image: ImageRows, clock: Clock, reading: threading.Lock) -> None:
        self._image, self._clock, self._reading = image, clock, reading
        self.grid, self.shape, self.axis = image.grid, image.shape, image.axis
        self.num_channels, self.spacing_mm = image.num_channels, image.spacing_mm

    def rows(self, start: int, stop: int) -> np.ndarray:
        with self._reading, self._clock.at("load"):
            return self._image.rows(start, stop)


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
