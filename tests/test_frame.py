"""Oblique thick slices: a data set's own axes, in the plan, in what networks see, and back on each image's grid."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from monai.bundle import ConfigParser
from monai.transforms import allow_missing_keys_mode
from nibabel.orientations import ornt2axcodes
from plans import make_fingerprint, plan_and_origins
from tiny_jobs import make_job

from autoseg import analyzer
from autoseg.config.load import load_settings
from autoseg.data.datalists.cases import Case, Datalist
from autoseg.data.datalists.datalist import read_datalist, write_datalist
from autoseg.data.fingerprint import Fingerprint
from autoseg.data.frame import Frame, Turn, find_frame
from autoseg.data.grid import Grid, axes_of
from autoseg.data.preprocess import ChannelNorm, Preprocessing, prepare_image, prepare_label
from autoseg.data.volumes import read_image, read_label
from autoseg.errors import ConfigError
from autoseg.evaluation.score_files import read_scores
from autoseg.export import bundle_configs
from autoseg.export import run as runner
from autoseg.export.graph import describe
from autoseg.export.source import refuse_frame
from autoseg.export.targets import export
from autoseg.inference.predictor import Predictor
from autoseg.pipeline.run import run_input
from autoseg.pipeline.stages import PLAIN_RUN
from autoseg.plan import Plan, read_plan
from autoseg.report.page import make_report
from autoseg.workspace.workspace import Workspace

NORMALS = ((0.59, -0.68, 0.44), (0.53, -0.65, 0.55))
"""Of the slices of two short-axis cardiac sets, 7 degrees apart, which are rounded to different axes."""
SHAPE, SPACING_MM = (30, 26, 6), (1.0, 1.0, 8.0)


def oblique(normal: tuple[float, float, float], turned: float = 0.0) -> np.ndarray:
    """(3, 3): rows and columns in the plane of slices, and the slices' normal; a rotation."""
    n = np.array(normal) / np.linalg.norm(normal)
    u = np.cross(n, (0.0, 0.0, 1.0))
    u /= np.linalg.norm(u)
    v = np.cross(n, u)
    c, s = np.cos(turned), np.sin(turned)
    return np.stack([c * u + s * v, -s * u + c * v, n], axis=1)


def affine_of(directions: np.ndarray, number: int = 0) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = directions * SPACING_MM
    affine[:3, 3] = (5.0 * number, -3.0, 2.0)
    return affine


def scan(number: int) -> tuple[np.ndarray, np.ndarray]:
    """An image (X, Y, Z) with a bright box that is nowhere symmetrical, and its label."""
    rng = np.random.default_rng(number)
    label = np.zeros(SHAPE, np.uint8)
    label[4 + number : 17, 3:12, 1:4] = 1
    label[20:27, 5 : 14 + number, 2:5] = 2
    return (rng.normal(20, 5, SHAPE) + 60 * label).clip(1).astype(np.float32), label


