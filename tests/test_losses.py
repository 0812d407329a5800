import numpy as np
import pytest
import torch
from monai.losses import DiceCELoss, DiceFocalLoss

from autoseg.algos.losses import segmentation_loss, supervised_loss


def _random(sigmoid: bool) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 3, 6, 5, 4, generator=generator)
    high, channels = (2, 3) if sigmoid else (3, 1)
    target = torch.randint(0, high, (2, channels, 6, 5, 4), generator=generator).to(torch.uint8)
    return logits, target


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
