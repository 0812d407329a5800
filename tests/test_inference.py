"""Windows, the way back to the image's grid, and predictors, against MONAI and whole-volume interpolation."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.inferers import sliding_window_inference
from plans import tiny_plan
from tiny_jobs import TensorRows, make_job
from torch import nn

from autoseg.config.networks import AlgoName
from autoseg.data.grid import Grid, Volume
from autoseg.data.labels import LabelMap
from autoseg.data.resampling import resample_rows
from autoseg.data.streams import MemoryImage
from autoseg.data.volumes import read_image, write_volume
from autoseg.data.windowing import window_starts, window_weights
from autoseg.errors import DataError, WorkspaceError
from autoseg.inference import restore
from autoseg.inference.blocks import BLOCK_ROWS
from autoseg.inference.predictor import Predictor, vote
from autoseg.inference.restore import Member, labelled_slabs, labels_of_means
from autoseg.inference.windows import ProbRows, WindowModel, predict_targets
from autoseg.networks import build_network, heads
from autoseg.workspace.workspace import Workspace

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


def rows_of(
    network: nn.Module | list[nn.Module],
    image: torch.Tensor,
    *,
    axis=0,
    roi=(16, 16, 16),
    overlap=0.5,
    outputs=3,
    sigmoid=False,
    heads=(),
    mirror_axes=(),
    mirrored_pairs=(),
    **more,
) -> ProbRows:
    """Rows of an image in memory; a second request for a row, or one out of order, fails."""
    asked = [0]

    def fetch(start: int, stop: int) -> torch.Tensor:
        assert start == asked[0] < stop
        asked[0] = stop
        return image.narrow(axis + 1, start, stop - start)

    networks = network if isinstance(network, list) else [network]
    model = WindowModel(
        networks, heads, num_outputs=outputs, sigmoid=sigmoid, device=CPU, precision="fp32", mirror_axes=mirror_axes,
        mirrored_pairs=mirrored_pairs,
    )  # fmt: skip
    return ProbRows(model, fetch, tuple(image.shape[1:]), axis, roi_size=roi, overlap=overlap, **more)


def probs_of(network: nn.Module, image: torch.Tensor, *, pieces=1000, **more) -> torch.Tensor:
    """(K, X, Y, Z), asked for in pieces of some rows."""
    rows = rows_of(network, image, **more)
    size = rows.shape[rows.axis]
    made = [rows.rows(start, min(start + pieces, size)) for start in range(0, size, pieces)]
    return torch.cat(made).movedim(0, rows.axis + 1)


def naive_probs(network: nn.Module, image: torch.Tensor, roi: int, overlap: float) -> torch.Tensor:
    """Every window of a volume in memory, weighted by one three-dimensional Gaussian."""
    bell = np.exp(-0.5 * ((np.arange(roi) - (roi - 1) / 2) / (roi / 8)) ** 2)
    weight = torch.from_numpy(np.einsum("i,j,k->ijk", bell, bell, bell))
    shape = image.shape[1:]
    total, weights = torch.zeros(3, *shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    for x, y, z in product(*(window_starts(s, roi, overlap) for s in shape)):
        place = (slice(x, x + roi), slice(y, y + roi), slice(z, z + roi))
        with torch.inference_mode():
            logits = network(image[(slice(None), *place)][None])[0]
        total[(slice(None), *place)] += logits * weight
        weights[place] += weight
    return (total / weights).float().softmax(0)


@settings(max_examples=25)
@given(
    shape=st.tuples(*[st.integers(16, 45)] * 3),
    overlap=st.sampled_from([0.0, 0.25, 0.5, 0.625]),
    axis=st.integers(0, 2),
    pieces=st.integers(1, 50),
    window_batch=st.integers(1, 3),
)
def test_rows_equal_windows_over_the_whole_volume(shape, overlap, axis, pieces, window_batch) -> None:
    network = Counting(in_channels=2).eval()
    image = torch.randn(2, *shape, generator=torch.Generator().manual_seed(3))
    found = probs_of(network, image, axis=axis, overlap=overlap, pieces=pieces, window_batch=window_batch)
    assert found.shape == (3, *shape)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, naive_probs(network, image, 16, overlap), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("overlap", "step"), [(0.0, 16), (0.5, 8), (0.625, 6)])
def test_windows_are_monais_where_they_divide_the_volume(overlap: float, step: int) -> None:
    network = Counting().eval()
    image = torch.randn(1, 16 + 2 * step, 16, 16 + step)
    with torch.inference_mode():
        wanted = sliding_window_inference(image[None], (16, 16, 16), 1, network, overlap=overlap, mode="gaussian")[
            0
        ].softmax(0)
    found = probs_of(network, image, overlap=overlap)
    # MONAI lifts weights below a thousandth to a thousandth, which tells at the volume's faces alone.
    inner = (slice(None), slice(4, -4), slice(6, 10), slice(4, -4))
    torch.testing.assert_close(found[inner], wanted[inner], atol=1e-2 if overlap else 1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(16, 16, 16), (5, 16, 3), (1, 1, 1)])
@pytest.mark.parametrize("sigmoid", [False, True])
def test_a_volume_that_fits_one_window_is_one_pass_without_blending(shape, sigmoid: bool) -> None:
    network = Counting()
    image = torch.randn(1, *shape)
    found = probs_of(network, image, pieces=2, axis=2, sigmoid=sigmoid)
    assert network.shapes == [(1, 1, 16, 16, 16)]
    before = [(16 - s) // 2 for s in shape]
    padded = torch.zeros(1, 1, 16, 16, 16)
    inner = tuple(slice(b, b + s) for b, s in zip(before, shape, strict=True))
    padded[(0, 0, *inner)] = image[0]
    with torch.inference_mode():
        wanted = network.eval()(padded)[0][(slice(None), *inner)]
    torch.testing.assert_close(found, wanted.sigmoid() if sigmoid else wanted.softmax(0), atol=1e-6, rtol=1e-6)


@settings(max_examples=200)
@given(roi=st.integers(1, 40), more=st.integers(0, 200), overlap=st.floats(0, 0.99))
def test_windows_cover_every_voxel_and_weigh_one(roi: int, more: int, overlap: float) -> None:
    size = roi + more
    starts = window_starts(size, roi, overlap)
    assert starts[0] == 0
    assert starts[-1] == size - roi
    step = max(1, int(roi * (1 - overlap)))
    assert all(0 < b - a <= step for a, b in pairwise(starts))
    total = torch.zeros(size)
    for start, weight in zip(starts, window_weights(size, roi, overlap), strict=True):
        total[start : start + roi] += weight
    torch.testing.assert_close(total, torch.ones(size))


def test_no_more_rows_are_held_than_a_window_is_deep_however_long_the_volume() -> None:
    held = []
    for length in (64, 640):
        rows = rows_of(Counting(), torch.randn(1, 16, 16, length), axis=2)
        most = 0
        for row in range(length):
            rows.rows(row, row + 1)
            most = max(most, rows._blocks.num_held)
        held.append(most)
    assert held[0] == held[1] <= 16 + 2 * BLOCK_ROWS


def test_rows_that_are_gone_are_not_made_up() -> None:
    rows = rows_of(Counting(), torch.randn(1, 40, 16, 16))
    rows.rows(20, 22)
    with pytest.raises(ValueError, match="row 3 is gone"):
        rows.rows(3, 4)


def test_several_networks_are_the_mean_of_their_logits() -> None:
    first, second = Counting(), Counting()
    with torch.no_grad():
        second.conv.weight.neg_().mul_(3)
    image = torch.randn(1, 20, 30, 18)
    both = probs_of([first, second], image)
    logits = (probs_of(first, image).log() + probs_of(second, image).log()) / 2
    torch.testing.assert_close(both, logits.softmax(0), atol=1e-5, rtol=1e-4)


class Headed(nn.Module):
    """Features that see their surroundings, and a layer that makes outputs of those of a voxel."""

    def __init__(self, seed: int, *, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.head = nn.Conv3d(1, 4, 5, padding=2), nn.Conv3d(4, 9, 1, bias=bias)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(image).relu())


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("num", [1, 2])
@pytest.mark.parametrize("axes", [(), (0, 2)])
def test_averaging_what_goes_into_the_last_layer_comes_to_the_same(sigmoid: bool, num: int, axes) -> None:
    networks = [Headed(0), Headed(1, bias=False)][:num]
    image = torch.randn(1, 30, 18, 21)
    how = {"outputs": 9, "sigmoid": sigmoid, "mirror_axes": axes}
    wanted = rows_of(networks, image, **how)
    found = rows_of(networks, image, heads=[(network.head,) for network in networks], **how)
    assert (wanted._model.num_held, found._model.num_held) == (9, 4 * num)
    torch.testing.assert_close(found.rows(0, 30), wanted.rows(0, 30), atol=1e-6, rtol=1e-5)
    with torch.inference_mode():  # the networks have their last layers back
        assert networks[0](image[None]).shape[1] == 9


def test_threads_may_share_a_network() -> None:
    network = Headed(0).eval()
    model = WindowModel([network], [(network.head,)], num_outputs=9, sigmoid=False, device=CPU, precision="fp32")
    batch = torch.randn(1, 1, 16, 16, 16)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: model(batch), range(40)))
    assert {tuple(f.shape) for f in found} == {(1, 16, 16, 16, 4)}
    assert "forward" not in network.head.__dict__


def test_logits_are_averaged_where_the_last_layer_must_be_mirrored_too() -> None:
    network = Headed(0)
    rows = rows_of(network, torch.randn(1, 16, 16, 16), heads=[(network.head,)], outputs=9, mirror_axes=(0,),
                   mirrored_pairs=[(1, 2)])  # fmt: skip
    assert rows._model.num_held == 9


@pytest.mark.parametrize("algo", ["segresnet", "swinunetr", "dints", "unet", "locator"])
def test_every_network_names_the_layers_that_make_its_outputs(algo: AlgoName) -> None:
    plan = tiny_plan(algo, classes={f"c{i}": (i,) for i in range(1, 80)})
    network = build_network(plan).eval()
    roi = tuple(max(32, edge) for edge in plan.roi_size)
    image = torch.randn(1, *roi)
    how = {"roi": roi, "outputs": 80}
    found = rows_of(network, image, heads=[heads(algo, network)], **how)
    assert found._model.num_held == 80 if algo == "unet" else found._model.num_held < 80
    wanted = rows_of(network, image, **how).rows(0, roi[0])
    torch.testing.assert_close(found.rows(0, roi[0]), wanted, atol=1e-5, rtol=1e-4)


def test_targets_are_the_most_probable_classes_or_all_above_a_half() -> None:
    image = torch.randn(1, 20, 30, 18)
    probs = probs_of(Counting(), image, axis=1)
    found = predict_targets(rows_of(Counting(), image, axis=1))
    torch.testing.assert_close(found, probs.argmax(0, keepdim=True).to(torch.uint8))
    probs = probs_of(Counting(), image, axis=1, sigmoid=True)
    found = predict_targets(rows_of(Counting(), image, axis=1, sigmoid=True))
    torch.testing.assert_close(found, (probs > 0.5).to(torch.uint8))


@pytest.mark.parametrize(("axes", "passes"), [((), 1), ((1,), 2), ((0, 2), 4), ((0, 1, 2), 8)])
def test_mirrored_mean_equals_the_mean_of_mirrored_runs(axes, passes: int) -> None:
    network = Counting()
    image = torch.randn(1, 20, 16, 16)
    found = probs_of(network, image, roi=(20, 16, 16), mirror_axes=axes, mirrored_pairs=[(1, 2)])
    assert len(network.shapes) == passes
    runs = []
    for chosen in product([False, True], repeat=len(axes)):
        dims = [a + 1 for a, on in zip(axes, chosen, strict=True) if on]
        with torch.inference_mode():
            run = network.eval()(image.flip(dims)[None])[0].flip(dims)
        runs.append(run[[0, 2, 1]] if 1 in dims else run)
    torch.testing.assert_close(found, torch.stack(runs).mean(0).softmax(0), atol=1e-5, rtol=1e-5)


def test_the_mode_of_the_network_comes_back() -> None:
    network = Counting().train()
    probs_of(network, torch.randn(1, 8, 8, 8))
    assert network.training


# -- the way back


@settings(max_examples=60)
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
    rows = resample_rows(
        lambda start, stop: values.narrow(axis + 1, start, stop - start), small[axis], large, axis, first, last
    )
    torch.testing.assert_close(rows, whole.narrow(axis + 1, first, last - first), atol=1e-5, rtol=0)


def smooth_probs(outputs: int, grid, seed: int, *, sigmoid: bool) -> torch.Tensor:
    """Probabilities with regions where neighbours agree, and others where they do not."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, outputs, *[max(1, s // 3) for s in grid], generator=rng)
    logits = 4 * F.interpolate(coarse, size=grid, mode="trilinear", align_corners=False)[0]
    return logits.sigmoid() if sigmoid else logits.softmax(0)


