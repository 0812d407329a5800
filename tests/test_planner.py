"""The planner's rules on data sets whose right answer is published or plain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from analysis_data import DataSet
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import CPU, GPU, make_fingerprint, plan_and_origins

from autoseg.algos.draft import Fit
from autoseg.algos.rules.images import WIDENED, target_spacing
from autoseg.config.hyperparameters import Hyperparameters
from autoseg.config.networks import ALGOS, NETWORKS, AlgoName
from autoseg.config.reader import read_model
from autoseg.config.templates import read_template_text, recipe_values, template_values
from autoseg.data.fingerprint import ForegroundIntensity
from autoseg.data.preprocess import ChannelNorm, normalize
from autoseg.errors import ConfigError
from autoseg.export.bundle import write_bundle
from autoseg.networks import build_network, divisor, network_file
from autoseg.plan import OLDER_PLANS, ClassPlan, Origin, Plan, read_plan
from autoseg.workspace.files import write_yaml
from autoseg.workspace.jobs import JobDir

HIPPOCAMPUS = make_fingerprint(
    num_cases=200,
    size_mm_median=(35.0, 50.0, 35.5),
    size_mm_p90=(38.0, 54.0, 41.0),
    shape_median=(35, 50, 36),
)


def test_hippocampus_on_two_cores() -> None:
    plan, _ = plan_and_origins("segresnet", fingerprint=HIPPOCAMPUS, num_train=160)
    assert plan.roi_size == (28, 40, 28)  # half the median image; nnU-Net plans 40x56x40, the whole
    assert plan.network["init_filters"] == 16
    assert plan.network["blocks_down"] == [1, 2, 2]
    assert plan.batch_size == 4
    assert plan.num_steps_per_epoch == 40
    assert plan.foreground_fraction == 0.67
    assert plan.channels[0].mode == "mri"
    assert not plan.channels[0].nonzero


def test_two_stage_draws_all_cases_alike_as_its_paper_does() -> None:
    shares = {s: plan_and_origins("segresnet", strategy=s)[0].annotators_share for s in ("two_stage", "both")}
    assert shares == {"two_stage": 0.0, "both": 0.5}


def test_thick_slices_keep_their_tenth_percentile() -> None:
    thick = make_fingerprint(
        spacing_mm_median=(0.7, 0.7, 5.0), spacing_mm_p10=(0.6, 0.6, 2.5), shape_median=(512, 512, 60)
    )
    spacing, rule = target_spacing(thick)
    assert spacing == (0.7, 0.7, 2.5)
    assert "axis Z" in rule
    # As many slices as pixels: the axis is coarse but not short, so the median stays.
    assert target_spacing(make_fingerprint(spacing_mm_median=(0.7, 0.7, 5.0), shape_median=(100, 100, 60)))[0][2] == 5.0


def test_cropped_mri_is_normalised_inside_its_head() -> None:
    plan, _ = plan_and_origins("segresnet", fingerprint=make_fingerprint(nonzero_crop_ratio=0.5))
    assert plan.channels[0].nonzero


def test_extra_modalities_have_their_own_normalisation() -> None:
    plan, _ = plan_and_origins(
        "dints", fingerprint=make_fingerprint(num_channels=2), modality="CT", extra_modalities={"image2": "pet"}
    )
    assert [c.mode for c in plan.channels] == ["ct", "pet"]
    assert plan.channels[0].bounds == (5.0, 95.0)


def ct_with(place: tuple[slice, slice, slice], targets: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A body of fat and muscle in air, and in it, at one place, the targets; image and label."""
    rng = np.random.default_rng(seed)
    image = np.full((24, 22, 20), -1000, np.int16)
    image[4:20, 4:18, 4:16] = rng.normal(-100, 10, (16, 14, 12))
    image[8:16, 8:14, 8:12] = rng.normal(60, 10, (8, 6, 4))
    label = np.zeros(image.shape, np.uint8)
    image[place], label[place] = targets, 1
    return image, label


