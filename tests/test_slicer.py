"""The zip for 3D Slicer, read as the documentation of its extension and its script say, and run as that script runs."""

from __future__ import annotations

import ast
import csv
import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.inferers import SlidingWindowInfererAdapt
from monai.transforms import (
    Compose,
    ConcatItemsd,
    EnsureTyped,
    Invertd,
    Lambdad,
    LoadImaged,
    NormalizeIntensityd,
    Orientationd,
    ScaleIntensityRanged,
    Spacingd,
)
from test_predict import write_image
from tiny_jobs import make_job, tiny_plan, write_trained

import autoseg
from autoseg.cli.main import run_command
from autoseg.config.templates import read_template_json
from autoseg.errors import AutosegError
from autoseg.export.slicer import script_config
from autoseg.export.targets import export
from autoseg.networks.dints import reached_nodes

CT = {"mode": "ct", "bounds": (-100.0, 240.0), "mean": 60.0, "std": 45.0}
RANGE = {"mode": "range", "bounds": (0.0, 900.0)}
MRI = {"mode": "mri", "nonzero": True}


def dints_network() -> dict[str, Any]:
    topology = read_template_json("dints", "topology.json")
    return {
        "channel_mul": 0.125,
        "use_downsample": True,
        "search": False,
        "nodes": reached_nodes(topology["paths"]),
        **{key: topology[key] for key in ("paths", "operations")},
    }


NETWORKS: dict[str, dict[str, Any]] = {
    "segresnet": {},
    "unet": {"network": {"features": [8, 16], "num_res_units": 1, "norm": "INSTANCE"}},
    "swinunetr": {
        "network": {
            "feature_size": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2], "window_size": 4, "use_v2": False,
            "norm": "group",
        },
    },
    "dints": {"network": dints_network()},
}  # fmt: skip


def run_as_slicer(model: dict[str, Any], images: list[Path]) -> np.ndarray:
    """Labels (X, Y, Z) in RAS as the extension's script makes them: its transforms, in its order, with its numbers."""
    config = model["config"]
    network = ConfigParser(config["network"]).get_parsed_content()
    network.load_state_dict(model["state_dict"], strict=True)
    network.eval()
    keys = [f"image{place}" for place in range(1, len(images) + 1)]
    low, high = config["intensity_bounds"]
    of_mode = {
        "none": lambda key: [],
        "ct": lambda key: [
            ScaleIntensityRanged(keys=key, a_min=low, a_max=high, b_min=-1, b_max=1, clip=False),
            Lambdad(keys=key, func=torch.sigmoid),
        ],
        "meanstd": lambda key: [NormalizeIntensityd(keys=key, nonzero=True, channel_wise=True)],
        "meanstdtanh": lambda key: [
            NormalizeIntensityd(keys=key, nonzero=True, channel_wise=True),
            Lambdad(keys=key, func=lambda x: 3 * torch.tanh(x / 3)),
        ],
    }
    modes = [config["normalize_mode"], *config["extra_modalities"].values()]
    assert len(modes) == len(keys)
    steps: list[Any] = [LoadImaged(keys=keys, ensure_channel_first=True, dtype=None, image_only=False)]
    for key, mode in zip(keys, modes, strict=True):
        steps += [EnsureTyped(keys=key, dtype=torch.float), *of_mode[mode](key)]
    steps += [ConcatItemsd(keys=keys, name="image", dim=0), Orientationd(keys="image", axcodes="RAS", labels=None)]
    assert config["orientation_ras"] is True
    assert config["crop_foreground"] is False
    assert config["sigmoid"] is False
    mm = np.array(config["resample_resolution"])
    spacing = Spacingd("image", pixdim=list(mm), mode="bilinear", min_pixdim=mm * 0.75, max_pixdim=mm * 1.25)
    transform = Compose([*steps, spacing])
    case = transform({key: str(path) for key, path in zip(keys, images, strict=True)})
    windows = SlidingWindowInfererAdapt(roi_size=config["roi_size"], sw_batch_size=1, overlap=0.625, mode="gaussian")
    with torch.no_grad():
        logits = windows(inputs=case["image"][None].as_subclass(torch.Tensor), network=network)
    case["pred"] = case["image"].clone()[:1]
    case["pred"].set_array(logits.softmax(1).argmax(1).float())
    back = Invertd(keys="pred", orig_keys="image", transform=transform, nearest_interp=True)
    return back(case)["pred"][0].numpy().astype(np.uint8)


