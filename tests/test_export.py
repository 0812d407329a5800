"""Exported graphs say what the networks say, and the runner without torch gives the labels of `autoseg predict`."""

from __future__ import annotations

import gzip
import io
import json
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import nibabel as nib
import numpy as np
import pytest
import torch
from test_predict import AFFINES, write_image
from test_slicer import CT, MRI, NETWORKS, RANGE
from tiny_jobs import make_job, tiny_plan, write_trained

from autoseg.cli.main import run_command
from autoseg.data.grid import Grid, ras_orientation
from autoseg.data.preprocess import ChannelNorm, channel_stats, needs_stats, normalize
from autoseg.data.resampling import resample
from autoseg.data.windowing import window_starts, window_weights
from autoseg.ensemble.predict import predict_files
from autoseg.errors import ConfigError, ResourceError, WorkspaceError
from autoseg.export import run as runner
from autoseg.export.graph import Normalised, describe
from autoseg.export.pack import pack
from autoseg.export.source import ascii_words
from autoseg.export.targets import TARGETS, export
from autoseg.export.tensorrt import build_engine
from autoseg.inference.ensemble_spec import EnsembleSpec
from autoseg.inference.postprocess import ClassRule
from autoseg.inference.predictor import load_network
from autoseg.plan import Plan
from autoseg.workspace.files import write_json, write_yaml
from autoseg.workspace.workspace import Workspace

ROOT = Path(__file__).resolve().parents[1]
needs_onnx = pytest.mark.extra("onnx", "onnxruntime", "onnxscript")
needs_openvino = pytest.mark.extra("onnx", "onnxscript", "openvino")
RESENC = {
    "init_features": 8,
    "blocks": [1, 1],
    "strides": [[1, 1, 1], [2, 2, 2]],
    "kernels": [[3, 3, 3]] * 2,
    "dsdepth": 1,
}
ALL = {**NETWORKS, "resenc": {"network": RESENC}}


def plan_of(algo: str, **changes: Any) -> Plan:
    return tiny_plan(algo=algo, **{"roi_size": (32, 32, 32), "seed": 3, **ALL[algo], **changes})


def equal_share(a: np.ndarray, b: np.ndarray) -> float:
    return float((a == b).mean())


# -- graphs


@needs_onnx
@pytest.mark.parametrize("algo", [pytest.param(a, marks=[pytest.mark.slow] * (a == "swinunetr")) for a in ALL])
def test_onnx_says_what_the_network_says_for_any_batch(tmp_path: Path, algo: str) -> None:
    plan = plan_of(algo)
    job = write_trained(tmp_path / "work", algo, plan)
    (path,) = export(tmp_path / "work", "onnx", algo=algo)
    assert path == tmp_path / "work" / "export" / f"{algo}_0.onnx"
    network, about = runner.load_model(path, threads=1)
    assert about == json.loads(json.dumps(describe(plan, f"{algo}_0", whole=False)))
    own = load_network(job, plan)
    for batch in (1, 3):
        windows = torch.randn((batch, 1, 32, 32, 32), generator=torch.Generator().manual_seed(batch))
        logits = network({"image": windows.numpy()})
        expected = own(windows).numpy()
        np.testing.assert_allclose(logits, expected, atol=1e-3)
        assert equal_share(logits.argmax(1), expected.argmax(1)) >= 0.999


@pytest.mark.parametrize("algo", ALL)
def test_torchscript_says_what_the_network_says_for_any_batch(tmp_path: Path, algo: str) -> None:
    plan = plan_of(algo, channels=[CT, MRI])
    job = write_trained(tmp_path / "work", algo, plan)
    (path,) = export(tmp_path / "work", "torchscript", algo=algo, output=tmp_path / "out", whole=True)
    extra = {"autoseg.json": ""}
    traced = torch.jit.load(path, _extra_files=extra)
    assert json.loads(extra["autoseg.json"])["whole"] is True
    own = Normalised(load_network(job, plan), plan)
    for batch in (1, 3):
        windows = 200 * torch.randn((batch, 2, 32, 32, 32), generator=torch.Generator().manual_seed(batch))
        mean, std = torch.tensor([0.0, 12.0]), torch.tensor([1.0, 190.0])
        torch.testing.assert_close(traced(windows, mean, std), own(windows, mean, std))


