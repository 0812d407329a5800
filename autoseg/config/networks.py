"""The table of the networks: a row each, with the hyperparameters that it alone has.

All else about a network is in its file `autoseg/networks/NAME.py` and its folder `templates/NAME`. The table lies here,
below both, because settings, manual and help are made of it, and must not load torch for that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from autoseg.config.fields import Count, Positive, Strict
from autoseg.config.hyperparameters import HyperSettings, optional_twin


class SegResNet(Strict):
    """The hyperparameters that SegResNet alone has."""

    init_filters: Annotated[int, Field(ge=4)]
    """Filters of the first stage; doubled at each stage."""
    blocks_down: tuple[Count, ...]
    """Residual blocks of each stage of the encoder; their number is the depth."""
    dsdepth: Count
    """Resolutions that get a loss (deep supervision)."""


class SwinUNETR(Strict):
    """The hyperparameters that SwinUNETR alone has."""

    feature_size: Annotated[int, Field(ge=12, multiple_of=12)]
    """Features of the first stage."""
    depths: tuple[Count, Count, Count, Count]
    """Transformer layers of each stage."""
    window_size: Annotated[int, Field(ge=2)]
    """Edge of an attention window."""


class DiNTS(Strict):
    """The hyperparameters that DiNTS alone has."""

    channel_mul: Positive
    """Multiplies the filters 32, 64, 128, ... of the resolutions."""
    use_downsample: bool
    """Work from half resolution on: cheaper, a little coarser."""
    search: bool
    """Search the topology on the job's own cases before training, on a share of its time, from the one that comes with
    the template on, whose file says where it is from; false: take that one."""


class UNet(Strict):
    """The hyperparameters that UNet alone has."""

    features: Annotated[tuple[Count, ...], Field(min_length=2)]
    """Filters of each stage; each stage halves the edges."""
    num_res_units: Annotated[int, Field(ge=0)]
    """Residual units of each stage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkRow:
    """What settings, manual and help need to know of a network."""

    own: type[Strict]
    """The hyperparameters that it alone has; the class' name is the network's name in texts."""
    in_ensemble: bool = True
    """Whether `algos` may name it."""
    by_default: bool = False
    """Whether a run trains it where `algos` says nothing."""
    recipes: tuple[str, ...] = ()
    """Published trainings of it, each a file `templates/NAME/recipes/RECIPE.yaml`."""
    not_from_top: frozenset[str] = frozenset()
    """Hyperparameters that the top level of the settings sets for the other networks alone."""
    doc: str = ""
    """What its block of settings is for; empty: the usual words."""


NETWORKS: dict[str, NetworkRow] = {
    "segresnet": NetworkRow(own=SegResNet, by_default=True, recipes=("flare23",)),
    "swinunetr": NetworkRow(own=SwinUNETR, by_default=True, recipes=("btcv",)),
    "dints": NetworkRow(own=DiNTS, by_default=True),
    "unet": NetworkRow(own=UNet, recipes=("spleen",)),
    # It finds the region to look at, and looks coarsely: the top level's voxels and windows are the others'.
    "locator": NetworkRow(
        own=SegResNet,
        in_ensemble=False,
        not_from_top=frozenset(
            ("resample_resolution", "roi_size", "crop_foreground", "overlap", "tta", "class_weights", "class_sampling")
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

DEFAULT_ALGOS: tuple[EnsembleAlgo, ...] = tuple(name for name in ALGOS if NETWORKS[name].by_default)
"""Those that a run trains where `algos` does not say."""

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
