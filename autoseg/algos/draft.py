"""A plan in the making, and the one place that decides whose value a key gets.

User over recipe over template over rule: a rule's value is taken where the template says `<planner>` and neither the
user nor a recipe says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from autoseg.algos.inputs import PlanInputs
from autoseg.config.networks import NETWORKS, RECIPE_ALGO
from autoseg.config.templates import FILLED, recipe_values, template_values
from autoseg.networks.sizing import NetworkChoice, Sizing
from autoseg.plan import Origin, Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What measuring on the device changes in a plan; the defaults change nothing."""

    size: int = 0
    """Rung of the network's ladder (`Sizing.size`)."""
    batch_size: int | None = None
    roi_size: tuple[int, int, int] | None = None
    rule: str = ""
    """Why batch or patch differ from the formula's."""
    step_s: float | None = None
    """Measured seconds of a step."""
    memory_gib: float | None = None
    """Predicted peak of memory."""
    channels_last: bool | None = None
    """Whether that layout is the faster one; None: not measured."""


@dataclass(slots=True, kw_only=True)
class Draft:
    """What a plan is made from, and the values that rules have set so far, each with its origin."""

    inputs: PlanInputs
    fit: Fit
    user: dict[str, Any]
    """What the user fixed for this network."""
    recipe: dict[str, tuple[Any, str]]
    """The recipe's values and their sources; empty where no recipe is for this network."""
    template: dict[str, tuple[Any, str]]
    """The template's fixed values and the reasons for them."""
    origins: dict[str, Origin] = field(default_factory=dict)
    """Key of the plan -> value and where it came from; the network's own as `network.KEY`."""
    sizing: Sizing | None = None
    """What the network chose its size by."""
    choice: NetworkChoice | None = None
    """What it chose."""

    @classmethod
    def begin(cls, inputs: PlanInputs, fit: Fit) -> Draft:
        """A draft that has the template's fixed values, or the user's or recipe's in their place."""
        template = {key: fixed for key, fixed in template_values(inputs.algo).items() if fixed[0] != FILLED}
        draft = cls(
            inputs=inputs,
            fit=fit,
            user=inputs.settings.hyper(inputs.algo),
            recipe=recipe_of(inputs),
            template=template,
        )
        for key, (value, rule) in template.items():
            draft.put(key, value, rule)
        return draft

    def __getitem__(self, key: str) -> Any:
        """The value of a key that is set."""
        return self.origins[key].value

    def put(self, key: str, value: Any, rule: str) -> None:
        """Set a key: to what user, recipe or template say, else to the rule's value."""
        setting = key.removeprefix("network.")
        if setting != key and setting not in NETWORKS[self.inputs.algo].own.model_fields:
            setting = ""  # a value that the network chooses and no user can set
        if (user := self.user.get(setting)) is not None:
            self.set(key, user, self.place(setting))
        elif key in self.recipe:
            value, source = self.recipe[key]
            self.set(key, value, self.recipe_name, source)
        elif key in self.template:
            value, reason = self.template[key]
            self.set(key, value, "template", reason)
        else:
            self.set(key, value, "planner", rule)

    def set(self, key: str, value: Any, origin: str, rule: str = "") -> None:
        """Set a key, whoever else has a word on it."""
        self.origins[key] = Origin(value=_plain(value), origin=origin, rule=rule)

    def fixed(self, key: str) -> Any:
        """What user, recipe or template say of a key of the plan, in that order; None where they leave it to a rule."""
        if self.user.get(key) is not None:
            return self.user[key]
        return (self.recipe.get(key) or self.template.get(key) or (None, ""))[0]

    def place(self, setting: str) -> str:
        """Where the user set a hyperparameter."""
        origins = self.inputs.origins
        return origins.get(f"{self.inputs.algo}.{setting}") or origins.get(setting, "input.yaml")

    @property
    def recipe_name(self) -> str:
        """The recipe, as an origin."""
        return f"recipe {self.inputs.settings.recipe}"

    @property
    def network(self) -> dict[str, Any]:
        """The network's own values."""
        prefix = "network."
        return {key.removeprefix(prefix): self[key] for key in self.origins if key.startswith(prefix)}

    def finish(self) -> Plan:
        """The plan. Raises pydantic's ValidationError where a rule made a value that no plan may have: a bug."""
        values = {key: origin.value for key, origin in self.origins.items() if not key.startswith("network.")}
        return Plan.model_validate({**values, "network": self.network})


def _plain(value: Any) -> Any:
    """A value with lists for its tuples, as files have them."""
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def recipe_of(inputs: PlanInputs) -> dict[str, tuple[Any, str]]:
    """What the recipe of the settings says for a job: key -> value and source; empty where it is another network's."""
    recipe = inputs.settings.recipe
    return recipe_values(inputs.algo, recipe) if RECIPE_ALGO.get(recipe) == inputs.algo else {}
