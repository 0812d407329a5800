import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.losses import DiceCELoss, DiceFocalLoss
from torch.profiler import ProfilerActivity, profile

from autoseg.training import losses
from autoseg.training.losses import segmentation_loss, supervised_loss


def _random(sigmoid: bool) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 3, 6, 5, 4, generator=generator)
    high, channels = (2, 3) if sigmoid else (3, 1)
    target = torch.randint(0, high, (2, channels, 6, 5, 4), generator=generator).to(torch.uint8)
    return logits, target


@pytest.mark.parametrize("num_classes", [13, 104])
def test_a_gpu_is_given_larger_pieces(num_classes: int) -> None:
    """Each is 80 operations to start; of many outputs a piece is as large as it may be for memory."""
    numbers = []
    for device in ("cpu", "meta"):
        target = torch.zeros((2, 1, 128**3), dtype=torch.uint8, device=device)
        weights = torch.ones(num_classes, device=device)
        given = losses._Given(
            target=target, sigmoid=False, focal=False, unannotated=None, filled=None, class_weights=weights
        )
        numbers.append(len([*given.pieces()]))
    assert numbers == [32, 8 if num_classes == 13 else 32]


def test_softmax_equals_monai_dice_ce() -> None:
    logits, target = _random(sigmoid=False)
    oracle = DiceCELoss(include_background=False, softmax=True, to_onehot_y=True, smooth_nr=1e-5, smooth_dr=1e-5)
    # MONAI leaves the background out of its cross-entropy too; ours keeps it, as nnU-Net does.
    dice = oracle.dice(logits, target)
    ce = torch.nn.functional.cross_entropy(logits, target[:, 0].long())
    ours = segmentation_loss(logits, target, sigmoid=False, loss="dice_ce")
    torch.testing.assert_close(ours, dice + ce)


def test_sigmoid_equals_monai_dice_bce() -> None:
    logits, target = _random(sigmoid=True)
    oracle = DiceCELoss(sigmoid=True, smooth_nr=1e-5, smooth_dr=1e-5)
    dice = oracle.dice(logits, target.float())
    ce = torch.nn.functional.binary_cross_entropy_with_logits(logits, target.float())
    torch.testing.assert_close(segmentation_loss(logits, target, sigmoid=True, loss="dice_ce"), dice + ce)


def test_focal_equals_monai_sigmoid_focal() -> None:
    logits, target = _random(sigmoid=True)
    oracle = DiceFocalLoss(sigmoid=True, gamma=2.0, smooth_nr=1e-5, smooth_dr=1e-5)
    expected = oracle(logits, target.float())
    torch.testing.assert_close(segmentation_loss(logits, target, sigmoid=True, loss="dice_focal"), expected)


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("loss", ["dice_ce", "dice_focal"])
def test_ignored_voxels_change_neither_loss_nor_gradient(sigmoid: bool, loss: str) -> None:
    logits, target = _random(sigmoid)
    target[..., :2] = 255
    changed = logits.clone()
    changed[..., :2] = 17.0
    values, gradients = [], []
    for x in (logits, changed):
        x = x.clone().requires_grad_()
        value = segmentation_loss(x, target, sigmoid=sigmoid, loss=loss)  # type: ignore[arg-type]
        value.backward()
        assert x.grad is not None
        values.append(value.detach())
        gradients.append(x.grad)
    torch.testing.assert_close(values[0], values[1])
    assert gradients[0][..., :2].abs().max() == 0
    torch.testing.assert_close(gradients[0][..., 2:], gradients[1][..., 2:])


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("loss", ["dice_ce", "dice_focal"])
def test_voxels_count_by_their_weight(sigmoid: bool, loss: str) -> None:
    logits, target = _random(sigmoid)
    plain = segmentation_loss(logits, target, sigmoid=sigmoid, loss=loss)
    even = torch.full_like(target[:, :1], 100)
    torch.testing.assert_close(
        segmentation_loss(logits, torch.cat([target, even], 1), sigmoid=sigmoid, loss=loss), plain
    )
    none = even.clone()
    none[:, :, :3] = 0
    ignored = target.clone()
    ignored[:, :, :3] = 255
    torch.testing.assert_close(
        segmentation_loss(logits, torch.cat([target, none], 1), sigmoid=sigmoid, loss=loss),
        segmentation_loss(logits, ignored, sigmoid=sigmoid, loss=loss),
    )


