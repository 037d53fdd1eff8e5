"""Defences: the same bits on every route, predicted memory, and what they promise."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context
from torch import Tensor, nn

from flwr_smartsplit import Defence, Route, Task, Widths, build_client_app
from flwr_smartsplit.defence import distance_correlation
from flwr_smartsplit.device.local_training import Conditions, train_locally
from flwr_smartsplit.device.route_runner import RouteRunner
from flwr_smartsplit.edge.hosts.edge import Edge
from flwr_smartsplit.edge.hosts.local import LocalEdge
from flwr_smartsplit.errors import (
    InvalidRoute,
    InvalidTask,
    RefusedMove,
    SmartSplitError,
)
from flwr_smartsplit.flower.serde.records import to_array_record
from flwr_smartsplit.plan.checkpointing.peak_memory import predicted_peak_bytes
from flwr_smartsplit.plan.checkpointing.plan import least_bytes
from flwr_smartsplit.plan.routes import RouteRequest
from flwr_smartsplit.profile.task_profiles import profile_of
from flwr_smartsplit.split.build import build_chain
from flwr_smartsplit.train.rng import UnitStreams
from tests.edge.hosts.edge_process import EdgeProcess
from tests.flower.apps import Run, make_client, message_app, run, smart_split
from tests.tasks import (
    BATCH_SIZE,
    NUM_CLASSES,
    TASK,
    client_plan,
    differences,
    initial_state,
)

NOPEEK = Defence(after="2", nopeek=0.5)
NOISE = Defence(after="0", clip=3.0, noise=0.1)
BOTH = Defence(after="0", nopeek=0.5, clip=3.0, noise=0.1)
EDGES = (LocalEdge(name="near"), LocalEdge(name="far"))
ROUTES = {
    "c0": Route.whole(),
    "c1": Route.split(5, edge="far"),
    "c2": Route.u_shape(4, 8, edge="near"),
    "c3": Route.hops((4, 7), edges=("near", "far")),
}
MOVES: dict[str, dict[int, int]] = {
    "c0": {},
    "c1": {0: 8, 1: 4, 2: 6},
    "c2": {1: 6, 2: 4},
    "c3": {2: 6},
}


def by_key(request: RouteRequest) -> Route:
    """Give each client its own kind of route."""
    return ROUTES[request.device.client_key]


def moving(runner: RouteRunner) -> None:
    """Move a client's cut as is planned for it."""
    plan = MOVES[runner.plan.client_key]
    if runner.num_steps in plan:
        runner.move(plan[runner.num_steps])


def trained(
    task: Task,
    *,
    edges: Any = EDGES,
    given: Any = None,
    between: Callable[[RouteRunner], None] | None = None,
    noise_seed: int | None = 5,
    budgets: Any = (None,) * 4,
    **changes: Any,
) -> Run:
    """Run two rounds of four clients, given the strategy's edges or others."""

    def app(index: int) -> Any:
        def client_fn(context: Context) -> Any:
            own = {"context": context, "noise_seed": noise_seed, "task": task}
            known = edges if given is None else given
            client = make_client(index, budgets[index], edges=known, **own)
            client._conditions = replace(client._conditions, between_steps=between)
            return client

        return build_client_app(client_fn)

    strategy = smart_split(edges, task=task, **changes)
    return run([app(index) for index in range(len(budgets))], strategy)


def whole(task: Task, **changes: Any) -> Run:
    """Run whole models only."""
    return trained(task, edges=(), **changes)


@pytest.mark.every(6)
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("defence", [BOTH, NOPEEK, NOISE])
def test_every_route_gives_the_bits_of_whole_models(
    defence: Defence, accumulate: int
) -> None:
    """Split, u-shaped, over two edges, with cuts that move; and it does something."""
    task = replace(TASK, defence=defence, accumulate=accumulate)
    truth = whole(task)
    found = trained(task, choose_route=by_key, between=moving)
    assert found.kinds() == truth.kinds() == []
    assert differences(found.state, truth.state) == []
    plain = whole(replace(task, defence=None))
    assert len(differences(plain.state, truth.state)) > 10


