"""Fleet: every node is asked once for its profile, in its own layout."""

from collections.abc import Sequence
from typing import Any

import pytest
from flwr.app import RecordDict
from flwr.clientapp import ClientApp

from flwr_smartsplit.flower.registry import Fleet, Member
from flwr_smartsplit.flower.rounds.exchange import Dispatch
from flwr_smartsplit.flower.serde.records import LEGACY, message_layout
from flwr_smartsplit.types import DeviceProfile, Failure
from tests.flower.apps import broken_app, legacy_app, message_app
from tests.in_process_grid import InProcessGrid

LAYOUT = message_layout()
QUERY = LAYOUT.profile_type


def fleet() -> Fleet:
    """Make a fleet that knows nobody."""
    return Fleet(LAYOUT, timeout_seconds=5.0)


def ask(known: Fleet, grid: InProcessGrid) -> tuple[dict[str, Member], list[Failure]]:
    """List the members behind all nodes of a grid."""
    return known.members(grid, grid.get_node_ids())


def message_types(grid: InProcessGrid) -> list[str]:
    """List what was asked."""
    return [message.metadata.message_type for message in grid.sent]


def test_a_profile_says_what_the_client_is() -> None:
    """Budget, examples, batch size and key, and the node it sits behind."""
    grid = InProcessGrid([message_app(2, 12345)])
    members, failures = ask(fleet(), grid)
    assert failures == []
    assert members == {
        "c2": Member(
            grid.node_ids[0],
            LAYOUT,
            DeviceProfile(
                client_key="c2", budget_bytes=12345, num_examples=11, batch_size=4
            ),
        )
    }


@pytest.mark.parametrize(
    "apps",
    [
        [message_app(k) for k in (2, 0, 1)],
        [legacy_app(k) for k in (2, 0, 1)],
        [legacy_app(2), message_app(0), legacy_app(1)],
        [message_app(2), legacy_app(0), message_app(1)],
    ],
    ids=["message", "legacy", "mixed", "mixed otherwise"],
)
def test_both_layouts_are_understood(apps: Sequence[ClientApp]) -> None:
    """Members come in client_key order, with the layout that each one uses."""
    grid = InProcessGrid(apps)
    members, failures = ask(fleet(), grid)
    assert failures == []
    assert list(members) == ["c0", "c1", "c2"]
    for place, key in enumerate(["c2", "c0", "c1"]):
        assert members[key].node_id == grid.node_ids[place]
        understands_both = apps[place]._call is None
        layouts = (LEGACY, LAYOUT) if understands_both else (LEGACY,)
        assert members[key].layout in layouts


def test_a_fleet_of_one_layout_is_asked_in_it() -> None:
    """All at once, and in the second layout only where the first is not understood."""
    grid = InProcessGrid([message_app(k) for k in range(5)])
    ask(fleet(), grid)
    assert message_types(grid) == [QUERY] * 5
    grid = InProcessGrid([legacy_app(k) for k in range(5)])
    known = fleet()
    ask(known, grid)
    assert message_types(grid) == [*[QUERY] * 5, *["get_properties"] * 5]
    grid.node_ids.append(newcomer := grid.node_ids[0] + 1)
    grid._nodes[newcomer] = grid._nodes[grid.node_ids[1]]
    ask(known, grid)
    assert message_types(grid)[10:] == ["get_properties"]


def test_an_error_of_the_superlink_is_the_asked_nodes() -> None:
    """It comes from the SuperLink's own node, which is no client."""
    grid = InProcessGrid([message_app(k) for k in range(3)])
    grid.fail_at_superlink(1, nth=1, kind=QUERY)
    members, failures = ask(fleet(), grid)
    assert sorted(members) == ["c0", "c2"]
    assert [f.client_key for f in failures] == [f"node {grid.node_ids[1]}"]
    assert "Message Unavailable" in failures[0].cause
    assert message_types(grid) == [QUERY] * 3


def test_nobody_is_asked_twice() -> None:
    """Answers are remembered, also of a node that was away for a while."""
    grid = InProcessGrid([message_app(k) for k in range(3)])
    known = fleet()
    first, _ = ask(known, grid)
    grid.hidden.add(grid.node_ids[1])
    assert list(ask(known, grid)[0]) == ["c0", "c2"]
    grid.hidden.clear()
    assert ask(known, grid)[0] == first
    assert len(grid.sent) == 3


def test_two_nodes_of_one_name_are_told_apart() -> None:
    """The second is left out, and the failure names both nodes."""
    grid = InProcessGrid([message_app(0), message_app(1), message_app(1)])
    members, failures = ask(fleet(), grid)
    assert sorted(members) == ["c0", "c1"]
    (failure,) = failures
    assert (failure.client_key, failure.kind) == ("c1", "duplicate")
    assert all(str(node) in failure.cause for node in grid.node_ids[1:])
    left_out = (set(grid.node_ids[1:]) - {members["c1"].node_id}).pop()
    assert f"node {left_out} is left out" in failure.cause


