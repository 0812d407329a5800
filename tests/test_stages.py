"""The table of stages: what reads it agrees with it, and a stage is added as CONTRIBUTING.md says."""

import re
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import house
import pytest

import autoseg
from autoseg.cli.commands import TAKES_SETTINGS
from autoseg.errors import ConfigError
from autoseg.pipeline.stages import PLAIN_RUN, STAGES, stage_named, stages_named

ROOT = Path(__file__).resolve().parents[1]
NAMES = [stage.name for stage in STAGES]


# -- the table and what reads it


def test_the_readme_has_a_line_for_each_stage() -> None:
    rows = re.findall(r"^\| `autoseg (\w+)` \| (.*) \| (.*) \|$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert rows[: len(STAGES)] == [(stage.name, stage.reads, stage.writes) for stage in STAGES]


@pytest.mark.parametrize("stage", STAGES, ids=NAMES)
def test_texts_name_each_stage(stage) -> None:  # type: ignore[no-untyped-def]
    flow = re.search(r"```\n(.*?)```", (ROOT / "docs" / "how-it-works.md").read_text(), flags=re.DOTALL)
    assert flow is not None
    assert re.search(rf"^ +{stage.name} +->", flow[1], flags=re.MULTILINE)
    tour = (ROOT / "autoseg" / "pipeline" / "run.py").read_text().split('"""')[1]
    assert re.search(rf"^ +{stage.name} +->", tour, flags=re.MULTILINE)


def test_the_manual_names_every_command_that_takes_settings() -> None:
    manual = (ROOT / "docs" / "settings.md").read_text().partition("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", manual.partition("be given to")[2].partition("as\n")[0]))
    assert named == TAKES_SETTINGS - {*NAMES}


def test_rows_fit_together() -> None:
    assert len({*NAMES}) == len(NAMES)
    assert [stage.name for stage in STAGES if stage.where == "run"] == NAMES[:2], "rounds follow from the analysis"
    assert [stage.name for stage in STAGES if not stage.needs] == NAMES[:1]
    for stage in STAGES:
        assert stage.doc.endswith(".")
        for name in stage.needs:
            needed = stage_named(name)
            assert needed.inputs is not None
            assert needed.out_of_date, f"{stage.name} would end in a message without words about {name}"


def test_a_whole_run_has_the_stages_between_rounds() -> None:
    rows, is_whole = stages_named(PLAIN_RUN)
    assert is_whole
    assert [row.name for row in rows] == NAMES
    rows, is_whole = stages_named(["train", "generate"])
    assert not is_whole
    assert [row.name for row in rows] == ["generate", "train"], "in the order of the table"
    rows, is_whole = stages_named(["pseudolabel"])
    assert (not is_whole, [row.name for row in rows]) == (True, ["pseudolabel"])


def test_stages_that_cannot_be_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as wrong:
        autoseg.run(tmp_path / "input.yaml", stages=["trian"])
    assert wrong.value.messages == ("trian: no such stage. Did you mean train?",)
    with pytest.raises(ConfigError) as mixed:
        stages_named(["pseudolabel", "train"])
    assert str(mixed.value) == (
        f"pseudolabel: runs between rounds. Run it by itself, or {', '.join(PLAIN_RUN)} together."
    )


# -- a stage of one's own

FUNCTION = '''
def toy_inputs(run: RunContext, place: Workspace) -> Mapping[str, str]:
    """The combination that was chosen."""
    return {"ensemble": place.ensemble_spec.read_text()}


def toy(run: RunContext, place: Workspace) -> Outcome:
    """Count the predictions."""
    num = len(list(place.predictions.glob("*.nii.gz")))
    (place.root / "toy.txt").write_text(str(num))
    return Outcome(text=f"The toy counts {num} predictions.")


# -- the table
'''
ROW = '''    Stage(
        name="toy",
        doc="Count the predictions.",
        reads="`ensemble/`",
        writes="`toy.txt`",
        where="each round",
        needs=("analyze", "pseudolabel"),
        ready=need_models,
        inputs=toy_inputs,
        run=toy,
    ),
)
"""Every stage, in the order'''


@pytest.fixture
def with_toy(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the command of a copy of the package in which there is one more stage."""
    package = house.copy_house(tmp_path / "package")
    table = package / "autoseg" / "pipeline" / "stages.py"
    house.put(table, "\n# -- the table\n", FUNCTION)
    house.put(table, ')\n"""Every stage, in the order', ROW)
    return partial(house.autoseg, package)


def test_a_stage_is_a_function_and_a_row(
    with_toy: Callable[..., subprocess.CompletedProcess[str]], finished_run: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished_run, tmp_path / "run", copy_function=shutil.copy2)
    path, work = tmp_path / "run" / "input.yaml", tmp_path / "run" / "work_dir"
    assert re.search(r"^  toy +Count the predictions\.$", with_toy("--help").stdout, flags=re.MULTILINE)
    assert "Usage: autoseg toy [flags]" in with_toy("toy", "--help").stdout

    done = with_toy("run", "--input", path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("is done (Dice") == 4, "nothing is trained again"
    assert "toy: starting" in done.stderr
    assert done.stdout.endswith("The toy counts 2 predictions.\n")
    assert (work / "toy.txt").read_text() == "2"
    assert re.search(r"\ntoy +2\d\d\d-", with_toy("status", "--work_dir", work).stdout)
    assert re.search(r">\s*toy\b.{0,80}\bdone\b", (work / "report.html").read_text(), flags=re.DOTALL)
    assert "so far:   done" in with_toy("explain", "toy", "--work_dir", work).stdout

    again = with_toy("toy", "--input", path)
    assert "toy: up to date" in again.stderr
    assert again.stdout == ""
