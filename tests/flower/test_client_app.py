"""build_client_app: a Message-API app around the same client, mods and all."""

import json
from dataclasses import asdict
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict

from flwr_smartsplit import build_client_app
from flwr_smartsplit.flower.serde.records import PROFILE_ACTION, to_array_record
from flwr_smartsplit.types import NO_TRAITS
from tests.flower.apps import arrays_of, initial_arrays, make_client, message_app
from tests.in_process_grid import InProcessGrid
from tests.tasks import differences, initial_state


def ask(grid: InProcessGrid, kind: str, content: RecordDict) -> Message:
    """Send one message to the only node."""
    (node,) = grid.node_ids
    (reply,) = grid.send_and_receive(
        [Message(content, message_type=kind, dst_node_id=node)]
    )
    return reply


def test_replies_are_what_flowers_strategies_expect() -> None:
    """One array record and one metric record to train, one metric record to test."""
    grid = InProcessGrid([message_app(0)])
    reply = ask(grid, "train", RecordDict({"arrays": initial_arrays()}))
    assert list(reply.content.array_records) == ["arrays"]
    assert list(reply.content.metric_records) == ["metrics"]
    assert reply.content["metrics"]["num-examples"] == 9
    reply = ask(grid, "evaluate", RecordDict({"arrays": initial_arrays()}))
    assert list(reply.content.array_records) == []
    assert list(reply.content.metric_records) == ["metrics"]


def test_arrays_are_found_under_any_key_and_in_any_number_of_records() -> None:
    """A strategy may call its records as it likes."""
    items = list(initial_state().items())
    parts = RecordDict(
        {
            "one": to_array_record(dict(items[:5])),
            "two": to_array_record(dict(items[5:])),
            "settings": ConfigRecord({"server-round": 1}),
        }
    )
    whole = RecordDict({"w": initial_arrays(), "c": ConfigRecord({"server-round": 1})})
    first = ask(InProcessGrid([message_app(0)]), "train", parts)
    second = ask(InProcessGrid([message_app(0)]), "train", whole)
    assert differences(arrays_of(first), arrays_of(second)) == []


def test_a_profile_is_given_on_request() -> None:
    """In scalars."""
    grid = InProcessGrid([message_app(0, 77)])
    reply = ask(grid, f"query.{PROFILE_ACTION}", RecordDict())
    told = dict(reply.content["smartsplit"])
    assert json.loads(told.pop("traits")) == asdict(NO_TRAITS)
    assert told == {
        "client-key": "c0",
        "budget-bytes": 77,
        "num-examples": 9,
        "batch-size": 4,
        "num-epochs": 1,
        "partition-id": 0,
    }


def test_mods_see_every_message() -> None:
    """Flower's own can be used."""
    seen = []

    def mod(message: Message, context: Context, call_next: Any) -> Message:
        seen.append(message.metadata.message_type)
        reply: Message = call_next(message, context)
        return reply

    app = build_client_app(lambda context: make_client(0), mods=[mod])
    grid = InProcessGrid([app])
    ask(grid, "evaluate", RecordDict({"arrays": initial_arrays()}))
    ask(grid, f"query.{PROFILE_ACTION}", RecordDict())
    assert seen == ["evaluate", f"query.{PROFILE_ACTION}"]


def test_the_client_is_made_from_flowers_context() -> None:
    """Once per message, as Flower's own ``client_fn`` is."""
    partitions = []

    def client_fn(context: Context) -> Any:
        partitions.append(context.node_config["partition-id"])
        return make_client(int(context.node_config["partition-id"]))

    grid = InProcessGrid([build_client_app(client_fn)])
    for _ in range(2):
        ask(grid, f"query.{PROFILE_ACTION}", RecordDict())
    assert partitions == [0, 0]