def test_narrow_clients_are_defended_alike() -> None:
    """Their cuts move, too; and edges admit units of the narrow model only."""
    task = replace(TASK, defence=BOTH)
    rule = Widths((0.5,), roll=True)
    truth = whole(task, variants=rule)
    found = trained(task, choose_route=by_key, between=moving, variants=rule)
    assert found.kinds() == truth.kinds() == []
    assert differences(found.state, truth.state) == []
    assert differences(found.state, whole(task).state)


def build_defended_task() -> Task:
    """Build what ``smartsplit edge`` serves below."""
    return replace(TASK, defence=BOTH)


def differences_over(edge: Edge, *, given: Any = None) -> list[str]:
    """Run split and u-shaped clients over an edge; compare with whole models."""
    task = build_defended_task()
    routes = {"c1": Route.split(5), "c2": Route.u_shape(4, 8)}

    def choose(request: RouteRequest) -> Route:
        return routes.get(request.device.client_key, Route.whole())

    truth = whole(task)
    found = trained(task, edges=(edge,), given=given, choose_route=choose)
    assert found.kinds() == truth.kinds() == []
    return differences(found.state, truth.state)


@pytest.mark.slow
def test_it_is_the_same_over_a_network(tmp_path: Path) -> None:
    """NoPeek's gradient and the noise come from the device, wherever the edge is."""
    served = "tests.test_defence:build_defended_task"
    process = EdgeProcess(tmp_path, model=served).start()
    assert differences_over(process.edge(), given=()) == []
    assert process.stop() == 0


@pytest.mark.every(3)
@pytest.mark.parametrize("defence", [BOTH, NOPEEK, NOISE])
def test_peaks_are_predicted_to_the_byte(defence: Defence) -> None:
    """Clients that have exactly what their route needs, with recomputation too.

    Before NoPeek nothing is run twice, since its peak would be predicted too high.
    """
    task = replace(TASK, defence=defence)
    profile = profile_of(task, batch_size=BATCH_SIZE)
    routes = [Route.whole(), *(Route.split(cut) for cut in (4, 7)), Route.whole()]
    budgets = [predicted_peak_bytes(profile, route) for route in routes]
    budgets[-1] = least_bytes(profile, Route.whole())
    rows: list[Any] = []
    made = trained(
        task,
        edges=(LocalEdge(),),
        budgets=budgets,
        choose_route=lambda request: routes[int(request.device.client_key[1:])],
        on_row=[rows.append],
    )
    assert made.kinds() == []
    clients = [row for row in rows if row["kind"] == "client"]
    assert clients[3]["recompute"] != clients[0]["recompute"] == "none"
    for row in clients:
        found = row["peak_bytes"], row["predicted_peak_bytes"]
        assert found == (row["budget_bytes"],) * 2, row
    assert differences(made.state, whole(task).state) == []


def test_the_device_refuses_what_the_defence_would_not_cover() -> None:
    """No plan has such a cut; who plans one is refused, and so is a move."""
    task = replace(TASK, defence=NOPEEK)
    deep = profile_of(task, batch_size=BATCH_SIZE)
    assert build_chain(task).num_defended == 4
    budget = predicted_peak_bytes(deep, Route.split(1))
    with pytest.raises(Exception, match="no route fits"):
        trained(task, budgets=[budget] * 2, recompute=False)
    plain = replace(TASK, defence=None)
    apps = [message_app(index, task=task, edges=EDGES) for index in range(2)]
    early = Route.split(2, edge="near")
    strategy = smart_split(EDGES, task=plain, choose_route=lambda _: early)
    with pytest.raises(SmartSplitError, match=r"defence is .* None in the"):
        run(apps, strategy)

    plan = client_plan(0, early, initial_state())
    conditions = Conditions(task=task, connect=lambda *_: EDGES[0].connect("nowhere"))
    with pytest.raises(InvalidRoute, match="keeps the first 4 units on the device"):
        train_locally(plan, initial_state(), [], conditions)

    def back(runner: RouteRunner) -> None:
        with pytest.raises(RefusedMove, match="its defence keeps these units"):
            runner.move(3)

    cut = {"choose_route": lambda _: Route.split(5, edge="near")}
    assert trained(task, between=back, **cut).kinds() == []


