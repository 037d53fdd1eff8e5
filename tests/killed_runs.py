"""Runs that can be killed at any moment, and resumed: ``python -m tests.killed_runs``.

A moment is before or after a call of Flower's loop, or a message to a client.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, MetricRecord
from flwr.common import ndarrays_to_parameters
from flwr.server import strategy as legacy
from flwr.serverapp import strategy as message

from flwr_smartsplit import (
    Checkpoints,
    LegacySmartSplit,
    RecomputePlan,
    Route,
    SmartSplit,
)
from flwr_smartsplit.edge.hosts.local import LocalEdge
from flwr_smartsplit.flower.serde.records import from_array_record
from flwr_smartsplit.server.aggregation import RoundSummary
from flwr_smartsplit.types import ClientPlan, StepReport
from tests.flower.apps import budgets_of, composed, message_app, run
from tests.flower.legacy import run_legacy
from tests.in_process_grid import InProcessGrid
from tests.tasks import SEED, TASK, State, initial_state

CALLS = """initialize_parameters configure_train configure_fit aggregate_train
    aggregate_fit configure_evaluate aggregate_evaluate""".split()


class Killed(BaseException):
    """The process ends here."""


class Noise:
    """A server step with a momentum, a count and a random generator of its own."""

    def __init__(self) -> None:
        self.chance = np.random.default_rng(3)
        self.velocity: dict[str, Any] = {}
        self.num_steps = 0

    def step(self, before: State, after: State, summary: RoundSummary) -> State:
        """Return the next state."""
        del summary
        self.num_steps += 1
        for name, array in after.items():
            if array.dtype == np.float32:
                velocity = 0.9 * self.velocity.get(name, 0) + (array - before[name])
                self.velocity[name] = velocity
                noise = self.chance.normal(size=array.shape) / 1000 / self.num_steps
                after = {**after, name: array + 0.1 * velocity + noise}
        return after


def paced(plan: ClientPlan, route: Route, recompute: RecomputePlan) -> float:
    """Let every client have a speed of its own, which the strategy learns."""
    del recompute
    at_device = route.cuts[0] if route.cuts else 9
    return at_device * (1.0 + int(plan.client_key[1:])) + 1e-3


def given_seconds(plan: ClientPlan, report: StepReport) -> float:
    """Say how long a client took, the same in every run."""
    return report.num_examples * (1.0 + int(plan.client_key[1:]))


@dataclass(frozen=True)
class Kind:
    """One kind of run: an API, an inner strategy, what the server adds."""

    api: str
    inner: str = "FedAvg"
    with_noise: bool = False

    def __str__(self) -> str:
        """Name it in a test's id."""
        return f"{self.api} {self.inner}{' and noise' if self.with_noise else ''}"


@dataclass(frozen=True)
class Ended:
    """What is the same in a resumed run, whatever it is compared with."""

    state: State
    results: tuple[Any, ...]
    strategy: Any

    @property
    def plans(self) -> dict[int, Any]:
        """What each client did in the rounds of the last process."""
        return {
            plan.round_number: [(a.client_key, a.option) for a in plan.assignments]
            for plan in self.strategy.round_plans
        }


