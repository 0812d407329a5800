"""The table of the networks: a row each, with the hyperparameters that it alone has.

All else about a network is in its file `autoseg/networks/NAME.py` and its folder `templates/NAME`. The table lies here,
below both, because settings, manual and help are made of it, and must not load torch for that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from autoseg.config.fields import Count, Positive3, Strict, Voxels3
from autoseg.config.hyperparameters import HyperSettings, optional_twin

Few = Annotated[int, Field(ge=1, le=32)]
"""Layers or blocks of a stage: with more than any published network has, building it alone takes minutes."""
MOST_STAGES = 10
"""Stages of an encoder: each halves the patch, and 2^9 voxels are more than any patch has along an axis."""
MOST_FILTERS = 2048
"""Filters of a stage that a plan gives. A choice: some ten times what published networks have."""


class SegResNet(Strict):
    """The hyperparameters that SegResNet alone has."""

    init_filters: Annotated[int, Field(ge=4, le=MOST_FILTERS)]
    """Filters of the first stage; doubled at each stage."""
    blocks_down: Annotated[tuple[Few, ...], Field(min_length=1, max_length=MOST_STAGES)]
    """Residual blocks of each stage of the encoder; their number is the depth."""
    dsdepth: Count
    """Resolutions that get a loss (deep supervision)."""


class SegResNetPlanned(Strict):
    """What a plan says of SegResNet besides: the planner alone decides it."""

    norm: Literal["INSTANCE", "BATCH"]
    """Normalisation."""
    resolution: Positive3 | None = None
    """Spacing that the strides of the stages follow; null: all halve every axis."""


class SwinUNETR(Strict):
    """The hyperparameters that SwinUNETR alone has."""

    feature_size: Annotated[int, Field(ge=12, le=MOST_FILTERS, multiple_of=12)]
    """Features of the first stage."""
    depths: tuple[Few, Few, Few, Few]
    """Transformer layers of each stage."""
    window_size: Annotated[int, Field(ge=2, le=64)]
    """Edge of an attention window."""


class SwinUNETRPlanned(Strict):
    """What a plan says of SwinUNETR besides."""

    num_heads: tuple[Count, Count, Count, Count]
    """Attention heads of each stage."""
    use_v2: bool
    """A residual convolution before each stage."""
    norm: Literal["instance", "group"]
    """Normalisation."""


class DiNTS(Strict):
    """The hyperparameters that DiNTS alone has."""

    channel_mul: Annotated[float, Field(gt=0, le=64)]
    """Multiplies the filters 32, 64, 128, ... of the resolutions."""
    use_downsample: bool
    """Work from half resolution on: cheaper, a little coarser."""
    search: bool
    """Search the topology on the job's own cases before training, on a share of its time, from the one that comes with
    the template on, whose file says where it is from; false: take that one."""


class DiNTSPlanned(Strict):
    """What a plan says of DiNTS besides: its topology."""

    paths: Annotated[tuple[tuple[Literal[0, 1], ...], ...], Field(min_length=1)]
    """Which paths of each block are open."""
    operations: Annotated[tuple[tuple[Annotated[int, Field(ge=0, le=4)], ...], ...], Field(min_length=1)]
    """The operation of each path."""
    nodes: Annotated[tuple[tuple[Literal[0, 1], ...], ...], Field(min_length=1)]
    """Which resolutions are reached before each block and after the last."""


class UNet(Strict):
    """The hyperparameters that UNet alone has."""

    features: Annotated[
        tuple[Annotated[int, Field(ge=1, le=MOST_FILTERS)], ...], Field(min_length=2, max_length=MOST_STAGES)
    ]
    """Filters of each stage; each stage halves the edges."""
    num_res_units: Annotated[int, Field(ge=0, le=32)]
    """Residual units of each stage."""


class UNetPlanned(Strict):
    """What a plan says of UNet besides."""

    norm: Literal["INSTANCE", "BATCH"]
    """Normalisation."""


class ResEnc(Strict):
    """The hyperparameters that the residual-encoder U-Net alone has."""

    init_features: Annotated[int, Field(ge=4, le=320)]
    """Features of the first stage; doubled at each stage, up to 320."""
    dsdepth: Annotated[int, Field(ge=1, le=MOST_STAGES)]
    """Resolutions that get a loss (deep supervision)."""


class UNETR(Strict):
    """The hyperparameters that UNETR alone has."""

    feature_size: Annotated[int, Field(ge=4, le=MOST_FILTERS)]
    """Features of the decoder's finest stage."""
    hidden_size: Annotated[int, Field(ge=64, le=MOST_FILTERS, multiple_of=64)]
    """Features of the transformer."""


class UNETRPlanned(Strict):
    """What a plan says of UNETR besides."""

    image_size: Voxels3
    """Window that the table of positions is for; interpolated for others."""


Strides = Annotated[
    tuple[tuple[Literal[1, 2], Literal[1, 2], Literal[1, 2]], ...], Field(min_length=2, max_length=MOST_STAGES)
]
Kernels = Annotated[
    tuple[tuple[Literal[1, 3], Literal[1, 3], Literal[1, 3]], ...], Field(min_length=2, max_length=MOST_STAGES)
]


