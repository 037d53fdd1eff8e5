"""The guard alone catches every planted difference, and costs little.

The plants break what a step does, below everything that looks at a model beforehand:
no list and no probe of the product can help.
"""

import logging
import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from flwr_smartsplit.device import route_runner
from flwr_smartsplit.errors import NotExact
from flwr_smartsplit.profile.task_profiles import profile_of
from flwr_smartsplit.split import activation_checkpointing, build
from flwr_smartsplit.split.chain import Chain
from flwr_smartsplit.split.segment import Unit
from flwr_smartsplit.task import Task
from flwr_smartsplit.train import segment_runner, unit_migration
from flwr_smartsplit.types import RecomputePlan, Rerun
from flwr_smartsplit.verify import guard
from flwr_smartsplit.verify.guard import Guard, Trial, compare, guard_trials
from tests.flower.apps import apps, run, smart_split
from tests.flower.legacy import legacy_smart_split, run_legacy
from tests.models import OPTIMIZERS, small_cnn, task_of


def cnn_task(**changes: Any) -> Task:
    task = task_of(small_cnn, optimizer=OPTIMIZERS["momentum"])
    return replace(task, example_targets=torch.arange(10), **changes)


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)
    )


def mlp_task(model_fn: Callable[[], nn.Module] = mlp, **changes: Any) -> Task:
    task = task_of(model_fn, optimizer=OPTIMIZERS["momentum"], shape=(6,))
    return replace(task, example_targets=torch.arange(3), **changes)


def trials_of(task: Task) -> list[Trial]:
    """List the guard's trials, with every list of what must not rerun switched off."""
    trials = guard_trials(profile_of(task, batch_size=4))
    size = len(build.build_chain(task))
    rerun = RecomputePlan((Rerun(0, size),)), RecomputePlan((), tuple(range(size)))
    return [replace(trials[0], recompute=rerun), *trials[1:]]


def verify(task: Task) -> bool:
    return compare(task, trials_of(task), config={}, place="a test")


@pytest.mark.every(4)
@pytest.mark.parametrize(
    "task",
    [
        cnn_task(),
        cnn_task(optimizer_fn=OPTIMIZERS["adam"], accumulate=3, max_gradient_norm=0.5),
        mlp_task(),
        mlp_task(partial(nn.Linear, 6, 3)),
    ],
    ids=["network", "clipped parts", "layers", "one unit"],
)
def test_nothing_is_found_where_nothing_is_wrong(task):
    assert verify(task)


def test_it_costs_at_most_ten_steps():
    """Counted in floating-point operations, evaluation and reruns included."""
    task = cnn_task()
    profile_of(task, batch_size=4)
    with FlopCounterMode(display=False) as steps:
        model = small_cnn()
        nn.functional.cross_entropy(
            model(torch.zeros(2, 3, 12, 12)), torch.zeros(2, dtype=torch.int64)
        ).backward()
    with FlopCounterMode(display=False) as all_steps:
        assert verify(task)
    assert 8 < all_steps.get_total_flops() / steps.get_total_flops() <= 10


# --- planted differences --------------------------------------------------------------


class Counts(nn.Module):
    """A buffer that counts runs, and scales what passes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        self.calls.add_(1)
        return self.last(torch.tanh(x / self.calls))


def repeated_counter(monkeypatch: Any) -> Task:
    """A rerun counts again."""
    return mlp_task(Counts)


def repeated_statistics(monkeypatch: Any) -> Task:
    """A rerun updates running statistics again."""
    monkeypatch.setattr(
        activation_checkpointing, "statistics_kept", lambda root: nullcontext()
    )
    return cnn_task()


class Tied(nn.Module):
    """One weight under two names, and one layer with a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight
        self.c = nn.Linear(6, 3)
        self.shortcut = self.c

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def lost_alias(monkeypatch: Any) -> Task:
    """The second name of a shared layer keeps its old value."""
    monkeypatch.setattr(Chain, "with_aliases", lambda self, state: dict(state))
    return mlp_task(Tied)


def wrong_mask(monkeypatch: Any) -> Task:
    """A unit that draws is taken for one that does not."""
    changed = _changing_units(lambda unit: replace(unit, is_random=False))
    monkeypatch.setattr(Chain, "segment", changed)
    return cnn_task()


def _changing_units(change: Callable[[Unit], Unit]) -> Any:
    segment = Chain.segment

    def changed(self: Chain, *args: Any, **kwargs: Any) -> Any:
        units, self.units = self.units, tuple(map(change, self.units))
        try:
            return segment(self, *args, **kwargs)
        finally:
            self.units = units

    return changed


