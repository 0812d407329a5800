"""Reporting checklists, item by item: what a run answers, and what only its authors can write.

The items' subjects are in our own words; the guidelines themselves explain each.
Source: CLAIM 2024 (Tejani et al. 2024), TRIPOD+AI (Collins et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from autoseg.export.markdown import table
from autoseg.export.statements import Statements

YOU = "**You must write**"


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One item of a checklist."""

    number: str
    subject: str
    answers: tuple[Callable[[Statements], str], ...] = ()
    """Sentences of the run that answer it, or a part of it."""
    left: str = ""
    """What the authors must add; empty: nothing, where the run answers."""

    def answer(self, run: Statements) -> str:
        """What the run says of it; empty: nothing."""
        return " ".join(text for answer in self.answers if (text := answer(run)))

    def to_write(self, run: Statements) -> str:
        """What the authors have to add; empty: nothing."""
        return self.left or ("" if self.answer(run) else "the run has nothing stored about it.")

    def text(self, run: Statements) -> str:
        """The answer as far as the run has one, and what is left to be written."""
        told, left = self.answer(run), self.to_write(run)
        return " ".join([*([told] if told else []), *([f"{YOU}: {left}"] if left else [])])


S = Statements


def _item(number: str, subject: str, *answers: Callable[[Statements], str], left: str = "") -> Item:
    return Item(number=number, subject=subject, answers=answers, left=left)


def _technology(run: Statements) -> str:
    return "Deep learning: convolutional or transformer networks for segmentation." if run.algos else ""


def _availability(run: Statements) -> str:
    return (
        "autoseg is open source (Apache-2.0); `autoseg pack` makes one file of the trained model." if run.algos else ""
    )


def _protocol(run: Statements) -> str:
    return (
        "`report.html`, `input.yaml` and each model's `configs/hyper_parameters.yaml` in the run's folder hold every "
        "setting with its origin."
        if run.algos
        else ""
    )


def _output(run: Statements) -> str:
    names = ", ".join(run.classes)
    return f"A label for each voxel of the image, of the classes {names}." if names else ""


CLAIM: tuple[Item, ...] = (
    _item("1", "Title: AI, and of which kind", _technology, left="the title."),
    _item("2", "Abstract", left="a structured summary."),
    _item("3", "Background, intended use and role", left="the clinical question and what the model is for."),
    _item("4", "Aims and hypotheses", left="what was to be shown."),
    _item("5", "Prospective or retrospective", left="which, and why."),
    _item("6", "Goal of the study", left="such as a feasibility study or a comparison."),
    _item("7", "Sources of data", S.data, left="where the images come from, when, and under which approval."),
    _item("8", "Inclusion and exclusion", S.exclusions, left="the criteria, and how cases were found."),
    _item("9", "Preprocessing", S.preprocessing, left="what was done to images before they came into the list."),
    _item("10", "Choice of subsets of the data", left="whether images, slices or regions were selected, and by whom."),
    _item("11", "De-identification", left="how, and where it was checked. autoseg reads no patient's name."),
    _item("12", "Missing data", S.annotation, left="images or facts of patients that were missing."),
    _item("13", "Acquisition", left="scanners, sequences or protocols."),
    _item("14", "Reference standard: definition", left="how the labels were drawn, in enough detail to do it again."),
    _item("15", "Reference standard: why this one", left="why it is right for the question."),
    _item("16", "Reference standard: annotators", left="who drew, with which training and tool."),
    _item("17", "Annotation of the test set", left="whether it differed from that of the training cases."),
    _item("18", "Variability between and within raters", left="how much annotators differ; scores cannot be above it."),
    _item("19", "How cases were assigned to partitions", S.partition),
    _item("20", "Level at which partitions are disjoint", S.partition),
    _item("21", "Intended sample size", S.sample_size, left="why this number of cases is enough."),
    _item("22", "Model", S.networks, S.training),
    _item("23", "Software", S.software),
    _item("24", "Initialisation", S.initial_weights),
    _item("25", "Training", S.training),
    _item("26", "Selection of the final model", S.selection),
    _item("27", "Ensembling", S.ensembling),
    _item("28", "Metrics", S.metrics, left="why these fit the clinical question."),
    _item("29", "Uncertainty and significance", S.statistics, S.predicted_quality),
    _item("30", "Robustness", S.robustness),
    _item("31", "Explainability", left="whether anything was done; autoseg does nothing for it."),
    _item("32", "Internal evaluation", S.results),
    _item(
        "33", "External evaluation", S.external, left="whether these cases come from elsewhere; else they are internal."
    ),
    _item("34", "Registration", left="number and registry, if any."),
    _item(
        "35", "Numbers included and excluded", S.data, S.exclusions, left="the flow before cases came into the list."
    ),
    _item("36", "Characteristics of each partition", left="age, sex, diseases, by partition."),
    _item("37", "Performance with uncertainty", S.results, S.external),
    _item("38", "Diagnostic performance", left="if masks lead to a diagnosis: its accuracy, with intervals."),
    _item("39", "Failure analysis", S.failures, left="what the failures have in common."),
    _item("40", "Limitations", lambda run: " ".join(run.limits()), left="those of your study."),
    _item("41", "Implications and role", left="what follows for practice."),
    _item("42", "Protocol and further details", _protocol),
    _item(
        "43", "Availability of software, model, data", _availability, left="where yours are, and under which licence."
    ),
    _item("44", "Funding", left="sources, and their role."),
)
"""CLAIM 2024, 44 items."""

