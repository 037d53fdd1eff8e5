"""The run under a moving budget, on the digits, and what its summary would not hide."""

import json
from copy import copy
from dataclasses import replace

import pytest

from simulations.benchmarks import moving_budget
from simulations.benchmarks.moving_budget import Wave, main, make_course, summarised
from simulations.studies.quickstart import quickstart

STEPS = 30


@pytest.fixture(scope="module")
def course() -> moving_budget.Course:
    """Take thirty batches of the digits."""
    experiment = replace(quickstart("digits"), model="small")
    return make_course(experiment, cut=None, num_steps=STEPS)


def test_losses_are_equal_and_no_step_is_over_the_budget(course, capsys):
    """As the command prints it, with a row for each change."""
    main(steps=STEPS, as_json=True)
    summary = json.loads(capsys.readouterr().out)
    assert summary["status"] == "ok", summary["message"]
    assert (summary["losses_equal"], summary["state_equal"]) == (True, True)
    assert summary["steps_over_budget"] == 0
    assert summary["moves"]
    assert summary["replans"]
    main(steps=STEPS, as_json=False)
    assert "Losses of all steps equal: True" in " ".join(
        capsys.readouterr().out.split()
    )


def test_a_run_that_ignores_the_budget_is_seen(course):
    """Its peaks are above, and its losses are not the other's if a step is changed."""
    plain = course.run(None)
    moved = course.run(Wave(course.needed_bytes, STEPS))
    ignoring, other = copy(moved), copy(moved)
    ignoring.peaks = plain.peaks
    assert summarised(course, plain, ignoring)["steps_over_budget"] > 0
    other.losses = [*moved.losses[:-1], moved.losses[-1] + 1e-9]
    assert not summarised(course, plain, other)["losses_equal"]
