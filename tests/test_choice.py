"""`algos: auto`: which networks it comes to, that a run keeps them, and that every command goes by them."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
from plans import CPU, GPU, make_fingerprint
from test_plan_table import SETS, fingerprint_of

from autoseg.algos import inputs as planning_inputs
from autoseg.algos.choice import Choice, RunTime, choose_networks
from autoseg.cli.demo import SETTINGS
from autoseg.config.load import load_settings
from autoseg.config.networks import NETWORKS
from autoseg.config.settings import Settings
from autoseg.data.phantoms import make_phantoms
from autoseg.errors import ConfigError, WorkspaceError
from autoseg.hardware.facts import Hardware
from autoseg.pipeline import forecast, job_costs
from autoseg.pipeline.networks import warn_of_untrained, with_any_network, with_networks
from autoseg.pipeline.run import run_input
from autoseg.pipeline.stages import STAGES
from autoseg.report.explain import explain
from autoseg.report.page import make_report
from autoseg.sweep.space import read_space
from autoseg.workspace.workspace import Workspace

THICK = {"spleen", "btcv", "flare23", "kits", "prostate", "acdc", "two_slices", "one_slice", "em"}
"""Sets of the table whose slices are over three times as thick as their pixels are wide, or a handful."""
NO_MEASURING = {"launcher": "slurm"}
"""Plans for another machine are made by formulas alone, at once."""


def settings_of(**settings: object) -> Settings:
    return Settings(**{"modality": "MRI", "datalist": "d", "dataroot": "r", **settings})  # type: ignore[arg-type]


def choose(  # type: ignore[no-untyped-def]
    hardware: Hardware = CPU, budget_s: float | None = None, num_folds: int = 5, fingerprint=None, **settings: object
) -> Choice:
    run_time = RunTime(budget_s=budget_s, num_folds=num_folds, num_kept=2)
    return choose_networks(fingerprint or make_fingerprint(), settings_of(**settings), hardware, run_time)


@pytest.mark.parametrize("hardware", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("name", SETS)
def test_networks_that_cannot_follow_thick_slices_are_left_out(name: str, hardware: Hardware) -> None:
    choice = choose(hardware, fingerprint=fingerprint_of(SETS[name]))
    assert choice.networks[0] == "segresnet"
    assert set(choice.reasons) == {name for name, row in NETWORKS.items() if row.in_auto}
    if name in THICK:
        assert choice.networks == ("segresnet", "resenc")
        assert all("halves all axes alike" in choice.reasons[algo] for algo in ("swinunetr", "dints"))
    else:
        assert choice.networks == ("segresnet", "resenc", "swinunetr" if hardware.on_gpu else "dints")


def test_the_reasons_name_the_figures_and_the_limit() -> None:
    acdc = choose(fingerprint=fingerprint_of(SETS["acdc"]))
    assert (
        "dints is left out: it halves all axes alike, and slices are 6.41 times as thick as a voxel is wide (over 3)"
    ) in acdc.rule
    flat = make_fingerprint(shape_median=(256, 256, 4), size_mm_median=(256.0, 256.0, 4.0))
    reason = "it halves all axes alike, and the median image has 4 voxels along its shortest axis (under 16)"
    assert choose(fingerprint=flat).reasons["swinunetr"] == reason


def test_the_shortest_axis_is_that_of_what_networks_see() -> None:
    """Of the box around voxels other than 0 where images are cropped to it, of the image where they are not."""
    small = {"nonzero_crop_ratio": 0.3, "nonzero_size_mm_median": (32.0, 32.0, 10.0)}
    reason = "it halves all axes alike, and the median image has 10 voxels along its shortest axis (under 16)"
    assert choose(fingerprint=make_fingerprint(**small)).reasons["dints"] == reason
    for whole in (
        choose(fingerprint=make_fingerprint(**small), crop_foreground=False),
        choose(fingerprint=make_fingerprint(**small, outside_fraction=0.1)),
    ):
        assert "dints" in whole.networks


def test_the_voxel_size_that_the_user_set_counts() -> None:
    assert choose(resample_resolution=(1, 1, 3.5)).networks == ("segresnet", "resenc")
    assert choose(resample_resolution=(1, 1, 3.5), dints={"resample_resolution": (1, 1, 1)}).networks[2] == "dints"


def test_a_short_budget_on_a_cpu_trains_fewer() -> None:
    """Three minutes a job on two cores: 11 jobs of three networks, since one is dropped after the first fold."""
    assert choose(budget_s=11 * 180).networks == ("segresnet", "resenc", "dints")
    assert choose(budget_s=11 * 180 - 1).networks == ("segresnet", "resenc")
    assert choose(budget_s=10 * 180 - 1).networks == ("segresnet",)
    assert choose(budget_s=60).networks == ("segresnet",)
    assert choose(budget_s=60, num_folds=1).reasons["resenc"] == (
        "the budget of 1m00s would leave a job less than 3m00s on these cores, in which fewer networks learn more "
        "(measured)"
    )
    assert len(choose(replace(CPU, num_cores=20), budget_s=11 * 18).networks) == 3
    assert len(choose(GPU, budget_s=60).networks) == 3, "no measurement on a GPU says that fewer are better"


def test_what_is_set_of_networks_that_are_not_trained_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = make_phantoms(tmp_path, num_cases=2, num_fold=2)
    path.write_text(
        f"{path.read_text()}init_weights: {{unet: datalist.json, dints: datalist.json}}\ndints: {{batch_size: 1}}\n"
    )
    settings, origins = load_settings(path, {"swinunetr.roi_size": "[32, 32, 32]"})
    warn_of_untrained(settings, origins, ("dints", "swinunetr", "unet"))
    assert not caplog.messages
    warn_of_untrained(settings, origins, ("segresnet", "unet"))
    assert caplog.messages == [
        "init_weights: dints, swinunetr, dints: without effect, since this run trains segresnet, unet. "
        "Name the network in algos, or take the lines out."
    ]


def test_auto_is_what_is_taken_and_names_win(tmp_path: Path) -> None:
    path = make_phantoms(tmp_path, num_cases=4, num_testing=0, num_fold=2)
    text = path.read_text()
    assert load_settings(path)[0].algos == load_settings(path, {"algos": "auto"})[0].algos == "auto"
    path.write_text(text + "algos: [segresnet, swinunetr, dints]\n")
    assert load_settings(path)[0].networks == ("segresnet", "swinunetr", "dints")
    path.write_text(text + "algos: auto\nrecipe: btcv\n")
    assert load_settings(path)[0].networks == ("swinunetr",)
    path.write_text(text + SETTINGS)
    assert load_settings(path)[0].networks == ("segresnet", "swinunetr", "dints"), "the demo's line"
    for wrong in ("[auto, dints]", "[]", "autp"):
        path.write_text(text + f"algos: {wrong}\n")
        with pytest.raises(ConfigError, match=r"algos"):
            load_settings(path)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The input.yaml of a run whose data are analyzed."""
    path = make_phantoms(tmp_path, num_cases=4, num_testing=0, num_fold=2)
    run_input(("analyze",), path, {})
    return path


