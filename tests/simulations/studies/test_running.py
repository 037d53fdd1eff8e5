"""Running a study: what has finished is not run again, what has not is."""

import random
from dataclasses import replace

import pytest
from simulations.studies.processes import run_in_processes

from simulations.experiments.errors import ExperimentError
from simulations.experiments.marks import mark_path, read_marks
from simulations.studies.running import run_one_by_one, units_of
from simulations.studies.study import seed_folder
from tests.simulations.folders import (
    CASE,
    NOBODY,
    PROVENANCE,
    SECOND,
    pretend,
    write_study,
)


def run(folder, run_unit, *cases, watcher=NOBODY):
    units = units_of(folder, cases)
    run_one_by_one(units, provenance=PROVENANCE, watcher=watcher, run_unit=run_unit)


def test_cases_and_seeds_are_run_in_their_order(tmp_path):
    calls, ends = [], []
    watcher = replace(
        NOBODY,
        on_begin=lambda unit: calls.append(unit.label),
        on_end=lambda unit: ends.append(len(calls)),
    )

    run(tmp_path, pretend, SECOND, CASE, watcher=watcher)

    assert calls == [
        "second, seed 0",
        *(f"own_labels, seed {seed}" for seed in range(3)),
    ]
    assert ends == [1, 2, 3, 4]


def test_a_seed_is_run_with_the_methods_there_are_and_its_number(tmp_path):
    found = []

    run(tmp_path, lambda *given: found.append(given[:2]), CASE)

    experiment, out = found[2]
    assert experiment.methods == ("fedavg", "drop_weak", "smartsplit")
    assert experiment.seed == 2
    assert out == tmp_path / "own_labels" / "seed-2"


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


def test_an_interrupt_passes_through_and_leaves_what_is_done(tmp_path):
    def interrupted(experiment, out, provenance, on_round):
        if experiment.seed == 1:
            raise KeyboardInterrupt
        pretend(experiment, out, provenance, on_round)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, interrupted, CASE)

    assert len(read_marks(seed_folder(tmp_path, "own_labels", 0))) == 3
    assert not seed_folder(tmp_path, "own_labels", 1).exists()


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
    run_one_by_one(units_of(whole, [TINY]), provenance=PROVENANCE, watcher=NOBODY)
    random.seed(99)

    run_one_by_one(first_seed, provenance=PROVENANCE, watcher=NOBODY)
    mark_path(first_seed[0].out, "smartsplit").unlink()
    run_one_by_one(units_of(resumed, [TINY]), provenance=PROVENANCE, watcher=NOBODY)
    run_in_processes(
        units_of(apart, [TINY])[1:],
        provenance=PROVENANCE,
        watcher=NOBODY,
        num_workers=2,
    )

    assert len(digests(whole)) == 4
    assert len(set(digests(whole).values())) == 4  # else nothing would have trained
    assert digests(whole) == digests(resumed)
    assert digests(apart).items() <= digests(whole).items()
    assert len(digests(apart)) == 2


@pytest.mark.slow
def test_a_unit_that_cannot_be_run_says_why_from_its_process(tmp_path):
    hopeless = replace(
        TINY, experiment=replace(TINY.experiment, num_clients=90), num_seeds=1
    )

    with pytest.raises(ExperimentError, match="more examples or fewer clients"):
        run_in_processes(
            units_of(tmp_path, [hopeless]),
            provenance=PROVENANCE,
            watcher=NOBODY,
            num_workers=1,
        )