SMALL = (slice(9, 11), slice(9, 11), slice(9, 10))
BRIGHT = np.array([1900, 2300, 2400, 2590]).reshape(2, 2, 1)


def plan_of(root: Path, *cases: tuple[np.ndarray, np.ndarray], **settings: Any) -> tuple[Plan, dict[str, Origin]]:
    """The plan for CTs, from their files."""
    data = DataSet(root=root, num=0, labels={1: "target"})
    for number, (image, label) in enumerate(cases):
        data.add(image=image, label=label, fold=number)
    fingerprint = data.analyze(strict=True, modality="CT").fingerprint
    return plan_and_origins("segresnet", fingerprint=fingerprint, modality="CT", **settings)


@pytest.mark.parametrize("values", [BRIGHT, np.full((2, 2, 1), 3071)])
def test_a_ct_of_small_bright_targets_keeps_the_contrast_of_the_body(tmp_path: Path, values: np.ndarray) -> None:
    plan, origins = plan_of(tmp_path, *(ct_with(SMALL, values, seed) for seed in range(3)))
    channel = plan.channels[0]
    assert channel.bounds is not None
    low, high = channel.bounds
    assert (low, high) == (-1000, pytest.approx(np.percentile(np.tile(values.ravel(), 3), 99.5)))
    assert plan.image_ranges == ((low, high),)
    hidden = f"the foreground alone, {np.percentile(np.tile(values.ravel(), 3), 0.5):g} to {high:g}, would hide"
    assert origins["channels"].origin == "planner"
    assert origins["channels"].rule.startswith(hidden)
    norm = ChannelNorm(**channel.model_dump())
    air, fat, muscle, metal = normalize(np.array([-1000, -100, 60, 3071], np.float32), norm, None)
    assert (air, metal) == (-2, 2)
    assert 0.1 < muscle - fat < 0.5


def test_bounds_of_an_organ_are_its_own(tmp_path: Path) -> None:
    place = (slice(8, 12), slice(8, 14), slice(8, 12))
    cases = [ct_with(place, np.random.default_rng(9).normal(80, 20, (4, 6, 4)), seed) for seed in range(3)]
    plan, origins = plan_of(tmp_path, *cases)
    inside = np.concatenate([image[label == 1] for image, label in cases])
    assert plan.channels[0].bounds == pytest.approx(tuple(np.percentile(inside, [0.5, 99.5])))
    assert (plan.channels[0].mean, plan.channels[0].std) == pytest.approx((inside.mean(), inside.std()))
    assert WIDENED not in origins["channels"].rule


@pytest.mark.parametrize(("num", "user"), [(40, None), (2, None), (40, (-50.0, 150.0))])
def test_a_binarised_ct_has_bounds_that_differ(tmp_path: Path, num: int, user: tuple[float, float] | None) -> None:
    """Also where fewer voxels than its percentiles count are of the other value; a user's bounds stay."""
    image, label = np.full((20, 20, 20), 100, np.int16), np.ones((20, 20, 20), np.uint8)
    image.flat[:num] = 0
    label.flat[:2000] = 0
    bounds = {} if user is None else {"intensity_bounds": user, "origins": {"intensity_bounds": "input.yaml:3"}}
    plan, origins = plan_of(tmp_path, (image, label), (np.roll(image, 1), label), **bounds)
    low, high = plan.channels[0].bounds or (0, 0)
    assert (low, high) == (user or (0, 100))
    assert (plan.channels[0].mean, plan.channels[0].std) == ((low + high) / 2, (high - low) / 4)
    assert origins["channels"].origin == ("planner" if user is None else "input.yaml:3")