@pytest.mark.parametrize("channel", [CT, RANGE, MRI, {"mode": "meanstdtanh"}, {"mode": "pet"}, {"mode": "none"}])
def test_the_graphs_normalisation_is_ours(channel: dict[str, Any]) -> None:
    raw = (300 * np.random.default_rng(0).normal(size=(9, 8, 7))).astype(np.float32)
    raw[:2] = 0
    norm = ChannelNorm(**channel)
    stats = channel_stats(lambda: [raw], norm, raw.size) if needs_stats(norm) else None
    expected = normalize(raw, norm, stats)
    graph = Normalised(torch.nn.Identity(), tiny_plan(channels=[channel]))
    given = [torch.tensor([getattr(stats, key, 0.0)]) for key in ("mean", "std")]
    np.testing.assert_allclose(graph(torch.from_numpy(raw)[None, None], *given)[0, 0], expected, atol=1e-5)
    plain = [{"bounds": None, "mean": 0.0, "std": 1.0, "nonzero": False, **channel}]
    np.testing.assert_allclose(runner.normalized(raw[None], plain)[0], expected, atol=1e-5)


@pytest.mark.parametrize("channel", [CT, RANGE, MRI, {"mode": "mri", "nonzero": False}, {"mode": "none"}])
def test_a_graph_that_normalises_sees_what_one_that_does_not_is_given(channel: dict[str, Any]) -> None:
    """Edges far outside the bounds, and 0 beside tissue: clipped and levelled before they are interpolated."""
    raw = (600 * np.random.default_rng(0).normal(size=(1, 9, 8, 7))).astype(np.float32)
    raw[:, :3] = 0
    plan = tiny_plan(channels=[channel])
    prepared = {}
    for whole in (False, True):
        about = describe(plan, "m", whole=whole)
        prepared[whole] = runner.Group([], about, raw, np.array([0.8, 1.6, 1.5]))
    given = [torch.from_numpy(a) for a in runner.statistics(raw, about["channels"])]
    seen = Normalised(torch.nn.Identity(), plan)(torch.from_numpy(prepared[True].prepared)[None], *given)[0]
    assert prepared[False].prepared.shape != raw.shape
    np.testing.assert_allclose(seen, prepared[False].prepared, atol=1e-4)


# -- the runner's own copies of what it may not import


def test_the_runner_places_and_weighs_windows_as_the_engine() -> None:
    for size, window, overlap in [(64, 32, 0.5), (65, 32, 0.25), (32, 32, 0.5), (100, 17, 0.625), (40, 16, 0.0)]:
        assert runner.window_starts(size, window, overlap) == window_starts(size, window, overlap)
        for own, theirs in zip(
            runner.window_weights(size, window, overlap), window_weights(size, window, overlap), strict=True
        ):
            np.testing.assert_array_equal(own, theirs.numpy())


