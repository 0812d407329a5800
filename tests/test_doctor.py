"""`autoseg doctor`, `schema` and `completion`: what they say of a good machine and of a bad one."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from autoseg.cli.bug_report import bug_report, without_places
from autoseg.cli.commands import TAKES_SETTINGS, Commands
from autoseg.cli.completion import completion
from autoseg.cli.doctor import doctor, examine
from autoseg.cli.main import run_command
from autoseg.config.docs import setting_docs
from autoseg.config.schema import input_schema, schema_text
from autoseg.config.settings import Settings
from autoseg.hardware import packages
from autoseg.version import __version__

ROOT = Path(__file__).resolve().parents[1]


def states(folder: Path) -> dict[str, str]:
    return {check.name: check.state for check in examine(folder)}


def test_this_machine_can_run(tmp_path: Path) -> None:
    text, code = doctor(tmp_path / "not" / "there" / "yet")
    assert code == 0, text
    assert {"Python", "Packages", "torch", "Memory", "Disk", "Writing", "Open files"} <= set(states(tmp_path))
    assert "Ready for a run." in text
    assert list(tmp_path.iterdir()) == []
    for check in examine(tmp_path):
        assert check.state == "ok" or check.advice


def test_json(tmp_path: Path) -> None:
    text, _ = doctor(tmp_path, as_json=True)
    assert {"name", "state", "found", "advice"} == set(json.loads(text)[0])


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=1e12, used=1e12, free=5e8))
    text, code = doctor(tmp_path)
    assert code == 2
    assert "BAD   Disk" in text
    assert "give a work_dir on another disk" in text
    assert "A run cannot work here" in text


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    text, code = doctor(Path("/proc"))
    assert code == 2
    assert "BAD   Writing" in text
    assert "not possible in /proc" in text


def test_little_memory_and_few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoseg.hardware.limits.available_memory_bytes", lambda: 10**9)
    monkeypatch.setattr("resource.getrlimit", lambda kind: (256, 4096))
    found = states(tmp_path)
    assert (found["Memory"], found["Open files"]) == ("bad", "warn")


def test_a_run_that_takes_all_memory_and_disk_is_no_fault_of_the_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The healthcheck of the image: while a run is at work autoseg is still installed and working."""
    monkeypatch.setattr("autoseg.hardware.limits.available_memory_bytes", lambda: 10**8)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=1e12, used=1e12, free=5e8))
    monkeypatch.setattr("torch.cuda.is_available", lambda: pytest.fail("it would take memory of the GPU"))
    words = ["doctor", "--installed", "--folder", str(tmp_path)]
    assert run_command(words) == 0
    assert "Installed; memory, disk and GPU were not looked at. 0 bad" in capsys.readouterr().out
    assert run_command([*words[:2], "--folder", "/proc"]) == 2, "what it looks at counts"


def test_a_package_that_is_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "autoseg.hardware.packages.requires", lambda name: ["numpy>=99", "no-such-package", "ray; extra == 'ray'"]
    )
    found = next(c for c in examine(tmp_path) if c.name == "Packages")
    assert found.state == "bad"
    assert "wanted >=99" in found.found
    assert "no-such-package is missing" in found.found
    assert "ray" not in found.found
    assert found.advice == "In the folder of autoseg: pip install -c constraints.txt -e ."
    monkeypatch.setattr("autoseg.hardware.packages.is_checkout", lambda: False)
    found = next(c for c in examine(tmp_path) if c.name == "Packages")
    assert found.advice == "Run: pip install 'numpy>=99' no-such-package"


def test_advice_for_who_has_the_wheel_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert packages.install_advice("ray") == "In the folder of autoseg: pip install -c constraints.txt -e '.[ray]'"
    monkeypatch.setattr(packages, "PACKAGE", Path("/usr/lib/python3/site-packages/autoseg"))
    assert packages.install_advice("ray") == "Run: pip install 'autoseg3d[ray]'"
    assert packages.install_advice("ray,slurm") == "Run: pip install 'autoseg3d[ray,slurm]'"


