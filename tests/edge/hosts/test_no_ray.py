"""RayEdge where there is no Ray: its tests leave none behind, and join none."""

import pytest

from flwr_smartsplit import RayEdge
from flwr_smartsplit.errors import EdgeUnreachable
from tests.tasks import TASK


def test_without_a_cluster_an_edge_says_what_to_do() -> None:
    """Neither side starts or joins a cluster by itself."""
    edge = RayEdge(patience_seconds=0.0)
    with pytest.raises(EdgeUnreachable, match=r"no Ray cluster after 0 s.*ray\.init"):
        edge.start(TASK)
    with pytest.raises(EdgeUnreachable, match="belongs to no Ray cluster"):
        edge.connect("edge-1")
