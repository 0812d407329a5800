"""The search for DiNTS' topology, on a space of two blocks and two depths."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from monai.networks.nets.dints import DiNTS, TopologyInstance, TopologySearch
from plans import plan_and_origins
from test_trainer import CASES, CPU
from torch import nn

from autoseg.algos.generate import edited_values
from autoseg.config.reader import read_model
from autoseg.errors import ResourceError
from autoseg.export.bundle import write_bundle
from autoseg.networks import build_network, dints
from autoseg.networks.dints import path_depths
from autoseg.plan import Plan
from autoseg.training.errors import Diverged
from autoseg.training.search import (
    ARCH_RATE,
    GRID,
    LEAST_FEATURES,
    MOST_FEATURES,
    Search,
    likeliest_paths,
    search_for_job,
    wants_search,
)
from autoseg.workspace.jobs import JobDir


def small_plan(**settings):  # type: ignore[no-untyped-def]
    how = {"channel_mul": 0.125, "search": True, "roi_size": (16, 16, 16)}
    plan, origins = plan_and_origins(
        "dints", dints=how, batch_size=1, num_epochs=4, num_steps_per_epoch=5, precision="fp32", **settings
    )
    network = {**plan.network, "paths": [[1, 1, 1, 1]] * 2, "operations": [[1] * 4] * 2, "nodes": [[1, 1]] * 3}
    return plan.model_copy(update={"network": network}), origins


def test_a_fixed_topology_computes_what_monais_does() -> None:
    network = {**small_plan()[0].network, "paths": [[1, 0, 1, 1], [0, 1, 0, 1]], "nodes": [[1, 1], [1, 1], [1, 1]]}
    codes = [np.array(network[key], np.int64) for key in ("paths", "operations")]
    space = TopologyInstance(
        codes, network["channel_mul"], num_blocks=2, num_depths=2, use_downsample=network["use_downsample"]
    )
    nodes = np.array(network["nodes"])
    theirs = DiNTS(space, 1, 3, use_downsample=network["use_downsample"], node_a=nodes).eval()
    ours = dints.build(1, 3, network).eval()
    ours.load_state_dict(theirs.state_dict())
    image = torch.rand(1, 1, 16, 16, 16)
    with torch.no_grad():
        assert torch.equal(ours(image), theirs(image))


def test_architecture_moves_after_the_warm_up_alone() -> None:
    plan, _ = small_plan()
    search = Search(plan, CASES[:4], CPU, seconds=None, steps=8)
    before = search.space.log_alpha_c.detach().clone()
    for _ in range(4):
        search._train_step()
    assert torch.equal(before, search.space.log_alpha_c)
    for _ in range(4):
        search._train_step()
    assert not torch.equal(before, search.space.log_alpha_c)
    assert search.architecture.param_groups[0]["lr"] > ARCH_RATE  # few steps: each goes further
    assert search.share == 1.0


def test_the_likeliest_paths_and_operations_are_read_off() -> None:
    plan, _ = small_plan()
    start = {"paths": [[1, 0, 0, 0]] * 2, "operations": [[3] * 4] * 2}
    plan = plan.model_copy(update={"network": {**plan.network, **start}})
    search = Search(plan, CASES[:4], CPU, seconds=None, steps=8)
    found = search.decode()  # nothing was learnt yet
    assert found.paths == [[1, 0, 0, 0]] * 2
    assert found.nodes == [[1, 0]] * 3
    assert [block[0] for block in found.operations] == [3, 3]
    assert "2 paths, 2 of the 2 it started from, 1.00 of their features" in found.origin
    with torch.no_grad():  # paths: top to top, bottom to top, top to bottom, bottom to bottom
        search.space.log_alpha_a.copy_(torch.tensor([[-4.0, -4.0, 4.0, -4.0], [-4.0, 4.0, -4.0, -4.0]]))
        search.space.log_alpha_c[:, :, 4] = 5.0
    found = search.decode()  # down once and up again costs 1.4 of it
    assert found.paths != [[0, 0, 1, 0], [0, 1, 0, 0]]
    search.space.ram_cost[:, 1:3] = 7.0  # 8 up and 8 / 4 down, as much as 5 and 5 at the top
    found = search.decode()
    assert found.paths == [[0, 0, 1, 0], [0, 1, 0, 0]]
    assert found.nodes == [[1, 0], [0, 1], [1, 0]]
    assert found.operations == [[4] * 4] * 2


def fits(paths: np.ndarray) -> bool:
    """Whether each block's paths come from exactly the depths into which those of the block before go."""
    out_of, into = (np.array(depths) for depths in path_depths((paths.shape[1] + 2) // 3))
    taken = paths.astype(bool)
    return all(set(into[a]) == set(out_of[b]) for a, b in itertools.pairwise(taken)) and bool(taken.any(1).all())


@given(arrays(np.float64, (3, 4), elements=st.floats(-4, 4)), st.integers(0, 90), st.integers(0, 50))
def test_no_paths_that_fit_are_likelier(odds: np.ndarray, least: int, more: int) -> None:
    """All 15^3 sets of paths of three blocks and two depths are tried; features here are whole steps of the grid."""
    features = np.array([[30, 45, 15, 10]] * 3) * GRID
    lowest, highest = 3 * least * GRID, 3 * (least + more) * GRID
    paths = likeliest_paths(odds, features, lowest, highest)
    assert fits(paths)
    sums = [(every * features).sum() for every in FITTING]
    allowed = [every for every, found in zip(FITTING, sums, strict=True) if lowest - 1e-9 <= found <= highest + 1e-9]
    if allowed:
        assert (paths * odds).sum() == pytest.approx(max((every * odds).sum() for every in allowed))
        assert lowest - 1e-9 <= (paths * features).sum() <= highest + 1e-9
    else:
        nearest = min(abs(found - highest) for found in sums)
        assert abs((paths * features).sum() - highest) == pytest.approx(nearest)


BLOCKS = [block for block in itertools.product((0, 1), repeat=4) if any(block)]
FITTING = [paths for paths in map(np.array, itertools.product(BLOCKS, repeat=3)) if fits(paths)]


@pytest.mark.parametrize("seed", range(3))
def test_paths_are_those_of_monai_where_any_number_of_features_will_do(seed: int) -> None:
    torch.manual_seed(seed)
    space = TopologySearch(channel_mul=0.125, num_blocks=4, num_depths=3, use_downsample=False, device="cpu")
    with torch.no_grad():
        space.log_alpha_a.normal_(0, 0.7)
    _, theirs, *_ = space.decode()
    odds = space.log_alpha_a.detach().numpy()
    assert np.array_equal(likeliest_paths(odds, np.full_like(odds, GRID), 0.0, 1.0), theirs)


@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])  # odds that are near even still, and sharp ones
def test_what_is_read_off_has_as_many_features_as_the_plan(spread: float) -> None:
    """As MONAI counts features."""
    plan, _ = plan_and_origins("dints", dints={"search": True, "channel_mul": 0.125}, precision="fp32")
    search = Search(plan, CASES[:4], CPU, seconds=None, steps=8)
    space = search.space
    torch.manual_seed(1)
    with torch.no_grad():
        space.log_alpha_a.normal_(0, spread)
        space.log_alpha_c.normal_(0, 1)
    found = search.decode()
    features = []
    for paths, operations in ((found.paths, found.operations), (plan.network["paths"], plan.network["operations"])):
        with torch.no_grad():
            space.log_alpha_a.copy_(100.0 * (torch.tensor(paths) - 0.5))
            space.log_alpha_c.copy_(100.0 * F.one_hot(torch.tensor(operations), 5))
            features.append(float(space.get_ram_cost_usage((1, 1, 16, 16, 16))))
    assert LEAST_FEATURES - 0.03 < features[0] / features[1] <= MOST_FEATURES + 1e-6
    assert f"{features[0] / features[1]:.2f} of their features" in found.origin
    assert fits(np.array(found.paths))


