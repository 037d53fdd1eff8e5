"""Routes and recompute plans are read back from text as they were."""

import pytest

from flwr_smartsplit.types import RecomputePlan, Rerun, Route
from simulations.experiments.errors import ExperimentError
from simulations.report.plan_text import recompute_of, route_of


@pytest.mark.parametrize(
    "route",
    [
        Route.whole(),
        Route.split(3),
        Route.split(12, edge="edge-2"),
        Route.u_shape(2, 16),
        Route.hops((1, 2, 10), edges=("near", "mid way", "far")),
    ],
)
def test_a_route_is_read_back(route):
    assert route_of(str(route)) == route


@pytest.mark.parametrize(
    "plan",
    [
        RecomputePlan(),
        RecomputePlan((Rerun(0, 13),)),
        RecomputePlan((), (1, 22)),
        RecomputePlan((Rerun(0, 3), Rerun(4, 9, (Rerun(6, 8, (Rerun(6, 7),)),)))),
        RecomputePlan((Rerun(1, 5, (Rerun(1, 2), Rerun(3, 5, (Rerun(4, 5),)))),), (7,)),
    ],
)
def test_a_recompute_plan_is_read_back(plan):
    assert recompute_of(str(plan)) == plan


@pytest.mark.parametrize(
    "text", ["", "half", "device[:3]>edge[3:]", "device[:3] > edge"]
)
def test_what_is_no_route_is_refused(text):
    with pytest.raises(ExperimentError, match="no route"):
        route_of(text)


@pytest.mark.parametrize(
    "text", ["some", "[0:3", "[0:3]]", "[0:3] heavy 2", "selective"]
)
def test_what_is_no_recompute_plan_is_refused(text):
    with pytest.raises(ExperimentError, match="no recompute plan"):
        recompute_of(text)
