"""Learning curves: the law is found with an interval that covers, and trainings are a run's jobs on nested cases."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from autoseg.cli.main import run_command
from autoseg.config.settings import Settings
from autoseg.data.datalists.cases import Case, Datalist
from autoseg.errors import ConfigError
from autoseg.evaluation.learning_curve import CurvePoint, LearningCurve, fit_law, predict_at
from autoseg.pipeline.learning_curve import _curve, _ordered, _trainings, _whole_patients, words
from autoseg.workspace.stored import read_stored

SIZES = (12, 25, 50, 100)


def curve(rng: np.random.Generator, exponent: float, *, noise: float = 0.002, seeds: int = 2) -> list[CurvePoint]:
    """Trainings of a known law: cases differ, trainings differ, the cases of a seed are the same for all sizes."""
    points = []
    for seed in range(seeds):
        easy = rng.normal(0, 0.04, 40)
        for n in SIZES:
            values = 0.9 - 0.5 * n**-exponent + easy + rng.normal(0, 0.01, 40) + rng.normal(0, noise)
            cases = {f"{seed}_{i}": float(v) for i, v in enumerate(values)}
            dice = float(values.mean())
            points.append(CurvePoint(num_cases=n, seed=seed, fold=seed, dice=dice, cases=cases, seconds=1.0))
    return points


@pytest.mark.parametrize("exponent", [0.4, 0.8, 1.5])
def test_the_law_is_found_and_its_interval_covers(exponent: float) -> None:
    truth = 0.9 - 0.5 * 200**-exponent
    inside, errors = 0, []
    for seed in range(10):
        law = fit_law(curve(np.random.default_rng(seed), exponent), seed=seed)
        (found,) = predict_at(law, [200])
        inside += found.low <= truth <= found.high
        errors.append(found.dice - truth)
    assert inside >= 9
    assert abs(np.mean(errors)) < 0.006


def test_the_interval_grows_away_from_the_cases_there_are() -> None:
    law = fit_law(curve(np.random.default_rng(0), 0.8))
    widths = [p.high - p.low for p in predict_at(law, [100, 200, 1000])]
    assert widths[0] < widths[1] < widths[2]
    predicted = [p.dice for p in predict_at(law, [12, 25, 50, 100, 200])]
    assert predicted == sorted(predicted)
    assert max(predicted) <= 1


def test_patients_are_drawn_whole() -> None:
    """Forty scans of two patients know less than forty of forty."""
    points = curve(np.random.default_rng(0), 0.8, seeds=1)
    patient_of = {f"0_{i}": i // 20 for i in range(40)}
    alone, of_two = (predict_at(fit_law(points, p), [100])[0] for p in (None, patient_of))
    assert of_two.high - of_two.low != alone.high - alone.low
    with pytest.raises(ValueError, match="2 sizes"):
        fit_law([p for p in points if p.num_cases > 25])


def test_orders_keep_patients_whole() -> None:
    cases = [Case(name=f"c{i}", images=(Path("x"),), group=f"p{i // 3}" if i < 12 else None) for i in range(20)]
    order = _ordered(cases, 0)
    assert sorted(c.name for c in order) == sorted(c.name for c in cases)
    for size in range(1, 20):
        kept, rest = order[: (n := _whole_patients(order, size))], order[_whole_patients(order, size) :]
        assert n >= size
        assert not {c.group for c in kept if c.group} & {c.group for c in rest if c.group}
    assert [c.name for c in order] != [c.name for c in _ordered(cases, 1)]


def listed(num: int, per_patient: int = 1) -> Datalist:
    """Cases of two folds, in patients of some scans each."""
    cases = [
        Case(name=f"c{i}", images=(Path(f"{i}"),), fold=i % 2, group=f"p{i % 2}_{i // 2 // per_patient}")
        for i in range(2 * num)
    ]
    return Datalist(training=tuple(cases))


def test_too_few_cases_for_any_curve_are_told_from_too_many_points() -> None:
    settings = Settings(modality="MRI", datalist=Path("d"), dataroot=Path("r"))
    for num, points, remedy in (
        (16, 4, "Give fewer points."),
        (13, 3, "A curve takes 16 cases besides those of a fold"),
    ):
        with pytest.raises(ConfigError, match=remedy):
            _trainings(listed(num), points, 1, settings)
    # 5, 10 and 20 cases of patients of 12 are 12 and 20 cases: no training is done twice.
    sizes = [len(cases.train_cases(fold)) for cases, _, fold in _trainings(listed(20, 12), 3, 1, settings)]
    assert sizes in ([12, 20], [8, 20])


def test_one_seed_is_told_of() -> None:
    one, two = (
        _curve("unet", Datalist(training=()), curve(np.random.default_rng(0), 0.8, seeds=n), [], []) for n in (1, 2)
    )
    assert "give --seeds 2" in words(one)
    assert (bool(one.caveat), two.caveat) == (True, "")


def test_points_that_nothing_counts_in_are_left_out() -> None:
    points = curve(np.random.default_rng(0), 0.8)
    empty = points[0].model_copy(update={"num_cases": 6, "cases": {}, "dice": None})
    found = _curve("unet", Datalist(training=()), [empty, *points], [], [])
    assert [p.num_cases for p in found.predictions] == [*SIZES, 150, 200]
    assert found.points[0] == empty


def test_the_command_trains_nested_cases_and_goes_on(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from autoseg.data.phantoms import make_phantoms

    path = make_phantoms(tmp_path / "data", num_cases=32, shape=(24, 24, 24), num_fold=2)
    settings = (finished_run / "input.yaml").read_text().partition("name: phantoms")[2]
    path.write_text(path.read_text() + "name: phantoms" + settings.replace("[segresnet, dints]", "[segresnet]"))
    command = ["learning_curve", "--input", str(path), "--points", "3", "--seeds", "1", "--at", "20"]
    assert run_command(command) == 0
    told = capsys.readouterr().out
    folder = tmp_path / "data" / "work_dir" / "learning_curve"
    stored = read_stored(folder / "curve.json", LearningCurve)
    assert [p.num_cases for p in stored.points] == [4, 8, 16]
    assert [p.num_cases for p in stored.predictions] == [4, 8, 16, 20, 24, 32]
    names, plans = [], []
    for n in (4, 8, 16):
        place = folder / f"n{n:03d}_seed0"
        listed = json.loads((place / "datalist.json").read_text())["training"]
        names.append({c["image"] for c in listed if c["fold"] != 0})
        assert len(names[-1]) == n
        assert sum(c["fold"] == 0 for c in listed) == 16
        plans.append((place / "segresnet_0" / "configs" / "hyper_parameters.yaml").read_text())
        job = json.loads((place / "segresnet_0" / "job.json").read_text())
        assert sum(key.startswith("training case") for key in job["inputs"]) == n
    assert names[0] < names[1] < names[2]
    assert plans[0] == plans[1] == plans[2]
    assert "cases  measured" in told
    assert "With one seed nothing says how much trainings differ" in told
    began = {p: p.stat().st_mtime_ns for p in folder.glob("*/*/models/model.pt")}
    assert len(began) == 3
    shutil.rmtree(folder / "n008_seed0" / "segresnet_0")
    assert run_command(command) == 0
    again = {p: p.stat().st_mtime_ns for p in folder.glob("*/*/models/model.pt")}
    assert [p.parts[-4] for p in sorted(began) if began[p] != again[p]] == ["n008_seed0"]
    assert read_stored(folder / "curve.json", LearningCurve).predictions
    assert run_command(["report", "--work_dir", str(tmp_path / "data" / "work_dir")]) == 0
    page = (tmp_path / "data" / "work_dir" / "report.html").read_text()
    assert 'id="learning-curve"' in page
    assert "With one seed nothing says" in page
    assert run_command([*command[:4], "2"]) == 2
    assert "--points: expected at least 3, found 2" in capsys.readouterr().err
