"""Dispatch: what went out, and what each thing that comes back means."""

from dataclasses import replace
from typing import Any

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from flwr_smartsplit import Route
from flwr_smartsplit.flower.messages import read, written
from flwr_smartsplit.flower.registry import Fleet
from flwr_smartsplit.flower.rounds.exchange import Dispatch, Sent, device_names
from flwr_smartsplit.flower.serde.records import message_layout, plan_from_config
from flwr_smartsplit.types import ClientReply, Failure, TailExpectation
from tests.flower.apps import arrays_of, initial_arrays, legacy_app, message_app
from tests.in_process_grid import InProcessGrid
from tests.tasks import client_plan, differences, initial_state, tiny_chain

CHAIN = tiny_chain()
WHOLE = Route.whole()


class Round:
    """A round of three clients on whole routes, the last one a legacy client."""

    def __init__(self, last: ClientApp | None = None) -> None:
        """Make the grid and learn who is there."""
        last = legacy_app(2) if last is None else last
        self.grid = InProcessGrid([message_app(0), message_app(1), last])
        fleet = Fleet(message_layout(), timeout_seconds=5.0)
        found, _ = fleet.members(self.grid, self.grid.get_node_ids())
        # Our app understands both; here the first two are spoken to in their own.
        self.members = {
            key: replace(member, layout=message_layout()) if key != "c2" else member
            for key, member in found.items()
        }
        self.dispatch = Dispatch(1, True, 0.0, contacts=self.members)

    def message(self, client: int, route: Route = WHOLE) -> Message:
        """Write to one client."""
        plan = client_plan(client, route, initial_state(), addresses={"edge": "e-1"})
        names = device_names(plan, CHAIN)
        self.dispatch.sent[plan.client_key] = Sent(plan, names, names, 1)
        every = written(self.dispatch, initial_arrays(), {"lr": 0.5})
        return every[list(self.dispatch.sent).index(plan.client_key)]

    def read(self, replies: list[Message]) -> tuple[list[ClientReply], list[Failure]]:
        """Read what came back."""
        return read(self.dispatch, replies, CHAIN)

    def replies(self) -> list[Message]:
        """Write to all three, and collect what comes back."""
        messages = [self.message(client) for client in range(3)]
        return list(self.grid.send_and_receive(messages))


@pytest.fixture
def a_round() -> Round:
    """Make a round."""
    return Round()


def summary(found: tuple[list[Any], list[Any]]) -> tuple[list[str], list[Any]]:
    """List who replied, and who failed how."""
    replies, failures = found
    return [r.client_key for r in replies], [(f.client_key, f.kind) for f in failures]


@pytest.mark.parametrize("cut", [1, 4, 8])
def test_a_message_holds_a_devices_own_units_and_its_plan(
    a_round: Round, cut: int
) -> None:
    """And the user's config, under the keys of the client's layout."""
    message = a_round.message(1, Route.split(cut))
    assert message.metadata.dst_node_id == a_round.grid.node_ids[1]
    assert message.metadata.message_type == "train"
    assert list(message.content["arrays"]) == list(CHAIN.state_names(0, cut))
    config = message.content["config"]
    plan = plan_from_config(config)
    assert plan is not None
    assert (plan.client_key, plan.route) == ("c1", Route.split(cut))
    assert config["lr"] == 0.5
    sent = a_round.dispatch.sent["c1"]
    assert sent.names == CHAIN.state_names(0, cut)
    legacy = a_round.message(2, Route.split(cut))
    assert list(legacy.content) == ["fitins.parameters", "fitins.config"]
    values = zip(arrays_of(message).values(), arrays_of(legacy).values(), strict=True)
    assert all(one.tobytes() == other.tobytes() for one, other in values)


def test_expectations_are_every_name_exactly_once(a_round: Round) -> None:
    """Device names and tail names together are the model's."""
    a_round.message(0)
    a_round.message(1, Route.split(4))
    expected = a_round.dispatch.expectations(CHAIN)
    everything = set(initial_state())
    assert expected["c0"].device_names == everything
    assert expected["c0"].tails == {}
    (tail,) = expected["c1"].tails.values()
    assert isinstance(tail, TailExpectation)
    assert tail.session == "1.0/c1/edge"
    assert expected["c1"].device_names | tail.names == everything
    assert not expected["c1"].device_names & tail.names


def test_replies_of_both_layouts_are_read(a_round: Round) -> None:
    """With the model's names, and their size counted."""
    replies, failures = a_round.read(a_round.replies())
    assert failures == []
    assert [reply.client_key for reply in replies] == ["c0", "c1", "c2"]
    assert all(list(reply.state) == list(initial_state()) for reply in replies)
    assert sorted(a_round.dispatch.received_bytes) == ["c0", "c1", "c2"]
    assert all(size > 1000 for size in a_round.dispatch.received_bytes.values())


def test_who_does_not_answer_is_lost(a_round: Round) -> None:
    """One failure each, in client_key order."""
    replies = a_round.replies()[1:2]
    found = a_round.read(replies)
    assert summary(found) == (["c1"], [("c0", "lost"), ("c2", "lost")])
    assert "raise it" in found[1][0].cause


def test_an_error_reply_is_a_failure_with_its_reason(a_round: Round) -> None:
    """The reason is the client's own."""
    replies = a_round.replies()
    error = Error(code=2, reason="no more disk")
    replies[1] = Message(error, reply_to=a_round.grid.sent[-2])
    found = a_round.read(replies)
    assert summary(found) == (["c0", "c2"], [("c1", "failed")])
    assert found[1][0].cause == "no more disk"


def test_a_reply_of_a_stranger_is_refused(a_round: Round) -> None:
    """A node that was sent nothing cannot be taken for a client."""
    replies = a_round.replies()
    del a_round.dispatch.sent["c1"]
    node = a_round.grid.node_ids[1]
    assert summary(a_round.read(replies)) == (
        ["c0", "c2"],
        [(f"node {node}", "refused")],
    )


def test_nobody_answers_for_another(a_round: Round) -> None:
    """The failure is booked to the node's own client."""
    replies = a_round.replies()
    replies[1].content = replies[0].content
    found = a_round.read(replies)
    assert summary(found) == (["c0", "c2"], [("c1", "refused")])
    assert "'c1' answers for 'c0'" in found[1][0].cause


def test_a_reply_that_cannot_be_read_is_refused(a_round: Round) -> None:
    """And everybody else is read."""
    replies = a_round.replies()
    replies[0].content = RecordDict({"x": ConfigRecord()})
    del replies[2].content["fitres.parameters"]["0"]
    found = a_round.read(replies)
    assert summary(found) == (["c1"], [("c0", "refused"), ("c2", "refused")])


def test_a_second_reply_is_handed_on(a_round: Round) -> None:
    """Which of the two counts is the policy's affair."""
    replies = a_round.replies()
    found = a_round.read([*replies, replies[0]])
    assert summary(found) == (["c0", "c1", "c2", "c0"], [])


def test_a_legacy_reply_has_the_names_of_a_message_reply(a_round: Round) -> None:
    """The same client gives the same state, whichever API carries it."""
    other = Round(message_app(2))
    (legacy, ours) = (made.read(made.replies())[0][2] for made in (a_round, other))
    assert differences(legacy.state, ours.state) == []
    assert legacy.receipts == ours.receipts
