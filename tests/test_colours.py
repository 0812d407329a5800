"""Colours of segments: read from label files, kept in the settings by `init`, and written with predictions."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml
from other_formats import write_image, write_series
from tiny_jobs import make_job

from autoseg.cli.main import run_command
from autoseg.data.formats.format import LabelFile
from autoseg.data.formats.label_files import open_segmentation
from autoseg.data.formats.segmentation import Colour
from autoseg.data.formats.table import WRITERS
from autoseg.data.grid import Grid
from autoseg.data.labels import LabelMap
from autoseg.data.segments import class_colours, segments_of
from autoseg.ensemble.predict import predict_files
from autoseg.workspace.settings import write_settings
from autoseg.workspace.workspace import Workspace

SHAPE, AFFINE = (20, 18, 16), np.diag([-1.0, -1.0, 2.0, 1.0])
GRID = Grid(shape=SHAPE, affine=AFFINE)
ORGANS = LabelMap(names=("liver", "spleen"), values=((1,), (2,)))
COLOURS: dict[str, Colour] = {"liver": (221, 130, 101), "spleen": (0, 255, 3)}


def label() -> np.ndarray:
    array = np.zeros(SHAPE, np.uint8)
    array[2:8, 3:9, 4:8], array[10:15, 3:9, 4:8] = 1, 2
    return array


def write(path: Path, name: str, images: tuple[Path, ...] = (), colours: dict[str, Colour] = COLOURS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    segments = segments_of(ORGANS, {}, colours)
    WRITERS[name].write(path, LabelFile(grid=GRID, array=label(), segments=segments, images=images))
    return path


def colours_of(path: Path) -> dict[str, Colour]:
    segmentation = open_segmentation(path)
    assert segmentation is not None
    return dict(segmentation.colours)


@pytest.mark.parametrize("name", ["seg.nrrd", "dicomseg", "rtstruct"])
def test_colours_come_back(tmp_path: Path, name: str) -> None:
    series = write_series(tmp_path / "series", label().astype(np.int16), AFFINE)
    back = colours_of(write(tmp_path / f"a.{'seg.nrrd' if name == 'seg.nrrd' else 'dcm'}", name, (series,)))
    assert list(back) == list(COLOURS)
    for segment, colour in COLOURS.items():
        np.testing.assert_allclose(back[segment], colour, atol=1 if name == "dicomseg" else 0)


@pytest.mark.parametrize("text", ["", "1 2", "red green blue", "nan 0 0", "0 inf 0"])
def test_a_colour_that_is_none_is_left_out(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "a.seg.nrrd", "seg.nrrd")
    content = path.read_bytes()
    start = content.index(b"Segment0_Color:=") + len(b"Segment0_Color:=")
    path.write_bytes(content[:start] + text.encode() + content[content.index(b"\n", start) :])
    assert colours_of(path) == {"spleen": COLOURS["spleen"]}


def test_other_classes_have_colours_that_are_not_taken() -> None:
    usual = class_colours(3)
    names = LabelMap(names=("a", "b", "c"), values=((1,), (2,), (3,)))
    assert [s.colour for s in segments_of(names, {}, {"b": usual[0]})] == [usual[1], usual[0], usual[2]]
    assert [s.colour for s in segments_of(names, {})] == [*usual]


def test_init_keeps_the_colours_of_segments_and_predict_writes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    voxels = np.random.default_rng(0).integers(-400, 400, SHAPE).astype(np.int16)
    for n in range(6):
        write_image(Path(f"data/images/c{n}.nrrd"), voxels + n, AFFINE)
        # The first file that says a colour decides.
        write(Path(f"data/labels/c{n}.seg.nrrd"), "seg.nrrd", colours=COLOURS if n == 0 else {})
    assert run_command(["init", "data", "--output", "run"]) == 0
    settings = yaml.safe_load(Path("run/input.yaml").read_text())
    assert settings["colours"] == {name: list(colour) for name, colour in COLOURS.items()}
    assert run_command(["analyze", "--input", "run/input.yaml", "--work_dir", "work"]) == 0
    make_job(
        Path("work"), "segresnet", 0, classes=[{"name": "liver", "values": [1]}, {"name": "spleen", "values": [2]}]
    )
    write_settings(Workspace(Path("work")), {"colours": settings["colours"]}, {})
    image = tmp_path / "new.nii"
    nib.save(nib.Nifti1Image(voxels, AFFINE), image)
    assert predict_files(Path("work"), image, Path("new.seg.nrrd"), algo="segresnet", device="cpu") == 0
    assert colours_of(Path("new.seg.nrrd")) == COLOURS
    text = Path("run/input.yaml").read_text().replace("liver: [221", "livr: [221")
    Path("run/input.yaml").write_text(text)
    capsys.readouterr()
    assert run_command(["run", "--input", "run/input.yaml", "--work_dir", "work2"]) == 2
    assert "colours: livr is no class. Did you mean liver?" in capsys.readouterr().err
