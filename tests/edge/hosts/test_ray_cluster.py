"""Edges over a cluster of several nodes: placed by resources, and lost one by one."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from flwr_smartsplit import RayEdge, Route
from flwr_smartsplit.edge.hosts import ray as ray_edge
from flwr_smartsplit.edge.tensors import state_digest
from flwr_smartsplit.types import ClientReply, Status
from tests.server.one_round import ROUND, fedavg, prepared, settle, start, train
from tests.tasks import differences, initial_state

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STORE_BYTES = 80 * 2**20
NEAR, FAR = (
    RayEdge(name=name, resources={name: 1}, patience_seconds=1.0)
    for name in ("near", "far")
)
EDGES = {edge.name: edge for edge in (NEAR, FAR)}
ROUTES = (
    Route.split(2, edge="near"),
    Route.split(4, edge="far"),
    Route.hops((3, 7), edges=("near", "far")),
    Route.split(6, edge="near"),
)
AT_FAR, ELSEWHERE = ["c1", "c2"], ["c0", "c3"]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Start a head and two nodes on this machine, each with its own resource."""
    plain = {"object_store_memory": STORE_BYTES, "num_cpus": 0}
    made = Cluster(
        initialize_head=True, head_node_args={**plain, "include_dashboard": False}
    )
    try:
        for name in EDGES:
            made.add_node(**plain, resources={name: 1})
        ray.init(address=made.address, log_to_driver=False)
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def node_of(address: str) -> str:
    """Ask an actor on which node it runs."""
    actor = ray.get_actor(address, namespace=ray_edge._NAMESPACE)
    where = actor.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id())
    node: str = ray.get(where, timeout=30)
    return node


def test_edges_run_where_their_resources_are_and_one_nodes_end_costs_its_clients(
    cluster: Cluster, whole: Mapping[str, ClientReply]
) -> None:
    """Four clients over both: the bits of whole models. Then one node is lost."""
    pool, replies = start([NEAR, FAR], ROUTES)
    try:
        addresses = {name: link.address for name, link in pool._links.items()}
        nodes = {name: node_of(addresses[name]) for name in EDGES}
        offers = {
            node["NodeID"]: set(node["Resources"]) & set(EDGES) for node in ray.nodes()
        }
        assert {name: offers[node] for name, node in nodes.items()} == {
            "near": {"near"},
            "far": {"far"},
        }
        settled = settle(replies, pool, ROUTES)
        assert sorted(settled.accepted) == sorted(whole)
        assert settled.state is not None
        assert differences(settled.state, fedavg(whole)) == []

        state = initial_state()
        pool.release(ROUND, state_digest(state))
        prepared(pool, state_digest(state), state)
        (far,) = (n for n in cluster.worker_nodes if n.node_id == nodes["far"])
        cluster.remove_node(far)
        where = {"edges": EDGES, "addresses": addresses, "pool": pool}
        replies = train(ROUTES, state, **where)
        lost = [r.client_key for r in replies if r.report.status is Status.EDGE_FAILED]
        assert lost == AT_FAR
        settled = settle(replies, pool, ROUTES)
        assert sorted(settled.accepted) == ELSEWHERE
        assert settled.state is not None
        truth = fedavg({key: whole[key] for key in ELSEWHERE})
        assert differences(settled.state, truth) == []
        folders = [folder for _, folder in ray_edge._actors.values()]
    finally:
        pool.stop()
    assert all(isinstance(f, Path) and not f.exists() for f in folders)
