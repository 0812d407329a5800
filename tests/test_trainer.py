"""The trainer: same seed, same weights; killed at any moment, it ends as if it had not been."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plans import tiny_plan

from autoseg.data.labels import UNSURE
from autoseg.data.phantoms import ellipsoid
from autoseg.errors import ResourceError, WorkspaceError
from autoseg.evaluation.metrics import dice_of_targets
from autoseg.plan import ClassPlan
from autoseg.training.augment import augment_batch, draw_sample
from autoseg.training.cache import CachedCase
from autoseg.training.errors import Diverged, Interrupted
from autoseg.training.losses import supervised_loss
from autoseg.training.patches import unannotated_classes
from autoseg.training.trainer import Trainer
from autoseg.workspace.jobs import JobDir

CPU = torch.device("cpu")


def make_case(seed: int, shape: tuple[int, int, int] = (20, 18, 16)) -> CachedCase:
    """A noisy ball of class 1 with a core of class 2."""
    rng = np.random.default_rng(seed)
    centre = [s / 2 + rng.uniform(-2, 2) for s in shape]
    ball, core = ellipsoid(shape, centre, [6, 6, 5]), ellipsoid(shape, centre, [3, 3, 3])
    image = (rng.normal(size=shape) * 0.3 + ball + core)[None].astype(np.float16)
    target = (ball.astype(np.uint8) + core)[None]
    points = np.concatenate(
        [np.hstack([np.full((m.sum(), 1), c), np.argwhere(m)]) for c, m in enumerate((target[0] == 1, core))]
    )
    return CachedCase(name=f"case_{seed}", image=image, target=target, points=points.astype(np.int32))


CASES = [make_case(i) for i in range(5)]


def make_trainer(folder: Path, **settings):  # type: ignore[no-untyped-def]
    return Trainer(tiny_plan(**settings), CASES[:4], CASES[4:], JobDir(folder / "segresnet_0"), device=CPU)


def curve(folder: Path) -> list[dict[str, float]]:
    """The metrics without what depends on the clock."""
    clock = ("seconds", "samples_per_s", "time_left_s")
    lines = (folder / "segresnet_0" / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = torch.load(folder / "segresnet_0" / "models" / "model.pt", weights_only=True)
    return loaded


def test_same_seed_same_weights_and_metrics(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_trainer(tmp_path / name).run()
    first, second = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert curve(tmp_path / "a") == curve(tmp_path / "b")
    assert [line["epoch"] for line in curve(tmp_path / "a")] == [1, 2, 3]


def test_another_seed_other_weights(tmp_path: Path) -> None:
    make_trainer(tmp_path / "a").run()
    make_trainer(tmp_path / "b", seed=1).run()
    first, second = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert any(not torch.equal(first[k], second[k]) for k in first)


def test_it_learns_the_phantoms(tmp_path: Path) -> None:
    result = make_trainer(tmp_path, num_epochs=30, num_epochs_per_validation=10).run()
    assert result.best_score > 0.7
    assert result.steps == 60
    assert result.epochs == 30


def test_lines_of_progress_have_no_empty_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("autoseg.terminal.LOG_EVERY_S", -1.0)
    with caplog.at_level("INFO"):
        make_trainer(tmp_path, num_epochs=1).run()
    lines = [line for line in caplog.messages if " %" in line]
    assert lines
    assert all(re.fullmatch(r"segresnet_0: \d+ %, step \d+, .+", line) and ", ," not in line for line in lines)


def test_a_budget_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = run_on_a_clock(tmp_path, monkeypatch, 6.0, scoring_s=1.0)
    assert 4.9 < trainer.progress.elapsed_s < 5.1
    assert trainer.progress.best_score > 0
    assert trainer.curve.lines[-1]["lr"] < 0.1 * trainer.plan.learning_rate


def test_a_loss_that_is_no_number_is_divergence(tmp_path: Path) -> None:
    bad = CachedCase(
        name="bad",
        image=np.full((1, 16, 16, 16), np.nan, np.float16),
        target=CASES[0].target[:, :16, :16, :16],
        points=CASES[0].points[:0],
    )
    trainer = Trainer(tiny_plan(augment="none"), [bad], CASES[4:], JobDir(tmp_path / "segresnet_0"), device=CPU)
    with pytest.raises(Diverged) as error:
        trainer.run()
    assert str(error.value) == (
        "segresnet_0: the loss became nan in epoch 1. "
        "Lower learning_rate (0.01) in hyper_parameters.yaml and train again."
    )


def test_a_changed_plan_starts_anew(tmp_path: Path) -> None:
    make_trainer(tmp_path).run()
    trainer = make_trainer(tmp_path, num_epochs=4)
    assert trainer.run().steps == 8
    assert len(curve(tmp_path)) == 4


class Clock:
    """A clock that training and scoring move on, in place of the time module."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def replace_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in ("trainer", "validation", "checkpoint"):
            monkeypatch.setattr(f"autoseg.training.{module}.time", self)


