"""Plans for data sets of many kinds on a CPU and on GPUs of 16, 24 and 80 GB: what must hold of each of them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from plans import CPU, make_fingerprint, plan_and_origins

from autoseg.algos import fit, measurements
from autoseg.algos.inputs import PlanInputs
from autoseg.config.networks import AlgoName
from autoseg.config.settings import Settings
from autoseg.data.fingerprint import Fingerprint
from autoseg.data.labels import LabelMap
from autoseg.hardware.facts import Hardware
from autoseg.networks import build_network, divisor, heads, network_file, segresnet
from autoseg.networks.segresnet import resolution_for
from autoseg.networks.sizing import LONG, Sizing, fit_roi, round_up
from autoseg.networks.topology import LEAST_VOXELS, Triple, patch_and_topology, topology_for
from autoseg.plan import Plan
from autoseg.training.measure import StepCost


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set as its publication or a look at its files has it; the training cases of one of five folds."""

    cases: int
    channels: int = 1
    classes: int
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    ct: bool = False
    nonzero: tuple[int, int, int] | None = None
    """Of the box around voxels other than 0."""

    @property
    def seen(self) -> tuple[int, int, int]:
        """What is left after cropping."""
        return self.nonzero or self.shape


SETS = {
    "spleen": DataSet(cases=33, classes=1, shape=(512, 512, 90), spacing_mm=(0.79, 0.79, 5.0), ct=True),
    "btcv": DataSet(cases=24, classes=13, shape=(512, 512, 128), spacing_mm=(0.76, 0.76, 3.0), ct=True),
    "flare23": DataSet(cases=1760, classes=14, shape=(512, 512, 115), spacing_mm=(0.79, 0.79, 2.5), ct=True),
    "kits": DataSet(cases=240, classes=3, shape=(512, 512, 109), spacing_mm=(0.78, 0.78, 3.0), ct=True),
    "lits": DataSet(cases=105, classes=2, shape=(512, 512, 432), spacing_mm=(0.77, 0.77, 1.0), ct=True),
    "brats": DataSet(
        cases=1000, channels=4, classes=3, shape=(240, 240, 155), spacing_mm=(1.0, 1.0, 1.0), nonzero=(138, 169, 138)
    ),
    "prostate": DataSet(cases=26, channels=2, classes=2, shape=(320, 320, 20), spacing_mm=(0.625, 0.625, 3.6)),
    "acdc": DataSet(cases=160, classes=3, shape=(216, 256, 9), spacing_mm=(1.56, 1.56, 10.0)),
    "hippocampus": DataSet(cases=208, classes=2, shape=(35, 50, 36), spacing_mm=(1.0, 1.0, 1.0)),
    "ms_lesions": DataSet(cases=48, classes=1, shape=(182, 218, 60), spacing_mm=(1.0, 1.0, 3.0)),
    "two_slices": DataSet(cases=48, classes=1, shape=(256, 256, 2), spacing_mm=(1.0, 1.0, 8.0)),
    "em": DataSet(cases=6, classes=4, shape=(256, 256, 20), spacing_mm=(0.0046, 0.0046, 0.05)),
    "one_slice": DataSet(cases=48, classes=1, shape=(256, 256, 1), spacing_mm=(1.0, 1.0, 8.0)),
    "thousand_slices": DataSet(cases=40, classes=5, shape=(512, 512, 1000), spacing_mm=(0.7, 0.7, 0.6), ct=True),
    "limb": DataSet(cases=40, classes=5, shape=(128, 128, 3000), spacing_mm=(1.0, 1.0, 1.0), ct=True),
    "legs": DataSet(cases=40, classes=5, shape=(200, 200, 1500), spacing_mm=(1.0, 1.0, 1.0), ct=True),
    "spine": DataSet(cases=40, classes=5, shape=(250, 250, 900), spacing_mm=(1.0, 1.0, 1.0), ct=True),
    "vessel": DataSet(cases=40, classes=1, shape=(64, 64, 1000), spacing_mm=(1.0, 1.0, 1.0)),
}
"""Those from a thousand slices on are made up."""
RESENC = {
    "spleen": (256, 320, 56),
    "btcv": (256, 256, 80),
    "flare23": (256, 320, 64),
    "kits": (256, 320, 64),
    "lits": (192, 224, 160),
    "brats": (160, 192, 160),
    "prostate": (320, 320, 20),
    "acdc": (224, 256, 10),
    "hippocampus": (40, 56, 40),
    "ms_lesions": (192, 224, 64),
    "two_slices": (256, 256, 2),
    "em": (256, 256, 20),
    "thousand_slices": (160, 160, 288),
    "limb": (128, 128, 256),
    "legs": (160, 192, 256),
    "spine": (160, 192, 256),
    "vessel": (64, 64, 256),
}
"""The patches that the planner of nnU-Net's ResEnc L preset gives these sets (nnunetv2 2.8.1), along X, Y, Z."""
GPUS = {
    gib: Hardware(on_gpu=True, num_gpus=1, memory_gib=gib, num_cores=16, name=f"GPU, {gib} GiB")
    for gib in (16.0, 24.0, 80.0)
}
SHORT_ON_A_CPU = ("spleen", "btcv", "flare23", "kits", "lits", "brats", "prostate", "ms_lesions", "em")
FOLLOWING: tuple[AlgoName, ...] = ("segresnet", "resenc")
"""Networks that halve each axis by the rule."""