def parts_of(path: Path) -> tuple[dict[str, Any], list[dict[str, str]]]:
    with zipfile.ZipFile(path) as file:
        assert {"model.pt", "labels.csv"} <= set(file.namelist())
        model = torch.load(io.BytesIO(file.read("model.pt")), map_location="cpu", weights_only=True)
        return model, list(csv.DictReader(io.StringIO(file.read("labels.csv").decode())))


@pytest.mark.parametrize("algo", NETWORKS)
@pytest.mark.parametrize(
    "channels",
    [(CT,), (MRI,), ({"mode": "meanstdtanh", "nonzero": True},), (RANGE, CT, MRI)],
    ids=["ct", "mri", "tanh", "3"],
)
def test_its_labels_are_ours_at_the_plans_spacing(
    tmp_path: Path, algo: str, channels: tuple[dict[str, Any], ...]
) -> None:
    changes: dict[str, Any] = {"algo": algo, "channels": channels, "roi_size": (32, 32, 32), **NETWORKS[algo]}
    write_trained(tmp_path / "work", algo, tiny_plan(seed=5, **changes))
    spacing = np.diag([-1.2, 1.2, 1.6, 1.0])
    # Several windows along X, and padding along Z: a network of random weights says something else in each.
    images = [write_image(tmp_path / f"i_{c:04d}.nii.gz", spacing, (59, 32, 27), seed=c) for c in range(len(channels))]
    for path in images:  # values on both sides of the bounds, and some that are 0
        scale_up(path)
    zip_path, _ = export(tmp_path / "work", "slicer", algo=algo, name="phantom")
    assert zip_path == tmp_path / "work" / "export" / "phantom-v1.0.0.zip"
    model, _ = parts_of(zip_path)
    theirs = run_as_slicer(model, images)
    ours = (
        autoseg.Segmenter(tmp_path / "work", algo=algo, fold=0, device="cpu").predict([str(p) for p in images]).labels
    )
    foreground = (ours > 0) | (theirs > 0)
    assert len(np.unique(ours)) > 1
    assert (ours == theirs)[foreground].mean() >= 0.999


def scale_up(path: Path) -> None:
    image = nib.load(path)
    values = (300 * np.asarray(image.dataobj)).astype(np.float32)
    values[:3] = 0
    values[-2:] = -1024
    nib.save(nib.Nifti1Image(values, image.affine), path)


def test_the_zip_holds_what_the_extension_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classes = [{"name": "liver, left", "values": [3]}, {"name": "box", "values": [7]}]
    make_job(tmp_path / "work", "segresnet", 0, channels=[CT], classes=classes)
    words = ["export", "--format", "slicer", "--algo", "segresnet", "--name", "torso-ct", "--release", "2.1.0"]
    assert run_command([*words, "--work_dir", str(tmp_path / "work"), "--output", str(tmp_path / "out")]) == 0
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [p.name for p in paths] == ["torso-ct-v2.1.0.zip", "torso-ct-v2.1.0.Models.json"]
    model, rows = parts_of(paths[0])
    assert set(model) == {"state_dict", "config", "epoch", "best_metric"}
    config = model["config"]
    assert json.loads(json.dumps(config)) == config  # plain Python types
    assert config["intensity_bounds"] == [-100.0, 240.0]
    assert config["normalize_mode"] == "ct"
    assert config["extra_modalities"] == {}
    assert config["roi_size"] == [0, 0, 0]  # the whole image
    assert config["network"]["roi_size"] == [16, 16, 16]
    sequences = ("SegmentedPropertyCategoryCodeSequence", "SegmentedPropertyTypeCodeSequence")
    sequences += (
        "SegmentedPropertyTypeModifierCodeSequence",
        "AnatomicRegionSequence",
        "AnatomicRegionModifierSequence",
    )
    fields = ("CodingSchemeDesignator", "CodeValue", "CodeMeaning")
    assert list(rows[0]) == ["LabelValue", "Name", *(f"{s}.{f}" for s in sequences for f in fields)]
    assert [(row["LabelValue"], row["Name"]) for row in rows] == [("1", "liver, left"), ("2", "box")]
    box = [rows[1][f"{sequence}.{field}"] for sequence in sequences[:2] for field in fields]
    assert box == ["SCT", "123037004", "Anatomical Structure", "SCT", "85756007", "Tissue"]
    entry = json.loads(paths[1].read_text())["models"][0]
    assert {"title", "description", "subject", "imagingModality", "versions", "segmentNames"} <= set(entry)
    address = entry["versions"][0]["url"]
    assert re.search(r"(?P<filename>[^/]+)-v(?P<version>\d+\.\d+\.\d+)", address)[0] == "torso-ct-v2.1.0"  # type: ignore[index]


