"""ProFL's growing: who trains which step, and whom none fits."""

import numpy as np

from flwr_smartsplit import Route, predicted_peak_bytes
from flwr_smartsplit.profile.task_profiles import profile_of
from flwr_smartsplit.split.build import build_chain
from simulations.experiments.clients import build_task
from simulations.methods.blocks import PROFL
from simulations.methods.blocks.profl import growing
from simulations.methods.drop_weak import DROP_WEAK
from tests.simulations.in_process import EXPERIMENT, run_here


class OfRounds:
    """A setting with no more than its rounds and its task."""

    def __init__(self, num_rounds):
        self.experiment = type("E", (), {"num_rounds": num_rounds})
        self.task = build_task(EXPERIMENT)


def test_rounds_are_divided_among_the_blocks():
    """The first ones have what is left over; each has one at least."""
    assert growing(OfRounds(8)).pace == (3, 3, 2)
    assert growing(OfRounds(1)).pace == (1, 1, 1)
    chain = build_chain(build_task(EXPERIMENT))
    ends = [chain.unit_names[end - 1] for end in growing(OfRounds(3)).blocks]
    assert ends == ["relu1", "pool2", "pool3"]


def test_a_device_trains_the_steps_that_fit_it(tmp_path):
    """The whole model fits one; the others have memory for two steps, or for one."""
    task = build_task(EXPERIMENT)
    steps = growing(OfRounds(3)).steps(build_chain(task).unit_names)
    size = EXPERIMENT.batch_size
    peaks = [
        predicted_peak_bytes(
            profile_of(task, batch_size=size, variant=step), Route.whole()
        )
        for step in steps
    ]
    ordered = sorted(peaks)
    budgets = (None, ordered[1], ordered[0])

    ended = run_here(PROFL, tmp_path, budgets_bytes=budgets, num_rounds=3)

    taken = {"0": set(), "1": set(), "2": set()}
    for row in ended.of_kind("client"):
        if row["status"] == "accepted":
            taken[row["client_key"]].add(row["variant"])
            assert row["peak_bytes"] == row["predicted_peak_bytes"]
    fitting = [
        {s.name for s, p in zip(steps, peaks, strict=True) if b is None or p <= b}
        for b in budgets
    ]
    assert [taken[key] for key in "012"] == fitting
    assert [len(each) for each in fitting] == [3, 2, 1]


def test_another_method_is_another_model(tmp_path):
    """The steps change what is trained."""
    found = run_here(PROFL, tmp_path, num_rounds=3).after
    other = run_here(DROP_WEAK, tmp_path, num_rounds=3).after
    assert not all(np.array_equal(found[name], other[name]) for name in other)
