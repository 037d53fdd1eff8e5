"""Predictions are the whole model's, whatever edges run in."""

from typing import Any

import pytest

from flwr_smartsplit import RayEdge, Route, Serving
from flwr_smartsplit.edge.hosts.local import LocalEdge
from tests.edge.hosts.served import ServedEdge
from tests.serve.whole import STATE, batch, difference, predictor, whole
from tests.tasks import TASK

ROUTES = (
    Route.split(2, edge="near"),
    Route.hops((3, 7), edges=("near", "far")),
    Route.u_shape(3, 7, edge="near"),
)
HOSTS = [
    LocalEdge,
    ServedEdge,
    pytest.param(RayEdge, marks=[pytest.mark.ray, pytest.mark.slow]),
]


@pytest.mark.parametrize("make", HOSTS, ids=["local", "grpc", "ray"])
def test_every_host_predicts(make: Any, request: pytest.FixtureRequest) -> None:
    """On one edge, on two in a row, and on one in the middle."""
    if make is RayEdge:
        request.getfixturevalue("ray_cluster")
    edges = make(name="near"), make(name="far")
    with Serving(TASK, STATE, edges) as serving:
        for route in ROUTES:
            with predictor(serving.offer(route, batch_size=4), *edges) as device:
                assert difference(device.predict(batch()), whole(batch())) == ""