def test_images_of_one_value_alone_are_refused() -> None:
    one = ForegroundIntensity(mean=7.0, std=0.0, min=7.0, p00_5=7.0, median=7.0, p99_5=7.0, max=7.0)
    fingerprint = make_fingerprint(foreground=(one,), background=())
    with pytest.raises(ConfigError, match="every voxel of the training images has the value 7"):
        plan_and_origins("segresnet", fingerprint=fingerprint, modality="CT")


def test_an_edited_plan_with_equal_bounds_is_refused(tmp_path: Path) -> None:
    plan = plan_and_origins("segresnet", modality="CT")[0].model_dump(mode="json")
    plan["channels"][0]["bounds"] = [100.0, 100.0]
    write_yaml(JobDir(tmp_path).plan, plan)
    with pytest.raises(ConfigError, match="expected the lower bound first, then a higher one"):
        read_plan(JobDir(tmp_path))


def test_a_user_wins_over_the_planner_and_is_named() -> None:
    plan, found = plan_and_origins(
        "segresnet", roi_size=(24, 24, 24), learning_rate=0.5, segresnet={"learning_rate": 0.25, "init_filters": 12}
    )
    assert plan.roi_size == (24, 24, 24)
    assert plan.learning_rate == 0.25
    assert plan.network["init_filters"] == 12
    assert found["learning_rate"].origin == "input.yaml"
    assert found["weight_decay"].origin == "template"
    assert found["batch_size"].origin == "planner"


def test_every_value_has_an_origin_and_every_derived_one_a_rule() -> None:
    for algo in ALGOS:
        for hardware in (CPU, GPU):
            plan, found = plan_and_origins(algo, hardware=hardware)
            keys = {*plan.model_dump(), *(f"network.{k}" for k in plan.network)} - {"network"}
            assert keys == set(found)
            assert not [key for key, origin in found.items() if not origin.rule]


@pytest.mark.parametrize("algo", ALGOS)
def test_the_filled_template_reads_back_as_the_plan(algo, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    plan, found = plan_and_origins(algo, modality="CT", budget_s=61.5)
    paths = JobDir(tmp_path)
    merged = {"user_classes": (ClassPlan(name="a", values=(1,)), ClassPlan(name="b", values=(2,)))}
    plan = plan.model_copy(update=merged)
    write_bundle(plan, found, plan.model_dump(mode="json"), paths)
    assert read_model(paths.plan, Plan) == plan
    text = paths.plan.read_text()
    assert "<planner>" not in text.split("\n\n", 1)[1]
    assert text.count("  # ") >= len(plan.model_dump()) - 2
    origins = yaml.safe_load(paths.origins.read_text())
    assert origins["budget_s"]["value"] == 61.5


@given(
    size=st.tuples(*[st.floats(5, 900)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 6)] * 3),
    on_gpu=st.booleans(),
    algo=st.sampled_from(ALGOS),
)
@settings(max_examples=60)
def test_any_data_set_gets_a_valid_plan(size, spacing, on_gpu, algo) -> None:  # type: ignore[no-untyped-def]
    data = make_fingerprint(
        size_mm_median=size,
        size_mm_p90=size,
        **{f"spacing_mm_{k}": spacing for k in ("min", "p10", "median", "max")},
    )
    plan, _ = plan_and_origins(algo, fingerprint=data, hardware=GPU if on_gpu else CPU)
    steps = divisor(plan)
    assert all(r % d == 0 for r, d in zip(plan.roi_size, steps, strict=True))
    limit = 7.3e6 * 5 if on_gpu else 64**3
    # At least one step of the network along each axis, and one axis of two for SwinUNETR.
    assert plan.roi_size[0] * plan.roi_size[1] * plan.roi_size[2] <= max(limit, 2 * steps[0] * steps[1] * steps[2])