def test_a_run_keeps_its_networks_and_says_when_they_change(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    workspace = Workspace(run.parent / "work_dir")
    monkeypatch.setattr(planning_inputs, "job_hardware", lambda settings: CPU)
    monkeypatch.setattr("autoseg.pipeline.networks.job_hardware", lambda settings: CPU)

    def settled(*, anew: bool, **words: str) -> tuple[str, ...]:
        caplog.clear()
        return with_networks(workspace, load_settings(run, words)[0], anew=anew).networks

    assert settled(anew=True) == ("segresnet", "resenc", "dints")
    assert caplog.messages[0].startswith("algos: auto comes to segresnet, resenc, dints (segresnet: ")
    assert settled(anew=True) == ("segresnet", "resenc", "dints")
    assert not caplog.messages, "the same is not said twice"
    assert settled(anew=False, budget="1m") == ("segresnet", "resenc", "dints"), "plans are there: nothing changes"
    assert settled(anew=True, budget="1m") == ("segresnet",)
    assert caplog.records[0].levelname == "WARNING"
    assert caplog.messages[0].startswith(
        "algos: auto now comes to segresnet, before to segresnet, resenc, dints, because budget changed (segresnet: "
    )
    monkeypatch.setattr("autoseg.pipeline.networks.job_hardware", lambda settings: GPU)
    assert settled(anew=False) == ("segresnet",)
    assert settled(anew=True) == ("segresnet", "resenc", "swinunetr")
    assert "because device, budget changed" in caplog.messages[0]
    assert settled(anew=True, algos="[dints]") == ("dints",)
    assert settled(anew=True) == ("segresnet", "resenc", "swinunetr"), "names on one command line change no choice"


def test_a_damaged_choice_is_named(run: Path) -> None:
    workspace = Workspace(run.parent / "work_dir")
    settings = load_settings(run)[0]
    with_networks(workspace, settings, anew=True)
    workspace.chosen_networks.write_text('{"networks": ["vnet"], "rule": "", "inputs": {}}')
    with pytest.raises(WorkspaceError, match=r"networks\.json: networks\.0: found 'vnet'"):
        with_networks(workspace, settings, anew=False)


def planned(workspace: Workspace) -> set[str]:
    return {f"{algo}_{fold}" for algo, fold in workspace.job_names()}


def test_jobs_explain_report_and_forecast_go_by_the_choice(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = Workspace(run.parent / "work_dir")
    thick = {**NO_MEASURING, "resample_resolution": "[1, 1, 4]"}
    run_input(("generate",), run, thick)
    assert planned(workspace) == {"segresnet_0", "segresnet_1", "resenc_0", "resenc_1"}
    text = explain(run.parent / "work_dir", STAGES, "algos")
    assert "  value:  [segresnet, resenc]\n  origin: planner\n  rule:   segresnet: " in text
    assert "dints is left out: it halves all axes alike" in text
    assert text == explain(run, STAGES, "algos"), "asked by input.yaml, it says the same"
    page = make_report(run.parent / "work_dir", STAGES).read_text()
    assert "Networks, as the data, the device and the time suggest: segresnet: " in page
    monkeypatch.setattr(job_costs, "_measure", lambda *args: (0.1, 1.0, 0.5, 0.1, 0.2))
    table = forecast.plan_run(run, thick)
    rows = [line.split()[0] for line in table.splitlines()[1:5]]
    assert rows == [
        "segresnet_0",
        "resenc_0",
        "segresnet_1",
        "resenc_1",
    ]


def test_named_networks_are_planned_whatever_the_slices(run: Path) -> None:
    words = {**NO_MEASURING, "resample_resolution": "[1, 1, 4]", "folds": "[1]"}
    run_input(("generate",), run, {**words, "algos": "[segresnet, swinunetr, dints]"})
    assert planned(Workspace(run.parent / "work_dir")) == {"segresnet_1", "swinunetr_1", "dints_1"}
    assert not Workspace(run.parent / "work_dir").chosen_networks.exists()
    run_input(("generate",), run, words, algo="unet")
    assert "unet_1" in planned(Workspace(run.parent / "work_dir")), "--algo plans one that was not picked"


def test_rounds_share_one_choice(tmp_path: Path) -> None:
    path = make_phantoms(tmp_path, num_cases=4, num_testing=0, num_fold=2, annotated=[["sphere"], ["sphere", "box"]])
    run_input(("analyze", "generate"), path, {**NO_MEASURING, "resample_resolution": "[1, 1, 4]"})
    workspace = Workspace(tmp_path / "work_dir")
    assert workspace.num_rounds == 2
    assert planned(workspace.latest()) == {"segresnet_0", "segresnet_1", "resenc_0", "resenc_1"}
    assert workspace.chosen_networks.exists()
    assert not (tmp_path / "work_dir" / "round_1" / "state" / "networks.json").exists()


def test_a_sweep_checks_its_ranges_before_and_after_the_choice(run: Path) -> None:
    run.write_text(run.read_text() + "sweep: {parameters: {dints.channel_mul: {choices: [0.25, 0.5]}}}\n")
    settings, origins = load_settings(run, {"resample_resolution": "[1, 1, 4]"})
    assert read_space(with_any_network(settings), origins).parameters[0].key == "dints.channel_mul"
    with pytest.raises(ConfigError, match=r"dints is not among algos \(segresnet, resenc\)"):
        read_space(with_networks(Workspace(settings.work_dir), settings, anew=True), origins)
