"""A toy format, a toy metric and a toy launcher, added as CONTRIBUTING.md says to a copy of the package, and used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import nibabel as nib
import numpy as np
import pytest
from house import commands, copy_house, put

from autoseg.config.settings import Settings
from autoseg.evaluation.scores import METRICS
from autoseg.evaluation.tolerances import TOLERANCE_MM
from autoseg.launch import CLUSTERS

ROOT = Path(__file__).resolve().parents[1]

FORMAT = '''"""Images as text: a word that says so, the sizes, the spacing in mm, the voxels; first axis fastest."""

from pathlib import Path
from typing import TextIO

import numpy as np

from autoseg.data.formats.format import Format
from autoseg.data.formats.stored import Header, StoredVolume
from autoseg.data.grid import Grid


def read_start(file: TextIO) -> Header:
    file.readline()
    i, j, k = (int(word) for word in file.readline().split())
    spacing_mm = [float(word) for word in file.readline().split()]
    grid = Grid(shape=(i, j, k), affine=np.diag([*spacing_mm, 1.0]))
    return Header(grid=grid, num_channels=1, dtype=np.dtype(np.int16))


def read_header(path: Path) -> Header:
    with open(path) as file:
        return read_start(file)


def read(path: Path) -> StoredVolume:
    with open(path) as file:
        grid = read_start(file).grid
        array = np.array(file.read().split(), np.int16).reshape((*grid.shape, 1), order="F")
    return StoredVolume(array=array, grid=grid)


TEXT = Format(
    name="text",
    suffixes=(".voxels.txt",),
    recognise=lambda path, start: start.startswith(b"VOXELS"),
    read_header=read_header,
    read=read,
)
'''
METRIC = '''

def volume_difference(masks: ClassMasks) -> float:
    """Difference of the volumes in ml; NaN where both are empty."""
    voxel_ml = math.prod(masks.spacing_mm) / 1000
    pred, label = masks.voxels
    return math.nan if masks.is_empty else abs(pred - label) * voxel_ml


# -- the table

DICE ='''
ROW = """METRICS: tuple[Metric, ...] = (
    DICE,
    Metric(
        name="volume",
        score=volume_difference,
        short_title="volume difference",
        unit="ml",
        is_share=False,
        higher_is_better=False,
    ),
"""
LAUNCHER = '''"""One task after the other, as another machine would have them."""

from collections.abc import Sequence
from pathlib import Path

from autoseg.config.settings import Settings
from autoseg.launch import Ended, Task, run_command


def run(tasks: Sequence[Task], settings: Settings, ended: Ended, output: Path) -> None:
    for task in tasks:
        output.mkdir(parents=True, exist_ok=True)
        (output / "room.txt").write_text(" ".join([task.name, *task.words[:1]]))
        environment = task.environment("the other room")
        while ended(task, run_command(task.command(), output / f"{task.name}.out", environment)):
            pass


def has_gpus(settings: Settings) -> bool:
    return False


def num_workers(settings: Settings, gpus: int, cpus: int) -> int:
    return 1
'''


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with the three rows."""
    folder = copy_house(tmp_path_factory.mktemp("house"))
    formats = folder / "autoseg" / "data" / "formats"
    (formats / "text.py").write_text(FORMAT)
    put(formats / "table.py", "\n\nFORMATS", "\nfrom autoseg.data.formats.text import TEXT\n\nFORMATS")
    put(formats / "table.py", "= (NIFTI, ", "= (TEXT, NIFTI, ")
    scores = folder / "autoseg" / "evaluation" / "scores.py"
    put(scores, "\n\n# -- the table\n\nDICE =", METRIC)
    put(scores, "METRICS: tuple[Metric, ...] = (\n    DICE,\n", ROW)
    (folder / "autoseg" / "launch" / "other_room.py").write_text(LAUNCHER)
    put(folder / "autoseg" / "launch" / "__init__.py", 'CLUSTERS = {"ray"', 'CLUSTERS = {"room": "other_room", "ray"')
    settings = folder / "autoseg" / "config" / "settings.py"
    put(settings, 'launcher: Literal["local", ', 'launcher: Literal["local", "room", ')
    return folder


@pytest.fixture(scope="module")
def command(house: Path) -> Callable[..., str]:
    """Runs several commands in one process with the copy, and gives what they print."""

    def run(*each: list[str]) -> str:
        done = commands(house, *each)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_every_launcher_is_a_value_of_the_setting() -> None:
    assert get_args(Settings.model_fields["launcher"].annotation) == ("local", *CLUSTERS)


def test_a_new_launcher_trains_a_job(finished_run: Path, tmp_path: Path, command: Callable[..., str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run, copy_function=shutil.copy2)
    job = run / "work_dir" / "segresnet_0"
    shutil.rmtree(job / "models")  # so that it is trained again
    path = str(run / "input.yaml")
    command(["train", "--input", path, "--launcher", "room"])
    assert (job / "models" / "model.pt").exists()
    assert [path.read_text() for path in (run / "work_dir").rglob("room.txt")] == ["segresnet_0 train"]


def to_text(source: Path, target: Path) -> None:
    """Convert a NIfTI file whose axes are RAS."""
    image = nib.load(source)
    array = np.asarray(image.dataobj)
    spacing = " ".join(str(s) for s in image.header.get_zooms())
    target.parent.mkdir(parents=True, exist_ok=True)
    voxels = " ".join(str(int(v)) for v in array.ravel(order="F"))
    target.write_text(f"VOXELS\n{' '.join(map(str, array.shape))}\n{spacing}\n{voxels}\n")


def test_a_new_format_is_analysed_predicted_and_evaluated_and_a_new_metric_is_shown(
    finished_run: Path, tmp_path: Path, command: Callable[..., str]
) -> None:
    for kind in ("images", "labels"):
        to_text(finished_run / kind / "phantom_000.nii.gz", tmp_path / kind / "phantom_000.voxels.txt")
    run = tmp_path / "run"
    shutil.copytree(finished_run, run, copy_function=shutil.copy2)
    (run / "work_dir" / "ensemble" / "ensemble.json").unlink()  # so that the stage is done again
    work_dir = ["--work_dir", str(run / "work_dir"), "--algo", "segresnet", "--device", "cpu"]
    pairs = {"text": tmp_path / "images", "nifti": tmp_path / "nifti"}
    pairs["nifti"].mkdir()
    image = nib.load(finished_run / "images" / "phantom_000.nii.gz")
    affine = np.diag([*image.header.get_zooms(), 1.0])  # the grid of the text, which has no origin
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), affine), pairs["nifti"] / "phantom_000.nii.gz")
    predicts = [
        ["predict", "--image", str(i), "--output", str(tmp_path / f"out_{n}"), *work_dir] for n, i in pairs.items()
    ]
    text = command(
        ["analyze", "--data", str(tmp_path), "--json"],
        *predicts,
        [
            *("evaluate", "--predictions", str(tmp_path / "out_text"), "--labels", str(tmp_path / "labels")),
            *("--output", str(tmp_path / "scores.json")),
        ],
        ["ensemble", "--input", str(run / "input.yaml")],
    )
    # The analysis: one sound case with its label.
    summary, _ = json.JSONDecoder().raw_decode(text[text.index("{") :])
    assert summary["cases"]["training"] == 1
    assert summary["faults"] == []
    # The prediction: the labels of the same image as NIfTI.
    labels = [np.asarray(nib.load(tmp_path / f"out_{n}" / "phantom_000.nii.gz").dataobj) for n in pairs]
    np.testing.assert_array_equal(*labels)
    assert labels[0].any()
    # The metric, in the table and the file of `evaluate`.
    others = [word for m in METRICS[1:] if m.family == "whole" for word in (*m.heading(TOLERANCE_MM).split(), "std")]
    head = next(line for line in text.splitlines() if line.startswith("class ")).split()
    assert head == ["class", "dice", "std", "95%", "low", "high", "volume", "ml", "std", *others, "n"]
    truth = nib.load(finished_run / "labels" / "phantom_000.nii.gz")
    voxel_ml = np.prod(truth.header.get_zooms()) / 1000
    voxels = [[int((array == v).sum()) for v in (1, 2)] for array in (labels[0], np.asarray(truth.dataobj))]
    expected = [abs(a - b) * voxel_ml for a, b in zip(*voxels, strict=True)]
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["cases"]["phantom_000"]["volume"] == pytest.approx(expected, abs=1e-5)
    assert scores["metrics"]["volume"] == {"unit": "ml", "higher_is_better": False}
    # In the ensemble's scores, per case and on the whole, and in the report.
    scores = json.loads((run / "work_dir" / "ensemble" / "scores.json").read_text())
    by_case = [case["volume"] for case in scores["ensemble"].values()]
    assert scores["volume"]["mean"] == pytest.approx(np.mean(by_case), abs=1e-5)
    before = json.loads((finished_run / "work_dir" / "ensemble" / "scores.json").read_text())
    assert [scores[name] for name in ("dice", "nsd")] == [before[name] for name in ("dice", "nsd")]
    page = (run / "work_dir" / "report.html").read_text()
    assert "Volume difference (ml) of the" in page
    assert "volume difference. Lower is better." in page
