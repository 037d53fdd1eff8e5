"""Running a study: what has finished is not run again, what has not is."""

from dataclasses import replace

import pytest

from simulations.marks import mark_path, read_marks
from simulations.studies.running import run_study
from simulations.studies.study import seed_folder
from tests.simulations.studies.folders import (
    CASE,
    NOBODY,
    PROVENANCE,
    SECOND,
    pretend,
    write_study,
)


def run(folder, run_seed, *cases):
    run_study(folder, cases, provenance=PROVENANCE, watcher=NOBODY, run_seed=run_seed)


def test_cases_and_seeds_are_run_in_their_order(tmp_path):
    calls, ends = [], []
    watcher = replace(
        NOBODY,
        on_seed=lambda case, seed: calls.append((case.name, seed)),
        on_seed_end=lambda: ends.append(len(calls)),
    )

    run_study(
        tmp_path,
        (SECOND, CASE),
        provenance=PROVENANCE,
        watcher=watcher,
        run_seed=pretend,
    )

    assert calls == [("second", 0), *(("own_labels", seed) for seed in range(3))]
    assert ends == [1, 2, 3, 4]


def test_a_seed_is_run_with_the_methods_there_are_and_its_number(tmp_path):
    found = []

    run(tmp_path, lambda *given: found.append(given[:2]), CASE)

    experiment, out = found[2]
    assert experiment.methods == ("fedavg", "drop_weak", "smartsplit")
    assert experiment.seed == 2
    assert out == tmp_path / "own_labels" / "seed-2"


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