class ResEncPlanned(Strict):
    """What a plan says of the residual-encoder U-Net besides: its topology, a row a stage."""

    blocks: Annotated[tuple[Annotated[int, Field(ge=1, le=32)], ...], Field(min_length=2, max_length=MOST_STAGES)]
    """Residual blocks of each stage."""
    strides: Strides
    """Of each stage against the one before, along X, Y, Z; ones for the first."""
    kernels: Kernels
    """Edges of the convolutions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkRow:
    """What settings, manual and help need to know of a network."""

    own: type[Strict]
    """The hyperparameters that it alone has; the class' name is the network's name in texts."""
    title: str = ""
    """Its name in sentences, where that is another one."""
    reference: str = ""
    """Its publication, which `autoseg methods` and `card` cite; empty: none."""
    planned: type[Strict] = Strict
    """What its plan holds besides, which the planner alone decides."""
    in_ensemble: bool = True
    """Whether `algos` may name it."""
    in_auto: bool = False
    """Whether `algos: auto` may pick it."""
    halves_all_axes: bool = False
    """Whether each of its stages halves all axes, however long the voxels are along each."""
    recipes: tuple[str, ...] = ()
    """Published trainings of it, each a file `templates/NAME/recipes/RECIPE.yaml`."""
    not_from_top: frozenset[str] = frozenset()
    """Hyperparameters that the top level of the settings sets for the other networks alone."""
    doc: str = ""
    """What its block of settings is for; empty: the usual words."""


NETWORKS: dict[str, NetworkRow] = {
    "segresnet": NetworkRow(
        own=SegResNet,
        planned=SegResNetPlanned,
        reference="Myronenko A. 3D MRI brain tumor segmentation using autoencoder regularization. BrainLes 2018.",
        in_auto=True,
        recipes=("flare23", "wholebody_highres", "wholebody_lowres"),
    ),
    "swinunetr": NetworkRow(
        own=SwinUNETR,
        planned=SwinUNETRPlanned,
        reference="Hatamizadeh A et al. Swin UNETR: Swin transformers for semantic segmentation of brain tumors in MRI "
        "images. BrainLes 2021.",
        in_auto=True,
        halves_all_axes=True,
        recipes=("btcv",),
    ),
    "dints": NetworkRow(
        own=DiNTS,
        planned=DiNTSPlanned,
        reference="He Y et al. DiNTS: differentiable neural network topology search for 3D medical image segmentation. "
        "CVPR 2021.",
        in_auto=True,
        halves_all_axes=True,
    ),
    "unet": NetworkRow(
        own=UNet,
        planned=UNetPlanned,
        title="U-Net",
        reference="Çiçek Ö et al. 3D U-Net: learning dense volumetric segmentation from sparse annotation. "
        "MICCAI 2016.",
        halves_all_axes=True,
        recipes=("spleen",),
    ),
    "resenc": NetworkRow(
        own=ResEnc,
        planned=ResEncPlanned,
        title="residual-encoder U-Net",
        reference="Isensee F et al. nnU-Net revisited: a call for rigorous validation in 3D medical image "
        "segmentation. arXiv 2404.09556, 2024.",
        in_auto=True,
    ),
    "unetr": NetworkRow(
        own=UNETR,
        planned=UNETRPlanned,
        reference="Hatamizadeh A et al. UNETR: transformers for 3D medical image segmentation. arXiv 2103.10504, 2022.",
        halves_all_axes=True,
    ),
    # It finds the region to look at, and looks coarsely: the top level's voxels and windows are the others'.
    "locator": NetworkRow(
        own=SegResNet,
        planned=SegResNetPlanned,
        in_ensemble=False,
        not_from_top=frozenset(
            ("resample_resolution", "roi_size", "crop_foreground", "overlap", "tta")
            + ("class_weights", "class_sampling", "lateral_pairs")
        ),
        doc="Settings of the locator alone; any hyperparameter, and SegResNet's own. The top level's voxel size, "
        "patch, overlap and mirroring are not for it.",
    ),
}
"""Name -> row, in the order of manual and help."""

RECIPE_ALGO: dict[str, str] = {recipe: name for name, row in NETWORKS.items() for recipe in row.recipes}
"""The network that each published recipe trained."""

if TYPE_CHECKING:
    # A type checker cannot read names out of a table.
    AlgoName = str
    EnsembleAlgo = str
    RecipeName = str
else:
    AlgoName = Literal[*NETWORKS]
    EnsembleAlgo = Literal[*(name for name, row in NETWORKS.items() if row.in_ensemble)]
    RecipeName = Literal["default", *RECIPE_ALGO]

ALGOS: tuple[EnsembleAlgo, ...] = tuple(name for name, row in NETWORKS.items() if row.in_ensemble)
"""All networks that an ensemble may have."""

AUTO: Literal["auto"] = "auto"
"""The value of `algos` that leaves the choice to `autoseg.algos.choice`."""

AUTO_ALGOS: tuple[EnsembleAlgo, ...] = tuple(name for name in ALGOS if NETWORKS[name].in_auto)
"""Those that it may pick."""

LOCATOR: AlgoName = "locator"
"""The network that finds the region to look at; trained by the same engine, but no part of an ensemble."""


def settings_blocks() -> dict[str, tuple[type[Strict], str]]:
    """Each network's block of settings: any hyperparameter and its own, and what the manual says of the block."""
    classes: dict[type[Strict], type[Strict]] = {}
    blocks = {}
    for name, row in NETWORKS.items():
        title = row.own.__name__
        if row.own not in classes:  # networks that share their hyperparameters share the class
            classes[row.own] = optional_twin(
                f"{title}Settings", row.own, f"Settings of {title} alone.", base=HyperSettings
            )
        blocks[name] = classes[row.own], row.doc or f"Settings of {title} alone; any hyperparameter, and its own."
    return blocks
