"""Ten layouts of checkpoints, each fitted to a network: all tensors accounted for, bit-equal where they may be."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets.segresnet import SegResNet
from monai.networks.nets.segresnet_ds import SegResNetDS
from monai.networks.nets.swin_unetr import SwinUNETR
from monai.networks.nets.unet import UNet
from monai.networks.nets.unetr import UNETR as MonaiUNETR
from plans import make_fingerprint, plan_and_origins
from safetensors.torch import save_file
from tiny_jobs import make_job
from torch import nn

from autoseg.algos.draft import Fit
from autoseg.config.networks import AlgoName
from autoseg.errors import ConfigError
from autoseg.networks import build_network, is_encoder, network_file
from autoseg.plan import Plan
from autoseg.version import __version__
from autoseg.weights.start import Start, StartWeights, keep_start
from autoseg.weights.tables import Table
from autoseg.workspace.archive import FORMAT, MANIFEST, Manifest, Part
from autoseg.workspace.jobs import JobDir
from autoseg.workspace.stored import write_stored
from autoseg.workspace.workspace import Workspace

torch.set_num_threads(1)


def kept(folder: Path, algo: AlgoName, source: Path) -> StartWeights:
    start = keep_start(Workspace(folder / "work_dir"), algo, source)
    assert start is not None
    return start


def started(
    folder: Path, algo: AlgoName, source: Path, **settings: Any
) -> tuple[Plan, nn.Module, dict[str, torch.Tensor], Table]:
    """Plan a job that starts from a file, and build its network: plan, network, its random weights, the account.

    Every tensor of the network must be in the account once, and each must hold what the account says.
    """
    start = kept(folder, algo, source)
    plan = plan_and_origins(algo, start=start, **settings)[0]
    torch.manual_seed(1)
    network = build_network(plan)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    table = start.load(network, plan)
    after = network.state_dict()
    of_network = [row for row in table.rows if row.name]
    floats = {name for name, tensor in after.items() if tensor.is_floating_point()}
    assert sorted(row.name for row in of_network) == sorted(floats)
    there = torch.load(start.path, weights_only=True)
    assert sorted(row.theirs for row in table.rows if row.theirs) == sorted(there)
    for row in of_network:
        if row.state == "loaded":
            assert torch.equal(after[row.name], there[row.theirs]), row
        elif row.state == "random":
            assert torch.equal(after[row.name], before[row.name]), row
        else:
            assert row.state == "adapted"
            assert row.note
    assert all(torch.equal(after[name], before[name]) for name in after.keys() - floats)
    came = sum(row.share * after[row.name].numel() for row in of_network)
    assert table.share == pytest.approx(came / sum(after[name].numel() for name in floats))
    return plan, network, before, table


def states(table: Table) -> dict[str, int]:
    return {state: sum(row.state == state for row in table.rows) for state in ("loaded", "adapted", "random", "unused")}


def noisy(module: nn.Module) -> nn.Module:
    """Numbers that no network begins with, so that what is copied is told from what is not."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def saved(path: Path, content: Mapping[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


SMALL_SEGRESNET = {"init_filters": 8, "blocks_down": (1, 2, 2), "norm": "INSTANCE"}


