"""The folder of a run: where everything lies, what is done, what is stale. All writes are whole or not at all.

work_dir/
    input.yaml, settings.yaml            as given; resolved, with each value's origin
    datalist.json                        the cases, relative to dataroot, each with its fold
    datastats.yaml, datastats_by_case.yaml, faults.json
    analysis/cases.jsonl                 what was measured of each case, by content, so that nothing is read twice
    cache/                               preprocessed cases, keyed by content and settings
    init_weights/                        weights that jobs start from, copied once, and what is known of them
    <algo>_<fold>/                       a MONAI bundle, job.json, metrics.jsonl, validation.json, seal.json
        validation/, held_out/               its labels of held-out cases; their probabilities, for the ensemble
    sweep/trial_0000/<algo>_<fold>/      a trial's jobs; study, best.yaml and plots beside them
    learning_curve/n025_seed0/<algo>_<fold>/ trainings on fewer cases, with curve.json beside them
    ensemble/                            ensemble.json, seal.json, scores.json, out_of_fold/, predictions/
    state/<stage>.json                   what each finished stage was made from
    state/networks.json                  what `algos: auto` came to, and why
    state/layout.json                    the version of all this; see layout.py
    state/digests.jsonl                  what files hold, by inode, size and times, so that bytes are read once
    state/usage.jsonl                    time, memory and disk of each stage
    report.html                          all of it on one page
    run.log
    round_1/, round_2/, ...              rounds of training, where missing classes are filled in between (strategy)
        round.json                           its number, and whether it goes on from the previous one's weights
        settings.yaml, datalist.json         as above; analysis and cache are the run's
        pseudolabels/                        round 2 on: what the previous round's models say, and what became of it
            completed.json                       the labels to learn from, and the classes each is complete for
            labels/<case>.nii.gz, .json          a completed label, and where it comes from
            weights/<case>.nii.gz                what each voxel counts, in percent, where labels are soft
            predicted/, confidence/, evidence/   label, probability in percent, and figures of each case
            audit.json                           what was accepted and rejected, the most suspicious first
        <algo>_<fold>/, ensemble/, state/    as above
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from pydantic import Field

from autoseg.config.networks import NETWORKS
from autoseg.errors import WorkspaceError
from autoseg.version import __version__
from autoseg.workspace.claims import Busy, Claim, ClaimState, read_claim
from autoseg.workspace.digests import DIGESTS
from autoseg.workspace.files import is_beneath, remove_halves
from autoseg.workspace.jobs import Job, JobDir
from autoseg.workspace.layout import begin_layout, check_writable
from autoseg.workspace.stamps import NOT_DONE, Stamp, changed
from autoseg.workspace.stored import Stored, Unreadable, read_stored, write_stored

FOLD = re.compile("0|[1-9][0-9]{0,3}")
"""A fold in the name of a job's folder."""


class RoundCount(Stored):
    """What stands in state/rounds.json."""

    rounds: int = Field(ge=1, le=100)


class RoundMarker(Stored):
    """What stands in a round's round.json."""

    round: int = Field(ge=1, le=100)
    continues: bool
    """Whether its models start from the weights of the round before."""