def checkpoint_after(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    for module in ("trainer", "checkpoint"):
        monkeypatch.setattr(f"autoseg.training.{module}.CHECKPOINT_S", seconds)


def on_a_clock(monkeypatch: pytest.MonkeyPatch, trainer: Trainer, clock: Clock, step_s: float, score_s: float) -> None:
    """Let each step and each validated case take a fixed time."""
    gradients, score = trainer._gradients, trainer.validator.score

    def timed(work, seconds):  # type: ignore[no-untyped-def]
        def do(*words):  # type: ignore[no-untyped-def]
            clock.now += seconds
            return work(*words)

        return do

    monkeypatch.setattr(trainer, "_gradients", timed(gradients, step_s))
    monkeypatch.setattr(trainer.validator, "score", timed(score, score_s))


def run_on_a_clock(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    budget_s: float,
    scoring_s: float,
    val_cases: Sequence[CachedCase] = (),
) -> Trainer:
    clock = Clock()
    clock.replace_time(monkeypatch)
    plan = tiny_plan().model_copy(update={"budget_s": budget_s, "num_epochs": 10_000})
    held_out = val_cases or CASES[4:]
    trainer = Trainer(plan, CASES[:4], held_out, JobDir(folder), device=CPU, scoring=lambda index: scoring_s)
    on_a_clock(monkeypatch, trainer, clock, 0.1, 0.05)
    trainer.run()
    return trainer


def test_a_budget_too_short_for_the_scores_is_told_and_still_trains(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = run_on_a_clock(tmp_path, monkeypatch, 3.0, scoring_s=10.0)
    assert "will not be kept" in caplog.text
    assert 0.6 <= trainer.progress.elapsed_s < 0.9  # a fifth
    assert (tmp_path / "models" / "model.pt").exists()


def test_a_budget_that_ends_while_a_checkpoint_is_written_leaves_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saving takes the rest of the time: what was learned since the last validation is kept all the same."""
    clock = Clock()
    clock.replace_time(monkeypatch)
    checkpoint_after(monkeypatch, 1.0)
    monkeypatch.setattr("autoseg.training.validation.validation_plan", lambda *words: ((), 0))
    plan = tiny_plan().model_copy(update={"budget_s": 8.0, "num_epochs": 10_000, "num_steps_per_epoch": 1000})
    trainer = Trainer(plan, CASES[:4], CASES[4:], JobDir(tmp_path), device=CPU)
    on_a_clock(monkeypatch, trainer, clock, 0.1, 0.05)
    save = trainer.save

    def slow() -> None:
        save()
        clock.now += 7.0

    monkeypatch.setattr(trainer, "save", slow)
    result = trainer.run()
    assert result.steps < 20
    assert trainer.progress.ended
    assert result.best_epoch == result.epochs == 1
    kept = torch.load(tmp_path / "models" / "model.pt", weights_only=True)
    assert all(torch.equal(kept[k], v) for k, v in trainer.average.state_dict().items())


def test_a_budget_that_ends_with_an_epoch_has_no_empty_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The epoch's own validation takes the rest of the time: the job ends without another one of no steps."""
    clock = Clock()
    clock.replace_time(monkeypatch)
    plan = tiny_plan().model_copy(update={"budget_s": 8.0, "num_epochs": 10_000, "num_steps_per_epoch": 5})
    trainer = Trainer(plan, CASES[:4], CASES[4:], JobDir(tmp_path), device=CPU)
    on_a_clock(monkeypatch, trainer, clock, 0.1, 0.05)
    validate = trainer.validator.validate

    def slow(before_case) -> float:  # type: ignore[no-untyped-def]
        clock.now += 6.0
        return validate(before_case)

    monkeypatch.setattr(trainer.validator, "validate", slow)
    result = trainer.run()
    assert trainer.progress.ended
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, result.epochs + 1))
    assert [line["step"] for line in lines] == [5 * n for n in range(1, result.epochs + 1)]
    assert (tmp_path / "models" / "model.pt").exists()