def test_a_search_that_was_stopped_goes_on_to_the_same_topology(tmp_path: Path) -> None:
    plan, _ = small_plan()
    whole = Search(plan, CASES[:4], CPU, seconds=None, steps=6)
    whole.run()
    for begin, end in ((0, 4), (4, 6)):
        search = Search(plan, CASES[:4], CPU, seconds=None, steps=6, checkpoint=tmp_path / "search.pt")
        search._resume()
        assert search.step == begin
        while search.step < end:
            search._train_step()
        search._save()
    assert torch.equal(search.space.log_alpha_a, whole.space.log_alpha_a)
    assert search.decode().paths == whole.decode().paths


def test_a_lack_of_memory_is_met_by_smaller_patches_and_stays_met(tmp_path: Path) -> None:
    """All networks at once take many times what the batch was planned for."""
    plan, _ = small_plan()
    search = Search(plan, CASES[:4], CPU, seconds=None, steps=6, checkpoint=tmp_path / "search.pt")
    search.batch = 2
    forward, limit = search.network.forward, 14 * 16 * 16

    def limited(image):  # type: ignore[no-untyped-def]
        if image.numel() > limit:
            raise torch.OutOfMemoryError("no memory")
        return forward(image)

    search.network.forward = limited  # type: ignore[method-assign]
    search._train_step()
    assert (search.step, search.batch, sorted(search.roi)) == (1, 1, [14, 16, 16])
    search._save()
    again = Search(plan, CASES[:4], CPU, seconds=None, steps=6, checkpoint=tmp_path / "search.pt")
    again._resume()
    assert (again.batch, again.roi) == (1, search.roi)
    limit = 0
    with pytest.raises(ResourceError, match="out of memory in the search with one patch of 2x2x4"):
        search._train_step()


