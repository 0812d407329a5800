"""What a prediction will take, from one measured window; and the options with which it keeps to a budget.

Memory of the device is that of the models' weights, one pass, and where they are held there the rows beside a slab:
probabilities, what is averaged over windows, the image under a window. Everything else is on the CPU: these rows else,
and what a small image needs as a whole. On a CPU both are the process' memory.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np
import torch

from autoseg.config.units import format_duration
from autoseg.data.grid import Grid
from autoseg.data.labels import LabelMap
from autoseg.data.resampling import resampled_shape
from autoseg.data.streams import STREAM_VOXELS
from autoseg.data.windowing import Shape, fit_window
from autoseg.errors import ResourceError
from autoseg.hardware.device import Precision, finish
from autoseg.hardware.memory import PeakMemory
from autoseg.inference.options import Options
from autoseg.inference.predictor import Model, Predictor
from autoseg.inference.regions import KEPT_VALUES
from autoseg.inference.restore import SLAB_ROWS, SLAB_VALUES, Member, labelled_slabs
from autoseg.inference.windows import WindowModel, count_windows, default_batch
from autoseg.networks import divisor
from autoseg.plan import Plan

log = logging.getLogger(__name__)

SMALLEST_SLAB = 1 << 20
"""Probabilities of a slab below which smaller slabs save nothing that counts."""
LOCATOR_INDEX = -1
"""Of the locator among the models."""
RESERVE = 0.1
"""Share of a budget that is left free, since a model of memory and time is not exact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a prediction may take; None: as much as it likes."""

    device_bytes: int | None = None
    """Of the GPU, or of the process on a CPU."""
    ram_bytes: int | None = None
    """Of the process."""
    seconds: float | None = None
    """For an image."""

    @property
    def are_set(self) -> bool:
        """Whether there is any."""
        return (self.device_bytes, self.ram_bytes, self.seconds) != (None, None, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowCost:
    """One window through one network, as measured."""

    seconds: float
    num_bytes: int
    """Most memory beside the weights and the window itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a prediction will take at most."""

    seconds: float
    device_bytes: int
    """Of the GPU; on a CPU part of `ram_bytes`, too."""
    ram_bytes: int

    def words(self, device: torch.device) -> str:
        """For people."""
        where = "" if device.type == "cpu" else f", {self.device_bytes / 1e9:.2f} GB on the GPU"
        return f"{self.seconds:.1f} s, {self.ram_bytes / 1e9:.2f} GB of memory{where}"


def measure_window(model: WindowModel, window: Shape, num_channels: int) -> WindowCost:
    """Pass one window of noise through a network, twice: the first pass is the memory's, the second the time's."""
    noise, device = torch.randn(1, num_channels, *window), model.device

    def go() -> None:
        model(noise)

    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        go()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)  # the search for kernels takes memory once
        go()
        most = torch.cuda.max_memory_allocated(device) - before
    else:
        with PeakMemory() as peak:
            go()
        # What the allocator had in hand from before does not show in the process' growth.
        least = 4 * model.num_held * math.prod(window)
        most = max(peak.most - peak.before, least)
    finish(device)
    begin = time.perf_counter()
    go()
    finish(device)
    return WindowCost(seconds=time.perf_counter() - begin, num_bytes=most)


def weights_bytes(model: Model) -> int:
    """Of a network's parameters and buffers."""
    tensors = [*model.network.parameters(), *model.network.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of an image before it is read."""

    shape: Shape
    """Of the image, in the networks' axes, as all that follows."""
    spacing_mm: tuple[float, float, float]
    num_channels: int
    axis: int
    """That rows lie along."""

    @property
    def voxels(self) -> int:
        """Of one channel."""
        return math.prod(self.shape)


def facts_for(plan: Plan, grid: Grid, num_channels: int, axis: int) -> Facts:
    """Facts of an image for models of a plan.

    Args:
        grid: of the image's file.
        axis: in RAS, along which its rows lie.
    """
    ras, turn = grid.to_ras(), plan.preprocessing.turn_of(grid)
    return Facts(
        shape=turn.triple(ras.shape),
        spacing_mm=turn.triple(ras.spacing_mm),
        num_channels=num_channels,
        axis=turn.axes.index(axis),
    )


@dataclass(kw_only=True)
class Cost:
    """Estimates for the images of one predictor; windows are measured once for each shape and network."""

    predictor: Predictor
    correction: float = 1.0
    """Of the time outside the networks: measured over predicted, of the last image."""
    _windows: dict[tuple[int, Shape, Precision | None, bool], WindowCost] = field(default_factory=dict)
    """By model, window, the precision that is not the plan's, and whether the last layer is left for later."""
    _channels: dict[tuple[tuple[int, ...], bool | None], int] = field(default_factory=dict)
    _passes: dict[int, tuple[int, int]] = field(default_factory=dict)
    """By model: voxels and bytes of the largest pass."""
    _rest_s: float | None = None

    def window(
        self, index: int, window: Shape, precision: Precision | None = None, *, headless: bool = True
    ) -> WindowCost:
        """Of one model; models of the same network and patch cost the same.

        Args:
            index: of the model; `LOCATOR_INDEX`: the locator.
            precision: None: the plan's.
            headless: leave the last layer for later where a model by itself would.
        """
        model = self._model(index)
        plan = model.plan
        for (other, shape, how, without), cost in self._windows.items():
            twin = self._model(other).plan
            alike = (twin.algo, twin.network, twin.precision) == (plan.algo, plan.network, plan.precision)
            if shape == window and how == precision and without == headless and alike:
                return cost
        if not headless:
            model = replace(model, heads=())
        passed = self.predictor.window_model([model], Options(precision=precision, mirror=False))
        cost = measure_window(passed, window, len(plan.channels))
        self._windows[index, window, precision, headless] = cost
        return cost

    def pass_bytes(self, index: int, window: Shape, batch: int) -> int:
        """Memory of a pass of several windows through one model; at least that of any pass asked for before.

        Images of many sizes have as many windows. What counts is the most that any of them takes, so a window is
        measured only where its pass holds more voxels than those that were.
        """
        voxels, most = self._passes.get(index, (0, 0))
        if batch * math.prod(window) > voxels:
            voxels, most = batch * math.prod(window), max(most, batch * self.window(index, window).num_bytes)
            self._passes[index] = voxels, most
        return most

    def _held(self, indices: tuple[int, ...], options: Options) -> int:
        """Channels that are averaged over windows for a group of models; looked up, since many options are tried."""
        key = indices, options.mirror
        if key not in self._channels:
            models = [self._model(i) for i in indices]
            self._channels[key] = self.predictor.window_model(models, options).num_held
        return self._channels[key]

    def _model(self, index: int) -> Model:
        if index != LOCATOR_INDEX:
            return self.predictor.models[index]
        assert self.predictor.locator is not None
        return self.predictor.locator

    @property
    def rest_s(self) -> float:
        """Seconds a voxel of the image takes outside the networks, from a small slab of made-up probabilities."""
        if self._rest_s is None:
            self._rest_s = measure_rest(self.predictor.label_map, self.predictor.device)
        return self._rest_s * self.correction

    def learn(self, facts: Facts, seconds: float) -> None:
        """Note what an image took outside the networks; the next one's estimate goes by it."""
        groups = len(self.predictor.groups())
        self.correction *= max(seconds, 1e-3) / (self.rest_s * facts.voxels * groups)

    def rows_bytes(self, indices: Sequence[int], facts: Facts, options: Options) -> int:
        """Memory of what stands beside a slab, for a group of models.

        The image's rows, what is averaged over windows, and the probabilities of the slab.
        """
        plan, held = self._model(indices[0]).plan, self._held(tuple(indices), options)
        shape = resampled_shape(facts.shape, facts.spacing_mm, plan.resample_resolution)
        window = fit_window(shape, plan.roi_size, divisor(plan))
        plane = math.prod(max(s, w) for a, (s, w) in enumerate(zip(shape, window, strict=True)) if a != facts.axis)
        image_plane = facts.voxels // facts.shape[facts.axis]
        values = options.slab_values or SLAB_VALUES
        slab = min(shape[facts.axis], max(1, values // (plan.num_outputs * plane)), SLAB_ROWS)
        step = max(
            1, min(SLAB_ROWS, int(values / (plan.num_outputs * plane) * facts.shape[facts.axis] / shape[facts.axis]))
        )
        total = 4 * held * math.prod(window) if options.skip_empty else 0  # what is known of a window of background
        total += 4 * plane * (held * (min(shape[facts.axis], window[facts.axis]) + slab + 2))
        total += 4 * plane * (2 * plan.num_outputs * (slab + 2) + 3 * facts.num_channels * window[facts.axis])
        total += 4 * image_plane * (facts.num_channels * window[facts.axis] + step)
        if plan.sigmoid:
            total += 2 * 4 * plan.num_outputs * step * image_plane
        return total

    def image_bytes(self, facts: Facts) -> int:
        """Memory of the image and its labels where they are held as a whole."""
        labels = facts.voxels * np.dtype(self.predictor.label_map.dtype).itemsize
        if facts.voxels * facts.num_channels > STREAM_VOXELS:
            return labels if self.predictor.needs_volume else 0
        return labels + 3 * 4 * facts.voxels * facts.num_channels

    def _kept_bytes(self, facts: Facts, options: Options, num_models: int) -> int:
        """Memory of the first model's probabilities, as float16, where the others are cropped to what it finds."""
        if not options.crop_to_first or num_models == 1:
            return 0
        plan = self.predictor.models[0].plan
        shape = resampled_shape(facts.shape, facts.spacing_mm, plan.resample_resolution)
        values = plan.num_outputs * math.prod(shape)
        return 2 * values if values <= KEPT_VALUES else 0

    def estimate(self, facts: Facts, options: Options, base_bytes: int) -> Estimate:
        """What an image will take; at most, where it is cropped, or windows are left out.

        Args:
            base_bytes: of the process before, with the models loaded.
        """
        predictor = self.predictor
        num = min(options.num_models or len(predictor.models), len(predictor.models))
        locating = options.locate and predictor.locator is not None
        seconds, passes, rows = 0.0, 0, 0
        groups = predictor.groups(num=num)
        rows += sum(self.rows_bytes(indices, facts, options) for indices in groups)
        each = [(index, indices) for indices in groups for index in indices]
        for index, together in [*each, *([(LOCATOR_INDEX, (LOCATOR_INDEX,))] if locating else [])]:
            plan, held = self._model(index).plan, self._held(together, options)
            shape = resampled_shape(facts.shape, facts.spacing_mm, plan.resample_resolution)
            window = fit_window(shape, plan.roi_size, divisor(plan))
            overlap = plan.overlap if options.overlap is None else options.overlap
            count = count_windows(shape, window, overlap)
            mirror = plan.tta if options.mirror is None else options.mirror
            cost = self.window(index, window, options.precision, headless=held != plan.num_outputs)
            seconds += count * cost.seconds * (2 ** len(plan.mirror_axes) if mirror else 1)
            batch = options.window_batch or default_batch(window, predictor.device)
            # What is averaged of the models before this one lies beside it.
            beside = 4 * held * math.prod(window) * (2 if len(together) > 1 else 1)
            passes = max(passes, min(batch, count) * (cost.num_bytes + beside))
        rows += self._kept_bytes(facts, options, num)
        seconds += self.rest_s * facts.voxels * len(groups)
        on_cpu = predictor.device.type == "cpu"
        loaded = [*predictor.models, *([predictor.locator] if predictor.locator else [])]
        on_device = not on_cpu and options.on_device is not False
        device = passes + sum(weights_bytes(model) for model in loaded) + (rows if on_device else 0)
        ram = base_bytes + self.image_bytes(facts) + (0 if on_device else rows) + (passes if on_cpu else 0)
        return Estimate(seconds=seconds, device_bytes=device, ram_bytes=ram)


class _MadeUp:
    """Probabilities that change from block to block, as those of structures do."""

    def __init__(self, num_outputs: int, sigmoid: bool, device: torch.device) -> None:
        self.shape, self.axis, self.num_outputs = (16, 64, 64), 0, num_outputs
        coarse = torch.rand(1, num_outputs, 2, 8, 8, generator=torch.Generator().manual_seed(0)) * 8
        logits = torch.nn.functional.interpolate(coarse, size=self.shape, mode="nearest")[0]
        self._rows, self._sigmoid = logits.movedim(0, 1).contiguous().to(device), sigmoid

    def rows(self, start: int, stop: int) -> torch.Tensor:
        rows = self._rows[start:stop]
        return rows.sigmoid() if self._sigmoid else rows.softmax(1)


def measure_rest(label_map: LabelMap, device: torch.device) -> float:
    """Seconds that a voxel of the image takes on the way back from a device."""
    rows = _MadeUp(label_map.num_outputs, label_map.sigmoid, device)
    box = (slice(0, 32), slice(0, 128), slice(0, 128))

    def seconds() -> float:
        begin = time.perf_counter()
        for _ in labelled_slabs([Member(rows=rows, box=box)], [(0,)], label_map):
            pass
        return time.perf_counter() - begin

    if device.type != "cpu":
        seconds()  # the first time loads a GPU's kernels
    return seconds() / (32 * 128 * 128)


# -- keeping to a budget


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Options that keep to a budget."""

    options: Options
    estimate: Estimate
    given_up: tuple[str, ...]
    """What these cost, in words; empty where nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """One thing that may be given up: the penalty orders them by what they cost in accuracy."""

    penalty: float
    words: str
    change: dict[str, Any]


def choose_options(cost: Cost, facts: Facts, options: Options, limits: Limits, base_bytes: int) -> Choice:
    """The options that give up least and keep to the limits.

    First what costs no accuracy: one window a pass, smaller slabs, a GPU's rows on the CPU. Then, in the order of
    what they cost: mirroring, half precision on a GPU, half of the overlap, models, all overlap.

    Raises:
        ResourceError: The memory is not enough for anything; a time that cannot be kept is said alone, and the
            quickest options are taken.
    """
    ways: list[tuple[float, int, Options, tuple[_Step, ...]]] = []
    for steps in product(*_ladders(cost.predictor, options)):
        changed = options
        for step in steps:
            changed = replace(changed, **step.change)
        ways.append((sum(s.penalty for s in steps), len(ways), changed, steps))
    ways.sort(key=lambda entry: entry[:2])
    on_cpu = cost.predictor.device.type == "cpu"
    best: Choice | None = None
    least = math.inf
    for _, _, changed, steps in ways:
        estimate = cost.estimate(facts, changed, base_bytes)
        words = tuple(s.words for s in steps if s.words)
        ram = [b for b in (limits.ram_bytes, limits.device_bytes if on_cpu else None) if b is not None]
        over = estimate.ram_bytes - (1 - RESERVE) * min(ram, default=math.inf)
        if not on_cpu and limits.device_bytes is not None:
            over = max(over, estimate.device_bytes - (1 - RESERVE) * limits.device_bytes)
        least = min(least, over)
        if over > 0:
            continue
        choice = Choice(options=changed, estimate=estimate, given_up=words)
        if limits.seconds is None or estimate.seconds <= (1 - RESERVE) * limits.seconds:
            return choice
        if best is None or estimate.seconds < best.estimate.seconds:
            best = choice
    if best is None:
        raise ResourceError(
            f"this image needs {least / 1e9:.2f} GB more than --max_memory and --max_ram allow, whatever is given up. "
            "Allow more, or take models of smaller patches."
        )
    assert limits.seconds is not None
    limit = format_duration(limits.seconds)
    log.warning("%s will not be kept: the quickest way takes about %.1f s", limit, best.estimate.seconds)
    return best


def _ladders(predictor: Predictor, options: Options) -> list[Sequence[_Step]]:
    """For each option what may be chosen, the best first."""
    stay = _Step(penalty=0.0, words="", change={})
    ladders: list[Sequence[_Step]] = [
        (stay, _Step(penalty=0.001, words="", change={"window_batch": 1})),
        (
            stay,
            _Step(penalty=0.002, words="", change={"slab_values": SLAB_VALUES // 4}),
            _Step(penalty=0.004, words="", change={"slab_values": SMALLEST_SLAB}),
        ),
    ]
    plans = [model.plan for model in predictor.models]
    if predictor.device.type != "cpu" and options.on_device is None:
        ladders.append((stay, _Step(penalty=0.008, words="", change={"on_device": False})))
    if predictor.device.type == "cuda" and any(plan.precision == "fp32" for plan in plans):
        ladders.append((stay, _Step(penalty=1.2, words="half precision", change={"precision": "auto"})))
    if options.mirror is None and any(plan.tta and plan.mirror_axes for plan in plans):
        ladders.append((stay, _Step(penalty=1, words="no mirroring", change={"mirror": False})))
    overlap = max(plan.overlap for plan in plans) if options.overlap is None else options.overlap
    overlaps = [(penalty, value) for penalty, value in ((1.5, 0.25), (4.6, 0.0)) if value < overlap]
    ladders.append((stay, *(_Step(penalty=p, words=f"overlap {v:g}", change={"overlap": v}) for p, v in overlaps)))
    most = min(options.num_models or len(plans), len(plans))
    counts = range(most - 1, 0, -1)
    ladders.append(
        (
            stay,
            *(
                _Step(penalty=2 + 4 * (1 - n / most), words=f"{n} of {most} models", change={"num_models": n})
                for n in counts
            ),
        )
    )
    return ladders