def test_cases_without_scores_are_no_divergence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fold that is annotated for nothing has no Dice: the end of the schedule is kept."""
    monkeypatch.setattr("autoseg.training.trainer.DIVERGED_STEPS", 2)
    silent = [dataclasses.replace(CASES[4], annotated=())]
    trainer = Trainer(tiny_plan(num_epochs=4), CASES[:4], silent, JobDir(tmp_path / "segresnet_0"), device=CPU)
    assert math.isnan(trainer.validator.validate())
    result = trainer.run()
    assert (result.epochs, result.best_epoch) == (4, 4)
    assert all(torch.equal(weights(tmp_path)[k], v) for k, v in trainer.average.state_dict().items())


def test_one_hard_class_of_one_case_is_no_divergence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a budget a validation may look at one case of many; where it lacks classes, its zero tells nothing."""
    monkeypatch.setattr("autoseg.training.trainer.DIVERGED_STEPS", 2)
    cases = [dataclasses.replace(CASES[4], annotated=("box",)), CASES[3]]
    trainer = Trainer(tiny_plan(num_epochs=4), CASES[:3], cases, JobDir(tmp_path / "segresnet_0"), device=CPU)
    monkeypatch.setattr(trainer.validator, "score", lambda case: torch.tensor([math.nan, 0.0], dtype=torch.float64))
    monkeypatch.setattr(trainer.validator, "chosen", lambda: [0])
    assert trainer.run().epochs == 4
    monkeypatch.setattr(trainer.validator, "chosen", lambda: [0, 1])
    assert trainer.validator.covers_classes()


def test_a_signal_ends_a_long_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was trained is saved before a validation that takes long, and a signal then breaks that off."""
    checkpoint_after(monkeypatch, -1.0)
    val_cases = [CASES[4], CASES[3]]

    def job(name: str) -> Trainer:
        return Trainer(tiny_plan(), CASES[:3], val_cases, JobDir(tmp_path / name / "segresnet_0"), device=CPU)

    job("whole").run()
    trainer = job("parts")
    score, scored = trainer.validator.score, []

    def signalled(case: CachedCase) -> torch.Tensor:
        scored.append(case.name)
        os.kill(os.getpid(), signal.SIGTERM)
        return score(case)

    monkeypatch.setattr(trainer.validator, "score", signalled)
    with pytest.raises(Interrupted):
        trainer.run()
    assert scored == ["case_4"], "the second case was not waited for"
    job("parts").run()
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert curve(tmp_path / "whole") == curve(tmp_path / "parts")


@pytest.mark.parametrize("scoring_s", [0.5, 2.0])
def test_time_for_scoring_is_kept_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scoring_s: float) -> None:
    """Scoring the one case is measured: training ends that much before the budget does."""
    trainer = run_on_a_clock(tmp_path, monkeypatch, 8.0, scoring_s)
    assert trainer.progress.elapsed_s == pytest.approx(8.0 - scoring_s, abs=0.16)
    assert trainer.curve.lines[-1]["lr"] < 1e-3 * trainer.plan.learning_rate


def test_under_a_budget_a_part_of_many_cases_is_validated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = run_on_a_clock(tmp_path, monkeypatch, 4.0, scoring_s=0.05, val_cases=[CASES[4]] * 40)
    looked_at = trainer.validator.chosen()
    assert 1 <= len(looked_at) < 40
    assert len(looked_at) < 2 or (looked_at[0] == 0 and looked_at[-1] == 39)
    dice = [line["val_dice"] for line in trainer.curve.lines if line["val_dice"] is not None]
    assert 1 <= len(dice) <= 10
    assert trainer.progress.best_epoch > 0


def test_a_part_of_the_cases_does_not_tell_the_last_weights_from_ones_a_little_better(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for last, best_epoch in ((0.495, 3), (0.48, 2)):
        trainer = make_trainer(tmp_path / str(last), num_epochs=3, num_epochs_per_validation=1)
        scores = iter([0.4, 0.5, last])
        monkeypatch.setattr(trainer.validator, "validate", lambda before_case, scores=scores: next(scores))
        monkeypatch.setattr(trainer.validator, "looks_at_part", lambda: True)
        trainer.validator.parts = [0.5, 0.5]
        assert trainer.run().best_epoch == best_epoch


def test_nothing_learned_after_a_quarter_is_divergence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoseg.training.trainer.DIVERGED_STEPS", 2)
    trainer = make_trainer(tmp_path, num_epochs=4, learning_rate=1e-9)
    monkeypatch.setattr(trainer.validator, "score", lambda case: torch.tensor([0.0, 0.001], dtype=torch.float64))
    with pytest.raises(Diverged, match="nothing was learned") as error:
        trainer.run()
    assert "after 25% of the schedule" in str(error.value)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no"), MemoryError(), RuntimeError("can't allocate memory")])
def test_out_of_memory_makes_the_batch_then_the_patch_smaller(tmp_path: Path, error: Exception) -> None:
    """Two patches do not fit, one of 16 voxels' edge neither; one of 14 does, and so it stays after a restart."""
    trainer = make_trainer(tmp_path)
    forward, seen = trainer.step.network.forward, []

    def limited(x):  # type: ignore[no-untyped-def]
        seen.append(tuple(x.shape))
        if x.requires_grad or x.numel() > 14 * 16 * 16:
            raise error
        return forward(x)

    trainer.step.network.forward = limited  # type: ignore[method-assign]
    trainer.train_step()
    assert [s[0] for s in seen] == [2, 1, 1, 1]
    assert sorted(seen[-1][2:]) == [14, 16, 16]
    assert trainer.progress.step == 1
    trainer.save()
    again = make_trainer(tmp_path)
    again.resume()
    assert (again.micro_batch, again.roi) == (1, trainer.roi)


