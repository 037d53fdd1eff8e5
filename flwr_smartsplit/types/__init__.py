"""Frozen values that every layer shares: routes, costs, plans and reports.

They stand apart so that deciding (``plan``) and carrying (``device``, ``edge``,
``server``, ``flower``) can talk to each other without knowing each other.
"""

from flwr_smartsplit.types.advice import Action as Action
from flwr_smartsplit.types.advice import Advice as Advice
from flwr_smartsplit.types.advice import Cohort as Cohort
from flwr_smartsplit.types.checkpointing import KEEP_ALL as KEEP_ALL
from flwr_smartsplit.types.checkpointing import RecomputePlan as RecomputePlan
from flwr_smartsplit.types.checkpointing import Rerun as Rerun
from flwr_smartsplit.types.codecs import RAW as RAW
from flwr_smartsplit.types.codecs import codec_at as codec_at
from flwr_smartsplit.types.constraints import NO_CONSTRAINTS as NO_CONSTRAINTS
from flwr_smartsplit.types.constraints import Constraints as Constraints
from flwr_smartsplit.types.costs import GATE as GATE
from flwr_smartsplit.types.costs import BatchKind as BatchKind
from flwr_smartsplit.types.costs import ChainProfile as ChainProfile
from flwr_smartsplit.types.costs import Shapes as Shapes
from flwr_smartsplit.types.costs import SharedTensor as SharedTensor
from flwr_smartsplit.types.costs import StepBytes as StepBytes
from flwr_smartsplit.types.costs import UnitCost as UnitCost
from flwr_smartsplit.types.devices import NO_TRAITS as NO_TRAITS
from flwr_smartsplit.types.devices import DeviceTraits as DeviceTraits
from flwr_smartsplit.types.devices import EdgeProfile as EdgeProfile
from flwr_smartsplit.types.devices import Link as Link
from flwr_smartsplit.types.micro_batches import WHOLE_BATCH as WHOLE_BATCH
from flwr_smartsplit.types.micro_batches import MicroBatch as MicroBatch
from flwr_smartsplit.types.options import NO_WORK as NO_WORK
from flwr_smartsplit.types.options import RouteOption as RouteOption
from flwr_smartsplit.types.options import Work as Work
from flwr_smartsplit.types.plans import Assignment as Assignment
from flwr_smartsplit.types.plans import ClientPlan as ClientPlan
from flwr_smartsplit.types.plans import DeviceProfile as DeviceProfile
from flwr_smartsplit.types.plans import RoundPlan as RoundPlan
from flwr_smartsplit.types.plans import Verify as Verify
from flwr_smartsplit.types.reports import RESERVED_METRICS as RESERVED_METRICS
from flwr_smartsplit.types.reports import ROW_FACTS as ROW_FACTS
from flwr_smartsplit.types.reports import ClientReply as ClientReply
from flwr_smartsplit.types.reports import Expectation as Expectation
from flwr_smartsplit.types.reports import Failure as Failure
from flwr_smartsplit.types.reports import Move as Move
from flwr_smartsplit.types.reports import Receipt as Receipt
from flwr_smartsplit.types.reports import Replan as Replan
from flwr_smartsplit.types.reports import Status as Status
from flwr_smartsplit.types.reports import StepReport as StepReport
from flwr_smartsplit.types.reports import TailExpectation as TailExpectation
from flwr_smartsplit.types.routes import DEVICE as DEVICE
from flwr_smartsplit.types.routes import EDGE as EDGE
from flwr_smartsplit.types.routes import Leg as Leg
from flwr_smartsplit.types.routes import Route as Route
from flwr_smartsplit.types.variants import WHOLE as WHOLE
from flwr_smartsplit.types.variants import Variant as Variant
