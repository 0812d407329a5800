"""What makes inference quick: crops, windows that are skipped, options; each against the engine without it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_jobs import make_job
from torch import nn

from autoseg.config.settings import InferenceSettings
from autoseg.data.grid import Grid, Volume
from autoseg.data.labels import check_classes
from autoseg.data.streams import MemoryImage
from autoseg.errors import ConfigError
from autoseg.inference import regions
from autoseg.inference.options import Options, options_of
from autoseg.inference.postprocess import ClassRule
from autoseg.inference.predictor import Predictor
from autoseg.inference.regions import region_of, without_specks
from autoseg.inference.windows import ProbRows, WindowModel

CPU = torch.device("cpu")
SHAPE = (40, 36, 64)


class Threshold(nn.Module):
    """Class a where the image is above 0.5, class b where it is above 1.5; counts its windows."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.windows, self.classes = 0, classes

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.windows += len(image)
        levels = [torch.zeros_like(image), 20 * (image - 0.5), 40 * (image - 1.0)]
        return torch.cat(levels[: self.classes + 1], 1)


def volume() -> Volume:
    array = np.zeros((1, *SHAPE), np.float32)
    array[0, 12:22, 10:20, 30:44] = 1.0
    array[0, 14:18, 12:16, 33:38] = 2.0
    return Volume(array=array, grid=Grid(shape=SHAPE, affine=np.eye(4)))


CLASSES = [{"name": "a", "values": [1]}, {"name": "b", "values": [2]}]
PLAN = {
    "classes": CLASSES,
    "channels": [{"mode": "range", "bounds": [0, 1]}],
    "resample_resolution": (1, 1, 1),
    "roi_size": (16, 16, 16),
}


def predictor_of(tmp_path: Path, num: int = 1, *, locator: bool = False, **more) -> Predictor:
    jobs = [make_job(tmp_path, "segresnet", i, seed=i, **PLAN) for i in range(num)]
    region = [{"name": "region", "values": [1, 2]}]
    finder = make_job(tmp_path, "locator", 0, **{**PLAN, "classes": region, "resample_resolution": (4, 4, 4)})
    found = Predictor(jobs, device="cpu", locator=finder if locator else None, **more)
    for model in found.models:
        object.__setattr__(model, "network", Threshold())
    if found.locator is not None:
        object.__setattr__(found.locator, "network", Threshold(1))
    return found


def labels_of(predictor: Predictor) -> np.ndarray:
    return predictor.predict_labels(volume())


def windows_of(predictor: Predictor) -> int:
    return sum(model.network.windows for model in predictor.models)


@pytest.fixture
def wanted(tmp_path: Path) -> tuple[np.ndarray, int]:
    plain = predictor_of(tmp_path)
    return labels_of(plain), windows_of(plain)


def test_plain(wanted) -> None:
    labels, windows = wanted
    # Bounds 0..1 clip the 2 of class b to 1: nothing is b here.
    np.testing.assert_array_equal(labels, (volume().array[0] > 0.5).astype(np.uint8))
    assert windows == 3 * 3 * 5  # a quarter's overlap


def test_no_overlap(tmp_path: Path, wanted) -> None:
    predictor = predictor_of(tmp_path, options=Options(overlap=0.0))
    np.testing.assert_array_equal(labels_of(predictor), wanted[0])
    assert windows_of(predictor) == 3 * 3 * 4