def test_another_runtime_error_is_not_taken_for_lack_of_memory(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)

    def broken(x):  # type: ignore[no-untyped-def]
        raise RuntimeError("shapes do not match")

    trainer.step.network.forward = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="shapes do not match"):
        trainer.train_step()


def test_no_memory_for_one_smallest_patch_is_said(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)

    def full(x):  # type: ignore[no-untyped-def]
        raise torch.OutOfMemoryError("no memory")

    trainer.step.network.forward = full  # type: ignore[method-assign]
    with pytest.raises(ResourceError, match="out of memory with 1 patches of 2x2x4"):
        trainer.train_step()


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "adam", "novograd", "sgd"])
def test_saved_and_loaded_at_every_step_it_ends_the_same(tmp_path: Path, optimizer: str) -> None:
    how = {"optimizer": optimizer, "schedule": "poly", "augment": "default"}
    make_trainer(tmp_path / "whole", **how).run()
    for step in range(1, 6):
        trainer = make_trainer(tmp_path / "parts", **how)
        train_step = trainer.train_step

        def one_step(share, train_step=train_step) -> None:  # type: ignore[no-untyped-def]
            train_step(share)
            os.kill(os.getpid(), signal.SIGTERM)

        trainer.train_step = one_step  # type: ignore[method-assign]
        with pytest.raises(Interrupted):
            trainer.run()
        assert trainer.progress.step == step
    make_trainer(tmp_path / "parts", **how).run()
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert curve(tmp_path / "whole") == curve(tmp_path / "parts")


def test_fp16_skips_steps_that_overflow_and_remembers_its_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU without bf16; here on a CPU, from a scale that no gradient in 16 bits can bear."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *words, **how: scaler(*words, **how, init_scale=2.0**40))
    trainer = make_trainer(tmp_path / "parts", precision="fp16")
    before = [p.detach().clone() for p in trainer.step.network.parameters()]
    update = trainer.step.scaler.update

    def interrupted() -> None:
        update()
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(trainer.step.scaler, "update", interrupted)
    with pytest.raises(Interrupted):
        trainer.run()
    assert (trainer.progress.step, trainer.step.scaler.get_scale()) == (1, 2.0**39)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.step.network.parameters(), strict=True))
    again = make_trainer(tmp_path / "parts", precision="fp16")
    again.run()
    assert again.step.scaler.get_scale() == 2.0 ** (40 - again.progress.step), (
        "it went on from the scale that was stored"
    )
    assert all(math.isfinite(line["train_loss"]) for line in curve(tmp_path / "parts"))


