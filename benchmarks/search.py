"""Find the DiNTS topology that ships with the template, by this project's own search.

python benchmarks/search.py --hippocampus DATA --output OUT --minutes 60            # writes OUT/topology.json
python benchmarks/search.py --hippocampus DATA --output OUT --minutes 60 --ship     # and templates/dints/topology.json

On fold 0's 160 training cases of `autoseg init`, so that the 40 others stay unseen. Starts from `HAND_MADE`; goes on
where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import asdict
from pathlib import Path

from train import autoseg, machine, prepare

from autoseg.data.datalists.datalist import read_datalist
from autoseg.hardware.device import pick_device
from autoseg.networks.dints import reached_nodes
from autoseg.plan import read_plan
from autoseg.training.cache import load_cases
from autoseg.training.search import Search
from autoseg.workspace.files import write_json, write_text
from autoseg.workspace.workspace import Workspace

ROOT = Path(__file__).resolve().parents[1]
HAND_MADE = [
    [1, 0, 1, 0, 0, 0, 0],
    [1, 0, 0, 1, 0, 1, 0],
    [1, 0, 0, 1, 0, 0, 1],
    [1, 0, 0, 1, 1, 0, 1],
    [1, 1, 0, 1, 0, 0, 0],
    [1, 1, 0, 0, 0, 0, 0],
]
"""Paths of an encoder-decoder of three scales with a stream at the finest, in MONAI's order; all 3x3x3 convolutions."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hippocampus", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--ship", action="store_true", help="replace the template's topology")
    a = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder: Path = a.output.absolute() / "work" / "search"
    data: Path = a.hippocampus.absolute()
    path = prepare(folder, data)
    autoseg("generate", "--input", path, "--algos", "dints", "--folds", "0", log=folder / "log.txt")
    workspace = Workspace(folder / "work_dir")
    plan = read_plan(workspace.job_dir("dints", 0))
    start = {"paths": HAND_MADE, "operations": HAND_MADE, "nodes": reached_nodes(HAND_MADE)}  # operation 1 on each path
    plan = plan.model_copy(update={"network": {**plan.network, **start}})
    cases = read_datalist(workspace.datalist, data).train_cases(0)
    cached = load_cases(workspace.cache, plan, cases, num_workers=2)
    search = Search(plan, cached, pick_device(), seconds=60 * a.minutes, steps=10**6, checkpoint=folder / "search.pt")
    found = asdict(search.run())
    name = "Medical Segmentation Decathlon's hippocampus (Task04), training cases of fold 0"
    found["origin"] = f"{found['origin']}; started from a hand-made encoder-decoder; {name}; by benchmarks/search.py"
    write_json(a.output / "topology.json", found)
    write_json(a.output / "search.json", {**found, "steps": search.step, "machine": machine()})
    if a.ship:
        write_text(ROOT / "templates" / "dints" / "topology.json", json.dumps(found) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
