"""LocalGrid: what Flower's grids do, in one process and in an order that stays."""

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from simulations.experiments.local_grid import LocalGrid


@pytest.fixture
def grid():
    """Three clients that count their messages; the last always fails."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        counter = context.state.config_records.setdefault("c", ConfigRecord({"n": 0}))
        counter["n"] += 1
        if context.node_config["partition-id"] == 2:
            raise RuntimeError("out of paper")
        message.content["asked"]["by"] = "nobody"  # It is the client's own copy.
        answer = {"n": counter["n"], "client": context.node_config["partition-id"]}
        return Message(RecordDict({"c": ConfigRecord(answer)}), reply_to=message)

    return LocalGrid([app] * 3)


def ask(grid):
    asked = RecordDict({"asked": ConfigRecord({"by": "server"})})
    messages = [Message(asked, node, "train") for node in grid.get_node_ids()]
    return asked, list(grid.send_and_receive(messages))


def test_every_client_answers_in_its_order_and_keeps_its_state(grid):
    ask(grid)
    _, replies = ask(grid)

    answers = [dict(reply.content["c"]) for reply in replies[:2]]
    assert answers == [{"n": 2, "client": 0}, {"n": 2, "client": 1}]
    assert [reply.metadata.src_node_id for reply in replies] == grid.get_node_ids()


def test_an_exception_is_a_reply_and_rolls_the_state_back(grid):
    _, replies = ask(grid)

    assert replies[2].has_error()
    assert "out of paper" in replies[2].error.reason
    node = grid.get_node_ids()[2]
    assert not grid._nodes[node].context.state.config_records


def test_sender_and_receiver_share_nothing(grid):
    asked, _ = ask(grid)

    assert asked["asked"]["by"] == "server"


def test_the_same_clients_are_the_same_nodes_in_every_run(grid):
    assert grid.get_node_ids() == [2, 3, 4]
