"""A password in the address of a sweep's database is in no file of a run and in nothing that is shown."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path

import pytest
import yaml
from test_sweep import make_study

from autoseg.cli.main import run_command
from autoseg.config.load import load_settings
from autoseg.config.passwords import VARIABLE, take_password, with_environment, without_passwords
from autoseg.errors import ConfigError, ResourceError
from autoseg.pipeline.stages import STAGES
from autoseg.report.page import make_report

SECRET = "hunter2%2F!x"
URL = f"postgresql+psycopg2://me:{SECRET}@db.example.org:5432/study"
MASKED = f"postgresql+psycopg2://me:${VARIABLE}@db.example.org:5432/study"


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")


@pytest.mark.parametrize("place", ["input.yaml", "command line"])
def test_it_is_in_no_file_and_no_answer(
    phantom_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    text = (phantom_dataset / "input.yaml").read_text().replace("dataroot: .", f"dataroot: {phantom_dataset}")
    text = text.replace("datalist: ", f"datalist: {phantom_dataset}/")
    words = ["analyze", "--input", str(tmp_path / "input.yaml")]
    if place == "input.yaml":
        text += f'sweep:\n  storage: "{URL}"  # was {URL}\n'
    else:
        words += ["--sweep.storage", URL]
    (tmp_path / "input.yaml").write_text(text)
    assert run_command(words) == 0
    work_dir = tmp_path / "work_dir"
    make_report(work_dir, STAGES)
    for command in (["explain", "sweep.storage"], ["explain"], ["status"]):
        assert run_command([*command, "--work_dir", str(work_dir)]) == 0
    if place == "input.yaml":
        assert run_command(["explain", "sweep.storage", "--input", str(tmp_path / "input.yaml")]) == 0
    shown = capsys.readouterr()
    files = [path for path in work_dir.rglob("*") if path.is_file()]
    assert len(files) > 8
    for content in (shown.out, shown.err, *(path.read_bytes().decode(errors="replace") for path in files)):
        assert "hunter2" not in content
    assert yaml.safe_load((work_dir / "settings.yaml").read_text())["sweep"]["value"]["storage"] == MASKED
    assert MASKED in shown.out
    for name in ("settings.yaml", "input.yaml"):
        assert stat.S_IMODE((work_dir / name).stat().st_mode) == 0o600
    if place == "command line":
        assert MASKED in (work_dir / "state" / "commands.jsonl").read_text()
        assert stat.S_IMODE((work_dir / "state" / "commands.jsonl").stat().st_mode) == 0o600


def test_processes_that_are_started_here_have_it(phantom_dataset: Path) -> None:
    settings, _ = load_settings(phantom_dataset / "input.yaml", {"sweep.storage": URL})
    assert settings.sweep.storage == MASKED
    assert with_environment(MASKED) == "postgresql+psycopg2://me:hunter2%2F%21x@db.example.org:5432/study"


def test_an_address_names_variables() -> None:
    have = {"A": "p@ss:/w", "WHOLE": URL}
    assert with_environment("postgresql://me:$A@host/db", have) == "postgresql://me:p%40ss%3A%2Fw@host/db"
    assert with_environment("postgresql://me:${A}x@host/db", have) == "postgresql://me:p%40ss%3A%2Fwx@host/db"
    assert with_environment("$WHOLE", have) == URL
    assert with_environment("sqlite:///study.db", {}) == "sqlite:///study.db"
    with pytest.raises(ConfigError, match=r"\$B@h names\. Set it on each machine|variable B is not set"):
        with_environment("postgresql://me:$B@h/db", have)
    with pytest.raises(ConfigError, match="The command that began the sweep had the password"):
        with_environment(MASKED, {})


def test_passwords_are_told_from_the_rest() -> None:
    assert take_password("postgresql://me:$A@host/db") == "postgresql://me:$A@host/db"
    for url in ("sqlite:////data/a:b.db", "mysql://me@host:3306/db", "http://127.0.0.1:8040/", "12:30 me@host"):
        assert without_passwords(url) == url
    assert without_passwords("postgresql://h/db?user=me&password=hunter2&x=1") == (
        f"postgresql://h/db?user=me&password=${VARIABLE}&x=1"
    )
    assert without_passwords(f"a {URL} b {URL}") == f"a {MASKED} b {MASKED}"


def test_a_study_asks_for_the_variable_and_hides_the_password(tmp_path: Path, phantom_dataset: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(phantom_dataset, data)
    with pytest.raises(ConfigError, match=f"the environment variable {VARIABLE} is not set"):
        make_study(tmp_path, data, storage=MASKED)
    with pytest.raises((ConfigError, ResourceError)) as error:
        make_study(tmp_path, data, storage=URL)
    assert "hunter2" not in str(error.value)
    assert MASKED in str(error.value)
