"""MONAI's own client on our bundles: the labels are those of `autoseg predict`, training goes on from our weights."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow, ckpt_export, create_workflow, onnx_export, verify_net_in_out
from plans import tiny_plan as plan_of
from tiny_jobs import tiny_plan

from autoseg.config.networks import ALGOS, AlgoName
from autoseg.data.grid import Grid
from autoseg.data.phantoms import make_phantom
from autoseg.data.volumes import read_image, read_label, write_volume
from autoseg.errors import ConfigError
from autoseg.export.bundle import write_bundle
from autoseg.export.bundle_export import export_bundle
from autoseg.inference.postprocess import ClassRule
from autoseg.inference.predictor import Predictor
from autoseg.networks import build_network
from autoseg.plan import Origin, Plan
from autoseg.training.checkpoint import save_weights
from autoseg.workspace.jobs import JobDir

pytestmark = [pytest.mark.extra("ignite"), pytest.mark.filterwarnings("ignore")]

GRIDS = {
    "as the plan": np.diag([1.2, 1.2, 1.6]),
    "finer": np.diag([-0.7, -0.9, 0.8]),
    "coarser": np.diag([2.5, 2.1, 3.3]),
    "anisotropic": np.diag([0.8, -0.8, 4.0]),
    "oblique": np.array([[0.98, -0.17, 0.1], [0.17, 0.98, 0.05], [-0.1, -0.03, 0.99]]) @ np.diag([1.0, 1.3, 1.1]),
    "turned": np.array([[0.0, 0.0, 1.3], [-1.0, 0.0, 0.0], [0.0, 1.1, 0.0]]),
}


@pytest.fixture(autouse=True)
def _clean_modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each bundle has a `scripts` of its own."""
    yield
    for name in [n for n in sys.modules if n == "scripts" or n.startswith("scripts.")]:
        del sys.modules[name]


def compare(
    monkeypatch: pytest.MonkeyPatch, job: JobDir, predictor: Predictor, folder: Path, grids: Iterable[str], **keys: Any
) -> dict[str, float]:
    """Share of foreground voxels that the bundle and autoseg label alike, by grid."""
    shares = {}
    label_map = predictor.label_map
    for name in grids:
        here = folder / name.replace(" ", "_")
        images = write_image(here / "images", GRIDS[name], channels=predictor.num_channels)
        places = {"dataset_dir": str(here / "images"), "output_dir": str(here / "theirs")}
        workflow(monkeypatch, job, "inference", **places, **keys).run()
        predictor.predict_file(images, here / "ours.nii.gz")
        ours, theirs = read_label(here / "ours.nii.gz"), read_label(here / "theirs" / images[0].name)
        assert ours.grid.differs_from(theirs.grid) is None
        assert set(np.unique(theirs.array)) <= label_map.known_values
        shares[name] = equal_share(ours.array, theirs.array)
    return shares


def bundle_of(root: Path, plan: Plan, *, seed: int = 0) -> JobDir:
    """A job's folder as `generate` and training leave it; the network's weights are random."""
    data = plan.model_dump(mode="json")
    origins = {key: Origin(value=value, origin="planner") for key, value in data.items()}
    origins |= {f"network.{key}": Origin(value=value, origin="planner") for key, value in plan.network.items()}
    job = JobDir(root / f"{plan.algo}_{plan.fold}")
    write_bundle(plan, origins, data, job)
    torch.manual_seed(seed)
    save_weights(build_network(plan), job)
    return job


def workflow(monkeypatch: pytest.MonkeyPatch, job: JobDir, *names: str, kind: str = "infer", **keys: Any) -> Any:
    """What `python -m monai.bundle run` makes in the bundle's folder."""
    monkeypatch.chdir(job.root)
    monkeypatch.syspath_prepend(str(job.root))
    files = [f"configs/{name}.json" for name in names]
    return create_workflow(
        ConfigWorkflow, config_file=files, workflow_type=kind, logging_file=False, device="cpu", **keys
    )


def write_image(folder: Path, linear: np.ndarray, *, channels: int = 1, size_mm: float = 46.0) -> list[Path]:
    """A phantom with an offset and a border of zeros, in one file a channel."""
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = linear, (11.0, -7.0, 3.0)
    shape: Any = tuple(max(9, round(size_mm / edge)) for edge in np.linalg.norm(linear, axis=0))
    grid = Grid(shape=shape, affine=affine)
    image, _ = make_phantom(grid, np.random.default_rng(3), num_channels=channels)
    paths = []
    for place, channel in enumerate(image):
        stored = np.zeros(shape, np.float32)
        inner = tuple(slice(1, -2) for _ in shape)
        stored[inner] = channel.reshape(shape)[inner] * (1 + place) + 5 * place
        paths.append(folder / (f"case_{place:04d}.nii.gz" if channels > 1 else "case.nii.gz"))
        folder.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(stored, affine), paths[-1])
    return paths


