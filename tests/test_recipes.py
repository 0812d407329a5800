"""The pages of the recipes, typed as they stand, on phantoms laid out as the data sets are.

Only the training is smaller, by lines added to input.yaml after `init`. MONAI's commands are those that
test_bundles.py runs; here their form is compared.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml
from test_bundles import BTCV, SPLEEN

from autoseg.cli.arguments import parse
from autoseg.cli.commands import TAKES_SETTINGS, Commands
from autoseg.cli.main import run_command
from autoseg.config.networks import RECIPE_ALGO
from autoseg.config.templates import recipe_values
from autoseg.data.grid import Grid
from autoseg.data.phantoms import make_phantom
from autoseg.data.volumes import read_label

ROOT = Path(__file__).resolve().parents[1]
PAGES = {path.stem: path for path in sorted((ROOT / "docs" / "recipes").glob("*.md"))}
TINY = """
num_epochs: 1
batch_size: 1
num_steps_per_epoch: 1
num_workers: 1
precision: fp32
unet: {roi_size: [16, 16, 16], features: [4, 8], num_res_units: 1}
segresnet: {roi_size: [16, 16, 16], init_filters: 8, blocks_down: [1, 1]}
swinunetr: {roi_size: [64, 64, 64], feature_size: 12}
"""
CT = np.diag([1.5, 1.5, 1.5])
ORGANS = 13


def blocks_of(path: Path) -> list[tuple[str, str]]:
    """The code of a page: language and text, with lines that go on joined."""
    found = re.findall(r"^```(\w+)\n(.*?)^```", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [(language, re.sub(r" *\\\n *", " ", text)) for language, text in found]


def lines_of(path: Path) -> list[str]:
    texts = [text for language, text in blocks_of(path) if language in ("sh", "text")]
    return [line for text in texts for line in text.splitlines() if line.strip()]


def test_every_recipe_has_its_page() -> None:
    assert set(PAGES) == set(RECIPE_ALGO)


@pytest.mark.parametrize("name", PAGES)
def test_commands_of_the_pages_are_commands(name: str) -> None:
    lines = lines_of(PAGES[name])
    ours = [line for line in lines if line.startswith("autoseg ")]
    assert len(ours) >= 3
    for line in ours:
        parse(Commands, TAKES_SETTINGS, shlex.split(line, comments=True)[1:])
    if name != "flare23":
        assert any(f"--recipe {name}" in line for line in ours)
    theirs = [line for line in lines if "monai.bundle" in line]
    assert theirs
    known = {form(line) for line in (*SPLEEN.strip().splitlines(), *BTCV.strip().splitlines())}
    tensorrt = "python -m monai.bundle run --config_file \"['configs/inference.json','configs/inference_trt.json']\""
    for line in theirs:
        assert form(line) in {*known, tensorrt}, line


def form(line: str) -> str:
    """A command of MONAI's without what says where data lie, and which of two models is meant."""
    return re.sub(r" --(dataset_dir|output_dir|datalist|highres) (\"[^\"]*\"|\S+)", "", line)


@pytest.mark.parametrize("name", PAGES)
def test_tests_and_sections_that_a_page_names_exist(name: str) -> None:
    text = PAGES[name].read_text()
    files = re.findall(r"`((?:tests|templates|examples|benchmarks)/[\w/.]+)", text)
    assert any(file.startswith("tests/") for file in files)
    for file in files:
        assert (ROOT / file).exists(), file
    for file, test in re.findall(r"`(tests/\w+\.py)::(\w+)`", text):
        assert re.search(rf"^def {test}\(", (ROOT / file).read_text(), flags=re.MULTILINE), test


@pytest.mark.parametrize("name", PAGES)
def test_what_a_page_says_of_the_recipe_is_in_it(name: str) -> None:
    text, values = PAGES[name].read_text(), recipe_values(RECIPE_ALGO[name], name)
    patch = "x".join(map(str, values["roi_size"][0]))
    if name == "wholebody_lowres":
        assert values["overlap"][0] == 0.25
        assert "(0.25)" in text
    else:
        assert patch in text
        assert f"learning rate {values['learning_rate'][0]:.4f}".rstrip("0") in text


# -- the pages, typed


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([*CT.diagonal(), 1.0])), path)


