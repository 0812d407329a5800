"""How single tensors are fitted to another number of channels, another kernel, other places and other classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

BACKGROUND = "background"


class FitError(Exception):
    """A tensor cannot be made one of the network's; the message says why."""


def to_channels(weight: torch.Tensor, dim: int, wanted: int) -> tuple[torch.Tensor, str]:
    """The first layer for another number of image channels.

    The mean over the channels, each as much as keeps the sum: an image that is the same in all channels gives what it
    gave before. Source: inflation of Carreira and Zisserman 2017 (arXiv 1705.07750), as nnU-Net and timm do it.
    """
    given = weight.shape[dim]
    mean = weight.mean(dim, keepdim=True) * (given / wanted)
    repeats = [wanted if d == dim else 1 for d in range(weight.ndim)]
    return mean.repeat(repeats), f"{given} to {wanted} channels"


def to_kernel(weight: torch.Tensor, size: Sequence[int], *, is_transposed: bool) -> tuple[torch.Tensor, str]:
    """A convolution for kernels of other edges, where a plan has 1 for 3 along an axis, or 3 for 1.

    3 to 1: the sum, which does to an image that is alike along the axis what the kernel did. 1 to 3: in the middle of
    zeros, which does the same to any image. Of transposed ones with stride 2, of which every other voxel meets one half
    of the weights, half the sum; and back, weights that interpolate.

    Args:
        weight: (out, in, X, Y, Z), of a transposed one (in, out, X, Y, Z).
        size: the edges wanted.

    Raises:
        FitError: Other edges than these.
    """
    given = tuple(weight.shape[2:])
    words = f"kernel {'x'.join(map(str, given))} to {'x'.join(map(str, size))}"
    for axis, (edge, wanted) in enumerate(zip(given, size, strict=True), 2):
        if edge == wanted:
            continue
        if wanted == 1 and edge in ((2, 3) if is_transposed else (3,)):
            weight = weight.sum(axis, keepdim=True) * (0.5 if is_transposed else 1.0)
        elif edge == 1 and (taps := _TAPS[is_transposed].get(wanted)):
            shape = [len(taps) if d == axis else 1 for d in range(weight.ndim)]
            weight = weight * torch.tensor(taps, dtype=weight.dtype).view(shape)
        else:
            raise FitError(f"no way from {words}")
    return weight, words


_TAPS: dict[bool, dict[int, tuple[float, ...]]] = {False: {3: (0, 1, 0)}, True: {2: (1, 1), 3: (0.5, 1, 0.5)}}
"""Of plain and of transposed convolutions: edge -> what a weight of edge 1 is multiplied with along it."""


def to_positions(table: torch.Tensor, shape: Sequence[int], image: Sequence[int]) -> tuple[torch.Tensor, str]:
    """A table of numbers by place, interpolated to other places.

    Args:
        table: (places, heads) by relative places in a window, or (1, places, features) by patches of an image; the
            places of the file are a cube's.
        shape: wanted.
        image: the window in voxels whose patches of 16^3 the places wanted are of.

    Raises:
        FitError: The places are no cube's, or the features differ in number.

    Source: nnU-Net's and timm's for position embeddings; Swin's authors for the tables of its windows.
    """
    is_window = table.ndim == 2
    places = table if is_window else table[0]
    old, new = _cube(len(places)), _grid(shape[0] if is_window else shape[1], image, is_window=is_window)
    if old is None or new is None or places.shape[1] != shape[-1]:
        raise FitError(f"{'x'.join(map(str, table.shape))} in the file, {'x'.join(map(str, shape))} here")
    grid = places.T.reshape(1, places.shape[1], *old)
    wide = nn.functional.interpolate(grid, size=new, mode="trilinear", align_corners=is_window)
    flat = wide.reshape(places.shape[1], -1).T.contiguous()
    words = f"places {'x'.join(map(str, old))} to {'x'.join(map(str, new))}"
    return (flat if is_window else flat[None]), words


def _cube(count: int) -> tuple[int, int, int] | None:
    edge = round(count ** (1 / 3))
    return (edge, edge, edge) if edge**3 == count else None


def _grid(count: int, image: Sequence[int], *, is_window: bool) -> tuple[int, int, int] | None:
    """The edges of so many places: a cube's, or those of the patches of an image."""
    if is_window:
        return _cube(count)
    x, y, z = (edge // 16 for edge in image)  # UNETR's patches have 16 voxels an edge
    return (x, y, z) if x * y * z == count else None


def output_names(classes: Sequence[str], *, sigmoid: bool) -> list[str]:
    """What the outputs of a network are, in their order."""
    return [*classes] if sigmoid else [BACKGROUND, *classes]


def by_class(
    weight: torch.Tensor,
    target: torch.Tensor,
    dims: Sequence[int],
    classes: Sequence[str] | None,
    names: Sequence[str],
) -> tuple[torch.Tensor, float, str]:
    """A layer with an entry for each output, its entries copied by the names of classes.

    Args:
        target: of the network, with the random numbers that classes without a counterpart keep.
        dims: axes that have an entry for each output.
        classes: what the file's outputs are, without the background; None: it does not say.
        names: what the network's are.

    Returns:
        The weights, which share of them comes from the file, and which classes; empty where all do, in one order.

    Raises:
        FitError: The file does not say what its outputs are, or none of them is one of the network's.
    """
    count = weight.shape[dims[0]]
    theirs = None if classes is None else [*classes] if count == len(classes) else [BACKGROUND, *classes]
    if theirs is None or len(theirs) != count:
        raise FitError("the file does not say which class each of its outputs is")
    if theirs == list(names):
        return weight, 1.0, ""
    known = {_plain(name): number for number, name in enumerate(theirs)}
    pairs = [(here, known[_plain(name)]) for here, name in enumerate(names) if _plain(name) in known]
    if not pairs:
        raise FitError(f"none of its classes ({', '.join(theirs)}) is one of these")
    rest = [d for d in range(weight.ndim) if d not in dims]
    if any(weight.shape[d] != target.shape[d] for d in rest):
        raise FitError(f"{'x'.join(map(str, weight.shape))} in the file, {'x'.join(map(str, target.shape))} here")
    here, there = (torch.tensor(numbers) for numbers in zip(*pairs, strict=True))
    copied = _copied(target.clone(), weight, tuple(dims), here, there)
    copies = [names[n] for n in here.tolist()]
    fresh = [name for name in names if name not in copies]
    words = f"copied: {', '.join(copies)}" + (f"; random: {', '.join(fresh)}" if fresh else "")
    return copied, float((len(copies) / len(names)) ** len(dims)), words


def _copied(
    target: torch.Tensor, weight: torch.Tensor, dims: tuple[int, ...], here: torch.Tensor, there: torch.Tensor
) -> torch.Tensor:
    """The target with the entries `here` along all axes replaced by those `there`."""
    if not dims:
        return weight
    first, *rest = dims
    part = _copied(target.index_select(first, here), weight.index_select(first, there), tuple(rest), here, there)
    return target.index_copy(first, here, part)


def _plain(name: str) -> str:
    """A class' name as it is compared: capitals, blanks, - and _ make no difference."""
    return "".join(c for c in name.casefold() if c not in " -_")
