"""A predictor is the whole model in evaluation mode, which no device need hold."""

from dataclasses import replace
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flwr_smartsplit import Integer, Packed, Raw, Route, Serving, Task
from flwr_smartsplit.edge.hosts.local import LocalEdge
from flwr_smartsplit.errors import (
    InvalidRoute,
    InvalidTask,
    MemoryCapExceeded,
    NoFeasibleRoute,
    RefusedMessage,
)
from flwr_smartsplit.serve.offer import Offer
from flwr_smartsplit.split.build import state_of
from tests.architectures import ARCHITECTURES, HUGGING_FACE, Architecture
from tests.flower.apps import apps, budgets_of, run
from tests.models import resnet18
from tests.serve.whole import STATE, batch, difference, predictor, served, whole
from tests.tasks import BATCH_SIZE, TASK, tiny_chain

EDGES = LocalEdge(name="edge"), LocalEdge(name="far")
SIZE = len(tiny_chain())
PAIRS = list(combinations(range(1, SIZE), 2))
ROUTES = [
    Route.whole(),
    *(Route.split(cut) for cut in range(1, SIZE)),
    *(Route.u_shape(*pair) for pair in PAIRS),
    *(Route.hops(pair, edges=("edge", "far")) for pair in PAIRS),
]


@pytest.mark.parametrize(
    ("codec", "step"),
    [
        (Raw(), 4),
        (Packed(), 8),
        pytest.param(Raw(), 1, marks=pytest.mark.slow),
        pytest.param(Packed(), 1, marks=pytest.mark.slow),
    ],
)
def test_every_route_gives_the_bits_of_the_whole_model(codec: Any, step: int) -> None:
    """Also of a batch that is not full; offers travel as bytes."""
    full, part = batch(), batch(1, BATCH_SIZE - 1)
    with Serving(TASK, STATE, EDGES) as serving:
        for route in ROUTES[::step]:
            offer = serving.offer(route, batch_size=BATCH_SIZE, codec=codec)
            with predictor(offer, *EDGES) as mine:
                for inputs in (full, part, full):
                    found = difference(mine.predict(inputs), whole(inputs))
                    assert found == "", route
                assert mine.peak_bytes <= offer.predicted_peak_bytes, route


@pytest.mark.parametrize("name", ["0.weight", "8.bias"])
def test_one_bit_of_the_state_is_seen(name: str) -> None:
    """Planted: at the device, or at the edge, one value is the next float."""
    values = STATE[name].copy()
    values.flat[0] = np.nextafter(values.flat[0], np.float32(np.inf))
    with served(*EDGES, state=STATE | {name: values}, route=Route.split(4)) as (_, o):
        with predictor(o, *EDGES) as mine:
            assert difference(mine.predict(batch()), whole(batch())) == "another value"


def test_a_codec_that_rounds_is_seen() -> None:
    """Planted, too; its outputs are still the model's of what it was sent."""
    with served(*EDGES, route=Route.split(2), codec=Integer(4)) as (_, offer):
        with predictor(offer, *EDGES) as mine:
            found = mine.predict(batch())
    assert difference(found, whole(batch())) == "another value"
    assert torch.allclose(found.outputs, whole(batch()), atol=0.5)


@pytest.mark.parametrize("route", ROUTES[::4], ids=str)
def test_the_predicted_peak_is_the_measured_one(route: Route) -> None:
    """To the byte; with one byte less the cap raises, so the number is no bound."""
    with Serving(TASK, STATE, EDGES) as serving:
        offer = serving.offer(route, batch_size=BATCH_SIZE)
        peak = offer.predicted_peak_bytes
        fitting = serving.offer(route, batch_size=BATCH_SIZE, budget_bytes=peak)
        with predictor(fitting, *EDGES) as mine:
            mine.predict(batch())
            kept = mine.predict(batch(1))  # What callers keep is theirs.
            mine.predict(batch(2))
            assert mine.peak_bytes == peak
            assert not kept.is_fallback
        with pytest.raises(NoFeasibleRoute, match="Lower the batch size") as raised:
            serving.offer(route, batch_size=BATCH_SIZE, budget_bytes=peak - 1)
        assert (raised.value.needed_bytes, raised.value.budget_bytes) == (
            peak,
            peak - 1,
        )
        tight = replace(offer, plan=replace(offer.plan, budget_bytes=peak - 1))
        with pytest.raises(MemoryCapExceeded):
            with predictor(tight, *EDGES) as mine:
                mine.predict(batch())


def test_without_a_route_the_deepest_that_fits_is_taken() -> None:
    """The whole model if possible, else the deepest cut."""
    with Serving(TASK, STATE, EDGES) as serving:

        def needs(route: Route) -> int:
            return serving.offer(route, batch_size=4).predicted_peak_bytes

        assert serving.offer(batch_size=4).plan.route == Route.whole()
        peaks = {cut: needs(Route.split(cut)) for cut in range(1, SIZE)}
        for budget in (peaks[1], peaks[4], peaks[7]):
            found = serving.offer(batch_size=4, budget_bytes=budget).plan.route
            deepest = max(cut for cut, peak in peaks.items() if peak <= budget)
            is_whole = needs(Route.whole()) <= budget
            assert found == (Route.whole() if is_whole else Route.split(deepest))
        with pytest.raises(NoFeasibleRoute):
            serving.offer(batch_size=4, budget_bytes=peaks[1] - 1)


