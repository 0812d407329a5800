"""Rules for how long a job trains, by which optimizer and with which changes of its patches."""

from __future__ import annotations

import math

from autoseg.algos.draft import Draft
from autoseg.algos.rules.start import is_kept
from autoseg.config.networks import AlgoName
from autoseg.networks import network_file

MINUTES_PER_CPU_JOB = 60
"""Without a budget a job on a CPU gets at most this long: somebody waits for it at a desk."""

TRAINING_SHARE = 0.8
"""Share of a job's budget that is steps, when their number is estimated; validation and scores take the rest. A guess
before anything is measured."""

SPARE, FASTEST_STEP_S = 3.0, 0.01
"""A budget's schedule has this many times the epochs that fit by what a step took, or by this guess on a GPU where none
was measured: a machine that turns out faster must not end it early."""

FEW_PASSES, FEW_STEPS = 30, 300
"""Passes over the training cases, or steps, below which augmentation is light.
Source: measured on five sets (docs/results.md). After 400 steps nnU-Net's is ahead on cases unlike those of training
where these make 44 passes or more, and behind where they make 25; after 250 neither is, after 150 light."""

SHORT_STEPS, SHORT_RATE = 250, 1e-2
"""Steps under which Muon takes at least this rate: a schedule that short does not get far with a lower one. The number
lies between the 60 steps below and the 400 of the hippocampus, where 5e-3 was better (docs/results.md).
Source: SegResNet on phantoms, 60 steps: 0.42 Dice with 3e-3, 0.72 to 0.86 with 5e-3, 0.90 to 0.92 with 1e-2."""


SAMPLES, SAMPLES_PER_CASE = 80_000, 300
"""Patches to train on. Source: Auto3DSeg's SegResNet: 80,000 samples, and each case at least 300 times."""
LEAST_STEPS, MOST_STEPS = 10_000, 250_000
"""Optimizer steps of a job without a budget. Source: nnU-Net makes 250,000, Auto3DSeg about 48,000 for BTCV; a choice
for the least: under 10,000 no published recipe of a large network goes."""
RATED_BATCH = 2
"""Patches of a step that the learning rates for GPUs are for. AdamW's grows with the square root of the batch.
Source: Malladi et al. 2022, "On the SDEs and Scaling Rules for Adaptive Gradient Algorithms" (arXiv 2205.10287)."""


def step_seconds(algo: AlgoName, batch_size: int, roi_size: tuple[int, int, int], num_cores: int) -> float:
    """Expected seconds of a training step on a CPU where none was measured."""
    return network_file(algo).SECONDS_PER_MEGAVOXEL * batch_size * math.prod(roi_size) / 1e6 * 2 / num_cores


def _step_s(draft: Draft) -> float | None:
    """Seconds of a step: measured, else expected on a CPU; None on a GPU where none was measured."""
    hardware = draft.inputs.hardware
    if draft.fit.step_s is not None or hardware.on_gpu:
        return draft.fit.step_s
    return step_seconds(draft.inputs.algo, draft["batch_size"], tuple(draft["roi_size"]), hardware.num_cores)


def planned_steps(draft: Draft) -> float:
    """Steps that a job will make: its epochs', or those that fit its budget."""
    num_steps = float(draft["num_epochs"] * draft["num_steps_per_epoch"])
    budget_s, step_s = draft.inputs.budget_s, _step_s(draft)
    return num_steps if budget_s is None or step_s is None else min(num_steps, TRAINING_SHARE * budget_s / step_s)


def num_steps_per_epoch(draft: Draft) -> None:
    """Steps of an epoch."""
    steps = max(1, math.ceil(draft.inputs.num_train / draft["batch_size"]))
    draft.put("num_steps_per_epoch", steps, "every training case once an epoch")