@pytest.mark.parametrize("algo", ["segresnet", "swinunetr", "dints", "unet"])
def test_small_images_are_averaged_over_mirrorings(algo: AlgoName) -> None:
    plan, origins = plan_and_origins(algo)
    assert plan.tta
    assert "passes for the median image" in origins["tta"].rule
    large = (320, 320, 320)
    sizes = {f"shape_{k}": large for k in ("min", "median", "p90", "max")}
    sizes |= {f"size_mm_{k}": (320.0, 320.0, 320.0) for k in ("median", "p90")}
    assert not plan_and_origins(algo, fingerprint=make_fingerprint(**sizes))[0].tta
    assert not plan_and_origins(algo, tta=False)[0].tta


def test_the_locator_is_not_averaged_over_mirrorings() -> None:
    assert not plan_and_origins("locator")[0].tta


def test_a_patch_of_the_users_is_rounded_up_to_what_the_network_can_halve() -> None:
    plan, found = plan_and_origins("segresnet", roi_size=(30, 32, 33), segresnet={"blocks_down": (1, 2, 2)})
    assert plan.roi_size == (32, 32, 36)
    assert found["roi_size"].origin == "input.yaml"
    assert found["roi_size"].rule == "30x32x33 rounded up to what the network can halve: multiples of 4, 4, 4"
    swin, _ = plan_and_origins("swinunetr", roi_size=(20, 20, 20))
    assert swin.roi_size == (32, 32, 32)
    plan, found = plan_and_origins("segresnet", roi_size=(32, 32, 32), segresnet={"blocks_down": (1, 2, 2)})
    assert found["roi_size"].rule == ""


@pytest.mark.parametrize("algo", ALGOS)
def test_every_network_trains_on_the_smallest_patch_that_is_accepted(algo: AlgoName) -> None:
    """One voxel at the coarsest stage has no variance to normalise by: that is said, and two are enough."""
    plan, _ = plan_and_origins(algo)
    steps = divisor(plan)
    smallest = steps
    if algo != "swinunetr":  # which normalises groups of features there
        with pytest.raises(ConfigError, match=rf"leaves {algo} one voxel .* Give at least {2 * steps[0]} along X"):
            plan_and_origins(algo, roi_size=steps)
        smallest = (2 * steps[0], steps[1], steps[2])
    plan, _ = plan_and_origins(algo, roi_size=smallest)
    assert plan.roi_size == smallest
    build_network(plan).train()(torch.randn(2, 1, *plan.roi_size))


def test_tiny_images_get_a_patch_that_can_be_normalised() -> None:
    tiny = make_fingerprint(**{f"size_mm_{k}": (6.0, 6.0, 4.0) for k in ("median", "p90")}, shape_median=(6, 6, 4))
    for algo in ALGOS:
        plan, _ = plan_and_origins(algo, fingerprint=tiny)
        build_network(plan).train()(torch.randn(2, 1, *plan.roi_size))


def test_a_batch_is_one_that_the_processes_of_a_job_can_share() -> None:
    plan, found = plan_and_origins("segresnet", hardware=GPU, gpus_per_job=3)
    assert plan.batch_size % 3 == 0
    assert "multiples of 3: gpus_per_job" in found["batch_size"].rule
    with pytest.raises(ConfigError, match="batch_size 4 cannot be shared by 3 GPUs"):
        plan_and_origins("segresnet", hardware=GPU, gpus_per_job=3, batch_size=4)


def test_a_long_budget_is_not_cut_short_by_the_number_of_epochs() -> None:
    plan, _ = plan_and_origins("segresnet", budget_s=86400.0, fit=Fit(step_s=0.1))
    assert plan.num_epochs * plan.num_steps_per_epoch >= 3 * 86400 / 0.1
    short, _ = plan_and_origins("segresnet", budget_s=60.0, fit=Fit(step_s=0.1))
    assert short.num_epochs * short.num_steps_per_epoch >= 3 * 60 / 0.1
    fixed, _ = plan_and_origins("segresnet", budget_s=86400.0, fit=Fit(step_s=0.1), num_epochs=7)
    assert fixed.num_epochs == 7