def test_the_loss_of_a_weighted_voxel_in_closed_form() -> None:
    logits = torch.tensor([[0.0, 2.0], [1.0, -1.0]]).reshape(1, 2, 2, 1, 1)  # (B, C, X, Y, Z)
    target = torch.tensor([[1, 0], [100, 25]], dtype=torch.uint8).reshape(1, 2, 2, 1, 1)
    ce = torch.log1p(torch.exp(torch.tensor([-1.0, -3.0])))
    p = torch.sigmoid(torch.tensor([1.0, -3.0]))
    dice = 1 - (2 * p[0] + 1e-5) / (p[0] + 0.25 * p[1] + 1 + 1e-5)
    wanted = dice + (ce[0] + 0.25 * ce[1]) / 1.25
    torch.testing.assert_close(segmentation_loss(logits, target, sigmoid=False, loss="dice_ce"), wanted)


def test_all_ignored_is_finite() -> None:
    logits, target = _random(sigmoid=False)
    value = segmentation_loss(logits, torch.full_like(target, 255), sigmoid=False, loss="dice_ce")
    assert torch.isfinite(value)


def test_deep_supervision_weights_sum_to_one() -> None:
    target = torch.zeros(1, 1, 8, 8, 8, dtype=torch.uint8)
    target[..., :4] = 1
    fine = torch.randn(1, 2, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    single = supervised_loss(fine, target, sigmoid=False, loss="dice_ce")
    assert supervised_loss([fine], target, sigmoid=False, loss="dice_ce") == single
    coarse = torch.randn(1, 2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    small = target[..., ::2, ::2, ::2]
    expected = (2 * single + supervised_loss(coarse, small, sigmoid=False, loss="dice_ce")) / 3
    both = supervised_loss([fine, coarse], target, sigmoid=False, loss="dice_ce")
    np.testing.assert_allclose(float(both), float(expected), rtol=1e-5)


# -- samples annotated for some classes only

SHAPE = (3, 3, 2)


def _draw(seed: int, num_classes: int, sigmoid: bool, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of some spread and a target with some ignored and some unsure voxels."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (batch, num_classes + (not sigmoid), *SHAPE))
    target = rng.integers(0, 2 if sigmoid else num_classes + 1, (batch, num_classes if sigmoid else 1, *SHAPE))
    target[rng.random(target.shape) < 0.1] = 255
    target[:, :, rng.random(SHAPE) < 0.2] = 254
    return torch.from_numpy(logits), torch.from_numpy(target.astype(np.uint8))


def _reference(
    logits: torch.Tensor,
    target: torch.Tensor,
    unannotated: np.ndarray,
    filled: np.ndarray,
    weights: np.ndarray,
    sigmoid: bool,
    focal: bool,
) -> torch.Tensor:
    """The definition, voxel by voxel in float64: probabilities are added, then everything is as ever."""
    num_classes = len(weights)
    ce, counted, dice = torch.zeros((), dtype=torch.float64), 0.0, torch.zeros((), dtype=torch.float64)
    for b in range(len(logits)):
        z, t = logits[b].flatten(1), target[b].flatten(1)
        known = [k for k in range(num_classes) if not unannotated[b, k]]
        probs = z.sigmoid() if sigmoid else z.exp() / z.exp().sum(0)
        if not sigmoid:
            unsure, background = t[0] == 254, probs[0]
            for k in range(num_classes):
                merged = torch.ones_like(unsure) if unannotated[b, k] else unsure & bool(filled[b, k])
                background = background + probs[k + 1] * merged
                probs = torch.cat([probs[: k + 1], (probs[k + 1] * ~merged)[None], probs[k + 2 :]])
        for k in range(num_classes):
            row = t[k] if sigmoid else t[0]
            valid = (row != 255).double()
            if sigmoid and filled[b, k]:
                valid = valid * (row != 254)
            truth = (row == (1 if sigmoid else k + 1)).double() * valid
            p = probs[k if sigmoid else k + 1]
            if sigmoid:
                counted += float(valid.sum()) * weights[k]
            if k not in known:
                continue
            size = (p * valid).sum() + truth.sum()
            dice = dice + weights[k] * (1 - (2 * (p * valid * truth).sum() + 1e-5) / (size + 1e-5))
            right = torch.where(truth == 1, p, 1 - p) if sigmoid else p
            voxels = valid if sigmoid else truth
            logs = torch.where(voxels == 1, right, torch.ones_like(right)).log()
            ce = ce - weights[k] * (voxels * ((1 - right) ** 2 if focal else 1.0) * logs).sum()
            if not sigmoid:
                counted += float(truth.sum()) * weights[k]
        if not sigmoid:
            rest = (t[0] != 255) & ~torch.isin(t[0], torch.tensor([k + 1 for k in known], dtype=torch.uint8))
            ce = ce - (rest * ((1 - background) ** 2 if focal else 1.0) * background.log()).sum()
            counted += float(rest.sum())
    return dice / (len(logits) * weights.sum()) + ce / max(counted, 1.0) + 0 * logits.sum()


@given(
    seed=st.integers(0, 10_000),
    num_classes=st.integers(1, 4),
    sigmoid=st.booleans(),
    focal=st.booleans(),
    weighted=st.booleans(),
    data=st.data(),
)
@settings(max_examples=120)
def test_value_and_gradient_are_those_of_the_definition(
    seed: int, num_classes: int, sigmoid: bool, focal: bool, weighted: bool, data: st.DataObject
) -> None:
    logits, target = _draw(seed, num_classes, sigmoid)
    flags = data.draw(st.lists(st.booleans(), min_size=2 * num_classes, max_size=2 * num_classes))
    unannotated = np.array(flags).reshape(2, num_classes)
    flags = data.draw(st.lists(st.booleans(), min_size=2 * num_classes, max_size=2 * num_classes))
    filled = np.array(flags).reshape(2, num_classes)
    weights = np.linspace(1, 10, num_classes) if weighted else np.ones(num_classes)
    exact = logits.clone().requires_grad_()
    expected = _reference(exact, target, unannotated, filled, weights, sigmoid, focal)
    expected.backward()
    ours = logits.float().requires_grad_()
    value = segmentation_loss(
        ours,
        target,
        sigmoid=sigmoid,
        loss="dice_focal" if focal else "dice_ce",
        unannotated=torch.from_numpy(unannotated),
        filled=torch.from_numpy(filled),
        class_weights=torch.from_numpy(weights).float(),
    )
    value.backward()
    assert exact.grad is not None
    assert ours.grad is not None
    np.testing.assert_allclose(float(value.detach()), float(expected.detach()), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(ours.grad.double().numpy(), exact.grad.numpy(), rtol=2e-3, atol=2e-6)


@given(
    seed=st.integers(0, 10_000),
    num_classes=st.integers(1, 5),
    sigmoid=st.booleans(),
    focal=st.booleans(),
    data=st.data(),
)
@settings(max_examples=60)
def test_a_fully_annotated_sample_has_the_ordinary_loss(
    seed: int, num_classes: int, sigmoid: bool, focal: bool, data: st.DataObject
) -> None:
    """Beside a partially annotated one as alone: it has its half of the batch's loss and gradient, as ever."""
    logits, target = _draw(seed, num_classes, sigmoid)
    # As many voxels of either sample count, so that each has half of the mean.
    target[1] = torch.where(target[0] == 255, target[0], target[1].masked_fill(target[1] == 255, 0))
    loss: Any = "dice_focal" if focal else "dice_ce"
    missing = data.draw(st.lists(st.booleans(), min_size=num_classes, max_size=num_classes))
    hidden = torch.tensor([[False] * num_classes, missing])
    batch, alone, other = (x.float().requires_grad_() for x in (logits, logits[:1], logits[1:]))
    value = segmentation_loss(batch, target, sigmoid=sigmoid, loss=loss, unannotated=hidden)
    value.backward()
    ordinary = segmentation_loss(alone, target[:1], sigmoid=sigmoid, loss=loss)
    ordinary.backward()
    partial = segmentation_loss(other, target[1:], sigmoid=sigmoid, loss=loss, unannotated=hidden[1:])
    assert batch.grad is not None
    assert alone.grad is not None
    torch.testing.assert_close(2 * value, ordinary + partial, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(2 * batch.grad[:1], alone.grad, rtol=1e-3, atol=1e-6)


def test_unannotated_classes_share_the_background_freely() -> None:
    """Where nothing is annotated but class 1, it makes no difference which of the others a voxel is given to."""
    target = torch.zeros((1, 1, 2, 2, 2), dtype=torch.uint8)
    target[0, 0, 0] = 1
    hidden = torch.tensor([[False, True, True]])
    values = []
    for favoured in (0, 2, 3):
        logits = torch.zeros((1, 4, 2, 2, 2))
        logits[:, favoured, 1] = 9.0
        logits[:, 1, 0] = 9.0
        values.append(segmentation_loss(logits, target, sigmoid=False, loss="dice_ce", unannotated=hidden))
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(values[0], values[2])
    ordinary = segmentation_loss(logits, target, sigmoid=False, loss="dice_ce")
    assert ordinary > values[0] + 1


@pytest.mark.parametrize("sigmoid", [False, True])
def test_an_unsure_voxel_speaks_of_what_annotators_drew_alone(sigmoid: bool) -> None:
    """Class 1 was drawn, 2 filled in: at an unsure voxel 2 and background are as good as each other, 1 is wrong."""
    target = torch.full((1, 2 if sigmoid else 1, 2, 2, 2), 254, dtype=torch.uint8)
    filled = torch.tensor([[False, True]])
    losses = []
    for favoured in (0, 1, 2):
        logits = torch.zeros((1, 3, 2, 2, 2))
        logits[:, favoured] = 9.0
        logits = logits[:, 1:] - 4.5 if sigmoid else logits
        losses.append(segmentation_loss(logits, target, sigmoid=sigmoid, loss="dice_ce", filled=filled).item())
    background, drawn, guessed = losses
    assert abs(background - guessed) < 1e-4
    assert drawn > background + 2
    # An unlabeled case was drawn nothing in: its unsure voxels say nothing.
    every = torch.tensor([[True, True]])
    logits = torch.randn(1, 2 if sigmoid else 3, 2, 2, 2, requires_grad=True)
    segmentation_loss(logits, target, sigmoid=sigmoid, loss="dice_ce", filled=every).backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-6


def test_a_batch_may_mix_label_sets() -> None:
    """A sample's gradient is the same whatever the others of the batch are annotated for."""
    logits, target = _draw(3, 3, False)
    gradients = []
    for other in ([False] * 3, [True, False, True]):
        x = logits.float().requires_grad_()
        hidden = torch.tensor([[False, True, False], other])
        segmentation_loss(x, target, sigmoid=False, loss="dice_ce", unannotated=hidden).backward()
        assert x.grad is not None
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[0][0], gradients[1][0])
    assert not torch.allclose(gradients[0][1], gradients[1][1])


def test_deep_supervision_passes_the_annotation_on() -> None:
    target = torch.zeros(1, 1, 8, 8, 8, dtype=torch.uint8)
    hidden = torch.tensor([[True]])
    logits = [torch.randn(1, 2, n, n, n, generator=torch.Generator().manual_seed(n)) for n in (8, 4)]
    value = supervised_loss(logits, target, sigmoid=False, loss="dice_ce", unannotated=hidden)
    assert value == pytest.approx(0.0, abs=1e-6)  # all is background or unannotated: nothing to learn


def _peak_bytes(work: Callable[[], None]) -> int:
    """The most memory of tensors while something runs, by torch's own count, beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        work()
    assert watched.profiler is not None
    events = watched.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(itertools.accumulate(change for _, change in changes))


@pytest.mark.parametrize("partial", [False, True])
def test_the_loss_of_14_outputs_takes_24_bytes_a_voxel_beside_the_gradient(partial: bool) -> None:
    """Left to torch it takes 288, and 404 where samples are partially annotated."""
    logits = torch.randn(2, 14, 64, 64, 64, requires_grad=True)
    target = torch.randint(0, 14, (2, 1, 64, 64, 64), dtype=torch.uint8)
    unannotated = torch.zeros(2, 13, dtype=torch.bool)
    unannotated[1, 3:] = True

    def work() -> None:
        segmentation_loss(
            logits, target, sigmoid=False, loss="dice_ce", unannotated=unannotated if partial else None
        ).backward()

    peak = _peak_bytes(work)
    assert logits.grad is not None
    assert peak - logits.grad.nbytes <= 24 * 2 * 64**3


def test_the_gradient_keeps_precision_and_layout_of_the_logits() -> None:
    logits = torch.randn(2, 5, 6, 7, 8).to(memory_format=torch.channels_last_3d).bfloat16().requires_grad_()
    segmentation_loss(logits, torch.ones(2, 1, 6, 7, 8, dtype=torch.uint8), sigmoid=False, loss="dice_ce").backward()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16
    assert logits.grad.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("sigmoid", [False, True])
def test_pieces_are_one_loss(sigmoid: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target = _random(sigmoid)
    found = []
    for least in (1 << 14, 7):  # voxels: 120 a sample, which 7 does not divide
        monkeypatch.setattr("autoseg.training.losses.LEAST_PIECE", least)
        own = logits.clone().requires_grad_()
        value = segmentation_loss(own, target, sigmoid=sigmoid, loss="dice_focal")
        value.backward()
        found.append((value.detach(), own.grad))
    torch.testing.assert_close(found[0], found[1])