# --- noise ----------------------------------------------------------------------------


def test_noise_is_new_each_time_and_nobody_elses() -> None:
    """Without a seed of the client's, no run repeats it; the run's seed is no help."""
    task = replace(TASK, defence=NOISE)
    how: Any = {"noise_seed": None, "budgets": (None,) * 2}
    one, other = (whole(task, **how).state for _ in range(2))
    assert differences(one, other) != []
    common = UnitStreams(7, 1, "c0")
    own = replace(common, secret_unit=1, secret=5)
    drawn = {}
    for name, streams in {"common": common, "own": own}.items():
        for unit in (1, 2):
            with streams(0, unit):
                drawn[name, unit] = torch.randn(3).tolist()
    assert drawn["common", 1] != drawn["own", 1]
    assert drawn["common", 2] == drawn["own", 2]


def test_what_crosses_in_evaluation_is_noised_too() -> None:
    """The same state has another loss with noise than without."""
    losses = []
    for noise in (1e-9, 2.0):
        task = replace(TASK, defence=Defence(after="0", clip=1e9, noise=noise))
        made = whole(task, fraction_evaluate=1.0, budgets=(None,) * 2)
        losses.append(made.result.evaluate_metrics_clientapp[1]["loss"])
    assert abs(losses[0] - losses[1]) > 0.01


def test_one_examples_values_are_bounded_and_the_noise_has_its_size() -> None:
    """Over all tensors of a boundary together, as the accounting says."""
    large = torch.randn(400, 3, 50) * torch.linspace(0.01, 9, 400).view(-1, 1, 1)
    root = nn.Identity().eval()
    clipped = Defence(after="x", clip=2.0, noise=1e-12)(root, (large, large), None)
    norms = torch.cat(clipped, dim=1).flatten(1).norm(dim=1)
    assert norms.max() <= 2.0 + 1e-5
    small = large.flatten(1).norm(dim=1) < 1
    torch.testing.assert_close(clipped[0][small], large[small])
    noised = Defence(after="x", clip=2.0, noise=3.0)(root, (large, large), None)
    assert (noised[1] - clipped[1]).std() == pytest.approx(6.0, rel=0.01)


def hockey_stick(epsilon: float, distance: float) -> float:
    """Integrate where one Gaussian exceeds e^epsilon of the other."""
    x = np.linspace(-40, 40, 400_001)
    one, two = (np.exp(-((x - at) ** 2) / 2) for at in (distance, 0.0))
    over = np.maximum(one - np.exp(epsilon) * two, 0) / math.sqrt(2 * math.pi)
    return float(over.sum() * (x[1] - x[0]))


@pytest.mark.parametrize(("noise", "num_crossings"), [(4.0, 1), (4.0, 10), (1.0, 3)])
def test_epsilon_is_that_of_the_composition(noise: float, num_crossings: int) -> None:
    """It gives delta by integration, and is below the bound by zCDP."""
    found = Defence(after="x", clip=0.5, noise=noise)
    epsilon = found.epsilon(1e-5, num_crossings=num_crossings)
    distance = 2 * math.sqrt(num_crossings) / noise
    assert hockey_stick(epsilon, distance) == pytest.approx(1e-5, rel=1e-3)
    rho = distance**2 / 2
    assert epsilon < rho + 2 * math.sqrt(rho * math.log(1e5))
    # Planted errors: half the distance, or steps that do not add up.
    assert hockey_stick(epsilon, distance / 2) < 0.5e-5


# --- NoPeek ---------------------------------------------------------------------------


def plain_correlation(x: Any, z: Any) -> float:
    """Compute the distance correlation as its authors define it."""
    centred = []
    for values in (x, z):
        d = np.linalg.norm(values[:, None] - values[None], axis=2)
        centred.append(d - d.mean(0)[None] - d.mean(1)[:, None] + d.mean())
    one, two = centred
    ratio = (one * two).mean() / math.sqrt((one**2).mean() * (two**2).mean())
    return math.sqrt(ratio)