def test_one_empty_window_stands_for_all(tmp_path: Path, wanted) -> None:
    predictor = predictor_of(tmp_path, options=Options(skip_empty=True))
    np.testing.assert_array_equal(labels_of(predictor), wanted[0])
    assert 1 < windows_of(predictor) <= 1 + 2 * 2 * 2  # one of them to see what is found in nothing


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("overlap", [0.0, 0.5])
@pytest.mark.parametrize("axis", [0, 2])
def test_skipping_changes_no_probability(sigmoid: bool, overlap: float, axis: int) -> None:
    """Not even of a network that sees something in nothing."""

    class Odd(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            ramp = torch.arange(image[0, 0].numel()).reshape(image.shape[2:]) / 1000
            inside = image + ramp
            return inside if sigmoid else torch.cat([torch.zeros_like(image), inside], 1)

    image = torch.from_numpy(volume().array)
    found = []
    for background in (None, (0.0,)):
        model = WindowModel([Odd()], num_outputs=1 if sigmoid else 2, sigmoid=sigmoid, device=CPU, precision="fp32")
        rows = ProbRows(
            model, lambda a, b: image.narrow(axis + 1, a, b - a), SHAPE, axis, roi_size=(16, 16, 16), overlap=overlap,
            background=background,
        )  # fmt: skip
        found.append(torch.cat([rows.rows(i, i + 1) for i in range(SHAPE[axis])]))
        assert (rows.num_skipped > 0) == (background is not None)
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("channel", "level", "skipped"),
    [
        ({"mode": "ct", "bounds": [0, 2], "mean": 1.0, "std": 1.0}, -50.0, True),
        ({"mode": "mri", "nonzero": True}, 0.0, True),
        ({"mode": "meanstd"}, -7.0, True),  # the image's smallest value
        ({"mode": "none"}, 0.0, False),
    ],
)
def test_what_counts_as_background(tmp_path: Path, channel, level: float, skipped: bool) -> None:
    job = make_job(tmp_path, "segresnet", 0, **{**PLAN, "channels": [channel]})
    predictor = Predictor([job], device="cpu", options=Options(skip_empty=True))
    object.__setattr__(predictor.models[0], "network", Threshold())
    image = volume()
    image.array[image.array == 0] = level
    labels = predictor.predict_labels(image)
    assert (labels[12:22, 10:20, 30:44] > 0).any()
    assert (windows_of(predictor) < 3 * 3 * 5) == skipped


def test_the_locator_crops(tmp_path: Path, wanted) -> None:
    # The finding with 16 mm around it; nothing is left of its margin at the borders.
    plane = (slice(0, 38), slice(0, 36))
    for anywhere, region in ((), (*plane, slice(14, 60))), (("b",), (*plane, slice(0, 64))):
        predictor = predictor_of(tmp_path, locator=True, options=Options(locate=True, anywhere=anywhere))
        found = predictor.locate(MemoryImage(volume()))
        assert found is not None
        for here, there in zip(found, region, strict=True):
            assert abs(here.start - there.start) <= 4  # a voxel of the locator
            assert abs(here.stop - there.stop) <= 4
        np.testing.assert_array_equal(labels_of(predictor), wanted[0])
        assert (found[2] == slice(0, 64)) == bool(anywhere)
    assert windows_of(predictor) <= wanted[1]


def test_a_locator_that_finds_nothing_crops_nothing(tmp_path: Path, wanted) -> None:
    predictor = predictor_of(tmp_path, locator=True, options=Options(locate=True))
    assert predictor.locator is not None
    predictor.locator.network.classes = 1

    class Nothing(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return torch.cat([torch.ones_like(image), torch.zeros_like(image)], 1)

    object.__setattr__(predictor.locator, "network", Nothing())
    assert predictor.locate(MemoryImage(volume())) is None
    np.testing.assert_array_equal(labels_of(predictor), wanted[0])


def test_normalisation_of_a_crop_is_the_whole_images(tmp_path: Path) -> None:
    job = make_job(tmp_path, "segresnet", 0, **{**PLAN, "channels": [{"mode": "meanstd"}]})
    predictor = Predictor([job], device="cpu")
    image = MemoryImage(volume())
    whole, _ = predictor._rows(image, predictor.models, None)
    part, box = predictor._rows(image, predictor.models, (slice(8, 40), slice(0, 36), slice(20, 60)))
    assert box == (slice(8, 40), slice(0, 36), slice(20, 60))
    torch.testing.assert_close(whole._fetch(20, 60)[:, 8:], part._fetch(0, 40))


@pytest.mark.parametrize("combine", ["mean", "vote"])
@pytest.mark.parametrize("kept", [True, False])
def test_later_models_look_where_the_first_found_something(tmp_path: Path, wanted, monkeypatch, combine, kept) -> None:
    if not kept:
        monkeypatch.setattr(regions, "KEPT_VALUES", 1)
    predictor = predictor_of(tmp_path, 3, combine=combine, options=Options(crop_to_first=True))
    np.testing.assert_array_equal(labels_of(predictor), wanted[0])
    first, *others = (model.network.windows for model in predictor.models)
    assert others[0] == others[1] == 3 * 3 * 4
    assert first == wanted[1] + (0 if kept else 3 * 3 * 4)


@pytest.mark.parametrize(
    ("options", "locator"),
    [
        (Options(crop_to_first=True), False),
        (Options(locate=True), True),
        (Options(locate=True, crop_to_first=True), True),
    ],
)
@pytest.mark.parametrize("kept", [True, False])
def test_what_is_done_never_shrinks_while_the_region_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Options, locator: bool, kept: bool
) -> None:
    """Windows that are not laid out yet count as over all of the image, so that the time left is no jump backwards."""
    if not kept:
        monkeypatch.setattr(regions, "KEPT_VALUES", 1)
    predictor = predictor_of(tmp_path, 3, locator=locator, options=options)
    shares: list[float] = []
    predictor.clock.watch = shares.append
    labels_of(predictor)
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert min(shares) < 0.1