def test_a_job_that_goes_on_from_weights_has_their_network() -> None:
    wide, _ = plan_and_origins("segresnet", segresnet={"init_filters": 24, "blocks_down": (1, 2)})
    plan, found = plan_and_origins("segresnet", fit=Fit(size=-2), earlier=wide)
    assert plan.network == wide.network
    assert found["network.init_filters"].rule == "that of the weights it starts from"


def test_an_edit_of_the_networks_own_values_is_checked_like_the_settings(tmp_path: Path) -> None:
    plan, origins = plan_and_origins("segresnet")
    paths = JobDir(tmp_path)
    write_bundle(plan, origins, plan.model_dump(mode="json"), paths)
    text = paths.plan.read_text()
    assert "init_filters: 16" in text
    paths.plan.write_text(text.replace("init_filters: 16", "init_filters: 2"))
    line = 1 + next(i for i, line in enumerate(text.splitlines()) if "init_filters: 16" in line)
    fault = f":{line}: network: init_filters: expected a whole number >= 4 and <= 2048, found 2"
    with pytest.raises(ConfigError, match=fault):
        read_plan(paths)


def test_a_plan_of_the_first_versions_is_read_as_it_was_trained(tmp_path: Path) -> None:
    plan, origins = plan_and_origins("unet", optimizer="adamw", strategy="two_stage")
    paths = JobDir(tmp_path)
    write_bundle(plan, origins, plan.model_dump(mode="json"), paths)
    values = yaml.safe_load(paths.plan.read_text())
    paths.plan.write_text(yaml.safe_dump({key: value for key, value in values.items() if key not in OLDER_PLANS}))
    assert read_plan(paths) == plan.model_copy(update={"lateral_pairs": None})


def test_the_channels_have_the_place_of_the_setting_that_made_them() -> None:
    places = {"normalize_mode": "default", "intensity_bounds": "input.yaml:7"}
    plan, origins = plan_and_origins("dints", modality="CT", origins=places, intensity_bounds=(-50.0, 50.0))
    assert plan.channels[0].bounds == (-50.0, 50.0)
    assert origins["channels"].origin == "input.yaml:7"


def test_a_template_wins_over_a_rule_and_loses_to_the_user() -> None:
    """The locator's template fixes its voxels, which for other networks a rule plans."""
    plan, origins = plan_and_origins("locator", fingerprint=HIPPOCAMPUS)
    assert plan.resample_resolution == (4.0, 4.0, 4.0)
    assert origins["resample_resolution"].origin == "template"
    top, _ = plan_and_origins("locator", fingerprint=HIPPOCAMPUS, resample_resolution=(2.0, 2.0, 2.0))
    assert top.resample_resolution == (4.0, 4.0, 4.0)  # the top level's is not for it
    own, origins = plan_and_origins("locator", locator={"resample_resolution": (3.0, 3.0, 3.0)})
    assert own.resample_resolution == (3.0, 3.0, 3.0)
    assert origins["resample_resolution"].origin == "input.yaml"


@pytest.mark.parametrize("algo", NETWORKS)
def test_a_networks_template_has_a_line_for_each_key_of_a_plan_and_no_other(algo: AlgoName) -> None:
    assert set(template_values(algo)) == set(Plan.model_fields)
    own = [line for line in read_template_text(algo, "hyper_parameters.yaml").splitlines() if line][1:]
    common = read_template_text("common", "hyper_parameters.yaml").splitlines()
    assert not set(own) & set(common)  # what is common is known once


@pytest.mark.parametrize("algo", NETWORKS)
def test_a_networks_file_has_what_the_planner_needs(algo: AlgoName) -> None:
    file, row = network_file(algo), NETWORKS[algo]
    assert 0 in file.RUNGS
    assert 0 in file.GPU_RUNGS
    assert file.LEARNING_RATES.source
    assert file.SECONDS_PER_MEGAVOXEL > 0
    plan, origins = plan_and_origins(algo)
    assert set(row.own.model_fields) <= set(plan.network)  # each of its own hyperparameters is planned
    assert {f"network.{key}" for key in plan.network} <= set(origins)
    for recipe in row.recipes:
        values = recipe_values(algo, recipe)
        assert {key for key in values if not key.startswith("network.")} <= set(Hyperparameters.model_fields)
        assert {key.removeprefix("network.") for key in values if key.startswith("network.")} <= set(plan.network)


