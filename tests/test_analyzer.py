"""The analysis as a whole: its statistics against plain NumPy and MONAI, its cache, groups and summaries."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import yaml
from analysis_data import AFFINE, SHAPE, DataSet, make_image, make_label, save
from scipy import ndimage

from autoseg import terminal
from autoseg.analyzer import analyze_folder, workers
from autoseg.analyzer.workers import Task, measure
from autoseg.analyzer.yaml_text import yaml_text
from autoseg.config.nodes import load_plain
from autoseg.config.settings import ClassSpec, Settings
from autoseg.data.labels import annotated_classes, make_label_map
from autoseg.errors import ConfigError, DataError
from autoseg.workspace import digests

LEAF = (
    "max",
    "mean",
    "median",
    "min",
    "stdev",
    "percentile_00_5",
    "percentile_10_0",
    "percentile_90_0",
    "percentile_99_5",
)


def oracle(values: np.ndarray) -> list[float]:
    v = np.asarray(values, np.float64).ravel()
    return [v.max(), v.mean(), np.median(v), v.min(), v.std(), *np.percentile(v, [0.5, 10, 90, 99.5])]


def leaf(found: dict[str, Any]) -> list[float]:
    return [found[k] for k in LEAF]


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def read_ras(path: Path) -> tuple[np.ndarray, np.ndarray]:
    image = nib.as_closest_canonical(nib.load(path))
    return np.asarray(image.dataobj), image.affine


def varied(root: Path, channels: int = 1, spleen: int = 5) -> DataSet:
    """Cases of different size, spacing, orientation and type; class 2 is missing in two of them."""
    data = DataSet(root=root, num=0, labels={1: "liver", 2: "tumor", spleen: "spleen"})
    rng = np.random.default_rng(3)
    affines = [
        AFFINE,
        np.diag([-1.0, -1.5, 2.0, 1.0]),
        np.array([[0, 0, 2.0, 3], [-1.0, 0, 0, 4], [0, 1.5, 0, -7], [0, 0, 0, 1]]),
        np.diag([0.7, 0.8, 5.0, 1.0]),
    ]
    for number, affine in enumerate(affines):
        shape = (14 + number, 12, 10 + 2 * number)
        label = ndimage.gaussian_filter(rng.normal(size=shape), 1.5)
        label = np.digitize(label, np.quantile(label, [0.8, 0.9, 0.95]))
        values = np.array([0, 1, 2 if number % 2 else 0, spleen])
        image = rng.normal(50, 40, (*shape, channels)).astype(np.float32)
        image[:, :2] = 0
        if number == 3:
            image = image.round().astype(np.int16)
        image = image[..., 0] if channels == 1 else image
        data.add(image=image, label=values[label].astype(np.uint8), affine=affine, fold=number % 2)
    return data


@pytest.mark.parametrize("channels", [1, 2])
def test_statistics_by_case_equal_numpy(tmp_path: Path, channels: int) -> None:
    data = varied(tmp_path, channels)
    data.analyze(strict=True)
    cases = read(data.workspace.datastats_by_case)["stats_by_cases"]
    assert [c["image_filepath"] for c in cases] == [f"images/case_{n}.nii.gz" for n in range(4)]
    for case, entry in zip(data.cases, cases, strict=True):
        image, affine = read_ras(case.images[0])
        label, _ = read_ras(tmp_path / entry["label_filepath"])
        image = image.reshape(*label.shape, channels)
        spacing = nib.affines.voxel_sizes(affine)
        found = entry["image_stats"]
        assert found["shape"] == [list(label.shape)] * channels
        assert found["channels"] == channels
        np.testing.assert_allclose(found["spacing"], spacing, rtol=1e-6)
        np.testing.assert_allclose(found["sizemm"], spacing * label.shape, rtol=1e-6)
        for channel in range(channels):
            one = image[..., channel]
            box = ndimage.find_objects((one > 0).astype(int))[0]
            assert found["cropped_shape"][channel] == [s.stop - s.start for s in box]
            np.testing.assert_allclose(leaf(found["intensity"][channel]), oracle(one[box]), rtol=1e-6)
            foreground = entry["image_foreground_stats"]["intensity"][channel]
            np.testing.assert_allclose(leaf(foreground), oracle(one[label > 0]), rtol=1e-6)
            assert foreground["percentile"] == leaf(foreground)[5:]
        assert entry["label_stats"]["labels"] == np.unique(label).tolist()
        for value, one_class in zip(np.unique(label), entry["label_stats"]["label"], strict=True):
            mask = label == value
            numbered, num = ndimage.label(mask, np.ones((3, 3, 3)))
            boxes = [[s.stop - s.start for s in box] for box in ndimage.find_objects(numbered)]
            assert one_class["ncomponents"] == num
            assert sorted(one_class["shape"]) == sorted(boxes)
            assert one_class["foreground_percentage"] == pytest.approx(mask.mean(), rel=1e-8)
            assert one_class["volume_ml"] == pytest.approx(mask.sum() * spacing.prod() / 1000, rel=1e-6)
            for channel in range(channels):
                intensity = leaf(one_class["image_intensity"][channel])
                np.testing.assert_allclose(intensity, oracle(image[mask, channel]), rtol=1e-6)


def test_statistics_of_the_data_set_equal_numpy(tmp_path: Path) -> None:
    data = varied(tmp_path)
    analysis = data.analyze(strict=True)
    datastats = read(data.workspace.datastats)
    images = [read_ras(c.images[0]) for c in data.cases]
    labels = [read_ras(c.label)[0] for c in data.cases if c.label]
    summary, data_set = datastats["stats_summary"], datastats["data_set"]
    assert summary["n_cases"] == 4
    shapes = np.array([i.shape for i, _ in images])
    spacings = np.array([nib.affines.voxel_sizes(a) for _, a in images])
    for found, values in (
        (summary["image_stats"]["shape"], shapes),
        (data_set["spacing_mm"], spacings),
        (data_set["size_mm"], shapes * spacings),
    ):
        expected = [values.max(0), values.mean(0), np.median(values, 0), values.min(0), values.std(0)]
        expected += list(np.percentile(values, [0.5, 10, 90, 99.5], axis=0))
        np.testing.assert_allclose(leaf(found), expected, rtol=1e-6)
    foreground = np.concatenate([i[la > 0] for (i, _), la in zip(images, labels, strict=True)])
    pooled = data_set["foreground_intensity"][0]
    np.testing.assert_allclose(leaf(pooled), oracle(foreground), rtol=1e-6)
    assert pooled["num_voxels"] == foreground.size
    assert pooled["is_exact"] is True
    by_case = [oracle(i[la > 0]) for (i, _), la in zip(images, labels, strict=True)]
    mean = np.mean(by_case, axis=0)
    mean[0], mean[3] = np.max(by_case, axis=0)[0], np.min(by_case, axis=0)[3]
    np.testing.assert_allclose(leaf(summary["image_foreground_stats"]["intensity"]), mean, rtol=1e-6)
    # Class 2 occurs in two of the four cases: it is found by its value, not by its place.
    assert summary["label_stats"]["labels"] == [0, 1, 2, 5]
    shares = [(la == 2).mean() for la in labels if (la == 2).any()]
    assert len(shares) == 2
    share = summary["label_stats"]["label"][2]["foreground_percentage"]
    assert share["mean"] == pytest.approx(np.mean(shares), rel=1e-8)
    tumor = data_set["classes"][1]
    assert (tumor["name"], tumor["values"], tumor["num_cases"]) == ("tumor", [2], 2)
    everything = sum(la.size for la in labels)
    assert tumor["voxel_fraction"] == pytest.approx(sum((la == 2).sum() for la in labels) / everything, rel=1e-8)
    volumes = [(la == 2).sum() * s.prod() / 1000 for la, s in zip(labels, spacings, strict=True) if (la == 2).any()]
    assert tumor["volume_ml"]["median"] == pytest.approx(np.median(volumes), rel=1e-6)
    assert data_set["orientations"] == {"LPS": 1, "PSR": 1, "RAS": 2}
    assert data_set["nonzero_crop_ratio"]["max"] == pytest.approx(max(nonzero_ratio(i) for i, _ in images), rel=1e-8)
    assert analysis.fingerprint is not None
    assert analysis.fingerprint.class_num_cases == (4, 2, 4)


def nonzero_ratio(image: np.ndarray) -> float:
    box = ndimage.find_objects((image != 0).astype(int))[0]
    return float(np.prod([s.stop - s.start for s in box]) / image.size)


def test_monai_agrees_where_it_is_right(tmp_path: Path) -> None:
    """With every class in every case and no zero border along X, where MONAI takes X for channels and does not crop."""
    from monai.apps.auto3dseg import DataAnalyzer

    data = varied(tmp_path, spleen=3)  # MONAI takes values for places, so there must be no gap
    data.cases = [data.cases[1], data.cases[3]]  # both have every class
    data.analyze(strict=True)
    listed = [{"image": str(c.images[0]), "label": str(c.label)} for c in data.cases]
    analyzer = DataAnalyzer({"training": listed}, output_path=str(tmp_path / "monai.yaml"), device="cpu", worker=0)
    monai = json.loads(json.dumps(analyzer.get_all_case_stats(), default=float))
    mine = read(data.workspace.datastats_by_case)
    compared = compare(monai["stats_summary"], mine["stats_summary"], "stats_summary")
    for theirs, ours in zip(monai["stats_by_cases"], mine["stats_by_cases"], strict=True):
        compared += compare(theirs, ours, "case")
    assert compared > 400


def compare(theirs: Any, ours: Any, where: str) -> int:
    """Compare everything MONAI says with what is said here; the number of figures compared."""
    if isinstance(theirs, dict):
        # Medians of an even number of voxels are the lower of the middle two in MONAI, and percentiles of integers
        # are cut to integers: docs/analyze.md.
        skipped = {"median", "image_filepath", "label_filepath"}
        cut = isinstance(theirs.get("max"), int) or (
            isinstance(theirs.get("max"), list) and isinstance(theirs["max"][0], int)
        )
        skipped |= {k for k in theirs if k.startswith("percentile") and cut}
        return sum(compare(theirs[k], ours[k], f"{where}.{k}") for k in theirs if k not in skipped)
    if isinstance(theirs, list):
        if where.endswith(".shape") and isinstance(theirs[0], list):
            theirs, ours = sorted(theirs), sorted(ours)
        assert len(theirs) == len(ours), where
        return sum(compare(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(theirs, ours, strict=True)))
    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-4), where
    return 1


def test_nothing_absolute_is_written(tmp_path: Path) -> None:
    data = varied(tmp_path)
    data.analyze()
    for path in (data.workspace.datastats, data.workspace.datastats_by_case, data.workspace.faults):
        assert str(tmp_path) not in path.read_text()


def test_neither_torch_nor_monai_is_loaded() -> None:
    code = "import sys, autoseg.analyzer; print([m for m in ('torch', 'monai', 'sklearn') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("num_workers", [1, 2])
def test_processes_do_not_change_the_result(tmp_path: Path, num_workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = varied(tmp_path)
    expected = data.analyze(num_workers=1).datastats
    shutil.rmtree(data.workspace.root)
    monkeypatch.setattr(workers, "IN_PROCESS_BYTES", 0)
    analysis = data.analyze(num_workers=num_workers)
    assert analysis.num_read == 4
    assert analysis.datastats == expected


# -- what was read once is not read again


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataSet:
    monkeypatch.setattr(digests, "SETTLED_S", -1.0)  # files of a test are always young
    return DataSet(root=tmp_path)


def test_a_second_run_reads_nothing(data: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    first = data.analyze()
    monkeypatch.setattr(workers, "analyze_case", None)
    monkeypatch.setattr(workers, "image_digest", None)
    second = data.analyze()
    assert (first.num_read, second.num_read) == (6, 0)
    assert first.datastats == second.datastats


def test_one_case_more_is_one_case_read(data: DataSet) -> None:
    data.analyze()
    data.add(fold=0)
    assert data.analyze().num_read == 1


def test_a_changed_file_is_read_again(data: DataSet) -> None:
    data.analyze()
    path = data.cases[0].images[0]
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    raw = save(data.root / "other.nii.gz", make_image(0)[::-1]).read_bytes()
    path.write_bytes(raw)
    os.utime(path, ns=times)  # the time of change is set back, as unpacking an archive does
    assert data.analyze().num_read == 1


def test_a_moved_data_set_is_known_by_content(data: DataSet) -> None:
    first = data.analyze()
    shutil.copytree(data.root / "images", data.root / "moved")
    data.cases = [replace(c, images=(data.root / "moved" / c.images[0].name,)) for c in data.cases]
    second = data.analyze()
    assert second.num_read == 0
    assert first.datastats == second.datastats


def test_young_files_are_known_by_content_alone(data: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "SETTLED_S", 1e9)
    data.analyze()
    assert not data.workspace.digests.exists()
    assert data.analyze().num_read == 0


def test_a_killed_run_goes_on(data: DataSet) -> None:
    data.analyze()
    path = data.workspace.root / "analysis" / "cases.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + lines[3][:100])
    assert data.analyze().num_read == 3
    assert data.analyze().num_read == 0


@pytest.mark.parametrize("junk", ["", "{}\n", "[1]\n", '{"version": 1, "kind": 3}\n', "\x00\xff garbage\n"])
def test_a_damaged_store_costs_time_alone(data: DataSet, junk: str) -> None:
    path = data.workspace.root / "analysis" / "cases.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(junk)
    assert data.analyze().num_read == 6
    assert data.analyze().num_read == 0


def test_the_store_does_not_grow_for_ever(data: DataSet) -> None:
    for number in range(5):
        save(data.cases[0].images[0], make_image(100 + number))
        for case in data.cases[1:]:
            save(case.images[0], make_image(200 + 10 * number + int(case.name[-1])))
        data.analyze()
    assert len((data.workspace.root / "analysis" / "cases.jsonl").read_text().splitlines()) <= 12


def test_another_ignore_label_is_another_result(data: DataSet) -> None:
    data.analyze()
    assert data.analyze(ignore_label=9).num_read == 6


# -- classes and groups


def partial(root: Path) -> DataSet:
    """FLARE23 in small: full, liver only and one empty label; and unlabeled cases."""
    data = DataSet(root=root, num=0, labels={1: "liver", 2: "tumor", 3: "spleen"})
    for number in range(7):
        values = (1, 2, 3) if number < 3 else (1,) if number < 6 else ()
        data.add(label=make_label(values), fold=number % 2)
    data.add(role="unlabeled")
    return data


def test_label_groups(tmp_path: Path) -> None:
    data = partial(tmp_path)
    off = data.analyze()
    assert [g.classes for g in off.label_groups] == [("liver", "tumor", "spleen")]
    assert [(len(g.cases), g.classes) for g in off.occurring_groups] == [
        (3, ("liver", "tumor", "spleen")),
        (3, ("liver",)),
        (1, ()),
    ]
    assert off.hint.startswith("The labels look partial")
    assert "partial_labels: infer" in off.hint
    text = off.text()
    assert "3 | 3 labeled classes: liver, tumor, spleen" in text
    assert "1 | unlabeled" in text
    assert off.hint in text
    infer = data.analyze(partial_labels="infer")
    assert infer.label_groups == off.occurring_groups
    assert infer.hint == ""
    entry = read(data.workspace.datastats)["label_groups"][1]
    assert entry == {
        "num_cases": 3,
        "num_classes": 1,
        "classes": ["liver"],
        "cases": ["case_3", "case_4", "case_5"],
    }


def test_a_declared_class_that_is_absent_counts_as_annotated(tmp_path: Path) -> None:
    data = partial(tmp_path)
    data.cases = [replace(c, annotated=("liver", "tumor")) if i >= 3 else c for i, c in enumerate(data.cases)]
    analysis = data.analyze(partial_labels="declared")
    assert [(len(g.cases), g.classes) for g in analysis.label_groups] == [
        (4, ("liver", "tumor")),
        (3, ("liver", "tumor", "spleen")),
    ]
    assert analysis.hint == ""
    classes = read(data.workspace.datastats)["data_set"]["classes"]
    assert [(c["name"], c["num_cases"], c["num_annotated"]) for c in classes] == [
        ("liver", 6, 7),
        ("tumor", 3, 7),
        ("spleen", 3, 3),
    ]


def test_healthy_patients_do_not_look_partial(tmp_path: Path) -> None:
    data = DataSet(root=tmp_path, num=0, labels={1: "liver", 2: "tumor", 3: "spleen"})
    for number in range(8):
        data.add(label=make_label((1, 2, 3) if number % 2 else (1, 3)), fold=number % 2)
    assert data.analyze().hint == ""


def test_regions_and_an_ignored_value(tmp_path: Path) -> None:
    data = DataSet(root=tmp_path, num=0, labels={})
    for fold in range(3):
        data.add(label=make_label((1, 2, 4)), fold=fold)
    specs = (ClassSpec(name="whole", index=(1, 2)), ClassSpec(name="core", index=(2,)))
    analysis = data.analyze(strict=True, class_names=specs, ignore_label=4)
    assert analysis.label_map is not None
    assert analysis.label_map.sigmoid
    pooled = analysis.datastats["data_set"]["foreground_intensity"][0]
    assert pooled["num_voxels"] == 3 * 2 * 27


def test_values_name_the_classes_where_nobody_does(tmp_path: Path) -> None:
    data = DataSet(root=tmp_path, labels={})
    analysis = data.analyze(strict=True)
    assert analysis.label_map is not None
    assert analysis.label_map.names == ("class_1", "class_2")


def test_names_that_contradict_each_other_are_told_first(tmp_path: Path) -> None:
    data = DataSet(root=tmp_path)
    with pytest.raises(ConfigError, match="tumor is named twice"):
        data.analyze(class_names=("tumor", "tumor"))


# -- summaries, folders


def test_the_summary_is_json(tmp_path: Path) -> None:
    summary = json.loads(json.dumps(DataSet(root=tmp_path).analyze().summary()))
    assert summary["cases"] == {"training": 6, "validation": 0, "testing": 0, "unlabeled": 0}
    assert summary["data_set"]["classes"][0]["num_cases"] == 6
    assert summary["label_groups"][0]["num_cases"] == 6


def test_a_bare_folder_of_images(tmp_path: Path) -> None:
    for number in range(3):
        save(tmp_path / "scans" / f"p{number}" / "t1.nii.gz", make_image(number))
    save(tmp_path / "scans" / "p3" / "t1.nii.gz", np.full(SHAPE, 7, np.int16))
    analysis = analyze_folder(tmp_path / "scans", progress=False)
    assert analysis.num_cases["unlabeled"] == 4
    assert [str(f) for f in analysis.faults] == [
        "p3_t1 (p3/t1.nii.gz): every voxel is 7. Export the image again, or leave it out."
    ]
    assert analysis.datastats["stats_summary"]["n_cases"] == 3
    assert analysis.fingerprint is None
    assert "voxels: 14x12x10" in analysis.text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scans"]


def test_a_folder_of_images_and_labels(tmp_path: Path) -> None:
    DataSet(root=tmp_path)
    analysis = analyze_folder(tmp_path, progress=False)
    assert analysis.faults == ()
    assert analysis.num_cases["training"] == 6
    assert [g.classes for g in analysis.label_groups] == [("class_1", "class_2")]


def test_a_folder_that_is_not_there_or_empty(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        analyze_folder(tmp_path / "none")
    with pytest.raises(DataError, match=r"no image in it. Expected \*.nii.gz, \*.nii"):
        analyze_folder(tmp_path)


def test_yaml_reads_back() -> None:
    data = {
        "floats": [0.1, 1.0, 1e-5, -2.5e20, 1e300, 0.0, 123456.789],
        "nested": {"list": [[1, 2], []], "mapping": {"a": None, "b": True}, "rows": [{"x": [1]}, {"y": {"z": [[2]]}}]},
        "text": ["yes", "a: b", "[x]", "caf\u00e9 #1", "1e5", ""],
        "empty": {"d": {}, "l": []},
        "deep": [[[1, 2], [3]], [{"k": {"m": 1}}]],
    }
    assert yaml.safe_load(yaml_text(data)) == data
    words = {"names": ["\U0001f600", "\\ud83d\\ude00", "\\\U0001f600", "患者", "a\u2028b\x85", 'q"\\']}
    assert load_plain(yaml_text(words)) == words  # letters outside the BMP among them
    assert load_plain(yaml_text({"file": "a\udcff"})) == {"file": "a\ufffd"}
    with pytest.raises(TypeError, match="cannot write ndarray as YAML"):
        yaml_text({"array": np.zeros(2)})


# -- label maps


def made(datalist_labels: dict[int, str], found: tuple[int, ...] = (), **settings: Any) -> Any:
    return make_label_map(
        Settings(modality="CT", datalist=Path("d"), dataroot=Path("r"), **settings), datalist_labels, found
    )


def test_label_maps_come_from_settings_then_datalist_then_values() -> None:
    assert made({4: "b", 0: "background", 2: "a"}, (7,)).values == ((2,), (4,))
    assert made({}, (0, 7, 3, 255), ignore_label=255).names == ("class_3", "class_7")
    named = made({4: "b"}, (), class_names=("x", ClassSpec(name="y", index=(5, 6))))
    assert (named.names, named.values, named.sigmoid) == (("x", "y"), ((1,), (5, 6)), False)
    overlapping = (ClassSpec(name="x", index=(1, 2)), ClassSpec(name="y", index=(2,)))
    assert made({}, class_names=overlapping).sigmoid
    with pytest.raises(ConfigError, match="belongs to more than one class"):
        made({}, class_names=overlapping, sigmoid=False)
    with pytest.raises(ConfigError, match="the data set has no class"):
        made({}, (0,))


@pytest.mark.parametrize(
    ("declared", "mode", "expected"),
    [
        (None, "off", ("a", "b", "c")),
        (("b",), "off", ("a", "b", "c")),
        (None, "infer", ("a", "c")),
        (("c", "b"), "infer", ("b", "c")),
        (None, "declared", ("a", "b", "c")),
        ((), "declared", ()),
    ],
)
def test_annotated_classes(declared: Any, mode: Any, expected: tuple[str, ...]) -> None:
    assert annotated_classes(declared, ("c", "a"), ("a", "b", "c"), mode) == expected


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_long_case_shows_how_far_it_is_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, num_workers: int
) -> None:
    monkeypatch.setattr(workers, "IN_PROCESS_BYTES", 0)
    monkeypatch.setattr(workers, "LOOK_S", 0.01)
    monkeypatch.setattr(workers, "available_cores", lambda: num_workers)
    monkeypatch.setattr(terminal, "LOG_EVERY_S", -1.0)
    tasks = []
    for number, planes in enumerate((400, 8)):
        path = tmp_path / f"{number}.nii.gz"
        save(path, np.random.default_rng(number).integers(0, 30_000, (64, 64, planes)).astype(np.int16))
        tasks.append(Task(number=number, images=(path,), label=None, ignore_label=None, num_bytes=path.stat().st_size))
    seen: list[int] = []
    results = [result.number for result in measure(tasks, num_workers, seen.append)]
    assert sorted(results) == [0, 1]
    assert sum(seen) >= sum(task.num_bytes for task in tasks)
    with caplog.at_level(logging.INFO, "autoseg"):
        analyze_folder(tmp_path)
    lines = [r.message for r in caplog.records if r.message.startswith("analyze: ")]
    shares = [int(re.match(r"analyze: (\d+) %", line)[1]) for line in lines]  # type: ignore[index]
    assert shares == sorted(shares)
    assert shares[-1] == 100
    assert "2 of 2 cases" in lines[-1]
    inside = [share for share, line in zip(shares, lines, strict=True) if "0 of 2 cases" in line]
    assert num_workers == 2 or (len(set(inside)) > 2 and max(inside) > 40)
