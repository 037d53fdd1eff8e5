"""Running a study: what has finished is not run again, what has not is."""

import json
import random
import re
from dataclasses import replace

import pytest

from simulations.experiments.errors import ExperimentError
from simulations.experiments.marks import mark_path, read_marks
from simulations.studies.running import run_in_processes, run_unfinished, units_of
from simulations.studies.study import seed_folder
from tests.simulations.folders import CASE, PROVENANCE, SECOND, write_study


def run_here(units):
    for unit in units:
        run_unfinished(unit, PROVENANCE, lambda method, row: None)


def test_cases_and_seeds_are_units_in_their_order(tmp_path):
    units = units_of(tmp_path, [SECOND, CASE])

    assert [unit.label for unit in units] == [
        "second, seed 0",
        *(f"own_labels, seed {seed}" for seed in range(3)),
    ]


def test_a_seed_is_run_with_the_methods_there_are_and_its_number(tmp_path):
    unit = units_of(tmp_path, [CASE])[2]

    assert unit.experiment.methods == ("fedavg", "drop_weak", "smartsplit")
    assert unit.experiment.seed == 2
    assert unit.out == tmp_path / "own_labels" / "seed-2"


def test_a_unit_knows_what_it_has_left_to_do(tmp_path):
    write_study(tmp_path, CASE)
    mark_path(seed_folder(tmp_path, "own_labels", 1), "drop_weak").unlink()

    unfinished = [unit.unfinished() for unit in units_of(tmp_path, [CASE])]

    assert unfinished == [(), ("drop_weak",), ()]


def test_only_what_lost_its_mark_runs_again(tmp_path):
    """The journals that stay are the same files; the other one is written anew."""
    folder = write_study(tmp_path)
    out = seed_folder(folder, "own_labels", 1)
    digests = {name: mark.state_sha256 for name, mark in read_marks(out).items()}
    kept = (out / "fedavg.jsonl").stat().st_mtime_ns
    mark_path(out, "drop_weak").unlink()
    (out / "drop_weak.jsonl").write_text('{"kind": "cli')

    write_study(folder)

    again = {name: mark.state_sha256 for name, mark in read_marks(out).items()}
    assert again == digests
    assert (out / "fedavg.jsonl").stat().st_mtime_ns == kept
    assert (out / "drop_weak.jsonl").read_text().count("\n") == 11


TINY = replace(
    CASE,
    experiment=replace(
        CASE.experiment,
        methods=("fedavg", "smartsplit"),
        num_clients=4,
        max_train_examples=96,
        fraction_train=0.5,
    ),
    num_seeds=2,
)


def digests(folder):
    return {
        (unit.label, name): mark.state_sha256
        for unit in units_of(folder, [TINY])
        for name, mark in read_marks(unit.out).items()
    }


@pytest.mark.slow
def test_a_resumed_run_and_one_in_processes_end_at_the_same_weights(tmp_path):
    """Clients are drawn each round, by Flower's FedAvg from Python's generator."""
    whole, resumed, apart = (tmp_path / name for name in ("whole", "resumed", "apart"))
    first_seed = units_of(resumed, [TINY])[:1]
    run_here(units_of(whole, [TINY]))
    random.seed(99)

    run_here(first_seed)
    mark_path(first_seed[0].out, "smartsplit").unlink()
    run_here(units_of(resumed, [TINY]))
    unit = units_of(apart, [TINY])[1]
    begin, *rounds, end = run_in_processes([unit], provenance=PROVENANCE, num_workers=2)
    assert (begin.row, begin.is_end, end.is_end) == (None, False, True)
    assert [event.row.round for event in rounds] == [0, 1, 2, 0, 1, 2]

    assert len(digests(whole)) == 4
    assert len(set(digests(whole).values())) == 4  # else nothing would have trained
    assert digests(whole) == digests(resumed)
    assert digests(apart).items() <= digests(whole).items()
    assert len(digests(apart)) == 2


class Cut(BaseException):
    """The process ends here."""


def rows_of(path):
    """Read a journal's rows, without what a clock says: replies write it as text."""
    rows = map(json.loads, path.read_text().splitlines())
    timed = re.compile("sec|bytes_up|comm_bytes")
    return [{k: v for k, v in row.items() if not timed.search(k)} for row in rows]


@pytest.mark.slow
def test_a_run_that_is_cut_short_goes_on_inside(tmp_path, monkeypatch):
    """From its checkpoint; journal and weights are those of a run that was not cut."""
    monkeypatch.setattr("simulations.experiments.runner.SAVED_EVERY", 2)
    case = replace(TINY, experiment=replace(TINY.experiment, num_rounds=5))
    whole, cut = (units_of(tmp_path / name, [case])[0] for name in ("whole", "cut"))
    run_here([whole])
    seen = []

    def cut_in(number):
        def on_round(method, row):
            if method == "smartsplit":
                seen.append(row.round)
                if row.round == number:
                    raise Cut

        return on_round

    for number in (4, 5):
        with pytest.raises(Cut):
            run_unfinished(cut, PROVENANCE, cut_in(number))
    assert (cut.out / "smartsplit.checkpoints/4").is_dir()
    run_unfinished(cut, PROVENANCE, cut_in(None))

    assert seen == [0, 1, 2, 3, 4, 3, 4, 5, 5]
    assert read_marks(cut.out) == read_marks(whole.out)
    assert not (cut.out / "smartsplit.checkpoints").exists()
    journals = [rows_of(unit.out / "smartsplit.jsonl") for unit in (cut, whole)]
    assert journals[0] == journals[1]
    assert {row["round"] for row in journals[0]} == {0, 1, 2, 3, 4, 5}


@pytest.mark.slow
def test_a_unit_that_cannot_be_run_says_why_from_its_process(tmp_path):
    hopeless = replace(
        TINY, experiment=replace(TINY.experiment, num_clients=90), num_seeds=1
    )

    with pytest.raises(ExperimentError, match="more examples or fewer clients"):
        units = units_of(tmp_path, [hopeless])
        list(run_in_processes(units, provenance=PROVENANCE, num_workers=1))