def test_a_node_that_does_not_answer_is_asked_again() -> None:
    """The others take part meanwhile."""
    grid = InProcessGrid([message_app(k) for k in range(3)])
    silent = grid.node_ids[1]
    grid.lose(1, nth=1, kind=QUERY)
    grid.lose(1, nth=1, kind="get_properties")
    known = fleet()
    members, failures = ask(known, grid)
    assert sorted(members) == ["c0", "c2"]
    assert "c1" not in members
    assert [failure.client_key for failure in failures] == [f"node {silent}"]
    members, failures = ask(known, grid)
    assert sorted(members) == ["c0", "c1", "c2"]
    assert failures == []


def test_a_silent_node_need_not_be_asked_in_every_phase() -> None:
    """Each time may take as long as the timeout; nodes that are new are asked."""
    grid = InProcessGrid([message_app(0), broken_app(), message_app(2)])
    newcomer = grid.node_ids[2]
    grid.hidden.add(newcomer)
    known = fleet()
    ask(known, grid)
    num_asked = len(grid.sent)
    grid.hidden.clear()
    members, failures = known.members(grid, grid.get_node_ids(), ask_again=False)
    assert sorted(members) == ["c0", "c2"]
    assert failures == []
    asked = grid.sent[num_asked:]
    assert [message.metadata.dst_node_id for message in asked] == [newcomer]
    assert len(ask(known, grid)[1]) == 1


def test_an_app_that_is_not_ours_is_a_failure_with_its_cause() -> None:
    """It was asked in both layouts; the cause is the client's own error."""
    grid = InProcessGrid([message_app(0), broken_app()])
    members, failures = ask(fleet(), grid)
    assert list(members) == ["c0"]
    (failure,) = failures
    assert (failure.client_key, failure.kind) == (
        f"node {grid.node_ids[1]}",
        "failed",
    )
    assert "Invalid message type: get_properties" in failure.cause


def test_half_a_profile_is_a_failure() -> None:
    """With what is missing."""

    def forget(content: RecordDict) -> None:
        del content["smartsplit"]["batch-size"]

    grid = InProcessGrid([message_app(0), message_app(1)])
    grid.alter(1, forget, nth=1, kind=QUERY)
    grid.lose(1, nth=1, kind="get_properties")
    members, failures = ask(fleet(), grid)
    assert list(members) == ["c0"]
    assert "batch-size" in failures[0].cause


def test_no_nodes_are_no_members() -> None:
    """And nobody is asked."""
    grid = InProcessGrid([])
    assert ask(fleet(), grid) == ({}, [])
    assert grid.sent == []


def swapped(grid: InProcessGrid, one: int, other: int) -> None:
    """Let the grid list a node of a partition before that of another one."""
    first, second = sorted((grid.node_ids[one], grid.node_ids[other]))
    nodes = grid._nodes
    apps = nodes[grid.node_ids[one]], nodes[grid.node_ids[other]]
    nodes[first], nodes[second] = apps
    grid.node_ids[one], grid.node_ids[other] = first, second


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_a_client_that_comes_back_under_a_new_id_is_asked_there(
    order: tuple[int, int],
) -> None:
    """While its old node is still listed, whichever of the two comes first."""
    grid = InProcessGrid([message_app(0), message_app(1), message_app(1)])
    swapped(grid, *order)
    old, new = grid.node_ids[1], grid.node_ids[2]
    grid.hidden = {new}
    known = fleet()
    assert ask(known, grid)[0]["c1"].node_id == old
    grid.hidden = set()
    members, failures = ask(known, grid)
    assert members["c1"].node_id == new
    (failure,) = failures
    assert f"node {old} is left out" in failure.cause
    grid.hidden = {old}
    members, failures = ask(known, grid)
    assert (members["c1"].node_id, failures) == (new, [])


def test_a_node_that_gave_no_reply_stands_back() -> None:
    """The one that replies is asked, until the other does again."""
    grid = InProcessGrid([message_app(0), message_app(0)])
    known = fleet()
    first = ask(known, grid)[0]["c0"]
    dispatch = Dispatch(1, True, 0.0, contacts={"c0": first}, sent={"c0": Any})
    lost = Failure(client_key="c0", kind="lost", cause="no reply")
    known.heard(dispatch, [lost])
    second = ask(known, grid)[0]["c0"]
    assert second.node_id != first.node_id
    known.heard(dispatch, [])
    assert ask(known, grid)[0]["c0"] == first


def test_of_two_nodes_with_one_key_it_is_always_the_same() -> None:
    """Whatever ids Flower draws: that of the first partition."""
    for _ in range(6):
        grid = InProcessGrid([message_app(0), message_app(1), message_app(1)])
        members, _ = ask(fleet(), grid)
        assert members["c1"].node_id == grid.node_ids[1]
