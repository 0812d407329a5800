"""What a run can say of itself, sentence by sentence: the one source of the methods section and of the model card.

Every figure is read from a file of the run by `Traced`. A sentence that a run has nothing to say for is empty.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autoseg.config.networks import LOCATOR
from autoseg.config.settings import NO_WEIGHTS, PRETRAINED
from autoseg.export.markdown import cell, listed, table
from autoseg.export.references import OPTIMIZERS, cited, network_cited, network_name
from autoseg.export.traced import Traced
from autoseg.workspace.workspace import Workspace

SUMMARY, STATS, SETTINGS, ENVIRONMENT = (
    "state/summary.json",
    "datastats.yaml",
    "settings.yaml",
    "state/environment.json",
)
FEWEST = 5
"""Patients of a group that a card shows: a smaller one may be a single person."""
NORMS = {
    "ct": "clipped to fixed bounds and standardised with the mean and standard deviation of the foreground",
    "mri": "standardised image by image",
    "pet": "standardised image by image",
    "meanstd": "standardised image by image",
    "meanstdtanh": "standardised image by image and passed through tanh",
    "range": "clipped to fixed bounds and scaled to the unit range",
    "none": "left as they are",
}
METRIC_WORDS = {
    "dice": "Dice",
    "nsd": "surface Dice",
    "hd95": "95th percentile of the Hausdorff distance (mm)",
    "asd": "average symmetric surface distance (mm)",
    "volume_error": "relative volume error",
}
"""Metrics that have a column; docs/metrics.md defines them."""


def _words_of(metric: str) -> str:
    """A metric in a sentence."""
    if metric in METRIC_WORDS:
        return METRIC_WORDS[metric]
    from autoseg.evaluation.scores import metric_named  # it loads SciPy

    return metric_named(metric).short_title


@dataclass(slots=True)
class Statements:
    """A finished run's sentences."""

    traced: Traced
    place: str = ""
    """Folder of the round they are about, from the run's, with a slash at the end; empty: the run's own."""

    @classmethod
    def of(cls, workspace: Workspace, *, marks: bool = True) -> Statements:
        """The sentences of a run, about its last finished round."""
        finished = workspace.finished()
        place = "" if finished.root == workspace.run else f"{finished.root.name}/"
        return cls(Traced(workspace.run, marks), place)

    # -- where things stand
    @property
    def _scores(self) -> str:
        return f"{self.place}ensemble/scores.json"

    @property
    def _spec(self) -> str:
        return f"{self.place}ensemble/ensemble.json"

    @property
    def _robustness_file(self) -> str:
        return f"{self.place}ensemble/robustness.json"

    @property
    def _datalist(self) -> str:
        return f"{self.place}datalist.json"

    @property
    def _is_scored(self) -> bool:
        return self.traced.read(self._scores) is not None

    def setting(self, key: str) -> Any:
        """A setting of the run; None where it is not known."""
        return self.traced.get(SETTINGS, key, "value")

    @property
    def members(self) -> list[tuple[str, int]]:
        """Network and fold of each model of the chosen combination."""
        return [(str(algo), int(fold)) for algo, fold in self.traced.get(self._spec, "members") or ()]

    @property
    def algos(self) -> list[str]:
        """The networks of the chosen combination."""
        return [algo for algo in dict.fromkeys(algo for algo, _ in self.members) if algo != LOCATOR]

    def _plan(self, algo: str) -> str:
        fold = next(fold for name, fold in self.members if name == algo)
        return f"{self.place}{algo}_{fold}/configs/hyper_parameters.yaml"

    @property
    def classes(self) -> list[str]:
        """Names of the classes, fit for Markdown."""
        return [cell(c["name"]) for c in self.traced.get(STATS, "data_set", "classes") or ()]

    # -- the data
    def data(self) -> str:
        """How many cases there are, of what size, with which classes."""
        t = self.traced
        if t.get(SUMMARY, "cases", "training") is None:
            return ""
        modality = cell(str(self.setting("modality") or ""))
        text = f"The data set holds {t.show(SUMMARY, 'cases', 'training')} labelled cases for training and internal"
        text += f" validation, {t.show(SUMMARY, 'cases', 'testing')} cases held back for testing"
        if t.get(SUMMARY, "cases", "validation"):
            text += f", {t.show(SUMMARY, 'cases', 'validation')} held back for validation"
        if t.get(SUMMARY, "cases", "unlabeled"):
            text += f", and {t.show(SUMMARY, 'cases', 'unlabeled')} unlabeled images"
        text += "."
        if t.get(STATS, "data_set", "num_channels") is None:
            return text
        text += (
            f" Images ({modality or 'modality not named'}) have {t.show(STATS, 'data_set', 'num_channels')} channel(s)"
        )
        text += f", a median size of {t.triple(STATS, 'data_set', 'shape', 'median', form='g')} voxels"
        text += f" and a median voxel size of {t.triple(STATS, 'data_set', 'spacing_mm', 'median', form='.3g')} mm"
        text += f" (10th to 90th percentile {t.triple(STATS, 'data_set', 'spacing_mm', 'percentile_10_0', form='.3g')}"
        text += f" to {t.triple(STATS, 'data_set', 'spacing_mm', 'percentile_90_0', form='.3g')} mm)."
        return text

    def class_table(self) -> str:
        """Classes with their cases and volumes."""
        t, rows = self.traced, []
        for i, name in enumerate(self.classes):
            key = ("data_set", "classes", i)
            volume = "-"
            if t.get(STATS, *key, "volume_ml", "median") is not None:
                low, high = (
                    t.show(STATS, *key, "volume_ml", p, form=".3g") for p in ("percentile_10_0", "percentile_90_0")
                )
                volume = f"{t.show(STATS, *key, 'volume_ml', 'median', form='.3g')} ({low} to {high})"
            rows.append([name, t.show(STATS, *key, "num_cases"), t.show(STATS, *key, "num_annotated"), volume])
        header = ["Class", "Cases with it", "Cases annotated for it", "Volume, ml: median (10th to 90th percentile)"]
        return table(header, rows) if rows else ""

    def exclusions(self) -> str:
        """Cases that the analysis set aside, and what it checks."""
        t = self.traced
        if t.get(SUMMARY, "quarantined") is None:
            return ""
        text = "Files were checked for damage, grids that do not fit, values that are not labels, and outliers"
        text += f" before training: {t.show(SUMMARY, 'faults', of='count')} faults and"
        text += f" {t.show(SUMMARY, 'warnings', of='count')} warnings; {t.show(SUMMARY, 'quarantined', of='count')}"
        return text + " cases were set aside for a fault."

    def annotation(self) -> str:
        """Which classes cases were annotated for."""
        t = self.traced
        groups = t.get(STATS, "label_groups")
        if groups is None:
            return ""
        if len(groups) == 1:
            return "All cases were annotated for the same classes."
        strategy = cell(str(self.setting("strategy") or ""))
        return (
            f"Cases were annotated for different classes, in {t.show(STATS, 'label_groups', of='count')} "
            "groups. A class "
            f"that a case was not annotated for counted neither in training nor in scores (strategy: {strategy})."
        )

    @property
    def _has_patients(self) -> bool:
        """Whether a case names its patient."""
        return any("group" in case for case in self.traced.get(self._datalist, "training") or ())

    def partition(self) -> str:
        """How cases were divided, and at which level."""
        t = self.traced
        listed = t.get(self._datalist, "training")
        if not listed:
            return ""
        scored, whole = " Each case was scored", "; no patient is in two of them"
        if t.get(self._datalist, "validation") and all(case.get("fold") is None for case in listed):
            text = f"{t.show(self._datalist, 'training', of='count')} labelled cases were learned from and"
            text += f" {t.show(self._datalist, 'validation', of='count')} validated on, as the data list names them"
            scored, whole = " Each of the latter was scored", "; no patient is among both"
        else:
            folds = t.get(self._datalist, "training", "*", "fold", of="distinct")
            text = "Labelled cases were divided into"
            text += f" {t.show(self._datalist, 'training', '*', 'fold', of='distinct')} folds"
            if self.members and t.get(self._spec, "members", "*", 1, of="distinct") < folds:
                scored = f" Models were trained for {t.show(self._spec, 'members', '*', 1, of='distinct')} of them,"
                scored += " and cases of the others were not scored. Each of theirs was scored"
        by = self.setting("folds_by")
        if by:
            text += f" by {cell(str(by))}, so that models were scored on values of it that they had not seen"
        text += whole if self._has_patients else "; no case names a patient, so that cases count as independent"
        text += f".{scored} by models that had not been trained on it (out of fold)."
        if t.get(SUMMARY, "cases", "testing"):
            text += " Testing cases took no part in training or in any choice."
        return text

    # -- the model
    def preprocessing(self) -> str:
        """Resampling, intensities, cropping."""
        t = self.traced
        if not self.algos:
            return ""
        first = self._plan(self.algos[0])
        plans = {tuple(t.get(self._plan(a), "resample_resolution")): (a, self._plan(a)) for a in reversed(self.algos)}
        spacings = [
            f"voxels of {t.triple(plan, 'resample_resolution', form='.4g')} mm"
            + ("" if len(plans) == 1 else f" ({network_name(algo)})")
            for algo, plan in plans.values()
        ]
        axes = "right, anterior, superior axes" if t.get(first, "frame") is None else "axes of the data set's own"
        how = listed(list(dict.fromkeys(NORMS[channel["mode"]] for channel in t.get(first, "channels"))))
        crop = (
            " They were cropped to the box around their voxels other than 0." if t.get(first, "crop_foreground") else ""
        )
        return f"Images were turned to {axes} and resampled to {listed(spacings)}; intensities were {how}.{crop}"

    def networks(self) -> str:
        """The architectures, with where they were published."""
        if not self.algos:
            return ""
        names = [network_cited(a) for a in self.algos]
        return (
            f"We used {listed(names)}, as implemented in autoseg on MONAI {cited('monai')} and PyTorch "
            f"{cited('pytorch')}."
        )

    def training(self) -> str:
        """Patches, optimizer, schedule, loss, augmentation, of each network."""
        t, sentences = self.traced, []
        for algo in self.algos:
            plan = self._plan(algo)
            optimizer = t.get(plan, "optimizer")
            text = f"{network_name(algo)} was trained on patches of {t.triple(plan, 'roi_size', form='d')} voxels,"
            text += f" {t.show(plan, 'batch_size')} a step, with {OPTIMIZERS[optimizer]}"
            text += f" (learning rate {t.show(plan, 'learning_rate', form='g')}, weight decay"
            text += f" {t.show(plan, 'weight_decay', form='g')}, {t.get(plan, 'schedule')} schedule) and"
            loss = {"dice_ce": "Dice with cross-entropy", "dice_focal": "Dice with focal"}[t.get(plan, "loss")]
            text += f" {loss} loss {cited('dice_loss')}, for at most {t.show(plan, 'num_epochs')} epochs of"
            text += f" {t.show(plan, 'num_steps_per_epoch')} steps"
            if t.get(plan, "budget_s") is not None:
                text += f" or {t.show(plan, 'budget_s', form='.1f', unit=60)} minutes a model, whichever came first"
            text += f". Augmentation: {t.get(plan, 'augment')}"
            if t.get(plan, "ema_decay"):
                text += f"; weights were averaged over steps with a decay of {t.show(plan, 'ema_decay', form='g')}"
            text += "."
            sentences.append(text)
        return " ".join(sentences)

    def initial_weights(self) -> str:
        """What the networks started with."""
        if not self.algos:
            return ""
        given = self.setting("init_weights")
        sentences: list[str] = []
        started: dict[str, list[str]] = {}
        for algo in self.algos:
            if text := self._pretraining(algo, given):
                sentences.append(text)
                continue
            own = given.get(algo) if isinstance(given, Mapping) else given
            start = "random weights" if own in (None, NO_WEIGHTS) else "weights of an earlier training"
            started.setdefault(start, []).append(network_name(algo))
        is_one = len(started) == 1 and not sentences
        sentences += [
            f"{'Networks' if is_one else listed(names)} started with {start}." for start, names in started.items()
        ]
        seed = self.traced.show(SETTINGS, "seed", "value") if self.setting("seed") is not None else "not stored"
        return " ".join([*sentences, f"The seed was {seed}."])

    def _pretraining(self, algo: str, given: Any) -> str:
        """What a network learned from images before it saw a label; of the first fold, which the others are like."""
        own = given.get(algo) if isinstance(given, Mapping) else given
        if own not in (None, PRETRAINED):
            return ""
        t = self.traced
        folds = [fold for name, fold in self.members if name == algo]
        files = [f"pretraining/{algo}_{fold}/lesson.json" for fold in (folds[0], 0)]
        file = next((f for f in files if t.read(f) is not None), None)
        if file is None:
            return ""
        text = f"The encoder of {network_name(algo)} first learned, without labels, to "
        if t.get(file, "method") == "mae":
            text += f"draw what was masked ({t.show(file, 'mask_share', form='g')} of each patch, in blocks of"
            text += f" {t.show(file, 'mask_block')} voxels) {cited('mae')}"
        else:
            text += "repair two damaged views of a patch and to tell them from those of other patches"
            text += f" (temperature {t.show(file, 'temperature', form='g')}) {cited('contrastive')}"
        text += f", from {t.show(file, 'training', of='count')} images; {t.show(file, 'validation', of='count')} others"
        text += " decided which weights were kept"
        is_apart = not t.get(file, "for_all_folds") and len(folds) > 1
        text += (
            ", and each fold had a pretraining of its own, of which these are the first's numbers." if is_apart else "."
        )
        if t.get(file, "scored"):
            return text + (
                f" Among them were the images of {t.show(file, 'scored', of='count')} cases that models are scored on, "
                "so that scores may be a little too high."
            )
        return text + " No image of a case that its models are scored on was among them."

    def selection(self) -> str:
        """Which weights, which combination, which postprocessing, and how much the choice flatters."""
        t = self.traced
        if not self._is_scored:
            return ""
        by = _words_of(t.get(self._scores, "metric"))
        text = "Of each model the weights with the best Dice on its own fold were kept."
        models = f"{cell(t.get(self._scores, 'chosen'))}, {t.show(self._spec, 'members', of='count')} model"
        models += "s" * (len(self.members) != 1)
        if len(t.get(self._scores, "candidates")) == 1:
            text += f" One network was trained, so that no combination had to be chosen ({models})."
        else:
            text += (
                f" Of {t.show(self._scores, 'candidates', of='count')} combinations of networks the one with the best"
            )
            text += f" out-of-fold {by} was chosen ({models})."
        if self._is_chosen_on_one_fold:
            text += " With one fold there are no others to choose by, so how much the choice flatters is not known."
        if t.get(self._scores, "chosen_again", "dice", "mean") is not None:
            text += " Chosen again without the fold that is scored, its mean Dice is"
            text += f" {t.mean(self._scores, 'chosen_again', 'dice')}:"
            text += (
                " choosing on the same cases flatters by "
                f"{t.show(self._scores, 'chosen_again', 'optimism', form='.4f')}."
            )
        return text

    @property
    def _is_chosen_on_one_fold(self) -> bool:
        """Whether something was chosen on scored cases, and could not be chosen again without them."""
        t = self.traced
        chosen = len(t.get(self._scores, "candidates") or ()) > 1 or any(
            rule.get("gain") is not None for rule in t.get(self._spec, "postprocessing") or ()
        )
        return chosen and t.get(self._scores, "chosen_again") is None

    def ensembling(self) -> str:
        """How several models make one prediction, and what is done to its labels."""
        t = self.traced
        if not self.members:
            return ""
        how = "majority of their labels" if t.get(self._spec, "combine") == "vote" else "mean of their probabilities"
        text = f"Models are combined by the {how}" if len(self.members) > 1 else "One model speaks"
        text += f", with overlapping windows {cited('nnunet')}."
        rules = t.get(self._spec, "postprocessing") or ()
        chosen = listed([cell(rule["name"]) for rule in rules if rule.get("gain") is not None])
        given = listed([cell(rule["name"]) for rule in rules if rule.get("gain") is None])
        if chosen:
            text += f" Labels are cleaned by rules that surely raised the out-of-fold score, for {chosen}."
        if given:
            text += f" Labels of {given} are cleaned by rules that were set."
        return text if rules else f"{text} No postprocessing was chosen."

    # -- evaluation
    def metrics(self) -> str:
        """What was measured."""
        t = self.traced
        if not self._is_scored:
            return ""
        shown = listed([_words_of(m) for m in self._reported])
        text = f"We report {shown} {cited('metrics')}, class by class; means are over cases, then over classes. A class"
        text += " that is neither in the reference nor predicted does not count; in one of the two alone it has no"
        text += " overlap, and its distances are the image's diagonal."
        tolerance = t.get(self._scores, "tolerance_mm")
        if isinstance(tolerance, Mapping):
            each = [f"{t.show(self._scores, 'tolerance_mm', n, form='g')} mm for {cell(n)}" for n in tolerance]
            text += f" Surface Dice {cited('nsd')} accepts {listed(each)}."
        elif tolerance is not None:
            text += f" Surface Dice {cited('nsd')} accepts {t.show(self._scores, 'tolerance_mm', form='g')} mm."
        return text

    @property
    def _reported(self) -> list[str]:
        """Metrics that have a column: the usual ones, and that which decided."""
        names = dict.fromkeys([*METRIC_WORDS, self.traced.get(self._scores, "metric")])
        return [m for m in names if self.traced.get(self._scores, m, "mean") is not None]

    def statistics(self) -> str:
        """Intervals and tests."""
        if not self._is_scored:
            return ""
        return (
            "Intervals of 95 % are of the mean over patients, by Student's t with Hall's correction for skewness "
            f"{cited('hall')}; segmenters were compared on the same patients by Wilcoxon's signed-rank test "
            "and groups of "
            f"patients by the rank-sum test, p values corrected by Holm's method {cited('holm')}."
        )

    def results(self) -> str:
        """The headline of the internal validation."""
        t = self.traced
        if not self._is_scored:
            return ""
        text = f"Out of fold, over {self._cases('dice')}, the mean Dice was {t.mean(self._scores, 'dice')}"
        if t.get(self._scores, "chosen_again", "dice", "mean") is not None:
            text += f", and {t.mean(self._scores, 'chosen_again', 'dice')} where the combination and the postprocessing"
            text += " are chosen again without the fold that is scored"
            if t.get(self._scores, "chosen_again", "dice", "num_cases") != t.get(self._scores, "dice", "num_cases"):
                text += f" (of {t.show(self._scores, 'chosen_again', 'dice', 'num_cases')} cases)"
        return f"{text}."

    def _cases(self, *key: str) -> str:
        """How many cases a summary is of, and of how many patients where some have several."""
        t = self.traced
        text = f"{t.show(self._scores, *key, 'num_cases')} cases"
        patients = t.get(self._scores, *key, "num_patients")
        if patients is not None and patients < t.get(self._scores, *key, "num_cases"):
            text += f" of {t.show(self._scores, *key, 'num_patients')} patients"
        return text

    def score_table(self, *where: str) -> str:
        """Each class by each metric, with intervals, and the number of cases where it is not that of Dice.

        Args:
            where: the summaries stand in the file of scores; left out: those out of fold.
        """
        t = self.traced
        if not self._is_scored or t.get(self._scores, *where, "dice") is None:
            return ""
        keys: list[tuple[str, tuple[str | int, ...], str]] = [
            (cell(name), ("classes", i), "num") for i, name in enumerate(t.get(self._scores, "classes"))
        ]
        rows = []
        for name, key, num in [*keys, ("mean", (), "num_cases")]:
            cells = []
            for m in self._reported:
                text = t.mean(self._scores, *where, m, *key)
                if t.get(self._scores, *where, m, *key, num) != t.get(self._scores, *where, "dice", *key, num):
                    text += f"; n {t.show(self._scores, *where, m, *key, num)}"
                cells.append(text)
            rows.append([name, t.show(self._scores, *where, "dice", *key, num), *cells])
        return table(["Class", "n", *map(_words_of, self._reported)], rows)

    def external(self) -> str:
        """Cases that no model has learned from or was chosen by."""
        t = self.traced
        key = ("external", "metrics", "dice")
        if not self._is_scored or t.get(self._scores, *key, "mean") is None:
            return ""
        text = f"On {self._cases(*key)} held back the mean Dice was {t.mean(self._scores, *key)}"
        if t.get(self._scores, "external", "difference") is not None:
            text += f"; less that out of fold: {t.mean(self._scores, 'external', name='difference', form='+.3f')}"
        return text + "."

    def subgroup_table(self) -> str:
        """Dice by group of cases; groups of few patients are left out, since these texts travel."""
        t, rows = self.traced, []
        for i, group in enumerate(t.get(self._scores, "subgroups") or ()):
            if group["num_patients"] < FEWEST or group["mean"] is None:
                continue
            key = ("subgroups", i)
            p = t.show(self._scores, *key, "p", form=".2g") if group["p"] is not None else "-"
            name = f"{cell(str(group['factor']))}: {t.name(self._scores, *key, 'level')}"
            num = t.show(self._scores, *key, "num_patients")
            difference = (
                t.show(self._scores, *key, "difference", form="+.3f") if group["difference"] is not None else "-"
            )
            rows.append([name, num, t.mean(self._scores, *key), difference, p])
        return table(["Group", "Patients", "Dice", "Difference to the rest", "p (Holm)"], rows) if rows else ""

    def failures(self) -> str:
        """What went wrong, and where to look."""
        t = self.traced
        if not self._is_scored:
            return ""
        return (
            f"{t.show(self._scores, 'failures', of='count')} cases could not be scored. The report shows the "
            "worst case, "
            f"and {t.show(self._scores, 'suspicious', of='count')} classes of cases whose labels the out-of-fold "
            "predictions contradict; they were left as they are."
        )

    def sample_size(self) -> str:
        """How many cases scores rest on."""
        t = self.traced
        if t.get(SUMMARY, "cases", "training") is None:
            return ""
        but = " but those that were set aside for a fault" if t.get(SUMMARY, "quarantined") else ""
        num = t.show(SUMMARY, "cases", "training")
        return f"All {num} labelled cases were used{but}; none was left out for its score."

    def class_words(self) -> str:
        """What was segmented."""
        return f"Masks of {listed(self.classes)}." if self.classes else ""

    def imbalance(self) -> str:
        """How rare classes are seen in training."""
        t = self.traced
        if not self.algos:
            return ""
        share = t.show(self._plan(self.algos[0]), "foreground_fraction", form="g")
        return (
            f"A share of {share} of the training patches was centred on voxels of a class drawn at random, "
            "whatever its size."
        )

    def subgroup_words(self) -> str:
        """Whether groups of cases were compared, and what came of it."""
        t = self.traced
        if not t.get(self._scores, "subgroups"):
            return ""
        return (
            f"Dice was compared between {t.show(self._scores, 'subgroups', of='count')} groups of cases, "
            "each with the rest."
        )

    def calibration(self) -> str:
        """How far probabilities can be believed, before and after one temperature."""
        t, key = self.traced, ("temperature",)
        if t.get(self._scores, *key, "error_before") is None:
            return ""
        text = f"The expected calibration error of the probabilities {cited('calibration')} was"
        text += f" {t.show(self._scores, *key, 'error_before', form='.4f')} and"
        text += (
            f" {t.show(self._scores, *key, 'error_after', form='.4f')} after dividing logits by a temperature that was"
        )
        return (
            text
            + f" fitted without the fold it is scored on ({t.show(self._scores, *key, 'value', form='.3f')} on all)."
        )

    def predicted_quality(self) -> str:
        """How well it is told which predictions to look at."""
        t, key = self.traced, ("quality", "check")
        if t.get(self._scores, *key, "error") is None:
            return ""
        text = (
            "The Dice of a prediction is itself predicted, from how sure the models are and how far the image is from"
        )
        text += (
            f" the training images; this was learned from {t.show(self._scores, *key, 'num_cases')} cases out of fold"
        )
        text += f" and {t.show(self._scores, *key, 'num_copies')} copies that were corrupted on purpose. For cases that"
        text += f" it had not seen it was {t.show(self._scores, *key, 'error', form='.3f')} off on average"
        if t.get(self._scores, *key, "spearman") is not None:
            text += f" (Spearman's correlation with the true Dice {t.show(self._scores, *key, 'spearman', form='.2f')}"
            if t.get(self._scores, *key, "num_copies") and t.get(self._scores, *key, "spearman_all") is not None:
                text += f", with the copies {t.show(self._scores, *key, 'spearman_all', form='.2f')}"
            text += ")"
        if t.get(self._scores, *key, "covered") is not None:
            text += (
                f", and a share of {t.show(self._scores, *key, 'covered', form='.2f')} of the classes' Dice lay within"
            )
            text += " intervals of 90 %"
        return text + "."

    def flags(self) -> str:
        """What users are told of a prediction that is to be doubted."""
        if self.traced.get(self._scores, "quality", "check") is None:
            return ""
        return (
            "With predictions comes a table, quality.csv: the Dice that each class is likely to have, the worst first, "
            "and a flag with its reason where an image is not like the training images."
        )

    def robustness(self) -> str:
        """What changed images cost."""
        t = self.traced
        rows = t.get(self._robustness_file, "changes") or ()
        if not rows or None in (t.get(self._robustness_file, "dice"), *(r["dice"] for r in rows)):
            return ""
        num = t.show(self._robustness_file, "cases", of="count")
        plain = t.show(self._robustness_file, "dice", form=".3f")
        changed = [
            f"{cell(r['words'])} {t.show(self._robustness_file, 'changes', i, 'dice', form='.3f')}"
            for i, r in enumerate(rows)
        ]
        return (
            f"On {num} held-out cases the mean Dice was {plain} as they are, and with changed images: "
            f"{listed(changed)}."
        )

    # -- the machine
    def software(self) -> str:
        """Versions and machine."""
        t = self.traced
        environment = t.read(ENVIRONMENT)
        if environment is None:
            return ""
        names = ("autoseg", "Python", "torch", "monai", "numpy", "scipy")
        packages = [f"{n} {t.show(ENVIRONMENT, n)}" for n in names if n in environment]
        machine = [t.show(ENVIRONMENT, key) for key in ("GPU", "processor", "memory") if key in environment]
        return f"Software: {listed(packages)}. Machine: {'; '.join(machine)}."

    def limits(self) -> list[str]:
        """What the figures cannot say."""
        limits = []
        if self._is_scored and self.external():
            limits.append(
                "Whether the cases held back come from another hospital, scanner or time, no file says: if not, they "
                "are an internal test, and cases from elsewhere can be harder."
            )
        elif self._is_scored:
            limits.append(
                "All scores are of cases from the same data set, out of fold; no external cases with a label "
                "were scored. "
                "Cases of another hospital, scanner or disease can be harder."
            )
        if self._is_scored:
            limits.append("Weights were kept by the Dice of the fold that they are scored on, which flatters a little.")
        if self.traced.get(self._datalist, "training") and not self._has_patients:
            limits.append("Scans of one patient, if there are any, count as independent: intervals may be too narrow.")
        if self.traced.get(self._scores, "gaps"):
            limits.append("Some planned models were not trained; scores are without them.")
        return limits
