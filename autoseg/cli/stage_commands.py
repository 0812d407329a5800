"""The commands of the stages: one for each row of their table, `autoseg.pipeline.stages.STAGES`.

A stage's command runs that stage with the settings of the file and the command line. Those that have flags of their own
are written here; every other is made from its row.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from autoseg.cli.imports import quick_imports
from autoseg.errors import ConfigError
from autoseg.pipeline.stages import STAGES
from autoseg.terminal import show
from autoseg.workspace.stages import Stage

if TYPE_CHECKING:
    from autoseg.config.networks import AlgoName

INPUT = Path("input.yaml")


class HasOverrides(Protocol):
    """The class of the commands, as far as those of the stages use it."""

    overrides: Mapping[str, str]
    """Settings on the command line: key -> text."""


def stage_commands() -> dict[str, Callable[..., int]]:
    """The commands of all stages by name, in the order of the table, each with its documentation."""
    written: dict[str, Callable[..., int]] = {
        "analyze": analyze,
        "pretrain": pretrain,
        "train": train,
        "ensemble": ensemble,
    }
    return {stage.name: written.get(stage.name) or _made_command(stage) for stage in STAGES}


def run_stages(stages: Sequence[str], input: Path, overrides: Mapping[str, str], **options: Any) -> int:
    """Run stages with the settings of the file and the command line; see `autoseg.pipeline.run.run_input`."""
    with quick_imports():
        from autoseg.pipeline.run import run_input

    return run_input(stages, input, overrides, **options)


def _made_command(stage: Stage[Any]) -> Callable[..., int]:
    """The command of a stage that has no flags but --input and the settings."""

    def command(self: HasOverrides, *, input: Path = INPUT) -> int:
        return run_stages((stage.name,), input, self.overrides)

    command.__name__ = command.__qualname__ = stage.name
    command.__doc__ = _documentation(stage, f"    input: {stage.settings_doc}")
    return command


def _documented(name: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Give a written command the documentation of its stage's row; its own docstring says what its flags mean."""

    def document(function: Callable[..., int]) -> Callable[..., int]:
        arguments = (inspect.getdoc(function) or "").partition("Args:\n")[2]
        stage = next(stage for stage in STAGES if stage.name == name)
        function.__doc__ = _documentation(stage, arguments.rstrip())
        return function

    return document


def _documentation(stage: Stage[Any], arguments: str) -> str:
    """A command's docstring, from which its help is made."""
    example = stage.example or f"autoseg {stage.name} --input input.yaml"
    parts = [stage.doc, stage.help, f"Args:\n{arguments}", f"Example:\n{textwrap.indent(example, '    ')}"]
    return "\n\n".join(part for part in parts if part)


@_documented("analyze")
def analyze(self: HasOverrides, *, input: Path = INPUT, data: Path | None = None, json: bool = False) -> int:
    """Run the stage, or look at a bare folder.

    Args:
        input: The settings.
        data: A bare folder of images, or of images/ and labels/, to look at without an input.yaml.
        json: Print the summary as JSON.
    """
    if data is None:
        return run_stages(("analyze",), input, self.overrides, as_json=json)
    if self.overrides:
        flags = ", ".join(f"--{key}" for key in self.overrides)
        raise ConfigError(f"{flags}: no effect together with --data. Leave out the one or the other.")

    from json import dumps

    from autoseg.analyzer import analyze_folder

    analysis = analyze_folder(data)
    show(dumps(analysis.summary(), indent=1) if json else analysis.text())
    return 2 if analysis.faults else 0