def test_fp16_learns_as_fp32_does(tmp_path: Path) -> None:
    losses = []
    for precision in ("fp32", "fp16"):
        trainer = make_trainer(tmp_path / precision, precision=precision, num_epochs=4)
        trainer.run()
        assert trainer.step.scaler.is_enabled() == (precision == "fp16")
        losses.append([line["train_loss"] for line in curve(tmp_path / precision)])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1][-1] < losses[1][0]


def test_out_of_memory_is_met_by_smaller_pieces_with_equal_gradients(tmp_path: Path) -> None:
    gradients = []
    for fails in (False, True):
        trainer = make_trainer(tmp_path / str(fails), augment="none")
        forward, seen = trainer.step.network.forward, []

        def limited(x, forward=forward, fails=fails, seen=seen):  # type: ignore[no-untyped-def]
            seen.append(len(x))
            if fails and len(x) > 1:
                raise torch.OutOfMemoryError("no memory")
            return forward(x)

        trainer.step.network.forward = limited  # type: ignore[method-assign]
        trainer.train_step()
        gradients.append([p.detach().clone() for p in trainer.step.network.parameters()])
        assert seen == ([2, 1, 1] if fails else [2])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_partially_annotated_cases_are_trained_and_scored_by_what_they_are_annotated_for(tmp_path: Path) -> None:
    def without_core(case: CachedCase) -> CachedCase:
        ball = np.where(case.target == 2, 0, case.target)  # naive training would learn a hole here
        return dataclasses.replace(case, target=ball, points=case.points[case.points[:, 0] == 0], annotated=("sphere",))

    partial = [CASES[0], *(without_core(c) for c in CASES[1:4])]
    plan = tiny_plan(num_epochs=40, num_epochs_per_validation=20, optimizer="adamw")
    dice = {}
    for name, cases in (("marginal", partial), ("naive", [dataclasses.replace(c, annotated=None) for c in partial])):
        trainer = Trainer(plan, cases, CASES[4:], JobDir(tmp_path / name / "segresnet_0"), device=CPU)
        trainer.run()
        trainer.average.load_state_dict(weights(tmp_path / name))
        dice[name] = dice_of_targets(trainer.validator.predict(CASES[4]), CASES[4].target, plan.label_map)
    assert dice["marginal"][1] > dice["naive"][1] + 0.1
    # A validation case counts for what it is annotated for.
    trainer.validator.cases = [dataclasses.replace(CASES[4], annotated=("box",))]
    assert trainer.validator.validate() == pytest.approx(dice["naive"][1], abs=1e-6)


def test_class_weights_reach_loss_and_sampling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    def loss(*given: Any, **words: Any) -> torch.Tensor:
        seen.append(words["class_weights"])
        return supervised_loss(*given, **words)

    monkeypatch.setattr("autoseg.training.step.supervised_loss", loss)
    plan = tiny_plan(class_weights={"box": 10.0}, class_sampling={"sphere": 3.0})
    trainer = Trainer(plan, CASES[:4], CASES[4:], JobDir(tmp_path), device=CPU)
    trainer.train_step(0.5)
    assert seen[-1].tolist() == [1.0, 10.0]
    assert trainer.batches.sampler.weights.tolist() == [3.0, 1.0]


def test_an_unsure_voxel_reaches_the_loss_with_what_was_filled_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []

    def loss(*given: Any, **words: Any) -> torch.Tensor:
        seen.append(words)
        return supervised_loss(*given, **words)

    monkeypatch.setattr("autoseg.training.step.supervised_loss", loss)
    unsure = np.full_like(CASES[0].target, UNSURE)
    plan = tiny_plan(annotators_share=0.0)
    for own in (("sphere",), None):
        cases = [dataclasses.replace(c, target=unsure, by_annotators=own) for c in CASES[:4]]
        Trainer(plan, cases, CASES[4:], JobDir(tmp_path / str(own) / "segresnet_0"), device=CPU).train_step(0.5)
        filled = seen[-1]["filled"]
        assert filled is None if own is None else (filled == torch.tensor([False, True])).all()


def test_a_class_nobody_is_annotated_for_is_background() -> None:
    cases = [dataclasses.replace(c, annotated=a) for c, a in zip(CASES, [("sphere",), ()], strict=False)]
    label_map = tiny_plan().label_map
    assert unannotated_classes(cases, label_map).tolist() == [[False, False], [True, False]]
    assert not unannotated_classes(CASES, label_map).any()