def equal_share(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Of the voxels that are foreground in either, those with one value in both."""
    foreground = (ours > 0) | (theirs > 0)
    assert foreground.mean() > 0.02
    return float((ours == theirs)[foreground].mean())


def dice_of(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * float((a & b).sum()) / float(a.sum() + b.sum())


PLANS: dict[str, dict[str, Any]] = {
    "gaps, one channel": {
        "classes": [{"name": "a", "values": [3]}, {"name": "b", "values": [7]}],
        "channels": [{"mode": "ct", "bounds": (5.0, 90.0), "mean": 40.0, "std": 20.0}],
    },
    "two channels, mirrored, cropped": {
        "classes": [{"name": "kidney left", "values": [2]}, {"name": "kidney right", "values": [300]}],
        "channels": [
            {"mode": "ct", "bounds": (5.0, 90.0), "mean": 40.0, "std": 20.0},
            {"mode": "meanstdtanh", "nonzero": True},
        ],
        "crop_foreground": True,
        "tta": True,
        "mirror_axes": (0, 2),
        "lateral_pairs": [("kidney left", "kidney right")],
    },
    "regions": {
        "classes": [
            {"name": "whole", "values": [1, 2, 4]},
            {"name": "core", "values": [1, 4]},
            {"name": "other", "values": [2, 5]},
        ],
        "sigmoid": True,
        "channels": [{"mode": "range", "bounds": (0.0, 100.0)}],
    },
}


@pytest.mark.parametrize("how", PLANS)
def test_labels_are_those_of_autoseg_predict(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = tiny_plan(**PLANS[how])
    job = bundle_of(tmp_path, plan)
    shares = compare(monkeypatch, job, Predictor([job], device="cpu"), tmp_path / "data", GRIDS)
    assert min(shares.values()) >= 0.999, shares


RULES = {
    "gaps, one channel": [{"name": "a", "largest": True}, {"name": "b", "min_mm3": 60.0, "fill_holes": True}],
    "two channels, mirrored, cropped": [
        {"name": "kidney left", "slice_run": True, "fill_holes": True},
        {"name": "kidney right", "min_voxels": 10**6},
    ],
    "regions": [{"name": "whole", "largest": True, "fill_holes": True}, {"name": "other", "min_mm3": 60.0}],
}


@pytest.mark.parametrize(("how", "combine"), list(zip(PLANS, ("mean", "vote", "mean"), strict=True)))
def test_ensemble_in_one_folder(
    how: str, combine: Literal["mean", "vote"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two models of one preprocessing, one of another; cleaned by rules."""
    changes = {"fold": 2, "resample_resolution": (1.9, 1.6, 2.0), "crop_foreground": True}
    plans = [tiny_plan(**PLANS[how]), tiny_plan(**PLANS[how], fold=1), tiny_plan(**{**PLANS[how], **changes})]
    jobs = [bundle_of(tmp_path, plan, seed=seed) for seed, plan in enumerate(plans)]
    (root,) = export_bundle(jobs, tmp_path / "ensemble", combine=combine, rules=RULES[how], scores={"mean_dice": 0.5})
    rules = [ClassRule.model_validate(rule) for rule in RULES[how]]
    predictor = Predictor(jobs, device="cpu", combine=combine, rules=rules)
    uncleaned = Predictor(jobs, device="cpu", combine=combine)
    shares = compare(monkeypatch, JobDir(root), predictor, tmp_path / "data", ("as the plan", "oblique", "turned"))
    assert min(shares.values()) >= 0.999, shares
    raw = uncleaned.predict_labels(read_image(tuple(sorted((tmp_path / "data" / "oblique" / "images").iterdir()))))
    assert (raw != read_label(tmp_path / "data" / "oblique" / "ours.nii.gz").array[0]).any()  # the rules do something
    found = workflow(monkeypatch, JobDir(root), "inference", dataset_dir=str(tmp_path / "data" / "oblique" / "images"))
    assert found.check_properties() == []
    assert json.loads((root / "configs" / "metadata.json").read_text())["eval_metrics"] == {"mean_dice": 0.5}
    assert not (root / "job.json").exists()


def test_two_resolutions_in_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = tiny_plan(**PLANS["gaps, one channel"])
    low = plan.model_copy(update={"fold": 1, "resample_resolution": (3.0, 3.0, 3.0)})
    jobs = [bundle_of(tmp_path, plan), bundle_of(tmp_path, low, seed=1)]
    (root,) = export_bundle(jobs[:1], tmp_path / "both", lowres=jobs[1])
    for highres, job in ((True, jobs[0]), (False, jobs[1])):
        predictor, where = Predictor([job], device="cpu"), tmp_path / f"{highres}"
        shares = compare(monkeypatch, JobDir(root), predictor, where, ("finer",), highres=highres)
        assert min(shares.values()) >= 0.999, shares
    other = bundle_of(tmp_path, tiny_plan(fold=3, classes=PLANS["gaps, one channel"]["classes"]))
    with pytest.raises(ConfigError, match="its channels is another"):
        export_bundle(jobs[:1], tmp_path / "wrong", lowres=other)
    frame = {"axes": [[0.8, 0.6, 0.0], [-0.6, 0.8, 0.0], [0.0, 0.0, 1.0]], "slices": 2}
    turned = bundle_of(tmp_path, Plan.model_validate({**low.model_dump(), "fold": 4, "frame": frame}))
    with pytest.raises(ConfigError, match="its frame is another"):
        export_bundle(jobs[:1], tmp_path / "wrong", lowres=turned)


@pytest.mark.parametrize("algo", ALGOS)
def test_tools_of_monai_take_every_network(algo: AlgoName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundle's network with the bundle's weights is the same function, exported as TorchScript, too."""
    plan = plan_of(algo)
    job = bundle_of(tmp_path, plan)
    monkeypatch.chdir(job.root)
    monkeypatch.syspath_prepend(str(job.root))
    files = {"meta_file": "configs/metadata.json", "config_file": "configs/inference.json"}
    verify_net_in_out("network_def", **files, device="cpu")
    parser = ConfigParser()
    parser.read_config(files["config_file"])
    parser.read_meta(files["meta_file"])
    network = parser.get_parsed_content("network_def").eval()
    network.load_state_dict(torch.load(job.model, weights_only=True))
    ours = Predictor([job], device="cpu").models[0].network
    image = torch.rand(1, 1, *plan.roi_size)
    # By script SegResNet and UNet alone: MONAI's SwinUNETR has checkpointing that no script takes, DiNTS cells by name.
    ckpt_export("network_def", "models/model.ts", **files, use_trace=algo not in ("segresnet", "unet", "locator"))
    with torch.no_grad():
        expected = ours(image)  # in another order of memory, so that sums differ by rounding
        torch.testing.assert_close(network(image), expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(torch.jit.load("models/model.ts")(image), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("algo", ALGOS)
def test_onnx_of_every_network(algo: AlgoName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    plan = plan_of(algo)
    job = bundle_of(tmp_path, plan)
    monkeypatch.chdir(job.root)
    monkeypatch.syspath_prepend(str(job.root))
    files = {"meta_file": "configs/metadata.json", "config_file": "configs/inference.json"}
    onnx_export("network_def", "models/model.onnx", ckpt_file="models/model.pt", **files)
    image = torch.rand(1, 1, *plan.roi_size)
    session = runtime.InferenceSession("models/model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    with torch.no_grad():
        expected = Predictor([job], device="cpu").models[0].network(image).numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3)


def write_cases(folder: Path, *, num_cases: int, values: tuple[int, ...] = (3, 7)) -> Path:
    """Phantoms as the Medical Segmentation Decathlon lays them out: imagesTr, labelsTr, imagesTs."""
    for place in range(num_cases + 1):
        grid = Grid(shape=(22, 20, 19), affine=np.diag([-1.5, -1.5, 1.7, 1.0]))
        image, label = make_phantom(grid, np.random.default_rng(place))
        named = np.array([0, *values], np.uint8)[label.reshape(grid.shape)]
        testing = place == num_cases
        write_volume(folder / ("imagesTs" if testing else "imagesTr") / f"c{place}.nii.gz", image[0], grid)
        if not testing:
            write_volume(folder / "labelsTr" / f"c{place}.nii.gz", named, grid)
    return folder


def test_properties_are_those_of_monai(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = bundle_of(tmp_path, tiny_plan())
    data = str(write_cases(tmp_path / "data", num_cases=2))
    assert workflow(monkeypatch, job, "inference", dataset_dir=data).check_properties() == []
    assert workflow(monkeypatch, job, "train", kind="train", dataset_dir=data).check_properties() == []
    raw = json.loads((job.root / "configs" / "train.json").read_text())
    for path in ("train#trainer#max_epochs", "train#dataset#data", "train#handlers", "validate#dataset#data"):
        value = raw
        for key in path.split("#"):
            value = value[key]  # MONAI Label's BundleTrainTask overrides these


def test_training_goes_on_from_our_weights_and_autoseg_loads_the_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tiny_plan(**PLANS["gaps, one channel"], num_epochs=3, network={**tiny_plan().network, "dsdepth": 2})
    job = bundle_of(tmp_path, plan)
    before = torch.load(job.model, weights_only=True)
    data = str(write_cases(tmp_path / "data", num_cases=5))
    training = workflow(monkeypatch, job, "train", kind="train", dataset_dir=data, num_epochs=3, val_interval=3)
    losses, started = list[float](), list[dict[str, torch.Tensor]]()
    trainer, events = training.trainer, pytest.importorskip("ignite.engine").Events
    trainer.add_event_handler(events.ITERATION_COMPLETED, lambda e: losses.append(float(e.state.output[0]["loss"])))
    trainer.add_event_handler(
        events.EPOCH_STARTED, lambda e: started.append({k: v.clone() for k, v in e.network.state_dict().items()})
    )
    training.run()
    assert len(losses) == 3 * 2  # 4 cases in batches of 2
    assert all(torch.equal(started[0][name], before[name]) for name in before)
    after = torch.load(job.model, weights_only=True)
    assert after.keys() == before.keys()
    assert any(not torch.equal(after[name], before[name]) for name in before)
    Predictor([job], device="cpu")  # strict
    evaluation = workflow(
        monkeypatch, job, "train", "evaluate", kind="train", dataset_dir=data, output_dir=str(tmp_path / "eval")
    )
    evaluation.run()
    raw = (tmp_path / "eval" / "val_mean_dice_raw.csv").read_text().splitlines()
    assert "c4.nii.gz" in raw[1]
    # As autoseg scores the same weights on the label's own grid.
    image, label = (tmp_path / "data" / folder / "c4.nii.gz" for folder in ("imagesTr", "labelsTr"))
    labels = Predictor([job], device="cpu").predict_labels(read_image((image,)))
    assert set(np.unique(labels)) == {0, 3, 7}
    dice = [dice_of(labels == value, read_label(label).array[0] == value) for value in (3, 7)]
    np.testing.assert_allclose([float(v) for v in raw[1].split(",")[1:3]], dice, atol=1e-3)


SPLEEN = """
python -m monai.bundle run --config_file configs/train.json
python -m monai.bundle run --config_file configs/train.json --dataset_dir DATA
torchrun --standalone --nnodes=1 --nproc_per_node=2 -m monai.bundle run --config_file "['configs/train.json','configs/multi_gpu_train.json']"
python -m monai.bundle run --config_file "['configs/train.json','configs/evaluate.json']"
torchrun --standalone --nnodes=1 --nproc_per_node=2 -m monai.bundle run --config_file "['configs/train.json','configs/evaluate.json','configs/multi_gpu_evaluate.json']"
python -m monai.bundle run --config_file configs/inference.json
python -m monai.bundle run --config_file configs/inference.json --datalist "['data/imagesTr/c0.nii.gz','data/imagesTr/c1.nii.gz']"
"""  # noqa: E501 - as the pages have them
BTCV = """
python -m monai.bundle run training --meta_file configs/metadata.json --config_file configs/train.json --logging_file configs/logging.conf
torchrun --standalone --nnodes=1 --nproc_per_node=2 -m monai.bundle run training --meta_file configs/metadata.json --config_file "['configs/train.json','configs/multi_gpu_train.json']" --logging_file configs/logging.conf
python -m monai.bundle run evaluating --meta_file configs/metadata.json --config_file "['configs/train.json','configs/evaluate.json']" --logging_file configs/logging.conf
python -m monai.bundle run evaluating --meta_file configs/metadata.json --config_file configs/inference.json --logging_file configs/logging.conf
"""  # noqa: E501
"""The commands of MONAI's pages on its spleen, whole-body and BTCV bundles, as they are printed there."""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_commands_of_monais_pages_work_as_they_are_printed(tmp_path: Path) -> None:
    """The data lie where the pages' bundles have them: in `dataset_dir`'s default. 20 steps each training."""
    job = bundle_of(tmp_path, tiny_plan(**PLANS["gaps, one channel"]))
    write_cases(job.root / "data", num_cases=10)
    settings = json.loads((job.root / "configs" / "train.json").read_text())
    settings["num_epochs"] = 5  # of four steps
    (job.root / "configs" / "train.json").write_text(json.dumps(settings))
    before = torch.load(job.model, weights_only=True)
    paths = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONPATH", None)  # nothing of ours but what lies in the bundle
    for command in [*SPLEEN.strip().splitlines(), *BTCV.strip().splitlines()]:
        words = shlex.split(command.replace("DATA", str(job.root / "data")))
        done = subprocess.run(words, cwd=job.root, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    after = torch.load(job.model, weights_only=True)
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert {p.name for p in (job.root / "eval").glob("*.nii.gz")} == {"c0.nii.gz", "c1.nii.gz", "c10.nii.gz"}
    Predictor([job], device="cpu").predict_file(
        [job.root / "data" / "imagesTs" / "c10.nii.gz"], tmp_path / "c10.nii.gz"
    )
    ours, theirs = (read_label(path).array for path in (tmp_path / "c10.nii.gz", job.root / "eval" / "c10.nii.gz"))
    assert equal_share(ours, theirs) >= 0.999