@pytest.mark.parametrize("changes", [{"tta": True, "mirror_axes": (0, 1)}, {"crop_foreground": True}], ids=str)
def test_its_windows_are_mirrored_and_lie_in_what_is_not_0_as_planned(tmp_path: Path, changes: dict[str, Any]) -> None:
    sides = [{"name": "left lung", "values": [2]}, {"name": "right lung", "values": [5]}]
    pairs = [("left lung", "right lung")]
    plan = tiny_plan(seed=5, channels=[MRI], classes=sides, lateral_pairs=pairs, roi_size=(32, 32, 32), **changes)
    write_trained(tmp_path / "work", "segresnet", plan)
    path = write_image(tmp_path / "i.nii.gz", np.diag([1.2, 1.2, 1.6, 1.0]), (80, 32, 32), seed=1)
    values = np.asarray(nib.load(path).dataobj).astype(np.float32)
    values[:21] = values[:, :, 30:] = 0
    nib.save(nib.Nifti1Image(values, np.diag([1.2, 1.2, 1.6, 1.0])), path)
    model, _ = parts_of(export(tmp_path / "work", "slicer", algo="segresnet", name="n")[0])
    theirs = run_as_slicer(model, [path])
    ours = autoseg.Segmenter(tmp_path / "work", algo="segresnet", fold=0, device="cpu").predict([str(path)]).labels
    ours = np.select([ours == 2, ours == 5], [1, 2])
    assert set(np.unique(ours)) == {0, 1, 2}
    assert (ours == theirs)[(ours > 0) | (theirs > 0)].mean() >= 0.999


def test_what_the_zip_carries_runs_in_slicers_python() -> None:
    """Python 3.9 has no strict zip; and MONAI's parser takes @name in an expression for a reference."""
    target = script_config(tiny_plan(channels=[MRI]))["network"]["_target_"]
    ast.parse(target[1:], feature_version=(3, 9))
    assert "strict=" not in target
    assert "autoseg." not in re.sub(r"autoseg\.?['`]", "", target)
    assert "@" not in target


def test_what_lies_outside_narrow_bounds_is_clamped(tmp_path: Path) -> None:
    """A sigmoid of what lies far off is 0 or 1 in float32: infinite, once undone."""
    make_job(tmp_path / "work", "segresnet", 0, channels=[{**CT, "bounds": (0.0, 10.0)}])
    model, _ = parts_of(export(tmp_path / "work", "slicer", algo="segresnet", name="n")[0])
    low, high = model["config"]["intensity_bounds"]
    raw = torch.tensor([-3024.0, -1000.0, 0.0, 4.0, 10.0, 3000.0]).reshape(1, 1, 6, 1, 1)
    script = torch.sigmoid((raw - low) / (high - low) * 2 - 1)
    undo = ConfigParser({"undo": model["config"]["network"]["undo"]}).get_parsed_content("undo")
    expected = (raw.clamp(0, 10) - CT["mean"]) / CT["std"]
    torch.testing.assert_close(undo(script), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"sigmoid": True}, {}, "regions that may overlap"),
        ({"channels": [MRI] * 5}, {}, "5 channels. Slicer's script takes 4 at most"),
        ({}, {"name": "my-brats"}, "holds 'brats'"),
        ({}, {"name": "Whole Head"}, "expected lower case letters, digits and dashes"),
        ({}, {"release": "1.0"}, "expected three numbers such as 1.0.0"),
        ({}, {"whole": True}, "--whole: no effect with --format slicer"),
        ({}, {"algo": "resenc"}, "no such trained job. Trained: segresnet_0"),
    ],
)
def test_what_slicer_cannot_run_is_said(
    tmp_path: Path, changes: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    make_job(tmp_path / "work", "segresnet", 0, **changes)
    with pytest.raises(AutosegError, match=message):
        export(tmp_path / "work", "slicer", **{"algo": "segresnet", "name": "n", **options})
    assert not (tmp_path / "work" / "export").exists()