@pytest.mark.parametrize("shape", [(9, 5, 12), (21, 11, 6), (10, 10, 10), (1, 3, 30)])
def test_the_runner_resamples_as_the_engine(shape: tuple[int, int, int]) -> None:
    source = np.random.default_rng(0).normal(size=(2, 10, 8, 9)).astype(np.float32)
    result = source
    for axis in range(3):
        result = runner.resampled(result, axis + 1, shape[axis])
    np.testing.assert_allclose(result, resample(torch.from_numpy(source), shape).numpy(), atol=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_the_runner_turns_axes_as_nibabel(seed: int) -> None:
    random = np.random.default_rng(seed)
    affine = np.eye(4)
    affine[:3, :3] = np.linalg.qr(random.normal(size=(3, 3)))[0] @ np.diag(random.uniform(0.5, 4, 3))
    ornt = ras_orientation(affine)
    axes = runner.axes_to_ras(affine)
    assert axes == [(int(ras), bool(flip < 0)) for ras, flip in ornt]
    array = random.normal(size=(4, 5, 6))
    turned = runner.to_ras(array, axes)
    np.testing.assert_array_equal(turned, nib.orientations.apply_orientation(array, ornt))
    assert turned.shape == Grid(shape=(4, 5, 6), affine=affine).to_ras().shape
    np.testing.assert_array_equal(runner.from_ras(turned, axes), array)


@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.uint8, np.float64])
@pytest.mark.parametrize("form", ["sform", "qform"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_the_runner_reads_and_writes_nifti_as_nibabel(tmp_path: Path, dtype: type, form: str, order: str) -> None:
    values = (100 * np.random.default_rng(0).normal(size=(5, 6, 7))).astype(dtype)
    affine = AFFINES["permuted"] if form == "sform" else AFFINES["flipped"]
    image = nib.Nifti1Image(values, affine, nib.Nifti1Header(endianness=order))
    image.header.set_data_dtype(np.dtype(dtype).newbyteorder(order))
    image.set_sform(affine, 1 if form == "sform" else 0)
    image.set_qform(affine if form == "qform" else None, 1 if form == "qform" else 0)
    nib.save(image, tmp_path / "a.nii.gz")
    voxels, own, header = runner.read_nifti(tmp_path / "a.nii.gz")
    loaded = nib.load(tmp_path / "a.nii.gz")
    np.testing.assert_allclose(voxels[..., 0], loaded.get_fdata(), rtol=1e-5)
    np.testing.assert_allclose(own, loaded.affine, atol=1e-4)
    labels = (values > 0).astype(np.uint8)
    runner.write_nifti(tmp_path / "l.nii.gz", labels, header)
    written = nib.load(tmp_path / "l.nii.gz")
    np.testing.assert_array_equal(np.asarray(written.dataobj), labels)
    np.testing.assert_allclose(written.affine, loaded.affine)


@pytest.mark.parametrize(("slope", "inter"), [(np.nan, np.nan), (0, 5), (1, 0), (1, 5), (2, 0), (0.5, -3)])
def test_the_runner_scales_intensities_as_nibabel(tmp_path: Path, slope: float, inter: float) -> None:
    path = tmp_path / "a.nii"
    nib.save(nib.Nifti1Image(np.arange(27, dtype=np.int16).reshape(3, 3, 3), np.eye(4)), path)
    data = bytearray(path.read_bytes())
    data[112:120] = np.array([slope, inter], "<f4").tobytes()
    path.write_bytes(data)
    np.testing.assert_array_equal(runner.read_nifti(path)[0][..., 0], nib.load(path).get_fdata())


# -- labels


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """Two folds and a model of another voxel size, mirrored, with gaps in the label values, two channels; exported."""
    folder = tmp_path_factory.mktemp("ensemble")
    classes = [{"name": "a", "values": [3]}, {"name": "b", "values": [7]}]
    members = (("segresnet", 0), ("segresnet", 1), ("unet", 0))
    for seed, (algo, fold) in enumerate(members):
        other = {"resample_resolution": (1.5, 1.0, 1.9)} if algo == "unet" else {}
        same = {"classes": classes, "channels": [CT, MRI], "tta": True, "mirror_axes": (0, 1), "crop_foreground": True}
        make_job(folder / "work", algo, fold, seed=seed, **same, **other)
    spec = EnsembleSpec(
        name="e", method="auto", combine="mean", members=members, classes=("a", "b"), dice=None, version="0"
    )
    write_json(Workspace(folder / "work").ensemble_spec, spec.model_dump(mode="json"))
    return folder / "work", export(folder / "work", "onnx", output=folder / "onnx")


@needs_onnx
@pytest.mark.parametrize("affine", ["oblique", "permuted", "anisotropic"])
def test_the_runners_labels_are_those_of_predict(
    ensemble: tuple[Path, list[Path]], tmp_path: Path, affine: str
) -> None:
    root, models = ensemble
    assert [p.name for p in models] == ["segresnet_0.onnx", "segresnet_1.onnx", "unet_0.onnx"]
    images = []
    for c in range(2):
        image = nib.load(write_image(tmp_path / f"i_{c:04d}.nii.gz", AFFINES[affine], (44, 40, 38), seed=c))
        values = (150 * np.asarray(image.dataobj)).astype(np.float32)
        values[:4] = 0
        images.append(tmp_path / f"i_{c:04d}.nii.gz")
        nib.save(nib.Nifti1Image(values, image.affine), images[-1])
    assert predict_files(root, images[0], tmp_path / "ours.nii.gz", device="cpu") == 0
    runner.run(models, images, tmp_path / "theirs.nii.gz", threads=1)
    ours, theirs = (nib.load(tmp_path / f"{name}.nii.gz") for name in ("ours", "theirs"))
    np.testing.assert_allclose(ours.affine, theirs.affine, atol=1e-5)
    ours, theirs = (np.asarray(label.dataobj) for label in (ours, theirs))
    assert set(np.unique(theirs)) == {0, 3, 7}
    assert equal_share(ours, theirs) >= 0.999


@needs_onnx
def test_regions_and_intensities_as_stored(tmp_path: Path) -> None:
    """Regions that overlap, by a graph that normalises, at the plan's voxel size; from a packed model."""
    classes = [{"name": "whole", "values": [1, 2]}, {"name": "core", "values": [2]}]
    root = tmp_path / "work"
    spacing = np.diag([1.2, 1.2, 1.6, 1.0])
    make_job(root, "segresnet", 0, seed=2, classes=classes, sigmoid=True, channels=[{"mode": "meanstdtanh"}])
    spec = EnsembleSpec(
        name="e", method="auto", combine="mean", members=(("segresnet", 0),), classes=("whole", "core"), dice=None,
        version="0",
    )  # fmt: skip
    write_json(Workspace(root).ensemble_spec, spec.model_dump(mode="json"))
    image = write_image(tmp_path / "i.nii.gz", spacing, (40, 36, 40))
    packed = pack(root, tmp_path / "m.zip").path
    with pytest.raises(ConfigError, match="--output: missing"):
        export(packed, "onnx")
    models = export(packed, "onnx", output=tmp_path / "onnx", whole=True)
    assert predict_files(root, image, tmp_path / "ours.nii.gz", device="cpu") == 0
    words = ["--model", str(models[0]), "--image", str(image), "--output", str(tmp_path / "theirs.nii.gz"), "--timing"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *words], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    seconds = json.loads(done.stdout)
    assert [*seconds] == ["load_models", "load", "pre", "infer", "post", "write"]
    assert all(value > 0 for value in seconds.values())
    ours, theirs = (np.asarray(nib.load(tmp_path / f"{name}.nii.gz").dataobj) for name in ("ours", "theirs"))
    assert len(np.unique(ours)) > 1
    assert equal_share(ours, theirs) >= 0.999


WITHOUT_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('torch', 'monai', 'nibabel', 'scipy', 'pydantic', 'yaml', 'onnx'):
            raise ImportError(f'{name} is not to be needed')
sys.meta_path.insert(0, Refuse())
from autoseg.export.run import main
sys.exit(main(sys.argv[1:]))
"""


@needs_openvino
@pytest.mark.extra("onnxruntime")
def test_openvino_says_what_onnxruntime_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its converter would send usage data, and begins with a folder in the user's home."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("CI", raising=False)
    (tmp_path / "home").mkdir()
    make_job(tmp_path / "work", "segresnet", 0, channels=[CT])
    image = 100 * np.random.default_rng(0).normal(size=(1, 30, 28, 26)).astype(np.float32)
    labels = []
    for name in ("onnx", "openvino"):
        (path,) = export(tmp_path / "work", name, algo="segresnet", whole=True)
        labels.append(runner.segment([runner.load_model(path, threads=1)], image, np.eye(3)))
    assert sorted(p.name for p in path.parent.iterdir()) == ["segresnet_0.bin", "segresnet_0.onnx", "segresnet_0.xml"]
    assert not (tmp_path / "home" / "intel").exists()
    assert len(np.unique(labels[0])) > 1
    assert equal_share(*labels) >= 0.999


def test_a_bundle_of_a_run_and_of_its_packed_model_are_one(tmp_path: Path) -> None:
    """What MONAI's commands make of it, test_bundles.py tests."""
    root = tmp_path / "work"
    members = (("segresnet", 0), ("segresnet", 1))
    for algo, fold in members:
        make_job(root, algo, fold, seed=fold)
    rules = (ClassRule(name="box", largest=True),)
    spec = EnsembleSpec(
        name="e", method="auto", combine="mean", members=members, classes=("sphere", "box"), dice=0.5, version="0",
        postprocessing=rules,
    )  # fmt: skip
    write_json(Workspace(root).ensemble_spec, spec.model_dump(mode="json"))
    (own,) = export(root, "bundle", name="torso")
    assert own == root / "export" / "torso"
    (other,) = export(pack(root, tmp_path / "m.zip").path, "bundle", name="torso", output=tmp_path / "out")
    files = sorted(p.relative_to(own) for p in own.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(other) for p in other.rglob("*") if p.is_file())
    assert {Path("configs/inference.json"), Path("configs/metadata.json"), Path("models/model.pt")} <= {*files}
    assert "## Intended use\n\n**You must write**" in (own / "docs" / "model_card.md").read_text()
    readme = (own / "docs" / "README.md").read_text()
    assert set(re.findall(r"configs/\w+\.json", readme)) == {"configs/inference.json"}  # it cannot be trained on
    assert "they need monai, pytorch-ignite, nibabel and scipy, and no autoseg" in readme
    for path in files:
        if path.suffix == ".pt":
            weights, same = (torch.load(root / path, weights_only=True) for root in (own, other))
            torch.testing.assert_close(weights, same, rtol=0, atol=0)
        else:
            assert (own / path).read_bytes() == (other / path).read_bytes()
    assert json.loads((own / "configs" / "metadata.json").read_text())["name"] == "torso"
    with pytest.raises(ConfigError, match="is there already"):
        export(root, "bundle", name="torso")
    for name in ("../torso", " ", "torso "):
        with pytest.raises(ConfigError, match="expected the name of a folder"):
            export(root, "bundle", name=name)


def test_what_the_runs_settings_change_of_a_prediction_goes_with_the_model(tmp_path: Path) -> None:
    """Overlap and mirroring, and rules for one job's labels, which no ensemble has."""
    root = tmp_path / "work"
    make_job(root, "segresnet", 0, overlap=0.25, tta=False, mirror_axes=(0, 1))
    inference = {"overlap": 0.5, "mirror": True, "min_voxels": {"box": 5}}
    write_yaml(Workspace(root).settings, {"inference": {"value": inference, "origin": "input.yaml:3"}})
    (bundle,) = export(root, "bundle", algo="segresnet")
    config = json.loads((bundle / "configs" / "inference.json").read_text())
    assert (config["overlap"], config["mirror_axes"]) == (0.5, [0, 1])
    (clean,) = [t for t in config["postprocessing"]["transforms"] if t["_target_"].endswith("CleanLabelsd")]
    assert clean["rules"] == [{"channel": 0, "value": 2, "min_voxels": 5}]
    assert "scipy" in json.loads((bundle / "configs" / "metadata.json").read_text())["required_packages_version"]
    (traced,) = export(root, "torchscript", algo="segresnet")
    extra = {"autoseg.json": ""}
    torch.jit.load(traced, _extra_files=extra)
    about = json.loads(extra["autoseg.json"])
    assert (about["overlap"], about["mirror_axes"]) == (0.5, [0, 1])
    with zipfile.ZipFile(export(root, "slicer", algo="segresnet", name="n")[0]) as file:
        network = torch.load(io.BytesIO(file.read("model.pt")), weights_only=True)["config"]["network"]
    assert (network["overlap"], network["mirror_axes"]) == (0.5, [0, 1])
    write_yaml(Workspace(root).settings, {"inference": {"value": {"fast": True}, "origin": "input.yaml:3"}})
    (fast,) = export(root, "bundle", algo="segresnet", name="fast")
    assert json.loads((fast / "configs" / "inference.json").read_text())["overlap"] == 0


def test_a_bundle_says_that_it_tells_no_sides_apart(tmp_path: Path) -> None:
    root = tmp_path / "work"
    sides = [{"name": "kidney left", "values": [1]}, {"name": "kidney right", "values": [2]}]
    make_job(root, "segresnet", 0, classes=[{"name": "kidney", "values": [1, 2]}], user_classes=sides)
    rules = (ClassRule(name="kidney left", largest=True),)
    spec = EnsembleSpec(
        name="e", method="auto", combine="mean", members=(("segresnet", 0),), classes=("kidney left", "kidney right"),
        dice=None, postprocessing=rules, version="0",
    )  # fmt: skip
    write_json(Workspace(root).ensemble_spec, spec.model_dump(mode="json"))
    (bundle,) = export(root, "bundle")
    for text in ((bundle / "docs" / "README.md").read_text(), (bundle / "configs" / "metadata.json").read_text()):
        assert "Left and right were trained as one class and are not told apart here." in text
        assert "Rules that clean kidney left are not in this bundle, which tells no sides apart." in text


@pytest.mark.parametrize(
    ("title", "expected"),
    [("Gr\u00f6\u00dfe Bauch", "Grosse-Bauch"), ("  F\u0301oie/2.0 ", "Foie-2-0"), ("\u809d\u81d3", "")],
)
def test_names_of_files_keep_letters_that_have_marks(title: str, expected: str) -> None:
    assert ascii_words(title, "-") == expected


# -- what cannot be


def test_tensorrt_says_that_it_needs_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    make_job(tmp_path / "work", "segresnet", 0)
    with pytest.raises(ResourceError, match=r"torch finds no GPU here, .* Export onnx, and build the engine there\."):
        export(tmp_path / "work", "tensorrt", algo="segresnet")


def test_tensorrts_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    make_job(tmp_path / "work", "segresnet", 0)
    with pytest.raises(ResourceError, match=r"needs onnx, onnxscript, tensorrt\. Run `pip install onnx onnxscript te"):
        export(tmp_path / "work", "tensorrt", algo="segresnet")


@pytest.mark.parametrize("flags", [{"FP16": "half"}, {}])
def test_an_engine_in_half_precision_wants_the_flag(monkeypatch: pytest.MonkeyPatch, flags: dict[str, str]) -> None:
    """A stand-in for TensorRT, which needs a GPU: half precision is asked for, or its lack is said."""
    trt = MagicMock()
    trt.BuilderFlag = SimpleNamespace(**flags)
    config = trt.Builder.return_value.create_builder_config.return_value
    trt.Builder.return_value.build_serialized_network.return_value = b"engine"
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    assert build_engine(b"graph", (1, 32, 32, 32), "m") == b"engine"
    config.set_flag.assert_not_called()
    if flags:
        assert build_engine(b"graph", (1, 32, 32, 32), "m", fp16=True) == b"engine"
        config.set_flag.assert_called_once_with("half")
    else:
        with pytest.raises(ResourceError, match="m: this TensorRT has no fp16 flag"):
            build_engine(b"graph", (1, 32, 32, 32), "m", fp16=True)


def test_damaged_weights_are_not_exported(tmp_path: Path) -> None:
    plan = plan_of("segresnet")
    job = write_trained(tmp_path / "work", "segresnet", plan)
    weights = torch.load(job.model, weights_only=True)
    next(iter(weights.values())).view(-1)[0] = torch.nan
    torch.save(weights, job.model)
    with pytest.raises(WorkspaceError, match="1 weight is NaN or infinite"):
        export(tmp_path / "work", "torchscript", algo="segresnet")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_job(tmp_path / "work", "segresnet", 0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    command = re.escape(
        "needs onnx, onnxscript. In the folder of autoseg: pip install -c constraints.txt -e '.[export]'"
    )
    with pytest.raises(ResourceError, match=command):
        export(tmp_path / "work", "onnx", algo="segresnet")


def test_faults_are_sentences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["export", "--format", "onyx", "--work_dir", str(tmp_path)]) == 2
    assert "--format" in capsys.readouterr().err
    assert run_command(["export", "--format", "torchscript", "--work_dir", str(tmp_path / "none")]) == 2
    assert "no such work_dir" in capsys.readouterr().err
    (tmp_path / "a.onnx").write_text("no model")
    words = ["export", "--format", "torchscript", "--work_dir", str(tmp_path), "--output", str(tmp_path / "a.onnx")]
    assert run_command(words) == 2
    assert "a.onnx is a file. Give a folder to write into" in capsys.readouterr().err
    words = ["--image", "a.nii", "--output", str(tmp_path / "b.nii")]
    assert runner.main(["--model", str(tmp_path / "none.onnx"), *words]) == 2
    assert "no such file" in capsys.readouterr().err


@needs_onnx
@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "not NIfTI-1"), (b"\x1f\x8bxx", "cannot be read"), (bytes(400), "not NIfTI-1")],
)
def test_images_that_are_none_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.nii.gz").write_bytes(content)
    with pytest.raises(runner.RunError, match=message):
        runner.read_nifti(tmp_path / "a.nii.gz")
    (tmp_path / "a.onnx").write_text("no model")
    with pytest.raises(runner.RunError, match="no model that onnxruntime can load"):
        runner.load_model(tmp_path / "a.onnx")


