"""How large gradients were is reported from their norms, wherever they were computed.

The truth looks at the gradients themselves, as autograd leaves them in the whole model.
"""

from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from flwr_smartsplit import (
    RoundOutcome,
    Route,
    Task,
    Variant,
    VariantRequest,
)
from flwr_smartsplit.edge.hosts.local import LocalEdge
from flwr_smartsplit.plan.routes import RouteRequest
from flwr_smartsplit.train import optimizer_in_backward, segment_runner
from flwr_smartsplit.types import FISHER, width_of
from tests.flower.apps import legacy_app, message_app, run
from tests.flower.apps import smart_split as strategy_of
from tests.flower.legacy import legacy_smart_split, run_legacy
from tests.tasks import TASK, differences

EDGES = (LocalEdge(name="near"), LocalEdge(name="far"))
ROUTES = [
    Route.whole(),
    Route.split(2, edge="near"),
    Route.split(7, edge="near"),
    Route.u_shape(3, 7, edge="near"),
    Route.hops((1, 5), edges=("near", "far")),
]
TASKS = {
    "early": TASK,
    "late": replace(TASK, optimizer_fn=lambda p: torch.optim.SGD(p, 0.1, foreach=True)),
    "clipped": replace(TASK, max_gradient_norm=0.1),
    "accumulated": replace(TASK, accumulate=2),
}
# Not in the task, whose content is compared from round to round.
NOTED: ContextVar[list[list[float]]] = ContextVar("NOTED")
ALONE = {"min_train_nodes": 1, "min_available_nodes": 1}
BATCHES = (4, 4, 1)  # Of client 0


@dataclass(frozen=True)
class Asking:
    """Offer one width, and note what was reported."""

    seen: list[RoundOutcome]
    rate: float = 1.0
    wants_fisher: bool = True

    def offered(self, request: VariantRequest) -> Sequence[Variant]:
        return (width_of(request.groups, self.rate),)

    def learned(self, outcome: RoundOutcome) -> None:
        self.seen.append(outcome)


class Seeing(torch.optim.Optimizer):
    """Note the mean square of each gradient before anybody clips it, then step."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        parameters = [p for group in inner.param_groups for p in group["params"]]
        super().__init__(parameters, {})
        self.inner = inner
        self.now: dict[int, float] = {}
        for index, parameter in enumerate(parameters):

            def see(p: torch.Tensor, index: int = index) -> None:
                if not hasattr(p.grad, "fake_mode"):  # Not a dry run's
                    self.now[index] = float((p.grad.double() ** 2).mean())

            parameter.register_post_accumulate_grad_hook(see)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if self.now:
            NOTED.get().append([*self.now.values()])
        self.inner.step(closure)


@pytest.fixture(autouse=True)
def all_are_early(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Update small parameters in backward, too: those of this task are small."""
    monkeypatch.setattr(optimizer_in_backward, "LEAST_EARLY_BYTES", 1)
    NOTED.set([])
    # Torch changes the class when it is first used, and a task's classes are compared.
    Seeing(torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1))
    yield


def reported(task: Task, route: Route, rate: float = 1.0, **changes: Any) -> Any:
    """Train client 0 for one round; return what it reported, and the state."""
    seen: list[RoundOutcome] = []

    def chosen(_: RouteRequest) -> Route:
        return route

    rule = changes.pop("rule", Asking(seen, rate))
    strategy = strategy_of(
        EDGES, task=task, variants=rule, choose_route=chosen, **ALONE
    )
    made = run([message_app(0, edges=EDGES, task=task)], strategy, num_rounds=1)
    return seen and seen[0].clients["c0"].metrics, made.state


def truth(task: Task, rate: float) -> float:
    """Compute the proxy from the gradients of the whole model."""
    make = task.optimizer_fn
    watched = replace(task, optimizer_fn=lambda p: Seeing(make(p)))
    reported(watched, Route.whole(), rate)
    steps = zip(NOTED.get(), BATCHES, strict=True)
    return max(max(squares) / size for squares, size in steps)


@pytest.mark.parametrize("rate", [1.0, 0.5])
@pytest.mark.parametrize("name", TASKS)
def test_it_is_what_the_gradients_say(name: str, rate: float) -> None:
    """Updated early or late, clipped, accumulated; on every kind of route."""
    task = TASKS[name]
    wanted = truth(task, rate)
    for route in ROUTES:
        metrics, _ = reported(task, route, rate)
        assert metrics[FISHER] == pytest.approx(wanted, rel=1e-6), route


@pytest.mark.parametrize("route", ROUTES[:3], ids=str)
def test_looking_changes_nothing(route: Route) -> None:
    """The state is the same to the bit, and nobody who is not asked reports it."""
    _, asked = reported(TASK, route)
    seen: list[RoundOutcome] = []
    rule = Asking(seen, wants_fisher=False)
    _, plain = reported(TASK, route, rule=rule)
    assert differences(asked, plain) == []
    assert FISHER not in seen[0].clients["c0"].metrics


def test_both_apis_report_it() -> None:
    """Under Flower's older API, too."""
    (metrics, _), seen = reported(TASK, Route.whole()), []
    strategy = legacy_smart_split((), variants=Asking(seen))
    run_legacy([legacy_app(0), legacy_app(1)], strategy, num_rounds=1)
    assert seen[0].clients["c0"].metrics == metrics


def test_a_gradient_that_is_left_out_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted error: only what is left at the end of backward is looked at."""

    class OnlyLate(segment_runner.NormsInBackward):
        def __call__(self, parameter: torch.Tensor) -> None:
            """Miss it."""

    wanted = truth(TASK, 1.0)
    monkeypatch.setattr(segment_runner, "NormsInBackward", OnlyLate)
    metrics, _ = reported(TASK, Route.whole())
    assert metrics[FISHER] != pytest.approx(wanted, rel=1e-6)