def test_1_auto3dseg_with_a_class_more(tmp_path: Path) -> None:
    """Its configuration names the classes: the old ones keep their rows, a new one gets a random one."""
    theirs = noisy(SegResNetDS(out_channels=3, dsdepth=2, **SMALL_SEGRESNET)).state_dict()
    config = {"class_names": ["box", "sphere"], "resample_resolution": [1.1, 1.1, 1.1]}
    path = saved(tmp_path / "model.pt", {"state_dict": theirs, "config": config, "epoch": 9, "best_metric": 0.8})
    classes = {"sphere": (1,), "rod": (2,), "box": (3,)}
    plan, network, before, table = started(tmp_path, "segresnet", path, classes=classes)
    assert plan.network["init_filters"] == 8
    assert plan.network["blocks_down"] == [1, 2, 2]
    assert plan.resample_resolution == (1.1, 1.1, 1.1)
    assert states(table) == {"loaded": len(theirs) - 4, "adapted": 4, "random": 0, "unused": 0}
    head = network.state_dict()["up_layers.1.head.weight"]
    random = before["up_layers.1.head.weight"]
    there = theirs["up_layers.1.head.weight"]
    assert torch.equal(head, torch.stack([there[0], there[2], random[2], there[1]]))
    row = next(row for row in table.rows if row.name == "up_layers.1.head.weight")
    assert (row.share, row.note) == (0.75, "copied: background, sphere, box; random: rod")
    assert table.encoder_share == 1.0


def test_2_a_bare_state_dict_does_not_name_its_classes(tmp_path: Path) -> None:
    """So its heads stay unused even where they have as many rows."""
    theirs = noisy(SegResNetDS(out_channels=3, dsdepth=2, **SMALL_SEGRESNET)).state_dict()
    _, _, _, table = started(tmp_path, "segresnet", saved(tmp_path / "bare.pth", theirs))
    assert states(table) == {"loaded": len(theirs) - 4, "adapted": 0, "random": 4, "unused": 4}
    assert {row.note for row in table.notable} == {"the file does not say which class each of its outputs is"}


