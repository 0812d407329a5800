"""The commands as installed: whole messages, exit codes, help, and nothing run before all words are right."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import cpu_s

from autoseg.cli import main as cli
from autoseg.cli.arguments import command_names, describe_parameters, parameter_types, parse
from autoseg.cli.commands import TAKES_SETTINGS, Commands
from autoseg.cli.main import SPIN_COUNT, run_command
from autoseg.config.docs import setting_docs
from autoseg.config.networks import NETWORKS
from autoseg.errors import ConfigError
from autoseg.version import __version__


def installed(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a folder, as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "autoseg", *words], cwd=folder, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder in which the system lets nobody make anything")
@pytest.mark.parametrize("words", [("schema", "--output", "/proc/none/x.json"), ("demo", "--folder", "/proc/none")])
def test_an_output_where_no_folder_can_be_made(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: /proc/none: no folder can be made here. Give a folder that you may write to"), said


@pytest.mark.parametrize(
    ("words", "errors"),
    [
        (["trian"], ["trian: unknown command. Did you mean train?"]),
        (["run", "--num_epohs", "3"], ["--num_epohs: unknown flag. Did you mean --num_epochs?"]),
        (
            ["run", "--input", "nowhere.yaml"],
            ["nowhere.yaml: no such file. Write one with `autoseg init DATA_FOLDER`, or name it with --input FILE."],
        ),
        (
            ["train", "--algo", "segresnt", "--fold", "x"],
            [
                f"--algo: expected one of {', '.join(NETWORKS)}, found segresnt. Did you mean segresnet?",
                "--fold: expected a whole number, found x.",
            ],
        ),
        (
            ["predict", "--image"],
            [
                "--image: no value given. Expected a path.",
                "--output: missing. The label file to write, or the folder for the label files. "
                "Expected autoseg predict --image IMAGE --output OUTPUT [flags].",
            ],
        ),
    ],
)
def test_mistakes(tmp_path: Path, words: list[str], errors: list[str]) -> None:
    done = installed(tmp_path, *words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [f"error: {line}" for line in errors]
    assert list(tmp_path.iterdir()) == []


def test_faults_of_file_and_flags_together(tmp_path: Path) -> None:
    (tmp_path / "input.yaml").write_text("modality: CT\nmodality: MRI\ndatalist: d.json\nnum_epohs: 3\ntta: maybe\n")
    done = installed(tmp_path, "run", "--segresnet.batch_size", "0", "--work_dir", "2024_01")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: input.yaml: dataroot: missing. Expected a path: Folder the paths in the datalist are relative to; "
        "relative to the folder of input.yaml.",
        "error: input.yaml:2: modality: already given on line 1. Keep one of the two.",
        "error: input.yaml:4: num_epohs: unknown key. Did you mean num_epochs?",
        "error: input.yaml:5: tta: expected true or false, found maybe.",
        "error: --segresnet.batch_size: expected a whole number >= 1, found 0.",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["input.yaml"]


def faults(*words: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(Commands, TAKES_SETTINGS, words)
    return list(caught.value.messages)


@pytest.mark.parametrize(
    ("words", "errors"),
    [
        ("--input x run", ["--input: expected a command first: autoseg COMMAND --flag value. See autoseg --help."]),
        ("train --fold 1 --fold 2", ["--fold: given twice, 1 and 2. Give it once."]),
        ("train -fold 1", ["-fold: not a flag. Write --fold."]),
        ("train --fold=1.5", ["--fold: expected a whole number, found 1.5."]),
        ("explain a b", ["b: surplus; expected autoseg explain [KEY] [flags]. A flag is written --flag value."]),
        ("run x", ["x: surplus; expected autoseg run [flags]. A flag is written --flag value."]),
        ("predict --image a --output b --num_epochs 3", None),
        ("status --work_dirr x", ["--work_dirr: unknown flag. Did you mean --work_dir?"]),
        (
            "run --segresnet.init_filtrs 8",
            ["--segresnet.init_filtrs: unknown flag. Did you mean --segresnet.init_filters?"],
        ),
        ("run --num_epochs", ["--num_epochs: no value given. Expected a whole number >= 1."]),
        ("analyze --json=maybe", ["--json: expected true or false, found maybe."]),
        ("init", ["data_folder: missing. The data set. Expected autoseg init DATA_FOLDER [flags]."]),
        (
            "init a --seed 2024_01",
            ["--seed: expected a whole number, found 2024_01. Write 202401, without underscores."],
        ),
    ],
)
def test_words_that_are_refused(words: str, errors: list[str] | None) -> None:
    found = faults(*words.split())
    if errors is None:
        assert found[0].startswith("--num_epochs: unknown flag.")
    else:
        assert found == errors


def test_words_that_are_taken() -> None:
    call = parse(Commands, TAKES_SETTINGS, ["train", "--work-dir=2024_01", "--fold", "2", "--tta", "--seed", "-1"])
    assert call.arguments == {"fold": "2"}
    assert call.overrides == {"work_dir": "2024_01", "tta": "true", "seed": "-1"}
    call = parse(Commands, TAKES_SETTINGS, ["init", "1e3", "--force", "--output", "a,b"])
    assert call.arguments == {"data_folder": "1e3", "force": "true", "output": "a,b"}
    call = parse(Commands, TAKES_SETTINGS, ["init", "--force", "folder"])
    assert call.arguments == {"force": "true", "data_folder": "folder"}
    call = parse(Commands, TAKES_SETTINGS, ["run", "--tta", "false", "--ensemble", "no", "--algos=dints"])
    assert call.overrides == {"tta": "false", "ensemble": "no", "algos": "dints"}


def test_values_reach_the_command_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def init(self: Commands, data_folder: Path, *, output: Path, num_fold: int = 5, force: bool = False) -> int:
        """Stand in for a command."""
        seen.append((data_folder, output, num_fold, force))
        return 1

    monkeypatch.setattr(Commands, "init", init)
    assert run_command(["init", "2024_01", "--output=a#b,[c]", "--num_fold", "3", "--force"]) == 1
    assert seen == [(Path("2024_01"), Path("a#b,[c]"), 3, True)]


@pytest.mark.parametrize("words", ["--help", "run --help", "train --fold 2 --help", "-h", "", "help --help"])
def test_help_runs_nothing(words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_execute", lambda call: pytest.fail("ran"))
    assert run_command(words.split()) == 0
    assert "Usage: autoseg" in capsys.readouterr().out


def test_program_help_has_a_line_for_each_command(capsys: pytest.CaptureFixture[str]) -> None:
    run_command(["--help"])
    lines = capsys.readouterr().out.splitlines()
    for name in command_names(Commands):
        assert sum(line.startswith(f"  {name} ") for line in lines) == 1
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("name", command_names(Commands))
def test_command_help_is_complete(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    run_command([name, "--help"])
    text = capsys.readouterr().out
    function = getattr(Commands, name)
    assert set(describe_parameters(function)) == set(parameter_types(function))
    assert all(f"\n  --{flag}  " in text or f"\n  {flag.upper()}  " in text for flag in parameter_types(function))
    assert f"\nExample:\n  autoseg {name}" in text
    if name in TAKES_SETTINGS:
        assert all(
            f"\n  --{key}  " in text for key, doc in setting_docs().items() if not doc.block and "block" not in doc.type
        )


@pytest.mark.parametrize("name", command_names(Commands))
def test_every_example_passes_the_check(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    run_command([name, "--help"])
    examples = capsys.readouterr().out.partition("\nExample:\n")[2].splitlines()
    assert examples
    for line in examples:
        assert parse(Commands, TAKES_SETTINGS, line.split()[1:]).command == name


def test_version(tmp_path: Path) -> None:
    assert installed(tmp_path, "--version").stdout == f"autoseg {__version__}\n"


def test_help_is_quick_and_without_torch(tmp_path: Path) -> None:
    bare = min(cpu_s("-c", "pass", cwd=tmp_path) for _ in range(5))
    # Seconds of the processor, the best of some, so that other work does not count: 0.012 and 0.050 here.
    assert min(cpu_s("-c", "import autoseg", cwd=tmp_path) for _ in range(5)) - bare < 0.1
    assert min(cpu_s("-m", "autoseg", "--help", cwd=tmp_path) for _ in range(5)) - bare < 0.2
    words = [sys.executable, "-X", "importtime", "-m", "autoseg", "run", "--help"]
    log = subprocess.run(words, capture_output=True, text=True, check=True).stderr
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in log.splitlines()}
    assert "autoseg" in loaded
    assert not loaded & {"torch", "monai", "scipy", "sklearn", "matplotlib", "nibabel", "fire"}


QUICK = """
import gc, sys
from autoseg.cli.imports import quick_imports
with quick_imports():
    from autoseg.pipeline.run import run_input
    assert not gc.isenabled()
