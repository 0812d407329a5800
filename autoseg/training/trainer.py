"""The one trainer: every network, one process or several, resumed exactly where it was.

What a step does is a function of the plan and the step's number alone (see patches.py), so a checkpoint needs no
random states: model, average, optimizer, scaler and counters are the whole state of a job.

Read `run` first: steps, ends of epochs with their validations, checkpoints. The parts: batches.py cuts what a step
learns from, step.py is the step, validation.py scores, checkpoint.py saves, schedule.py says how far the job is.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn

from autoseg.config.units import format_duration
from autoseg.errors import ResourceError, WorkspaceError
from autoseg.hardware.cores import ThreadsBesideOthers
from autoseg.hardware.device import to_device
from autoseg.networks import divisor
from autoseg.networks.sizing import shorter_roi
from autoseg.plan import Plan
from autoseg.terminal import Progress as Bar
from autoseg.tracking.follow import Follower
from autoseg.training.cache import CachedCase
from autoseg.training.checkpoint import CHECKPOINT_S, Checkpointer, write_tensors
from autoseg.training.errors import Diverged, Interrupted
from autoseg.training.processes import Processes
from autoseg.training.progress import Curve, Progress, TrainResult
from autoseg.training.schedule import Schedule, ema_decay, learning_rate, loaded_share
from autoseg.training.signals import StopSignals
from autoseg.training.step import TrainingStep, lacks_memory
from autoseg.training.task import SEGMENTATION, Task
from autoseg.workspace.files import digest
from autoseg.workspace.jobs import JobDir

log = logging.getLogger(__name__)

MEASURED_STEP = 3
"""Step after which a budgeted job measures what validation and final scores take: the first steps allocate."""
LOOKING_SHARE = 0.05
"""Share of a job's budget after which that is measured at the latest, however busy the machine may be. A choice."""
LOSS_CHECK_STEPS = 20
"""On a GPU the loss is looked at this often only: each look waits for all that was queued."""
DIVERGED_SHARE, DIVERGED_STEPS = 0.25, 100
"""A score that shows nothing after this share of the schedule is divergence. Source: Auto3DSeg's rule, which ends the
whole run; schedules of fewer steps are too short to tell."""


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
        task: Task = SEGMENTATION,
        scoring: Callable[[int], float] | None = None,
        started: float | None = None,
        inputs: str = "",
        start: Callable[[nn.Module], Collection[str]] = lambda network: (),
        before_write: Callable[[], None] = lambda: None,
        after_epoch: Callable[[Progress, float], None] = lambda progress, score: None,
        follower: Follower | None = None,
    ) -> None:
        """Set up a job.

        Args:
            train_cases, val_cases: preprocessed; the fold's.
            task: what the network is trained for.
            paths: where checkpoints, weights and metrics go.
            scoring: gives the final score of a validation case by its index and returns the seconds that took; called
                once, so that a budget keeps the time for all of them free. None: nothing follows training.
            started: `time.monotonic()` when the job began, so that preprocessing counts towards a budget.
            inputs: digest of the files the cases come from; a checkpoint made from others is not gone on with.
            start: puts the weights to start from into the fresh network, which has random ones, and names those that
                all come from elsewhere and are to learn by `loaded_rate`.
            before_write: called before any file is written; raises where this process may not any more.
            after_epoch: called after each epoch with the validation's score, NaN where none was due; may raise
                `Pruned`.
            follower: told of each epoch by the first process.
        """
        self.plan, self.paths, self.device, self.task, self.scoring = plan, paths, device, task, scoring
        self.name = paths.root.name
        self.before_write, self.after_epoch = before_write, after_epoch
        self.clock = started if started is not None else time.monotonic()
        self.processes = Processes.joined(device)
        # Without a budget the same steps are to give the same weights, however busy the machine is.
        by_time = plan.budget_s is not None and device.type == "cpu" and not self.processes.are_several
        self.threads = ThreadsBesideOthers(fixed=not by_time)
        self.schedule = Schedule(num_steps=plan.num_epochs * plan.num_steps_per_epoch, budget_s=plan.budget_s)
        self.progress = Progress()
        is_written = self.processes.is_first
        self.curve = Curve(paths.metrics, task.epoch_line, is_written=is_written, follower=follower)
        identity = digest([plan.identity(), [case.name for case in train_cases], inputs])
        self.checkpointer = Checkpointer(paths, identity, before_write)
        self.signals = StopSignals()
        self._stop = ""  # the signal that all processes stop for
        self._save_is_due = False  # by the first process' clock
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=device)  # since the loss was last looked at
        self._step_loss = torch.zeros_like(self._loss_sum)  # of the step at hand
        self.micro_batch = self._samples_a_process()
        first = self.processes.rank * self.micro_batch
        self.batches = task.batches(plan, train_cases, device, range(first, first + self.micro_batch))
        self.step, self.average = self._build_networks(start)
        self.validator = task.validator(
            plan, val_cases, self.average, self.progress, self.processes, plan.roi_size, self.name
        )

    def _samples_a_process(self) -> int:
        world, batch = self.processes.world, self.plan.batch_size
        if batch % world:
            raise WorkspaceError(
                f"{self.paths.plan.name}: batch_size {batch} cannot be shared by {world} processes. "
                f"Set a multiple of {world}."
            )
        return batch // world

    def _build_networks(self, start: Callable[[nn.Module], Collection[str]]) -> tuple[TrainingStep, nn.Module]:
        """The step with the network that is trained, and the moving average of its weights, which is what is kept."""
        plan, device, several = self.plan, self.device, self.processes.are_several
        torch.manual_seed(plan.seed)
        network = self.task.network(plan)
        loaded = start(network)
        average = copy.deepcopy(network).eval().requires_grad_(False)
        layout = plan.channels_last
        average = to_device(average, device, plan.precision, trained=False, channels_last=layout)
        if several and device.type == "cuda":  # where batches are normalised, by all processes' patches together
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        network = to_device(network, device, plan.precision, trained=True, channels_last=layout)
        self.processes.share(network)
        return TrainingStep(plan, network, device, loss=self.task.loss(plan, device), loaded=loaded), average

    # -- the loop
    def run(self) -> TrainResult:
        """Train to the end of the schedule.

        Raises:
            Diverged: The loss became NaN or infinite, or nothing was learned.
            Interrupted: A signal came; the state is saved.
        """
        p, steps_per_epoch = self.progress, self.plan.num_steps_per_epoch
        self.resume()
        self._tick()
        if p.step == 0:
            p.begun_s = p.elapsed_s
        bar = Bar(self.name, 1.0, unit="", shown=self.processes.is_first)
        try:
            with self.signals:
                share = self._share()
                while not p.ended:
                    if share < 1.0 and p.epoch_steps < steps_per_epoch:
                        self.train_step(share)
                        share = self._share()
                    bar.to(share, f"step {p.step}")
                    # Saving and validating take time, too, so that it may be over with no step done since.
                    finished = share >= 1.0
                    epoch_ends = finished or p.epoch_steps >= steps_per_epoch
                    epoch_s = p.epoch_s  # the end of the epoch clears it
                    if epoch_ends:
                        if self.validator.is_due(share) and self.validator.expected_s() > CHECKPOINT_S:
                            self.save()  # so that a signal need not wait for the end of the validation
                        self._end_epoch(finished=finished)
                    due = self._save_is_due
                    if due or (epoch_ends and self._saving_is_cheap(epoch_s)):
                        self.save()
                    if epoch_ends or due:  # a condition that all processes agree on, since all of them ask
                        share = self._share()
                    if self._stop:
                        self.save()
                        raise Interrupted(self._stop)
                self.save()
        finally:
            bar.close()
            self.batches.close()
        return TrainResult(
            best_score=p.best_score,
            best_epoch=p.best_epoch,
            epochs=p.epoch,
            steps=p.step,
            seconds=p.elapsed_s,
            curve=self.curve.lines,
        )

    def _share(self) -> float:
        """How far the job is, 0..1; and whether to stop or to save: one process' clock and signals decide for all."""
        p = self.progress
        share = self.schedule.progress(p.step, p.elapsed_s, self.validator.reserve_s(), p.begun_s)
        stop, due = bool(self.signals.received), self.checkpointer.is_due()
        share, stops, saves = self.processes.from_first(share, float(stop), float(due))
        self._save_is_due = bool(saves)
        self._stop = (self.signals.received or "SIGTERM") if stops else ""
        return share

    def _tick(self) -> float:
        """Count the time since the last call; its seconds."""
        now = time.monotonic()
        spent, self.clock = now - self.clock, now
        self.progress.elapsed_s += spent
        return spent

    # -- a step
    def train_step(self, share: float | None = None) -> None:
        """Do one step.

        Args:
            share: of the schedule that is done; None: as it is.

        Raises:
            ResourceError: Memory suffices for no smaller step.
        """
        p, plan = self.progress, self.plan
        share = self._share() if share is None else share
        # Where one process lacks memory all of them take less, so that none waits for another's gradients.
        while self.processes.any(lacks_memory(self._gradients)):
            self._shrink()
        self.processes.average_gradients(self.step.network)
        self._loss_sum += self._step_loss
        rate = learning_rate(plan.learning_rate, share, plan.warmup_fraction, plan.schedule)
        frozen_fraction = plan.frozen_fraction if self.step.has_new else 0.0
        self.step.update(rate, loaded_share(share, plan.loaded_rate, frozen_fraction))
        self._average_weights()
        p.step += 1
        p.epoch_steps += 1
        if self.device.type == "cpu" or p.step % LOSS_CHECK_STEPS == 0:
            self._check_loss()
        self.threads.adjust()
        p.epoch_s += self._tick()
        if self._is_to_be_measured():
            self._tick()
            self.validator.measure(self.schedule, self.scoring)
            self._tick()

    def _is_to_be_measured(self) -> bool:
        """Whether it is time to find out what validation and final scores take, on the threads that they will have."""
        budget_s, p = self.plan.budget_s, self.progress
        if budget_s is None or p.voxel_s or p.step < MEASURED_STEP:
            return False
        return self.threads.have_looked or p.elapsed_s - p.begun_s > LOOKING_SHARE * budget_s

    def _gradients(self) -> None:
        """Gradients of the mean loss over this process' samples of the step at hand."""
        p, processes = self.progress, self.processes
        samples = self.batches.samples(p.step)
        # For networks with dropout: of the step alone, too.
        torch.manual_seed(self.plan.seed * 1_000_003 + p.step * processes.world + processes.rank)
        self._step_loss = self.step.gradients(samples, self.micro_batch)

    def _shrink(self) -> None:
        """Meet a lack of memory: fewer patches at a time, then smaller patches.

        Raises:
            ResourceError: Nothing is left to make smaller.
        """
        roi, least, num = shorter_roi(self.roi, divisor(self.plan)), self.task.least_patches, self._samples_a_process()
        fewer = range(min(math.ceil(self.micro_batch / 2), self.micro_batch - 1), least - 1, -1)
        smaller = next((n for n in fewer if num % n == 0 or num % n >= least), None)  # nor too few in the last part
        if smaller is None and roi is None:
            raise ResourceError(
                f"{self.name}: out of memory with {self.micro_batch} patches of "
                f"{'x'.join(map(str, self.roi))} a process. Set a smaller batch_size or roi_size."
            )
        if smaller is not None:
            self.micro_batch = smaller
            log.warning("%s: out of memory: going on with %d patches at a time", self.name, self.micro_batch)
        elif roi is not None:
            self.roi = roi
            log.warning("%s: out of memory: going on with patches of %s", self.name, "x".join(map(str, roi)))
        self.step.forget_gradients()

    @property
    def roi(self) -> tuple[int, int, int]:
        """The patch in voxels: the plan's, or a smaller one that memory suffices for."""
        return self.batches.roi

    @roi.setter
    def roi(self, roi: tuple[int, int, int]) -> None:
        self.batches.roi = self.validator.roi = roi

    def _check_loss(self) -> None:
        """Add up the losses since the last look.

        Raises:
            Diverged: One of them was no number; all processes agree.
        """
        total = float(self.processes.add_up(self._loss_sum)) / self.processes.world
        self._loss_sum.zero_()
        self.progress.epoch_loss += total
        if not math.isfinite(total):
            raise Diverged(
                f"{self.name}: the loss became {total} in epoch {self.progress.epoch + 1}. {self._lower_rate()}"
            )

    def _lower_rate(self) -> str:
        return f"Lower learning_rate ({self.plan.learning_rate:g}) in {self.paths.plan.name} and train again."

    @torch.no_grad()
    def _average_weights(self) -> None:
        decay = ema_decay(self.plan.ema_decay, self.progress.step)
        network = self.step.network
        torch._foreach_lerp_(list(self.average.parameters()), list(network.parameters()), 1 - decay)
        for mean, now in zip(self.average.buffers(), network.buffers(), strict=True):
            mean.copy_(now)

    # -- the end of an epoch
    def _end_epoch(self, *, finished: bool) -> None:
        """Validate where that is due, keep the best weights, write a line.

        Args:
            finished: the schedule is through. Where the last epoch had ended before it was, no step has been done since
                and there is no new epoch, only what ends the training.
        """
        p = self.progress
        self._check_loss()
        is_new = p.epoch_steps > 0
        share = self._share()
        due = self.validator.is_due(share)
        p.epoch += is_new
        p.validations = max(p.validations, self.validator.marks_passed(share))
        score = self.validator.validate(self._break_off) if due else math.nan
        self.before_write()
        p.ended = finished
        if not math.isnan(score):
            self._keep_best(score, share)
        if finished and p.best_score == -math.inf:  # no time for a validation: the end of the schedule is kept
            self._keep_weights()
        self._tick()
        if not is_new:
            if not math.isnan(score):
                self.curve.change_last(self.validator.line(score, p.best_score))
            return
        self._write_line(score)
        p.epoch_loss, p.epoch_steps, p.epoch_s = 0.0, 0, 0.0
        self.after_epoch(p, score)

    def _break_off(self) -> None:
        """End a validation when a signal has come and the checkpoint holds all that was trained."""
        saved = self.checkpointer.saved_step == self.progress.step
        if self.signals.received and saved and not self.processes.are_several:
            raise Interrupted(self.signals.received)

    def _keep_best(self, score: float, share: float) -> None:
        """Keep the weights where they are the best so far.

        Raises:
            Diverged: Nothing was learned by now.
        """
        p = self.progress
        tells = share >= DIVERGED_SHARE and p.step >= DIVERGED_STEPS
        if tells and (words := self.validator.shows_nothing(score)):
            raise Diverged(
                f"{self.name}: {words} after {share:.0%} of the schedule: nothing was learned. {self._lower_rate()}"
            )
        p.last_score, p.validated_step = score, p.step
        near_best = p.ended and self.validator.looks_at_part() and score > p.best_score - self.validator.tells_apart
        if score > p.best_score or near_best:
            p.best_score = score
            self._keep_weights()

    def _keep_weights(self) -> None:
        self.progress.best_epoch = self.progress.epoch
        if self.processes.is_first:
            write_tensors(self.paths.model, self.task.weights(self.average))

    def _write_line(self, score: float) -> None:
        """Add the epoch to the curve and to the log."""
        p, plan = self.progress, self.plan
        share = self._share()
        left_s = p.elapsed_s * (1 - share) / max(share, 1e-6)
        if plan.budget_s is not None:
            left_s = min(left_s, max(0.0, plan.budget_s - p.elapsed_s))
        rate = self.step.optimizer.param_groups[-1]["lr"]  # that of new weights, where loaded ones have their own
        line = {
            "epoch": p.epoch,
            "num_epochs": plan.num_epochs,
            "step": p.step,
            "train_loss": round(p.epoch_loss / max(1, p.epoch_steps), 6),
            **self.validator.line(score, p.best_score),
            "lr": float(f"{rate:.6g}"),
            "progress": round(share, 4),
            "seconds": round(p.elapsed_s, 2),
            "samples_per_s": round(p.epoch_steps * plan.batch_size / max(p.epoch_s, 1e-6), 2),
            "time_left_s": round(left_s, 1),
        }
        self.curve.add(line)
        if self.processes.is_first:
            scored = "" if math.isnan(score) else f"  {self.validator.words(score, p.best_score)}"
            of = f"/{plan.num_epochs}" if plan.budget_s is None else ""
            log.info(
                "%s  epoch %d%s  loss %.4f%s  lr %.2e  %.1f samples/s  %s left",
                self.name, p.epoch, of, line["train_loss"], scored, rate, line["samples_per_s"],
                format_duration(left_s),
            )  # fmt: skip

    # -- state
    def _saving_is_cheap(self, epoch_s: float) -> bool:
        """Whether a checkpoint costs little after so many seconds of work; the first process, which writes it, says."""
        return bool(self.processes.from_first(float(self.checkpointer.is_cheap_after(epoch_s)))[0])

    def save(self) -> None:
        """Write a checkpoint; all processes come here, and the first writes it."""
        self._check_loss()
        if not self.processes.is_first:
            return
        self._tick()
        self.checkpointer.write(self._state, self.progress.step)

    def _state(self) -> dict[str, Any]:
        return {
            "network": self.step.network.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.step.optimizer.state_dict(),
            "scaler": self.step.scaler.state_dict(),
            "progress": dict(vars(self.progress)),
            "micro_batch": self.micro_batch,
            "roi": list(self.roi),
        }

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one and it is of this plan and these cases."""
        state, p = self.checkpointer.read(), self.progress
        if state is None:
            self.curve.start()
            return
        self.step.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.step.optimizer.load_state_dict(state["optimizer"])
        self.step.scaler.load_state_dict(state["scaler"])
        p.take(state["progress"])
        self.micro_batch = state["micro_batch"]
        x, y, z = state["roi"]
        self.roi = x, y, z
        self.curve.go_on_after(p.epoch)
        log.info("%s: going on after epoch %d, step %d", self.name, p.epoch, p.step)
