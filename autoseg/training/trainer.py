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
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from autoseg.config.units import format_duration
from autoseg.errors import ResourceError, WorkspaceError
from autoseg.evaluation.metrics import dice_of_targets
from autoseg.hardware.device import autocast, resolve_precision, to_device
from autoseg.inference.windows import ProbRows, WindowModel, predict_targets
from autoseg.networks import build_network, divisor, heads
from autoseg.networks.sizing import shorter_roi
from autoseg.plan import Plan
from autoseg.terminal import Progress as Bar
from autoseg.training.augment import augment_samples
from autoseg.training.cache import CachedCase
from autoseg.training.checkpoint import save_weights
from autoseg.training.errors import Diverged, Interrupted
from autoseg.training.losses import supervised_loss
from autoseg.training.patches import cut_batch, make_sampler
from autoseg.training.progress import Progress, TrainResult
from autoseg.training.schedule import Schedule, ema_decay, learning_rate, validation_plan
from autoseg.training.step import is_out_of_memory, make_optimizer
from autoseg.training.validation import COMPARISON, MEASURED_STEP, NEW_STEPS, SCORED_SHARE, TWICE_SHARE
from autoseg.workspace.files import digest, write_atomic, write_text
from autoseg.workspace.jobs import JobDir

log = logging.getLogger(__name__)


Batch = tuple[torch.Tensor, torch.Tensor, list[np.random.Generator], list[int]]
"""Images (B, C, X, Y, Z), targets, the samples' random states, their cases."""

CHECKPOINT_S = 60.0
"""Seconds between checkpoints, more where writing one takes over 2 % of that; every 5 minutes at the latest."""

LOSS_CHECK_STEPS = 20
"""On a GPU the loss is looked at this often only: each look waits for all that was queued."""

DIVERGED_DICE, DIVERGED_SHARE, DIVERGED_STEPS = 0.01, 0.25, 100
"""A Dice below the first after this share of the schedule is divergence. Source: Auto3DSeg's rule, which ends the whole
run; schedules of fewer steps are too short to tell."""

