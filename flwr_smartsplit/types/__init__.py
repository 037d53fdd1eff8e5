"""Frozen values that every layer shares: routes, costs, plans and reports.

They stand apart so that deciding (``policy``) and carrying (``runtime``,
``flower``) can talk to each other without knowing each other.
"""

from flwr_smartsplit.types.costs import (
    ChainProfile,
    StepBytes,
    UnitCost,
)
from flwr_smartsplit.types.devices import NO_TRAITS, DeviceTraits, EdgeProfile, Link
from flwr_smartsplit.types.recompute import KEEP_ALL, RecomputePlan, Rerun
from flwr_smartsplit.types.refining import Advice, Cohort, Wish
from flwr_smartsplit.types.rounds import (
    Assignment,
    ClientPlan,
    ClientReply,
    DeviceProfile,
    Expectation,
    Failure,
    Move,
    Receipt,
    Replan,
    RoundPlan,
    Status,
    StepReport,
    TailExpectation,
)
from flwr_smartsplit.types.routes import (
    DEVICE,
    EDGE,
    Leg,
    Route,
)

__all__ = [
    "DEVICE",
    "EDGE",
    "KEEP_ALL",
    "NO_TRAITS",
    "Advice",
    "Assignment",
    "ChainProfile",
    "ClientPlan",
    "ClientReply",
    "Cohort",
    "DeviceProfile",
    "DeviceTraits",
    "EdgeProfile",
    "Expectation",
    "Failure",
    "Leg",
    "Link",
    "Move",
    "Receipt",
    "RecomputePlan",
    "Replan",
    "Rerun",
    "RoundPlan",
    "Route",
    "Status",
    "StepBytes",
    "StepReport",
    "TailExpectation",
    "UnitCost",
    "Wish",
]