def test_a_run_s_result_is_served() -> None:
    """As users do it: train by a federated run, and predict with what came out."""
    made = run(apps(budgets_of(1, 4, None, 8)), num_rounds=1)
    state = made.result.arrays.to_torch_state_dict()
    with Serving(TASK, state, EDGES) as serving:
        for route in (Route.split(2), Route.u_shape(3, 8), Route.whole()):
            with predictor(serving.offer(route, batch_size=4), *EDGES) as mine:
                assert difference(mine.predict(batch()), whole(batch(), state)) == ""
    assert difference(mine.predict(batch()), whole(batch())) == "another value"


def nested_outputs() -> nn.Module:
    """Return more than one tensor, and a plain value."""
    return Nested()


class Nested(nn.Module):
    """A model with nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(36, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Any]:
        hidden = self.body(x.flatten(1)).relu()
        return {"features": (hidden, hidden[:, ::2]), "logits": self.head(hidden)}


def nested_loss(outputs: Any, targets: Tensor) -> Tensor:
    """Use the logits."""
    return nn.functional.cross_entropy(outputs["logits"], targets)


def state_for(task: Task) -> dict[str, Any]:
    """Draw a state of a task's model."""
    torch.manual_seed(3)
    return state_of(task.model_fn())


def check_cuts(task: Task, inputs: Any, cuts: list[int]) -> None:
    """Predict at some cuts, with what the device may take as the budget."""
    state = state_for(task)
    truth = whole(inputs, state, task)
    with Serving(task, state, EDGES) as serving:
        for route in map(Route.split, cuts):
            needed = serving.offer(route, batch_size=BATCH_SIZE).predicted_peak_bytes
            offer = serving.offer(route, batch_size=BATCH_SIZE, budget_bytes=needed)
            with predictor(offer, *EDGES, task=task) as mine:
                assert difference(mine.predict(inputs), truth) == "", route
                assert mine.peak_bytes == needed, route


def test_outputs_are_nested_as_the_model_s() -> None:
    """Dicts and tuples, views with gaps."""
    task = replace(TASK, model_fn=nested_outputs, loss_fn=nested_loss)
    check_cuts(task, batch(), [1, 2])


@pytest.mark.slow
def test_a_resnet_of_torchvision_is_served() -> None:
    """Skip connections, BatchNorm's running values, 32 by 32 pixels."""
    sgd = partial(torch.optim.SGD, lr=0.1)
    inputs = torch.randn(BATCH_SIZE, 3, 32, 32)
    task = replace(TASK, model_fn=resnet18, optimizer_fn=sgd, example_inputs=inputs[:1])
    check_cuts(task, inputs, [1, 5, 9])


@pytest.mark.slow
@pytest.mark.parametrize(
    "made",
    [ARCHITECTURES["gpt"], ARCHITECTURES["two inputs, dict"], *HUGGING_FACE.values()],
)
def test_models_of_other_kinds_are_served(made: Architecture) -> None:
    """Tokens and padding in, a model's own kind of output out; built by configs."""
    task = made.task(partial(torch.optim.SGD, lr=0.1))
    (inputs, _), *_ = made.batches(task)
    check_cuts(task, inputs, [1, 2])


def test_what_is_wrong_is_refused_at_the_start() -> None:
    """Routes, states, tasks, batches, bytes."""
    with served(*EDGES, route=Route.split(2)) as (serving, offer):
        with pytest.raises(InvalidRoute, match="outside a chain"):
            serving.offer(Route.split(SIZE), batch_size=4)
        with pytest.raises(InvalidRoute, match="needs the edges"):
            serving.offer(Route.split(2, edge="moon"), batch_size=4)
        with pytest.raises(ValueError, match="at least 1"):
            serving.offer(batch_size=0)
        with pytest.raises(ValueError, match="at least 1"):
            Serving(TASK, STATE, EDGES, num_threads=0)
        with predictor(offer, *EDGES) as mine:
            with pytest.raises(ValueError, match="divide the batch"):
                mine.predict(batch(size=BATCH_SIZE + 1))
        other = replace(TASK, model_fn=nested_outputs)
        with pytest.raises(InvalidTask, match="another task"):
            predictor(offer, *EDGES, task=other)
        with pytest.raises(ValueError, match="above 0"):
            predictor(offer, *EDGES, timeout_seconds=0)
        data = offer.to_bytes()
    for wrong in (b"", data[:-1], data[:40] + b"x" + data[41:]):
        with pytest.raises(RefusedMessage):
            Offer.from_bytes(wrong)
    with pytest.raises(InvalidTask):
        Serving(TASK, {n: a for n, a in STATE.items() if n != "8.bias"}, EDGES)
    with pytest.raises(InvalidTask, match="is_local"):
        Serving(replace(TASK, is_local=lambda name: "8" in name), STATE, EDGES)