def test_distance_correlation_is_the_authors() -> None:
    """In value and gradient; over several tensors as over one."""
    x, z = torch.randn(9, 5, dtype=torch.double), torch.randn(9, 4, dtype=torch.double)
    z = (z + x[:, :4]).requires_grad_()
    found = distance_correlation(x, (z[:, :1], z[:, 1:]))
    expected = plain_correlation(x.numpy(), z.detach().numpy())
    assert found.item() == pytest.approx(expected)
    assert torch.autograd.gradcheck(lambda z: distance_correlation({"x": x}, z), z)


def smooth() -> nn.Sequential:
    """Build a model in which nothing mixes the examples of a batch."""
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, NUM_CLASSES)
    )


def stepped(accumulate: int, batch: tuple[Tensor, Tensor], nopeek: float) -> Tensor:
    """Train one step of a whole model; return the first layer's weights."""
    task = replace(
        TASK,
        model_fn=smooth,
        optimizer_fn=partial(torch.optim.SGD, lr=1.0),
        metrics_fn=None,
        accumulate=accumulate,
        defence=Defence(after="2", nopeek=nopeek) if nopeek else None,
    )
    own: Any = {"train_loader": [batch], "num_examples": len(batch[1])}
    app = message_app(0, task=task, batch_size=len(batch[1]), **own)
    few = {"min_train_nodes": 1, "min_available_nodes": 1}
    arrays = to_array_record({k: v.numpy() for k, v in smooth().state_dict().items()})
    made = run([app], smart_split((), task=task, **few), num_rounds=1, arrays=arrays)
    return torch.tensor(made.state["1.weight"])


def test_micro_batches_share_the_weight() -> None:
    """Twice the same half gives the step of one half, and NoPeek is most of it."""
    half = torch.randn(6, 1, 6, 6), torch.randint(0, NUM_CLASSES, (6,))
    twice = torch.cat([half[0]] * 2), torch.cat([half[1]] * 2)
    once = stepped(1, half, 50.0)
    torch.testing.assert_close(stepped(2, twice, 50.0), once, rtol=1e-4, atol=1e-4)
    assert (stepped(1, half, 0.0) - once).abs().max() > 0.1


# --- refusals -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("defence", "reason"),
    [
        (Defence(after="nowhere", nopeek=1.0), "not one of those of Sequential"),
        (Defence(after="8", nopeek=1.0), "a cut can follow: 0, 1, 2"),
        (Defence(after="1", clip=1.0, noise=1.0), "1 mixes the examples of a batch"),
    ],
)
def test_a_defence_that_would_not_hold_is_refused(defence: Any, reason: str) -> None:
    """At the start, by the strategy, with what to choose instead."""
    with pytest.raises(InvalidTask, match=reason):
        smart_split(task=replace(TASK, defence=defence))


def embedding() -> nn.Sequential:
    """Build a model of tokens."""
    return nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, NUM_CLASSES))


def test_nopeek_of_tokens_is_refused_and_noise_is_not() -> None:
    """There is no distance between numbers of tokens."""
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    task = replace(TASK, model_fn=embedding, example_inputs=tokens)
    with pytest.raises(InvalidTask, match="no floating-point values"):
        build_chain(replace(task, defence=Defence(after="0", nopeek=1.0)))
    build_chain(replace(task, defence=Defence(after="0", clip=1.0, noise=1.0)))


@pytest.mark.parametrize(
    "numbers",
    [
        *({}, {"noise": 1.0}, {"clip": 1.0}, {"clip": 0, "noise": 1.0}),
        *({"nopeek": number} for number in (-1.0, math.nan, math.inf)),
    ],
)
def test_numbers_that_make_no_sense_are_refused(numbers: dict[str, float]) -> None:
    """Noise without a bound hides nothing."""
    with pytest.raises(ValueError, match=r"give|leave it out"):
        Defence(after="0", **numbers)


def test_an_epsilon_needs_noise() -> None:
    """NoPeek guarantees nothing."""
    with pytest.raises(ValueError, match="an epsilon needs noise"):
        NOPEEK.epsilon(1e-5, num_crossings=1)