TRIPOD_AI: tuple[Item, ...] = (
    _item("1", "Title", left="that a model was developed or evaluated, for whom, with which outcome."),
    _item("2", "Abstract", left="by TRIPOD+AI for abstracts."),
    _item("3a", "Health care context", left="the clinical question, and models that exist."),
    _item("3b", "Population and users", left="in whom, where in the pathway, by whom."),
    _item("3c", "Known inequalities", left="between which groups of patients care or outcome is known to differ."),
    _item("4", "Objectives", left="development, evaluation, or both."),
    _item("5a", "Sources of data", S.data, left="where they come from, and whom they represent."),
    _item("5b", "Dates", left="first and last date of the images."),
    _item("6a", "Setting", left="kind, number and place of the centres."),
    _item("6b", "Eligibility", S.exclusions, left="the criteria."),
    _item("6c", "Treatments", left="those given, where they change the images."),
    _item(
        "7",
        "Data preparation",
        S.preprocessing,
        S.exclusions,
        left="what was done before, and whether it was alike for all groups of patients.",
    ),  # fmt: skip
    _item("8a", "Outcome", S.class_words, left="how the labels were made."),
    _item("8b", "Assessors of the outcome", left="who drew the labels, with which training."),
    _item("8c", "Blinding of the outcome", left="what annotators knew when they drew."),
    _item("9a", "Choice of predictors", left="why these images."),
    _item("9b", "Definition of predictors", S.preprocessing, left="how the images were taken."),
    _item("9c", "Assessors of predictors", left="nobody, where the images alone go in; else who."),
    _item("10", "Sample size", S.sample_size, left="why this number is enough."),
    _item("11", "Missing data", S.annotation, left="images or facts of patients that were missing."),
    _item("12a", "Use of the data", S.partition),
    _item("12b", "Handling of predictors", S.preprocessing),
    _item("12c", "Type of model and how it was built", S.networks, S.training, S.selection),
    _item("12d", "Differences between clusters", S.subgroup_words, left="why these groups."),
    _item("12e", "Measures of performance", S.metrics, S.statistics, S.calibration),
    _item("12f", "Updating", left="whether the model was changed after evaluation."),
    _item("12g", "How predictions are computed", S.ensembling),
    _item("13", "Class imbalance", S.imbalance),
    _item("14", "Fairness", S.subgroup_words, left="which groups matter, and why."),
    _item("15", "Output of the model", _output),
    _item("16", "Training against evaluation data", S.partition, left="how setting and eligibility differ."),
    _item("17", "Ethical approval", left="committee and number, consent or its waiver."),
    _item("18a", "Funding", left="sources, and their role."),
    _item("18b", "Conflicts of interest", left="of all authors."),
    _item("18c", "Protocol", _protocol, left="where the study's protocol is."),
    _item("18d", "Registration", left="number and registry, or that there is none."),
    _item("18e", "Sharing of data", left="whether, where, how."),
    _item("18f", "Sharing of code", _availability, left="where yours is."),
    _item("19", "Patients and public", left="their part in the study, or that they had none."),
    _item("20a", "Flow of participants", S.data, S.exclusions, left="the flow before cases came into the list."),
    _item("20b", "Characteristics", left="age, sex, diseases, overall and by centre."),
    _item("20c", "Development against evaluation", left="how characteristics are distributed in each."),
    _item("21", "Participants in each analysis", S.results, S.external),
    _item("22", "Specification of the model", _protocol, _availability),
    _item("23a", "Performance with intervals", S.results, S.external, S.subgroup_words),
    _item("23b", "Heterogeneity between clusters", S.subgroup_words),
    _item("24", "Updating: results", left="those of an updated model, if there is one."),
    _item("25", "Interpretation", left="what the results mean, with fairness and earlier studies in view."),
    _item("26", "Limitations", lambda run: " ".join(run.limits()), left="those of your study."),
    _item(
        "27a",
        "Poor or missing input",
        S.flags,
        left="what users do with such images. Files that are damaged are refused.",
    ),
    _item("27b", "Users' part and skill", left="who checks the masks, with which training."),
    _item("27c", "Next steps", left="what has to be shown before use."),
)
"""TRIPOD+AI, 27 items with their parts."""


def checklist(items: Sequence[Item], run: Statements) -> str:
    """A checklist as a table."""
    return table(["Item", "Subject", "Answer"], [[i.number, i.subject, i.text(run)] for i in items])