def write_set(folder: Path, affines: list[np.ndarray]) -> Path:
    """Scans on these grids, a datalist in two folds, and an input.yaml."""
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    cases = []
    for number, affine in enumerate(affines):
        image, label = scan(number)
        paths = folder / "images" / f"c{number}.nii.gz", folder / "labels" / f"c{number}.nii.gz"
        for path, array in zip(paths, (image, label), strict=True):
            nib.save(nib.Nifti1Image(array, affine), path)  # type: ignore[attr-defined]
        cases.append(Case(name=f"c{number}", images=(paths[0],), label=paths[1], fold=number % 2))
    write_datalist(Datalist(training=tuple(cases), labels={1: "a", 2: "b"}), folder / "datalist.json", folder)
    text = "modality: MRI\ndatalist: datalist.json\ndataroot: .\nalgos: [segresnet]\nlauncher: slurm\n"
    (folder / "input.yaml").write_text(text)
    return folder / "input.yaml"


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The input.yaml of four oblique scans, planned, and of the same voxels along right, front and up."""
    folder = tmp_path_factory.mktemp("oblique")
    tilted = [affine_of(oblique(NORMALS[n % 2], 0.1 * n), n) for n in range(4)]
    codes = {"".join(ornt2axcodes(axes_of(affine))) for affine in tilted}
    assert len({tuple(i for i, c in enumerate(code) if c in "LR") for code in codes}) > 1, "rounded to different axes"
    found = {
        "oblique": write_set(folder / "oblique", tilted),
        "straight": write_set(folder / "straight", [affine_of(np.eye(3), n) for n in range(4)]),
    }
    for path in found.values():
        run_input(("analyze", "generate"), path, {})
    return found


def plan_of(path: Path) -> Plan:
    return read_plan(Workspace(path.parent / "work_dir").job_dir("segresnet", 0))


def in_order(frame: Frame, values: tuple[float, ...]) -> tuple[float, ...]:
    """X, Y, Z of the straight set, whose slices lie along Z, as the oblique one has them; in-plane spacing is equal."""
    rest = [v for a, v in enumerate(values) if a != 2]
    return tuple(values[2] if a == frame.slices else rest.pop(0) for a in range(3))


def test_the_plan_is_that_of_the_same_slices_along_right_front_and_up(sets: dict[str, Path]) -> None:
    own, straight = plan_of(sets["oblique"]), plan_of(sets["straight"])
    assert straight.frame is None
    frame = own.preprocessing.frame
    assert frame is not None
    fingerprints = [Fingerprint.read(Workspace(p.parent / "work_dir").datastats) for p in sets.values()]
    assert fingerprints[0].frame == frame
    for key in ("spacing_mm_min", "spacing_mm_median", "spacing_mm_max"):
        assert getattr(fingerprints[0], key) == pytest.approx(in_order(frame, getattr(fingerprints[1], key)), rel=1e-5)
    for plan in (own, straight):
        along = frame.slices if plan is own else 2
        assert plan.resample_resolution[along] == 8.0
        assert plan.roi_size[along] == 6 or plan.roi_size[along] == 8
    # In the plane the two axes may have changed places; the slices' axis is the same, and so is what is cut of it.
    assert sorted(own.roi_size) == sorted(straight.roi_size)
    assert own.roi_size[frame.slices] == straight.roi_size[2]
    same = ("batch_size", "num_epochs", "num_steps_per_epoch", "foreground_fraction", "tta", "learning_rate", "augment")
    assert all(getattr(own, key) == getattr(straight, key) for key in same)
    assert own.network["init_filters"] == straight.network["init_filters"]
    assert own.network["blocks_down"] == straight.network["blocks_down"]


def moved(array: np.ndarray, order: tuple[int, ...], flips: tuple[int, ...]) -> np.ndarray:
    result: np.ndarray = np.transpose(array, order)[tuple(slice(None, None, flip) for flip in flips)]
    return result


def test_networks_see_the_same_voxels_whatever_the_slices_are_rounded_to(sets: dict[str, Path]) -> None:
    how = plan_of(sets["oblique"]).preprocessing
    how = replace(how, norms=(ChannelNorm(mode="none"),), spacing_mm=in_order(how.frame, SPACING_MM))  # type: ignore[arg-type]
    first: list[np.ndarray] = []
    for number in range(4):
        folder = sets["oblique"].parent
        image, label = (folder / kind / f"c{number}.nii.gz" for kind in ("images", "labels"))
        prepared = prepare_image(read_image((image,)), how)
        target = prepare_label(read_label(label).array, prepared)
        stored, stored_label = scan(number)
        ways = [
            (order, flips)
            for order in permutations(range(3))
            for flips in product((1, -1), repeat=3)
            if np.array_equal(moved(stored, order, flips), prepared.image[0])
        ]
        assert len(ways) == 1, "a permutation and flips of the file's voxels, and nothing resampled"
        order, flips = ways[0]
        assert order[how.frame.slices] == 2, "slices lie along one axis in all cases"  # type: ignore[union-attr]
        assert np.array_equal(moved(stored_label, order, flips), target[0])
        first.append(np.array([*order, *flips]))
    assert all(np.array_equal(way, first[0]) for way in first), "stored alike and 7 degrees apart: turned alike"


def test_analysis_log_and_report_say_so(sets: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    folder = sets["oblique"].parent
    settings, _ = load_settings(sets["oblique"])
    listed = read_datalist(settings.datalist, settings.dataroot, num_fold=2, seed=0)
    analysis = analyzer.analyze(listed, settings, Workspace(folder / "work_dir"), progress=False)
    rule = analysis.datastats["data_set"]["frame_rule"]
    assert rule.startswith(
        "slices are over 30 degrees oblique, and rounded to these they would lie along different axes (on average 56 "
    )
    assert f"axes: {rule}" in analysis.text()
    assert not [w for w in analysis.warnings if w.kind in ("size", "axes")], "no header is blamed"
    assert rule.split(" (")[0] in make_report(folder / "work_dir", ()).read_text()


@pytest.mark.parametrize("streamed", [False, True])
def test_predictions_come_back_on_each_images_grid(
    sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    """A network that says where the image is bright: its labels are the file's own voxels, in memory and in streams."""

    class Bright(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.shape[2:][frame.slices] == 8, "windows are in the networks' axes"
            return torch.cat([50 - x, x - 50, torch.full_like(x, -1e3)], dim=1)

    own = plan_of(sets["oblique"])
    frame = own.preprocessing.frame
    assert frame is not None
    roi = [16, 16, 16]
    roi[frame.slices] = 8
    job = make_job(
        tmp_path / "w",
        "segresnet",
        0,
        channels=[{"mode": "none"}],
        resample_resolution=list(in_order(frame, SPACING_MM)),
        roi_size=roi,
        frame={"axes": [list(a) for a in frame.axes], "slices": frame.slices},
    )
    predictor = Predictor([job], device="cpu")
    predictor.models = tuple(replace(m, network=Bright(), heads=()) for m in predictor.models)
    if streamed:
        monkeypatch.setattr("autoseg.data.streams.STREAM_VOXELS", 100)
    for number in range(4):
        path, target = sets["oblique"].parent / "images" / f"c{number}.nii.gz", tmp_path / f"{number}.nii.gz"
        predictor.predict_file((path,), target)
        written, image = nib.load(target), nib.load(path)  # type: ignore[attr-defined]
        assert np.array_equal(written.affine, image.affine)
        assert np.array_equal(np.asarray(written.dataobj), (scan(number)[0] > 50).astype(np.uint8))


def test_a_bundles_transforms_turn_as_the_networks_want_and_back(sets: dict[str, Path]) -> None:
    """MONAI's transforms make of a file what ours do; inverted, they give the image back as it lies in RAS."""
    plan = plan_of(sets["oblique"])
    text = json.dumps(bundle_configs.preprocessing(plan)).replace('"scripts.', '"autoseg.export.scripts.')
    steps = {"_target_": "Compose", "transforms": json.loads(text)}
    transforms = ConfigParser({"pixdim": list(plan.resample_resolution), "steps": steps}).get_parsed_content("steps")
    for number in range(4):
        path = sets["oblique"].parent / "images" / f"c{number}.nii.gz"
        volume = read_image((path,))
        prepared = transforms({"image": str(path)})["image"]
        ours = prepare_image(volume, plan.preprocessing).image
        torch.testing.assert_close(prepared.as_tensor(), ours, atol=1e-3, rtol=1e-3)
        with allow_missing_keys_mode(transforms):
            back = transforms.inverse({"image": prepared})["image"]
        assert back.shape == (1, *SHAPE), "as the file has it"


@pytest.mark.extra("onnx", "onnxruntime", "onnxscript")
@pytest.mark.parametrize("whole", [False, True])
def test_the_runner_without_torch_turns_images_and_labels_back(
    sets: dict[str, Path], tmp_path: Path, whole: bool
) -> None:
    frame = plan_of(sets["oblique"]).preprocessing.frame
    assert frame is not None
    job = make_job(
        tmp_path / "work",
        "segresnet",
        0,
        channels=[{"mode": "mri", "nonzero": True}],
        resample_resolution=list(in_order(frame, (1.3, 1.3, 8.0))),
        roi_size=list(in_order(frame, (16, 16, 8))),
        frame={"axes": [list(a) for a in frame.axes], "slices": frame.slices},
    )
    (graph,) = export(tmp_path / "work", "onnx", algo="segresnet", whole=whole)
    predictor = Predictor([job], device="cpu")
    for number in range(4):
        path = sets["oblique"].parent / "images" / f"c{number}.nii.gz"
        predictor.predict_file((path,), tmp_path / "ours.nii.gz")
        runner.run([graph], [path], tmp_path / "theirs.nii.gz")
        ours, theirs = (
            np.asarray(nib.load(tmp_path / name).dataobj)  # type: ignore[attr-defined]
            for name in ("ours.nii.gz", "theirs.nii.gz")
        )
        assert len(np.unique(ours)) > 1
        assert (ours == theirs).mean() >= 0.999


def test_a_program_that_knows_no_own_axes_is_told(sets: dict[str, Path]) -> None:
    assert describe(plan_of(sets["oblique"]), "m", whole=True)["format"] == 2
    assert describe(plan_of(sets["straight"]), "m", whole=True)["format"] == 1


def test_slicer_is_refused_since_it_turns_to_ras_alone(sets: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"segresnet_0: .* right, front and up alone\. Export another format"):
        refuse_frame(plan_of(sets["oblique"]))
    refuse_frame(plan_of(sets["straight"]))


def test_a_whole_run_scores_what_it_writes_on_the_images_grids(tmp_path: Path) -> None:
    """Training, held-out predictions of two networks, their mean and the ensemble, each on the image's own grid."""
    path = write_set(tmp_path / "run", [affine_of(oblique(NORMALS[n % 2], 0.1 * n), n) for n in range(4)])
    small = {"roi_size": [16, 16, 16], "init_filters": 8, "blocks_down": [1, 1]}
    more = {"num_epochs": 2, "num_steps_per_epoch": 3, "batch_size": 1, "precision": "fp32", "num_workers": 1}
    settings = yaml.safe_load(path.read_text()) | more | {"segresnet": small, "launcher": "local", "device": "cpu"}
    settings |= {"algos": ["segresnet", "unet"], "unet": {"roi_size": [16, 16, 16], "features": [4, 8]}}
    path.write_text(yaml.safe_dump(settings))
    run_input(PLAIN_RUN, path, {})
    workspace = Workspace(tmp_path / "run" / "work_dir")
    assert read_plan(workspace.job_dir("unet", 0)).frame is not None
    scores = read_scores(workspace)
    assert scores is not None
    assert "segresnet+unet" in scores.cases[0].dice
    for case in scores.cases:
        image, label = (
            nib.load(tmp_path / "run" / kind / f"{case.name}.nii.gz")  # type: ignore[attr-defined]
            for kind in ("images", "labels")
        )
        for segmenter in ("segresnet", "unet", "segresnet+unet"):
            written = nib.load(workspace.out_of_fold / segmenter / f"{case.name}.nii.gz")  # type: ignore[attr-defined]
            assert np.array_equal(written.affine, image.affine)
            pred, truth = np.asarray(written.dataobj), np.asarray(label.dataobj)
            dice = [2 * ((pred == v) & (truth == v)).sum() / ((pred == v).sum() + (truth == v).sum()) for v in (1, 2)]
            assert case.dice[segmenter] == pytest.approx(dice, abs=1e-5)


@pytest.mark.slow
def test_dice_is_that_of_the_straight_twin(tmp_path: Path) -> None:
    """Trained on the same voxels, oblique or straight; the axes change places, so the weights are not the same."""
    tilted = [affine_of(oblique(NORMALS[n % 2], 0.02 * n), n) for n in range(8)]
    sets = {"oblique": tilted, "straight": [affine_of(np.eye(3), n) for n in range(8)]}
    dice = {}
    for name, affines in sets.items():
        path = write_set(tmp_path / name, affines)
        settings = yaml.safe_load(path.read_text()) | {"launcher": "local", "device": "cpu", "folds": [0]}
        path.write_text(yaml.safe_dump(settings | {"num_epochs": 15, "num_steps_per_epoch": 10}))
        run_input(PLAIN_RUN, path, {})
        scores = read_scores(Workspace(path.parent / "work_dir"))
        assert scores is not None
        assert len(scores.cases) == 4
        dice[name] = np.mean([case.dice["segresnet"] for case in scores.cases], axis=0)
    assert min(*dice["oblique"], *dice["straight"]) > 0.9
    assert dice["oblique"] == pytest.approx(dice["straight"], abs=0.03)


def test_a_new_image_follows_the_rule_and_one_of_another_plane_is_rounded(sets: dict[str, Path]) -> None:
    frame = plan_of(sets["oblique"]).preprocessing.frame
    assert frame is not None
    how = Preprocessing(norms=(ChannelNorm(mode="none"),), spacing_mm=(1, 1, 1), frame=frame)

    def slices_of(directions: np.ndarray) -> int:
        """The network's axis of a new image's slices."""
        grid = Grid(shape=SHAPE, affine=affine_of(directions))
        spacing = how.turn_of(grid).triple(grid.to_ras().spacing_mm)
        return int(np.argmax(spacing))

    for tilt in np.linspace(-0.3, 0.3, 7):
        assert slices_of(oblique((0.56 + tilt, -0.67, 0.5 - tilt))) == frame.slices
    own = np.array(frame.axes[frame.slices])
    toward_up = own + (0, 0, 0.9 * np.sign(own[2]))
    assert slices_of(oblique(tuple(toward_up))) == frame.slices, "rounded to up, and within 60 degrees"
    across = np.cross(frame.axes[frame.slices], (0.3, 0.5, -0.8))
    assert slices_of(oblique(tuple(across))) != frame.slices


def test_only_thick_oblique_slices_of_one_kind_need_axes_of_their_own() -> None:
    def directions(matrix: np.ndarray, spacing: tuple[float, float, float] = SPACING_MM):  # type: ignore[no-untyped-def]
        affine = np.eye(4)
        affine[:3, :3] = matrix * spacing
        ras = Grid(shape=SHAPE, affine=affine).to_ras().affine[:3, :3]
        return tuple(map(tuple, ras.T.tolist()))

    tilted = oblique(NORMALS[0])
    assert find_frame([directions(np.eye(3))]) is None
    assert find_frame([directions(tilted, (1, 1, 1.5))]) is None, "no slices"
    assert find_frame([directions(oblique((0.2, -0.1, 1.0)))]) is None, "slightly tilted: rounding is clear"
    assert find_frame([directions(tilted)]) is not None
    planes = [np.eye(3), np.eye(3)[:, [2, 0, 1]], np.eye(3)[:, [1, 2, 0]], tilted]
    assert find_frame([directions(p) for p in planes]) is None, "scans of several planes have no axis in common"


rotations = st.tuples(*[st.floats(-1, 1)] * 4).filter(lambda q: sum(x * x for x in q) > 0.1)


def rotation_of(q: tuple[float, ...]) -> np.ndarray:
    w, x, y, z = np.array(q) / np.linalg.norm(q)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


@given(rotations, st.tuples(*[st.floats(0.5, 6)] * 3))
def test_a_frame_is_right_angled_and_every_turn_goes_back(q: tuple[float, ...], spacing: tuple[float, ...]) -> None:
    affine = np.eye(4)
    affine[:3, :3] = rotation_of(q) * spacing
    ras = Grid(shape=SHAPE, affine=affine).to_ras()
    frame = find_frame([tuple(map(tuple, ras.affine[:3, :3].T.tolist()))])  # type: ignore[arg-type]
    if frame is None:
        return
    assert np.allclose(np.array(frame.axes) @ np.array(frame.axes).T, np.eye(3), atol=1e-5)
    turn = frame.turn(ras.affine[:3, :3])
    image = torch.rand(2, 3, 4, 5)
    assert torch.equal(turn.back(turn.apply(image)), image)
    assert turn.triple_back(turn.triple((3, 4, 5))) == (3, 4, 5)
    assert tuple(turn.apply(image).shape[1:]) == turn.triple((3, 4, 5))
    plain = {"axes": [list(a) for a in frame.axes], "slices": frame.slices}
    without_torch = runner.to_ras(image[0].numpy(), runner.axes_to_frame(ras.affine[:3, :3], plain))
    np.testing.assert_array_equal(without_torch, turn.apply(image)[0].numpy())
    # What an image is turned to lies as the frame does: each axis is nearest to its own.
    turned = np.stack([ras.affine[:3, turn.axes[a]] * (-1 if turn.flipped[a] else 1) for a in range(3)], axis=1)
    assert frame.turn(turned) == Turn()


def test_mirroring_stops_where_x_is_not_left_to_right() -> None:
    n = oblique((0.8, 0.5, 0.33))
    frame = Frame(tuple(map(tuple, n[:, [2, 0, 1]].T.tolist())), 0)  # type: ignore[arg-type]
    pairs = make_fingerprint(frame=frame, frame_rule="why", lateral_pairs=(("sphere", "box"),))
    plan, origins = plan_and_origins("segresnet", fingerprint=pairs)
    assert plan.mirror_axes == ()
    rule = "none: X lies 37 degrees from right, so a mirrored image is not its other side"
    assert origins["mirror_axes"].rule == rule
    assert origins["frame"].rule == "why; images are turned to these axes for the networks, and labels back"
    assert plan_and_origins("segresnet", fingerprint=replace(pairs, lateral_pairs=()))[0].mirror_axes == (0,)


def test_an_edited_frame_must_be_right_angled(sets: dict[str, Path]) -> None:
    job = Workspace(sets["oblique"].parent / "work_dir").job_dir("segresnet", 1)
    text = job.plan.read_text()
    values = yaml.safe_load(text)
    values["frame"]["axes"][1] = values["frame"]["axes"][0]
    job.plan.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match="three directions of length 1 at right angles"):
        read_plan(job)
    job.plan.write_text(text)