def drop_buffer(monkeypatch: Any, dropped: str) -> None:
    """Leave a buffer behind that training changes."""
    changed_names = Chain.changed_names

    def fewer(self: Chain, start: int, stop: int) -> tuple[str, ...]:
        names = changed_names(self, start, stop)
        return tuple(name for name in names if name != dropped)

    monkeypatch.setattr(Chain, "changed_names", fewer)


def dropped_buffer(monkeypatch: Any) -> Task:
    """A buffer that training changes stays behind."""
    drop_buffer(monkeypatch, "norm2.running_var")
    return cnn_task()


def misread_forward(monkeypatch: Any) -> Task:
    """Units leave something out, as a trace does that takes another branch."""

    def units(model: nn.Module) -> list[Unit]:
        def layer(name: str, root: Any, x: Tensor) -> Tensor:
            return root.get_submodule(name)(x)

        return [Unit(n, partial(layer, n), (n,)) for n in ("0", "2", "3", "4")]

    return mlp_task(units_fn=units)


def stale_weight(monkeypatch: Any) -> Task:
    """What runs again reads weights that were updated meanwhile."""

    def updated(root: nn.Module) -> Any:
        with torch.no_grad():
            for parameter in root.parameters():
                parameter.mul_(0.99)
        return nullcontext()

    monkeypatch.setattr(activation_checkpointing, "statistics_kept", updated)
    return mlp_task()


def forgotten_momentum(monkeypatch: Any) -> Task:
    """Units that move leave their optimizer's state behind."""
    monkeypatch.setattr(unit_migration, "_give_states", lambda *_: None)
    return mlp_task()


def wrong_clipping(monkeypatch: Any) -> Task:
    """Places clip by another norm than that of all gradients."""
    norm = route_runner.total_norm
    monkeypatch.setattr(route_runner, "total_norm", lambda *args: norm(*args) * 2)
    return mlp_task(max_gradient_norm=0.1)


def lost_update(monkeypatch: Any) -> Task:
    """Parameters stepped inside backward are stepped again after it."""
    monkeypatch.setattr(
        segment_runner.SegmentRunner, "release_gradients", lambda self: None
    )
    return mlp_task()


PLANTS = {
    repeated_counter: ("truediv", "first.weight"),
    repeated_statistics: ("relu1", "norm1.running_mean"),
    lost_alias: ("", ""),
    wrong_mask: ("drop", ""),
    dropped_buffer: ("norm2", "norm2.running_var"),
    misread_forward: ("2", "1, where 2 runs"),
    stale_weight: ("", ""),
    forgotten_momentum: ("", ""),
    wrong_clipping: ("", ""),
    lost_update: ("", ""),
}


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_the_guard_alone_catches_what_is_planted(plant, monkeypatch):
    """The error names the unit and the tensor, and says at what route it shows."""
    task = plant(monkeypatch)
    with pytest.raises(NotExact) as caught:
        verify(task)
    unit, tensor = PLANTS[plant]
    assert unit in caught.value.unit
    assert tensor in caught.value.tensor
    assert caught.value.unit in build.build_chain(task).unit_names
    assert caught.value.trial in str(caught.value)


def test_the_cause_is_the_recomputation_the_move_or_the_route(monkeypatch):
    """A trial does several things at once; the error names the one that goes wrong."""
    causes = {
        repeated_statistics: "route whole, recomputing [0:13] in the first step",
        forgotten_momentum: "the first cut moved to 1 after one step",
    }
    for plant, cause in causes.items():
        with monkeypatch.context() as patch, pytest.raises(NotExact) as caught:
            verify(plant(patch))
        assert cause in caught.value.trial


# --- when it looks, and what it leaves alone ------------------------------------------


