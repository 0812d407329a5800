"""What a bundle's files say, without running it: metadata by MONAI's schema, and scripts that need nothing of ours."""

from __future__ import annotations

import ast
import json
import sys
from importlib.metadata import version
from pathlib import Path

import jsonschema
import pytest
from monai.bundle import ConfigParser
from test_bundles import PLANS, bundle_of, workflow
from tiny_jobs import tiny_plan

from autoseg.export.bundle import SCRIPTS
from autoseg.export.scripts.cases import inference_cases, training_cases
from autoseg.export.scripts.check import require_tensorrt

TEXT, VERSION = {"type": "string", "minLength": 1}, {"type": "string", "pattern": r"^\d+\.\d+\.\d+"}
TENSOR = {
    "type": "object",
    "required": ["type", "format", "num_channels", "spatial_shape", "dtype", "value_range", "is_patch_data"],
    "properties": {
        "type": {"enum": ["image", "series", "tuples", "probabilities"]},
        "format": {"enum": ["magnitude", "hounsfield", "kspace", "raw", "labels", "classes", "segmentation"]},
        "modality": TEXT,
        "num_channels": {"type": "integer", "minimum": 1},
        "spatial_shape": {"type": "array", "items": {"type": ["integer", "string"]}, "minItems": 3, "maxItems": 3},
        "dtype": {"const": "float32"},
        "value_range": {"type": "array", "items": {"type": "number"}, "maxItems": 2},
        "is_patch_data": {"type": "boolean"},
        "channel_def": {"type": "object", "patternProperties": {r"^\d+$": TEXT}, "additionalProperties": False},
    },
}
TENSORS = {"type": "object", "minProperties": 1, "additionalProperties": TENSOR}
TEXTS = ("name", "task", "description", "authors", "copyright", "data_source", "intended_use", "label_classes")
SCHEMA = {
    "type": "object",
    "required": [
        *("schema", "version", "changelog", "monai_version", "pytorch_version", "numpy_version", *TEXTS),
        *("required_packages_version", "eval_metrics", "network_data_format"),
    ],
    "properties": {
        **dict.fromkeys(TEXTS, TEXT),
        **dict.fromkeys(("version", "monai_version", "pytorch_version", "numpy_version"), VERSION),
        "changelog": {"type": "object", "minProperties": 1, "additionalProperties": TEXT},
        "required_packages_version": {"type": "object", "additionalProperties": VERSION},
        "eval_metrics": {"type": "object", "additionalProperties": {"type": "number"}},
        "network_data_format": {
            "type": "object",
            "required": ["inputs", "outputs"],
            "properties": {"inputs": TENSORS, "outputs": TENSORS},
        },
    },
}
"""What MONAI's bundle specification (docs/source/mb_specification.rst) and its model zoo (ci/verify_bundle.py) want of
metadata.json. The schema that the file names is on the internet; `python -m monai.bundle verify_metadata` takes it."""


@pytest.mark.parametrize("how", PLANS)
def test_metadata_are_valid(how: str, tmp_path: Path) -> None:
    plan = tiny_plan(**PLANS[how])
    data = json.loads((bundle_of(tmp_path, plan).root / "configs" / "metadata.json").read_text())
    jsonschema.validate(data, SCHEMA)
    assert data["version"] in data["changelog"]
    assert data["required_packages_version"]["nibabel"] == version("nibabel")
    image, pred = (data["network_data_format"][side] for side in ("inputs", "outputs"))
    assert image["image"]["num_channels"] == len(plan.channels) == len(image["image"]["channel_def"])
    assert pred["pred"]["num_channels"] == plan.num_outputs == len(pred["pred"]["channel_def"])
    for place, painted in enumerate(plan.label_map.painted_values):
        assert f"{painted} is {plan.classes[place].name}" in data["label_classes"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**data, "eval_metrics": {"mean_dice": "good"}}, SCHEMA)


