"""client_keys: where nodes are authenticated, nobody takes another client's place."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.proto.node_pb2 import NodeInfo

from flwr_smartsplit import Checkpoints, SmartSplit
from flwr_smartsplit.flower.registry import Owners
from flwr_smartsplit.types import Failure
from tests.flower.apps import message_app, run, smart_split
from tests.flower.legacy import legacy_smart_split, run_legacy
from tests.in_process_grid import InProcessGrid
from tests.tasks import differences

APIS = ("message", "legacy")


class NamedGrid(InProcessGrid):
    """A grid whose nodes were registered: with a name, and a public key each.

    ``keys`` are the nodes' public keys by partition; an empty one is of a node that was
    not registered.
    """

    def __init__(self, claimed: list[str], names: list[str], keys: list[str]) -> None:
        super().__init__(
            [message_app(i % 2, client_key=key) for i, key in enumerate(claimed)]
        )
        self.infos = {
            node: NodeInfo(node_id=node, name=name, public_key=key.encode())
            for node, name, key in zip(self.node_ids, names, keys, strict=True)
        }

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Say who the nodes are."""
        return [self.infos[node] for node in self.get_node_ids()]


class Joined(NamedGrid):
    """The last node joins after the first round."""

    def push_messages(self, messages: Any) -> Any:
        """Let it in when the first training messages are out."""
        ids = list(super().push_messages(messages))
        if any(m.metadata.message_type == "train" for m in self.sent):
            self.hidden.clear()
        return ids


def failures_of(api: str, grid: InProcessGrid, **options: Any) -> list[Failure]:
    """Run two rounds."""
    if api == "message":
        strategy = smart_split(edges=(), **options)
        return run(grid, strategy).strategy.failures
    strategy = legacy_smart_split(edges=(), **options)
    return run_legacy(grid, strategy).strategy.failures  # type: ignore[no-any-return]


def late_grid(claimed: str, name: str = "n2", key: str = "k2") -> Joined:
    """Make two honest nodes, and one that joins late and claims a key."""
    names, keys = ["n0", "n1", name], ["k0", "k1", key]
    grid = Joined(["c0", "c1", claimed], names, keys)
    grid.hidden = {grid.node_ids[2]}
    return grid


def test_an_impostor_is_left_out_and_the_client_goes_on() -> None:
    """Without the rule, who answers last has the key: the impostor is trained."""
    grid = late_grid("c0")
    (failure,) = failures_of("message", grid)
    assert (failure.client_key, failure.kind) == (f"node {grid.node_ids[2]}", "refused")
    assert "calls itself client 'c0', but this key is another node's" in failure.cause
    trained = [m.metadata.dst_node_id for m in grid.sent][-2:]
    assert sorted(trained) == sorted(grid.node_ids[:2])
    planted = late_grid("c0")
    failures_of("message", planted, client_keys="claimed")
    trained = [m.metadata.dst_node_id for m in planted.sent][-2:]
    assert planted.node_ids[2] in trained


@pytest.mark.parametrize("rule", ["bound", "claimed"])
def test_a_client_that_restarts_is_the_same_one(rule: Any) -> None:
    """Its node has another id, and the public key that it had."""
    grid = late_grid("c0", key="k0")
    kinds = [failure.kind for failure in failures_of("message", grid, client_keys=rule)]
    assert kinds == ["duplicate"]  # Its old node is still listed.


def test_a_node_does_not_become_another_client() -> None:
    """One public key is one client in a run."""
    (failure,) = failures_of("message", late_grid("c9", key="k0"))
    assert "it was client 'c0' before, with the same public key" in failure.cause


@pytest.mark.parametrize("api", APIS)
def test_of_two_that_come_at_once_none_is_believed(api: str) -> None:
    """Nobody can tell whose the key is."""
    grid = NamedGrid(["c0", "c1", "c0"], ["n0", "n1", "n2"], ["k0", "k1", "k2"])
    failures = failures_of(api, grid)
    assert {failure.kind for failure in failures} == {"refused"}
    assert len(failures) == 4  # Both, in each of two rounds
    assert "all call themselves client 'c0': none of them" in failures[0].cause


@pytest.mark.parametrize("api", APIS)
def test_a_key_can_be_the_nodes_name(api: str) -> None:
    """Then it is told whose it is, even if an impostor comes first or alone."""
    grid = NamedGrid(["c0", "c1", "c0"], ["c0", "c1", "evil"], ["k0", "k1", "k2"])
    failures = failures_of(api, grid, client_keys="node-name")
    assert {failure.kind for failure in failures} == {"refused"}
    assert {f.client_key.split()[-1] for f in failures} == {str(grid.node_ids[2])}
    assert "it is registered as 'evil', and client_keys=" in failures[0].cause


@pytest.mark.parametrize("api", APIS)
def test_nodes_without_names_are_as_before(api: str) -> None:
    """Of two with one key, one is left out as a duplicate; names can be required."""
    claims, none = ["c0", "c1", "c0"], ["", "", ""]
    failures = failures_of(api, NamedGrid(claims, none, ["k0", "k1", "k2"]))
    assert {failure.kind for failure in failures} == {"duplicate"}
    with pytest.raises(Exception, match="it has no name, and client_keys="):
        grid = NamedGrid(claims, none, none)
        failures_of(api, grid, client_keys="node-name")


def test_a_resumed_run_knows_whose_the_keys_are(tmp_path: Path) -> None:
    """An impostor who comes first after a restart is still one."""
    saved = Checkpoints(tmp_path)
    honest = NamedGrid(["c0", "c1"], ["n0", "n1"], ["k0", "k1"])
    options: Any = {"edges": (), "checkpoints": saved, "min_train_nodes": 1}
    first = run(honest, smart_split(**options), num_rounds=1)
    grid = NamedGrid(["c0", "c1"], ["n2", "n1"], ["k2", "k1"])
    strategy = smart_split(**options)
    resumed = run(grid, strategy, num_rounds=2)
    assert [f.kind for f in strategy.failures] == ["refused"]
    assert differences(first.state, resumed.state) != []


def test_an_unknown_rule_is_refused() -> None:
    """Where it is given."""
    with pytest.raises(ValueError, match='give "bound", "node-name" or "claimed"'):
        Owners("name")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="client_keys is 'name'"):
        smart_split(client_keys="name")
    assert isinstance(smart_split(client_keys="bound"), SmartSplit)