def fingerprint_of(data: DataSet) -> Fingerprint:
    size_mm = tuple(n * mm for n, mm in zip(data.shape, data.spacing_mm, strict=True))
    return make_fingerprint(
        nonzero_crop_ratio=math.prod(data.seen) / math.prod(data.shape),
        nonzero_size_mm_median=tuple(n * mm for n, mm in zip(data.seen, data.spacing_mm, strict=True)),
        num_cases=data.cases,
        num_channels=data.channels,
        **{f"spacing_mm_{k}": data.spacing_mm for k in ("min", "p10", "median", "max")},
        **{f"shape_{k}": data.shape for k in ("min", "median", "p90", "max")},
        **{f"size_mm_{k}": size_mm for k in ("median", "p90")},
    )


def sizing(shape: Triple, spacing_mm: tuple[float, float, float], *, on_gpu: bool = True, size: int = 0) -> Sizing:
    return Sizing(spacing_mm=spacing_mm, median_shape=shape, num_outputs=3, memory_gib=24.0, on_gpu=on_gpu, size=size)


@cache
def planned(name: str, algo: AlgoName, memory_gib: float | None) -> Plan:
    data = SETS[name]
    plan, _ = plan_and_origins(
        algo,
        hardware=GPUS[memory_gib] if memory_gib else CPU,
        fingerprint=fingerprint_of(data),
        num_train=data.cases,
        modality="CT" if data.ct else "MRI",
        classes={f"class_{k}": (k,) for k in range(1, data.classes + 1)},
    )
    return plan


on_each = pytest.mark.parametrize(
    ("name", "memory_gib"), [(name, gib) for name in SETS for gib in (None, *GPUS)], ids=str
)


@on_each
def test_a_patch_has_what_the_image_has(name: str, memory_gib: float | None) -> None:
    """No axis is longer than the median image rounded up; thin volumes keep all their slices."""
    for algo in (*FOLLOWING, "swinunetr", "dints"):
        plan = planned(name, algo, memory_gib)
        steps = divisor(plan)
        assert all(r % s == 0 for r, s in zip(plan.roi_size, steps, strict=True))
        assert all(r <= round_up(n, s) for r, n, s in zip(plan.roi_size, SETS[name].seen, steps, strict=True))
        if algo in FOLLOWING and min(SETS[name].shape) <= 20:
            assert plan.roi_size[2] >= SETS[name].shape[2]


