"""Sliding windows: probabilities of one network or several for a volume of any length, row by row.

Windows go along one axis of the volume; rows behind the last window are finished and handed out, so what is held at
a time is as deep as a window, whatever the volume's length. Axes: B windows, C image channels, A averaged channels,
K outputs, then X, Y, Z; the row axis is one of these, H and W are the other two.

On a GPU everything stays there: each row of the image is copied to it once, from pinned memory, while another thread
prepares the next ones; windows are cut, weighted and made into probabilities there. Where its memory does not suffice
for that, windows are copied to it and what networks say of them back, which takes longer.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import nn

from autoseg.data.frame import Turn
from autoseg.data.windowing import Shape, fit_window, mirrored_mean, window_starts, window_weights
from autoseg.hardware.cores import follow
from autoseg.hardware.device import Precision, autocast, beside, finish, keep_for_work, layout_of, searching
from autoseg.hardware.memory import free_bytes
from autoseg.inference.blocks import Blocks
from autoseg.inference.clock import Clock
from autoseg.inference.probable import most_probable
from autoseg.inference.restore import SLAB_VALUES
from autoseg.inference.threads import Ahead, Pinned
from autoseg.inference.traits import TraitsWatch, sampling_step

LEVEL_TOLERANCE = 1e-4
"""Distance from the background's intensity, in normalised units, that resampling's rounding may cause."""
CPU_BATCH_VOXELS = 1 << 17
"""Windows that a CPU passes through a network together, in voxels. Four windows of 32^3 take SwinUNETR twice the time
of one; where a window is larger than this, batches win under a tenth (measured on two cores)."""
GPU_BATCH_VOXELS = 1 << 20
"""The same on a GPU: one window of 96^3 or more, several of smaller ones. A choice: nnU-Net passes one of about 128^3
at a time, and a window of 40^3 has a fifteenth of the work to fill the same card with."""
DEVICE_SHARE = 0.5
"""Share of a GPU's free memory that rows may take; a pass through the networks needs the rest. A choice."""
SLAB_COPIES = 4
"""Times that a slab's values are there while they are made: averages side by side, logits, probabilities, the image's.
"""


