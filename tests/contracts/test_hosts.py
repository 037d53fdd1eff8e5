"""What every host of edges promises: start, reach, train, settle, end.

A new host joins by a line in ``HOSTS``.
"""

import pickle
from collections.abc import Iterator, Mapping

import pytest

from flwr_smartsplit import RayEdge, Route
from flwr_smartsplit.edge import protocol as wire
from flwr_smartsplit.edge.hosts.edge import Edge
from flwr_smartsplit.edge.hosts.local import LocalEdge
from flwr_smartsplit.edge.tensors import state_digest
from flwr_smartsplit.errors import EdgeUnreachable
from flwr_smartsplit.types import ClientReply, EdgeProfile
from tests.edge.hosts.served import ServedEdge
from tests.server.one_round import fedavg, settle, start
from tests.tasks import TASK, differences, initial_state

HOSTS = {"local": LocalEdge, "grpc": ServedEdge, "ray": RayEdge}
NAMES = [
    pytest.param(name, marks=[pytest.mark.ray] if name == "ray" else [])
    for name in HOSTS
]
ROUTES = (
    Route.split(2, edge="near"),
    Route.hops((3, 7), edges=("near", "far")),
    Route.whole(),
    Route.split(6, edge="far"),
)
STATE = initial_state()
DIGEST = state_digest(STATE)


@pytest.fixture(scope="module", params=NAMES)
def edges(request: pytest.FixtureRequest) -> Iterator[tuple[Edge, Edge]]:
    """Describe two edges of one host; whatever it needs runs."""
    if request.param == "ray":
        request.getfixturevalue("ray_cluster")
    make = HOSTS[request.param]
    return make(name="near", flops_per_second=5.0), make(name="far", disk_bytes=2**20)


def test_a_round_over_two_edges_is_that_of_whole_models(
    edges: tuple[Edge, Edge], whole: Mapping[str, ClientReply]
) -> None:
    """Start, connect, hold, open, step, seal and commit, also from edge to edge."""
    pool, replies = start(edges, ROUTES)
    try:
        settled = settle(replies, pool, ROUTES)
        assert settled.failures == ()
        assert sorted(settled.accepted) == sorted(whole)
        assert settled.state is not None
        assert differences(settled.state, fedavg(whole)) == []
    finally:
        pool.stop()


def test_an_edge_says_what_it_offers(edges: tuple[Edge, Edge]) -> None:
    """Whatever its host is."""
    assert [edge.profile for edge in edges] == [
        EdgeProfile(name="near", flops_per_second=5.0),
        EdgeProfile(name="far", disk_bytes=2**20),
    ]


def test_each_start_is_an_edge_of_its_own_until_it_is_stopped(
    edges: tuple[Edge, Edge],
) -> None:
    """Two runs do not see each other; stopping twice, or nothing, is no error.

    An edge is a value that pickles: clients' copies of it reach the same edges.
    """
    edge, _ = edges
    copy: Edge = pickle.loads(pickle.dumps(edge))
    assert copy == edge
    one, two = edge.start(TASK), edge.start(TASK)
    try:
        edge.connect(one).send(wire.HoldState(DIGEST, STATE))
        mine = edge.connect(one).send(wire.IsHeld(DIGEST))
        others = edge.connect(two).send(wire.IsHeld(DIGEST))
        assert (mine.is_held, others.is_held) == (True, False)
        assert mine.incarnation != others.incarnation
        assert copy.connect(one).send(wire.IsHeld(DIGEST)) == mine
    finally:
        for address in (one, one, "nowhere", two):
            copy.stop(address)
    for gone in (one, "nowhere"):
        with pytest.raises(EdgeUnreachable, match=gone.rpartition("/")[2]):
            edge.connect(gone).send(wire.IsHeld(DIGEST))