@_documented("pretrain")
def pretrain(
    self: HasOverrides,
    *,
    input: Path | None = None,
    algo: AlgoName | None = None,
    fold: int | None = None,
    wait: bool = False,
) -> int:
    """Run the stage, or do one planned pretraining as a worker.

    Args:
        input: The settings; input.yaml where not given.
        algo: With --work_dir alone: this network's pretraining, and no more.
        fold: With --work_dir alone: that of this fold; 0 where one is for all folds.
        wait: Where another process is working on it, wait for it instead of ending.
    """
    if algo is None and fold is None:
        if wait:
            raise ConfigError("--wait: no effect without --algo and --fold. Leave it out.")
        return run_stages(("pretrain",), input or INPUT, _own_budget(self.overrides))
    from autoseg.pipeline.worker import is_planned

    if algo is None or fold is None or input is not None or not is_planned(self.overrides):
        raise ConfigError(
            "--algo and --fold: together they name one planned pretraining, with no other settings. Give the run's "
            "folder with --work_dir, or leave both out to do all of the stage; --algos names networks."
        )
    if fold < 0:
        raise ConfigError(f"--fold: expected a whole number >= 0, found {fold}.")
    from autoseg.pipeline.pretraining import work_on_pretraining
    from autoseg.pipeline.worker import value_of

    device, workers = (value_of(self.overrides, key) for key in ("device", "num_workers"))
    root = Path(self.overrides["work_dir"])
    return work_on_pretraining(root, algo, fold, device=device, num_workers=workers, wait=wait)


def _own_budget(overrides: Mapping[str, str]) -> dict[str, str]:
    """The settings of `autoseg pretrain`: a budget that is given to it alone is its own, and no run's.

    Raises:
        ConfigError: It has two of them.
    """
    own, words = "pretrain.budget", dict(overrides)
    if "budget" in words:
        if own in words:
            raise ConfigError(f"--budget and --{own}: both say how long `autoseg pretrain` may take. Leave one out.")
        words[own] = words.pop("budget")
    return words


@_documented("train")
def train(
    self: HasOverrides,
    *,
    input: Path | None = None,
    algo: AlgoName | None = None,
    fold: int | None = None,
    again: bool = False,
    wait: bool = False,
    accept: bool = False,
) -> int:
    """Run the stage, or train one planned job as a worker.

    Args:
        input: The settings; input.yaml where not given.
        algo: This network only.
        fold: This fold only, from 0.
        again: Train from the start what is done already.
        wait: Where another process is working on the job, wait for it instead of ending.
        accept: Take trained weights as they are now, where they were changed on purpose after training.
    """
    if fold is not None and fold < 0:
        raise ConfigError(f"--fold: expected a whole number >= 0, found {fold}.")
    if algo is not None and fold is not None and input is None and not again and not accept:
        from autoseg.pipeline.worker import is_planned, work_alone

        if is_planned(self.overrides):
            return work_alone(self.overrides, algo, fold, wait=wait)
    return run_stages(("train",), input or INPUT, self.overrides, algo=algo, fold=fold, again=again, accept=accept)


@_documented("ensemble")
def ensemble(
    self: HasOverrides,
    *,
    input: Path | None = None,
    fold: int | None = None,
    part: str | None = None,
    wait: bool = False,
    accept: bool = False,
) -> int:
    """Run the stage, or score the held-out cases of one fold as a worker.

    Args:
        input: The settings; input.yaml where not given.
        fold: With --work_dir alone: merge and score the held-out cases of this fold, from 0, and no more.
        part: Of these cases a part, such as 2/3.
        wait: Where another process is working on them, wait for it instead of ending.
        accept: Take weights and plans as they are now, where they were changed on purpose after training.
    """
    if fold is None:
        if part is not None or wait:
            raise ConfigError(f"--{'wait' if part is None else 'part'}: no effect without --fold. Leave it out.")
        return run_stages(("ensemble",), input or INPUT, self.overrides, accept=accept)
    if accept:
        raise ConfigError("--accept: no effect together with --fold. Leave out the one or the other.")
    if fold < 0:
        raise ConfigError(f"--fold: expected a whole number >= 0, found {fold}.")
    from autoseg.pipeline.worker import is_planned

    if input is not None or not is_planned(self.overrides):
        raise ConfigError(
            "--fold: works on a planned run alone, with no other settings. Give its folder with --work_dir, or leave "
            "--fold out to do all of the stage."
        )
    from autoseg.pipeline.fold_tasks import read_part, work_on_fold
    from autoseg.pipeline.worker import value_of

    device = value_of(self.overrides, "device")
    return work_on_fold(Path(self.overrides["work_dir"]), read_part(fold, part), device=device, wait=wait)