class WindowModel:
    """Networks that share windows: what of them is averaged, and the probabilities made of the average.

    Logits are averaged, over mirrorings, windows and networks (nnU-Net does so over mirrorings, windows and folds). A
    network's last layer is linear and sees one voxel at a time, so averaging what goes into it comes to the same; where
    that is fewer channels than outputs it is what is averaged, and the layer is applied once a voxel instead of once a
    window. With 16 filters and 105 outputs that leaves a sixth of the memory, and half of the time (measured).
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        heads: Sequence[Sequence[nn.Module]] = (),
        *,
        num_outputs: int,
        sigmoid: bool,
        device: torch.device,
        precision: Precision,
        mirror_axes: Sequence[int] = (),
        mirrored_pairs: Sequence[tuple[int, int]] = (),
        turn: Turn = Turn(),  # noqa: B008 - frozen
        usual_window: Shape | None = None,
    ) -> None:
        """Choose what is averaged.

        Args:
            networks: on `device`; each maps (B, C, X, Y, Z) to (B, K, X, Y, Z).
            heads: of each network the layers that make outputs of features, the one that makes its result first, as
                its file names them; none: logits are averaged.
            num_outputs: K.
            sigmoid: outputs are independent; else exclusive, and softmax is over all.
            mirror_axes: axes of the networks (0 X, 1 Y, 2 Z) mirrored in every combination, 2^n passes.
            mirrored_pairs: outputs that change places when X is mirrored: left and right.
            turn: from the windows' axes to those of the networks.
            usual_window: of the networks, in their axes: for passes of this size a GPU's fastest kernels are searched,
                which takes as long as many passes. Images that are one window of their own size are not worth it.
                None: every size is.
        """
        self._turn, self._usual = turn, usual_window
        self._layout = layout_of(networks[0])
        self.networks, self.num_outputs, self.independent = tuple(networks), num_outputs, sigmoid
        self.device, self.precision, self._mirror, self._pairs = device, precision, mirror_axes, mirrored_pairs
        self._heads: tuple[nn.Module, ...] = ()
        self._last: tuple[nn.Conv3d, ...] = ()
        self.num_held = num_outputs
        """A: channels that are averaged."""
        last = [h[0] for h in heads if h and isinstance(h[0], nn.Conv3d) and h[0].kernel_size == (1, 1, 1)]
        features = sum(layer.in_channels for layer in last)
        swaps = 0 in mirror_axes and bool(mirrored_pairs)
        if len(last) == len(self.networks) and features < num_outputs and not swaps:
            self._heads, self._last = tuple(layer for own in heads for layer in own), tuple(last)
            self.num_held = features

    @property
    def num_passes(self) -> int:
        """Passes through a network that a window takes: one for each network and mirroring."""
        return int(len(self.networks) * 2 ** len(self._mirror))

    def __call__(
        self, batch: torch.Tensor, watch: TraitsWatch | None = None, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Pass windows through the networks, in their axes.

        Args:
            batch: (B, C, X, Y, Z).
            watch: counts what each network says.
            weights: for it: (B, X, Y, Z) of the windows' voxels that are counted, on the device.

        Returns:
            (B, X, Y, Z, A) float32, on the device, not waited for.
        """
        follow()
        with torch.inference_mode(), _evaluating(self.networks), _headless(self._heads):
            moved = self._turn.apply(batch).to(self.device, memory_format=self._layout, non_blocking=True)
            outputs: list[torch.Tensor] = []
            is_usual = self._usual is None or tuple(moved.shape[2:]) == self._usual
            for i, network in enumerate(self.networks):
                unmirrored = list[torch.Tensor]()
                look = None if watch is None else partial(self._keep_labels, watch, i, unmirrored)
                with autocast(self.device, self.precision), searching(is_usual):
                    logits = mirrored_mean(network, moved, self._mirror, self._pairs, look).float()
                if watch is not None and weights is not None:
                    first = unmirrored[0] if unmirrored else None
                    watch.count(i, self._sampled(i, logits), first, weights)
                if self._heads or not outputs:
                    outputs.append(logits)
                else:
                    outputs[0] += logits
            held = torch.cat(outputs, 1) if self._heads and len(outputs) > 1 else outputs[0]
            if len(self.networks) > 1 and not self._heads:
                held.div_(len(self.networks))
            return self._turn.back(held).movedim(1, -1)

    def _sampled(self, index: int, logits: torch.Tensor) -> torch.Tensor:
        """Logits (B, K, X, Y, Z) of one network in the windows' axes, of the voxels that are counted."""
        step = sampling_step(self.num_outputs)
        sampled = self._turn.back(logits)[..., ::step, ::step, ::step].float()
        if self._last:
            layer = self._last[index]
            bias = None if layer.bias is None else layer.bias.float()
            sampled = F.conv3d(sampled, layer.weight.float(), bias)
        return sampled

    def _keep_labels(self, watch: TraitsWatch, index: int, kept: list[torch.Tensor], logits: torch.Tensor) -> None:
        """Keep the labels of one pass; its logits are about to be overwritten."""
        kept.append(watch.labels(self._sampled(index, logits)))

    def probabilities(self, held: torch.Tensor) -> torch.Tensor:
        """Of averages (R, H, W, A): (R, K, H, W) float32, where they are; on a CPU row by row, to hold less at a time.

        Each output lies in a piece: so softmax takes 8 ns a voxel of a CPU for 14 outputs, where those of a voxel lie
        side by side 200 (measured, PyTorch 2.13).
        """
        num_rows, *plane, _ = held.shape
        probs = torch.empty((num_rows, self.num_outputs, *plane), device=held.device)
        with torch.inference_mode():
            if held.device.type == "cpu":
                for row, result in zip(held, probs, strict=True):
                    self._outputs(row.reshape(-1, self.num_held).T, result.flatten(1))
            else:
                self._outputs(held.movedim(-1, 1).flatten(2), probs.flatten(2))
        return probs

    def _outputs(self, averages: torch.Tensor, probs: torch.Tensor) -> None:
        """Fill in probabilities (..., K, N) from averages (..., A, N)."""
        if self._last:
            weight, bias = (part.to(averages.device) for part in self._layer)
            logits = weight @ averages
            logits += bias
        else:
            logits = averages.contiguous()
        if self.independent:
            torch.sigmoid(logits, out=probs)
        else:
            torch.softmax(logits, -2, out=probs)

    @cached_property
    def _layer(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean of the networks' last layers: weights (K, A) and biases (K, 1)."""
        weights = torch.cat([layer.weight.detach().flatten(1) for layer in self._last], 1) / len(self._last)
        zero = torch.zeros(self.num_outputs, device=self.device)
        biases = torch.stack([zero if layer.bias is None else layer.bias.detach() for layer in self._last])
        return weights.float().contiguous(), biases.float().mean(0)[:, None]


class ProbRows:
    """The mean probabilities of networks that share preprocessing and windows, made as they are asked for.

    A volume smaller than a window is padded with 0 on both sides. What the networks say of each window, as
    `WindowModel` has it, is weighted into the rows. Only the windows at hand are on the device. A volume that fits one
    window costs one forward pass a network and mirroring.
    """

    def __init__(
        self,
        model: WindowModel,
        fetch: Callable[[int, int], torch.Tensor],
        shape: Shape,
        axis: int,
        *,
        roi_size: Shape,
        overlap: float,
        divisor: Shape | None = None,
        window_batch: int | None = None,
        background: Sequence[float] | None = None,
        clock: Clock | None = None,
        watch: TraitsWatch | None = None,
        on_device: bool | None = None,
    ) -> None:
        """Lay out the windows; nothing is computed yet.

        Args:
            model: what windows are passed through.
            fetch: gives the image's rows from one index to another, (C, X, Y, Z) float32, preprocessed. It is asked
                for each row once, in order; where the networks are on a GPU, by another thread. They may be on
                `device` already.
            shape: of the image.
            axis: along which rows are made: 0 X, 1 Y, 2 Z.
            roi_size: window in voxels.
            overlap: of neighbouring windows, as a share of the window, in [0, 1).
            divisor: what the network wants edges to be multiples of; given, the window may stretch (`fit_window`).
            window_batch: windows per forward pass; None: as `default_batch` says.
            background: intensity of each channel where nothing is; given, windows of nothing else are passed through
                the networks once, and what these say of one goes for all.
            clock: counts the time in the networks.
            watch: counts what each network says, and looks at the image.
            on_device: hold the rows where the networks are; None: where its memory suffices when they are first asked
                for, so that each of several predictions of an image sees what those before it took.

        Source: nnU-Net pads symmetrically (`predict_from_raw_data.py`).
        """
        if divisor is not None:
            roi_size = fit_window(shape, roi_size, divisor)
        self.shape, self.axis, self.num_outputs = shape, axis, model.num_outputs
        self._model, self._fetch, self._roi, self._overlap = model, fetch, roi_size, overlap
        self.independent = model.independent
        self._window_batch = default_batch(roi_size, model.device) if window_batch is None else window_batch
        self._level = None if background is None else torch.tensor(background).reshape(-1, 1, 1, 1)
        self._nothing: torch.Tensor | None = None  # what the networks say of a window of background
        self._clock, self._watch = clock or Clock(), watch
        self.network_s, self.num_skipped = 0.0, 0
        self._lay_out(overlap)
        self._plane = [a for a in range(3) if a != axis]
        self._window_voxels = model.num_passes * math.prod(roi_size)
        self._clock.expect(self.num_windows * self._window_voxels)
        self._next = 0  # position along the axis of the windows to compute next
        self._on_device = on_device
        self._image: torch.Tensor | None = None  # the rows under these windows, padded
        self._busy: torch.Tensor | None = None  # (rows, H, W) bool: which voxels of those read are not background
        self._new = Ahead(self._new_rows, len(self._starts[axis]), threaded=model.device.type != "cpu")

    def _lay_out(self, overlap: float) -> None:
        """Say how much is padded, where windows lie and what they weigh, along each axis."""
        missing = [max(0, roi - size) for roi, size in zip(self._roi, self.shape, strict=True)]
        self._before = [m // 2 for m in missing]
        self._after = [m - b for m, b in zip(missing, self._before, strict=True)]
        self._padded = [size + m for size, m in zip(self.shape, missing, strict=True)]
        self._starts = [window_starts(s, r, overlap) for s, r in zip(self._padded, self._roi, strict=True)]
        self._weights = [window_weights(s, r, overlap) for s, r in zip(self._padded, self._roi, strict=True)]

    @property
    def window(self) -> Shape:
        """Voxels of a window."""
        return self._roi

    @property
    def num_windows(self) -> int:
        """Windows over the whole volume; each is passed through every network."""
        return count_windows(self.shape, self._roi, self._overlap)

    @cached_property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self._model.device if self._stays() else torch.device("cpu")

    @property
    def at_once(self) -> int:
        """Rows by which a whole volume is best gone through: one on a CPU, for its cache, else a slab's."""
        plane = math.prod(self.shape[a] for a in self._plane)
        return 1 if self.device.type == "cpu" else max(1, SLAB_VALUES // (self.num_outputs * plane))

    def _stays(self) -> bool:
        """Whether a GPU holds the rows: averages and a slab's probabilities; where it has memory beside a pass."""
        if self._on_device is not None or self._model.device.type == "cpu":
            return self._on_device is not False
        plane = math.prod(self._padded[a] for a in self._plane)
        slab = max(SLAB_VALUES, self.num_outputs * plane)
        values = plane * self._model.num_held * 2 * self._roi[self.axis] + SLAB_COPIES * slab
        return 4 * values <= DEVICE_SHARE * free_bytes(self._model.device)

    @cached_property
    def _blocks(self) -> Blocks:
        height, width = (self.shape[a] for a in self._plane)
        return Blocks(self.shape[self.axis], (height, width, self._model.num_held), self.device)

    @cached_property
    def _placed_weights(self) -> list[list[torch.Tensor]]:
        """`_weights` where the rows are, copied there once."""
        return [list(torch.stack(weights).to(self.device)) for weights in self._weights]

    @cached_property
    def _counted_weights(self) -> list[list[torch.Tensor]]:
        """Of each axis and window the weights of the voxels that are counted, 0 where it pads the image.

        They lie where the networks are.
        """
        step = sampling_step(self.num_outputs)
        counted = []
        for a, (starts, size, before) in enumerate(zip(self._starts, self.shape, self._before, strict=True)):
            weights = torch.stack(self._weights[a])
            for own, first in zip(weights, (start - before for start in starts), strict=True):
                own[: max(0, -first)] = 0
                own[max(0, size - first) :] = 0
            counted.append(list(weights[:, ::step].to(self._model.device)))
        return counted

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Probabilities (stop - start, K, H, W) float32 of some rows, on `device`; rows before `start` are forgotten.

        Raises:
            ValueError: Rows were asked for that are forgotten already.
        """
        self._blocks.forget(start)
        while self._next < len(self._starts[self.axis]) and stop + self._before[self.axis] > self._finished():
            self._advance(start)
        held = self._blocks.rows(start, stop)
        begin = time.perf_counter()
        with self._clock.at("infer"):  # what a GPU still computes is the networks' time
            finish(self.device)
        self.network_s += time.perf_counter() - begin
        return self._model.probabilities(held)

    def _finished(self) -> int:
        """Padded rows that no further window changes."""
        return self._starts[self.axis][self._next]

    def _advance(self, needed: int) -> None:
        """Pass the windows at the next position along the axis through the networks."""
        axis, roi = self.axis, self._roi
        first, before = self._starts[axis][self._next], self._before[axis]
        image, plane_is_busy = self._image_rows()
        inside = range(max(first - before, 0, needed), min(first - before + roi[axis], self.shape[axis]))
        offset = inside.start - first + before
        own = slice(offset, offset + len(inside))
        is_even = bool((self._weights[axis][self._next][own] == 1.0).all())
        deep = self._placed_weights[axis][self._next][own]
        places = list(product(*(range(len(self._starts[a])) for a in self._plane)))

        def add(held: torch.Tensor, place: tuple[int, ...]) -> None:
            if not inside:
                return
            self._add(held[own], place, inside, deep, alone=len(places) == 1 and is_even)

        full = []
        for place in places:
            if plane_is_busy is None or bool(plane_is_busy[self._cut(place)].any()):
                full.append(place)
                continue
            if self._nothing is None:
                self._nothing = self._pass([self._window(image, place)])[0].movedim(axis, 0).to(self.device)
            else:
                self.num_skipped += 1
            self._clock.passed(self._window_voxels)
            add(self._nothing, place)
        pinned = Pinned(self.device)
        waiting: list[tuple[int, ...]] = []
        for begin in range(0, len(full), self._window_batch):
            chosen = full[begin : begin + self._window_batch]
            weights = torch.stack([self._inner_weights(place) for place in chosen]) if self._watch else None
            batch = self._pass([self._window(image, place) for place in chosen], weights).movedim(axis + 1, 1)
            # On its way back, if there is one, while the next windows pass.
            for held, place in zip(pinned.swap(batch), waiting if pinned.is_behind else chosen, strict=True):
                add(held, place)  # (rows, H, W, A)
            waiting = chosen
            del batch  # not beside the next one
            self._clock.passed(len(chosen) * self._window_voxels)
        for held, place in zip(pinned.last(), waiting if pinned.is_behind else [], strict=True):
            add(held, place)
        self._next += 1
        if self._next == len(self._starts[axis]):
            # Nothing is read any more. These hold a GPU's memory, and hold on to each other until Python looks.
            self._image = self._busy = self._nothing = None
            del self._new, self._fetch

    def _cut(self, place: tuple[int, ...]) -> tuple[slice, slice]:
        """Where a window lies in the padded plane."""
        h, w = (
            slice(self._starts[a][i], self._starts[a][i] + self._roi[a])
            for a, i in zip(self._plane, place, strict=True)
        )
        return h, w

    def _window(self, image: torch.Tensor, place: tuple[int, ...]) -> torch.Tensor:
        """A window (C, X, Y, Z) of the image's rows."""
        cut = [slice(None)] * 4
        for a, part in zip(self._plane, self._cut(place), strict=True):
            cut[a + 1] = part
        return image[tuple(cut)]

    def _add(
        self, logits: torch.Tensor, place: tuple[int, ...], inside: range, deep: torch.Tensor, *, alone: bool
    ) -> None:
        """Weight what is averaged of one window (rows, H, W, A) into the rows that lie in the image.

        Args:
            place: of the window in the plane.
            inside: the rows of the image that it is of.
            deep: weight of each, where the rows are.
            alone: it covers the whole plane of these rows, whose weight is 1.
        """
        target, source = list[slice](), list[slice]()
        for a, i in zip(self._plane, place, strict=True):
            start = self._starts[a][i] - self._before[a]
            low, high = max(start, 0), min(start + self._roi[a], self.shape[a])
            target.append(slice(low, high))
            source.append(slice(low - start, high - start))
        part = logits[:, source[0], source[1]]
        if alone:
            self._blocks.put(part, inside)
            return
        h, w = (self._placed_weights[a][i] for a, i in zip(self._plane, place, strict=True))
        weight = (h[:, None] * w[None])[tuple(source)]
        self._blocks.add(part, inside, (target[0], target[1]), weight, deep)

    def _new_rows(self, position: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The image's rows that the windows at a position need beside those of the ones before, padded.

        Returns:
            (C, X, Y, Z) on `device`; and where in the plane the rows under these windows are not background, (H, W)
            bool on the CPU, or None where that is not asked.
        """
        axis = self.axis
        first, before, size = self._starts[axis][position], self._before[axis], self.shape[axis]
        high = first + self._roi[axis]
        low = max(first, self._starts[axis][position - 1] + self._roi[axis]) if position else first
        with beside(self.device):
            new = self._fetch(max(0, low - before), min(size, high - before)).to(self.device)
            if self._watch is not None:
                self._watch.see(new, axis, self.shape)
            pads = []
            for a in (2, 1, 0):
                whole = a != axis
                front = self._before[a] if whole else max(0, before - low)
                back = self._after[a] if whole else max(0, high - before - size)
                pads += [front, back]
            if any(pads):
                new = F.pad(new, pads)
            if self._level is None:
                return new, None
            level = self._level.to(self.device)
            busy = ((new - level).abs_() <= LEVEL_TOLERANCE).all(0).logical_not_().movedim(axis, 0)
            if self._busy is not None:
                busy = torch.cat([self._busy, busy])
            self._busy = busy[max(0, len(busy) - self._roi[axis]) :]
            return new, self._busy.any(0).cpu()

    def _image_rows(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The image's rows under the next windows, padded: (C, X, Y, Z); and where their plane is not background."""
        axis = self.axis
        new, plane_is_busy = self._new.take()
        keep_for_work(new)
        kept = self._roi[axis] - new.shape[axis + 1]
        if kept > 0 and self._image is not None:
            old = self._image.narrow(axis + 1, self._image.shape[axis + 1] - kept, kept)
            new = torch.cat([old, new], axis + 1)
        self._image = new
        return new, plane_is_busy

    def _inner_weights(self, place: tuple[int, ...]) -> torch.Tensor:
        """(X, Y, Z) weights of the voxels that are counted in the window at a place in the plane."""
        numbers = dict(zip(self._plane, place, strict=True))
        x, y, z = (weights[numbers.get(a, self._next)] for a, weights in enumerate(self._counted_weights))
        return x[:, None, None] * y[:, None] * z

    def _pass(self, windows: Sequence[torch.Tensor], weights: torch.Tensor | None = None) -> torch.Tensor:
        """What is averaged of windows, (B, X, Y, Z, A).

        Args:
            weights: (B, X, Y, Z) of their voxels; None: nothing is counted.
        """
        begin = time.perf_counter()
        with self._clock.at("infer"):
            logits = self._model(torch.stack(list(windows)), self._watch if weights is not None else None, weights)
        self.network_s += time.perf_counter() - begin
        return logits


def count_windows(shape: Shape, window: Shape, overlap: float) -> int:
    """Windows over a volume, padded where it is smaller than one."""
    return math.prod(len(window_starts(max(s, w), w, overlap)) for s, w in zip(shape, window, strict=True))


def default_batch(window: Shape, device: torch.device) -> int:
    """Windows per forward pass where nobody says."""
    most = CPU_BATCH_VOXELS if device.type == "cpu" else GPU_BATCH_VOXELS
    return max(1, most // math.prod(window))


def predict_targets(rows: ProbRows) -> torch.Tensor:
    """A whole volume's prediction on the network's own grid, in the form of an encoded target.

    Returns:
        (1, X, Y, Z) uint8 class indices, or (K, X, Y, Z) of 0 and 1 for independent outputs; on the CPU.
    """
    targets = []
    length = rows.shape[rows.axis]
    for start in range(0, length, rows.at_once):
        probs = rows.rows(start, min(start + rows.at_once, length))
        chosen = (probs > 0.5).to(torch.uint8) if rows.independent else most_probable(probs, 1)[:, None]
        targets.append(chosen.cpu())
    return torch.cat(targets).movedim(0, rows.axis + 1)


@contextmanager
def _evaluating(networks: Sequence[nn.Module]) -> Iterator[None]:
    training = [network for network in networks if network.training]
    for network in training:
        network.eval()
    try:
        yield
    finally:
        for network in training:
            network.train()


_SWAPPING = threading.Lock()


@contextmanager
def _headless(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Have layers hand on what they are given; another thread that wants networks so waits."""
    if not layers:
        yield
        return
    with _SWAPPING:
        before = [layer.__dict__.get("forward") for layer in layers]
        for layer in layers:
            layer.forward = _same
        try:
            yield
        finally:
            for layer, forward in zip(layers, before, strict=True):
                if forward is None:
                    del layer.forward
                else:
                    layer.forward = forward


def _same(features: torch.Tensor) -> torch.Tensor:
    return features