@pytest.fixture
def comparisons(monkeypatch, tmp_path) -> list[str]:
    """List at which places something was compared, with an empty cache."""
    found: list[str] = []

    def looks(task: Task, trials: Any, *, config: Any, place: str) -> bool:
        found.append(place)
        return True

    monkeypatch.setattr(guard, "compare", looks)
    monkeypatch.setattr(guard, "_done", set())
    monkeypatch.setenv(guard.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(guard.VERIFY_VARIABLE)
    return found


def look(task: Task, place: str = "x", **facts: Any) -> None:
    Guard(place=place, **facts).verify(
        task, lambda: profile_of(task, batch_size=4), config={}
    )


def test_once_is_once_for_each_task_and_process_memory_is_not_needed(
    comparisons, monkeypatch
):
    task = mlp_task()
    look(task, "first")
    look(task, "again")
    monkeypatch.setattr(guard, "_done", set())
    look(task, "in another process")
    look(mlp_task(accumulate=2), "another task")
    look(task, "another rule", may_recompute=False)
    monkeypatch.setattr(guard, "_our_code", lambda: "newer")
    look(task, "another version")
    assert comparisons == ["first", "another task", "another rule", "another version"]


def test_always_is_in_every_run_and_off_is_never(comparisons, monkeypatch):
    task = mlp_task()
    for place in ("first", "second"):
        look(task, place, mode="always")
        look(task, f"client of {place}", mode="always", is_client=True)
        look(task, place, mode="off")
    assert comparisons == ["first", "client of first", "second"]
    monkeypatch.setenv(guard.VERIFY_VARIABLE, "off")
    look(mlp_task(accumulate=4), "once", mode="once")
    look(mlp_task(accumulate=4), "always", mode="always")
    assert comparisons[3:] == ["always"]


def test_a_device_compares_if_the_whole_model_fits(comparisons, caplog):
    with caplog.at_level(logging.DEBUG, "flwr"):
        look(mlp_task(), "client 'small'", budget_bytes=1000)
    assert comparisons == []
    assert (
        "client 'small' does not compare the chain with the stock module" in caplog.text
    )
    look(mlp_task(), "client 'large'", budget_bytes=10**6)
    assert comparisons == ["client 'large'"]


def chance() -> tuple[Any, ...]:
    numbers = np.random.get_state()[1]  # noqa: NPY002 - as a model may use it
    return torch.get_rng_state().tolist(), random.getstate(), numbers.tolist()


def test_nothing_that_a_user_sees_is_changed():
    """Neither generators nor a loss that counts."""

    class Counting(nn.Module):
        calls = 0

        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            self.calls += 1
            return nn.functional.cross_entropy(outputs, targets)

    loss = Counting()
    task = mlp_task(loss_fn=loss)
    trials = trials_of(task)
    before, calls = chance(), loss.calls
    assert compare(task, trials, config={}, place="a test")
    assert before == chance()
    assert calls == loss.calls


class Picky(nn.Module):
    """Takes inputs between 0 and 1 only."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.log(x) + torch.log1p(-x)


def test_a_model_that_refuses_drawn_inputs_is_compared_on_its_examples(caplog):
    def model() -> nn.Module:
        return nn.Sequential(Picky(), nn.Linear(6, 3))

    good = mlp_task(model, example_inputs=torch.full((1, 6), 0.25))
    assert verify(good)
    bad = replace(good, example_inputs=torch.full((1, 6), 2.0))
    assert not verify(bad)
    assert "does not train on the task's example inputs" in caplog.text


# --- in a run -------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["once", "always", False])
def test_a_run_compares_before_it_trains(mode, monkeypatch, tmp_path):
    """Nothing is trained if the chain differs; False trains it all the same."""
    monkeypatch.setenv(guard.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.delenv(guard.VERIFY_VARIABLE)
    drop_buffer(monkeypatch, "1.running_var")
    strategy = smart_split(verify=mode)
    if not mode:
        run(apps([None, None]), strategy)
        return
    with pytest.raises(NotExact, match=r"1\.running_var.*Nothing was trained"):
        run(apps([None, None]), strategy)
    assert not strategy.round_plans or not list(tmp_path.rglob("verified/*"))


def test_the_legacy_strategy_compares_too(monkeypatch):
    drop_buffer(monkeypatch, "1.running_var")
    with pytest.raises(NotExact, match=r"1\.running_var"):
        run_legacy(apps([None, None]), legacy_smart_split(verify="always"))


def test_a_run_is_compared_once_by_the_strategy_and_then_nowhere(comparisons):
    run(apps([None, None]), smart_split(verify="once"))
    assert comparisons == ["the strategy"]


def test_a_client_in_an_environment_of_its_own_compares_before_it_trains(
    comparisons, monkeypatch
):
    """Its error is its failure, and the others count."""

    def differs_on_c0(task: Task, trials: Any, *, config: Any, place: str) -> bool:
        if place == "client 'c0'":
            raise NotExact("wrong here", unit="u", tensor="t", trial="x")
        return False  # Nothing is remembered, as on another machine.

    monkeypatch.setattr(guard, "compare", differs_on_c0)
    done = run(apps([None, None]), smart_split(verify="once"), num_rounds=1)
    assert done.kinds() == [("c0", "failed")]
    assert "wrong here" in done.strategy.failures[0].cause


def test_a_wrong_word_is_refused():
    with pytest.raises(ValueError, match="verify is 'sometimes'"):
        smart_split(verify="sometimes")
