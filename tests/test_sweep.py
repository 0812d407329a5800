"""Sweeps: what may be searched, who gets which trial, what a kill leaves, and a whole one on phantoms."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from optuna.trial import TrialState
from processes import autoseg
from test_pipeline import make_data

from autoseg.config.load import load_settings, read_settings_file
from autoseg.config.settings import SweepSettings
from autoseg.data.phantoms import make_phantoms
from autoseg.errors import ConfigError, ResourceError
from autoseg.sweep.space import Space, read_space
from autoseg.sweep.study import Study
from autoseg.sweep.trial import with_values
from autoseg.workspace.files import write_text

ROOT = Path(__file__).resolve().parents[1]
LEARNING_RATE = {"learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_phantoms(folder, num_cases=4, num_testing=0, shape=(24, 24, 24), num_fold=2)
    return folder


def read(data: Path, text: str) -> Space:
    """Read the space of an input.yaml whose first four lines are the data's."""
    head = "".join((data / "input.yaml").read_text().splitlines(keepends=True)[:4])
    path = data / "sweep.yaml"
    write_text(path, head + text)  # whole at once: several processes write and read it
    return read_space(*load_settings(path))


def sweep_of(parameters: str, more: str = "") -> str:
    return f"algos: [segresnet]\n{more}sweep:\n  parameters:\n    {parameters}\n"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("learning_rat: {low: 1e-4, high: 1e-2}", "learning_rat: unknown setting. Did you mean learning_rate?"),
        (
            "segresnet.init_filter: {choices: [8]}",
            "segresnet.init_filter: unknown setting. Did you mean segresnet.init_filters?",
        ),
        (
            "modality: {choices: [CT, MRI]}",
            "modality: is no hyperparameter. A sweep changes hyperparameters alone; see docs/settings.md.",
        ),
        (
            "learning_rate: {low: 1e-2, high: 1e-4}",
            "learning_rate: the range is inverted: low 0.01 is above high 0.0001. Swap them.",
        ),
        (
            "learning_rate: {low: 0.01, high: 1e-2}",
            "learning_rate: the range is empty: low and high are both 0.01. Set the value itself instead.",
        ),
        (
            "learning_rate: {choices: []}",
            "learning_rate.choices: the list is empty. Give at least one value, or leave ",
        ),
        ("learning_rate: {low: 1e-4}", "learning_rate: high is missing. Give both low and high."),
        ("learning_rate: {log: true}", "learning_rate: expected either choices: [a, b], or low: and high:."),
        ("weight_decay: {low: 0, high: 1, log: true}", "weight_decay: log needs low > 0, found 0."),
        ("batch_size: {low: 0, high: 4}", "batch_size: expected a whole number >= 1, found 0."),
        (
            "batch_size: {low: 1, high: 4.5}",
            "batch_size: the setting takes whole numbers. Give whole low, high and step.",
        ),
        (
            "loss: {low: 1, high: 2}",
            "loss: low and high are for numbers; this is one of dice_ce, dice_focal. Give choices: ",
        ),
        (
            "loss: {choices: [dice_ce, dise_focal]}",
            "loss: expected one of dice_ce, dice_focal, found dise_focal. Did you mean dice_focal?",
        ),
        (
            "swinunetr.feature_size: {low: 12, high: 48}",
            "swinunetr.feature_size: expected a whole number >= 12 and <= 2048 and divisible by 12, found 13.",
        ),
        (
            "dints.channel_mul: {choices: [1]}",
            "dints.channel_mul: has no effect: dints is not among algos (segresnet).",
        ),
    ],
)
def test_ranges_that_are_refused(data: Path, text: str, fault: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(data, sweep_of(text))
    assert any(f"sweep.yaml:8: sweep.parameters.{fault}" in m for m in error.value.messages), error.value.messages


def test_all_faults_of_a_space_at_once_and_nothing_to_search(data: Path) -> None:
    with pytest.raises(ConfigError) as error:
        read(data, sweep_of("a: {choices: [1]}\n    b: {choices: [1]}\n    learning_rate: {low: 1e-4, high: 1e-3}"))
    assert len(error.value.messages) == 2
    with pytest.raises(ConfigError) as error:
        read(data, "algos: [segresnet]\n")
    assert str(error.value) == (
        "sweep.parameters: nothing to search. Name settings and their ranges, such as "
        "sweep: {parameters: {learning_rate: {low: 1e-4, high: 1e-2, log: true}}}."
    )
    with pytest.raises(ConfigError) as error:
        read(data, sweep_of("learning_rate: {low: 1e-4, high: 1e-3}", "segresnet: {learning_rate: 1e-3}\n"))
    assert str(error.value) == (
        "sweep.yaml:9: sweep.parameters.learning_rate: has no effect on segresnet, whose own learning_rate is set at "
        "sweep.yaml:6. Remove that one."
    )


def test_values_are_drawn_as_the_settings_are_typed_and_by_network(data: Path) -> None:
    space = read(
        data,
        "algos: [segresnet, swinunetr]\nsweep:\n  parameters:\n    learning_rate: {low: 1e-4, high: 1e-2, log: true}\n"
        "    batch_size: {low: 1, high: 4}\n    roi_size: {choices: [[16, 16, 16], [32, 32, 32]]}\n"
        "    segresnet.init_filters: {choices: [8, 16]}\n    swinunetr.feature_size: {low: 12, high: 36, step: 12}\n",
    )
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen: dict[str, set[Any]] = {"segresnet": set(), "swinunetr": set()}
    settings, _ = load_settings(data / "sweep.yaml")
    for _ in range(20):
        algo, values = space.suggest(study.ask())
        seen[algo] |= set(values)
        assert 1e-4 <= values["learning_rate"] <= 1e-2
        assert values["batch_size"] in (1, 2, 3, 4)
        own = with_values(settings, values)
        assert own.hyper(algo)["roi_size"] in ((16, 16, 16), (32, 32, 32))
        if algo == "swinunetr":
            assert own.swinunetr.feature_size in (12, 24, 36)
    shared = {"learning_rate", "batch_size", "roi_size"}
    assert seen == {"segresnet": shared | {"segresnet.init_filters"}, "swinunetr": shared | {"swinunetr.feature_size"}}


# -- the study


def make_study(folder: Path, data: Path, *, trials: int = 12, seed: int = 0, **settings: Any) -> Study:
    space = read(data, sweep_of("learning_rate: {low: 1e-4, high: 1e-2, log: true}"))
    return Study(folder / "sweep", SweepSettings(trials=trials, **settings), space, {"cases": "1"}, seed=seed)


def test_a_study_of_another_search_is_refused(data: Path, tmp_path: Path) -> None:
    make_study(tmp_path, data)
    make_study(tmp_path, data)
    space = read(data, sweep_of("learning_rate: {low: 1e-4, high: 1e-1, log: true}"))
    with pytest.raises(ConfigError) as error:
        Study(tmp_path / "sweep", SweepSettings(), space, {"cases": "2"}, seed=0)
    folder = tmp_path / "sweep"
    assert str(error.value) == (
        f"sweep.study: the study sweep in {folder}/study.journal belongs to another search: parameter learning_rate, "
        f"cases changed. Set another sweep.study, or delete that one ({folder})."
    )
    url = f"sqlite:///{tmp_path}/theirs.db"
    theirs = optuna.create_study(storage=url, study_name="sweep")
    theirs.ask()
    with pytest.raises(ConfigError) as error:
        make_study(tmp_path / "other", data, storage=url)
    assert str(error.value) == (
        f"sweep.study: the study sweep in {url} belongs to another search: it was not made by autoseg. "
        "Set another sweep.study, or delete that one."
    )


def test_a_storage_that_cannot_be_reached(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ResourceError) as error:
        make_study(tmp_path, data, storage=f"sqlite:///{tmp_path}/no/such/folder/s.db")
    assert str(error.value) == (
        f"sweep.storage: sqlite:///{tmp_path}/no/such/folder/s.db cannot be reached (unable to open database file). "
        "Check the address, that the server runs and that its driver is installed; or leave sweep.storage out to use a "
        "file in the work_dir."
    )
    with pytest.raises(ConfigError) as wrong:
        make_study(tmp_path, data, storage="study.db")
    assert str(wrong.value) == "sweep.storage: expected a URL such as sqlite:///study.db, found study.db."


WORKER = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from optuna.trial import TrialState
from test_sweep import make_study
study = make_study(Path(sys.argv[1]), Path(sys.argv[2]))
while (found := study.next_trial()) is not False:
    if found is True:
        time.sleep(0.1)
        continue
    trial, claim = found
    open(study.trial_folder(trial.number) / f"start-{os.getpid()}", "w").close()
    time.sleep(0.15)
    if trial.number in (2, 5, 7) and len(list(study.trial_folder(trial.number).glob("start-*"))) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if trial.number == 3:
        study.optuna.tell(trial, state=TrialState.FAIL)
    else:
        study.optuna.tell(trial, trial.params["learning_rate"])
    open(study.trial_folder(trial.number) / f"end-{os.getpid()}", "w").close()
    claim.__exit__(None, None, None)
"""


def test_workers_that_die_leave_no_trial_twice_and_none_undone(data: Path, tmp_path: Path) -> None:
    make_study(tmp_path, data)
    command = [sys.executable, "-c", WORKER, str(tmp_path), str(data), str(ROOT / "tests")]
    workers = [subprocess.Popen(command) for _ in range(4)]
    assert sorted(worker.wait() for worker in workers) in ([-9, -9, -9, 0], [-9, -9, 0, 0])
    study = make_study(tmp_path, data)
    assert study.next_trial() is False
    trials = study.optuna.trials
    assert [t.state for t in trials] == [TrialState.FAIL if i == 3 else TrialState.COMPLETE for i in range(12)]
    assert len({t.params["learning_rate"] for t in trials}) == 12
    ends = [len(list(study.trial_folder(i).glob("end-*"))) for i in range(12)]
    assert ends == [1] * 12
    assert [len(list(study.trial_folder(i).glob("start-*"))) for i in (2, 5, 7)] == [2, 2, 2]


def test_a_sampler_is_the_same_for_the_same_seed(data: Path, tmp_path: Path) -> None:
    drawn = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        study = make_study(tmp_path / name, data, trials=3, seed=seed)
        values = []
        for _ in range(3):
            found = study.next_trial()
            assert isinstance(found, tuple)
            study.optuna.tell(found[0], 0.5)
            found[1].__exit__(None, None, None)
            values.append(found[0].params["learning_rate"])
        drawn.append(values)
    assert drawn[0] == drawn[1] != drawn[2]


# -- the file of best settings


def test_a_file_of_settings_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "best.yaml"
    path.write_text("algos: [segresnet]\nlearning_rate: 0.003\nsegresnet: {init_filters: 16, blocks_down: [1, 1]}\n")
    assert read_settings_file(path) == {
        "algos": '["segresnet"]',
        "learning_rate": "0.003",
        "segresnet.init_filters": "16",
        "segresnet.blocks_down": "[1, 1]",
    }
    path.write_text("learning_rat: 1\nsegresnet: {init_filters: 2}\n")
    with pytest.raises(ConfigError) as error:
        read_settings_file(path)
    assert error.value.messages == (
        f"{path}: learning_rat: unknown setting. Did you mean learning_rate?",
        f"{path}: segresnet.init_filters: expected a whole number >= 4 and <= 2048, found 2.",
    )


# -- whole sweeps


def test_a_sweep_from_ranges_to_a_run_with_the_best(tmp_path: Path) -> None:
    ranges = {**LEARNING_RATE, "segresnet.init_filters": {"choices": [8, 12]}}
    small = {"init_filters": None, "learning_rate": None, "blocks_down": [1, 1], "roi_size": [16, 16, 16]}
    path = make_data(tmp_path, num_epochs=4, segresnet=small, sweep={"parameters": ranges})
    done = autoseg("sweep", "--input", path, "--trials", "4")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "work_dir" / "sweep"
    assert "Sweep sweep: 4 trials:" in done.stdout
    record = json.loads((folder / "trials.json").read_text())
    assert len(record["trials"]) == 4
    assert {t["state"] for t in record["trials"]} <= {"complete", "pruned"}
    finished = [t for t in record["trials"] if t["state"] == "complete"]
    best = max(finished, key=lambda t: t["values"][0])
    text = yaml.safe_load((folder / "best.yaml").read_text())
    assert text["learning_rate"] == pytest.approx(best["settings"]["learning_rate"])
    assert text["segresnet"]["init_filters"] == best["settings"]["segresnet.init_filters"]
    assert (folder / "plots" / "history.png").stat().st_size > 1000
    again = autoseg("sweep", "--input", path, "--trials", "4")
    assert again.returncode == 0
    assert "going on" not in again.stderr
    assert "sweep: trial" not in again.stderr.replace("sweep: trials", "")
    done = autoseg("run", "--input", path, "--settings", folder / "best.yaml", "--folds", "0")
    assert done.returncode == 0, done.stderr
    plan = yaml.safe_load((tmp_path / "work_dir" / "segresnet_0" / "configs" / "hyper_parameters.yaml").read_text())
    assert plan["network"]["init_filters"] == text["segresnet"]["init_filters"]
    assert plan["learning_rate"] == pytest.approx(text["learning_rate"])
