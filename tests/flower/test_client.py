"""SmartSplitNumPyClient: a plain ``NumPyClient`` that follows a plan if one comes."""

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from flwr.client import NumPyClient

from flwr_smartsplit import Route, SmartSplitNumPyClient
from flwr_smartsplit.errors import InvalidTask
from flwr_smartsplit.flower.serde.records import plan_to_scalars
from flwr_smartsplit.types import ClientPlan
from tests.flower.apps import make_client
from tests.tasks import (
    TASK,
    WithUnused,
    client_plan,
    device_part,
    differences,
    initial_state,
    loader,
)


def test_what_is_not_given_is_read_off_the_loader() -> None:
    """Examples and batch size of a ``DataLoader``."""
    client = make_client(3, 1000)
    assert isinstance(client, NumPyClient)
    profile = client.profile
    assert (profile.client_key, profile.budget_bytes) == ("c3", 1000)
    assert (profile.num_examples, profile.batch_size) == (12, 4)


def test_any_iterable_will_do_with_its_numbers() -> None:
    """They cannot be guessed, and the error says which is missing."""
    batches = list(loader(0))
    with pytest.raises(InvalidTask, match="give num_examples"):
        SmartSplitNumPyClient(TASK, batches, client_key="a")
    with pytest.raises(InvalidTask, match="give num_examples and batch_size"):
        SmartSplitNumPyClient(TASK, batches, client_key="a", num_examples=9)
    client = SmartSplitNumPyClient(
        TASK, batches, client_key="a", num_examples=9, batch_size=4
    )
    assert client.profile.num_examples == 9


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("owns_process", [False, True])
def test_a_client_that_owns_its_process_measures_it(owns_process: bool) -> None:
    """Another one does not know whose memory it would measure."""
    client = SmartSplitNumPyClient(
        TASK, loader(0), client_key="a", owns_process=owns_process
    )
    outcome = client.train(client.plan_for({}), initial_state())
    assert (outcome.report.resident_growth_bytes is not None) == owns_process


def test_a_negative_budget_is_refused() -> None:
    """With the client's name."""
    with pytest.raises(ValueError, match="client 'c0': budget_bytes is -1"):
        make_client(0, -1)


def test_properties_are_scalars() -> None:
    """Legacy clients can send nothing else."""
    properties = make_client(0).get_properties({})
    assert set(map(type, properties.values())) <= {int, str}
    assert properties["budget-bytes"] == -1


def test_without_a_plan_the_whole_model_is_trained_without_a_cap() -> None:
    """Under a stock strategy, in the round that strategy counts."""
    client = make_client(0, 1)
    plan = client.plan_for({"server-round": 5})
    assert plan == ClientPlan(
        client_key="c0",
        round_number=5,
        route=Route.whole(),
        seed=0,
        edge_addresses={},
        config={"server-round": 5},
    )
    state = initial_state()
    arrays, num_examples, scalars = client.fit(list(state.values()), {})
    assert num_examples == 9
    assert scalars["num-examples"] == 9
    trained = dict(zip(state, arrays, strict=True))
    assert len(differences(trained, state)) == len(state)


def test_without_a_round_number_every_round_has_chances_of_its_own() -> None:
    """A strategy that counts gets the client's own seed; one that does not, chance."""
    client = make_client(0, seed=5)
    assert client.plan_for({"server-round": 2}).seed == 5
    seeds = {client.plan_for({}).seed for _ in range(5)}
    assert len(seeds) == 5
    assert 5 not in seeds


def test_fitting_follows_the_plan() -> None:
    """In the order of the names the device was sent; the message path agrees."""
    client, state = make_client(0), initial_state()
    plan = replace(client_plan(0, Route.whole(), state), round_number=3)
    arrays, _, _ = client.fit(list(state.values()), {**plan_to_scalars(plan)})
    outcome = client.train(plan, state)
    assert differences(dict(zip(state, arrays, strict=True)), outcome.state) == []
    other = client.train(replace(plan, round_number=4), state)
    assert differences(other.state, outcome.state) != []


def test_device_names_are_those_of_the_route() -> None:
    """In the model's order."""
    client, state = make_client(0), initial_state()
    plan = client_plan(0, Route.split(4), state)
    assert client.device_names(plan) == tuple(device_part(state, Route.split(4)))


def test_evaluating_uses_its_own_loader_if_there_is_one() -> None:
    """Else the training loader."""
    state = initial_state()
    alone = make_client(0).evaluate(list(state.values()), {})
    other = make_client(0, eval_loader=loader(5)).evaluate(list(state.values()), {})
    assert (alone[1], other[1]) == (9, 14)
    assert set(alone[2]) >= {"num-examples", "loss", "accuracy"}
    assert alone[0] == alone[2]["loss"]


def test_whole_models_send_back_every_name() -> None:
    """Also those no unit uses, as a stock strategy expects."""
    task: Any = replace(TASK, model_fn=WithUnused)
    model = WithUnused()
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    client = make_client(0, task=task)
    outcome = client.train(client.plan_for({}), state)
    assert list(outcome.state) == list(state)
    assert torch.equal(torch.from_numpy(outcome.state["spare"]), model.spare.detach())


@pytest.mark.parametrize("budget", ["64MB", -1e6, True, -1, float("nan")])
def test_a_budget_that_is_no_number_of_bytes_is_refused(budget: Any) -> None:
    """The error says what was given and what to give."""
    with pytest.raises(ValueError, match="give a whole number of bytes"):
        SmartSplitNumPyClient(TASK, loader(0), client_key="x", budget_bytes=budget)
