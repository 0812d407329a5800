"""A network and a hyperparameter are added as CONTRIBUTING.md says, in a copy of the package, and used."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import pytest
import yaml
from house import autoseg, commands, copy_house, put

from autoseg.config.networks import NETWORKS
from autoseg.data.phantoms import make_phantoms

ROOT = Path(__file__).resolve().parents[1]

NETWORK = '''
"""A toy: two convolutions."""

from __future__ import annotations

from typing import Any

from torch import nn

from autoseg.networks.sizing import LearningRates, NetworkChoice, Shapes, Sizing, fit_roi

ENCODER = r"0\\."
LATENT = "0"
LEARNING_RATES = LearningRates(gpu=1e-3, cpu=2e-3, muon=3e-3, source="a toy's")
SECONDS_PER_MEGAVOXEL = 0.1
RUNGS = GPU_RUNGS = range(1)


def build(in_channels: int, out_channels: int, network: dict[str, Any]) -> nn.Module:
    width = network["width"]
    return nn.Sequential(nn.Conv3d(in_channels, width, 3, padding=1), nn.LeakyReLU(), nn.Conv3d(width, out_channels, 1))


def heads(module: nn.Module) -> tuple[nn.Module, ...]:
    return (module[2],)


def read_shapes(shapes: Shapes) -> dict[str, Any]:
    return {"width": shapes["0.weight"][0]} if "0.weight" in shapes else {}


def divisor(network: dict[str, Any]) -> tuple[int, int, int]:
    return 4, 4, 4


def choose(sizing: Sizing) -> NetworkChoice:
    return NetworkChoice(
        network={"width": 6},
        roi_size=fit_roi(sizing, 16**3, (4, 4, 4)),
        batch_size=2,
        rules={"width": "a toy's six", "roi_size": "a toy's 16^3", "batch_size": "a toy's two"},
    )
'''

CLASS = '''class Toynet(Strict):
    """The hyperparameters that Toynet alone has."""

    width: Count
    """Channels of the toy."""


@dataclass'''

NETWORK_DEF = """$torch.nn.Sequential(
  torch.nn.Conv3d({{ in_channels }}, {{ net.width }}, 3, padding=1), torch.nn.LeakyReLU(),
  torch.nn.Conv3d({{ net.width }}, {{ out_channels }}, 1))
"""

HYPERPARAMETER = '''    jitter: Share
    """Share of a toy."""
    optimizer:'''

SETTINGS = {
    "algos": ["toynet"],
    "num_epochs": 2,
    "num_steps_per_epoch": 3,
    "num_epochs_per_validation": 2,
    "num_workers": 1,
    "toynet": {"width": 5, "jitter": 0.5},
}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package and the templates, and in them a network `toynet` and a hyperparameter `jitter`."""
    folder = copy_house(tmp_path_factory.mktemp("house"))
    # A network: its file, its template, its row.
    (folder / "autoseg" / "networks" / "toynet.py").write_text(NETWORK)
    (folder / "templates" / "toynet").mkdir()
    (folder / "templates" / "toynet" / "hyper_parameters.yaml").write_text(
        "# A toy\n\noverlap: 0.25  # a toy's quarter\n"
    )
    (folder / "templates" / "toynet" / "network_def.yaml.j2").write_text(NETWORK_DEF)
    table = folder / "autoseg" / "config" / "networks.py"
    put(table, "@dataclass", CLASS)
    put(table, '    "unet": NetworkRow', '    "toynet": NetworkRow(own=Toynet),\n    "unet": NetworkRow')
    # A hyperparameter: its definition, and where its value comes from.
    put(folder / "autoseg" / "config" / "hyperparameters.py", "    optimizer:", HYPERPARAMETER)
    put(
        folder / "templates" / "common" / "hyper_parameters.yaml", "optimizer:", "jitter: 0.125  # a choice\noptimizer:"
    )
    return folder


def test_settings_schema_and_help_have_the_new_ones(house: Path) -> None:
    schema = autoseg(house, "schema")
    assert schema.returncode == 0, schema.stderr
    found = json.loads(schema.stdout)
    block = found["$defs"]["ToynetSettings"]["properties"]
    assert block["width"]["description"] == "Channels of the toy."
    assert {"maximum": 1, "minimum": 0, "type": "number"} in block["jitter"]["anyOf"]
    assert block["jitter"] == found["properties"]["jitter"] == found["$defs"]["UNetSettings"]["properties"]["jitter"]
    assert "toynet" in json.dumps(found["properties"]["algos"])
    text = " ".join(autoseg(house, "train", "--help").stdout.split())
    assert "--toynet.width a whole number >= 1; default planned Channels of the toy." in text
    assert "--jitter a number >= 0 and <= 1; default planned Share of a toy." in text
    names = ", ".join(NETWORKS).replace(" unet,", " toynet, unet,")
    assert f"Under {names} each hyperparameter" in text


@pytest.mark.timeout(300)  # on a busy machine starting up takes long
def test_a_network_is_planned_trained_and_used(house: Path, tmp_path: Path) -> None:
    path = make_phantoms(tmp_path, num_cases=4, num_testing=1, shape=(24, 24, 24), num_fold=2)
    path.write_text(path.read_text() + yaml.safe_dump(SETTINGS))
    refused = autoseg(house, "analyze", "--input", path, "--toynet.width", "0", "--jitter", "2")
    assert refused.returncode == 2
    assert "--toynet.width: expected a whole number >= 1, found 0." in refused.stderr
    assert "--jitter: expected a number >= 0 and <= 1, found 2." in refused.stderr
    work_dir, images, out = tmp_path / "work_dir", tmp_path / "images", tmp_path / "out"
    image = next(images.glob("*004.nii.gz"))
    one_fold = ["--input", str(path), "--folds", "0"]
    done = commands(
        house,
        ["analyze", "--input", str(path)],
        ["generate", *one_fold],
        ["train", *one_fold],
        ["ensemble", *one_fold],
        ["predict", "--image", str(image), "--work_dir", str(work_dir), "--output", str(out)],
        ["methods", "--work_dir", str(work_dir)],
    )
    assert done.returncode == 0, done.stderr
    assert "We used Toynet, as implemented in autoseg" in (work_dir / "methods.md").read_text()
    job = work_dir / "toynet_0"
    text = (job / "configs" / "hyper_parameters.yaml").read_text()
    assert text.startswith("# A toy: every hyperparameter of one job.")
    assert "overlap: 0.25  # a toy's quarter" in text
    plan = yaml.safe_load(text)
    assert (plan["algo"], plan["network"], plan["jitter"], plan["batch_size"]) == ("toynet", {"width": 5}, 0.5, 2)
    explained = autoseg(house, "explain", "toynet.width", "--work_dir", work_dir).stdout
    assert "toynet.width: a whole number >= 1. Default: planned.\n  Channels of the toy." in explained
    assert len((job / "metrics.jsonl").read_text().splitlines()) == 2  # epochs
    [label] = out.glob("*.nii.gz")
    assert nib.load(label).shape == nib.load(image).shape
