"""Names of weights elsewhere -> those of our networks, one function a network."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from autoseg.config.networks import AlgoName
from autoseg.networks import is_encoder


@dataclass(frozen=True, slots=True, kw_only=True)
class Renamed:
    """What becomes of one tensor of a file."""

    name: str = ""
    """In our network; empty: it is of no use there."""
    why: str = ""
    """Why it is of no use, or how it was changed."""
    convert: Callable[[torch.Tensor], torch.Tensor] | None = None
    """Makes ours of theirs; None: it stays as it is."""


LINEAR = (0.5, 1.0, 0.5)
"""A transposed convolution of stride 2 with these weights along an axis interpolates linearly."""


def interpolating(weight: torch.Tensor) -> torch.Tensor:
    """A convolution of 1x1x1 before linear interpolation, as one transposed convolution of 3x3x3 with stride 2.

    Args:
        weight: (out, in, 1, 1, 1); any other stays as it is, and fits nowhere.

    Returns:
        (in, out, 3, 3, 3).
    """
    if weight.ndim != 5 or weight.shape[2:] != (1, 1, 1):
        return weight
    taps = torch.tensor(LINEAR, dtype=weight.dtype)
    cube = taps[:, None, None] * taps[None, :, None] * taps[None, None, :]
    return weight.transpose(0, 1) * cube


def _segresnet(name: str) -> Renamed:
    """MONAI's SegResNet, as SuPreM trains it, into SegResNetDS. Source: both classes in monai.networks.nets."""
    if name.startswith("convInit."):
        return Renamed(name=name.replace("convInit.conv.", "encoder.conv_init."))
    if match := re.fullmatch(r"down_layers\.(\d+)\.(\d+)\.(.+)", name):
        stage, place, rest = int(match[1]), int(match[2]), match[3].replace(".conv.", ".")
        if place == 0:  # the strided convolution stands before the blocks of its stage there, after those before here
            return Renamed(name=f"encoder.layers.{stage - 1}.downsample.{rest.removeprefix('conv.')}")
        return Renamed(name=f"encoder.layers.{stage}.blocks.{place - 1}.{rest}")
    if match := re.fullmatch(r"up_layers\.(\d+)\.(\d+)\.(.+)", name):
        return Renamed(name=f"up_layers.{match[1]}.blocks.{match[2]}.{match[3].replace('.conv.', '.')}")
    if match := re.fullmatch(r"up_samples\.(\d+)\.0\.conv\.weight", name):
        how = "1x1x1 before linear interpolation, as one transposed convolution"
        return Renamed(name=f"up_layers.{match[1]}.upsample.deconv.weight", why=how, convert=interpolating)
    if name.startswith("conv_final."):
        return Renamed(why="a head of normalised features, which SegResNetDS has none of")
    return Renamed(name=name)


def _swinunetr(name: str) -> Renamed:
    """Encoders that were pretrained alone, with or without `encoder.` before their names; whole ones fit as they are.

    Source: `SwinUNETR.load_from` and `filter_swinunetr` of MONAI.
    """
    name = re.sub(r"^encoder\.layers(\d)\.0\.0\.", r"swinViT.layers\1.0.", name)
    name = re.sub(r"^(encoder\.)?(patch_embed|layers[1-4]c?)\.", r"swinViT.\2.", name)
    if name.startswith("swinViT."):
        name = name.replace(".mlp.fc1.", ".mlp.linear1.").replace(".mlp.fc2.", ".mlp.linear2.")
    return Renamed(name=name)


def _unetr(name: str) -> Renamed:
    """A vision transformer that was pretrained alone, with or without `encoder.` before its names."""
    return Renamed(name=re.sub(r"^(encoder\.)?(patch_embedding|blocks|norm)\.", r"vit.\2.", name))


def _resenc(name: str) -> Renamed:
    """nnU-Net's, whose names ours has. Source: its library writes some of the weights under several names."""
    if ".all_modules." in name or name.startswith("decoder.encoder."):
        return Renamed(why="the same weights under a second name")
    return Renamed(name=name)


LAYOUTS: dict[AlgoName, Callable[[str], Renamed]] = {
    "segresnet": _segresnet,
    "locator": _segresnet,
    "swinunetr": _swinunetr,
    "resenc": _resenc,
    "unetr": _unetr,
}
"""Networks that are trained elsewhere, too; names of all others stay as they are."""


def renamed(algo: AlgoName, names: Iterable[str], prefixes: Mapping[str, str] | None = None) -> dict[str, Renamed]:
    """What becomes of each tensor of a file in one of our networks, by its name there.

    Where all names begin with one part, such as a Lightning module's `net.`, and more of them are the encoder's without
    it, it is left out.

    Args:
        prefixes: theirs -> ours, where a plan of theirs says which weights are worth taking; all others are left.
    """
    rename = LAYOUTS.get(algo, lambda name: Renamed(name=name))
    if prefixes:
        rename = partial(_of_encoder, rename, prefixes)
    as_given = {name: rename(name) for name in names}
    firsts = {name.partition(".")[0] for name in as_given}
    if len(firsts) != 1:
        return as_given
    shorter = {name: rename(name.partition(".")[2]) for name in as_given}
    inside = is_encoder(algo)

    def num_inside(each: Mapping[str, Renamed]) -> int:
        return sum(inside(new.name) for new in each.values())

    return shorter if num_inside(shorter) > num_inside(as_given) else as_given


def shapes_as_ours(
    algo: AlgoName, tensors: Mapping[str, torch.Tensor], prefixes: Mapping[str, str] | None = None
) -> dict[str, tuple[int, ...]]:
    """The shapes of a file's tensors by their names in one of our networks."""
    return {
        new.name: tuple((new.convert(tensors[name]) if new.convert else tensors[name]).shape)
        for name, new in renamed(algo, tensors, prefixes).items()
        if new.name
    }


def _of_encoder(rename: Callable[[str], Renamed], prefixes: Mapping[str, str], name: str) -> Renamed:
    for theirs, ours in prefixes.items():
        if name == theirs or name.startswith(f"{theirs}."):
            return rename(ours + name.removeprefix(theirs))
    return Renamed(why="of no use once the pretraining is over, as its adaptation plan says")