def test_fewer_models(tmp_path: Path) -> None:
    predictor = predictor_of(tmp_path, 3, options=Options(num_models=2))
    labels_of(predictor)
    assert [model.network.windows > 0 for model in predictor.models] == [True, True, False]


def test_rules_clean_what_is_predicted(tmp_path: Path, wanted) -> None:
    assert (wanted[0] == 1).sum() == 1400
    assert not labels_of(predictor_of(tmp_path, rules=[ClassRule(name="a", min_voxels=1401)])).any()


# -- regions


def test_regions_are_widened_to_a_window_and_stay_inside() -> None:
    found = np.zeros((10, 10, 10), bool)
    found[0, 4:6, 9] = True
    box = (slice(0, 100), slice(0, 100), slice(0, 100))
    region = region_of(found, box, (100, 100, 100), (1.0, 4.0, 1.0), (50, 10, 120))
    # X is widened inside the image, Y is the finding with its margin, Z is smaller than a window.
    assert region == (slice(0, 50), slice(36, 64), slice(0, 100))
    assert region_of(np.zeros_like(found), box, (100, 100, 100), (1.0, 1.0, 1.0), (1, 1, 1)) is None
    moved = (slice(20, 70), slice(0, 100), slice(0, 100))
    assert region_of(found, moved, (100, 100, 100), (1.0, 1.0, 1.0), (1, 1, 1), keep=(2,))[0] == slice(4, 41)  # type: ignore[index]


def test_specks_are_no_finding() -> None:
    found = np.zeros((20, 20, 20), bool)
    found[2:6, 2:6, 2:6], found[15, 15, 15:17], found[10:12, 10:12, 10:12] = True, True, True
    kept = without_specks(found)
    assert not kept[15].any()
    assert kept[10:12, 10:12, 10:12].all()
    assert kept[2:6, 2:6, 2:6].all()


# -- settings


def test_fast_turns_on_what_is_not_set() -> None:
    found = options_of(InferenceSettings(fast=True, skip_empty=False, anywhere=("a",)), has_locator=True)
    wanted = Options(overlap=0.0, mirror=False, locate=True, crop_to_first=True, skip_empty=False, anywhere=("a",))
    assert found == wanted
    assert options_of(InferenceSettings(fast=True, overlap=0.25), has_locator=False).overlap == 0.25
    assert options_of(InferenceSettings(fast=True, mirror=True), has_locator=False).mirror
    assert not options_of(InferenceSettings(fast=True), has_locator=False).locate
    assert options_of(InferenceSettings(), has_locator=True) == Options(skip_empty=True)
    with pytest.raises(ConfigError, match="no locator is trained"):
        options_of(InferenceSettings(locate=True), has_locator=False)


def test_unknown_classes_are_named() -> None:
    settings = InferenceSettings(anywhere=("tumour",), min_voxels={"liver": 3})
    with pytest.raises(ConfigError) as caught:
        check_classes(settings, ("tumor", "liver"))
    assert caught.value.messages == ("inference.anywhere: tumour is no class. Did you mean tumor?",)