def at(place: int, kind: str, *values: float) -> Callable[[bytearray], None]:
    return lambda data: struct.pack_into(f"<{kind}", data, place, *values)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (at(108, "f", np.nan), "begin at byte nan, expected 352 or later"),
        (at(108, "f", np.inf), "begin at byte inf"),
        (at(108, "f", -500.0), "begin at byte -500"),
        (at(280, "12f", *[0.0] * 12), "axes of no length, or in one plane"),
        (at(280, "12f", *[np.nan] * 12), "axes of no length, or in one plane"),
        (at(280, "12f", *[1.0, 0.0, 0.0, 0.0] * 3), "axes of no length, or in one plane"),
        (at(352, "f", np.nan), "voxels are NaN or infinite"),
    ],
)
def test_images_that_are_damaged_are_named(tmp_path: Path, damage: Callable[[bytearray], None], message: str) -> None:
    nib.save(nib.Nifti1Image(np.zeros((4, 5, 6), np.float32), np.eye(4)), tmp_path / "a.nii")
    data = bytearray((tmp_path / "a.nii").read_bytes())
    damage(data)
    (tmp_path / "a.nii").write_bytes(data)
    with pytest.raises(runner.RunError, match=message):
        runner.read_nifti(tmp_path / "a.nii")


def test_bytes_that_do_not_unpack_are_named(tmp_path: Path) -> None:
    whole = gzip.compress(bytes(range(256)) * 40)
    (tmp_path / "a.nii.gz").write_bytes(whole[:60] + bytes(60) + whole[120:])
    with pytest.raises(runner.RunError, match="cannot be read"):
        runner.read_nifti(tmp_path / "a.nii.gz")


