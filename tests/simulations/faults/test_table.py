"""Faults in real processes: what they cost, and that a planted error shows."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from signal import SIGKILL

import pytest

from flwr_smartsplit import Route, predicted_peak_bytes
from flwr_smartsplit.profile.task_profiles import profile_of
from simulations.faults import task
from simulations.faults.cases import CASES, ENDS, Case
from simulations.faults.moments import STRATEGY, Hang, Signal, Trap
from simulations.faults.run import APIS, RunOptions
from simulations.faults.stage import Rules, Stage
from simulations.faults.table import References, differences, play

BY_NAME = {case.name: case for case in CASES}
EACH_DAY = ["link cut in a step"]
OTHERS = [name for name in BY_NAME if name not in EACH_DAY]


@cache
def references(folder: Path, api: str) -> References:
    """Keep the undisturbed runs of all tests."""
    return References(folder / api, api)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder for them."""
    return tmp_path_factory.mktemp("references")


def check(name: str, api: str, shared: Path, folder: Path) -> None:
    """Inject one fault; nothing may be wrong."""
    row, _ = play(BY_NAME[name], references(shared, api), folder, api=api)
    assert row.problems == []
    if BY_NAME[name].may != ENDS:
        assert row.weights.startswith("bit-equal")


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH_DAY)
def test_a_fault_costs_what_the_table_says(
    name: str, shared: Path, tmp_path: Path
) -> None:
    """Or less; the weights are those of a run without the clients left out."""
    check(name, "message", shared, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("name", OTHERS)
def test_so_does_every_other(name: str, api: str, shared: Path, tmp_path: Path) -> None:
    """In both of Flower's APIs."""
    check(name, api, shared, tmp_path)


def test_the_budget_is_just_enough() -> None:
    """A byte that is held too long is out of memory."""
    profile = profile_of(task.TASK, batch_size=task.BATCH_SIZE)
    split = Route.split(task.CUT)
    assert predicted_peak_bytes(profile, split) == task.SPLIT_BYTES


# --- planted errors -------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_that_hangs_is_found(tmp_path: Path) -> None:
    """It is ended, and said to hang."""
    traps = (Trap(STRATEGY, "before Commit", Hang()),)
    options = RunOptions(folder=tmp_path, traps=traps)
    ended = Stage(options, Rules(most_seconds=5.0)).play()
    assert ended.was_hung
    assert ended.left == ["a strategy that hangs"]


@pytest.mark.slow
def test_what_is_left_behind_is_found(tmp_path: Path) -> None:
    """A ServerApp that dies leaves its run at the edge until the lease is over."""
    traps = (Trap("b", "before Forward", Signal(STRATEGY, SIGKILL)),)
    options = RunOptions(folder=tmp_path, traps=traps)
    rules = Rules(lease_seconds=600.0, tidy_seconds=2.0)
    ended = Stage(options, rules).play()
    assert any(each.endswith(" runs") for each in ended.left)
    assert any(each.startswith("file ") for each in ended.left)


@pytest.mark.slow
def test_another_runs_weights_differ(shared: Path, tmp_path: Path) -> None:
    """One client of one round is enough; a moment that never comes is told, too."""
    all_runs = references(shared, "message")
    whole = all_runs.state(frozenset())
    assert differences(whole, all_runs.state(frozenset({("c", 3)}))) != []
    case: Case = replace(
        BY_NAME["link cut in a step"],
        traps=(Trap("b", "before Forward", Hang(), nth=99),),
    )
    row, _ = play(case, all_runs, tmp_path)
    assert row.problems == ["only 0 of 1 moments came"]