def test_3_suprems_plain_segresnet_by_distributed_training(tmp_path: Path) -> None:
    """MONAI's SegResNet into SegResNetDS: the same encoder, block by block; upsampling as it was."""
    plain = noisy(SegResNet(init_filters=8, blocks_down=(1, 2, 2), blocks_up=(1, 1), out_channels=32)).eval()
    state = {f"module.{name}": tensor for name, tensor in plain.state_dict().items()}
    path = saved(tmp_path / "suprem.pth", {"net": state, "optimizer": {}, "scheduler": {}, "epoch": 800})
    _, network, _, table = started(tmp_path, "segresnet", path)
    rows = {row.theirs: row for row in table.rows}
    assert [name for name, row in rows.items() if row.state == "unused"] == [
        "conv_final.0.weight", "conv_final.0.bias", "conv_final.2.conv.weight", "conv_final.2.conv.bias",
    ]  # fmt: skip
    assert rows["convInit.conv.weight"].name == "encoder.conv_init.weight"
    assert rows["down_layers.2.0.conv.weight"].name == "encoder.layers.1.downsample.weight"
    assert rows["down_layers.1.2.conv2.conv.weight"].name == "encoder.layers.1.blocks.1.conv2.weight"
    assert rows["up_layers.0.0.norm1.bias"].name == "up_layers.0.blocks.0.norm1.bias"
    assert table.encoder_share == 1.0
    # The two networks compute the same features: MONAI's own runs its encoder with the norm that the plan has.
    ours = network.eval()
    same = SegResNet(init_filters=8, blocks_down=(1, 2, 2), blocks_up=(1, 1), out_channels=32,
                     norm=("INSTANCE", {"affine": True})).eval()  # fmt: skip
    same.load_state_dict(plain.state_dict())
    image = torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        _, features = same.encode(image)
        torch.testing.assert_close(ours.get_submodule("encoder")(image), features)
    # A constant is what interpolation and the transposed convolution agree on, away from the border.
    up, deconv = plain.up_samples[0], ours.get_submodule("up_layers.0.upsample")
    flat = torch.randn(1, 32, 1, 1, 1).expand(1, 32, 4, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(deconv(flat)[..., 1:-1, 1:-1, 1:-1], up(flat)[..., 1:-1, 1:-1, 1:-1])


def small_swin(**changes: Any) -> SwinUNETR:
    how: dict[str, Any] = {
        "in_channels": 1,
        "out_channels": 14,
        "feature_size": 12,
        "depths": (1, 1, 1, 1),
        "window_size": 4,
    }
    return SwinUNETR(**{**how, **changes})


def test_4_suprems_swinunetr(tmp_path: Path) -> None:
    """The first version, without the second's convolutions: the plan goes without them, too."""
    theirs = noisy(small_swin()).state_dict()
    state = {f"module.backbone.{name}": tensor for name, tensor in theirs.items()}
    plan, _, _, table = started(tmp_path, "swinunetr", saved(tmp_path / "s.pth", {"net": state}), roi_size=(32, 64, 32))
    assert plan.network == {
        "feature_size": 12, "depths": [1, 1, 1, 1], "num_heads": [3, 6, 12, 24], "window_size": 4, "use_v2": False,
        "norm": "instance",
    }  # fmt: skip
    floats = [name for name, tensor in theirs.items() if tensor.is_floating_point()]
    assert states(table)["loaded"] == len(floats) - 2  # but the head
    assert table.encoder_share == 1.0
    unused = {row.note for row in table.rows if row.state == "unused"}
    assert unused == {"the network has its own", "the file does not say which class each of its outputs is"}


def test_5_a_swin_encoder_alone_with_another_window_and_more_channels(tmp_path: Path) -> None:
    """Self-supervised weights, as MONAI's tutorial keeps them."""
    swin = {
        n.removeprefix("swinViT."): t for n, t in noisy(small_swin()).state_dict().items() if n.startswith("swinViT.")
    }
    state = {"module." + n.replace("linear1", "fc1").replace("linear2", "fc2"): t for n, t in swin.items()}
    path = saved(tmp_path / "ssl.pt", {"state_dict": state, "epoch": 1})
    two = make_fingerprint(num_channels=2)
    how: dict[str, Any] = {"fingerprint": two, "swinunetr": {"window_size": 3}, "roi_size": (32, 64, 32)}
    plan, network, _, table = started(tmp_path, "swinunetr", path, **how)
    assert plan.network["window_size"] == 3
    rows = {row.name: row for row in table.rows if row.name}
    stem = network.state_dict()["swinViT.patch_embed.proj.weight"]
    assert torch.equal(stem, swin["patch_embed.proj.weight"].repeat(1, 2, 1, 1, 1) * 0.5)
    bias = rows["swinViT.layers1.0.blocks.0.attn.relative_position_bias_table"]
    assert (bias.state, bias.note) == ("adapted", "places 7x7x7 to 5x5x5")
    assert all(row.state in ("loaded", "adapted") for name, row in rows.items() if name.startswith("swinViT."))
    assert not any(row.share for name, row in rows.items() if not name.startswith("swinViT."))


def resenc_state(width: int = 8) -> dict[str, torch.Tensor]:
    plan = plan_and_origins("resenc", resenc={"init_features": width})[0]
    return noisy(build_network(plan)).state_dict()


def test_6_nnssl_with_its_adaptation_plan(tmp_path: Path) -> None:
    """Encoder and stem alone, by the names that the plan gives them; the library's second names are left out."""
    state = {}
    for name, tensor in resenc_state().items():
        name = name.replace("encoder.", "backbone_net.encoder.", 1) if name.startswith("encoder.") else name
        state[name] = tensor
        if name.endswith("conv.weight"):
            state[name.replace(".conv.weight", ".all_modules.0.weight")] = tensor
    path = saved(tmp_path / "run" / "fold_all" / "checkpoint_final.pth", {"network_weights": state, "init_args": {}})
    adaptation = {
        "key_to_encoder": "backbone_net.encoder.stages", "key_to_stem": "backbone_net.encoder.stem",
        "keys_to_in_proj": ["backbone_net.encoder.stem.convs.0.conv"], "key_to_lpe": None,
        "pretrain_num_input_channels": 1, "recommended_downstream_patchsize": [160, 160, 160],
    }  # fmt: skip
    (tmp_path / "run" / "adaptation_plan.json").write_text(json.dumps(adaptation))
    plan, _, _, table = started(tmp_path, "resenc", path)
    assert plan.network["init_features"] == 8
    assert table.kind == "nnssl's pretraining"
    assert table.encoder_share == 1.0
    inside = is_encoder("resenc")
    assert all((row.state == "loaded") == inside(row.name) for row in table.rows if row.name)
    notes = {row.note for row in table.rows if row.state == "unused"}
    assert notes == {
        "the same weights under a second name",
        "of no use once the pretraining is over, as its adaptation plan says",
    }
    folder = started(tmp_path / "other", "resenc", tmp_path / "run")[3]
    assert [row.state for row in folder.rows] == [row.state for row in table.rows]
    assert folder.source == "run/fold_all/checkpoint_final.pth"


def test_7_nnunet_by_its_labels(tmp_path: Path) -> None:
    """A trained nnU-Net: its dataset.json is part of the checkpoint and names the classes; compiled, named twice."""
    state = {f"_orig_mod.{name}": tensor for name, tensor in resenc_state().items()}
    state |= {n.replace("_orig_mod.", "_orig_mod.decoder."): t for n, t in state.items() if ".encoder." in n}
    labels = {"background": 0, "box": 2, "sphere": 1}
    content = {"network_weights": state, "init_args": {"dataset_json": {"labels": labels}, "fold": 0}}
    _, _, _, table = started(tmp_path, "resenc", saved(tmp_path / "checkpoint_final.pth", content))
    assert table.share == 1.0
    assert table.kind == "nnU-Net's"
    assert states(table)["adapted"] == states(table)["random"] == 0
    assert {row.note for row in table.rows if row.state == "unused"} == {"the same weights under a second name"}


def test_8_a_monai_bundle_of_unet(tmp_path: Path) -> None:
    """By metadata.json; its last layers see each other's classes, and are copied along both axes."""
    net = noisy(
        UNet(
            spatial_dims=3,
            in_channels=1,
            out_channels=2,
            channels=(4, 8, 16),
            strides=(2, 2),
            num_res_units=2,
            norm="INSTANCE",
        )
    )
    saved(tmp_path / "bundle" / "models" / "model.pt", {"model": net.state_dict()})
    metadata = {"network_data_format": {"outputs": {"pred": {"channel_def": {"0": "background", "1": "Box"}}}}}
    (tmp_path / "bundle" / "configs").mkdir()
    (tmp_path / "bundle" / "configs" / "metadata.json").write_text(json.dumps(metadata))
    plan, network, before, table = started(tmp_path, "unet", tmp_path / "bundle")
    assert plan.network == {"features": [4, 8, 16], "num_res_units": 2, "norm": "INSTANCE"}
    name = "model.2.1.conv.unit0.conv.weight"
    ours, theirs, random = network.state_dict()[name], net.state_dict()[name], before[name]
    assert torch.equal(ours[0, 2], theirs[0, 1])
    assert torch.equal(ours[2, 0], theirs[1, 0])
    assert torch.equal(ours[1], random[1])
    assert torch.equal(ours[:, 1], random[:, 1])
    row = next(row for row in table.rows if row.name == name)
    assert row.share == pytest.approx(4 / 9)
    assert table.kind == "a MONAI bundle's"


def test_9_a_work_dir_of_our_own_gives_its_best_model(tmp_path: Path) -> None:
    """The plan tells classes, sizes, voxels; of several folds the best is taken, and its checkpoint would do, too."""
    for fold, dice in enumerate((0.5, 0.7)):
        paths = make_job(tmp_path / "earlier", "segresnet", fold, seed=fold)
        job = Workspace(tmp_path / "earlier").read_job("segresnet", fold)
        job.dice, job.inputs = dice, {"training case a": "digest of a", "validation case b": "digest of b"}
        Workspace(tmp_path / "earlier").write_job(job)
    fingerprint = make_fingerprint(**{f"spacing_mm_{k}": (1.0, 1.0, 1.5) for k in ("min", "p10", "median", "max")})
    plan, _, _, table = started(tmp_path, "segresnet", tmp_path / "earlier", fingerprint=fingerprint)
    assert table.source == "earlier/segresnet_1/models/model.pt"
    assert table.kind == "segresnet_1 of autoseg"
    assert table.share == 1.0
    assert plan.network == {
        "init_filters": 8,
        "blocks_down": [1, 1],
        "dsdepth": 1,
        "norm": "INSTANCE",
        "resolution": None,
    }
    assert plan.resample_resolution == (1.2, 1.2, 1.6)
    start = kept(tmp_path, "segresnet", tmp_path / "earlier")
    assert start.learned_from(["digest of a", "digest of its images"])
    assert not start.learned_from(["digest of b"])
    average = torch.load(paths.model, weights_only=True)
    checkpoint = {
        "identity": "i",
        "network": noisy(build_network(plan)).state_dict(),
        "average": average,
        "progress": {},
    }
    saved(paths.checkpoint, checkpoint)
    again = started(tmp_path / "again", "segresnet", paths.checkpoint, fingerprint=fingerprint)
    assert again[3].share == 1.0  # the moving average, with the plan's classes


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_packed_model(tmp_path: Path, is_zip: bool) -> None:
    """What `autoseg pack` writes: the job's weights as safetensors, and its plan."""
    job, packed = make_job(tmp_path / "w", "segresnet", 0), tmp_path / "pack"
    home = packed / "segresnet_0"
    for path in (job.plan, job.job):
        copy = home / path.relative_to(job.root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    JobDir(home).packed_model.parent.mkdir()
    save_file(torch.load(job.model, weights_only=True), JobDir(home).packed_model)
    data = {path.relative_to(packed).as_posix(): path.read_bytes() for path in packed.rglob("*") if path.is_file()}
    parts = {name: Part(sha256=hashlib.sha256(text).hexdigest(), bytes=len(text)) for name, text in data.items()}
    write_stored(packed / MANIFEST, Manifest(format=FORMAT, version=__version__, name="a pack", parts=parts))
    source = packed
    if is_zip:
        source = tmp_path / "pack.zip"
        with zipfile.ZipFile(source, "w") as archive:
            for name, text in {MANIFEST: (packed / MANIFEST).read_bytes(), **data}.items():
                archive.writestr(name, text)
    _, _, _, table = started(tmp_path, "segresnet", source)
    assert (table.share, table.kind) == (1.0, "segresnet_0 of autoseg")
    assert table.source == f"{source.name}/segresnet_0/models/model.safetensors"


def test_10_a_lightning_module_with_sigmoid(tmp_path: Path) -> None:
    """`state_dict` with the name of the module's attribute before all weights."""
    theirs = noisy(SegResNetDS(out_channels=2, dsdepth=2, **SMALL_SEGRESNET)).state_dict()
    state = {f"net.{name}": tensor for name, tensor in theirs.items()}
    content = {"state_dict": state, "config": {"class_names": ["box", "sphere"]}, "pytorch-lightning_version": "2.5"}
    _, network, _, table = started(tmp_path, "segresnet", saved(tmp_path / "last.ckpt", content), sigmoid=True)
    assert states(table)["random"] == states(table)["unused"] == 0
    bias = network.state_dict()["up_layers.1.head.bias"]
    assert torch.equal(bias, theirs["up_layers.1.head.bias"].flip(0))


THICK = make_fingerprint(
    **{f"spacing_mm_{k}": (0.8, 0.8, 5.0) for k in ("min", "p10", "median", "max")},
    **{f"size_mm_{k}": (38.4, 38.4, 80.0) for k in ("median", "p90")},
)


@pytest.mark.parametrize(
    ("algo", "stem"), [("segresnet", "encoder.conv_init.weight"), ("resenc", "encoder.stem.convs.0.conv.weight")]
)
def test_kernels_that_do_not_reach_across_thick_slices(tmp_path: Path, algo: AlgoName, stem: str) -> None:
    """Trained on cubes, used on thick slices: 3 becomes 1 along Z, and images alike along Z give what they gave."""
    cubes = make_fingerprint(**{f"size_mm_{k}": (38.4, 38.4, 38.4) for k in ("median", "p90")})
    size: dict[str, Any] = {"segresnet": {"init_filters": 4}, "resenc": {"init_features": 4}}[algo]
    thick = plan_and_origins(algo, fingerprint=THICK, **{algo: size})[0]
    if algo == "segresnet":  # as many stages, which the planner would not halve cubes for so often
        size["blocks_down"] = thick.network["blocks_down"]
    before = plan_and_origins(algo, fingerprint=cubes, **{algo: size})[0]
    their_network = noisy(build_network(before))
    theirs = their_network.state_dict()
    path = saved(tmp_path / "cubes.pt", {"state_dict": theirs, "config": {"class_names": ["sphere", "box"]}})
    plan, network, _, table = started(tmp_path, algo, path, fingerprint=THICK)
    ours = network.state_dict()[stem]
    assert ours.shape[2:] == (3, 3, 1)
    torch.testing.assert_close(ours, theirs[stem].sum(-1, keepdim=True))
    assert table.share == 1.0
    assert states(table)["random"] == 0
    image = torch.randn(1, 1, 8, 8, 1).expand(1, 1, 8, 8, 8)
    flat, deep = (
        nn.functional.conv3d(image, w, padding=tuple(k // 2 for k in w.shape[2:])) for w in (ours, theirs[stem])
    )
    torch.testing.assert_close(flat[..., 1:-1], deep[..., 1:-1])
    assert plan.network == thick.network  # but for what it takes over, which is the same here


def test_another_architecture_and_another_width_are_refused(tmp_path: Path) -> None:
    resenc = saved(tmp_path / "resenc.pt", resenc_state())
    plan = plan_and_origins("segresnet", start=kept(tmp_path, "segresnet", resenc))[0]
    with pytest.raises(ConfigError) as error:
        kept(tmp_path, "segresnet", resenc).check(plan)
    [message] = error.value.messages
    assert message.startswith(
        "init_weights: resenc.pt has 0% of the weights of the encoder of segresnet_0, expected at least 50%"
    )
    assert message.endswith("or name the network that they are of: init_weights: {NETWORK: FILE}.")
    theirs = noisy(SegResNetDS(out_channels=3, dsdepth=2, **SMALL_SEGRESNET)).state_dict()
    start = kept(tmp_path, "segresnet", saved(tmp_path / "narrow.pt", theirs))
    wider = plan_and_origins("segresnet", start=start, segresnet={"init_filters": 16})[0]
    with pytest.raises(ConfigError, match=r"narrow.pt has 0% of the weights"):
        start.check(wider)


def test_a_network_for_flat_images_is_refused(tmp_path: Path) -> None:
    """MONAI's SegResNet in 2D has all the names, and kernels of two edges."""
    flat = SegResNet(spatial_dims=2, init_filters=8, blocks_down=(1, 2, 2), blocks_up=(1, 1), out_channels=2)
    start = kept(tmp_path, "segresnet", saved(tmp_path / "flat.pt", flat.state_dict()))
    with pytest.raises(ConfigError, match=r"flat.pt has \d+% of the weights of the encoder"):
        start.check(plan_and_origins("segresnet", start=start)[0])


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"holds no weights of segresnet\. Expected a work_dir with a trained segresnet"
    ):
        kept(tmp_path, "segresnet", tmp_path)
    (tmp_path / "work_dir").mkdir()
    with pytest.raises(ConfigError, match=rf"Give {tmp_path / 'work_dir'}, which lies in it\.$"):
        kept(tmp_path, "segresnet", tmp_path)


def test_the_copy_follows_the_file_and_goes_with_the_setting(tmp_path: Path) -> None:
    theirs = noisy(SegResNetDS(out_channels=3, dsdepth=2, **SMALL_SEGRESNET)).state_dict()
    path = saved(tmp_path / "w.pt", theirs)
    first = kept(tmp_path, "segresnet", path)
    written = first.path.stat().st_mtime_ns
    assert kept(tmp_path, "segresnet", path).path.stat().st_mtime_ns == written  # untouched
    saved(path, {**theirs, "encoder.conv_init.weight": theirs["encoder.conv_init.weight"] + 1})
    second = kept(tmp_path, "segresnet", path)
    assert second.start.digest != first.start.digest
    stem = torch.load(second.path, weights_only=True)["encoder.conv_init.weight"]
    assert torch.equal(stem, theirs["encoder.conv_init.weight"] + 1)
    workspace = Workspace(tmp_path / "work_dir")
    assert str(tmp_path) not in (workspace.init_weights / "segresnet.json").read_text()
    assert keep_start(workspace, "segresnet", None) is None
    assert [*workspace.init_weights.iterdir()] == []


def test_a_window_of_ct_is_taken_over_where_it_shows_the_classes(tmp_path: Path) -> None:
    paths = make_job(
        tmp_path / "ct", "segresnet", 0, channels=[{"mode": "ct", "bounds": (0.0, 100.0), "mean": 50.0, "std": 20.0}]
    )
    start = kept(tmp_path, "segresnet", paths.root)
    plan, origins = plan_and_origins("segresnet", modality="CT", start=start)
    assert plan.channels[0].bounds == (0.0, 100.0)
    assert (
        origins["channels"].rule
        == "the window of the weights it starts from (segresnet_0/models/model.pt), which holds the foreground"
    )
    narrow = make_job(
        tmp_path / "bone",
        "segresnet",
        0,
        channels=[{"mode": "ct", "bounds": (60.0, 900.0), "mean": 300.0, "std": 90.0}],
    )
    start = kept(tmp_path / "other", "segresnet", narrow.root)
    assert plan_and_origins("segresnet", modality="CT", start=start)[0].channels[0].bounds == (5.0, 95.0)


def test_fine_tuning_is_on_with_given_weights_alone_and_says_why(tmp_path: Path) -> None:
    start = kept(tmp_path, "segresnet", make_job(tmp_path / "w", "segresnet", 0).root)
    keys = ("warmup_fraction", "frozen_fraction", "loaded_rate")
    near = {"start": start, "resample_resolution": [1.2, 1.2, 1.6]}
    plan, origins = plan_and_origins("segresnet", **near)
    scratch = plan_and_origins("segresnet")[0]
    assert [getattr(scratch, key) for key in keys] == [0.03, 0.0, 1.0]
    assert all(getattr(plan, key) != getattr(scratch, key) for key in keys)
    assert all(origins[key].rule.startswith("starts from weights: ") for key in keys)
    few = {"budget_s": 10.0, "fit": Fit(step_s=1.0)}
    assert plan_and_origins("segresnet", **few)[0].learning_rate == 1e-2  # a short schedule from scratch is in haste
    assert plan_and_origins("segresnet", **near, **few)[0].learning_rate == 4e-3
    mine = plan_and_origins("segresnet", **near, loaded_rate=0.5, segresnet={"frozen_fraction": 0.0})[0]
    assert (mine.loaded_rate, mine.frozen_fraction) == (0.5, 0.0)


def test_weights_of_other_voxels_are_trained_as_random_ones(tmp_path: Path) -> None:
    """What they know of shapes is of another size: kept, it cost more than half of the Dice (docs/results.md)."""
    source = make_job(tmp_path / "w", "segresnet", 0)
    start = kept(tmp_path, "segresnet", source.root)
    assert start.start.spacing_mm is not None
    few = {"budget_s": 10.0, "fit": Fit(step_s=1.0)}
    for factor, is_far in ((1.4, False), (1.6, True)):
        spacing = [start.start.spacing_mm[0], start.start.spacing_mm[1], start.start.spacing_mm[2] * factor]
        plan, origins = plan_and_origins("segresnet", start=start, resample_resolution=spacing, **few)
        assert (plan.loaded_rate, plan.frozen_fraction) == ((1.0, 0.0) if is_far else (0.25, 0.05))
        assert plan.learning_rate == (1e-2 if is_far else 4e-3)
        assert plan.warmup_fraction == 0.05
        assert ("voxels over 1.5 times" in origins["loaded_rate"].rule) == is_far


def test_a_later_round_of_a_job_that_began_with_weights_is_in_no_haste(tmp_path: Path) -> None:
    start = StartWeights(start=Start(source="w", digest="d"), path=tmp_path)
    few = {"budget_s": 10.0, "fit": Fit(step_s=1.0)}
    first = plan_and_origins("segresnet", start=start, **few)[0]
    later = plan_and_origins("segresnet", start=start, earlier=first, **few)[0]
    assert later.learning_rate == first.learning_rate == 4e-3
    assert (later.loaded_rate, later.frozen_fraction) == (1.0, 0.0)


@pytest.mark.parametrize("facts", [{"images_seen": ("a",)}, {"prefixes": {"encoder.": "encoder."}}])
def test_weights_that_learned_no_classes_have_one_rate_with_the_rest(tmp_path: Path, facts: dict[str, Any]) -> None:
    start = Start(source="w", digest="d", **facts)
    plan = plan_and_origins("segresnet", start=StartWeights(start=start, path=tmp_path))[0]
    assert (plan.loaded_rate, plan.frozen_fraction, plan.warmup_fraction) == (1.0, 0.05, 0.05)
    labelled = Start(source="w", digest="d", images_seen=("a",), trained_on=("b",))  # pretrained, then trained
    assert plan_and_origins("segresnet", start=StartWeights(start=labelled, path=tmp_path))[0].loaded_rate == 0.25


def test_11_claras_encoder_into_unetr_with_another_window(tmp_path: Path) -> None:
    """MONAI's UNETR for 32^3: the table of positions follows the window; of a cube the plan takes the window over."""
    how = {"feature_size": 8, "hidden_size": 64, "mlp_dim": 256, "num_heads": 1}
    theirs = noisy(MonaiUNETR(in_channels=1, out_channels=14, img_size=32, **how))
    encoder = {f"module.{n.removeprefix('vit.')}": t for n, t in theirs.state_dict().items() if n.startswith("vit.")}
    path = saved(tmp_path / "vit.pt", {"state_dict": encoder})
    plan, network, _, table = started(tmp_path, "unetr", path)
    assert plan.network == {"feature_size": 8, "hidden_size": 64, "image_size": [32, 32, 32]}
    assert table.encoder_share == 1.0
    assert not states(table)["adapted"]
    assert {row.theirs.rpartition("blocks.")[2] for row in table.rows if row.state == "unused"} == {
        f"{layer}.norm_cross_attn.{name}" for layer in range(12) for name in ("weight", "bias")
    }
    image = torch.randn(1, 1, 32, 32, 32)
    with torch.no_grad():  # the same function as MONAI's, of the same weights
        ours = network_file("unetr").build(1, 14, plan.network).eval()
        assert ours.load_state_dict(theirs.state_dict(), strict=False).missing_keys == []
        torch.testing.assert_close(ours(image), theirs.eval()(image))
    assert network.eval()(torch.randn(1, 1, 48, 16, 32)).shape == (1, 3, 48, 16, 32)