TELLS_APART = 0.01
"""Difference in Dice on a part of the cases below which the end of the schedule is trusted over an earlier epoch. A
choice."""


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
        scoring: Callable[[int], float] | None = None,
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
            scoring: gives the final score of a validation case by its index and returns the seconds that took; called
                once, so that a budget keeps the time for all of them free. None: nothing follows training.
            started: `time.monotonic()` when the job began, so that preprocessing counts towards a budget.
            inputs: digest of the files the cases come from; a checkpoint made from others is not gone on with.
            first_weights: a state dict to start from; None: random weights.
            before_write: called before any file is written; raises where this process may not any more.
            after_epoch: called after each epoch with the validation's Dice, NaN where none was due; may raise `Pruned`.
        """
        self.before_write, self.after_epoch = before_write, after_epoch
        self.plan, self.train_cases, self.val_cases, self.paths = plan, train_cases, val_cases, paths
        self.device, self.scoring, self.inputs = device, scoring, inputs
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
        self.roi = plan.roi_size
        self.schedule = Schedule(num_steps=plan.num_epochs * plan.num_steps_per_epoch, budget_s=plan.budget_s)
        self.progress = Progress()
        self._saved_step = -1  # of the checkpoint
        self.curve: list[dict[str, Any]] = []
        self.clock = started if started is not None else time.monotonic()
        self._stop = ""  # the signal that came
        self._agreed = ""  # the signal that all processes stop for
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=device)  # since the loss was last looked at
        # Beside a GPU the next batch is cut while this one computes; on a CPU that would steal from the network.
        self._cutter = ThreadPoolExecutor(1, "autoseg-cut") if device.type == "cuda" else None
        self._next: tuple[int, Future[Any]] | None = None

        self.sampler = make_sampler(train_cases, plan)
        self.class_weights = torch.tensor(plan.each_class("class_weights"), device=device)

        torch.manual_seed(plan.seed)
        network = build_network(plan)
        if first_weights is not None:
            network.load_state_dict(torch.load(first_weights, map_location="cpu", weights_only=True))
        average = copy.deepcopy(network).eval().requires_grad_(False)
        self.average = to_device(average, device, plan.precision, trained=False)
        if self.world > 1 and device.type == "cuda":  # where batches are normalised, by all processes' patches together
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        self.network = network = to_device(network, device, plan.precision, trained=True)
        self.optimizer = make_optimizer(network, plan)
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
        self._tick()
        if self.progress.step == 0:
            self.progress.begun_s = self.progress.elapsed_s
        saved, save_s = time.monotonic(), 0.0

        def save() -> None:
            nonlocal saved, save_s
            begin = time.monotonic()
            self._save_checkpoint()
            saved, save_s = time.monotonic(), time.monotonic() - begin

        previous = self._catch_signals()
        bar = Bar(self.paths.root.name, 1.0, unit="", shown=self.rank == 0)
        try:
            share = self._share()
            while not self.progress.ended:
                p = self.progress
                if share < 1.0 and p.epoch_steps < self.plan.num_steps_per_epoch:
                    self._train_step(share)
                    share = self._share()
                bar.to(share, f", step {p.step}")
                # Saving and validating take time, too, so that it may be over with no step done since.
                finished = share >= 1.0
                epoch_ends = finished or p.epoch_steps >= self.plan.num_steps_per_epoch
                epoch_s = p.epoch_s  # the end of the epoch clears it
                if epoch_ends:
                    if self._validation_due(share) and self._validation_s() > CHECKPOINT_S:
                        save()  # so that a signal need not wait for the end of the validation
                    self._end_epoch(finished=finished)
                due = time.monotonic() - saved > min(300.0, max(CHECKPOINT_S, 50 * save_s))
                if due or (epoch_ends and save_s < 0.02 * epoch_s):
                    save()
                if epoch_ends or due:
                    share = self._share()
                if self._agreed:
                    save()
                    raise Interrupted(self._agreed)
            save()
        finally:
            bar.close()
            if self._cutter is not None:
                self._cutter.shutdown(cancel_futures=True)
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

    def _share(self) -> float:
        p = self.progress
        share = self.schedule.progress(p.step, p.elapsed_s, self._reserve_s(), p.begun_s)
        self._agreed = self._stop
        if self.world > 1:  # one process' clock and signals decide for all, so that none waits for another
            shared = torch.tensor([share, float(bool(self._stop))], device=self.device)
            dist.broadcast(shared, 0)
            share = float(shared[0])
            self._agreed = "SIGTERM" if shared[1] else ""
        return share

    def _reserve_s(self) -> float:
        """Seconds to keep for the last validation and the final scores, by what the last validation took."""
        p = self.progress
        if self.plan.budget_s is None or not p.voxel_s:
            return 0.0
        voxels = [self._voxels(case) for case in self.val_cases]
        slower = max(
            1.0, p.voxel_s / (p.first_voxel_s or p.voxel_s)
        )  # a machine that has become busy is slower at the end, too
        scored: float = sum(voxels)
        if self.plan.precision == "auto" and resolve_precision(self.device, "auto") != "fp32":
            scored += COMPARISON * voxels[0]
        return self._validation_s() + (p.scoring_voxel_s or p.voxel_s) * slower * scored

    def _tick(self) -> float:
        now = time.monotonic()
        spent, self.clock = now - self.clock, now
        self.progress.elapsed_s += spent
        return spent

    def _cut(self, step: int) -> Batch:
        plan = self.plan
        images, targets, rngs, chosen = cut_batch(
            self.sampler,
            seed=plan.seed,
            step=step,
            batch_size=plan.batch_size,
            indices=self.indices,
            roi=self.roi,
        )
        image, target = torch.from_numpy(images), torch.from_numpy(targets)
        if self._cutter:
            image, target = image.pin_memory(), target.pin_memory()
        return image, target, rngs, chosen

    def _batch(self, step: int) -> Batch:
        """The patches of a step: a function of the step alone, so one that was cut ahead is the same."""
        if self._cutter is None:
            return self._cut(step)
        ahead, self._next = self._next, None
        batch = ahead[1].result() if ahead is not None and ahead[0] == step else self._cut(step)
        self._next = step + 1, self._cutter.submit(self._cut, step + 1)
        return batch

    def _train_step(self, share: float | None = None) -> None:
        p, plan = self.progress, self.plan
        share = self._share() if share is None else share
        rate = learning_rate(plan.learning_rate, share, plan.warmup_fraction, plan.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        while True:
            try:
                self._gradients()
                break
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                self._shrink(error)
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.network.parameters(), plan.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._average_weights()
        p.step += 1
        p.epoch_steps += 1
        if self.device.type == "cpu" or self.world > 1 or p.step % LOSS_CHECK_STEPS == 0:
            self._check_loss()
        p.epoch_s += self._tick()
        if p.step == MEASURED_STEP and plan.budget_s is not None:
            self._measure_validation()

    def _gradients(self) -> None:
        """Gradients of the mean loss over this process' samples of the step at hand."""
        p, plan = self.progress, self.plan
        images, targets, rngs, chosen = self._batch(p.step)
        unannotated, filled = self.sampler.unannotated[chosen], self.sampler.filled[chosen]
        image = images.to(self.device, non_blocking=True)
        target = targets.to(self.device, non_blocking=True)
        hidden, guessed = (torch.from_numpy(found).to(self.device) for found in (unannotated, filled))
        image, target = augment_samples(plan, image, target, rngs, unannotated, filled)
        torch.manual_seed(plan.seed * 1_000_003 + p.step * self.world + self.rank)  # for networks with dropout
        image = image.to(memory_format=torch.channels_last_3d)
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for first in range(0, len(image), self.micro_batch):
            part = slice(first, first + self.micro_batch)
            piece, truth = image[part], target[part]
            with autocast(self.device, plan.precision):
                outputs = self.model(piece)
            loss = supervised_loss(
                outputs,
                truth,
                sigmoid=plan.sigmoid,
                loss=plan.loss,
                unannotated=hidden[part],
                filled=guessed[part],
                class_weights=self.class_weights,
            )
            loss = loss * (len(piece) / len(image))
            self.scaler.scale(loss).backward()
            total += loss.detach()
        self._loss_sum += total

    def _shrink(self, error: BaseException) -> None:
        """Meet a lack of memory: fewer patches at a time, then smaller patches.

        Raises:
            ResourceError: Nothing is left to make smaller, or other processes wait for this one's gradients.
        """
        roi = shorter_roi(self.roi, divisor(self.plan))
        if self.world > 1 or (self.micro_batch == 1 and roi is None):
            raise ResourceError(
                f"{self.paths.root.name}: out of memory with {self.micro_batch} patches of "
                f"{'x'.join(map(str, self.roi))} a process. Set a smaller batch_size or roi_size."
            ) from error
        if self.micro_batch > 1:
            self.micro_batch = math.ceil(self.micro_batch / 2)
            log.warning("%s: out of memory: going on with %d patches at a time", self.paths.root.name, self.micro_batch)
        elif roi is not None:
            self.roi = roi
            log.warning("%s: out of memory: going on with patches of %s", self.paths.root.name, "x".join(map(str, roi)))
        self._next = None
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _check_loss(self) -> None:
        """Add up the losses since the last look.

        Raises:
            Diverged: One of them was no number; all processes agree.
        """
        if self.world > 1:
            dist.all_reduce(self._loss_sum)
            self._loss_sum /= self.world
        total = float(self._loss_sum)
        self._loss_sum.zero_()
        self.progress.epoch_loss += total
        if not math.isfinite(total):
            raise Diverged(
                f"{self.paths.root.name}: the loss became {total} in epoch {self.progress.epoch + 1}. "
                f"Lower learning_rate ({self.plan.learning_rate:g}) in {self.paths.plan.name} and train again."
            )

    @torch.no_grad()
    def _average_weights(self) -> None:
        decay = ema_decay(self.plan.ema_decay, self.progress.step)
        torch._foreach_lerp_(list(self.average.parameters()), list(self.network.parameters()), 1 - decay)
        for mean, now in zip(self.average.buffers(), self.network.buffers(), strict=True):
            mean.copy_(now)

    # -- epochs and validation
    def _end_epoch(self, *, finished: bool) -> None:
        """Validate where that is due, keep the best weights, write a line.

        Args:
            finished: the schedule is through. Where the last epoch had ended before it was, no step has been done since
                and there is no new epoch, only what ends the training.
        """
        p, plan = self.progress, self.plan
        self._check_loss()
        is_new = p.epoch_steps > 0
        share = self._share()
        due = self._validation_due(share)
        p.epoch += is_new
        p.validations = max(p.validations, self._marks_passed(share))
        dice = self._validate() if due else math.nan
        self.before_write()
        p.ended = finished
        if not math.isnan(dice):
            tells = share >= DIVERGED_SHARE and p.step >= DIVERGED_STEPS and self._covers_classes()
            if dice < DIVERGED_DICE and tells:
                raise Diverged(
                    f"{self.paths.root.name}: Dice {dice:.4f} after {share:.0%} of the schedule: nothing was learned. "
                    f"Lower learning_rate ({plan.learning_rate:g}) in {self.paths.plan.name} and train again."
                )
            p.last_dice, p.validated_step = dice, p.step
            in_part = len(self._validated()) < len(self.val_cases)
            if dice > p.best_dice or (finished and in_part and dice > p.best_dice - TELLS_APART):
                p.best_dice, p.best_epoch = dice, p.epoch
                if self.rank == 0:
                    save_weights(self.average, self.paths)
        if finished and p.best_dice < 0:  # no time for a validation: the end of the schedule is kept
            p.best_epoch = p.epoch
            if self.rank == 0:
                save_weights(self.average, self.paths)
        self._tick()
        if not is_new:
            if self.curve and not math.isnan(dice):
                self._start_metrics([*self.curve[:-1], {**self.curve[-1], **self._scores(dice)}])
            return
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
            **self._scores(dice),
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

    def _scores(self, dice: float) -> dict[str, float | None]:
        best = self.progress.best_dice
        return {
            "val_dice": None if math.isnan(dice) else round(dice, 6),
            "best_dice": None if best < 0 else round(best, 6),
        }

    def _validation_due(self, share: float) -> bool:
        """Whether the epoch that ends now is to be validated."""
        if share >= 1.0 and (self.plan.budget_s is None or self.progress.num_validated or not self.progress.voxel_s):
            # A few steps at a learning rate near zero change nothing that is worth another validation.
            return self.progress.step - self.progress.validated_step > NEW_STEPS * self.progress.step
        if self.plan.budget_s is None:
            return (self.progress.epoch + 1) % self.plan.num_epochs_per_validation == 0
        return self._marks_passed(share) > self.progress.validations

    def _marks_passed(self, share: float) -> int:
        return sum(share >= mark for mark in self._marks())

    def _validation_s(self) -> float:
        """Expected seconds of a validation; endless before the first."""
        if not self.progress.voxel_s:
            return math.inf
        return self._seconds_of(self.val_cases[i] for i in self._validated())

    def _marks(self) -> tuple[float, ...]:
        budget_s, p = self.plan.budget_s, self.progress
        if budget_s is None or not p.voxel_s or not p.num_validated:
            return ()
        return validation_plan(budget_s, self._seconds_of(self.val_cases), len(self.val_cases))[0]

    def _seconds_of(self, cases: Iterable[CachedCase]) -> float:
        """Seconds of a validation of some cases."""
        return self.progress.voxel_s * sum(map(self._voxels, cases)) / self.world

    def _voxels(self, case: CachedCase) -> int:
        """Voxels that are predicted for a case: those of a window at least."""
        return max(math.prod(case.image.shape[1:]), math.prod(self.roi))

    def _validated(self) -> list[int]:
        """Indices of the cases that a validation looks at, spread over the fold."""
        num = len(self.val_cases)
        if self.plan.budget_s is None:
            return list(range(num))
        chosen = self.progress.num_validated
        return sorted({round(i * (num - 1) / max(1, chosen - 1)) for i in range(chosen)})

    def _covers_classes(self) -> bool:
        """Whether a validation looks at all classes that the fold is annotated for: one hard class tells little."""

        def known(cases: Iterable[CachedCase]) -> set[str]:
            names = self.plan.label_map.names
            return {n for case in cases for n in (names if case.annotated is None else case.annotated)}

        return known(self.val_cases[i] for i in self._validated()) == known(self.val_cases)

    def _predict(self, case: CachedCase) -> np.ndarray:
        """A case's prediction at the network's spacing, as an encoded target."""
        image = torch.from_numpy(np.asarray(case.image, np.float32))
        model = WindowModel(
            [self.average],
            [heads(self.plan.algo, self.average)],
            num_outputs=self.plan.num_outputs,
            sigmoid=self.plan.sigmoid,
            device=self.device,
            precision=self.plan.precision,
        )
        rows = ProbRows(
            model,
            lambda start, stop: image[:, start:stop],
            (image.shape[1], image.shape[2], image.shape[3]),
            0,
            roi_size=self.roi,
            overlap=self.plan.overlap,
            divisor=divisor(self.plan),
        )
        return predict_targets(rows).numpy()

    def _validate(self) -> float:
        """Mean Dice over classes of the mean over the fold's cases, at the network's spacing; NaN: none has one."""
        begin = time.monotonic()
        label_map = self.plan.label_map
        chosen = self._validated() or list(range(len(self.val_cases)))
        scores = torch.full((len(self.val_cases), len(label_map.names)), math.nan, dtype=torch.float64)
        for i in chosen[self.rank :: self.world]:
            if self._stop and self.world == 1 and self._saved_step == self.progress.step:
                raise Interrupted(self._stop)
            scores[i] = self._score(self.val_cases[i])
        if self.world > 1:
            seen = ~scores.isnan()
            both = torch.stack([scores.nan_to_num(0.0), seen.double()]).to(self.device)
            dist.all_reduce(both)
            scores = torch.where(both[1] > 0, both[0], math.nan).cpu()
        voxels = sum(self._voxels(self.val_cases[i]) for i in chosen) / self.world
        self.progress.voxel_s = (time.monotonic() - begin) / voxels
        if self.world > 1:  # one process' clock decides for all what comes next
            shared = torch.tensor([self.progress.voxel_s], dtype=torch.float64, device=self.device)
            dist.broadcast(shared, 0)
            self.progress.voxel_s = float(shared)
        # Not measured yet where the job was begun without a budget.
        self.progress.first_voxel_s = self.progress.first_voxel_s or self.progress.voxel_s
        return float(scores.nanmean(0).nanmean())

    def _score(self, case: CachedCase) -> torch.Tensor:
        """Dice of each class at the network's spacing."""
        dice = dice_of_targets(
            self._predict(case), np.asarray(case.target), self.plan.label_map, annotated=case.annotated
        )
        return torch.tensor(dice, dtype=torch.float64)

    def _measure_validation(self) -> None:
        """Measure validation and final score of a case of middle size, so that a budget can keep their time free."""
        assert self.plan.budget_s is not None
        self._tick()
        p = self.progress
        order = sorted(range(len(self.val_cases)), key=lambda i: self._voxels(self.val_cases[i]))
        index = order[len(order) // 2]
        case = self.val_cases[index]
        budget_s = self.plan.budget_s

        def timed() -> float:
            begin = time.monotonic()
            self._score(case)
            return time.monotonic() - begin

        case_s = timed()
        if case_s <= TWICE_SHARE * budget_s:
            case_s = timed()  # the first allocates and chooses kernels
        p.voxel_s = p.first_voxel_s = case_s / self._voxels(case)
        if self.scoring is not None and self.rank == 0 and case_s <= SCORED_SHARE * budget_s:
            p.scoring_voxel_s = self.scoring(index) / self._voxels(case)
        p.num_validated = validation_plan(self.plan.budget_s, self._seconds_of(self.val_cases), len(self.val_cases))[1]
        if self.world > 1:  # all look at the same cases
            shared = torch.tensor([p.voxel_s, p.num_validated], dtype=torch.float64, device=self.device)
            dist.broadcast(shared, 0)
            p.voxel_s = p.first_voxel_s = float(shared[0])
            p.num_validated = int(shared[1])
        final_s = (p.scoring_voxel_s or p.voxel_s) * sum(map(self._voxels, self.val_cases))
        if self.rank == 0:
            log.info(
                "%s: validation on %d of %d cases, final scores in about %s",
                self.paths.root.name, p.num_validated, len(self.val_cases), format_duration(final_s),
            )  # fmt: skip
        if not self.schedule.is_kept(self._reserve_s()):
            log.warning(
                "%s: scoring %d cases takes about %s of a budget of %s, which will not be kept. Give more time.",
                self.paths.root.name, len(self.val_cases), format_duration(final_s),
                format_duration(self.plan.budget_s),
            )  # fmt: skip
        self._tick()

    # -- state
    def _identity(self) -> str:
        return digest([self.plan.identity(), [c.name for c in self.train_cases], self.inputs])

    def _save_checkpoint(self) -> None:
        if self.rank != 0:
            return
        if self.world == 1:
            self._check_loss()  # with several processes every step did
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
            "roi": list(self.roi),
        }
        write_atomic(self.paths.checkpoint, lambda file: torch.save(state, file))
        self._saved_step = self.progress.step

    def _resume(self) -> None:
        """Go on from the checkpoint, if there is one and it is of this plan."""
        if not self.paths.checkpoint.exists():
            self._start_metrics([])
            return
        # On the CPU, where the optimizer's counts are to stay; what is loaded goes to its parameter's device.
        state = torch.load(self.paths.checkpoint, map_location="cpu", weights_only=True)
        if state["identity"] != self._identity():
            log.info("%s: the plan or the cases changed; training anew", self.paths.root.name)
            self._start_metrics([])
            return
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        self.micro_batch, self.roi = state["micro_batch"], tuple(state["roi"])
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