class Workspace:
    """Paths and state under a work_dir. Making one creates nothing."""

    def __init__(self, root: Path, *, data_of: Workspace | None = None, own_cases: bool = False) -> None:
        """Give the folder, and for a sweep's trial the run whose cases and cache it shares.

        Args:
            own_cases: it shares the cache alone, and has a list of cases of its own, as trainings of a learning curve.
        """
        self.root = Path(root)
        self._data = data_of.root if data_of else self.root
        self._cases = self.root if own_cases else self._data
        is_round = (self.root / "round.json").exists()
        self.run = self.root.parent if is_round else self.root
        """The folder that the rounds of a run share; `root` itself where this is no round."""

    # -- paths
    @property
    def input(self) -> Path:
        """A copy of the input.yaml of the last run."""
        return self.run / "input.yaml"

    @property
    def settings(self) -> Path:
        """Resolved settings with origins."""
        return self.root / "settings.yaml"

    @property
    def datalist(self) -> Path:
        """Cases and folds as used."""
        return self._cases / "datalist.json"

    @property
    def datastats(self) -> Path:
        """Statistics of the data set."""
        return self.run / "datastats.yaml"

    @property
    def datastats_by_case(self) -> Path:
        """Statistics of each case."""
        return self.run / "datastats_by_case.yaml"

    @property
    def faults(self) -> Path:
        """Faults and warnings of the data set."""
        return self.run / "faults.json"

    @property
    def digests(self) -> Path:
        """What the run's files hold, so that bytes are read once."""
        return (self.run if self.run != self.root else self._data) / "state" / "digests.jsonl"

    @property
    def cache(self) -> Path:
        """Preprocessed cases."""
        return (self.run if self.run != self.root else self._data) / "cache"

    @property
    def init_weights(self) -> Path:
        """Weights that jobs start from, one file a network; see `autoseg.weights.start`."""
        return (self.run if self.run != self.root else self._data) / "init_weights"

    @property
    def pseudolabels(self) -> Path:
        """Labels that were completed for a round of training, and the evidence."""
        return self._cases / "pseudolabels"

    @property
    def completed(self) -> Path:
        """Which labels were completed, and for which classes."""
        return self.pseudolabels / "completed.json"

    @property
    def audit(self) -> Path:
        """What became of the pseudo-labels, the most suspicious first."""
        return self.pseudolabels / "audit.json"

    @property
    def budget(self) -> Path:
        """Time of the run or the round: spent, given to jobs, taken from dropped algorithms."""
        return self.root / "state" / "budget.json"

    @property
    def steps(self) -> Path:
        """Training steps that were measured for the run's plans."""
        return self.run / "state" / "steps.json"

    @property
    def chosen_networks(self) -> Path:
        """What `algos: auto` came to, in all rounds."""
        return self.run / "state" / "networks.json"

    @property
    def ensemble(self) -> Path:
        """Out-of-fold scores, the chosen combination, predictions."""
        return self.root / "ensemble"

    @property
    def ensemble_spec(self) -> Path:
        """The chosen combination."""
        return self.ensemble / "ensemble.json"

    @property
    def ensemble_seal(self) -> Path:
        """What the chosen combination was; see `autoseg.workspace.seals`."""
        return self.ensemble / "seal.json"

    @property
    def subgroups(self) -> Path:
        """Out-of-fold Dice by group of cases, a table."""
        return self.ensemble / "subgroups.csv"

    @property
    def learning_curve(self) -> Path:
        """Trainings on fewer cases, and what they say of more."""
        return self.run / "learning_curve"

    @property
    def suspicious_labels(self) -> Path:
        """Labels that the out-of-fold predictions contradict, a table."""
        return self.ensemble / "suspicious_labels.csv"

    @property
    def suspicious_points(self) -> Path:
        """The same as lists of points that 3D Slicer opens, one a case."""
        return self.ensemble / "suspicious"

    @property
    def robustness(self) -> Path:
        """What changed images of some held-out cases cost."""
        return self.ensemble / "robustness.json"

    @property
    def scores(self) -> Path:
        """Out-of-fold scores per case, class, fold and algorithm."""
        return self.ensemble / "scores.json"

    @property
    def out_of_fold(self) -> Path:
        """Out-of-fold predictions, a folder per algorithm and one for the ensemble."""
        return self.ensemble / "out_of_fold"

    @property
    def predictions(self) -> Path:
        """The ensemble's predictions for the testing cases."""
        return self.ensemble / "predictions"

    @property
    def log(self) -> Path:
        """The run's log."""
        return self.run / "run.log"

    @property
    def usage(self) -> Path:
        """Time, memory and disk of each stage; one JSON object each."""
        return self.run / "state" / "usage.jsonl"

    @property
    def commands(self) -> Path:
        """The command lines of the run; one JSON object each."""
        return self.run / "state" / "commands.jsonl"

    @property
    def environment(self) -> Path:
        """Machine and versions of the last run."""
        return self.run / "state" / "environment.json"

    @property
    def report(self) -> Path:
        """All of the run on one page."""
        return self.run / "report.html"

    def job_dir(self, algo: str, fold: int) -> JobDir:
        """The folder of one job.

        Raises:
            WorkspaceError: The name, which an edited file may have given, would lead out of the run's folder.
        """
        folder = self.root / f"{algo}_{fold}"
        if folder.parent != self.root or not is_beneath(folder, self.run):
            raise WorkspaceError(
                f"{self.root}: the job {algo}_{fold} would lie outside it. Expected a folder of a job in it, such as "
                "segresnet_0. Undo the edit of the file that names it."
            )
        return JobDir(folder)

    # -- rounds
    @property
    def num_rounds(self) -> int:
        """Rounds of training that the run is to have."""
        path = self.run / "state" / "rounds.json"
        return read_stored(path, RoundCount).rounds if path.exists() else 1

    def plan_rounds(self, number: int) -> None:
        """Store how many rounds the run is to have."""
        path = self.run / "state" / "rounds.json"
        if number != self.num_rounds or not path.exists():
            write_stored(path, RoundCount(rounds=number))

    @property
    def round(self) -> int:
        """The number of this round, from 1."""
        marker = self._marker
        return marker.round if marker is not None else 1

    @property
    def _marker(self) -> RoundMarker | None:
        path = self.root / "round.json"
        return read_stored(path, RoundMarker) if path.exists() else None

    def begin_round(self, number: int, *, continues: bool) -> Workspace:
        """Make the folder of a round.

        Args:
            number: from 1.
            continues: whether its models start from the previous round's weights.
        """
        place = Workspace(self.run / f"round_{number}")
        marker = RoundMarker(round=number, continues=continues)
        if place._marker != marker:
            write_stored(place.root / "round.json", marker)
        return Workspace(place.root)

    def rounds(self) -> list[Workspace]:
        """The rounds that were begun, in order; none where a run has one round alone."""
        number = self.num_rounds
        roots = [self.run / f"round_{n}" for n in range(1, number + 1)] if number > 1 else []
        return [Workspace(root) for root in roots if (root / "round.json").exists()]

    @property
    def is_last_round(self) -> bool:
        """Whether no round follows, as in a run with one round alone."""
        return self.root == self.run or self.round == self.num_rounds

    def latest(self) -> Workspace:
        """The last round that was begun; of a run with one round alone, its folder."""
        return (self.rounds() or [self])[-1]

    def finished(self) -> Workspace:
        """The last round that has an ensemble, else the last that was begun."""
        return next((r for r in reversed(self.rounds()) if r.ensemble_spec.exists()), self.latest())

    def first_weights(self, algo: str, fold: int) -> Path | None:
        """Weights that a job starts from: the previous round's, where this round goes on from it."""
        marker = self._marker
        if marker is None or not marker.continues:
            return None
        path = Workspace(self.run / f"round_{marker.round - 1}").job_dir(algo, fold).model
        return path if path.exists() else None

    def earlier_plan(self, algo: str, fold: int) -> Path | None:
        """The plan of the job whose weights a job starts from."""
        weights = self.first_weights(algo, fold)
        return None if weights is None else JobDir(weights.parents[1]).plan

    # -- stages
    def stamp(self, stage: str, inputs: Mapping[str, str]) -> None:
        """Note that a stage is done and what it was made from."""
        write_stored(self._stamp_path(stage), Stamp(inputs=dict(inputs), version=__version__, time=time.time()))

    def _stamp_path(self, stage: str) -> Path:
        return self.root / "state" / f"{stage}.json"

    def is_stamped(self, stage: str) -> bool:
        """Whether a stage was done here before, with whatever inputs."""
        return self._stamp_path(stage).exists()

    def read_stamp(self, stage: str) -> Stamp | None:
        """When a stage was done and what it was made from; None where it was not."""
        return read_stored(self._stamp_path(stage), Stamp) if self.is_stamped(stage) else None

    def stale(self, stage: str, inputs: Mapping[str, str]) -> list[str]:
        """Why a stage has to run: names of inputs that changed, [`NOT_DONE`], or [] where it is up to date."""
        stamp = self.read_stamp(stage)
        return [NOT_DONE] if stamp is None else changed(stamp.inputs, inputs)

    # -- jobs
    def read_job(self, algo: str, fold: int) -> Job:
        """The state of a job; pending where nothing is known."""
        path = self.job_dir(algo, fold).job
        if not path.exists():
            return Job(algo=algo, fold=fold)
        job = read_stored(path, Job)
        if (job.algo, job.fold) != (algo, fold):
            raise WorkspaceError(f"{path}: found job {job.name}, expected {algo}_{fold}. {Job.advice}")
        return job

    def write_job(self, job: Job) -> None:
        """Store the state of a job."""
        write_stored(self.job_dir(job.algo, job.fold).job, job)

    def job_names(self) -> list[tuple[str, int]]:
        """Algorithm and fold of all jobs that are planned or were begun, by name; other folders are none of ours."""
        files = {*self.root.glob("*_*/job.json"), *self.root.glob("*_*/configs/hyper_parameters.yaml")}
        names = sorted({path.relative_to(self.root).parts[0] for path in files})
        split = [name.rpartition("_") for name in names]
        return [(algo, int(fold)) for algo, _, fold in split if algo in NETWORKS and FOLD.fullmatch(fold)]

    def jobs(self) -> list[Job]:
        """All jobs that are planned or were begun, by name."""
        return [self.read_job(algo, fold) for algo, fold in self.job_names()]

    def current_job(self, algo: str, fold: int) -> tuple[Job, ClaimState]:
        """A job with who works on it; one whose worker is dead counts as pending."""
        job, claim = self.read_job(algo, fold), read_claim(self.job_dir(algo, fold).claims)
        if job.state == "running" and not claim.is_live:
            job.state = "pending"
        return job, claim

    def current_jobs(self) -> list[tuple[Job, ClaimState]]:
        """All jobs with who works on them, by name."""
        return [self.current_job(algo, fold) for algo, fold in self.job_names()]

    def readable_jobs(self, unreadable: Unreadable) -> list[tuple[Job, ClaimState]]:
        """All jobs whose files can be read, with who works on them, for commands that only show."""
        jobs = [unreadable.or_else(None, partial(self.current_job, *name)) for name in self.job_names()]
        return [pair for pair in jobs if pair is not None]

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the work_dir for one run; the lock of a process that is gone is taken over.

        Raises:
            Busy: Another run holds it.
            WorkspaceError: It cannot be made or written to, or another version of autoseg made it.
        """
        halves = check_writable(self.run)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            (self.root / ".claims").mkdir(exist_ok=True)
        except OSError as error:
            raise WorkspaceError(
                f"{self.root}: cannot be made or written to ({error.strerror}). "
                "Give a work_dir in a folder that you may write to."
            ) from error
        DIGESTS.open(self.digests)
        with ExitStack() as stack:
            try:
                stack.enter_context(Claim(self.root / ".claims", str(self.root)))
            except Busy as error:
                raise Busy(f"{error} Wait for that autoseg run, or give another work_dir.") from None
            begin_layout(self.run)
            remove_halves(halves)
            yield
