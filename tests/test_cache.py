"""Where preprocessed cases are kept: in memory, on disk, nowhere; the same patches come from all of them."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from plans import make_fingerprint, tiny_plan

from autoseg.data.datalists.cases import Case, case_digest
from autoseg.data.datalists.datalist import read_datalist
from autoseg.data.fingerprint import Fingerprint
from autoseg.data.phantoms import make_phantoms
from autoseg.data.volumes import read_label, write_volume
from autoseg.errors import WorkspaceError
from autoseg.hardware import limits
from autoseg.training import cache
from autoseg.training.cache import (
    CachedCase,
    FreshArray,
    expected_bytes,
    load_cases,
    remove_unused,
    resampling_warnings,
)
from autoseg.training.patches import cut_batch, filled_classes, make_sampler


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, ...]:
    folder = tmp_path_factory.mktemp("data")
    path = make_phantoms(folder, num_cases=4, num_testing=0, shape=(26, 24, 24), num_fold=2)
    words = yaml.safe_load(path.read_text())
    return read_datalist(folder / words["datalist"], folder / words["dataroot"]).training


def plan(**changes):  # type: ignore[no-untyped-def]
    return tiny_plan().model_copy(update=changes)


def kind(case: CachedCase) -> str:
    if isinstance(case.image, FreshArray):
        return "anew"
    return "disk" if isinstance(case.image, np.memmap) else "ram"


def patches(opened: list[CachedCase]) -> np.ndarray:
    how = {"seed": 1, "step": 3, "batch_size": 4, "roi": (16, 16, 16)}
    return cut_batch(make_sampler(opened, plan()), indices=range(4), **how).image.numpy()  # type: ignore[arg-type]


def test_each_way_gives_the_same_patches(tmp_path: Path, cases: tuple[Case, ...]) -> None:
    found = {}
    for mode in ("ram", "disk", "off"):
        opened = load_cases(tmp_path / mode, plan(cache=mode), cases, num_workers=1)
        assert {kind(case) for case in opened} == {{"off": "anew"}.get(mode, mode)}
        found[mode] = patches(opened)
    assert np.array_equal(found["ram"], found["disk"])
    assert np.array_equal(found["ram"], found["off"])
    assert not (tmp_path / "off").exists()


@pytest.mark.parametrize("name", ["image", "target", "points"])
@pytest.mark.parametrize("share", [0.0, 0.5], ids=["empty", "cut off"])
def test_a_damaged_array_is_made_anew(
    tmp_path: Path, cases: tuple[Case, ...], name: str, share: float, caplog: pytest.LogCaptureFixture
) -> None:
    good = patches(load_cases(tmp_path, plan(cache="disk"), cases, num_workers=1))
    path = sorted(tmp_path.glob(f"*/*/{name}.npy"))[1]
    whole = path.read_bytes()
    path.unlink()  # the arrays above are still mapped
    path.write_bytes(whole[: int(share * len(whole))])
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(good, patches(load_cases(tmp_path, plan(cache="disk"), cases, num_workers=1)))
    assert "cache: damaged files of 1 case, made anew: " in caplog.text
    assert path.read_bytes() == whole


@pytest.mark.parametrize("mode", ["ram", "off"])
def test_what_annotators_drew_is_known_to_the_sampler(tmp_path: Path, cases: tuple[Case, ...], mode: str) -> None:
    given = [
        replace(cases[0], by_annotators=("sphere",)),
        replace(cases[1], annotated=("sphere",), by_annotators=()),
        cases[2],
    ]
    opened = load_cases(tmp_path, plan(cache=mode), given, num_workers=1)
    assert filled_classes(opened, plan().label_map).tolist() == [[False, True], [True, False], [False, False]]
    assert [list(found) for found in make_sampler(opened, plan(annotators_share=0.5)).by_annotators] == [[0, 2], [2]]
    assert [list(found) for found in make_sampler(opened, plan(annotators_share=0.0)).by_annotators] == [
        [0, 1, 2],
        [0, 2],
    ]


@pytest.mark.parametrize("mode", ["ram", "disk", "off"])
def test_weights_of_voxels_are_kept_beside_the_target(tmp_path: Path, cases: tuple[Case, ...], mode: str) -> None:
    assert cases[0].label is not None
    label = read_label(cases[0].label)
    values = np.random.default_rng(0).integers(0, 101, label.array.shape[1:]).astype(np.uint8)
    path = tmp_path / "weight.nii.gz"
    write_volume(path, values, label.grid)
    soft = replace(cases[0], weight=path)
    same = {"cache": mode, "resample_resolution": label.grid.to_ras().spacing_mm}
    first, second = load_cases(tmp_path / "cache", plan(**same), (soft, cases[1]), num_workers=1)
    assert first.weight is not None
    np.testing.assert_array_equal(np.asarray(first.weight)[0], read_label(path).array[0])
    assert second.weight is None
    assert case_digest(soft) != case_digest(cases[0])


@pytest.mark.parametrize("mode", ["ram", "disk", "off"])
def test_a_class_that_is_lost_in_resampling_is_told(tmp_path: Path, cases: tuple[Case, ...], mode: str) -> None:
    given = []
    for number, case in enumerate(cases[:3]):
        assert case.label is not None
        label = read_label(case.label)
        array = label.array[0].copy()
        if number < 2:
            array[array == 2] = 0
            array[4, 4, 4] = 2  # between the voxels that a coarse grid looks at
        path = tmp_path / f"label_{number}.nii.gz"
        write_volume(path, array, label.grid)
        given.append(replace(case, label=path))
    coarse = plan(cache=mode, resample_resolution=(4.0, 4.0, 4.0))
    for _ in range(2):  # made, and found in the cache
        opened = load_cases(tmp_path / "cache", coarse, given, num_workers=1)
        assert [case.lost.tolist() for case in opened] == [[1], [1], []]
        assert resampling_warnings(opened, coarse) == [
            f"at 4x4x4 mm no voxel of box is left in 2 of the 3 cases that have it ({given[0].name}, {given[1].name}), "
            "so they cannot teach it. Set a finer resample_resolution."
        ]
    fine = plan(cache=mode, resample_resolution=(1.0, 1.0, 1.0))
    assert resampling_warnings(load_cases(tmp_path / "cache", fine, given, num_workers=1), fine) == []


def test_memory_takes_what_the_limit_allows_and_the_first_cases_first(
    tmp_path: Path, cases: tuple[Case, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_cases(tmp_path, plan(), cases, num_workers=1)
    size = [sum(a.nbytes for a in (c.image, c.target, c.points, c.lost)) + 4 * 128 for c in first]
    limit = (size[0] + size[1] + 10) / 2**30
    opened = load_cases(tmp_path, plan(cache_gib=limit), cases, num_workers=1)
    assert [kind(case) for case in opened] == ["ram", "ram", "disk", "disk"]
    monkeypatch.setattr(cache, "available_memory_bytes", lambda: 2 * (size[0] + 10))
    opened = load_cases(tmp_path, plan(), cases, num_workers=1)
    assert [kind(case) for case in opened] == ["ram", "disk", "disk", "disk"]
    monkeypatch.setattr(cache, "available_memory_bytes", lambda: 2 * (sum(size[:2]) + 10))
    opened = load_cases(tmp_path, plan(), cases, num_workers=1)
    assert [kind(case) for case in opened] == ["ram", "ram", "disk", "disk"]
    # Two jobs of three processes each fill the memory together.
    monkeypatch.setenv(limits.JOBS_AT_ONCE, "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setattr(cache, "available_memory_bytes", lambda: 2 * 6 * (size[0] + 10))
    opened = load_cases(tmp_path, plan(), cases, num_workers=1)
    assert [kind(case) for case in opened] == ["ram", "disk", "disk", "disk"]


def test_the_size_is_said_before_it_is_written(
    tmp_path: Path, cases: tuple[Case, ...], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "autoseg")
    opened = load_cases(tmp_path, plan(), cases, num_workers=1)
    assert "preprocessing 4 cases: about 0.00 GiB to write" in caplog.text
    for case, one in zip(cases, opened, strict=True):
        assert expected_bytes(plan(), case) == one.image.nbytes + one.target.nbytes


def test_cases_beyond_the_limit_of_the_disk_are_prepared_anew(
    tmp_path: Path, cases: tuple[Case, ...], caplog: pytest.LogCaptureFixture
) -> None:
    two = sum(expected_bytes(plan(), case) for case in cases[:2])
    opened = load_cases(tmp_path, plan(cache="disk", cache_gib=(two + 10) / 2**30), cases, num_workers=1)
    assert [kind(case) for case in opened] == ["disk", "disk", "anew", "anew"]
    assert "no room for 2 of 4 cases" in caplog.text
    assert patches(opened).shape == (4, 1, 16, 16, 16)


@pytest.mark.parametrize(("cropped", "ratio", "num_anew"), [(True, 0.25, 0), (False, 0.25, 2), (True, None, 2)])
def test_what_is_cropped_away_takes_no_room(
    tmp_path: Path,
    cases: tuple[Case, ...],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    cropped: bool,
    ratio: float | None,
    num_anew: int,
) -> None:
    """By the analysis of the run that the cache belongs to; where there is none, whole images are counted."""

    def read(path: Path) -> Fingerprint:
        assert path == tmp_path / "datastats.yaml"
        if ratio is None:
            raise WorkspaceError("missing")
        return make_fingerprint(nonzero_crop_ratio=ratio)

    monkeypatch.setattr(Fingerprint, "read", read)
    two = sum(expected_bytes(plan(), case) for case in cases[:2])
    how = plan(cache="disk", cache_gib=(two + 10) / 2**30, crop_foreground=cropped)
    load_cases(tmp_path / "cache", how, cases, num_workers=1)
    assert (f"no room for {num_anew} of 4 cases" in caplog.text) == bool(num_anew)


def test_a_case_prepared_anew_is_prepared_once_for_image_and_target(
    tmp_path: Path, cases: tuple[Case, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = load_cases(tmp_path, plan(cache="off"), cases, num_workers=1)
    calls: list[str] = []
    prepare = cache._prepare
    monkeypatch.setattr(cache, "_prepare", lambda p, case: (calls.append(case.name), prepare(p, case))[1])
    for _ in range(2):
        np.asarray(opened[0].image, np.float32)
        opened[0].target[0, :2]
    assert calls == [opened[0].name]
    for case in opened[1:]:
        np.asarray(case.image)
    np.asarray(opened[0].image)
    assert len(calls) == 5  # two are kept, the rest were let go


def test_only_entries_of_the_cache_are_tidied_up(tmp_path: Path) -> None:
    mine, entry = tmp_path / "scans" / "2024", tmp_path / "0123456789abcdef" / "fedcba9876543210"
    for folder in (mine, entry):
        folder.mkdir(parents=True)
        (folder / "a").touch()
    assert remove_unused(tmp_path, (), ()) == 1
    assert (mine / "a").exists()
    assert not entry.exists()
