"""One contract for every algorithm: whoever adds one adds a name to ALGOS and nothing here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from plans import GPU, make_fingerprint, plan_and_origins, tiny_plan

from autoseg.config.networks import ALGOS, AlgoName
from autoseg.data.phantoms import ellipsoid
from autoseg.networks import build_network, divisor, is_encoder, network_file
from autoseg.training.losses import supervised_loss

pytestmark = pytest.mark.parametrize("algo", ALGOS)


def _phantom(roi: tuple[int, int, int], channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(0)
    ball = ellipsoid(roi, [s / 2 for s in roi], [s / 4 for s in roi])
    image = rng.normal(size=(1, channels, *roi)) * 0.3 + 2.0 * ball
    return torch.from_numpy(image.astype(np.float32)), torch.from_numpy(ball.astype(np.uint8))[None, None]


@pytest.mark.parametrize("channels", [1, 4])
def test_builds_and_puts_out_one_map_per_class(algo: AlgoName, channels: int) -> None:
    plan = plan_and_origins(algo, fingerprint=make_fingerprint(num_channels=channels))[0]
    torch.manual_seed(0)
    network = build_network(plan)
    assert all(r % d == 0 for r, d in zip(plan.roi_size, divisor(plan), strict=True))
    image, _ = _phantom(plan.roi_size, channels)
    outputs = network.train()(image)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    assert outputs[0].shape == (1, 3, *plan.roi_size)
    sizes = [o.shape[2] for o in outputs]
    assert sizes == sorted(sizes, reverse=True)
    assert network.eval()(image).shape == (1, 3, *plan.roi_size)


def test_smallest_window_works(algo: AlgoName) -> None:
    """Images far smaller than a patch still give a window the network takes, in training and after it."""
    small = make_fingerprint(**{f"size_mm_{k}": (9.0, 10.0, 8.0) for k in ("median", "p90")})
    plan = plan_and_origins(algo, fingerprint=small)[0]
    image, target = _phantom(plan.roi_size, 1)
    network = build_network(plan).train()
    supervised_loss(network(image), target, sigmoid=False, loss=plan.loss).backward()


def test_anisotropic_data_give_a_valid_network(algo: AlgoName) -> None:
    thick = make_fingerprint(
        **{f"spacing_mm_{k}": (0.8, 0.8, 5.0) for k in ("min", "p10", "median", "max")},
        **{f"size_mm_{k}": (38.4, 38.4, 80.0) for k in ("median", "p90")},
    )
    plan = plan_and_origins(algo, fingerprint=thick)[0]
    assert plan.resample_resolution == (0.8, 0.8, 5.0)
    image, _ = _phantom(plan.roi_size, 1)
    assert build_network(plan).eval()(image).shape == (1, 3, *plan.roi_size)


def test_the_encoder_is_told_by_names_and_the_sizes_by_shapes(algo: AlgoName) -> None:
    """What weights from elsewhere are matched by, and what a plan takes over from them."""
    plan = plan_and_origins(algo)[0]
    network = build_network(plan)
    names = dict(network.named_parameters())
    inside = {name for name in names if is_encoder(algo)(name)}
    assert 0.05 < sum(names[n].numel() for n in inside) / sum(p.numel() for p in names.values()) < 1
    of_heads = {id(parameter) for head in network_file(algo).heads(network) for parameter in head.parameters()}
    assert not {id(names[name]) for name in inside} & of_heads
    read = network_file(algo).read_shapes({name: tuple(t.shape) for name, t in network.state_dict().items()})
    assert read == {key: plan.network[key] for key in read}
    assert read or algo == "dints"
    assert network_file(algo).read_shapes({"another.weight": (2, 2)}) == {}


def test_loss_falls(algo: AlgoName) -> None:
    plan = tiny_plan(algo)
    torch.manual_seed(0)
    network = build_network(plan).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=plan.learning_rate)
    image, target = _phantom(plan.roi_size, 1)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = supervised_loss(network(image), target, sigmoid=False, loss=plan.loss)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_same_seed_same_network(algo: AlgoName) -> None:
    plan = tiny_plan(algo)
    weights = []
    for _ in range(2):
        torch.manual_seed(plan.seed)
        weights.append(build_network(plan).state_dict())
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_exports_as_a_graph_that_computes_the_same(algo: AlgoName) -> None:
    """What ONNX and TensorRT are made from: nothing in it depends on what a tensor holds."""
    plan = tiny_plan(algo)
    torch.manual_seed(0)
    network = build_network(plan).eval()
    image, _ = _phantom(plan.roi_size, 1)
    with torch.no_grad():
        graph = torch.export.export(network, (image,), strict=False).module()
        torch.testing.assert_close(graph(image), network(image))


def test_gpu_plan_follows_the_published_sizes(algo: AlgoName) -> None:
    body = make_fingerprint(
        **{f"spacing_mm_{k}": (0.8, 0.8, 1.5) for k in ("min", "p10", "median", "max")},
        **{f"size_mm_{k}": (400.0, 400.0, 450.0) for k in ("median", "p90")},
    )
    plan = plan_and_origins(algo, hardware=GPU, fingerprint=body, modality="CT", num_train=160)[0]
    voxels = int(np.prod(plan.roi_size))
    if algo == "unet":
        assert plan.network["features"] == [16, 32, 64, 128, 256]  # MONAI's spleen bundle
        assert 64**3 < voxels <= 96**3
    elif algo == "segresnet":
        assert plan.network["init_filters"] == 32
        assert plan.network["blocks_down"] == [1, 2, 2, 4, 4]
        assert 3.5e6 < voxels <= 4.2e6
    elif algo == "unetr":
        assert plan.network["hidden_size"] == 768  # the paper's
        assert plan.network["image_size"] == list(plan.roi_size)
        assert 64**3 < voxels <= 96**3
    elif algo == "resenc":
        assert plan.network["init_features"] == 32
        assert plan.network["blocks"] == [1, 3, 4, 6, 6, 6]
        assert 3.5e6 < voxels <= 4.2e6
    else:
        assert voxels <= 96**3
        assert min(plan.roi_size) >= 64
        assert plan.batch_size > 2
    assert plan.channels[0].mode == "ct"
    assert plan.channels[0].bounds == (5.0, 95.0)
    assert plan.num_epochs == 80_000 / 160
    assert plan.num_steps_per_epoch == int(np.ceil(160 / plan.batch_size))