loaded = sorted({"nibabel", "pydicom", "sklearn", "torch"} & sys.modules.keys())
print(loaded, gc.isenabled(), gc.get_freeze_count() > 0)
import pydicom
print(pydicom.dcmread.__name__)
"""


def test_stages_start_without_pydicom_which_can_be_loaded_later(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", QUICK], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("['nibabel'] True True\ndcmread\n", "")


def test_a_bug_keeps_its_traceback(tmp_path: Path) -> None:
    code = "import autoseg.cli.main as c; c.run_command = lambda argv: 1 / 0; c.main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-2] == "ZeroDivisionError: division by zero"
    assert lines[-1] == (
        f"This is a bug in autoseg {__version__}, not in your data. Please report it with the lines above."
    )


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(call: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_execute", interrupt)
    assert run_command(["status"]) == 130
    assert capsys.readouterr().err == "interrupted. The same command goes on from here.\n"


@pytest.mark.skipif(sys.platform != "linux", reason="ulimit -v holds on Linux alone")
def test_too_few_addresses_are_refused_before_torch_is_loaded(tmp_path: Path) -> None:
    """With 0.5 GiB its libraries cannot be loaded, and with 0.75 it aborts, which nothing can catch."""
    code = (
        "import resource, sys; from autoseg.cli.main import run_command\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "code = run_command(['status']); print('torch' in sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "False\n")
    assert done.stderr == (
        "error: the address space of this process is limited to 1.00 GiB (ulimit -v). Loading PyTorch takes 1.5 GiB, "
        "images take more, and a GPU tens of GiB. Say `ulimit -v unlimited`, or ask the batch system for more memory.\n"
    )


@pytest.mark.parametrize(
    ("error", "limit", "words"),
    [
        (MemoryError(), None, "memory ran out. Close other programs, or allow this one more memory."),
        (SystemError("error return without exception set"), 4 << 30, "memory ran out."),
        (SystemError("error return without exception set"), None, ""),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), None, "memory ran out."),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), None, "memory ran"),
        (RuntimeError("can't start new thread"), None, "can't start new thread. Allow more processes (ulimit -u)"),
        (ImportError("libx.so: failed to map segment from shared object"), None, "failed to map segment"),
        (RuntimeError("a bug"), 4 << 30, ""),
    ],
)
def test_a_shortage_is_no_bug(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    limit: int | None,
    words: str,
) -> None:
    def fail(call: object) -> int:
        raise error

    monkeypatch.setattr(cli, "_execute", fail)
    monkeypatch.setattr("autoseg.hardware.system.address_space_limit_bytes", lambda: limit)
    if not words:
        with pytest.raises(type(error)):
            run_command(["status"])
        return
    assert run_command(["status"]) == 2
    assert words in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_bug(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, "-m", "autoseg", "run", "--help"]
    with os.fdopen(write, "wb") as output:
        done = subprocess.run(words, stdout=output, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("given", "wanted"), [({}, SPIN_COUNT), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "")]
)
def test_threads_do_not_wait_on_and_on(given: dict[str, str], wanted: str) -> None:
    code = (
        "import atexit, os, sys; sys.argv = ['autoseg', '--version']\n"
        "atexit.register(lambda: print(os.environ.get('GOMP_SPINCOUNT', ''), 'torch' in sys.modules))\n"
        "from autoseg.cli.main import main; main()"
    )
    known = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**known, **given}, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == f"{wanted} False"


def test_an_interrupt_in_a_callback_of_pythons_own_is_not_lost() -> None:
    """As in those of weak references, where Python prints it and goes on."""
    script = """
import signal, time
from autoseg.cli import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored

class Watched:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

def status(self):
    Watched()
    time.sleep(600)

main.Commands.status = status
main.main()
"""
    words = [sys.executable, "-c", script, "status"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "interrupted. The same command goes on from here.\n")
