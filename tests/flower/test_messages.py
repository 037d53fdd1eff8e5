"""Messages: a device is sent its own units, its plan, and nothing of anybody else's."""

from flwr.app import ConfigRecord

from flwr_smartsplit.flower.serde.records import plan_from_config
from tests.flower.apps import (
    apps,
    arrays_of,
    budgets_of,
    initial_arrays,
    legacy_app,
    message_app,
    messages,
    run,
    smart_split,
)
from tests.in_process_grid import InProcessGrid
from tests.tasks import (
    differences,
    initial_state,
    tiny_chain,
)

MIXED = budgets_of(1, 4, None, 8)


def test_no_name_of_a_tail_ever_reaches_its_device() -> None:
    """Every array in every message, both ways and in both phases, is its own."""
    made = run(apps(MIXED), smart_split(fraction_evaluate=1.0))
    chain = tiny_chain()
    stops = dict(zip(made.grid.node_ids, (1, 4, len(chain), 8), strict=True))
    down = messages(made.grid, "train", "evaluate")
    assert len(down) == 16
    for message in down:
        own = chain.state_names(0, stops[message.metadata.dst_node_id])
        assert tuple(arrays_of(message)) == own
    up = [m for m in made.grid.replied if m.metadata.message_type == "train"]
    assert len(up) == 8
    for message in up:
        own = chain.state_names(0, stops[message.metadata.src_node_id])
        assert tuple(arrays_of(message)) == own


def test_a_legacy_device_gets_no_more_arrays_than_its_own() -> None:
    """They have no names there, so they are counted and compared."""
    made = run([legacy_app(k, b) for k, b in enumerate(MIXED)], num_rounds=1)
    chain, state = tiny_chain(), initial_state()
    stops = dict(zip(made.grid.node_ids, (1, 4, len(chain), 8), strict=True))
    for message in messages(made.grid, "train"):
        own = chain.state_names(0, stops[message.metadata.dst_node_id])
        sent = list(arrays_of(message).values())
        assert [a.tobytes() for a in sent] == [state[n].tobytes() for n in own]


def test_configs_hold_the_users_values_the_round_and_nothing_of_others() -> None:
    """Each client has its own plan in a record of its own."""
    config = ConfigRecord({"lr": 0.25})
    made = run(apps(MIXED), train_config=config)
    assert set(config) == {"lr", "server-round"}
    sent = messages(made.grid, "train")
    for number, message in enumerate(sent):
        values = message.content["config"]
        assert values["lr"] == 0.25
        assert values["server-round"] == number // 4 + 1
        plan = plan_from_config(values)
        assert plan is not None
        assert made.grid.node_ids.index(message.metadata.dst_node_id) == int(
            plan.client_key[1:]
        )
    records = [record for m in sent for record in (m.content, *m.content.values())]
    assert len({id(record) for record in records}) == len(records)


def test_a_client_that_spoils_its_message_spoils_no_other() -> None:
    """Changing one message leaves the others and the strategy's state alone."""
    strategy = smart_split(fraction_evaluate=0.0)
    grid = InProcessGrid(apps([None] * 2))
    config, arrays = ConfigRecord({"lr": 0.25}), initial_arrays()
    first, second = strategy.configure_train(1, arrays, config, grid)
    first.content["arrays"].clear()
    first.content["config"]["lr"] = 9.0
    assert differences(arrays_of(second), initial_state()) == []
    assert second.content["config"]["lr"] == 0.25
    assert list(arrays) == list(initial_state())


def test_flowers_keys_can_be_others() -> None:
    """Records and weights under names of the user's choice."""
    strategy = smart_split(
        arrayrecord_key="w", configrecord_key="c", weighted_by_key="n"
    )

    clients = [message_app(k, b, weighted_by_key="n") for k, b in enumerate(MIXED)]
    made = run(clients, strategy)
    assert all(list(m.content) == ["w", "c"] for m in messages(made.grid, "train"))
    assert "n" not in made.result.train_metrics_clientapp[1]
    assert differences(made.state, run(apps(MIXED)).state) == []