def test_what_the_runner_cannot_do_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image, file = write_image(tmp_path / "i.nii.gz", np.diag([250.0, 1.0, 1.0, 1.0])), tmp_path / "file"
    file.touch()
    (tmp_path / "folder.nii").mkdir()
    network = lambda inputs: inputs["image"]  # noqa: E731
    described = {"a.onnx": '{"format": 1}', "b.onnx": "[1]", "c.onnx": '{"format": 3, "version": "9.9"}'}
    for name in described:
        (tmp_path / name).touch()
    monkeypatch.setattr(runner, "_onnx", lambda path, threads: (network, described[path.name]))

    def said(model: str, output: Path, *more: str) -> str:
        words = ["--model", str(tmp_path / model), "--image", str(image), "--output", str(output), *more]
        assert runner.main(words) == 2
        return capsys.readouterr().err

    assert "is a folder. Give the name of a file" in said("a.onnx", tmp_path / "folder.nii")
    assert "cannot be made (" in said("a.onnx", file / "o.nii")
    assert "--threads: found -1, expected 0" in said("a.onnx", tmp_path / "o.nii", "--threads", "-1")
    assert "m long. Correct the spacing" in said("a.onnx", tmp_path / "o.nii")
    assert "has no description of autoseg's" in said("b.onnx", tmp_path / "o.nii")
    assert "made by autoseg 9.9, newer than this program" in said("c.onnx", tmp_path / "o.nii")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "onnxruntime cannot be imported" in said("a.onnx", tmp_path / "o.nii")
    assert "Run `pip install onnxruntime`" in said("a.onnx", tmp_path / "o.nii")
    monkeypatch.setattr("os.replace", MagicMock(side_effect=PermissionError(13, "Permission denied")))
    header = runner.read_nifti(image)[2]
    with pytest.raises(runner.RunError, match=r"cannot be written \(Permission denied\)"):
        runner.write_nifti(tmp_path / "o.nii", np.zeros(header["shape"], np.uint8), header)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a.onnx",
        "b.onnx",
        "c.onnx",
        "file",
        "folder.nii",
        "i.nii.gz",
    ]


def test_every_target_is_documented() -> None:
    page = (ROOT / "docs" / "export.md").read_text()
    for target in TARGETS:
        assert f"`{target.name}`" in page, target.name
