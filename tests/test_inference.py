"""Windows, the way back to the image's grid, and predictors, against MONAI and whole-volume interpolation."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.inferers import sliding_window_inference
from tiny_jobs import make_job
from torch import nn

from autoseg.data.labels import LabelMap
from autoseg.data.preprocess import Prepared
from autoseg.data.volumes import Grid, Volume, read_image, write_volume
from autoseg.errors import DataError, WorkspaceError
from autoseg.inference import predictor as predictor_module
from autoseg.inference import restore
from autoseg.inference.predictor import Predictor, vote
from autoseg.inference.restore import (
    Probs,
    interpolate_rows,
    labels_from_probs,
    labels_of_means,
    mean_labels,
    to_probs,
)
from autoseg.inference.windows import predict_logits, window_slices
from autoseg.workspace import Workspace

CPU = torch.device("cpu")
TWO = LabelMap(names=("a", "b"), values=((1,), (2,)))


class Counting(nn.Module):
    """A convolution that sees its surroundings, and counts its calls and the windows in them."""

    def __init__(self, in_channels: int = 1, num_outputs: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv3d(in_channels, num_outputs, 5, padding=2)
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        assert not self.training
        assert torch.is_inference_mode_enabled()
        self.shapes.append(tuple(image.shape))
        return self.conv(image)


def logits_of(network: nn.Module, image: torch.Tensor, roi=(16, 16, 16), overlap=0.5, outputs=3, **more):
    return predict_logits(
        network, image, roi_size=roi, overlap=overlap, num_outputs=outputs, device=CPU, precision="fp32", **more
    )


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.625])
@pytest.mark.parametrize("shape", [(33, 17, 40), (16, 31, 16), (20, 9, 50), (16, 16, 17)])
@pytest.mark.parametrize("window_batch", [1, 3])
def test_windows_equal_monai(shape, overlap: float, window_batch: int) -> None:
    network = Counting(in_channels=2).eval()
    image = torch.randn(2, *shape)
    found = logits_of(network, image, overlap=overlap, window_batch=window_batch)
    with torch.inference_mode():
        wanted = sliding_window_inference(image[None], (16, 16, 16), 1, network, overlap=overlap, mode="gaussian")[0]
    assert found.shape == (3, *shape)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(16, 16, 16), (5, 16, 3), (1, 1, 1)])
def test_a_volume_that_fits_one_window_is_one_pass_without_blending(shape) -> None:
    network = Counting()
    image = torch.randn(1, *shape)
    found = logits_of(network, image)
    assert network.shapes == [(1, 1, 16, 16, 16)]
    before = [(16 - s) // 2 for s in shape]
    padded = torch.zeros(1, 1, 16, 16, 16)
    inner = tuple(slice(b, b + s) for b, s in zip(before, shape, strict=True))
    padded[(0, 0, *inner)] = image[0]
    with torch.inference_mode():
        wanted = network.eval()(padded)[0][(slice(None), *inner)]
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)


def test_windows_cover_every_voxel_within_the_volume() -> None:
    for shape, overlap in product([(16, 40, 23), (17, 18, 100)], [0.0, 0.3, 0.99]):
        seen = np.zeros(shape, bool)
        for window in window_slices(shape, (16, 16, 16), overlap):
            assert all(
                w.start >= 0 and w.stop <= n and w.stop - w.start == 16 for w, n in zip(window, shape, strict=True)
            )
            seen[window] = True
        assert seen.all()


@pytest.mark.parametrize(("axes", "passes"), [((), 1), ((1,), 2), ((0, 2), 4), ((0, 1, 2), 8)])
def test_mirrored_mean_equals_the_mean_of_mirrored_runs(axes, passes: int) -> None:
    network = Counting()
    image = torch.randn(1, 20, 16, 16)
    found = logits_of(network, image, roi=(20, 16, 16), mirror_axes=axes, mirrored_pairs=[(1, 2)])
    assert len(network.shapes) == passes
    runs = []
    for chosen in product([False, True], repeat=len(axes)):
        dims = [a + 1 for a, on in zip(axes, chosen, strict=True) if on]
        run = logits_of(network, image.flip(dims), roi=(20, 16, 16)).flip(dims)
        runs.append(run[[0, 2, 1]] if 1 in dims else run)
    torch.testing.assert_close(found, torch.stack(runs).mean(0), atol=1e-5, rtol=1e-5)


def test_the_mode_of_the_network_comes_back() -> None:
    network = Counting().train()
    logits_of(network, torch.randn(1, 8, 8, 8))
    assert network.training


# -- the way back


@settings(max_examples=60, deadline=None)
@given(
    small=st.tuples(*[st.integers(1, 9)] * 3),
    large=st.tuples(*[st.integers(1, 14)] * 3),
    axis=st.integers(0, 2),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    seed=st.integers(0, 99),
)
def test_rows_equal_whole_interpolation(small, large, axis: int, cut, seed: int) -> None:
    values = torch.rand(3, *small, generator=torch.Generator().manual_seed(seed))
    whole = F.interpolate(values[None], size=large, mode="trilinear", align_corners=False)[0]
    first, last = sorted(int(c * large[axis]) for c in cut)
    last = max(last, first + 1) if first < large[axis] else large[axis]
    first = min(first, last - 1)
    rows = interpolate_rows(values, large, axis, first, last)
    torch.testing.assert_close(rows, whole.narrow(axis + 1, first, last - first), atol=1e-5, rtol=0)


def prepared_of(shape, ras_shape, box) -> Prepared:
    return Prepared(image=torch.zeros(1, *shape), ras_shape=ras_shape, box=box)


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("slab_values", [1, 500, 1 << 24])
def test_labels_equal_whole_interpolation_and_the_crop_is_padded_back(
    monkeypatch: pytest.MonkeyPatch, sigmoid: bool, slab_values: int
) -> None:
    monkeypatch.setattr(restore, "SLAB_VALUES", slab_values)
    label_map = LabelMap(names=("a", "b"), values=((3,), (700,)), sigmoid=sigmoid)
    logits = 4 * torch.randn(label_map.num_outputs, 7, 11, 5, generator=torch.Generator().manual_seed(1))
    wanted_probs = logits.sigmoid() if sigmoid else logits.softmax(0)
    probs = to_probs(logits.clone(), sigmoid=sigmoid)
    torch.testing.assert_close(probs, wanted_probs)
    box = (slice(2, 14), slice(0, 9), slice(3, 20))
    found = labels_from_probs(probs, prepared_of((7, 11, 5), (15, 10, 21), box), label_map)
    whole = F.interpolate(wanted_probs[None], size=(12, 9, 17), mode="trilinear", align_corners=False)[0]
    chosen = (whole > 0.5) if sigmoid else whole.argmax(0, keepdim=True)
    wanted = np.zeros((15, 10, 21), np.uint16)
    wanted[box] = label_map.decode(chosen.to(torch.uint8).numpy())
    assert found.dtype == np.uint16
    assert len(np.unique(found)) == 3
    assert (found != wanted).mean() < 1e-3  # rounding may turn a tie


@pytest.mark.parametrize("sigmoid", [False, True])
def test_models_on_different_grids_and_boxes_meet_on_the_images(sigmoid: bool) -> None:
    label_map = LabelMap(names=("a", "b"), values=((1,), (2,)), sigmoid=sigmoid)
    rng = torch.Generator().manual_seed(2)
    shape = (12, 10, 16)
    boxes = [
        tuple(slice(0, s) for s in shape),
        (slice(3, 9), slice(2, 10), slice(0, 11)),
        (slice(0, 12), slice(0, 3), slice(12, 16)),
    ]
    grids, nums = [(6, 7, 8), (9, 4, 5), (12, 3, 4)], [1, 3, 2]
    members, total = [], torch.zeros(label_map.num_outputs, *shape)
    for box, grid, num in zip(boxes, grids, nums, strict=True):
        probs = to_probs(3 * torch.randn(label_map.num_outputs, *grid, generator=rng), sigmoid=sigmoid)
        members.append(Probs(values=probs, box=box, num_models=num))
        size = [s.stop - s.start for s in box]
        whole = torch.zeros_like(total)
        if not sigmoid:
            whole[0] = 1
        whole[(slice(None), *box)] = F.interpolate(probs[None], size=size, mode="trilinear", align_corners=False)[0]
        total += num * whole
    mean = total / sum(nums)
    chosen = mean > 0.5 if sigmoid else mean.argmax(0, keepdim=True)
    wanted = label_map.decode(chosen.to(torch.uint8).numpy())
    assert (mean_labels(members, shape, label_map) != wanted).mean() < 1e-3
    both = labels_of_means(members, [(1,), (0, 1, 2)], shape, label_map)
    np.testing.assert_array_equal(both[0], mean_labels(members[1:2], shape, label_map))
    np.testing.assert_array_equal(both[1], mean_labels(members, shape, label_map))


def test_the_slabs_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restore, "SLAB_VALUES", 3 * 20 * 20 * 4)
    probs = Probs(values=torch.rand(3, 10, 10, 50), box=(slice(0, 20), slice(0, 20), slice(0, 100)))
    places = []
    for place, slabs in restore.restored_slabs([probs], (20, 20, 100), sigmoid=False):
        assert slabs[0].numel() <= 3 * 20 * 20 * 4
        places.append(place[2])
    assert [p.start for p in places] == list(range(0, 100, 4))


# -- votes


def test_vote_takes_the_majority_and_in_a_tie_the_first() -> None:
    labels = [np.array(v, np.uint8).reshape(5, 1, 1) for v in ([1, 1, 0, 2, 0], [2, 1, 0, 1, 1], [2, 0, 1, 0, 1])]
    assert vote(labels, TWO).ravel().tolist() == [2, 1, 0, 2, 1]
    assert vote(labels[:2], TWO).ravel().tolist() == [1, 1, 0, 2, 0]


def test_vote_of_regions_wants_more_than_half() -> None:
    regions = LabelMap(names=("whole", "core"), values=((1, 2), (2,)), sigmoid=True)
    labels = [np.array(v, np.uint8).reshape(4, 1, 1) for v in ([2, 2, 0, 1], [1, 2, 1, 0], [2, 0, 0, 0], [0, 1, 0, 1])]
    assert vote(labels, regions).ravel().tolist() == [1, 1, 0, 0]
    assert vote(labels[:3], regions).ravel().tolist() == [2, 2, 0, 0]


# -- predictors


@pytest.fixture
def volume() -> Volume:
    rng = np.random.default_rng(0)
    array = rng.normal(size=(1, 22, 19, 27)).astype(np.float32)
    return Volume(array=array, grid=Grid(shape=(22, 19, 27), affine=np.diag([1.0, 1.1, 1.3, 1.0])))


def test_the_mean_of_models_with_different_spacings(tmp_path: Path, volume: Volume, monkeypatch) -> None:
    spacings = [(1.2, 1.2, 1.6), (1.0, 1.0, 1.0), (1.2, 1.2, 1.6)]
    jobs = [make_job(tmp_path, "segresnet", i, seed=i, resample_resolution=s) for i, s in enumerate(spacings)]
    predictor = Predictor(jobs, device="cpu")
    calls = []
    real = predictor_module.prepare_image
    monkeypatch.setattr(predictor_module, "prepare_image", lambda v, how: calls.append(how) or real(v, how))
    labels = predictor.predict_labels(volume)
    assert len(calls) == 2  # once per group
    each = predictor.predict_each(volume)
    size = volume.array.shape[1:]
    whole = [F.interpolate(p.values[None], size=size, mode="trilinear", align_corners=False)[0] for p in each]
    wanted = torch.stack(whole).mean(0).argmax(0).numpy()
    assert labels.shape == size
    assert len(np.unique(labels)) > 1
    assert (labels != wanted).mean() < 1e-3
    assert [p.num_models for p in predictor.predict_probs(volume)] == [2, 1]


def test_a_vote_of_models(tmp_path: Path, volume: Volume) -> None:
    jobs = [make_job(tmp_path, "segresnet", i, seed=i) for i in range(3)]
    singles = [Predictor([job], device="cpu").predict_labels(volume) for job in jobs]
    found = Predictor(jobs, device="cpu", combine="vote").predict_labels(volume)
    np.testing.assert_array_equal(found, vote(singles, TWO))


def test_test_time_mirroring_swaps_left_and_right(tmp_path: Path, volume: Volume) -> None:
    classes = [{"name": "kidney_left", "values": [1]}, {"name": "kidney_right", "values": [2]}]
    more = {
        "classes": classes,
        "tta": True,
        "mirror_axes": [0],
        "roi_size": (24, 24, 24),
        "resample_resolution": (1, 1, 1),
    }
    predictor = Predictor([make_job(tmp_path, "segresnet", 0, **more)], device="cpu")
    here = predictor.predict_each(volume)[0].values
    flipped = Volume(array=np.ascontiguousarray(volume.array[:, ::-1]), grid=volume.grid)
    there = predictor.predict_each(flipped)[0].values.flip(1)[[0, 2, 1]]
    # The mean over both sides is the same seen from either, once sides are exchanged.
    torch.testing.assert_close(here, there, atol=2e-4, rtol=1e-3)


AFFINES = {
    "flipped": np.array([[-1.0, 0, 0, 30], [0, -1.2, 0, 10], [0, 0, 1.5, -7], [0, 0, 0, 1]]),
    "permuted": np.array([[0, 0, 1.1, 0], [-0.9, 0, 0, 4], [0, 2.5, 0, 9], [0, 0, 0, 1.0]]),
    "oblique": np.array([[0.98, 0.17, 0, 3], [-0.17, 0.98, 0.1, -20], [0, -0.1, 1.9, 5], [0, 0, 0, 1]]),
}


@pytest.mark.parametrize("name", AFFINES)
def test_labels_lie_on_the_bright_voxels_of_any_grid(tmp_path: Path, name: str) -> None:
    """A network that only thresholds must give back the image's own mask, on its own grid."""
    job = make_job(
        tmp_path,
        "segresnet",
        0,
        classes=[{"name": "bright", "values": [7]}],
        channels=[{"mode": "none"}],
        resample_resolution=tuple(float(s) for s in Grid(shape=(24, 26, 28), affine=AFFINES[name]).to_ras().spacing_mm),
    )
    grid = Grid(shape=(24, 26, 28), affine=AFFINES[name])
    stored = np.zeros(grid.shape, np.float32)
    stored[4:9, 10:23, 2:6] = 1.0
    path = tmp_path / "image.nii.gz"
    nib.save(nib.Nifti1Image(stored, grid.affine), path)
    predictor = Predictor([job], device="cpu")

    class Threshold(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return torch.cat([torch.full_like(image, 0.5), image], 1)

    object.__setattr__(predictor.models[0], "network", Threshold())
    volume = read_image((path,))
    write_volume(tmp_path / "label.nii.gz", predictor.predict_labels(volume), volume.grid)
    label = nib.load(tmp_path / "label.nii.gz")
    np.testing.assert_allclose(label.affine, grid.affine, atol=1e-6)
    assert label.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(label.dataobj), 7 * (stored > 0))


