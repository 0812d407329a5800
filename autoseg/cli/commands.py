"""The commands: each a method with its arguments and its documentation; no logic of their own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from autoseg.cli.stage_commands import INPUT, run_stages, stage_commands
from autoseg.errors import ConfigError
from autoseg.terminal import show

if TYPE_CHECKING:
    from autoseg.config.networks import AlgoName
    from autoseg.config.settings import FormatName
    from autoseg.export.targets import TargetName
    from autoseg.inference.cost import Limits

TAKES_SETTINGS = frozenset({"run", *stage_commands(), "retry", "sweep", "plan", "learning_curve"})
"""Commands that accept any setting of input.yaml as a flag."""

_WORK_DIR = Path("work_dir")


class Commands:
    """What `autoseg` can do; a public method is a command."""

    def __init__(self, overrides: Mapping[str, str]) -> None:
        self.overrides = overrides

    def run(self, *, input: Path = INPUT, settings: Path | None = None, accept: bool = False) -> int:
        """Do all stages in their order; only what is missing or whose inputs changed.

        Args:
            input: The settings; `autoseg init` writes it.
            settings: More settings, which win over those of input.yaml, such as the best.yaml of a sweep.
            accept: Take trained weights as they are now, where they were changed on purpose after training.

        Example:
            autoseg run --input input.yaml --budget 2h
        """
        from autoseg.pipeline.stages import PLAIN_RUN

        return run_stages(PLAIN_RUN, input, self.overrides, more_settings=settings, accept=accept)

    # One for each stage, in the order of their table; a class body's namespace is written through `vars()`.
    vars().update(stage_commands())

    def sweep(
        self, *, input: Path = INPUT, trials: int | None = None, budget: str | None = None, join: bool = False
    ) -> int:
        """Search for the best settings: the ranges under `sweep:` in input.yaml, by Optuna.

        Killed, the same command goes on. The best settings lie in work_dir/sweep/best.yaml.

        Args:
            input: The settings.
            trials: Trials to make, those that are stopped early included; else sweep.trials.
            budget: Time for the sweep, such as 4h; the trials that run at its end are stopped.
            join: Help with the sweep that was begun in --work_dir, from this machine.

        Example:
            autoseg sweep --input input.yaml --trials 50 --budget 4h
            autoseg sweep --work_dir work_dir --join
        """
        from autoseg.sweep.run import join_sweep, run_sweep

        if trials is not None and trials < 1:
            raise ConfigError(f"--trials: expected a whole number >= 1, found {trials}.")
        if join:
            words = self.overrides
            return join_sweep(Path(words.get("work_dir", _WORK_DIR)), words.get("sweep.study", "sweep"))
        code, text = run_sweep(input, self.overrides, trials=trials, budget=budget)
        show(text)
        return code

    def learning_curve(
        self,
        *,
        input: Path = INPUT,
        algo: AlgoName | None = None,
        points: int = 4,
        seeds: int = 2,
        at: str | None = None,
        budget: str | None = None,
    ) -> int:
        """Tell what more cases would bring: train on fewer, fit a power law, predict for more.

        Killed, the same command goes on. The trainings lie in work_dir/learning_curve.

        Args:
            input: The settings.
            algo: This network; else the fastest of the chosen ensemble.
            points: Sizes, each half of the next.
            seeds: Draws of the cases, each scored on another fold; more of them narrow the interval.
            at: Further numbers of cases to predict for, separated by commas.
            budget: Time for all trainings, such as 1h; else a fifth of the settings' budget, or as planned.

        Example:
            autoseg learning_curve --input input.yaml --budget 1h
        """
        from autoseg.pipeline.learning_curve import measure_curve

        code, text = measure_curve(
            input, self.overrides, algo=algo, points=points, seeds=seeds, at=_numbers("--at", at), budget=budget
        )
        show(text)
        return code

    def plan(self, *, input: Path = INPUT) -> int:
        """Tell what a run will take: hours, memory, disk, and what 1, 4 or 32 devices would make of it.

        Measures some training steps of each network on this machine.

        Args:
            input: The settings.

        Example:
            autoseg plan --input input.yaml
        """
        from autoseg.pipeline.forecast import plan_run

        show(plan_run(input, self.overrides))
        return 0

    # Long: each of its flags has its line here and its line in the help that is made from the docstring.
    def predict(
        self,
        *,
        image: Path,
        output: Path,
        work_dir: Path = _WORK_DIR,
        model: Path | None = None,
        algo: AlgoName | None = None,
        fold: int | None = None,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        format: FormatName | None = None,
        statistics: bool = False,
        preview: bool = False,
        probabilities: bool = False,
        uncertainty: bool = False,
        share: bool = False,
        timing: bool = False,
        max_memory: str | None = None,
        max_ram: str | None = None,
        max_time: str | None = None,
        fast: bool | None = None,
        locate: bool | None = None,
        crop_to_first: bool | None = None,
        skip_empty: bool | None = None,
        overlap: float | None = None,
        mirror: bool | None = None,
        accept: bool = False,
    ) -> int:
        """Segment new images with the ensemble, or with the models named by --algo and --fold.

        The models are loaded once; a bad image is reported and skipped, and the exit code is then 2. With a budget,
        what an image will take is told before it, and what it took after it.

        Args:
            image: An image, a folder of images, or a .txt file with the path of an image on each line.
            output: The label file to write, or the folder for the label files.
            work_dir: Folder of a finished run.
            model: A packed model in place of a run's folder: what `autoseg pack` wrote.
            algo: Models of this network only.
            fold: Models of this fold only, from 0.
            device: Where the networks run.
            format: Of the label files. auto: as the name of one label file says, else each image's own, such as
                DICOM-SEG for a DICOM series; NIfTI where that cannot be written. Left out: as the run's settings say
                (inference.format), or else auto.
            statistics: Write volume, mean and percentiles of intensity of each class to statistics.csv in the folder of
                the label files, or beside one label file labels.nii.gz to labels.statistics.csv.
            preview: Write a picture of each image with its labels to CASE.preview.png beside the label files.
            probabilities: Write a map of each class' probability, 0 to 1, to CASE.maps beside the label files.
            uncertainty: Write a map of how uncertain each voxel is, 0 to 1 (entropy), to CASE.maps.
            share: Leave label files that are there, and images that another such process has begun: start it on several
                machines and they do the folder together.
            timing: Print where the time goes (load, pre, infer, invert, post, write) and write it to timing.json in the
                folder of the label files, or beside one label file labels.nii.gz to labels.timing.json.
            max_memory: Memory of the GPU, or of the process on a CPU, to keep to, such as 4GB.
            max_ram: Memory of the process to keep to, such as 8GB.
            max_time: Time for an image to keep to, such as 15s.
            fast: The same as locate, crop_to_first, overlap 0 and no mirroring, where these are not set; locate only
                where a locator is trained. As inference.fast in input.yaml.
            locate: Crop to the region that the locator finds.
            crop_to_first: Crop the body's length to what the first model finds, for the models after it.
            skip_empty: Let one window of nothing but background stand for all such; on unless set otherwise.
            overlap: Overlap of windows, as a share of the patch, from 0.
            mirror: Average over mirrored images; as the models were planned unless set, and not with --fast.
            accept: Take weights, plans and ensemble as they are now, where they were changed on purpose after the run.

        Example:
            autoseg predict --work_dir work_dir --image new_scans --output predictions
            autoseg predict --image scan.nii.gz --output labels.nii.gz --fast --max_memory 4GB --timing
            autoseg predict --model model.zip --image new_scans --output predictions
            autoseg predict --image dicom_folder --output segmentations --format dicomseg --statistics --preview
        """
        from autoseg.ensemble.predict import accept_changes, predict_files

        options: dict[str, Any] = {
            "fast": fast,
            "locate": locate,
            "crop_to_first": crop_to_first,
            "skip_empty": skip_empty,
        }
        options |= {"overlap": overlap, "mirror": mirror}
        inference = {key: value for key, value in options.items() if value is not None}
        if overlap is not None and not 0 <= overlap < 1:
            raise ConfigError(f"--overlap: expected a number from 0 to below 1, found {overlap:g}.")
        more: dict[str, Any] = {"algo": algo, "fold": fold, "device": device, "share": share, "timing": timing}
        more |= {"format": format, "statistics": statistics, "preview": preview}
        more |= {"probabilities": probabilities, "uncertainty": uncertainty}
        limits = _limits(max_memory, max_ram, max_time)
        if model is not None and work_dir != _WORK_DIR:
            raise ConfigError("--model: no effect together with --work_dir. Leave out the one or the other.")
        if model is not None and accept:
            raise ConfigError("--accept: no effect together with --model: a packed model is used as it was packed.")
        if accept:
            accept_changes(work_dir)
        return predict_files(model or work_dir, image, output, **more, limits=limits, inference=inference)

    def pack(self, *, output: Path, work_dir: Path = _WORK_DIR, licence: str = "") -> int:
        """Pack the chosen ensemble into one file that predicts anywhere.

        Weights, plans, rules, labels and a card; no image, no case's name and no path. `autoseg predict --model` and
        `autoseg.Segmenter` take it.

        Args:
            output: The file to write, such as model.zip; a name without .zip becomes a folder with the same parts, laid
                out for Hugging Face.
            work_dir: Folder of a finished run.
            licence: Licence of the training data; else as the datalist says, where it does.

        Example:
            autoseg pack --work_dir work_dir --output model.zip
        """
        from autoseg.export.pack import pack

        show(pack(work_dir, output, licence=licence).words())
        return 0

    def export(
        self,
        *,
        format: TargetName,
        work_dir: Path = _WORK_DIR,
        model: Path | None = None,
        output: Path | None = None,
        algo: AlgoName | None = None,
        fold: int | None = None,
        whole: bool = False,
        name: str = "",
        release: str = "",
    ) -> int:
        """Write models for other tools: MONAI, 3D Slicer, ONNX, OpenVINO, TorchScript; a data set for nnU-Net.

        docs/export.md says for each format what it holds and what it leaves out.

        Args:
            format: What to write.
            work_dir: Folder of a finished run.
            model: A packed model in place of a run's folder.
            output: Folder to write into; else export/ in the run's folder.
            algo: Models of this network only; else the chosen ensemble's.
            fold: Models of this fold only, from 0.
            whole: Put the normalisation of intensities into the graph.
            name: Name of what is made, lower case with dashes; else the run's.
            release: Its version, such as 1.0.0.

        Example:
            autoseg export --format slicer --name abdomen --release 1.0.0
        """
        from autoseg.export.targets import export

        if model is not None and work_dir != _WORK_DIR:
            raise ConfigError("--model: no effect together with --work_dir. Leave out the one or the other.")
        options: dict[str, Any] = {"algo": algo, "fold": fold, "whole": whole, "name": name, "release": release}
        for path in export(model or work_dir, format, output=output, **options):
            show(path)
        return 0

    def evaluate(
        self,
        *,
        predictions: Path,
        labels: Path,
        classes: str | None = None,
        output: Path | None = None,
        scoring: Literal["autoseg", "flare23"] = "autoseg",
        surface_tolerance_mm: str | None = None,
        lesions: bool = False,
    ) -> int:
        """Score predictions against labels: Dice, surfaces, volumes and lesions, per case and class.

        Files of the same name are paired. Of the rest, those whose names differ in upper and lower case, signs between
        letters and digits, _0000, or an ending such as _seg, _label or _pred; these pairs are told.

        Args:
            predictions: Folder of predicted label files.
            labels: Folder of true label files of the same names.
            classes: Names of label values 1, 2, ..., or label values, separated by commas; else each that occurs is
                scored but 0 and 255.
            output: JSON file for all scores.
            scoring: Rules: ours, or exactly those of the FLARE23 challenge, for its 14 classes.
            surface_tolerance_mm: Accepted deviation of surfaces: 2, or class by class such as liver=5,tumor=1.
            lesions: Show the scores of lesions, too: of each class's connected parts. The JSON file always has them.

        Example:
            autoseg evaluate --predictions predictions --labels labelsTs --classes anterior,posterior
        """
        from autoseg.evaluation.folders import evaluate_folders
        from autoseg.evaluation.tolerances import parse_tolerance

        return evaluate_folders(
            predictions,
            labels,
            classes=_names(classes),
            output=output,
            scoring=scoring,
            tolerance_mm=parse_tolerance(surface_tolerance_mm),
            lesions=lesions,
        )

    def explain(self, key: str | None = None, *, input: Path = INPUT, work_dir: Path | None = None) -> int:
        """Tell what each setting and planned value is, where it came from, and by which rule.

        Args:
            key: One setting or planned value, such as num_epochs or segresnet.roi_size, or a stage, such as train.
            input: The settings; the run is looked up in their work_dir.
            work_dir: Folder of a run, instead of --input.

        Example:
            autoseg explain roi_size
        """
        from autoseg.pipeline.stages import STAGES
        from autoseg.report.explain import explain

        show(explain(work_dir or input, STAGES, key))
        return 0

    def init(
        self,
        data_folder: Path,
        *,
        output: Path = Path("."),
        num_fold: int | None = None,
        seed: int = 0,
        splits: Path | None = None,
        force: bool = False,
    ) -> int:
        """Recognise a data set and write input.yaml and datalist.json for it.

        An MSD data set, an nnU-Net raw data set, a pair of folders images and labels, a folder for each case with its
        images and masks or label, BIDS, images and labels in one folder, and a DICOM archive are recognised.

        Args:
            data_folder: The data set.
            output: Folder for the two files.
            num_fold: Folds to make; else 5, or as many as there are patients.
            seed: Seed of the folds.
            splits: nnU-Net's splits_final.json, whose folds are taken; one beside the data set's list is found anyway.
            force: Replace files that exist.

        Example:
            autoseg init Task04_Hippocampus --output hippocampus
        """
        from autoseg.cli.init import init_data_folder

        show(init_data_folder(data_folder, output, num_fold=num_fold, seed=seed, splits=splits, force=force))
        return 0

    def demo(self, folder: Path = Path("autoseg_demo"), *, seed: int = 0) -> int:
        """Make a small phantom data set and run everything on it; a few minutes on two cores.

        Args:
            folder: Where the data and the run go.
            seed: Seed of the phantoms and of the run.

        Example:
            autoseg demo
        """
        from autoseg.cli.demo import run_demo

        return run_demo(folder, seed=seed)

    def report(
        self, *, work_dir: Path = _WORK_DIR, output: Path | None = None, serve: bool = False, port: int = 8040
    ) -> int:
        """Write report.html: all of a run on one page that opens offline. Made after every stage, too.

        Only `autoseg analyze` by itself leaves it out: it is over sooner than the figures are drawn.

        Args:
            work_dir: Folder of a run.
            output: The file to write, instead of report.html in the run's folder.
            serve: Show the page live on this machine alone, up to date while the run goes on; Ctrl-C ends it.
            port: Of the live page; 0 takes a free one.

        Example:
            autoseg report --work_dir work_dir
            autoseg report --serve
        """
        from autoseg.pipeline.stages import STAGES

        if serve:
            from autoseg.report.serve import serve_report

            if output is not None:
                raise ConfigError("--output: no effect together with --serve. Leave out the one or the other.")
            return serve_report(work_dir, STAGES, port)
        from autoseg.report.page import make_report

        show(make_report(work_dir, STAGES, output=output))
        return 0

    def methods(self, *, work_dir: Path = _WORK_DIR, output: Path | None = None) -> int:
        """Write the methods section of a paper and its checklists, each number with its source.

        The checklists are CLAIM 2024 and TRIPOD+AI, as far as the run can answer them.
        Each number has a footnote with its file and key; a JSON file beside the page lists them. What no file can know
        is marked "You must write".

        Args:
            work_dir: Folder of a run with an ensemble.
            output: The Markdown file, instead of methods.md in the run's folder.

        Example:
            autoseg methods --work_dir work_dir
        """
        from autoseg.export.methods import words, write_methods

        show(words(*write_methods(work_dir, output)))
        return 0

    def suggest(
        self,
        *,
        work_dir: Path = _WORK_DIR,
        n: int = 10,
        images: Path | None = None,
        order: Literal["doubt", "random"] = "doubt",
        seed: int = 0,
        device: Literal["auto", "cpu", "cuda"] = "auto",
    ) -> int:
        """Say which images to annotate next, and how much evidence there is for the order.

        Args:
            work_dir: Folder of a finished run.
            n: How many.
            images: A folder of images, or a .txt list; else the datalist's unlabeled cases, and its testing cases
                without a label.
            order: doubt: those that the models are expected to segment worst, unlike each other. random: drawn.
            seed: Of the draw.
            device: Where the networks run.

        Example:
            autoseg suggest --work_dir work_dir --n 20
            autoseg suggest --images new_scans
        """
        from autoseg.pipeline.suggest import suggest

        show(suggest(work_dir, num=n, images=images, order=order, seed=seed, device=device))
        return 0

    def status(self, job: str | None = None, *, work_dir: Path = _WORK_DIR, watch: bool = False) -> int:
        """Show which stages and jobs are done, running or failed: device, epoch, Dice, time left, last error.

        Args:
            job: One job, such as segresnet_0: its state, its error in full and the end of its log.
            work_dir: Folder of a run.
            watch: Show it again and again until no job is pending or running.

        Example:
            autoseg status --work_dir work_dir --watch
            autoseg status segresnet_0
        """
        from autoseg.pipeline.stages import STAGES
        from autoseg.report import status

        if job is None and watch:
            status.watch(work_dir, STAGES)
        else:
            show(status.job_status(work_dir, job) if job else status.status(work_dir, STAGES))
        return 0

    def doctor(
        self,
        *,
        folder: Path = Path("."),
        json: bool = False,
        installed: bool = False,
        report: bool = False,
        work_dir: Path | None = None,
    ) -> int:
        """Check this machine: Python, packages, torch, GPU, memory, disk, rights, shared memory, open files.

        Exit code 2 where a run cannot work.

        Args:
            folder: Where a run would write.
            json: Print the findings as JSON.
            installed: Look alone at Python, packages, torch and rights, which a run at work does not change.
            report: Print what a bug report needs instead, as Markdown; without paths and names of cases or classes.
            work_dir: With --report, a run's folder: its settings, stages and states of jobs are added.

        Example:
            autoseg doctor
            autoseg doctor --report --work_dir work_dir
        """
        from autoseg.cli.doctor import doctor

        if work_dir is not None and not report:
            raise ConfigError("--work_dir: has an effect with --report alone. Add --report, or leave it out.")
        if report and installed:
            raise ConfigError("--installed: a report has all findings. Give --report or --installed, not both.")
        if report and json:
            raise ConfigError("--json: the report is Markdown. Give --report or --json, not both.")
        if report:
            from autoseg.cli.bug_report import bug_report

            show(bug_report(folder, work_dir))
            return 0
        text, code = doctor(folder, as_json=json, installed=installed)
        show(text)
        return code

    def schema(self, *, output: Path | None = None) -> int:
        """Print the JSON Schema of input.yaml, with which editors complete and check it.

        Args:
            output: The file to write instead.

        Example:
            autoseg schema --output input.schema.json
        """
        from autoseg.config.schema import schema_text
        from autoseg.workspace.files import write_text

        if output is None:
            show(schema_text(), end="")
        else:
            write_text(output, schema_text())
        return 0

    def completion(self, shell: Literal["bash", "zsh", "fish"]) -> int:
        """Print a script that completes commands, flags and their choices in a shell.

        Evaluate it where the shell starts: eval "$(autoseg completion bash)" in ~/.bashrc, the same with zsh in
        ~/.zshrc, autoseg completion fish | source in fish's configuration.

        Args:
            shell: Which one.

        Example:
            autoseg completion bash
        """
        from autoseg.cli.completion import completion

        show(completion(Commands, TAKES_SETTINGS, shell), end="")
        return 0

    def retry(self, job: str | None = None, *, input: Path = INPUT) -> int:
        """Train the jobs again that failed or diverged; the others are left as they are.

        Args:
            job: One of them only, such as segresnet_0.
            input: The settings.

        Example:
            autoseg retry segresnet_0
        """
        from autoseg.pipeline.retry import retry

        return retry(input, self.overrides, job)

    def merge_masks(self, folder: Path, *, output: Path, classes: str | None = None) -> int:
        """Merge a folder per case of binary masks, as TotalSegmentator writes them, into one label file a case.

        Args:
            folder: Folder of case folders.
            output: Folder for the label files and labels.json.
            classes: Class names in the order of label values 1, 2, ..., separated by commas; else by alphabet.

        Example:
            autoseg merge_masks totalsegmentator --output labelsTr
        """
        from autoseg.analyzer.merge_masks import merge_masks

        show(merge_masks(folder, output, classes=_names(classes)).text())
        return 0


def _names(text: str | None) -> tuple[str, ...] | None:
    """Names separated by commas."""
    return tuple(name.strip() for name in text.split(",")) if text else None


def _numbers(flag: str, text: str | None) -> tuple[int, ...]:
    """Whole numbers separated by commas.

    Raises:
        ConfigError: Something else stands there.
    """
    words = [word.strip() for word in text.split(",")] if text else []
    if wrong := [word for word in words if not word.isdigit() or int(word) < 1]:
        raise ConfigError(f"{flag}: found {wrong[0]!r}, expected whole numbers >= 1 separated by commas.")
    return tuple(map(int, words))


def _limits(max_memory: str | None, max_ram: str | None, max_time: str | None) -> Limits:
    """A budget from the words of the command line.

    Raises:
        ConfigError: Words that are no amount of memory or time, all at once.
    """
    from autoseg.config.units import parse_duration, parse_size

    limits: dict[str, Any] = {}
    faults = []
    for flag, key, text, parse_text in (
        ("max_memory", "device_bytes", max_memory, parse_size),
        ("max_ram", "ram_bytes", max_ram, parse_size),
        ("max_time", "seconds", max_time, parse_duration),
    ):
        try:
            limits[key] = None if text is None else parse_text(text)
        except ConfigError as error:
            faults += [f"--{flag}: {message}" for message in error.messages]
    if faults:
        raise ConfigError(faults)
    from autoseg.inference.cost import Limits

    return Limits(**limits)
