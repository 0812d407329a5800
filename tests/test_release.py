"""The files that release, test in public and welcome strangers: valid, pinned, and true of this repository."""

from __future__ import annotations

import importlib.util
import re
import shutil
import socket
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml
from _pytest.mark.expression import Expression

from autoseg.data.formats.table import read_grid
from autoseg.export.pack import pack
from autoseg.version import __version__

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
DOCKERFILE = (ROOT / "Dockerfile").read_text()
WELCOMING = ("AGENTS.md", "CODE_OF_CONDUCT.md", "CONTRIBUTING.md", "GOVERNANCE.md", "SECURITY.md")


def module_of(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def steps_of(path: Path) -> list[dict[str, Any]]:
    return [step for job in yaml.safe_load(path.read_text())["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.name)
def test_workflows_are_pinned_and_may_only_read(path: Path) -> None:
    data = yaml.safe_load(path.read_text())
    assert data["permissions"] == {"contents": "read"}
    for name, job in data["jobs"].items():
        assert job["timeout-minutes"] <= 350, name
        assert {*job.get("permissions", {})} <= {"id-token"}, name
        assert job["steps"], name
    for uses in re.findall(r"uses: (.*)", path.read_text()):
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", uses), uses
    for step in steps_of(path):
        assert ("uses" in step) != ("run" in step)
        assert "${{" not in step.get("run", ""), "a value of an event would be run as shell"
        if "checkout" in step.get("uses", ""):
            assert step["with"]["persist-credentials"] is False


def test_every_action_has_one_digest() -> None:
    pins: dict[str, set[str]] = {}
    for path in WORKFLOWS:
        for name, pin in re.findall(r"uses: (\S+)@(.*)", path.read_text()):
            pins.setdefault(name, set()).add(pin)
    assert {name: len(values) for name, values in pins.items() if len(values) > 1} == {}


def test_only_publishing_has_the_token_and_it_runs_nothing() -> None:
    jobs = {name: job for path in WORKFLOWS for name, job in yaml.safe_load(path.read_text())["jobs"].items()}
    with_token = {name: job for name, job in jobs.items() if job.get("permissions")}
    assert set(with_token) == {"publish"}
    assert [step for step in with_token["publish"]["steps"] if "run" in step] == []
    assert with_token["publish"]["environment"] == "pypi"


def test_what_the_workflows_run_exists() -> None:
    for path in [*WORKFLOWS, ROOT / ".ci" / "run"]:
        assert set(re.findall(r"\bmake ([a-z-]+)", path.read_text().replace("make targets", ""))) <= TARGETS, path.name
        for name in re.findall(r"\btests/test_\w+\.py", path.read_text()):
            assert (ROOT / name).exists(), name


def test_every_test_runs_somewhere_with_all_that_it_needs() -> None:
    """Those that are slow and need an extra, too, which a target without the extras would skip in silence."""
    makefile = (ROOT / "Makefile").read_text()
    whole = []
    for target, needs, recipe in re.findall(r"^(test[\w-]*): (.*)\n((?:\t.*\n)+)", makefile, flags=re.MULTILINE):
        chosen = re.search(r'-m "([^"]+)"', recipe)
        assert chosen, target
        if "AUTOSEG_TEST_EXTRAS=1" in recipe:
            assert "$(VENV)/.extras" in needs, target
            whole.append((Expression.compile(chosen[1]), needs))
    for marks in ({"extra"}, {"extra", "slow"}):
        fitting = [needs for expression, needs in whole if expression.evaluate(lambda name: name in marks)]  # noqa: B023
        assert len(fitting) == 1, marks
    assert "$(VENV)/.release" in fitting[0], "slow ones build the wheel"


def test_what_is_published_is_what_was_tested() -> None:
    """Tests of the wheel come first; nothing after them may build another one."""
    runs = [step["run"] for step in steps_of(ROOT / ".github" / "workflows" / "release.yml") if "run" in step]
    after = runs[runs.index("make release-check PYTHON=python") + 1 :]
    rules = dict(re.findall(r"^([\w-]+): (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for target in re.findall(r"\bmake ([a-z-]+)", " ".join(after)):
        assert "package" not in rules[target].split(), target


def test_public_ci_tests_what_the_metadata_promise() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    promised = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    assert jobs["tests"]["strategy"]["matrix"]["python"] == promised
    assert {step["run"] for step in jobs["tests"]["steps"] if "run" in step} == {
        "make test PYTHON=python",
        "make test-extras PYTHON=python",
    }


def test_templates_ask_for_the_report() -> None:
    folder = ROOT / ".github"
    for path in folder.rglob("*.yml"):
        assert yaml.safe_load(path.read_text()), path.name
    for form in ("bug.yml", "wish.yml"):
        assert "autoseg doctor --report" in (folder / "ISSUE_TEMPLATE" / form).read_text()
    assert "autoseg doctor --report" in (folder / "PULL_REQUEST_TEMPLATE.md").read_text()


def test_the_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {citation["version"], module_of(ROOT / ".ci" / "release_check.py").version_of(ROOT)} == {__version__}
    released = __version__.partition(".dev")[0]
    assert re.search(rf"^## {re.escape(released)} - ", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    torch = re.search(r"^torch==(.*)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert torch
    assert f"torch=={torch[1]}\n" in (ROOT / "Makefile").read_text()


def test_a_release_is_refused_until_everything_is_ready(tmp_path: Path) -> None:
    check = module_of(ROOT / ".ci" / "release_check.py")
    for name in ("CHANGELOG.md", "CITATION.cff", "pyproject.toml", *WELCOMING):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / ".github", tmp_path / ".github")
    (tmp_path / "autoseg").mkdir()
    (tmp_path / "autoseg" / "version.py").write_text('__version__ = "0.9.0.dev0"\n')
    faults = check.faults_of(tmp_path)
    assert faults[:3] == [
        "autoseg/version.py: 0.9.0.dev0 is no release. Expected a version such as 0.2.0.",
        "CHANGELOG.md: no heading `## 0.9.0.dev0 - YYYY-MM-DD`. Give the version its date.",
        "CITATION.cff: another version than 0.9.0.dev0.",
    ]
    assert [fault.partition(":")[0] for fault in faults[3:]] == [
        "CITATION.cff", "CODE_OF_CONDUCT.md", "SECURITY.md", "pyproject.toml",
    ]  # fmt: skip
    (tmp_path / "autoseg" / "version.py").write_text('__version__ = "0.9.0"\n')
    (tmp_path / "CHANGELOG.md").write_text("## 0.9.0 - 2027-01-02\n")
    (tmp_path / "CITATION.cff").write_text("version: 0.9.0\n")
    (tmp_path / "pyproject.toml").write_text("")
    for name in ("SECURITY.md", "CODE_OF_CONDUCT.md"):
        (tmp_path / name).write_text("")
    assert check.faults_of(tmp_path) == []


# -- containers


def test_the_dockerfile_keeps_its_promises() -> None:
    for line in re.findall(r"pip (?:install|wheel).*", DOCKERFILE):
        assert "--no-cache-dir" in line
    runtime = DOCKERFILE.partition(" AS runtime")[2].partition(" AS challenge")[0]
    assert runtime.index("USER 1000") < runtime.index("HEALTHCHECK") < runtime.index("ENTRYPOINT")
    command = '["autoseg", "doctor", "--installed", "--folder", "/tmp"]'
    assert re.search(rf"^HEALTHCHECK .*CMD {re.escape(command)}$", runtime, flags=re.MULTILINE)
    assert re.findall(r"^ARG (\w+)=", runtime, flags=re.MULTILINE) == ["DEVICE"]  # CPU or CUDA by one argument
    python = re.search(r"^ARG PYTHON=(3\.\d+)", DOCKERFILE, flags=re.MULTILINE)
    assert python
    assert f"Python :: {python[1]}" in (ROOT / "pyproject.toml").read_text()


def test_what_the_dockerfile_copies_is_there_and_let_through() -> None:
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [line.split()[1:-1] for line in re.findall(r"^(COPY (?!--).*)$", DOCKERFILE, flags=re.MULTILINE)]
    names = {name.replace("${MODEL}", "*.zip") for line in copied for name in line}
    assert names == let_through
    assert [name for name in names - {"*.zip"} if not (ROOT / name).exists()] == []


def test_a_model_of_any_name_lies_where_the_container_looks_for_it() -> None:
    (place,) = re.findall(r"^COPY \$\{MODEL\} (.*)$", DOCKERFILE, flags=re.MULTILINE)
    assert f'default=Path("{place}")' in (ROOT / "examples" / "grand_challenge" / "segment.py").read_text()


def test_a_challenge_container_needs_no_home_and_no_network(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("there is no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.delenv("HOME")
    entry = module_of(ROOT / "examples" / "grand_challenge" / "segment.py")
    images = tmp_path / "input" / "images" / "mr"
    images.mkdir(parents=True)
    pack(finished_run / "work_dir", tmp_path / "model.zip")
    words = ["--input", str(tmp_path / "input"), "--output", str(tmp_path / "output")]
    words += ["--model", str(tmp_path / "model.zip")]
    assert entry.main(words) == 2
    assert "no image in a format that is read" in capsys.readouterr().err
    shutil.copy(finished_run / "images" / "phantom_000.nii.gz", images / "case.nii.gz")
    assert entry.main(words) == 0
    assert capsys.readouterr().out == "1 image segmented\n"
    result, _ = read_grid(tmp_path / "output" / "images" / "segmentation" / "case.mha")
    source, _ = read_grid(images / "case.nii.gz")
    assert result.shape == source.shape
    np.testing.assert_allclose(result.affine, source.affine, atol=1e-4)
    (images.parent / "ct").mkdir()
    shutil.copy(images / "case.nii.gz", images.parent / "ct")
    assert entry.main(words) == 2
    assert "several images are called case" in capsys.readouterr().err
