"""A toy tracker, added as CONTRIBUTING.md says to a copy of the package, and a small run that it is told of."""

from __future__ import annotations

import json
from pathlib import Path

from house import commands, copy_house, put

from autoseg.data.phantoms import make_phantoms

TRACKER = '''"""A text file a run, with a JSON object on each line."""

import json

from autoseg.tracking.tracker import faults_of


class Lines:
    def __init__(self, run):
        self.path = run.folder / "lines" / f"{run.name}.txt"
        self.first = {"id": run.id, "parent": run.parent, "experiment": run.experiment, "params": dict(run.params)}

    def _write(self, **data):
        with faults_of(), open(self.path, "a") as file:
            file.write(json.dumps(data) + "\\\\n")

    def begin(self, epochs):
        with faults_of():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("")
        self._write(**self.first)
        for epoch in epochs:
            self.log(epoch)

    def log(self, epoch):
        self._write(epoch=epoch.number, **epoch.metrics)

    def summarise(self, values):
        self._write(**values)

    def attach(self, file):
        self._write(file=file.name)

    def close(self, ending):
        self._write(ending=ending)
'''.replace("\\\\n", "\\n")
ROW = '    "lines": TrackerRow(packages=(), place="autoseg.tracking.lines:Lines"),\n'


def test_a_new_tracker_is_told_of_the_run_and_its_jobs(tmp_path: Path) -> None:
    house = copy_house(tmp_path / "house")
    (house / "autoseg" / "tracking" / "lines.py").write_text(TRACKER)
    table = "TRACKERS: dict[TrackerName, TrackerRow] = {\n"
    put(house / "autoseg" / "tracking" / "table.py", table, table + ROW)
    names = 'TrackerName = Literal["tensorboard",'
    put(house / "autoseg" / "config" / "settings.py", names, 'TrackerName = Literal["lines", "tensorboard",')
    path = make_phantoms(tmp_path / "data", num_cases=4, num_testing=0, shape=(24, 24, 24), num_fold=2)
    words = ["--input", str(path), "--algos", "segresnet", "--num_epochs", "2", "--num_steps_per_epoch", "2"]
    words += ["--num_epochs_per_validation", "2", "--roi_size", "16,16,16", "--batch_size", "2", "--device", "cpu"]
    # A worker as a launcher starts it: all it knows of the tracker stands in the run's settings.
    worker = ["train", "--work_dir", str(path.parent / "work_dir"), "--algo", "segresnet", "--fold", "1"]
    done = commands(
        house,
        ["analyze", "--input", str(path)],
        ["generate", *words, "--track", "lines"],
        [*worker, "--device", "cpu"],
        ["run", *words, "--name", "liver"],
    )
    assert done.returncode == 0, done.stderr
    folder = path.parent / "work_dir" / "tracking" / "lines"
    assert sorted(p.name for p in folder.iterdir()) == ["run.txt", "segresnet_0.txt", "segresnet_1.txt"]
    whole, *jobs = (
        [json.loads(text) for text in (folder / f"{name}.txt").read_text().splitlines()]
        for name in ("run", "segresnet_0", "segresnet_1")
    )
    assert whole[0]["experiment"] == "liver"
    assert whole[0]["params"]["num_epochs"] == "2"
    assert not any(str(tmp_path) in json.dumps(lines) for lines in (whole, *jobs)), "a path"
    assert not any("phantom_0" in json.dumps(lines) for lines in (whole, *jobs)), "a case"
    assert {"final/dice", "final_class/sphere", "final_class/box"} == {k for entry in whole[1:-2] for k in entry}
    assert whole[-2:] == [{"file": "report.html"}, {"ending": "finished"}]
    for lines in jobs:
        first, *epochs, final, plan, metrics, ending = lines
        assert first["parent"] == whole[0]["id"]
        assert first["params"]["batch_size"] == "2"
        assert [entry["epoch"] for entry in epochs] == [1, 2]
        assert "val/acc" not in epochs[0]
        assert {"train/loss", "train/learning_rate", "val/acc", "val_class/sphere", "val_class/box"} < set(epochs[1])
        assert set(final) == {"final/dice", "final/seconds"}
        assert (plan, metrics) == ({"file": "hyper_parameters.yaml"}, {"file": "metrics.jsonl"})
        assert ending == {"ending": "finished"}
