"""The one trainer: every network, one process or several, resumed exactly where it was.

What a step does is a function of the plan and the step's number alone (see patches.py), so a checkpoint needs no
random states: model, average, optimizer, scaler and counters are the whole state of a job.

Legend: B batch, C channels, K classes.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from autoseg.algos.augment import augment_batch
from autoseg.algos.cache import CachedCase
from autoseg.algos.device import autocast, resolve_precision, take_onednn
from autoseg.algos.losses import supervised_loss
from autoseg.algos.networks import build_network, divisor
from autoseg.algos.patches import Sampler, cut_batch
from autoseg.algos.plan import Plan
from autoseg.algos.schedule import Schedule, ema_decay, learning_rate, validation_marks
from autoseg.config import format_duration
from autoseg.data.labels import LabelMap
from autoseg.errors import AutosegError, WorkspaceError
from autoseg.inference.metrics import dice_of_targets
from autoseg.inference.windows import ProbRows, predict_targets
from autoseg.terminal import Progress as Bar
from autoseg.workspace import JobDir, digest, write_atomic, write_text

log = logging.getLogger(__name__)

CHECKPOINT_S = 60.0
"""Seconds between checkpoints, more where writing one takes over 2 % of that; every 5 minutes at the latest."""

NEW_STEPS = 0.02
"""Share of all steps that must lie since the last validation for another one at the end."""


class Diverged(AutosegError):
    """The loss is no number any more: the job is marked diverged and does not count as trained."""


class Pruned(Exception):
    """A sweep stops the trial: others did better by this epoch."""


class Interrupted(KeyboardInterrupt):
    """SIGTERM or Ctrl-C: the job was saved and will go on from there."""


@dataclass(kw_only=True)
class Progress:
    """The counters of a job; stored in its checkpoint."""

    step: int = 0
    epoch: int = 0
    epoch_loss: float = 0.0
    epoch_steps: int = 0
    epoch_s: float = 0.0
    elapsed_s: float = 0.0
    validation_s: float = 0.0
    """Seconds the last validation took, or is expected to take."""
    validations: int = 0
    validated_step: int = 0
    best_dice: float = -1.0
    best_epoch: int = 0
    last_dice: float = math.nan


@dataclass(kw_only=True)
class TrainResult:
    """What a job came to."""

    best_dice: float
    best_epoch: int
    epochs: int
    steps: int
    seconds: float
    curve: list[dict[str, Any]] = field(default_factory=list)


class Trainer:
    """Trains one job. Everything it needs comes in through the constructor; `run` does the work."""

    def __init__(
        self,
        plan: Plan,
        train_cases: Sequence[CachedCase],
        val_cases: Sequence[CachedCase],
        paths: JobDir,
        *,
        device: torch.device,
        final_s: Callable[[float], float] = lambda validation_s: 0.0,
        started: float | None = None,
        inputs: str = "",
        first_weights: Path | None = None,
        before_write: Callable[[], None] = lambda: None,
        after_epoch: Callable[[Progress, float], None] = lambda progress, dice: None,
    ) -> None:
        """Set up a job.

        Args:
            train_cases, val_cases: preprocessed; the fold's.
            paths: where checkpoints, weights and metrics go.
            final_s: seconds that follow training, from the seconds of a validation; kept free of a budget.
            started: `time.monotonic()` when the job began, so that preprocessing counts towards a budget.
            inputs: digest of the files the cases come from; a checkpoint made from others is not gone on with.
            first_weights: a state dict to start from; None: random weights.
            before_write: called before any file is written; raises where this process may not any more.
            after_epoch: called after each epoch with the validation's Dice, NaN where none was due; may raise `Pruned`.
        """
        self.before_write, self.after_epoch = before_write, after_epoch
        self.plan, self.train_cases, self.val_cases, self.paths = plan, train_cases, val_cases, paths
        self.device, self.final_s, self.inputs = device, final_s, inputs
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        if plan.batch_size % self.world:
            raise WorkspaceError(
                f"{paths.plan.name}: batch_size {plan.batch_size} cannot be shared by {self.world} processes. "
                f"Set a multiple of {self.world}."
            )
        share = plan.batch_size // self.world
        self.indices = range(self.rank * share, (self.rank + 1) * share)
        self.micro_batch = share
        self.schedule = Schedule(num_steps=plan.num_epochs * plan.num_steps_per_epoch, budget_s=plan.budget_s)
        self.progress = Progress()
        self.curve: list[dict[str, Any]] = []
        self.clock = started if started is not None else time.monotonic()
        self._stop = ""  # the signal that came
        self._agreed = ""  # the signal that all processes stop for

        self.unannotated = unannotated_classes(train_cases, plan.label_map)
        names = plan.label_map.names
        self.sampler = Sampler(
            train_cases,
            self.unannotated,
            foreground_fraction=plan.foreground_fraction,
            class_weights=np.array([plan.class_sampling.get(name, 1.0) for name in names]),
        )
        self.class_weights = torch.tensor([plan.class_weights.get(name, 1.0) for name in names], device=device)

        torch.manual_seed(plan.seed)
        self.memory_format = torch.channels_last_3d
        # channels-last: 1.3 times on a CPU (measured), tensor cores want it on a GPU.
        network = build_network(plan).to(device)
        if first_weights is not None:
            network.load_state_dict(torch.load(first_weights, map_location=device, weights_only=True))
        network = network.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        self.network = network
        self.average = copy.deepcopy(network).eval().requires_grad_(False)
        take_onednn(self.average, device, plan.precision)
        self.optimizer = torch.optim.AdamW(
            network.parameters(), lr=plan.learning_rate, weight_decay=plan.weight_decay, foreach=True
        )
        half = resolve_precision(device, plan.precision) == "fp16"
        self.scaler = torch.amp.GradScaler(device.type, enabled=half)
        self.model: nn.Module = network
        if self.world > 1:
            self.model = nn.parallel.DistributedDataParallel(
                network, device_ids=[device.index] if device.type == "cuda" else None
            )

    # -- the loop
    def run(self) -> TrainResult:
        """Train to the end of the schedule.

        Raises:
            Diverged: The loss became NaN or infinite.
            Interrupted: A signal came; the state is saved.
        """
        self._resume()
        saved = time.monotonic()
        save_s = 0.0
        previous = self._catch_signals()
        bar = Bar(self.paths.root.name, 1.0, unit="", shown=self.rank == 0)
        try:
            while not self._finished():
                self._train_step()
                bar.to(self._share(), f", step {self.progress.step}")
                p = self.progress
                finished = self._finished()
                epoch_ends = finished or p.epoch_steps == self.plan.num_steps_per_epoch
                epoch_s = p.epoch_s  # the end of the epoch clears it
                if epoch_ends:
                    self._end_epoch()
                due = time.monotonic() - saved > min(300.0, max(CHECKPOINT_S, 50 * save_s))
                if due or self._agreed or (epoch_ends and save_s < 0.02 * epoch_s):
                    begin = time.monotonic()
                    self._save_checkpoint()
                    saved, save_s = time.monotonic(), time.monotonic() - begin
                if self._agreed:
                    raise Interrupted(self._agreed)
            self._save_checkpoint()
        finally:
            bar.close()
            for number, handler in previous.items():
                signal.signal(number, handler)
        p = self.progress
        return TrainResult(
            best_dice=p.best_dice,
            best_epoch=p.best_epoch,
            epochs=p.epoch,
            steps=p.step,
            seconds=p.elapsed_s,
            curve=self.curve,
        )

    def _finished(self) -> bool:
        return self._share() >= 1.0

    def _share(self) -> float:
        p = self.progress
        share = self.schedule.progress(p.step, p.elapsed_s, p.validation_s + self.final_s(p.validation_s))
        self._agreed = self._stop
        if self.world > 1:  # one process' clock and signals decide for all, so that none waits for another
            shared = torch.tensor([share, float(bool(self._stop))], device=self.device)
            dist.broadcast(shared, 0)
            share = float(shared[0])
            self._agreed = "SIGTERM" if shared[1] else ""
        return share

    def _tick(self) -> float:
        now = time.monotonic()
        spent, self.clock = now - self.clock, now
        self.progress.elapsed_s += spent
        return spent

    def _train_step(self) -> None:
        p, plan = self.progress, self.plan
        rate = learning_rate(plan.learning_rate, self._share(), plan.warmup_fraction)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        images, targets, rngs, chosen = cut_batch(
            self.sampler,
            seed=plan.seed,
            step=p.step,
            batch_size=plan.batch_size,
            indices=self.indices,
            roi=plan.roi_size,
        )
        unannotated = self.unannotated[chosen]
        image = torch.from_numpy(images).to(self.device, non_blocking=True)
        target = torch.from_numpy(targets).to(self.device, non_blocking=True)
        if plan.augment != "none":
            image, target = self._augment(image, target, rngs, unannotated)
        torch.manual_seed(plan.seed * 1_000_003 + p.step * self.world + self.rank)  # for networks with dropout
        hidden = torch.from_numpy(unannotated).to(self.device)
        loss = self._backward(image.to(memory_format=self.memory_format), target, hidden)
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.network.parameters(), plan.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._average_weights()
        p.step += 1
        p.epoch_steps += 1
        p.epoch_loss += loss
        p.epoch_s += self._tick()
        if p.step == 3 and plan.budget_s is not None:
            self._measure_validation()

    def _augment(
        self, image: torch.Tensor, target: torch.Tensor, rngs: Sequence[np.random.Generator], unannotated: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Change the patches at random.

        A sample that is annotated for one side of a pair alone is not mirrored along X: it would come to show the side
        that is not annotated.
        """
        plan = self.plan
        pairs = plan.label_map.left_right_pairs
        one_sided = np.zeros(len(rngs), bool)
        for a, b in pairs:
            one_sided |= unannotated[:, a] != unannotated[:, b]
        how: dict[str, Any] = {
            "spacing_mm": plan.resample_resolution,
            "left_right_pairs": pairs,
            "sigmoid": plan.sigmoid,
            "light": plan.augment == "light",
        }
        if not one_sided.any():
            return augment_batch(image, target, rngs, mirror_axes=plan.mirror_axes, **how)
        parts = []
        for i, rng in enumerate(rngs):
            axes = [a for a in plan.mirror_axes if a != 0 or not one_sided[i]]
            parts.append(augment_batch(image[i : i + 1], target[i : i + 1], [rng], mirror_axes=axes, **how))
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def _backward(self, image: torch.Tensor, target: torch.Tensor, unannotated: torch.Tensor) -> float:
        """Gradients of the mean loss over this process' samples; smaller pieces where memory runs out."""
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            try:
                total = 0.0
                for first in range(0, len(image), self.micro_batch):
                    part = slice(first, first + self.micro_batch)
                    piece, truth = image[part], target[part]
                    with autocast(self.device, self.plan.precision):
                        outputs = self.model(piece)
                    loss = supervised_loss(
                        outputs,
                        truth,
                        sigmoid=self.plan.sigmoid,
                        loss=self.plan.loss,
                        unannotated=unannotated[part],
                        class_weights=self.class_weights,
                    )
                    loss = loss * (len(piece) / len(image))
                    self.scaler.scale(loss).backward()
                    total += float(loss.detach())
                break
            except torch.OutOfMemoryError:
                if self.micro_batch == 1:
                    raise
                self.micro_batch = math.ceil(self.micro_batch / 2)
                torch.cuda.empty_cache()
                log.warning("out of memory: going on with %d patches at a time", self.micro_batch)
        if not math.isfinite(total):
            raise Diverged(
                f"{self.paths.root.name}: the loss became {total} in epoch {self.progress.epoch + 1}. "
                f"Lower learning_rate ({self.plan.learning_rate:g}) in {self.paths.plan.name} and train again."
            )
        return total

    @torch.no_grad()
    def _average_weights(self) -> None:
        decay = ema_decay(self.plan.ema_decay, self.progress.step)
        for mean, now in zip(self.average.parameters(), self.network.parameters(), strict=True):
            mean.lerp_(now, 1 - decay)
        for mean, now in zip(self.average.buffers(), self.network.buffers(), strict=True):
            mean.copy_(now)

    # -- epochs and validation
    def _end_epoch(self) -> None:
        p, plan = self.progress, self.plan
        p.epoch += 1
        share = self._share()
        dice = self._validate() if self._validation_due(share) else math.nan
        self.before_write()
        if not math.isnan(dice):
            p.last_dice, p.validated_step = dice, p.step
            p.validations += 1
            if dice > p.best_dice:
                p.best_dice, p.best_epoch = dice, p.epoch
                if self.rank == 0:
                    save_weights(self.average, self.paths)
        self._tick()
        share = self._share()
        left = p.elapsed_s * (1 - share) / max(share, 1e-6)
        if self.plan.budget_s is not None:
            left = min(left, max(0.0, self.plan.budget_s - p.elapsed_s))
        rate = self.optimizer.param_groups[0]["lr"]
        line = {
            "epoch": p.epoch,
            "num_epochs": plan.num_epochs,
            "step": p.step,
            "train_loss": round(p.epoch_loss / max(1, p.epoch_steps), 6),
            "val_dice": None if math.isnan(dice) else round(dice, 6),
            "best_dice": None if p.best_dice < 0 else round(p.best_dice, 6),
            "lr": float(f"{rate:.6g}"),
            "progress": round(share, 4),
            "seconds": round(p.elapsed_s, 2),
            "samples_per_s": round(p.epoch_steps * plan.batch_size / max(p.epoch_s, 1e-6), 2),
            "time_left_s": round(left, 1),
        }
        self.curve.append(line)
        if self.rank == 0:
            with open(self.paths.metrics, "a") as file:
                file.write(json.dumps(line) + "\n")
            scored = "" if math.isnan(dice) else f"  dice {dice:.4f} (best {p.best_dice:.4f})"
            of = f"/{plan.num_epochs}" if plan.budget_s is None else ""
            log.info(
                "%s  epoch %d%s  loss %.4f%s  lr %.2e  %.1f samples/s  %s left",
                self.paths.root.name, p.epoch, of, line["train_loss"], scored, rate, line["samples_per_s"],
                format_duration(left),
            )  # fmt: skip
        p.epoch_loss, p.epoch_steps, p.epoch_s = 0.0, 0, 0.0
        self.after_epoch(p, dice)

    def _validation_due(self, share: float) -> bool:
        if share >= 1.0:
            # A few steps at a learning rate near zero change nothing that is worth another validation.
            return self.progress.step - self.progress.validated_step > NEW_STEPS * self.progress.step
        if self.plan.budget_s is None:
            return self.progress.epoch % self.plan.num_epochs_per_validation == 0
        marks = validation_marks(self.plan.budget_s, self.progress.validation_s)
        passed = sum(share >= mark for mark in marks)
        return passed > self.progress.validations

    def _predict(self, case: CachedCase) -> np.ndarray:
        """A case's prediction at the network's spacing, as an encoded target."""
        image = torch.from_numpy(np.asarray(case.image, np.float32))
        rows = ProbRows(
            [self.average],
            lambda start, stop: image[:, start:stop],
            (image.shape[1], image.shape[2], image.shape[3]),
            0,
            roi_size=self.plan.roi_size,
            overlap=self.plan.overlap,
            num_outputs=self.plan.num_outputs,
            sigmoid=self.plan.sigmoid,
            device=self.device,
            precision=self.plan.precision,
            divisor=divisor(self.plan),
        )
        return predict_targets(rows).numpy()

    def _validate(self) -> float:
        """Mean Dice over classes of the mean over the fold's cases, at the network's spacing."""
        begin = time.monotonic()
        label_map = self.plan.label_map
        scores = torch.full((len(self.val_cases), len(label_map.names)), math.nan, dtype=torch.float64)
        for i in range(self.rank, len(self.val_cases), self.world):
            case = self.val_cases[i]
            pred, target = self._predict(case), np.asarray(case.target)
            scores[i] = torch.tensor(dice_of_targets(pred, target, label_map, annotated=case.annotated))
        if self.world > 1:
            seen = ~scores.isnan()
            both = torch.stack([scores.nan_to_num(0.0), seen.double()]).to(self.device)
            dist.all_reduce(both)
            scores = torch.where(both[1] > 0, both[0], math.nan).cpu()
        self.progress.validation_s = time.monotonic() - begin
        by_class = scores.nanmean(0)
        mean = by_class.nanmean()
        return 0.0 if mean.isnan() else float(mean)

    def _measure_validation(self) -> None:
        """Expect a validation's time from one case, so that a budget can keep it free."""
        self._tick()
        begin = time.monotonic()
        self._predict(self.val_cases[0])
        self.progress.validation_s = (time.monotonic() - begin) * len(self.val_cases) / self.world
        self._tick()

    # -- state
    def _identity(self) -> str:
        return digest([self.plan.model_dump(mode="json"), [c.name for c in self.train_cases], self.inputs])

    def _save_checkpoint(self) -> None:
        if self.rank != 0:
            return
        self.before_write()
        self._tick()
        state = {
            "identity": self._identity(),
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": dict(vars(self.progress)),
            "micro_batch": self.micro_batch,
        }
        write_atomic(self.paths.checkpoint, lambda file: torch.save(state, file))

    def _resume(self) -> None:
        """Go on from the checkpoint, if there is one and it is of this plan."""
        if not self.paths.checkpoint.exists():
            self._start_metrics([])
            return
        state = torch.load(self.paths.checkpoint, map_location=self.device, weights_only=True)
        if state["identity"] != self._identity():
            log.info("%s: the plan or the cases changed; training anew", self.paths.root.name)
            self._start_metrics([])
            return
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        self.micro_batch = state["micro_batch"]
        lines = []
        if self.paths.metrics.exists():
            for text in self.paths.metrics.read_text().splitlines()[: self.progress.epoch]:
                lines.append(json.loads(text))
        self._start_metrics(lines)
        log.info("%s: going on after epoch %d, step %d", self.paths.root.name, self.progress.epoch, self.progress.step)

    def _start_metrics(self, lines: list[dict[str, Any]]) -> None:
        self.curve = lines
        if self.rank == 0:
            write_text(self.paths.metrics, "".join(json.dumps(line) + "\n" for line in lines))

    def _catch_signals(self) -> dict[int, Any]:
        """SIGTERM and Ctrl-C end the job after the step at hand, with everything saved."""

        def handle(number: int, frame: FrameType | None) -> None:
            self._stop = signal.Signals(number).name

        try:
            return {n: signal.signal(n, handle) for n in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not the main thread: signals are somebody else's
            return {}


def unannotated_classes(cases: Sequence[CachedCase], label_map: LabelMap) -> np.ndarray:
    """Which classes each case was not annotated for, (cases, K) bool.

    A class that no case is annotated for counts as annotated and absent everywhere: it could else take any share of
    the background's probability.
    """
    found = np.array([[c.annotated is not None and n not in c.annotated for n in label_map.names] for c in cases])
    found[:, found.all(axis=0)] = False
    return found


def save_weights(network: nn.Module, paths: JobDir) -> None:
    """Write a bare state dict, as a MONAI bundle wants it."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    write_atomic(paths.model, lambda file: torch.save(weights, file))