def num_epochs(draft: Draft) -> None:
    """Epochs that make the steps to train for, no more than a CPU makes in an hour; with a budget more than fit it.

    Source: Auto3DSeg's SegResNet for the number of samples, nnU-Net for the most steps.
    """
    steps, step_s = draft["num_steps_per_epoch"], _step_s(draft)
    samples = max(SAMPLES, SAMPLES_PER_CASE * draft.inputs.num_train)
    wanted = min(MOST_STEPS, max(LEAST_STEPS, samples / draft["batch_size"]))
    epochs = max(2, min(math.ceil(wanted / steps), MOST_STEPS // steps))
    rule = (
        f"{wanted:,.0f} steps: {SAMPLES:,} samples, or {SAMPLES_PER_CASE} a case (Auto3DSeg's SegResNet), in "
        f"{LEAST_STEPS:,} to {MOST_STEPS:,} steps (nnU-Net's {MOST_STEPS:,})"
    )
    most_s = MINUTES_PER_CPU_JOB * 60
    if step_s is not None and not draft.inputs.hardware.on_gpu and epochs * steps * step_s > most_s:
        epochs = max(2, int(most_s / (step_s * steps)))
        rule = f"what this CPU does in about {MINUTES_PER_CPU_JOB} minutes; set num_epochs or budget for more"
    if draft.inputs.budget_s is not None:
        epoch_s = steps * (step_s or FASTEST_STEP_S)
        epochs = max(epochs, math.ceil(SPARE * draft.inputs.budget_s / epoch_s))
        rule = "more than fit: the budget ends the job"
    draft.put("num_epochs", epochs, rule)


def augment(draft: Draft) -> None:
    """Random changes of patches. Source: nnU-Net's; light for short jobs, measured on the hippocampus."""
    num_steps = planned_steps(draft)
    passes = num_steps / draft["num_steps_per_epoch"]
    told = f"{num_steps:,.0f} steps, about {passes:,.0f} passes over the cases, are"
    if passes < FEW_PASSES or (num_steps < FEW_STEPS and not is_kept(draft)):
        rule = (
            f"light: {told} too few to learn them by heart, and strong changes only slow a network (measured); "
            f"nnU-Net's from {FEW_PASSES} passes and, with random weights, {FEW_STEPS} steps on"
        )
        draft.put("augment", "light", rule)
    else:
        rule = (
            f"nnU-Net's probabilities and ranges: {told} enough to learn them by heart; light under {FEW_PASSES} "
            f"passes or, with random weights, {FEW_STEPS} steps (measured)"
        )
        draft.put("augment", "default", rule)


def budget(draft: Draft) -> None:
    """Seconds of the job, as they were shared out."""
    budget_s = draft.inputs.budget_s
    rule = "the job's share of the budget" if budget_s else "no budget given"
    draft.set("budget_s", budget_s, draft.inputs.budget_origin or "planner", rule)


def num_epochs_per_validation(draft: Draft) -> None:
    """Epochs between validations; their number is a choice."""
    draft.put(
        "num_epochs_per_validation",
        max(1, math.ceil(draft["num_epochs"] / 20)),
        "20 validations over the schedule; with a budget, as many as a twentieth of the time allows",
    )


def optimizer(draft: Draft) -> None:
    """The optimizer. Source: Auto3DSeg and the FLARE23 paper for a GPU; measured on a CPU."""
    if draft.inputs.hardware.on_gpu:
        draft.put("optimizer", "adamw", "AdamW on a GPU (Auto3DSeg's SegResNet, the FLARE23 paper)")
    else:
        rule = "Muon on a CPU: SegResNet came to 0.877 Dice with it, to 0.852 with AdamW in as many steps (measured)"
        draft.put("optimizer", "muon", rule)


def learning_rate(draft: Draft) -> None:
    """The highest learning rate: the network's for the optimizer and the device, whose file has the sources."""
    rates = network_file(draft.inputs.algo).LEARNING_RATES
    if draft["optimizer"] != "muon":
        on_cpu = "ten to twenty-five times a GPU's, for small networks and short schedules (measured)"
        if draft.inputs.hardware.on_gpu:
            rate = float(f"{rates.gpu * math.sqrt(draft['batch_size'] / RATED_BATCH):.3g}")
            rule = f"{rates.source} {rates.gpu:g} for {RATED_BATCH} patches, with the square root of the batch"
            draft.put("learning_rate", rate, rule)
        else:
            draft.put("learning_rate", rates.cpu, on_cpu)
    elif planned_steps(draft) < SHORT_STEPS and not is_kept(draft):  # weights to start from need no such haste
        draft.put("learning_rate", max(rates.muon, SHORT_RATE), f"Muon's for fewer than {SHORT_STEPS} steps (measured)")
    else:
        draft.put("learning_rate", rates.muon, "Muon's (measured on a CPU)")
