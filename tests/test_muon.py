"""Muon against its definition, torch's own and torch's AdamW."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from autoseg.training.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(8, 27), (16, 432), (40, 12), (5, 5)])
def test_directions_stay_and_come_to_the_same_length(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = 100 * torch.randn(shape)
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    found = u.T @ orthogonal(matrix) @ vt.T
    lengths = found.diagonal()
    assert 0.6 < float(lengths.min()) <= float(lengths.max()) < 1.25
    torch.testing.assert_close(found, torch.diag(lengths), atol=2e-3, rtol=0)


def test_a_gradient_of_zeros_gives_no_step() -> None:
    assert torch.equal(orthogonal(torch.zeros(3, 4)), torch.zeros(3, 4))


def test_missing_directions_stay_finite() -> None:
    matrix = torch.outer(torch.randn(16), torch.randn(100))  # rank 1
    lengths = torch.linalg.svdvals(orthogonal(matrix))
    assert 0.6 < float(lengths[0]) < 1.25
    assert float(lengths[1:].max()) < 0.05


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has one from 2.9 on")
def test_steps_are_those_of_torch() -> None:
    """Matrices as torch.optim.Muon's but for its bfloat16, biases as torch.optim.AdamW's."""
    torch.manual_seed(0)
    mine = nn.Linear(12, 8)
    theirs = copy.deepcopy(mine)
    how = {"lr": 0.01, "weight_decay": 0.1}
    ours = Muon(mine, **how)
    muon = torch.optim.Muon([theirs.weight], adjust_lr_fn="match_rms_adamw", **how)
    adamw = torch.optim.AdamW([theirs.bias], **how)
    start = theirs.weight.detach().clone()
    for _ in range(5):
        image, target = torch.randn(20, 12), torch.randn(20, 8)
        for layer, optimizers in ((mine, [ours]), (theirs, [muon, adamw])):
            for optimizer in optimizers:
                optimizer.zero_grad()
            ((layer(image) - target) ** 2).mean().backward()
            for optimizer in optimizers:
                optimizer.step()
    torch.testing.assert_close(mine.bias, theirs.bias, atol=1e-4, rtol=1e-3)
    apart = (mine.weight - theirs.weight).detach().norm() / (theirs.weight.detach() - start).norm()
    assert float(apart) < 0.05


def test_a_convolution_is_a_matrix_of_its_outputs() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(3, 8, 3, bias=False), nn.InstanceNorm3d(8, affine=True), nn.Conv3d(8, 2, 1))
    optimizer = Muon(network, lr=1.0, weight_decay=0.0)
    assert [len(g["params"]) for g in optimizer.param_groups] == [2, 3]
    before = network[0].weight.detach().clone()
    (network(torch.randn(1, 3, 6, 6, 6)) ** 3).sum().backward()
    optimizer.step()
    step = (network[0].weight.detach() - before).flatten(1)
    lengths = torch.linalg.svdvals(step) / (0.2 * 81**0.5)
    assert 0.6 < float(lengths.min()) <= float(lengths.max()) < 1.25
