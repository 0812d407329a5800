"""What a sweep found: a table, the best settings as YAML, plots."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import yaml
from optuna.trial import FrozenTrial, TrialState
from pydantic import JsonValue

from autoseg.errors import counted
from autoseg.sweep.study import Study
from autoseg.terminal import printable
from autoseg.workspace.files import write_atomic, write_json, write_text
from autoseg.workspace.stored import Stored, read_stored

log = logging.getLogger(__name__)

ROWS = 10


class TrialFile(Stored):
    """What stands in a trial's trial.json."""

    number: int
    algo: str
    settings: dict[str, JsonValue]
    """Its values, dotted inside a block."""


def settings_text(algo: str, values: Mapping[str, Any], comment: str) -> str:
    """A trial's settings as `autoseg run --settings FILE` takes them."""
    nested: dict[str, Any] = {"algos": [algo]}
    for key, value in values.items():
        block, _, name = key.rpartition(".")
        (nested.setdefault(block, {}) if block else nested)[name] = value
    return f"# {printable(comment, one_line=True)}\n" + yaml.safe_dump(nested, sort_keys=False, default_flow_style=None)


def best_trials(study: Study) -> list[FrozenTrial]:
    """The best finished trial; with two objectives all that none beats in both, the highest Dice first."""
    finished = study.optuna.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not finished:
        return []
    return sorted(
        study.optuna.best_trials, key=lambda t: (-t.values[study.settings.objectives.index("dice")], t.number)
    )[: None if len(study.settings.objectives) > 1 else 1]


def write_results(study: Study) -> str:
    """Write best.yaml, trials.json and the plots; return the table."""
    trials = study.optuna.get_trials(deepcopy=False)
    best = best_trials(study)
    counts = {state: sum(t.state == state for t in trials) for state in TrialState}
    words = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "stopped early", TrialState.FAIL: "failed"}
    epochs = sum(t.user_attrs.get("epochs", 0) for t in trials)
    summary = ", ".join(f"{counts[s]} {w}" for s, w in words.items())
    rows = [trial_record(study, t) for t in trials if t.state != TrialState.WAITING]
    write_json(study.folder / "trials.json", {"objectives": list(study.settings.objectives), "trials": rows})
    for trial in best:
        name = "best.yaml" if trial is best[0] else f"pareto_{trial.number:04d}.yaml"
        write_text(
            study.folder / name, (study.trial_folder(trial.number) / "settings.yaml").read_text(encoding="utf-8")
        )
    _plot(study, [t for t in trials if t.state == TrialState.COMPLETE])
    lines = [f"Sweep {study.settings.study}: {counted(len(rows), 'trial')}: {summary}; {counted(epochs, 'epoch')}", ""]
    lines += _table(study, best, trials)
    if best:
        lines += ["", f"Best settings: {study.folder / 'best.yaml'}"]
        lines.append("`autoseg run --settings` with this file trains all folds with them.")
    return "\n".join(lines)


def trial_record(study: Study, trial: FrozenTrial) -> dict[str, Any]:
    """A trial as plain data: state, values, settings, curve."""
    path = study.trial_folder(trial.number) / "trial.json"
    return {
        "number": trial.number,
        "state": trial.state.name.lower(),
        "values": trial.values,
        "settings": read_stored(path, TrialFile).settings if path.exists() else {},
        "curve": {str(step): value for step, value in trial.intermediate_values.items()},
        "epochs": trial.user_attrs.get("epochs", 0),
        "error": trial.user_attrs.get("error", ""),
    }


def _table(study: Study, best: list[FrozenTrial], trials: list[FrozenTrial]) -> list[str]:
    front = {t.number for t in best}
    dice = study.settings.objectives.index("dice") if "dice" in study.settings.objectives else 0
    finished = sorted((t for t in trials if t.state == TrialState.COMPLETE), key=lambda t: -t.values[dice])
    failed = [t for t in trials if t.state == TrialState.FAIL]
    lines = ["Trial  " + "  ".join(f"{name:>11}" for name in study.settings.objectives) + "  Settings"]
    for trial in finished[:ROWS]:
        values = "  ".join(f"{value:11.4f}" for value in trial.values)
        mark = "*" if trial.number in front else " "
        record = trial_record(study, trial)["settings"]
        text = ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in record.items()
        )
        lines.append(f"{trial.number:>4} {mark} {values}  {text}")
    if len(finished) > ROWS:
        lines.append(f"and {len(finished) - ROWS} more in trials.json")
    lines += [f"trial {t.number} failed: {t.user_attrs.get('error', '').splitlines()[0]}" for t in failed[:ROWS]]
    return lines


def _plot(study: Study, finished: list[FrozenTrial]) -> None:
    """history.png, importance.png, parallel.png; with two objectives pareto.png and one each of the others for Dice."""
    if not finished:
        return
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from optuna.visualization import matplotlib as plots

    two = len(study.settings.objectives) > 1
    dice = study.settings.objectives.index("dice") if "dice" in study.settings.objectives else 0
    target = {"target": lambda t: t.values[dice], "target_name": "Dice"} if two else {"target_name": "Dice"}
    kinds: dict[str, Any] = {
        "history": lambda: plots.plot_optimization_history(study.optuna, **target),
        "importance": lambda: plots.plot_param_importances(study.optuna, **target),
        "parallel": lambda: plots.plot_parallel_coordinate(study.optuna, **target),
    }
    if two:
        kinds["pareto"] = lambda: plots.plot_pareto_front(study.optuna, target_names=list(study.settings.objectives))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, plot in kinds.items():
            path = study.folder / "plots" / f"{name}.png"
            try:
                axes = plot()
            except (RuntimeError, ValueError) as error:  # all trials alike: nothing has any importance
                log.info("sweep: no plot of %s: %s", name, error)
                continue
            figure: Any = axes.figure
            write_atomic(path, partial(figure.savefig, format="png", dpi=120, bbox_inches="tight"))
            plt.close("all")
