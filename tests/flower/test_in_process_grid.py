"""The grid of these tests behaves as Flower's does, and its faults happen."""

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from tests.in_process_grid import InProcessGrid


def counting_app() -> ClientApp:
    """Count the messages in the client's own state; fail where asked to."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        count = int(context.state.get("n", ConfigRecord({"n": 0}))["n"]) + 1
        context.state["n"] = ConfigRecord({"n": count})
        if message.content["c"]["fail"]:
            raise ValueError("on purpose")
        message.content["c"]["n"] = count
        return Message(message.content, reply_to=message)

    return app


def make(num_nodes: int = 3) -> InProcessGrid:
    """Make a grid of counting clients."""
    return InProcessGrid([counting_app() for _ in range(num_nodes)])


def ask(grid: InProcessGrid, *, fail: bool = False) -> list[tuple[int, int]]:
    """Write to all; list (partition, count) of the replies, -1 for an error."""
    messages = [
        Message(
            RecordDict({"c": ConfigRecord({"fail": fail})}),
            message_type="train",
            dst_node_id=node,
        )
        for node in grid.node_ids
    ]
    replies = grid.send_and_receive(messages, timeout=1.0)
    assert all("n" not in message.content["c"] for message in messages)
    return [
        (
            grid.node_ids.index(reply.metadata.src_node_id),
            -1 if reply.has_error() else int(reply.content["c"]["n"]),
        )
        for reply in replies
    ]


def test_node_ids_are_random() -> None:
    """Nothing may hang on them."""
    assert not set(make().node_ids) & set(make().node_ids)
    grid = make()
    assert set(grid.get_node_ids()) == set(grid.node_ids)


def test_a_clients_state_stays_and_rolls_back_with_a_failure() -> None:
    """As Flower's does."""
    grid = make(2)
    assert ask(grid) == [(0, 1), (1, 1)]
    assert ask(grid, fail=True) == [(0, -1), (1, -1)]
    assert ask(grid) == [(0, 2), (1, 2)]


def test_an_error_says_what_happened() -> None:
    """In its reason, as in Flower."""
    grid = make(1)
    ask(grid, fail=True)
    (reply,) = grid.replied
    assert "ValueError: on purpose" in str(reply.error.reason)


@pytest.mark.parametrize("nth", [1, 2])
def test_faults_happen_to_one_node_at_one_time(nth: int) -> None:
    """Lost, late, twice and altered."""
    grid = make(4)
    grid.lose(0, nth=nth)
    grid.delay(1, nth=nth)
    grid.duplicate(2, nth=nth)
    grid.alter(3, lambda content: content["c"].update({"n": 99}), nth=nth)
    rounds = [ask(grid) for _ in range(3)]
    good = [[(node, number) for node in range(4)] for number in (1, 2, 3)]
    good[nth - 1] = [(2, nth), (2, nth), (3, 99)]
    good[nth].insert(0, (1, nth))
    assert rounds == good