def test_wrong_channels(tmp_path: Path, volume: Volume) -> None:
    predictor = Predictor([make_job(tmp_path, "segresnet", 0, channels=[{"mode": "none"}] * 2)], device="cpu")
    with pytest.raises(DataError, match="1 channels, the model was trained with 2"):
        predictor.predict_labels(volume)


def test_a_job_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match="no trained model"):
        Predictor([], device="cpu")
    with pytest.raises(WorkspaceError, match="dints_4 has not been trained"):
        Predictor([Workspace(tmp_path).job_dir("dints", 4)], device="cpu")
    job = make_job(tmp_path, "segresnet", 0)
    whole = job.model.read_bytes()
    job.model.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WorkspaceError, match=r"model\.pt: not readable as weights .* train segresnet_0 again"):
        Predictor([job], device="cpu")
    job.model.write_bytes(b"not a model")
    with pytest.raises(WorkspaceError, match="not readable as weights"):
        Predictor([job], device="cpu")
    job.model.write_bytes(b"")
    with pytest.raises(WorkspaceError, match="not readable as weights"):
        Predictor([job], device="cpu")
    other = make_job(tmp_path, "segresnet", 1, channels=[{"mode": "none"}] * 2)
    job.model.write_bytes(other.model.read_bytes())
    with pytest.raises(WorkspaceError, match=r"not the weights of the network in hyper_parameters\.yaml"):
        Predictor([job], device="cpu")


def test_models_of_different_classes_do_not_mix(tmp_path: Path) -> None:
    jobs = [
        make_job(tmp_path, "segresnet", 0),
        make_job(tmp_path, "segresnet", 1, classes=[{"name": "c", "values": [1]}]),
    ]
    with pytest.raises(WorkspaceError, match="segresnet_0 and segresnet_1 were trained for different classes"):
        Predictor(jobs, device="cpu")