@on_each
def test_axes_are_halved_as_far_as_they_go(name: str, memory_gib: float | None) -> None:
    """No axis is left with fewer than 4 voxels, or halved while its voxels are over twice as long as the finest."""
    for algo in FOLLOWING:
        plan = planned(name, algo, memory_gib)
        steps = divisor(plan)
        assert all(s == 1 or r // s >= 4 for r, s in zip(plan.roi_size, steps, strict=True)), (algo, plan.roi_size)
        coarsest = max(range(3), key=lambda a: plan.resample_resolution[a])
        finest = min(plan.resample_resolution)
        before = plan.resample_resolution[coarsest] / finest
        assert steps[coarsest] * before <= 2 * max(steps), "its first halving came too early"


def test_a_thin_volume_is_halved_in_plane_as_nnunet_does() -> None:
    assert divisor(planned("acdc", "resenc", 24.0)) == (32, 32, 2)
    assert divisor(planned("acdc", "segresnet", 24.0)) == (16, 16, 2)
    assert divisor(planned("two_slices", "segresnet", 24.0)) == (16, 16, 1)
    assert divisor(planned("one_slice", "segresnet", 24.0)) == (16, 16, 1)
    assert divisor(planned("hippocampus", "segresnet", None)) == (4, 4, 4)


@on_each
def test_steps_are_planned_and_the_batch_is_a_handful(name: str, memory_gib: float | None) -> None:
    for algo in (*FOLLOWING, "swinunetr", "dints"):
        plan = planned(name, algo, memory_gib)
        steps = plan.num_epochs * plan.num_steps_per_epoch
        assert plan.batch_size <= (max(2, min(4, SETS[name].cases // 4)) if memory_gib else 4)
        if memory_gib:
            assert 10_000 <= steps <= 250_000, (algo, steps)
    large, small = planned(name, "segresnet", 80.0), planned(name, "segresnet", 16.0)
    assert large.num_epochs * large.num_steps_per_epoch >= 0.4 * small.num_epochs * small.num_steps_per_epoch


@pytest.mark.parametrize("memory_gib", GPUS)
@pytest.mark.parametrize("name", RESENC)
@pytest.mark.parametrize("algo", FOLLOWING)
def test_patches_are_about_as_large_as_nnunets(name: str, algo: AlgoName, memory_gib: float) -> None:
    ours, theirs = math.prod(planned(name, algo, memory_gib).roi_size), math.prod(RESENC[name])
    assert theirs / 3 <= ours <= 3 * theirs


def aspect(shape: Sequence[int], spacing_mm: Sequence[float]) -> float:
    """How many times as long as wide: a needle's is high, a plate's is about 1."""
    _, width, length = sorted(n * mm for n, mm in zip(shape, spacing_mm, strict=True))
    return length / width


@on_each
def test_a_patch_is_no_needle(name: str, memory_gib: float | None) -> None:
    """It is no longer for its width than nnU-Net's, or than the image; on a CPU, where it is smaller, than twice."""
    data = SETS[name]
    for algo in FOLLOWING:
        plan = planned(name, algo, memory_gib)
        theirs = aspect(RESENC[name], data.spacing_mm) if memory_gib and name in RESENC else LONG
        most = max(theirs, min(LONG, aspect(data.seen, data.spacing_mm)))
        rounded = 1.3  # by a step of the network along each axis
        assert aspect(plan.roi_size, plan.resample_resolution) <= rounded * most, (algo, plan.roi_size)


@given(
    shape=st.tuples(*[st.integers(1, 3000)] * 3),
    spacing_mm=st.tuples(*[st.floats(0.2, 10)] * 3),
    max_voxels=st.integers(32**3, 5_000_000),
)
@example(shape=(128, 128, 3000), spacing_mm=(1.0, 1.0, 1.0), max_voxels=4_200_000)
@example(shape=(3000, 10, 64), spacing_mm=(1.0, 5.0, 1.0), max_voxels=4_200_000)
@settings(max_examples=200)
def test_no_axis_is_longer_than_a_cube_of_four_times_the_voxels_or_twice_the_width(
    shape: Triple, spacing_mm: tuple[float, float, float], max_voxels: int
) -> None:
    """So long is nnU-Net's first patch, too, of 256^3 for the 4.2 million voxels of its ResEnc L patches."""
    roi = fit_roi(sizing(shape, spacing_mm), max_voxels, (1, 1, 1))
    assert all(1 <= r <= n for r, n in zip(roi, shape, strict=True))
    assert math.prod(roi) <= max_voxels
    edges_mm = [n * mm for n, mm in zip(shape, spacing_mm, strict=True)]
    cube_mm = (4 * max_voxels * math.prod(spacing_mm)) ** (1 / 3)
    for edge, n, mm in zip(roi, shape, spacing_mm, strict=True):
        kept = n <= 64 and 3 * n <= max(shape)
        assert kept or (edge - 1) * mm <= max(cube_mm, 2 * sorted(edges_mm)[1])


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("algo", [*FOLLOWING, "dints"])
def test_no_single_slice_decides_how_many_go_into_a_patch(algo: AlgoName, on_gpu: bool) -> None:
    """A patch has all of 32 slices; from there on as many more or fewer as the network can halve."""

    def slices(num: int) -> tuple[int, int]:
        choice = network_file(algo).choose(sizing((512, 512, num), (0.8, 0.8, 5.0), on_gpu=on_gpu))
        return choice.roi_size[2], network_file(algo).divisor(choice.network)[2]

    counts = {num: slices(num) for num in range(20, 101)}
    assert all(counts[num][0] >= num for num in range(20, 33))
    for num in range(20, 100):
        (before, step), (after, next_step) = counts[num], counts[num + 1]
        assert abs(after - before) <= max(step, next_step), num


@pytest.mark.parametrize("memory_gib", GPUS)
@pytest.mark.parametrize("name", SETS)
def test_ten_minutes_on_a_gpu_make_two_thousand_steps(
    monkeypatch: pytest.MonkeyPatch, name: str, memory_gib: float
) -> None:
    """On a made-up GPU that takes a second for 10 million voxels of a network of 32 features."""

    def measure(plan: Plan, device: torch.device, most_s: float) -> StepCost:
        width = plan.network.get("init_filters") or plan.network.get("init_features") or 32
        million = plan.batch_size * math.prod(plan.roi_size) / 1e6
        return StepCost(step_s=0.1 * million * width / 32, memory_gib=1.0 + 1.1 * million)

    monkeypatch.setattr(measurements, "measure_step", measure)
    data = SETS[name]
    for algo in FOLLOWING:
        inputs = PlanInputs(
            algo=algo,
            fold=0,
            num_train=data.cases,
            fingerprint=fingerprint_of(data),
            label_map=LabelMap(names=("a",), values=((1,),), sigmoid=False),
            settings=Settings(modality="MRI", datalist="d", dataroot="r"),  # type: ignore[arg-type]
            hardware=GPUS[memory_gib],
            budget_s=600.0,
        )
        plan, _ = fit.fitted_plan(torch.device("cpu"), inputs)
        assert plan.step_s is not None
        assert 0.8 * 600 / plan.step_s >= 2000, (algo, plan.roi_size, plan.batch_size)


@given(
    width=st.integers(4, 600),
    height=st.integers(4, 600),
    slices=st.integers(1, 400),
    thickness_mm=st.floats(0.2, 12),
    on_gpu=st.booleans(),
    rung=st.integers(0, 3),
)
@example(width=48, height=48, slices=48, thickness_mm=5.0, on_gpu=True, rung=3)
@example(width=32, height=32, slices=24, thickness_mm=10.0, on_gpu=True, rung=3)
@example(width=32, height=32, slices=80, thickness_mm=4.0, on_gpu=False, rung=2)
@settings(max_examples=150)
def test_segresnet_is_built_as_its_topology_says(
    width: int, height: int, slices: int, thickness_mm: float, on_gpu: bool, rung: int
) -> None:
    """MONAI halves some axis in each stage, so one stage too many would halve all axes once more."""
    size = (segresnet.GPU_RUNGS if on_gpu else segresnet.RUNGS)[rung]
    facts = sizing((width, height, slices), (1.0, 1.0, thickness_mm), on_gpu=on_gpu, size=size)
    _, most_stages, max_voxels = segresnet.rung_of(facts, segresnet.MOST_GPU_STAGES)
    least_voxels = segresnet.LEAST_VOXELS[on_gpu]
    _, topology = patch_and_topology(facts, max_voxels, most_stages=most_stages, least_voxels=least_voxels)
    choice = segresnet.choose(facts)
    with torch.device("meta"):
        built: Any = segresnet.build(1, 2, choice.network | {"init_filters": 8})
    assert tuple(built.shape_factor()) == segresnet.divisor(choice.network) == topology.divisor
    assert all(s == 1 or r // s >= LEAST_VOXELS for r, s in zip(choice.roi_size, topology.divisor, strict=True))
    assert len(heads("segresnet", built)) >= choice.network["dsdepth"]


@pytest.mark.parametrize("name", ["acdc", "two_slices", "one_slice", "hippocampus", "em"])
def test_the_network_is_built_as_its_topology_says(name: str) -> None:
    """MONAI's SegResNet halves as often as the rule, from the spacing it is given; both give the patch's shape back."""
    for algo in FOLLOWING:
        plan = planned(name, algo, None)
        roi = tuple(2 * s for s in divisor(plan))
        network = build_network(plan).eval()
        with torch.no_grad():
            assert network(torch.zeros(1, len(plan.channels), *roi)).shape == (1, plan.num_outputs, *roi)


def test_the_resolution_for_monai_is_none_where_all_axes_are_halved_alike() -> None:
    assert resolution_for(topology_for((1, 1, 1), (64, 64, 64))) is None
    assert resolution_for(topology_for((1, 1, 8), (64, 64, 16), most_stages=4)) == [0.125, 0.125, 1.0]


DOCS = Path(__file__).parent.parent / "docs" / "results.md"
ALL_ROUNDED = "the image rounded up"


def plans_section() -> str:
    return DOCS.read_text(encoding="utf-8").split("\n## Plans\n")[1].split("\n## ")[0]


def tables() -> list[list[list[str]]]:
    """The cells of that section's tables, row by row, without their heads."""
    blocks = re.findall(r"(?:^\|.*\n)+", plans_section(), flags=re.MULTILINE)
    return [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()[2:]] for block in blocks
    ]


def triple(text: str, sign: str = "x") -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(sign))


def key_of(name: str) -> str:
    return name.lower().replace(" ", "_")


def test_the_plans_in_the_docs_are_the_planners() -> None:
    rows = tables()[0]
    assert len(rows) >= 9
    name = ""
    for described, network, device, patch, batch, steps, divided in rows:
        if described:
            found = re.fullmatch(r"([^,]+), (\d+x\d+x\d+) at ([\d.x]+) mm", described)
            assert found, described
            name, spacing = key_of(found[1]), found[3]
            assert triple(found[2]) == SETS[name].shape
            assert spacing in ("x".join(f"{mm:g}" for mm in SETS[name].spacing_mm), f"{SETS[name].spacing_mm[0]:g}")
        plan = planned(name, network.lower(), None if device == "CPU" else float(device.removesuffix(" GB")))  # type: ignore[arg-type]
        planned_steps = plan.num_epochs * plan.num_steps_per_epoch
        assert (triple(patch), int(batch)) == (plan.roi_size, plan.batch_size), (name, network, device)
        assert (steps, triple(divided, ", ")) == (f"{planned_steps:,}", divisor(plan)), (name, network, device)


def test_the_patches_in_the_docs_are_the_planners_and_nnunets() -> None:
    seen: list[str] = []
    for names, theirs, at_16, from_24, share in tables()[1]:
        for name in map(key_of, names.split(", cropped")[0].split(", ")):
            seen.append(name)
            rois = [planned(name, "resenc", gib).roi_size for gib in GPUS]
            if theirs == ALL_ROUNDED:
                assert (at_16, from_24) == ("the same", "the same")
                assert set(rois) == {RESENC[name]}
            else:
                assert triple(theirs) == RESENC[name]
                assert [triple(at_16), triple(from_24), triple(from_24)] == rois, name
            assert share == f"{math.prod(rois[1]) / math.prod(RESENC[name]):.2f}", name
    assert sorted(seen) == sorted(RESENC)


def test_what_a_cpu_lacks_is_said_as_it_is() -> None:
    """In docs/results.md: in an hour few steps of small patches, where published sizes would take five."""
    plans = {name: planned(name, "segresnet", None) for name in SHORT_ON_A_CPU}
    steps = [plan.num_epochs * plan.num_steps_per_epoch for plan in plans.values()]
    shares = [math.prod(plan.roi_size) / math.prod(RESENC[name]) for name, plan in plans.items()]
    text = " ".join(plans_section().split())
    assert f"{min(steps):,} to {max(steps):,} steps for {len(plans)} of the 12 sets" in text
    assert f"{min(shares):.2f} to {max(shares):.2f} of ResEnc L's voxels" in text