def test_an_extra_that_is_not_there_is_said_and_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["numpy>=2", "pydicom>=3; extra == 'formats'", "no-such-package; extra == 'cloud'"]
    monkeypatch.setattr(packages, "requires", lambda name: lines)
    monkeypatch.setattr("importlib.metadata.metadata", lambda name: Message({"Provides-Extra": ["cloud", "formats"]}))
    found = next(c for c in examine(tmp_path) if c.name == "Extras")
    there, _, missing = found.found.partition("; not installed: ")
    assert (found.state, missing) == ("ok", "cloud")
    assert set(there.split(", ")) <= {"formats", "none"}
    assert found.advice == (
        "Only where you need them. In the folder of autoseg: pip install -c constraints.txt -e '.[cloud]'"
    )


class Message(dict[str, list[str]]):
    """Metadata as importlib.metadata gives them."""

    def get_all(self, name: str) -> list[str]:
        return self[name]


def distribution(folder: Path, name: str, number: str) -> None:
    """An installed distribution whose module is called autoseg."""
    info = folder / f"{name}-{number}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")
    (info / "top_level.txt").write_text("autoseg\n")


def test_another_package_called_autoseg_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Same name" not in states(tmp_path)
    distribution(tmp_path / "site", "autoseg", "0.0.9")
    monkeypatch.syspath_prepend(tmp_path / "site")
    found = next(c for c in examine(tmp_path) if c.name == "Same name")
    assert found.state == "warn"
    assert found.found == "`import autoseg` may mean another package; installed, too: autoseg 0.0.9"
    distribution(tmp_path / "site", "autoseg3d", "0.1.0")
    found = next(c for c in examine(tmp_path) if c.name == "Same name")
    assert "autoseg3d 0.1.0" in found.found


# -- the report of a bug


def test_the_report_of_a_bug_has_figures_and_no_names(finished_run: Path, tmp_path: Path) -> None:
    work_dir = shutil.copytree(finished_run / "work_dir", tmp_path / "Doe Jane" / "work_dir")
    path = work_dir / "settings.yaml"
    stored = yaml.safe_load(path.read_text())
    secrets = {"name": "DOE^JANE", "datalist": "/data/doe jane/list.json", "dataroot": "/data/doe jane"}
    for key, value in secrets.items():
        stored[key] = {"value": value, "origin": "input.yaml:1"}
    stored["class_names"] = {"value": ["doe", {"name": "jane", "index": [1, 2]}], "origin": "command line"}
    stored["sweep"] = {"value": {"storage": "postgresql://doe:secret@host/db", "folds": [0]}, "origin": "input.yaml:2"}
    path.write_text(yaml.safe_dump(stored, sort_keys=False))
    text = bug_report(tmp_path / "Doe Jane", work_dir)
    for word in ("doe", "jane", "secret", "phantom_0", str(tmp_path).lower(), str(Path.home()).lower() + "/"):
        assert word not in text.lower()
    lines = text.splitlines()
    assert "- algos: [segresnet, dints]" in lines
    assert "- learning_rate: 0.003" in lines
    assert "- dataroot: (not shown)" in lines
    assert "- class_names: [(not shown), {name: (not shown), index: [1, 2]}]" in lines
    assert "- sweep: {storage: (not shown), folds: [0]}" in lines
    assert "- segresnet done: 2" in lines
    assert any(line.startswith("- train: ok after ") for line in lines)
    assert f"| autoseg | {__version__} |" in lines


