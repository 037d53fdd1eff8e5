"""Sequences longer than the task's example: told, priced, and given another route."""

from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from flwr_smartsplit import (
    Chain,
    Route,
    Task,
    predicted_peak_bytes,
    profile_chain,
)
from flwr_smartsplit.flower.rounds import manager
from flwr_smartsplit.flower.serde.records import to_array_record
from flwr_smartsplit.profile.example_shapes import (
    longer_than_example,
    with_example_shapes,
)
from flwr_smartsplit.split.build import state_of
from tests.flower.apps import Run, message_app, run, smart_split

SHORT, LONG = 4, 9


def model() -> nn.Module:
    """Build a network over sequences of any length."""
    widths = (6, 24, 24, 24, 3)
    pairs = pairwise(widths)
    return nn.Sequential(*(nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in pairs))


def mean_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Score each step of a sequence."""
    return nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())


TASK = Task(
    model_fn=model,
    loss_fn=mean_loss,
    optimizer_fn=partial(torch.optim.SGD, lr=0.1),
    example_inputs=torch.zeros(2, SHORT, 6),
    example_targets=torch.zeros(2, SHORT, dtype=torch.int64),
)


def batches(*lengths: int) -> list[Any]:
    """Make batches of sequences."""
    return [
        (torch.randn(4, length, 6), torch.randint(0, 3, (4, length)))
        for length in lengths
    ]


def peak_of(length: int, route: Route) -> int:
    """Predict a device's peak."""
    task = replace(
        TASK,
        example_inputs=torch.zeros(2, length, 6),
        example_targets=torch.zeros(2, length, dtype=torch.int64),
    )
    chain = Chain.from_module(model(), task.example_inputs)
    return predicted_peak_bytes(profile_chain(chain, batch_size=4, task=task), route)


def app(budget: int, *lengths: int, key: int = 0) -> ClientApp:
    """Make a client with batches of these lengths."""
    facts: dict[str, Any] = {"num_examples": 4 * len(lengths), "batch_size": 4}
    return message_app(key, budget, task=TASK, train_loader=batches(*lengths), **facts)


def trained(*apps: ClientApp, num_rounds: int = 3) -> Run:
    """Run clients that start from one state."""
    start = to_array_record(state_of(model()))
    strategy = smart_split(task=TASK, min_train_nodes=1, min_available_nodes=1)
    return run(apps, strategy, num_rounds=num_rounds, arrays=start)


def routes(made: Run, key: str = "c0") -> list[Route]:
    """List a client's route in each round."""
    return [
        assignment.option.route
        for plan in made.strategy.round_plans
        for assignment in plan.assignments
        if assignment.client_key == key
    ]


def test_who_met_longer_sequences_gets_another_route() -> None:
    budget = peak_of(SHORT, Route.whole())
    assert peak_of(LONG, Route.split(1)) <= budget < peak_of(LONG, Route.whole())
    made = trained(app(budget, SHORT, LONG, SHORT), app(budget, SHORT, SHORT, key=1))
    assert made.kinds() == [("c0", "out_of_memory")]  # in the first round only
    cause = made.strategy.failures[0].cause
    assert f"({LONG}, 6), ({LONG},)" in cause and f"({SHORT}, 6), ({SHORT},)" in cause
    first, *later = routes(made)
    assert first == Route.whole() and first not in later and len(later) == 2
    assert routes(made, "c1") == [Route.whole()] * 3


def test_the_price_of_a_longer_sequence_is_the_measured_peak() -> None:
    made = trained(app(10**9, LONG, LONG), num_rounds=2)
    assert made.kinds() == []
    (reply,) = (m for m in made.grid.replied[-1:])
    peak = int(reply.content["metrics"]["device-peak-bytes"])
    assert peak == peak_of(LONG, Route.whole())
    plan = made.strategy.round_plans[-1]
    assert plan.assignments[0].option.peak_bytes == peak


def test_who_can_take_no_route_then_sits_out() -> None:
    budget = peak_of(SHORT, Route.split(1))
    made = trained(app(budget, 40), app(10**9, SHORT, key=1))
    assert made.kinds() == [("c0", "out_of_memory")]
    assert all(
        "no route fits" in p.skipped["c0"] for p in made.strategy.round_plans[1:]
    )


def test_a_strategy_that_forgets_would_be_seen(monkeypatch: Any) -> None:
    """Planted: the same route in every round, and out of memory in each."""
    monkeypatch.setattr(manager, "longer_than_example", lambda *_: ())
    budget = peak_of(SHORT, Route.whole())
    made = trained(app(budget, SHORT, LONG), app(budget, SHORT, key=1))
    assert made.kinds() == [("c0", "out_of_memory")] * 3


def test_shapes_that_make_no_sense_are_not_believed() -> None:
    assert longer_than_example(((LONG, 6), (LONG,)), TASK) == ((LONG, 6), (LONG,))
    assert longer_than_example(((3, 6), (2,)), TASK) == ()
    for shapes in (((LONG,), (LONG,)), ((LONG, 6),), ((2**40, 6), (2**40,))):
        assert longer_than_example(shapes, TASK) == ()


def test_a_longer_example_keeps_its_order_of_dimensions() -> None:
    inputs = torch.zeros(2, 6, SHORT).transpose(1, 2)
    task = replace(TASK, example_inputs=inputs)
    chain = Chain.from_module(model(), inputs)
    longer, priced = with_example_shapes(chain, task, ((LONG, 6), (LONG,)))
    assert longer.example_inputs.shape == (2, LONG, 6)
    assert longer.example_inputs.stride() == (LONG * 6, 1, LONG)
    assert priced.example_targets.shape == (2, LONG)