def phantom(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A CT in HU, and one class."""
    grid = Grid(shape=(28, 26, 24), affine=np.diag([*CT.diagonal(), 1.0]))
    channels, label = make_phantom(grid, np.random.default_rng(seed), classes=("sphere",))
    return (channels[0] - 1000).astype(np.int16), label.astype(np.uint8)


def decathlon(folder: Path) -> None:
    """Task09_Spleen.tar."""
    root = folder / "Task09_Spleen"
    for number in range(6):
        image, label = phantom(number)
        save(root / ("imagesTr" if number < 5 else "imagesTs") / f"spleen_{number}.nii.gz", image)
        if number < 5:
            save(root / "labelsTr" / f"spleen_{number}.nii.gz", label)
    training = [{kind: f"./{kind}sTr/spleen_{n}.nii.gz" for kind in ("image", "label")} for n in range(5)]
    listed = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "spleen"}, "training": training}
    listed |= {"test": ["./imagesTs/spleen_5.nii.gz"], "numTraining": 5, "numTest": 1, "tensorImageSize": "3D"}
    (root / "dataset.json").write_text(json.dumps(listed))
    with tarfile.open(folder / "Task09_Spleen.tar", "w") as archive:
        archive.add(root, "Task09_Spleen")
    shutil.rmtree(root)


def total(folder: Path) -> None:
    """Cases of 104 masks; the last one is new."""
    names = ["kidney_left", "kidney_right", *(f"structure_{n:03d}" for n in range(102))]
    places = [(x, y, z) for x in range(0, 30, 6) for y in range(0, 30, 6) for z in range(0, 30, 6)]
    for number in range(6):
        ct = np.random.default_rng(number).normal(-600, 20, (30, 30, 30)).astype(np.int16)
        label = np.zeros(ct.shape, np.uint8)
        for value, (x, y, z) in enumerate(places[: len(names)], start=1):
            label[x + 1 : x + 6, y + 1 : y + 6, z + 1 : z + 6] = value
        ct += 5 * label.astype(np.int16)
        if number == 5:
            save(folder / "new_scans" / "new.nii.gz", ct)
            save(folder / "new_labels" / "new.nii.gz", label)
            continue
        case = folder / "Totalsegmentator_dataset" / f"s{number:04d}"
        save(case / "ct.nii.gz", ct)
        for value, name in enumerate(names, start=1):
            save(case / "segmentations" / f"{name}.nii.gz", (label == value).astype(np.uint8))


def synapse(folder: Path) -> None:
    """RawData as it is unzipped: 13 organs."""
    for number in range(6):
        image, label = phantom(number)
        values = np.zeros_like(label)
        for value in range(1, ORGANS + 1):
            values[2 * value - 2 : 2 * value, 5:20, 5:20] = value
        if number < 5:
            save(folder / "RawData" / "Training" / "img" / f"img{number:04d}.nii.gz", image + 10 * values)
            save(folder / "RawData" / "Training" / "label" / f"label{number:04d}.nii.gz", values)
        else:
            save(folder / "RawData" / "Testing" / "img" / f"img{number:04d}.nii.gz", image)


def walk(page: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Type a page's blocks up to MONAI's commands; return the folder where that ends."""
    monkeypatch.chdir(here)
    for language, text in blocks_of(page):
        if language == "python":
            exec(compile(text, page.name, "exec"), {})  # noqa: S102 - our own page
            continue
        if language == "yaml":  # in place of the line that init made up
            settings = Path("input.yaml")
            settings.write_text(re.sub(r"^class_names: .*$", text, settings.read_text(), flags=re.MULTILINE))
            continue
        if "monai.bundle" in text:
            continue
        for line in text.splitlines():
            words = shlex.split(line)
            if words[0] == "cd":
                monkeypatch.chdir(Path.cwd() / words[1])
            elif words[0] == "autoseg":
                assert run_command(words[1:]) == 0, line
                if words[1] == "init":
                    settings = Path(words[words.index("--output") + 1]) / "input.yaml"
                    settings.write_text(settings.read_text() + TINY)
            else:
                subprocess.run(["bash", "-ec", line], check=True)
    return Path.cwd()


def found_in(path: Path) -> set[str]:
    return {phase for case in json.loads(path.read_text())["cases"] for phase in case}


PHASES = {"load", "pre", "infer", "invert", "post", "write"}


@pytest.mark.parametrize(
    ("name", "make", "classes"),
    [
        pytest.param("spleen", decathlon, ["spleen"], id="spleen"),
        pytest.param("btcv", synapse, ["spleen", "right kidney"], id="btcv", marks=pytest.mark.slow),
    ],
)
def test_a_page_typed_on_phantoms(
    name: str, make: Callable[[Path], None], classes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path)
    end = walk(PAGES[name], tmp_path, monkeypatch)
    job = end / "work_dir" / f"{RECIPE_ALGO[name]}_0"
    assert (job / "models" / "model.pt").exists()
    plan = yaml.safe_load((job / "configs" / "hyper_parameters.yaml").read_text())
    assert [c["name"] for c in plan["classes"]][: len(classes)] == classes
    assert plan["learning_rate"] == recipe_values(RECIPE_ALGO[name], name)["learning_rate"][0]
    assert len(json.loads((end / "work_dir" / "datalist.json").read_text())["training"]) == 5  # for MONAI's commands
    assert len(list((end / "predictions").glob("*.nii.gz"))) == 1
    assert found_in(end / "predictions" / "timing.json") >= PHASES


@pytest.mark.slow
def test_the_whole_body_typed_on_phantoms_of_104_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    total(tmp_path)
    end = walk(PAGES["wholebody_highres"], tmp_path, monkeypatch)
    merged = read_label(tmp_path / "wholebody" / "labelsTr" / "s0000.nii.gz").array
    assert set(np.unique(merged)) == set(range(105))
    walk(PAGES["wholebody_lowres"], end, monkeypatch)
    for name in ("highres", "lowres"):
        assert found_in(end / name / "timing.json") >= PHASES
        assert read_label(end / name / "new.nii.gz").array.shape == (1, 30, 30, 30)
    assert {p.name for p in (end / "wholebody_bundle" / "models").iterdir()} == {"model.pt", "model_lowres.pt"}
    metadata = json.loads((end / "wholebody_bundle" / "configs" / "metadata.json").read_text())
    assert len(metadata["network_data_format"]["outputs"]["pred"]["channel_def"]) == 105