def test_a_sample_annotated_for_one_side_is_not_mirrored_to_the_other() -> None:
    sides = [ClassPlan(name="kidney_left", values=(1,)), ClassPlan(name="kidney_right", values=(2,))]
    pairs = (("kidney_left", "kidney_right"),)
    changes = {"classes": tuple(sides), "lateral_pairs": pairs, "mirror_axes": (0,), "augment": "light"}
    plan = tiny_plan().model_copy(update=changes)
    image = torch.arange(2.0).repeat(2, 1, 2, 2, 1).movedim(-1, 2)  # rises along X
    target = torch.ones((2, 1, 2, 2, 2), dtype=torch.uint8)
    seen = set()
    one, none = np.array([[False, True], [False, False]]), np.zeros((2, 2), bool)
    for seed, (unannotated, filled) in itertools.product(range(20), ((one, none), (none, one))):
        draws = [draw_sample(plan, np.random.default_rng([seed, i]), unannotated[i], filled[i]) for i in range(2)]
        out, labels = image.clone(), target.clone()
        augment_batch(out, labels, draws, {}, lateral_pairs=plan.mirrored_classes, sigmoid=False)
        assert out[0, 0, 0].mean() < out[0, 0, 1].mean(), "the one-sided sample was mirrored"
        assert (labels[0] == 1).all()
        seen.add((bool(out[1, 0, 0].mean() < out[1, 0, 1].mean()), int(labels[1].max())))
    assert seen == {(True, 1), (False, 2)}


WORKER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
import torch.distributed as dist
from test_trainer import make_trainer
from autoseg.training.processes import join_processes
torch.set_num_threads(1)
join_processes("cpu")
make_trainer(Path(sys.argv[2])).run()
dist.destroy_process_group()
"""


def test_two_processes_train_the_same_weights_as_one(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        make_trainer(tmp_path / "one").run()
    finally:
        torch.set_num_threads(threads)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run(
        [*command, str(Path(__file__).parent), str(tmp_path / "two")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for key in one:
        torch.testing.assert_close(one[key], two[key], atol=1e-4, rtol=1e-3)
    for a, b in zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True):
        assert a["epoch"] == b["epoch"]
        assert a["val_dice"] == pytest.approx(b["val_dice"], abs=5e-3)


def test_a_batch_that_cannot_be_shared_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    with pytest.raises(WorkspaceError, match="batch_size 2 cannot be shared by 3 processes. Set a multiple of 3."):
        make_trainer(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_twenty_random_moments_it_ends_with_the_same_weights(tmp_path: Path) -> None:
    """SIGKILL, not SIGTERM: nothing can be saved at the last moment."""
    script = tmp_path / "kill.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nsys.path.insert(0, sys.argv[1])\n"
        "import autoseg.training.trainer as t\nt.CHECKPOINT_S = 0.3\n"
        "from test_trainer import make_trainer\n"
        "make_trainer(Path(sys.argv[2]), num_epochs=120, num_epochs_per_validation=3).run()\n"
    )
    command = [sys.executable, str(script), str(Path(__file__).parent)]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, timeout=300)
    rng = random.Random(7)
    kills = 0
    for _ in range(80):
        process = subprocess.Popen([*command, str(tmp_path / "parts")])
        metrics = tmp_path / "parts" / "segresnet_0" / "metrics.jsonl"
        before = metrics.stat().st_mtime_ns if metrics.exists() else 0
        while process.poll() is None and (not metrics.exists() or metrics.stat().st_mtime_ns == before):
            time.sleep(0.02)
        time.sleep(rng.uniform(0.0, 1.0))
        if kills == 20 or process.poll() is not None:
            assert process.wait(timeout=300) == 0
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills == 20
    assert curve(tmp_path / "whole") == curve(tmp_path / "parts")
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_a_budget_given_after_a_validation_is_kept(tmp_path: Path) -> None:
    """A job begun without a budget has measured no scoring when it goes on with one."""
    trainer = make_trainer(tmp_path)
    trainer.validator.plan = trainer.plan.model_copy(update={"budget_s": 60.0})
    trainer.progress.voxel_s = 1e-9
    assert 0 < trainer.validator.reserve_s() < 1
