"""Dictionary transforms for bundles: resampling over the same field of view, targets, and label values of regions."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config.type_definitions import KeysCollection
from monai.data.meta_tensor import MetaTensor
from monai.data.utils import affine_to_spacing
from monai.transforms.inverse import InvertibleTransform
from monai.transforms.spatial.array import Orientation, Resize
from monai.transforms.transform import MapTransform
from monai.utils.misc import ensure_tuple_rep
from monai.utils.type_conversion import convert_to_dst_type

from autoseg.data.frame import Frame
from autoseg.data.resampling import resampled_shape

Items = dict[Hashable, Any]


class ResampleFieldOfViewd(MapTransform, InvertibleTransform):
    """Resample to about a voxel size over the same field of view, edges aligned; MONAI's Resize, whose size it chooses.

    `Spacingd` would sample another grid, up to a voxel away from the one that the network was trained on.
    """

    def __init__(
        self,
        keys: KeysCollection,
        pixdim: Sequence[float],
        mode: Sequence[str] | str = "trilinear",
        allow_missing_keys: bool = False,
    ) -> None:
        """Set up.

        Args:
            pixdim: edges of a voxel in mm along the axes of the images, which are to be in RAS.
            mode: trilinear, or nearest-exact for labels; one, or one a key.
        """
        super().__init__(keys, allow_missing_keys)
        x, y, z = (float(p) for p in pixdim)
        self.pixdim = x, y, z
        self.mode = ensure_tuple_rep(mode, len(self.keys))
        self.resizer = Resize(spatial_size=(1, 1, 1))

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> Items:
        """Images of (C, X, Y, Z) as MetaTensor."""
        items: Items = dict(data)
        for key, mode in self.key_iterator(items, self.mode):
            image = items[key]
            x, y, z = (float(s) for s in affine_to_spacing(image.affine))
            shape: tuple[int, int, int] = tuple(image.shape[1:])
            self.resizer.spatial_size = resampled_shape(shape, (x, y, z), self.pixdim)
            items[key] = self.resizer(image, mode=mode, align_corners=False if mode == "trilinear" else None)
        return items

    def inverse(self, data: Mapping[Hashable, torch.Tensor]) -> Items:
        """Back onto the grid before."""
        items: Items = dict(data)
        for key in self.key_iterator(items):
            items[key] = self.resizer.inverse(items[key])
        return items


class TurnToFramed(MapTransform, InvertibleTransform):
    """Turn images in RAS to the axes that the network works in, where these are its data set's own."""

    def __init__(
        self,
        keys: KeysCollection,
        axes: Sequence[Sequence[float]],
        slices: int,
        allow_missing_keys: bool = False,
    ) -> None:
        """Set up.

        Args:
            axes: directions of the network's X, Y, Z in the RAS+ world.
            slices: the axis that slices are stacked along.
        """
        super().__init__(keys, allow_missing_keys)
        x, y, z = ((float(a), float(b), float(c)) for a, b, c in axes)
        self.frame = Frame((x, y, z), slices)
        self.orientation = Orientation(axcodes="RAS", labels=None)

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> Items:
        """Images of (C, X, Y, Z) as MetaTensor, no voxel changed."""
        items: Items = dict(data)
        for key in self.key_iterator(items):
            turn = self.frame.turn(np.asarray(items[key].affine)[:3, :3])
            codes = (("R", "L"), ("A", "P"), ("S", "I"))
            self.orientation.axcodes = "".join(
                codes[axis][flipped] for axis, flipped in zip(turn.axes, turn.flipped, strict=True)
            )
            items[key] = self.orientation(items[key])
        return items

    def inverse(self, data: Mapping[Hashable, torch.Tensor]) -> Items:
        """Back to RAS."""
        items: Items = dict(data)
        for key in self.key_iterator(items):
            items[key] = self.orientation.inverse(items[key])
        return items


class EncodeLabeld(MapTransform):
    """A label file's values as a target; values that belong to no class become background."""

    def __init__(self, keys: KeysCollection, values: Sequence[Sequence[int]], regions: bool = False) -> None:
        """Set up.

        Args:
            values: label values of each class.
            regions: classes may overlap, each has a channel; else one channel, 0 background and 1..K classes.
        """
        super().__init__(keys)
        self.values, self.regions = values, regions

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> Items:
        """Labels of (1, X, Y, Z) to (1 or K, X, Y, Z) float32."""
        items: Items = dict(data)
        for key in self.key_iterator(items):
            label = items[key]
            plain = label.as_tensor() if isinstance(label, MetaTensor) else torch.as_tensor(label)
            masks = [torch.isin(plain, torch.as_tensor(values, dtype=plain.dtype)) for values in self.values]
            if self.regions:
                target = torch.cat(masks).float()
            else:
                target = torch.zeros(plain.shape)
                for index, mask in enumerate(masks, 1):
                    target[mask] = index
            items[key] = convert_to_dst_type(target, label, dtype=torch.float32)[0]
        return items


class PaintRegionsd(MapTransform):
    """Label values of regions that may overlap: larger ones first, so that what lies inside one is seen."""

    def __init__(
        self,
        keys: KeysCollection,
        values: Sequence[int],
        order: Sequence[int],
        overlaps: Sequence[tuple[Sequence[int], int]] = (),
    ) -> None:
        """Set up.

        Args:
            values: that each region writes.
            order: regions as they are painted.
            overlaps: regions and the value of voxels that lie in exactly these.
        """
        super().__init__(keys)
        self.values, self.order, self.overlaps = values, order, overlaps

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> Items:
        """(K, X, Y, Z) of 0 and 1 to (1, X, Y, Z) of label values, float32."""
        items: Items = dict(data)
        for key in self.key_iterator(items):
            regions = items[key]
            masks = (regions.as_tensor() if isinstance(regions, MetaTensor) else torch.as_tensor(regions)) > 0
            label = torch.zeros(masks.shape[1:])
            for index in self.order:
                label[masks[index]] = self.values[index]
            for inside, value in self.overlaps:
                wanted = torch.tensor([index in inside for index in range(len(masks))])
                label[(masks == wanted.reshape(-1, 1, 1, 1)).all(0)] = value
            items[key] = convert_to_dst_type(label[None], regions, dtype=torch.float32)[0]
        return items


class ForgetChannelDimd(MapTransform):
    """Say of a label map that it has no channels, though the image's files had.

    MONAI 1.6.1's SaveImage takes the last axis of a label map for channels where the image had several.
    """

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> Items:
        """Labels of (1, X, Y, Z) as MetaTensor."""
        items: Items = dict(data)
        for key in self.key_iterator(items):
            if isinstance(items[key], MetaTensor):
                items[key].meta = {**items[key].meta, "original_channel_dim": "no_channel"}
        return items
