"""The search space: which settings a sweep may try, checked against what each setting can be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from autoseg.config.docs import SettingDoc, setting_docs
from autoseg.config.hyperparameters import HyperSettings
from autoseg.config.networks import ALGOS, AlgoName
from autoseg.config.nodes import json_for_yaml
from autoseg.config.reader import read_value
from autoseg.config.settings import Range, Settings
from autoseg.config.types import members, strip_annotated, suggest
from autoseg.errors import ConfigError
from autoseg.plan import Plan

NETWORK = "algo"
"""Name of the parameter that chooses the network."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One setting that is searched."""

    key: str
    """Dotted under a network."""
    distribution: BaseDistribution
    """Categories are JSON texts, so that lists can be among them."""

    @property
    def algo(self) -> str:
        """The network whose setting it is; empty: every network's."""
        return self.key.partition(".")[0] if "." in self.key else ""

    @property
    def name(self) -> str:
        """The setting's name without its network."""
        return self.key.rpartition(".")[2]

    def value(self, drawn: Any) -> Any:
        """The setting's value, from Optuna's."""
        return json.loads(drawn) if isinstance(self.distribution, CategoricalDistribution) else drawn

    def drawn(self, value: Any) -> Any:
        """Optuna's value for a setting's; None where the space does not have it."""
        if isinstance(self.distribution, CategoricalDistribution):
            text = json.dumps(value)
            return text if text in self.distribution.choices else None
        assert isinstance(self.distribution, FloatDistribution | IntDistribution)
        if not isinstance(value, int | float) or not self.distribution.low <= value <= self.distribution.high:
            return None
        steps = (value - self.distribution.low) / self.distribution.step if self.distribution.step else 0.0
        return value if abs(steps - round(steps)) < 1e-9 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """All that is searched."""

    algos: tuple[AlgoName, ...]
    parameters: tuple[Parameter, ...]

    def suggest(self, trial: optuna.Trial) -> tuple[AlgoName, dict[str, Any]]:
        """Draw a network and values for the settings that it has; a trial taken over keeps what it drew."""
        algo: AlgoName = self.algos[0]
        if len(self.algos) > 1:
            algo = trial.suggest_categorical(NETWORK, self.algos)
        values = {}
        for parameter in self.parameters:
            if parameter.algo in ("", algo):
                values[parameter.key] = parameter.value(_suggest(trial, parameter))
        return algo, values

    def of_plan(self, plan: Plan) -> dict[str, Any]:
        """What Optuna would have drawn for a plan, as far as the space has its values."""
        drawn_values: dict[str, Any] = {NETWORK: plan.algo} if len(self.algos) > 1 else {}
        flat = {**plan.model_dump(mode="json"), **plan.network}
        for parameter in self.parameters:
            if parameter.algo in ("", plan.algo) and parameter.name in flat:
                drawn = parameter.drawn(flat[parameter.name])
                if drawn is not None:
                    drawn_values[parameter.key] = drawn
        return drawn_values

    def identity(self) -> dict[str, str]:
        """What makes two searches the same, by name."""
        ranges = {p.key: json.dumps(optuna.distributions.distribution_to_json(p.distribution)) for p in self.parameters}
        return {"algos": json.dumps(self.algos), **{f"parameter {key}": text for key, text in ranges.items()}}


def _suggest(trial: optuna.Trial, parameter: Parameter) -> Any:
    """Optuna's value for one parameter."""
    d = parameter.distribution
    if isinstance(d, CategoricalDistribution):
        return trial.suggest_categorical(parameter.key, d.choices)
    if isinstance(d, IntDistribution):
        return trial.suggest_int(parameter.key, d.low, d.high, step=d.step, log=d.log)
    assert isinstance(d, FloatDistribution)
    return trial.suggest_float(parameter.key, d.low, d.high, step=d.step, log=d.log)


def read_space(settings: Settings, origins: Mapping[str, str]) -> Space:
    """Check the search space of the settings.

    Raises:
        ConfigError: All that is wrong with it: unknown settings, values a setting cannot have, nothing to search.
    """
    docs = {key: doc for key, doc in setting_docs().items() if _is_hyper(doc)}
    faults: list[str] = []
    parameters = []
    for key, values in settings.sweep.parameters.items():
        place = origins.get(f"sweep.parameters.{key}", "")
        where = f"{place}: sweep.parameters.{key}" if ":" in place else f"sweep.parameters.{key}"
        try:
            parameters.append(Parameter(key=key, distribution=_distribution(key, values, docs)))
            _check_effect(key, settings, origins)
        except ConfigError as error:
            faults += [f"{where}: {message}" for message in error.messages]
    if not settings.sweep.parameters and len(settings.networks) == 1:
        faults.append(
            "sweep.parameters: nothing to search. Name settings and their ranges, such as "
            "sweep: {parameters: {learning_rate: {low: 1e-4, high: 1e-2, log: true}}}."
        )
    if faults:
        raise ConfigError(faults)
    return Space(algos=settings.networks, parameters=tuple(parameters))


def _is_hyper(doc: SettingDoc) -> bool:
    name = doc.key.rpartition(".")[2]
    return name != "budget" and (doc.block in ALGOS or (not doc.block and name in HyperSettings.model_fields))


def _distribution(key: str, values: Range, docs: Mapping[str, SettingDoc]) -> BaseDistribution:
    """The range in Optuna's words. Raises ConfigError: the setting is unknown or cannot have these values."""
    if key not in docs:
        if key in setting_docs():
            raise ConfigError("is no hyperparameter. A sweep changes hyperparameters alone; see docs/settings.md.")
        raise ConfigError(f"unknown setting. {suggest(key, [k for k in docs if ('.' in k) == ('.' in key)])}")
    annotation = docs[key].annotation
    if values.choices is not None:
        for choice in values.choices:
            _check_value(key, choice, annotation)
        return CategoricalDistribution([json.dumps(choice) for choice in values.choices])
    assert values.low is not None
    assert values.high is not None
    kinds = {strip_annotated(member)[0] for member in members(annotation)}
    if not kinds & {int, float}:
        raise ConfigError(f"low and high are for numbers; this is {docs[key].type}. Give choices: [...].")
    if float in kinds:
        for number in (values.low, values.high):
            _check_value(key, number, annotation)
        return FloatDistribution(values.low, values.high, log=values.log, step=values.step)
    whole = [values.low, values.high, values.step if values.step is not None else 1.0]
    if not all(number.is_integer() for number in whole):
        raise ConfigError("the setting takes whole numbers. Give whole low, high and step.")
    low, high, step = map(int, whole)
    for number in range(low, high + 1, step) if high - low <= 10_000 * step else (low, high):
        _check_value(key, number, annotation)
    return IntDistribution(low, high, log=values.log, step=step)


def _check_value(key: str, value: Any, annotation: Any) -> None:
    try:
        read_value(key, json_for_yaml(value) if not isinstance(value, str) else value, annotation)
    except ConfigError as error:
        raise ConfigError([message.removeprefix(f"--{key}: ") for message in error.messages]) from None


def _check_effect(key: str, settings: Settings, origins: Mapping[str, str]) -> None:
    """Refuse a range that could change nothing."""
    algo, _, name = key.rpartition(".")
    if algo and algo not in settings.networks:
        raise ConfigError(f"has no effect: {algo} is not among algos ({', '.join(settings.networks)}).")
    if not algo:
        for other in settings.networks:
            if getattr(settings.network(other), name) is not None:
                place = origins.get(f"{other}.{name}", "input.yaml")
                raise ConfigError(f"has no effect on {other}, whose own {name} is set at {place}. Remove that one.")
