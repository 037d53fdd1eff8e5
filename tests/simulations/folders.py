"""Study folders written by hand, by a runner that only writes journals and marks."""

import json
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import sha256

from simulations.experiments.experiment import Experiment
from simulations.experiments.marks import Mark, read_marks, write_mark
from simulations.experiments.partitions import OwnLabels
from simulations.experiments.provenance import Provenance
from simulations.fleets.presets import half_weak
from simulations.studies.folder import STUDY, begin_folder
from simulations.studies.running import units_of
from simulations.studies.study import Case
from tests.simulations.journals import CONFIG, client_row, evaluation_row, round_row

METHODS = ("fedavg", "drop_weak", "smartsplit")
SKILL = {"fedavg": 0.9, "drop_weak": 0.5, "smartsplit": 0.875}
PROVENANCE = Provenance.of_this_process(
    ["run", "accuracy"], now=datetime(2026, 1, 2, tzinfo=UTC)
)
CASE = Case(
    name="own_labels",
    title="by hand: own labels",
    claim="That the numbers are right.",
    experiment=Experiment(
        name="accuracy",
        methods=(*METHODS, "not_written"),
        fleet=half_weak,
        partition=OwnLabels(),
        num_clients=3,
        num_rounds=2,
    ),
    num_seeds=3,
    target_accuracy=0.6,
)
SECOND = replace(CASE, name="second", title="by hand: another", num_seeds=1)


def rows_of(method, seed):
    """Three clients, two rounds; each seed is two points better than the last."""
    route = "device[:1] > edge[1:]" if method == "smartsplit" else "whole"
    rows = [evaluation_row(0, 0.1, [0.1, 0.1])]
    for number, accuracy in ((1, 0.5), (2, SKILL[method] + 0.02 * seed)):
        rows += [
            client_row(number, key, route=route, peak_bytes=1000, bytes_down=2**20)
            for key in ("0", "1", "2")
        ]
        rows += [
            round_row(number, 1.0, 4 * 2**20),
            evaluation_row(number, accuracy, [accuracy, accuracy / 2]),
        ]
    return rows


def pretend(unit):
    """Run what has no mark, as the real runner does, but without training."""
    experiment, out = unit.experiment, unit.out
    out.mkdir(parents=True, exist_ok=True)
    finished = read_marks(out)
    config = {**CONFIG, "methods": dict.fromkeys(experiment.methods, "")}
    (out / "config.json").write_text(json.dumps(config))
    for method in experiment.methods:
        if method not in finished:
            rows = rows_of(method, experiment.seed)
            lines = [json.dumps(row) + "\n" for row in rows]
            (out / f"{method}.jsonl").write_text("".join(lines))
            write_mark(out, mark_of(method, experiment.seed))


def mark_of(method, seed):
    digest = sha256(f"{method} {seed}".encode()).hexdigest()
    return Mark(method=method, state_sha256=digest, accuracy=0.5, num_rounds=2)


def write_study(folder, *cases):
    """Start a study's folder and run all its seeds in pretence."""
    cases = cases or (CASE, SECOND)
    begin_folder(
        folder, STUDY, "accuracy", cases=cases, is_small=True, provenance=PROVENANCE
    )
    for unit in units_of(folder, cases):
        pretend(unit)
    return folder
