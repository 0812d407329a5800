"""Rules for what changes nothing about the model: where cases are kept, what was measured; and the seed."""

from __future__ import annotations

from autoseg.algos.draft import Draft


def cache(draft: Draft) -> None:
    """Where preprocessed cases are kept. Source: the FLARE23 paper keeps them in memory."""
    draft.put("cache", "ram", "in memory, as far as half of what is free allows, the rest on disk (the FLARE23 paper)")
    draft.put("cache_gib", None, "half of what is free")


def measured_cost(draft: Draft) -> None:
    """Time and memory of a step, where one was measured."""
    fit = draft.fit
    rule = "measured by a step on the device that planned" if fit.step_s is not None else "not measured"
    draft.put("step_s", fit.step_s and float(f"{fit.step_s:.3g}"), rule)
    draft.put("memory_gib", fit.memory_gib and round(fit.memory_gib, 2), rule)
    layout_rule = (
        "not measured, and taken for the faster" if fit.channels_last is None else "the faster of two, measured"
    )
    draft.put("channels_last", fit.channels_last, layout_rule)


def seed(draft: Draft) -> None:
    """A seed of the job's own."""
    number = draft.inputs.settings.seed * 1000 + draft.inputs.fold
    draft.set("seed", number, "planner", "1000 x seed of input.yaml + fold")
