"""Which networks `algos: auto` trains: a rule of the data, the device and the time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autoseg.algos.rules.images import is_cropped, target_spacing
from autoseg.config.networks import AUTO_ALGOS, NETWORKS, AlgoName
from autoseg.config.settings import Settings
from autoseg.config.units import format_duration
from autoseg.data.fingerprint import Fingerprint
from autoseg.data.resampling import resampled_shape

if TYPE_CHECKING:  # it loads torch
    from autoseg.hardware.facts import Hardware

MOST_NETWORKS = 3
"""Networks that are trained. Source: Auto3DSeg trains three; more take time from the folds of the better ones."""
MOST_ANISOTROPY = 3.0
"""Longest over shortest edge of a voxel above which a network that halves all axes alike is left out. Source: nnU-Net's
threshold for thick slices (`ANISO_THRESHOLD`)."""
LEAST_AXIS = 16
"""Voxels of the median image's shortest axis under which it is left out, too: SwinUNETR's stages halve five times, so
that more than half of each patch would be padding."""
RANKS: dict[bool, tuple[tuple[AlgoName, str], ...]] = {
    True: (
        ("segresnet", "the best of Auto3DSeg's on all six sets of nnU-Net Revisited (Isensee et al. 2024)"),
        ("resenc", "0.3 to 7 points of Dice over SegResNet there"),
        ("swinunetr", "the one with attention, so it errs elsewhere; 0.82 of the hours of dints a voxel (Auto3DSeg)"),
        ("dints", "it comes after the other three: 1.22 times SwinUNETR's hours a voxel (Auto3DSeg)"),
    ),
    False: (
        ("segresnet", "the best of three networks in five folds of the hippocampus, 0.888 Dice"),
        ("resenc", "level with segresnet after five minutes on the hippocampus: 0.872 Dice, the mean of two seeds"),
        ("dints", "0.884 Dice in five folds of the hippocampus, where an ensemble with it was the best"),
        ("swinunetr", "it comes after the other three: 0.872 Dice in eight minutes, where dints came to 0.879"),
    ),
}
"""Networks on a GPU and on a CPU, those to be taken first, each with what speaks for it.
Source on a CPU: docs/results.md."""
LEAST_CORE_S = 360.0
"""Seconds of a job, times cores, under which a CPU trains fewer networks. Source: docs/results.md: SegResNet alone came
to 0.876 Dice in 3 minutes on two cores, an ensemble of three networks with 88 s a job to 0.794."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTime:
    """The time of a whole run, and what it is shared by."""

    budget_s: float | None
    """None: there is no budget."""
    num_folds: int
    num_kept: int
    """Networks that go on after the first fold, where more have begun."""
    num_rounds: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The networks that are trained, and why these."""

    networks: tuple[AlgoName, ...]
    reasons: Mapping[AlgoName, str]
    """Of every network that could have been picked."""

    @property
    def rule(self) -> str:
        """All reasons in a line, those that speak for a network first."""
        taken = [f"{name}: {self.reasons[name]}" for name in self.networks]
        left = [f"{name} is left out: {reason}" for name, reason in self.reasons.items() if name not in self.networks]
        return "; ".join(taken + left)


def choose_networks(fingerprint: Fingerprint, settings: Settings, hardware: Hardware, run_time: RunTime) -> Choice:
    """Up to three of the networks that `algos: auto` may pick, SegResNet the first of them.

    1. Those that cannot follow the voxels are left out: where slices are thick, or there are few of them, a network
       that halves all axes alike looks further along the thick one at each stage, and its patches are padded.
    2. Of the others the first three of the device's ranks.
    3. With a budget that leaves a job on a CPU too little time, fewer.
    """
    reasons: dict[AlgoName, str] = {}
    ranks = [(name, reason) for name, reason in RANKS[hardware.on_gpu] if name in AUTO_ALGOS]
    for name, _ in ranks:
        if reason := _cannot_follow(name, fingerprint, settings):
            reasons[name] = reason
    able = [(name, reason) for name, reason in ranks if name not in reasons]
    num = min(MOST_NETWORKS, len(able))
    paid = num if hardware.on_gpu else _num_paid(num, hardware.num_cores, run_time)
    for rank, (name, reason) in enumerate(able):
        reasons[name] = _too_little_time(hardware.num_cores, run_time) if paid <= rank < num else reason
    return Choice(networks=tuple(name for name, _ in able[:paid]), reasons=reasons)


def _cannot_follow(algo: AlgoName, fingerprint: Fingerprint, settings: Settings) -> str:
    """Why a network does not suit the voxels that it would see; empty where it does."""
    if not NETWORKS[algo].halves_all_axes:
        return ""
    spacing_mm = settings.hyper(algo).get("resample_resolution") or target_spacing(fingerprint)[0]
    anisotropy = max(spacing_mm) / min(spacing_mm)
    wanted = settings.hyper(algo).get("crop_foreground")
    size_mm = fingerprint.size_mm_seen(cropped=is_cropped(fingerprint) if wanted is None else wanted)
    shortest = min(resampled_shape((1, 1, 1), size_mm, spacing_mm))
    alike = "it halves all axes alike"
    if anisotropy > MOST_ANISOTROPY:
        return f"{alike}, and slices are {anisotropy:.3g} times as thick as a voxel is wide (over {MOST_ANISOTROPY:g})"
    if shortest < LEAST_AXIS:
        return f"{alike}, and the median image has {shortest} voxels along its shortest axis (under {LEAST_AXIS})"
    return ""


def _job_s(num_networks: int, run_time: RunTime) -> float:
    """Seconds of a job where so many networks share a budget, and the weaker ones are dropped after the first fold."""
    assert run_time.budget_s is not None
    num_jobs = num_networks + (run_time.num_folds - 1) * min(num_networks, run_time.num_kept)
    return run_time.budget_s / num_jobs / run_time.num_rounds


def _num_paid(most: int, num_cores: int, run_time: RunTime) -> int:
    """Networks whose jobs a budget on a CPU leaves enough time, one at least."""
    if run_time.budget_s is None:
        return most
    return next((n for n in range(most, 1, -1) if _job_s(n, run_time) * num_cores >= LEAST_CORE_S), 1)


def _too_little_time(num_cores: int, run_time: RunTime) -> str:
    assert run_time.budget_s is not None
    return (
        f"the budget of {format_duration(run_time.budget_s)} would leave a job less than "
        f"{format_duration(LEAST_CORE_S / num_cores)} on these cores, in which fewer networks learn more (measured)"
    )