@settings(max_examples=60)
@given(
    sigmoid=st.booleans(),
    watched=st.booleans(),
    grid=st.tuples(*[st.integers(1, 14)] * 3),
    size=st.tuples(*[st.integers(1, 25)] * 3),
    margin=st.tuples(*[st.integers(0, 4)] * 6),
    axis=st.integers(0, 2),
    slab_values=st.sampled_from([1, 500, 1 << 24]),
    seed=st.integers(0, 99),
)
def test_labels_equal_whole_interpolation_and_the_crop_is_padded_back(
    sigmoid, watched, grid, size, margin, axis, slab_values, seed
) -> None:
    label_map = LabelMap(names=("a", "b"), values=((3,), (700,)), sigmoid=sigmoid)
    probs = smooth_probs(label_map.num_outputs, grid, seed, sigmoid=sigmoid)
    box = tuple(slice(m, m + s) for m, s in zip(margin[:3], size, strict=True))
    ras_shape = tuple(b.stop + m for b, m in zip(box, margin[3:], strict=True))
    whole = F.interpolate(probs[None], size=size, mode="trilinear", align_corners=False)[0]
    seen = torch.full((label_map.num_outputs, *ras_shape), -1.0)

    def watch(k: int, place, part: torch.Tensor) -> None:
        assert k == 0
        seen[(slice(None), *place)] = part

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(restore, "SLAB_VALUES", slab_values)
        member = Member(rows=TensorRows(probs, axis), box=box)
        found = labels_of_means([member], [(0,)], ras_shape, label_map, watch if watched else None)[0]
    chosen = (whole > 0.5) if sigmoid else whole.argmax(0, keepdim=True)
    wanted = np.zeros(ras_shape, np.uint16)
    wanted[box] = label_map.decode(chosen.to(torch.uint8).numpy())
    assert found.dtype == np.uint16
    # Rounding may turn a tie, nothing else.
    top = whole.topk(2, dim=0).values if not sigmoid else torch.stack([whole, torch.full_like(whole, 0.5)])
    near = ((top[0] - top[1]).abs() < 1e-5) if not sigmoid else ((whole - 0.5).abs() < 1e-5).any(0)
    assert (found == wanted)[box][~near.numpy()].all()
    outside = np.ones(ras_shape, bool)
    outside[box] = False
    assert not found[outside].any()
    if watched:
        torch.testing.assert_close(seen[(slice(None), *box)], whole, atol=1e-5, rtol=0)


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
        logits = 3 * torch.randn(label_map.num_outputs, *grid, generator=rng)
        probs = logits.sigmoid() if sigmoid else logits.softmax(0)
        members.append((probs, box, num))
        size = [s.stop - s.start for s in box]
        whole = torch.zeros_like(total)
        if not sigmoid:
            whole[0] = 1
        whole[(slice(None), *box)] = F.interpolate(probs[None], size=size, mode="trilinear", align_corners=False)[0]
        total += num * whole
    mean = total / sum(nums)
    chosen = mean > 0.5 if sigmoid else mean.argmax(0, keepdim=True)
    wanted = label_map.decode(chosen.to(torch.uint8).numpy())

    def labels(subsets, chosen=(0, 1, 2)) -> list[np.ndarray]:
        made = [Member(rows=TensorRows(p, 2), box=b, num_models=n) for p, b, n in (members[i] for i in chosen)]
        return labels_of_means(made, subsets, shape, label_map)

    both = labels([(1,), (0, 1, 2)])
    assert (both[1] != wanted).mean() < 1e-3
    assert len(np.unique(wanted)) == 3
    np.testing.assert_array_equal(both[0], labels([(0,)], (1,))[0])