def test_places_are_taken_out() -> None:
    text = "3.11 at /home/jane doe/bin/python, 5 GB free at C:\\Users\\Doe (and 3.5 of 7 GB/s, 1/2), in ~/scans/doe.nii"
    assert without_places(text, ["/home/jane doe"]) == (
        "3.11 at (path)(path), 5 GB free at (path) (and 3.5 of 7 GB/s, 1/2), in (path)"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("doctor --work_dir x", "--work_dir: has an effect with --report alone. Add --report, or leave it out."),
        (
            "doctor --report --installed",
            "--installed: a report has all findings. Give --report or --installed, not both.",
        ),
        ("doctor --report --json", "--json: the report is Markdown. Give --report or --json, not both."),
        ("doctor --report --work_dir x", "--work_dir x: not a run's folder. Expected one with settings.yaml in it."),
    ],
)
def test_mistakes(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(words.split()) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.parametrize(
    ("driver", "build", "visible", "advice"),
    [
        (None, None, None, "Fine for small volumes"),
        ("/usr/bin/nvidia-smi", None, None, "torch was built for CPUs"),
        ("/usr/bin/nvidia-smi", "13.0", "", "CUDA_VISIBLE_DEVICES is empty"),
        ("/usr/bin/nvidia-smi", "13.0", None, "driver is too old for CUDA 13.0"),
    ],
)
def test_why_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, driver: str | None, build: str | None, visible: str | None, advice: str
) -> None:
    import torch

    from autoseg.cli import doctor as module

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(shutil, "which", lambda name: driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    check = next(module._gpu())
    assert check.state == "warn"
    assert advice in check.advice


# -- schema


def test_the_schema_in_the_docs_is_current() -> None:
    # As data: whether pydantic writes 0 or 0.0 changes with its version.
    assert json.loads((ROOT / "docs" / "input.schema.json").read_text()) == json.loads(schema_text()), "run `make docs`"
    assert (
        (ROOT / "input.yaml.example").read_text().startswith("# yaml-language-server: $schema=docs/input.schema.json\n")
    )


def test_the_schema_says_what_the_reader_says() -> None:
    import jsonschema

    schema = input_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    example = yaml.safe_load((ROOT / "input.yaml.example").read_text())
    assert list(validator.iter_errors(example)) == []
    good = {"modality": "CT", "datalist": "d.json", "dataroot": "."}
    assert validator.is_valid({**good, "amp": True, "class_names": ["a", {"name": "b", "index": [1, 2]}]})
    for bad in ({"num_epohs": 3}, {"num_epochs": "many"}, {"batch_size": 0}, {"algos": ["vnet"]}, {"roi_size": [1, 2]}):
        assert not validator.is_valid({**good, **bad}), bad
    assert not validator.is_valid({"modality": "CT"})


def test_the_schema_describes_every_setting() -> None:
    properties = input_schema()["properties"]
    for name in Settings.model_fields:
        assert properties[name]["description"] == setting_docs()[name].doc


# -- completion


def complete(script: str, *words: str) -> list[str]:
    """What bash offers for the last word."""
    line = " ".join(f"'{w}'" for w in words)
    program = (
        f"{script}\nCOMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _autoseg; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    done = subprocess.run(["bash"], input=program, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_bash_completes_commands_flags_and_choices() -> None:
    script = completion(Commands, TAKES_SETTINGS, "bash")
    assert complete(script, "autoseg", "pre") == ["pretrain", "predict"]
    assert complete(script, "autoseg", "run", "--bud") == ["--budget"]
    assert complete(script, "autoseg", "predict", "--bud") == []
    assert complete(script, "autoseg", "train", "--algo", "s") == ["segresnet", "swinunetr"]
    assert "--segresnet.init_filters" in complete(script, "autoseg", "run", "--segresnet.")


def test_other_shells(capsys: pytest.CaptureFixture[str]) -> None:
    for shell in ("zsh", "fish"):
        assert run_command(["completion", shell]) == 0
        assert "predict" in capsys.readouterr().out
    assert run_command(["completion", "cmd"]) == 2
    assert "expected one of bash, zsh, fish, found cmd" in capsys.readouterr().err