@pytest.mark.parametrize(
    "name", ["$__import__('os').mkdir('made')", "@bundle_root", "%configs/train.json", "a@#b", "$"]
)
def test_names_of_classes_are_no_expressions(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = bundle_of(tmp_path, tiny_plan(classes=[{"name": name, "values": [1]}, {"name": "b", "values": [2]}]))
    monkeypatch.chdir(job.root)
    parser = ConfigParser()
    parser.read_config("configs/inference.json")
    parser.read_meta("configs/metadata.json")
    for key in ("outputs#pred#channel_def", "inputs#image"):
        parser.get_parsed_content(f"_meta_#network_data_format#{key}")
    assert all(isinstance(parser.get_parsed_content(f"_meta_#{key}"), str) for key in ("task", "label_classes"))
    assert not (job.root / "made").exists()


def test_scripts_need_monai_torch_numpy_and_scipy_alone(tmp_path: Path) -> None:
    job = bundle_of(tmp_path, tiny_plan())
    files = sorted((job.root / "scripts").iterdir())
    assert len(files) == len(SCRIPTS) == len({Path(name).name for name in SCRIPTS})
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for module in modules:
                room = module.split(".")[0]
                known = room in sys.stdlib_module_names or room in ("monai", "torch", "numpy", "scripts", "scipy")
                assert known, f"{path.name}: {module}"
                assert room != "scipy" or path.name == "finishing.py"
                if room == "scripts":
                    assert (job.root / "scripts" / f"{module.split('.')[1]}.py").exists()


@pytest.mark.extra("ignite")
@pytest.mark.filterwarnings("ignore")
def test_tensorrt_says_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    sentence = "TensorRT needs an NVIDIA GPU, none was found"
    with pytest.raises(RuntimeError, match=sentence):
        require_tensorrt()
    job = bundle_of(tmp_path, tiny_plan())
    with pytest.raises(RuntimeError) as error:
        workflow(monkeypatch, job, "inference", "inference_trt", dataset_dir=str(tmp_path))
    assert error.value.__cause__ is not None
    assert sentence in str(error.value.__cause__)


def test_cases_come_from_folders_lists_and_datalists(tmp_path: Path) -> None:
    for name in ("a_0000", "a_0001", "b_0000", "b_0001"):
        for folder in ("imagesTr", "imagesTs"):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / f"{name}.nii.gz").touch()
    (tmp_path / "labelsTr").mkdir()
    for name in ("a", "b"):
        (tmp_path / "labelsTr" / f"{name}.nii.gz").touch()
    data = str(tmp_path)
    pairs = [[str(tmp_path / "imagesTs" / f"{name}_000{i}.nii.gz") for i in (0, 1)] for name in "ab"]
    assert inference_cases(data) == [{"image": pair} for pair in pairs]
    assert inference_cases(data, [pairs[1], "c.nii.gz"]) == [{"image": pairs[1]}, {"image": "c.nii.gz"}]
    cases = training_cases(data)
    assert [Path(case["label"]).name for part in cases.values() for case in part] == ["a.nii.gz", "b.nii.gz"]
    images = {name: f"imagesTr/{name}.nii.gz" for name in ("a_0000", "a_0001", "b_0000", "b_0001")}
    listed = [
        {"image": images[f"{n}_0000"], "second": images[f"{n}_0001"], "label": f"labelsTr/{n}.nii.gz", "fold": fold}
        for n, fold in (("a", 1), ("b", 0))
    ]
    (tmp_path / "datalist.json").write_text(json.dumps({"training": listed}))
    cases = training_cases(data, str(tmp_path / "datalist.json"), fold=1, image_keys=("image", "second"))
    assert cases["validation"][0]["image"] == [str(tmp_path / "imagesTr" / f"a_000{i}.nii.gz") for i in (0, 1)]
    with pytest.raises(ValueError, match=r"no image\. Give a folder of \*\.nii\.gz files by --dataset_dir"):
        inference_cases(str(tmp_path / "labelsTr" / "none"))
    (tmp_path / "labelsTr" / "a.nii.gz").unlink()
    with pytest.raises(ValueError, match=r"a\.nii\.gz: the label of .* is missing"):
        training_cases(data)