def run_kind(
    kind: Kind,
    checkpoints: Checkpoints | None = None,
    *,
    num_rounds: int = 5,
    moment: int = sys.maxsize,
    apps: Callable[..., Any] = message_app,
    **changes: Any,
) -> Ended:
    """Run it until it ends, or until a moment comes."""
    left = [moment]

    def pass_moment() -> None:
        left[0] -= 1
        if left[0] <= 0:
            raise Killed

    class Grid(InProcessGrid):
        def _answers(self, message: Any) -> Any:
            if kind.api == "message":  # Threads ask in the legacy API.
                pass_moment()
            return super()._answers(message)

    def evaluate(server_round: int, arrays: Mapping[str, Any]) -> float:
        pass_moment()
        return sum(float(np.abs(a).sum()) for a in arrays.values()) + server_round

    def evaluate_record(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        value = evaluate(server_round, from_array_record(arrays))
        return MetricRecord({"sum": value})

    def evaluate_arrays(server_round: int, arrays: Any, _: Any) -> Any:
        value = evaluate(server_round, dict(enumerate(arrays)))
        return value, {"sum": value}

    options: dict[str, Any] = {
        "seed": SEED,
        "journal": None,
        "client_seconds": given_seconds,
    }
    options |= {"checkpoints": checkpoints, **changes}
    is_message = kind.api == "message"
    options = {**_sampling(is_message, evaluate_arrays), **_step(kind), **options}
    api = message if is_message else legacy
    strategy = composed(
        _mortal(SmartSplit if is_message else LegacySmartSplit, pass_moment),
        getattr(api, kind.inner),
        options.pop("task", TASK),
        (LocalEdge(),),
        **options,
    )
    budgets = enumerate(budgets_of(1, 4, None, 8))
    clients = [apps(index, budget, step_seconds=paced) for index, budget in budgets]
    ended: Any
    if is_message:
        ended = run(
            Grid(clients), strategy, num_rounds=num_rounds, evaluate_fn=evaluate_record
        )
        result = ended.result
        results = (
            result.train_metrics_clientapp,
            result.evaluate_metrics_clientapp,
            result.evaluate_metrics_serverapp,
        )
    else:
        ended = run_legacy(Grid(clients), strategy, num_rounds=num_rounds)
        results = tuple(vars(ended.history).values())
    return Ended(ended.state, _without_times(results), strategy)


def resumed(
    kind: Kind, checkpoints: Checkpoints, moments: list[int], **options: Any
) -> Ended:
    """Kill a run at these moments of its processes; the last one ends."""
    for moment in moments:
        try:
            run_kind(kind, checkpoints, moment=moment, **options)
        except Killed:
            continue
    return run_kind(kind, checkpoints, **options)


def _mortal(kind: Any, pass_moment: Callable[[], None]) -> Any:
    """Make a strategy that can be killed before and after each call."""

    def wrapped(name: str) -> Any:
        usual = getattr(kind, name)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            pass_moment()
            result = usual(self, *args, **kwargs)
            pass_moment()
            return result

        return call

    return type("Mortal", (kind,), {n: wrapped(n) for n in CALLS if hasattr(kind, n)})


def _sampling(is_message: bool, evaluate: Any) -> dict[str, Any]:
    """Choose half of the clients."""
    names = ("train", "nodes") if is_message else ("fit", "clients")
    ours = {f"fraction_{names[0]}": 0.5, "fraction_evaluate": 0.5}
    if not is_message:
        initial = ndarrays_to_parameters(list(initial_state().values()))
        ours |= {"evaluate_fn": evaluate, "initial_parameters": initial}
    return {**ours, f"min_{names[0]}_{names[1]}": 2}


def _step(kind: Kind) -> dict[str, Any]:
    found: dict[str, Any] = {"server_steps": (Noise(),)} if kind.with_noise else {}
    if kind.inner == "FedAvgM":
        found |= {"server_momentum": 0.9, "server_learning_rate": 0.5}
    return found


def _without_times(value: Any) -> Any:
    """Leave out how long things took."""
    if isinstance(value, Mapping):
        items = value.items()
        return {k: _without_times(v) for k, v in items if "seconds" not in str(k)}
    if isinstance(value, list | tuple):
        return [_without_times(each) for each in value]
    return value


if __name__ == "__main__":
    api, folder, num_rounds = sys.argv[1:]
    saved = Checkpoints(Path(folder) / "run") if num_rounds.startswith("+") else None
    made = run_kind(Kind(api, "FedAdam", True), saved, num_rounds=int(num_rounds))
    np.savez(Path(folder) / "final.npz", **made.state)
