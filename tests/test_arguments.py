"""The help of commands names every setting that may be a flag, once."""

from __future__ import annotations

import re

from autoseg.cli.arguments import command_help
from autoseg.cli.commands import TAKES_SETTINGS, Commands
from autoseg.config.docs import setting_docs
from autoseg.config.hyperparameters import HyperSettings
from autoseg.config.networks import ALGOS, LOCATOR


def test_help_lists_every_setting_but_the_networks_copies() -> None:
    lines = command_help(Commands, "run", TAKES_SETTINGS).splitlines()
    listed = [match[1] for line in lines if (match := re.match(r"  --([\w.]+)  ", line))]
    copies = {f"{algo}.{key}" for algo in (*ALGOS, LOCATOR) for key in HyperSettings.model_fields}
    blocks = {key for key, doc in setting_docs().items() if doc.type == "a block of settings"}
    flags = ["input", "settings", "accept"]  # run's own
    assert sorted(listed) == sorted([*flags, *(set(setting_docs()) - copies - blocks)])
    assert {"inference.overlap", "overlap", "sweep.folds", "locator.init_filters"} <= set(listed)


def test_help_names_every_network_that_a_hyperparameter_may_be_set_for() -> None:
    text = command_help(Commands, "train", TAKES_SETTINGS)
    assert f"Under {', '.join((*ALGOS, LOCATOR))} each hyperparameter may be set for one network: " in text


def test_help_of_fast_names_what_it_turns_on() -> None:
    words = " ".join(command_help(Commands, "predict", TAKES_SETTINGS).partition("  --fast")[2].split())
    assert "locate, crop_to_first, overlap 0 and no mirroring" in words.partition("--locate")[0]
