"""VirtualGrid: replies arrive when their time has come, in an order that is told."""

from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from simulations.experiments.errors import ExperimentError
from simulations.experiments.local_grid import FIRST_NODE_ID, LocalGrid
from simulations.fleets.virtual_grid import VirtualGrid

SECONDS = {FIRST_NODE_ID: 3.0, FIRST_NODE_ID + 1: 1.0, FIRST_NODE_ID + 2: 1.0}


def echo() -> ClientApp:
    """Make a client that sends back what it gets."""
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return Message(message.content, reply_to=message)

    return app


def grid() -> VirtualGrid:
    """Make a grid of a slow client and two that are alike."""
    return VirtualGrid(
        LocalGrid([echo() for _ in SECONDS]),
        lambda request, reply: SECONDS[request.metadata.dst_node_id],
    )


def pushed(made: VirtualGrid, *nodes: int) -> list[str]:
    """Ask some nodes."""
    requests = [Message(RecordDict(), node, "query") for node in nodes]
    return list(made.push_messages(requests))


def sources(replies: Any) -> list[int]:
    """Say who answered."""
    return [reply.metadata.src_node_id for reply in replies]


def test_replies_arrive_in_their_time_and_ties_as_asked() -> None:
    """Each once; waiting goes to the next one, whatever its limit."""
    made = grid()
    slow, first, second = SECONDS
    ids = pushed(made, slow, second, first)
    assert sources(made.pull_messages(ids)) == []
    made.wait(9.0)
    assert made.seconds() == 1.0
    assert sources(made.pull_messages(ids)) == [second, first]
    assert sources(made.pull_messages(ids)) == []
    made.wait(0.5)
    assert made.seconds() == 1.5
    made.wait(9.0)
    assert (made.seconds(), sources(made.pull_messages(ids))) == (3.0, [slow])


def test_a_wait_without_end_for_nothing_is_refused() -> None:
    """A limit ends it; a reply that is due is not waited for."""
    made = grid()
    made.wait(2.0)
    assert made.seconds() == 2.0
    with pytest.raises(ExperimentError, match="give a timeout"):
        made.wait(float("inf"))
    ids = pushed(made, FIRST_NODE_ID + 1)
    made.wait(9.0)
    made.wait(9.0)
    assert made.seconds() == 3.0
    assert len(list(made.pull_messages(ids))) == 1


def test_sending_and_receiving_waits_for_all_or_the_timeout() -> None:
    """As Flower's does: who is late can be pulled later."""
    made = grid()
    requests = [Message(RecordDict(), node, "query") for node in SECONDS]
    assert len(list(made.send_and_receive(requests, timeout=2.0))) == 2
    assert made.seconds() == 2.0
    again = [Message(RecordDict(), node, "query") for node in SECONDS]
    assert len(list(made.send_and_receive(again))) == 3
    assert made.seconds() == 5.0
