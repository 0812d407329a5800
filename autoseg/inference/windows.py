"""Sliding windows: probabilities of one network or several for a volume of any length, row by row.

Windows go along one axis of the volume; rows behind the last window are finished and handed out, so what is held at
a time is as deep as a window, whatever the volume's length. Axes: B windows, C image channels, A averaged channels,
K outputs, then X, Y, Z; the row axis is one of these, H and W are the other two.
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
from autoseg.hardware.device import Precision, autocast
from autoseg.inference.clock import Clock
from autoseg.inference.traits import TraitsWatch, sampling_step

LEVEL_TOLERANCE = 1e-4
"""Distance from the background's intensity, in normalised units, that resampling's rounding may cause."""
CPU_BATCH_VOXELS = 1 << 17
"""Windows that a CPU passes through a network together, in voxels. Four windows of 32^3 take SwinUNETR twice the time
of one; where a window is larger than this, batches win under a tenth (measured on two cores)."""


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
        """
        self._turn = turn
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
            weights: for it: (B, X, Y, Z) of the windows' voxels.

        Returns:
            (B, X, Y, Z, A) float32, on the CPU.
        """
        with torch.inference_mode(), _evaluating(self.networks), _headless(self._heads):
            moved = self._turn.apply(batch).to(self.device, memory_format=torch.channels_last_3d)
            outputs: list[torch.Tensor] = []
            for i, network in enumerate(self.networks):
                unmirrored = list[torch.Tensor]()
                look = None if watch is None else partial(self._keep_labels, watch, i, unmirrored)
                with autocast(self.device, self.precision):
                    logits = mirrored_mean(network, moved, self._mirror, self._pairs, look).float()
                if watch is not None and weights is not None:
                    sampled = self._sampled(i, logits)
                    watch.count(i, sampled.cpu(), unmirrored[0] if unmirrored else None, self._every(weights))
                if self._heads or not outputs:
                    outputs.append(logits)
                else:
                    outputs[0] += logits
            held = torch.cat(outputs, 1) if self._heads and len(outputs) > 1 else outputs[0]
            if len(self.networks) > 1 and not self._heads:
                held.div_(len(self.networks))
            return self._turn.back(held.cpu()).movedim(1, -1)

    def _every(self, values: torch.Tensor) -> torch.Tensor:
        step = sampling_step(self.num_outputs)
        return values[..., ::step, ::step, ::step]

    def _sampled(self, index: int, logits: torch.Tensor) -> torch.Tensor:
        """Logits (B, K, X, Y, Z) of one network in the windows' axes, of the voxels that are counted."""
        sampled = self._every(self._turn.back(logits)).float()
        if self._last:
            layer = self._last[index]
            bias = None if layer.bias is None else layer.bias.float()
            sampled = F.conv3d(sampled, layer.weight.float(), bias)
        return sampled

    def _keep_labels(self, watch: TraitsWatch, index: int, kept: list[torch.Tensor], logits: torch.Tensor) -> None:
        """Keep the labels of one pass; its logits are about to be overwritten."""
        kept.append(watch.labels(self._sampled(index, logits)).cpu())

    def probabilities(self, held: torch.Tensor) -> torch.Tensor:
        """Of averages (R, H, W, A): (R, H, W, K) float32, row by row, since with many classes a row's are large."""
        probs = torch.empty((*held.shape[:-1], self.num_outputs))
        with torch.inference_mode():
            for row, result in zip(held, probs, strict=True):
                logits = row.reshape(-1, self.num_held)
                if self._last:
                    weight, bias = self._layer
                    logits = torch.addmm(bias, logits, weight)
                target = result.view(-1, self.num_outputs)
                if self.independent:
                    torch.sigmoid(logits, out=target)
                else:
                    torch.softmax(logits, -1, out=target)
        return probs

    @cached_property
    def _layer(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean of the networks' last layers: weights (A, K) and biases (K,)."""
        weights = torch.cat([layer.weight.detach().flatten(1) for layer in self._last], 1) / len(self._last)
        zero = torch.zeros(self.num_outputs, device=self.device)
        biases = torch.stack([zero if layer.bias is None else layer.bias.detach() for layer in self._last])
        return weights.float().cpu().T.contiguous(), biases.float().mean(0).cpu()


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
    ) -> None:
        """Lay out the windows; nothing is computed yet.

        Args:
            model: what windows are passed through.
            fetch: gives the image's rows from one index to another, (C, X, Y, Z) float32, preprocessed. It is asked
                for each row once, in order.
            shape: of the image.
            axis: along which rows are made: 0 X, 1 Y, 2 Z.
            roi_size: window in voxels.
            overlap: of neighbouring windows, as a share of the window, in [0, 1).
            divisor: what the network wants edges to be multiples of; given, the window may stretch (`fit_window`).
            window_batch: windows per forward pass; None: on a CPU as many as come to `CPU_BATCH_VOXELS`, else one.
            background: intensity of each channel where nothing is; given, windows of nothing else are passed through
                the networks once, and what these say of one goes for all.
            clock: counts the time in the networks.
            watch: counts what each network says, and looks at the image.

        Source: nnU-Net pads symmetrically (`predict_from_raw_data.py`).
        """
        if divisor is not None:
            roi_size = fit_window(shape, roi_size, divisor)
        self.shape, self.axis, self.num_outputs = shape, axis, model.num_outputs
        self._model, self._fetch, self._roi, self._overlap = model, fetch, roi_size, overlap
        self.independent = model.independent
        self._window_batch = default_batch(roi_size, model.device) if window_batch is None else window_batch
        self._background = background
        self._nothing: torch.Tensor | None = None  # what the networks say of a window of background
        self._clock, self._watch = clock or Clock(), watch
        self.network_s, self.num_skipped = 0.0, 0
        missing = [max(0, roi - size) for roi, size in zip(roi_size, shape, strict=True)]
        self._before = [m // 2 for m in missing]
        self._after = [m - b for m, b in zip(missing, self._before, strict=True)]
        self._padded = [size + m for size, m in zip(shape, missing, strict=True)]
        self._starts = [window_starts(s, r, overlap) for s, r in zip(self._padded, roi_size, strict=True)]
        self._weights = [window_weights(s, r, overlap) for s, r in zip(self._padded, roi_size, strict=True)]
        self._plane = [a for a in range(3) if a != axis]
        self._window_voxels = model.num_passes * math.prod(roi_size)
        self._clock.expect(self.num_windows * self._window_voxels)
        self._next = 0  # position along the axis of the windows to compute next
        self._image: torch.Tensor | None = None  # the rows under these windows, padded
        self._image_end = 0
        self._rows: dict[int, torch.Tensor] = {}  # (H, W, A), finished up to the next windows' start

    @property
    def window(self) -> Shape:
        """Voxels of a window."""
        return self._roi

    @property
    def num_windows(self) -> int:
        """Windows over the whole volume; each is passed through every network."""
        return count_windows(self.shape, self._roi, self._overlap)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Probabilities (stop - start, K, H, W) float32 of some rows, on the CPU; rows before `start` are forgotten.

        Raises:
            ValueError: Rows were asked for that are forgotten already.
        """
        for row in [r for r in self._rows if r < start]:
            del self._rows[row]
        while self._next < len(self._starts[self.axis]) and stop + self._before[self.axis] > self._finished():
            self._advance(start)
        if start not in self._rows:
            raise ValueError(f"row {start} is gone; rows can be asked for in ascending order only")
        held = torch.stack([self._rows[row] for row in range(start, stop)])
        return self._model.probabilities(held).movedim(-1, 1)

    def _finished(self) -> int:
        """Padded rows that no further window changes."""
        return self._starts[self.axis][self._next]

    def _advance(self, needed: int) -> None:
        """Pass the windows at the next position along the axis through the networks."""
        axis, roi = self.axis, self._roi
        first, before = self._starts[axis][self._next], self._before[axis]
        image = self._image_rows(first)
        deep = self._weights[axis][self._next].tolist()
        inside = range(max(first - before, 0, needed), min(first - before + roi[axis], self.shape[axis]))
        places = list(product(*(range(len(self._starts[a])) for a in self._plane)))
        full = []
        for place in places:
            cut = [slice(None)] * 4
            for a, i in zip(self._plane, place, strict=True):
                cut[a + 1] = slice(self._starts[a][i], self._starts[a][i] + roi[a])
            window = image[tuple(cut)]
            if self._is_empty(window):
                if self._nothing is None:
                    self._nothing = self._pass(window[None]).movedim(axis + 1, 1)[0]
                else:
                    self.num_skipped += 1
                self._clock.passed(self._window_voxels)
                self._add(self._nothing, place, inside, first - before, deep, alone=len(places) == 1)
            else:
                full.append((place, window))
        for begin in range(0, len(full), self._window_batch):
            chosen = full[begin : begin + self._window_batch]
            weights = torch.stack([self._inner_weights(place) for place, _ in chosen]) if self._watch else None
            batch = self._pass(torch.stack([window for _, window in chosen]), weights).movedim(axis + 1, 1)
            for (place, _), held in zip(chosen, batch, strict=True):  # (rows, H, W, A) each
                self._add(held, place, inside, first - before, deep, alone=len(places) == 1)
            del batch, held  # not beside the next ones
            self._clock.passed(len(chosen) * self._window_voxels)
        self._next += 1

    def _is_empty(self, window: torch.Tensor) -> bool:
        """Whether a window (C, X, Y, Z) is nothing but background."""
        if self._background is None:
            return False
        level = torch.tensor(self._background).reshape(-1, 1, 1, 1)
        return bool(((window - level).abs().amax() <= LEVEL_TOLERANCE).item())

    def _add(
        self,
        logits: torch.Tensor,
        place: tuple[int, ...],
        inside: range,
        first: int,
        deep: list[float],
        *,
        alone: bool,
    ) -> None:
        """Weight what is averaged of one window (rows, H, W, A) into the rows that lie in the image.

        Args:
            place: of the window in the plane.
            first: its first row in the image.
            deep: weight of each of its rows.
            alone: it covers the whole plane.
        """
        target, source = list[slice](), list[slice]()
        for a, i in zip(self._plane, place, strict=True):
            start = self._starts[a][i] - self._before[a]
            low, high = max(start, 0), min(start + self._roi[a], self.shape[a])
            target.append(slice(low, high))
            source.append(slice(low - start, high - start))
        h, w = (self._weights[a][i] for a, i in zip(self._plane, place, strict=True))
        weight = (h[:, None] * w[None])[tuple(source)][..., None]
        size = (*(self.shape[a] for a in self._plane), self._model.num_held)
        for row in inside:
            part = logits[row - first][tuple(source)]
            held = self._rows.get(row)
            if held is None and alone and deep[row - first] == 1.0:
                self._rows[row] = part
                continue
            if held is None:
                held = self._rows[row] = torch.zeros(size)
            held[tuple(target)].addcmul_(part, weight, value=deep[row - first])

    def _image_rows(self, first: int) -> torch.Tensor:
        """The image's rows under the windows that start at `first`, padded: (C, X, Y, Z)."""
        axis = self.axis
        last = first + self._roi[axis]
        before, size = self._before[axis], self.shape[axis]
        low, high = max(self._image_end, first), last
        new = self._fetch(max(0, low - before), min(size, high - before))
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
        if self._image is not None and self._image_end > first:
            old = self._image.narrow(
                axis + 1, self._image.shape[axis + 1] - (self._image_end - first), self._image_end - first
            )
            new = torch.cat([old, new], axis + 1)
        self._image, self._image_end = new, last
        return new

    def _inner_weights(self, place: tuple[int, ...]) -> torch.Tensor:
        """(X, Y, Z) weights of the window at a place in the plane, 0 where it pads the image."""
        product = torch.ones(())
        numbers = dict(zip(self._plane, place, strict=True))
        for a in range(3):
            i = numbers.get(a, self._next)
            start = self._starts[a][i] - self._before[a]
            weights = self._weights[a][i].clone()
            weights[: max(0, -start)] = 0
            weights[max(0, self.shape[a] - start) :] = 0
            product = product[..., None] * weights
        return product

    def _pass(self, batch: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """What is averaged of windows, (B, X, Y, Z, A).

        Args:
            weights: (B, X, Y, Z) of their voxels; None: nothing is counted.
        """
        begin = time.perf_counter()
        with self._clock.at("infer"):
            logits = self._model(batch, self._watch if weights is not None else None, weights)
        self.network_s += time.perf_counter() - begin
        return logits


def count_windows(shape: Shape, window: Shape, overlap: float) -> int:
    """Windows over a volume, padded where it is smaller than one."""
    return math.prod(len(window_starts(max(s, w), w, overlap)) for s, w in zip(shape, window, strict=True))


def default_batch(window: Shape, device: torch.device) -> int:
    """Windows per forward pass where nobody says."""
    return max(1, CPU_BATCH_VOXELS // math.prod(window)) if device.type == "cpu" else 1


def predict_targets(rows: ProbRows) -> torch.Tensor:
    """A whole volume's prediction on the network's own grid, in the form of an encoded target.

    Returns:
        (1, X, Y, Z) uint8 class indices, or (K, X, Y, Z) of 0 and 1 for independent outputs.
    """
    targets = []
    for row in range(rows.shape[rows.axis]):
        probs = rows.rows(row, row + 1)[0]
        targets.append((probs > 0.5 if rows.independent else probs.argmax(0, keepdim=True)).to(torch.uint8))
    return torch.stack(targets, rows.axis + 1)


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