def test_a_resolution_of_which_no_image_can_be_made_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        plan_and_origins("segresnet", resample_resolution=(1e-9, 1.0, 1.0), origins={"resample_resolution": "a.yaml:7"})
    assert str(error.value) == (
        "a.yaml:7: resample_resolution: at 1e-09x1x1 mm the median image of 32x32x32 mm has over 1e+10 voxels. "
        "Expected a voxel size in mm near that of the images, 1x1x1."
    )


@pytest.mark.parametrize(
    ("settings", "axes", "tta"),
    [
        ({"num_epochs": 749, "num_steps_per_epoch": 4}, (), False),
        ({"num_epochs": 750, "num_steps_per_epoch": 4}, (0,), True),
        ({"num_epochs": 10, "mirror_axes": (0, 1)}, (0, 1), True),
    ],
)
def test_short_schedules_mirror_nothing(settings: dict[str, Any], axes: tuple[int, ...], tta: bool) -> None:
    plan, origins = plan_and_origins("segresnet", **settings)
    assert (plan.mirror_axes, plan.tta) == (axes, tta)
    if not axes:
        rule = "none in 2996 steps: under 3000 a network learns more without (measured)"
        assert origins["mirror_axes"].rule == rule


def test_a_budget_that_leaves_few_steps_mirrors_nothing() -> None:
    for budget_s, axes in ((300.0, ()), (30_000.0, (0,))):
        assert plan_and_origins("segresnet", budget_s=budget_s)[0].mirror_axes == axes


@pytest.mark.parametrize(
    ("shape", "hardware", "begin", "end"),
    [
        ((32, 32, 2), CPU, "the whole median image, rounded up: a patch may have 0.0328 M voxels", ""),
        (
            (128, 128, 128),
            CPU,
            "the median image, cut to 0.262 M voxels (half of it on a CPU, 32^3 to 64^3",
            "measured)",
        ),
        ((128, 128, 3000), GPU, "the median image, cut to 4.2 M voxels (", "as long as wide at most (nnU-Net)"),
    ],
)
def test_a_patchs_rule_says_what_made_it(shape: tuple[int, int, int], hardware: Any, begin: str, end: str) -> None:
    sizes = {f"size_mm_{k}": tuple(map(float, shape)) for k in ("median", "p90")}
    _, origins = plan_and_origins("segresnet", hardware=hardware, fingerprint=make_fingerprint(**sizes))
    rule = origins["roi_size"].rule
    assert rule.startswith(begin)
    assert rule.endswith(end)
    assert ("256 mm long" in rule) == (max(shape) == 3000)


@pytest.mark.parametrize(
    ("num_epochs", "steps", "chosen", "begin"),
    [
        (29, 100, "light", "light: 2,900 steps, about 29 passes over the cases, are too few to learn them by heart"),
        (30, 100, "default", "nnU-Net's probabilities and ranges: 3,000 steps, about 30 passes over the cases, are en"),
        (59, 5, "light", "light: 295 steps, about 59 passes over the cases, are too few to learn them by heart"),
        (60, 5, "default", "nnU-Net's probabilities and ranges: 300 steps, about 60 passes over the cases, are enough"),
    ],
)
def test_the_rule_of_augmentation_begins_with_what_applies(
    num_epochs: int, steps: int, chosen: str, begin: str
) -> None:
    plan, origins = plan_and_origins("segresnet", num_epochs=num_epochs, num_steps_per_epoch=steps)
    assert plan.augment == chosen
    assert origins["augment"].rule.startswith(begin)
