"""Frozen values that every layer shares: routes, costs, plans and reports.

They stand apart so that deciding (``plan``) and carrying (``device``, ``edge``,
``server``, ``flower``) can talk to each other without knowing each other.
"""

from flwr_smartsplit.types.advice import Action, Advice, Cohort
from flwr_smartsplit.types.checkpointing import KEEP_ALL, RecomputePlan, Rerun
from flwr_smartsplit.types.codecs import RAW, codec_at
from flwr_smartsplit.types.constraints import NO_CONSTRAINTS, Constraints
from flwr_smartsplit.types.costs import (
    ChainProfile,
    StepBytes,
    UnitCost,
)
from flwr_smartsplit.types.devices import NO_TRAITS, DeviceTraits, EdgeProfile, Link
from flwr_smartsplit.types.micro_batches import WHOLE_BATCH, MicroBatch
from flwr_smartsplit.types.options import NO_WORK, RouteOption, Work
from flwr_smartsplit.types.plans import (
    Assignment,
    ClientPlan,
    DeviceProfile,
    RoundPlan,
)
from flwr_smartsplit.types.reports import (
    ClientReply,
    Expectation,
    Failure,
    Move,
    Receipt,
    Replan,
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
from flwr_smartsplit.types.variants import WHOLE, Variant

__all__ = [
    "DEVICE",
    "EDGE",
    "KEEP_ALL",
    "NO_CONSTRAINTS",
    "NO_TRAITS",
    "NO_WORK",
    "RAW",
    "WHOLE",
    "WHOLE_BATCH",
    "Action",
    "Advice",
    "Assignment",
    "ChainProfile",
    "ClientPlan",
    "ClientReply",
    "Cohort",
    "Constraints",
    "DeviceProfile",
    "DeviceTraits",
    "EdgeProfile",
    "Expectation",
    "Failure",
    "Leg",
    "Link",
    "MicroBatch",
    "Move",
    "Receipt",
    "RecomputePlan",
    "Replan",
    "Rerun",
    "RoundPlan",
    "Route",
    "RouteOption",
    "Status",
    "StepBytes",
    "StepReport",
    "TailExpectation",
    "UnitCost",
    "Variant",
    "Work",
    "codec_at",
]