def test_a_search_whose_loss_is_no_number_has_diverged() -> None:
    plan, _ = small_plan()
    search = Search(plan, CASES[:4], CPU, seconds=None, steps=6)
    with torch.no_grad():
        next(search.network.parameters()).fill_(math.nan)
    with pytest.raises(Diverged, match="dints_0: the loss of the search became nan in step 0"):
        search._train_step()


def test_thin_images_are_searched_in_fp32_where_the_rest_is_bf16() -> None:
    """There bf16 kernels of CPUs are wrong; see `repair_bf16`."""
    plan = small_plan()[0].model_copy(update={"precision": "bf16"})
    search = Search(plan, CASES[:4], CPU, seconds=None, steps=6)
    layer = next(m for m in search.network.modules() if isinstance(m, nn.Conv3d) and m.kernel_size == (3, 3, 3))
    with torch.autocast("cpu", torch.bfloat16):
        found = [layer(torch.randn(1, layer.in_channels, edge, 6, 6)).dtype for edge in (2, 6)]
    assert found == [torch.float32, torch.bfloat16]


def test_the_search_weighs_classes_as_the_training_does() -> None:
    plan, _ = small_plan(class_weights={"box": 5.0})
    assert Search(plan, CASES[:4], CPU, seconds=None, steps=6).class_weights.tolist() == [1.0, 5.0]


def test_a_found_topology_stands_in_the_bundle_and_is_trained(tmp_path: Path) -> None:
    plan, origins = small_plan()
    paths = JobDir(tmp_path / "dints_0")
    write_bundle(plan, origins, plan.model_dump(mode="json"), paths)
    assert wants_search(plan, paths)
    search_for_job(plan, CASES[:4], paths, CPU)
    found = json.loads((paths.root / "configs" / "topology.json").read_text())
    assert "found by a differentiable search of 6 steps" in found["origin"]
    new = read_model(paths.plan, Plan)
    assert new.network["paths"] == found["paths"]
    assert not wants_search(new, paths)
    for key in ("paths", "operations"):  # planned anew, with the template's topology
        planned = new.model_copy(update={"network": {**new.network, key: [[2] * 4] * 2}})
        assert wants_search(planned, paths)
    assert edited_values(paths) == {}  # nobody took it for an edit by hand
    assert yaml.safe_load(paths.origins.read_text())["network.paths"]["origin"] == "search"
    configs = [json.loads((paths.root / "configs" / f"{name}.json").read_text()) for name in ("inference", "train")]
    assert [config["network_def"]["paths"] for config in configs] == [found["paths"]] * 2
    network = build_network(new)
    out = network(torch.randn(1, 1, 16, 16, 16))
    assert out.shape == (1, 3, 16, 16, 16)
    out.sum().backward()
    assert any(p.grad is not None for p in network.parameters())
    assert not (paths.root / "models" / "search.pt").exists()


@pytest.mark.parametrize("changes", [{"algo": "segresnet"}, {"search": False}])
def test_no_search_where_none_is_wanted(tmp_path: Path, changes: dict[str, object]) -> None:
    plan, _ = small_plan()
    if "algo" in changes:
        plan = plan.model_copy(update={"algo": "segresnet"})
    else:
        plan = plan.model_copy(update={"network": {**plan.network, **changes}})
    assert not wants_search(plan, JobDir(tmp_path))
