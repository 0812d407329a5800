"""The hyperparameters, each defined once, and what is made of the definition: a user's settings and a plan's fields.

One that all networks have is a field of `Hyperparameters`; a network's own stand in networks.py. Where its value comes
from if the user sets none is a line of `templates/common/hyper_parameters.yaml`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from pydantic import AfterValidator, Field, create_model

from autoseg.config.fields import (
    Count,
    Duration,
    LateralPairs,
    NotNegative,
    Positive,
    Positive3,
    Rising,
    Share,
    ShareBelowOne,
    Strict,
    Voxels3,
    check_unique,
)

NormalizeMode = Literal["ct", "mri", "pet", "meanstd", "meanstdtanh", "range", "none"]


class Hyperparameters(Strict):
    """The hyperparameters that all networks have: type, limits, choices and meaning, each known here alone.

    Settings, plans, the schema, the manual, the help and the sweep's space are made of this class.
    """

    resample_resolution: Positive3
    """Voxel size in mm along X, Y, Z (RAS) that images are resampled to."""
    roi_size: Voxels3
    """Patch in voxels along X, Y, Z after resampling; rounded up, with a warning, to what the network can halve."""
    batch_size: Count
    """Patches per step, over all devices together."""
    num_epochs: Count
    """Passes over the training folds. With `budget`, the most that are made."""
    num_steps_per_epoch: Count
    """Optimizer steps an epoch; the planner takes enough to see every training case once."""
    num_epochs_per_validation: Count
    """Epochs between two validations."""
    budget: Duration
    """Time for training, such as 10m, 2h or 1d: for each job where set under an algorithm or given to `train`;
    for the whole run, shared out over its jobs, at the top level."""
    optimizer: Literal["muon", "adamw", "adam", "novograd", "sgd"]
    """What turns gradients into steps. muon: steps of equal length in all directions of a weight matrix; sgd has
    Nesterov momentum 0.99, as nnU-Net's."""
    schedule: Literal["cosine", "poly", "constant"]
    """Way of the learning rate after warm-up: along a cosine or a polynomial to zero, or constant."""
    learning_rate: Positive
    """Highest learning rate, after warm-up."""
    weight_decay: NotNegative
    """The optimizer's weight decay."""
    warmup_fraction: ShareBelowOne
    """Share of the schedule in which the learning rate rises from a tenth."""
    loaded_rate: Annotated[float, Field(gt=0, le=1)]
    """Learning rate of weights that were loaded (`init_weights`) as a share of that of new ones, such as those of new
    classes; under 1 they keep more of what they know."""
    frozen_fraction: ShareBelowOne
    """Share of the schedule in which loaded weights stay as they are, while new ones learn; over as long again their
    learning rate then rises."""
    grad_clip: Positive
    """Largest norm of the gradient."""
    ema_decay: ShareBelowOne
    """Decay of the moving average of the weights that is validated and kept; 0 turns it off."""
    loss: Literal["dice_ce", "dice_focal"]
    """Dice with cross-entropy or with focal loss."""
    class_weights: dict[str, Positive]
    """Weight of a class in the loss, such as {tumor: 10}; the others and the background have 1."""
    class_sampling: dict[str, NotNegative]
    """How often patches are centred on a class, such as {tumor: 3}; the others have 1."""
    normalize_mode: NormalizeMode
    """How intensities are normalised; from `modality` where not set."""
    intensity_bounds: Rising
    """Lower and upper intensity for normalize_mode ct or range."""
    crop_foreground: bool
    """Crop images to the box around their voxels other than 0 before resampling; outside is background."""
    foreground_fraction: Share
    """Share of patches centred on a voxel of a class drawn at random; the rest lie anywhere."""
    annotators_share: Share
    """Share of a class' patches cut from cases whose annotators drew it, where models filled it in for others."""
    lateral_pairs: LateralPairs | None
    """Classes that are the left and the right one of a structure, such as [[left kidney, right kidney]]: they change
    places in images mirrored along X; null: by names and by where they lie, as the analysis finds them."""
    mirror_axes: Annotated[tuple[Literal[0, 1, 2], ...], AfterValidator(check_unique)]
    """Axes (0 X, 1 Y, 2 Z) along which patches are mirrored at random; X swaps the classes of lateral_pairs."""
    augment: Literal["default", "light", "axial", "none"]
    """Random changes of the training patches; light: mirroring, brightness and contrast alone; axial: mirroring,
    contrast, histogram shift, and turning and scaling in the axial plane, as the FLARE23 paper."""
    tta: bool
    """Average the prediction over mirrored images at test time, along mirror_axes."""
    overlap: ShareBelowOne
    """Overlap of neighbouring windows in inference, as a share of the patch."""
    precision: Literal["auto", "bf16", "fp16", "fp32"]
    """Arithmetic of the network; auto: bf16 where the hardware has it, else fp16 on a GPU, else fp32."""
    cache: Literal["ram", "disk", "off"]
    """Where preprocessed cases are kept: in memory as far as it is free, the rest on disk; on disk alone; nowhere, so
    that each is made anew whenever a patch is cut from it."""
    cache_gib: NotNegative | None
    """Most that `cache: ram` keeps in memory or `cache: disk` writes, in GiB; planned: half of what is free."""


PLANNED_AS = {"budget": "budget_s", "normalize_mode": "channels", "intensity_bounds": "channels"}
"""Hyperparameters that a plan holds in another form -> its key: seconds, and the normalisation of each channel."""


def optional_twin(name: str, model: type[Strict], doc: str, base: type[Strict] = Strict) -> type[Strict]:
    """A class with a model's fields, each of which may be None, after those of another class.

    Args:
        name, doc: of the new class.
        base: what it has before the model's fields.
    """
    types = get_type_hints(model, include_extras=True)
    fields: dict[str, Any] = {
        key: (types[key] | None, Field(default=None, description=info.description))
        for key, info in model.model_fields.items()
    }
    return create_model(name, __base__=base, __doc__=doc, __module__=__name__, **fields)


def required_twin(
    name: str, model: type[Strict], doc: str, *, without: Collection[str], defaults: Mapping[str, Any]
) -> type[Strict]:
    """A class with a model's fields but some.

    Args:
        name, doc: of the new class.
        defaults: field -> value where it is left out; all others must be given.
    """
    types = get_type_hints(model, include_extras=True)
    fields: dict[str, Any] = {
        key: (types[key], Field(default=defaults.get(key, ...), description=info.description))
        for key, info in model.model_fields.items()
        if key not in without
    }
    return create_model(name, __base__=Strict, __doc__=doc, __module__=__name__, **fields)


if TYPE_CHECKING:

    class HyperSettings(Strict):
        """Hyperparameters a user may fix, to a type checker, which cannot make each of them optional.

        It sees those that code reads by their names; all others are read by `Settings.hyper`.
        """

        budget: Duration | None = None
        lateral_pairs: LateralPairs | None = None

else:
    HyperSettings = optional_twin(
        "HyperSettings", Hyperparameters, "Hyperparameters a user may fix; None leaves them to the planner."
    )