def test_the_slabs_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restore, "SLAB_VALUES", 3 * 10 * 10 * 4)
    rows = TensorRows(torch.rand(3, 10, 10, 50), 2)
    member = Member(rows=rows, box=(slice(0, 20), slice(0, 20), slice(0, 100)))
    places = [place[2] for place, _ in labelled_slabs([member], [(0,)], TWO)]
    assert [p.start for p in places] == list(range(0, 100, 8))
    assert rows.largest <= 3 * 10 * 10 * (4 + 2)  # and one row on either side


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


def whole_probs(member: Member, shape) -> torch.Tensor:
    """A member's probabilities (K, X, Y, Z) at once, on the image's grid."""
    rows = member.rows
    probs = rows.rows(0, rows.shape[rows.axis]).movedim(0, rows.axis + 1)
    return F.interpolate(probs[None], size=shape, mode="trilinear", align_corners=False)[0]


def test_the_mean_of_models_with_different_spacings(tmp_path: Path, volume: Volume) -> None:
    spacings = [(1.2, 1.2, 1.6), (1.0, 1.0, 1.0), (1.2, 1.2, 1.6)]
    jobs = [make_job(tmp_path, "segresnet", i, seed=i, resample_resolution=s) for i, s in enumerate(spacings)]
    predictor = Predictor(jobs, device="cpu")
    labels = predictor.predict_labels(volume)
    size = volume.array.shape[1:]
    # The two of one spacing are one member: the mean of their logits, which counts twice.
    members = predictor.grouped(MemoryImage(volume))
    assert [member.num_models for member in members] == [2, 1]
    wanted = sum(m.num_models * whole_probs(m, size) for m in members).argmax(0).numpy()
    assert labels.shape == size
    assert len(np.unique(labels)) > 1
    assert (labels != wanted).mean() < 1e-3
    assert [p.num_models for p in predictor.grouped(MemoryImage(volume))] == [2, 1]


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
    here = whole_probs(predictor.each(MemoryImage(volume))[0], volume.array.shape[1:])
    flipped = Volume(array=np.ascontiguousarray(volume.array[:, ::-1]), grid=volume.grid)
    there = whole_probs(predictor.each(MemoryImage(flipped))[0], volume.array.shape[1:]).flip(1)[[0, 2, 1]]
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
