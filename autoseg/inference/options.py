"""How an image is gone through: what a user, `--fast` or a budget may change without training anything anew."""

from __future__ import annotations

from dataclasses import dataclass

from autoseg.config.settings import InferenceSettings
from autoseg.errors import ConfigError
from autoseg.hardware.device import Precision


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """None leaves a value to the models' plans, or to the engine."""

    overlap: float | None = None
    """Of neighbouring windows, in [0, 1)."""
    mirror: bool | None = None
    """Whether logits are averaged over mirrored windows."""
    precision: Precision | None = None
    window_batch: int | None = None
    """Windows per forward pass."""
    slab_values: int | None = None
    """Probabilities of a model held for a slab."""
    on_device: bool | None = None
    """Hold what is averaged over windows on the GPU; None: where its memory suffices."""
    num_models: int | None = None
    """The first so many models alone."""
    locate: bool = False
    """Crop to the locator's region."""
    crop_to_first: bool = False
    """Crop the body's length to what the first model finds, for the others."""
    skip_empty: bool = False
    """Pass one window of background alone through the models for all of an image."""
    anywhere: tuple[str, ...] = ()
    """Classes for which the locator keeps the whole length."""


def options_of(settings: InferenceSettings, *, has_locator: bool) -> Options:
    """The options that settings come to.

    Args:
        has_locator: whether one is trained.

    Raises:
        ConfigError: The locator is asked for, and there is none.
    """
    fast = settings.fast
    if settings.locate and not has_locator:
        raise ConfigError("locate: no locator is trained. Run `autoseg train --algo locator`, or leave it out.")

    def on(value: bool | None) -> bool:
        return fast if value is None else value

    return Options(
        overlap=0.0 if fast and settings.overlap is None else settings.overlap,
        mirror=False if fast and settings.mirror is None else settings.mirror,
        locate=has_locator and on(settings.locate),
        crop_to_first=on(settings.crop_to_first),
        skip_empty=settings.skip_empty is not False,
        anywhere=settings.anywhere,
    )
