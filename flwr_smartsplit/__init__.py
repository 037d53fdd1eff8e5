"""Train one shared model across devices too small to hold it, under Flower.

The names below are the whole public interface. Each is loaded when it is first used, so
that importing the package loads neither Ray nor Flower.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from flwr_smartsplit.defence import Defence as Defence
    from flwr_smartsplit.edge.hosts.grpc import GrpcEdge as GrpcEdge
    from flwr_smartsplit.edge.hosts.ray import RayEdge as RayEdge
    from flwr_smartsplit.flower.asynchronous.strategy import (
        AsyncSmartSplit as AsyncSmartSplit,
    )
    from flwr_smartsplit.flower.checkpoints.checkpoints import (
        Checkpoints as Checkpoints,
    )
    from flwr_smartsplit.flower.client import (
        SmartSplitNumPyClient as SmartSplitNumPyClient,
    )
    from flwr_smartsplit.flower.client_app import build_client_app as build_client_app
    from flwr_smartsplit.flower.legacy_strategy import (
        LegacySmartSplit as LegacySmartSplit,
    )
    from flwr_smartsplit.flower.planning import Planning as Planning
    from flwr_smartsplit.flower.rounds.observations import (
        measured_seconds as measured_seconds,
    )
    from flwr_smartsplit.flower.strategy import SmartSplit as SmartSplit
    from flwr_smartsplit.gates import gated as gated
    from flwr_smartsplit.memory.budget import MemoryBudget as MemoryBudget
    from flwr_smartsplit.memory.cap import memory_cap as memory_cap
    from flwr_smartsplit.plan.advisor import StragglerAdvisor as StragglerAdvisor
    from flwr_smartsplit.plan.checkpointing.peak_memory import (
        predicted_peak_bytes as predicted_peak_bytes,
    )
    from flwr_smartsplit.plan.checkpointing.plan import plan_recompute as plan_recompute
    from flwr_smartsplit.plan.codec_choice import CodecRequest as CodecRequest
    from flwr_smartsplit.plan.codec_choice import codec_by_rate as codec_by_rate
    from flwr_smartsplit.plan.routes import RouteRequest as RouteRequest
    from flwr_smartsplit.plan.routes import cut_at_gate as cut_at_gate
    from flwr_smartsplit.plan.routes import deepest_split as deepest_split
    from flwr_smartsplit.plan.routes import deepest_u_shape as deepest_u_shape
    from flwr_smartsplit.plan.routes import first_that_fits as first_that_fits
    from flwr_smartsplit.plan.selection.selection import Selection as Selection
    from flwr_smartsplit.plan.selection.selection import (
        SelectionRequest as SelectionRequest,
    )
    from flwr_smartsplit.plan.selection.selection import (
        select_at_random as select_at_random,
    )
    from flwr_smartsplit.plan.selection.utility import (
        SelectByUtility as SelectByUtility,
    )
    from flwr_smartsplit.plan.variants.adaptive import AdaptiveWidths as AdaptiveWidths
    from flwr_smartsplit.plan.variants.deadline import DeadlineWidths as DeadlineWidths
    from flwr_smartsplit.plan.variants.movement import Movement as Movement
    from flwr_smartsplit.plan.variants.progressive import Progressive as Progressive
    from flwr_smartsplit.plan.variants.variants import ClientOutcome as ClientOutcome
    from flwr_smartsplit.plan.variants.variants import RoundOutcome as RoundOutcome
    from flwr_smartsplit.plan.variants.variants import VariantRequest as VariantRequest
    from flwr_smartsplit.plan.variants.variants import Whole as Whole
    from flwr_smartsplit.plan.variants.widths import Widths as Widths
    from flwr_smartsplit.profile.profile import profile_chain as profile_chain
    from flwr_smartsplit.serve.offer import Offer as Offer
    from flwr_smartsplit.serve.predictor import Prediction as Prediction
    from flwr_smartsplit.serve.predictor import Predictor as Predictor
    from flwr_smartsplit.serve.serving import Serving as Serving
    from flwr_smartsplit.server.gate_schedule import GatePhase as GatePhase
    from flwr_smartsplit.server.gate_schedule import PruneSchedule as PruneSchedule
    from flwr_smartsplit.server.hybrid import HybridFL as HybridFL
    from flwr_smartsplit.server.mixing.staleness import (
        DynamicStaleness as DynamicStaleness,
    )
    from flwr_smartsplit.server.mixing.staleness import (
        PolynomialStaleness as PolynomialStaleness,
    )
    from flwr_smartsplit.server.momentum import Momentum as Momentum
    from flwr_smartsplit.server.pruning.prune_at import HessianRate as HessianRate
    from flwr_smartsplit.server.pruning.prune_at import PruneAt as PruneAt
    from flwr_smartsplit.server.server_data import ServerData as ServerData
    from flwr_smartsplit.split.chain import Chain as Chain
    from flwr_smartsplit.split.narrow.grown import grown as grown
    from flwr_smartsplit.split.narrow.narrowed import narrowed as narrowed
    from flwr_smartsplit.split.segment import Unit as Unit
    from flwr_smartsplit.task import Task as Task
    from flwr_smartsplit.train.fedprox import proximal as proximal
    from flwr_smartsplit.types import BFloat16 as BFloat16
    from flwr_smartsplit.types import Constraints as Constraints
    from flwr_smartsplit.types import DeviceTraits as DeviceTraits
    from flwr_smartsplit.types import Float16 as Float16
    from flwr_smartsplit.types import Integer as Integer
    from flwr_smartsplit.types import Link as Link
    from flwr_smartsplit.types import Packed as Packed
    from flwr_smartsplit.types import Raw as Raw
    from flwr_smartsplit.types import RecomputePlan as RecomputePlan
    from flwr_smartsplit.types import Route as Route
    from flwr_smartsplit.types import TopK as TopK
    from flwr_smartsplit.types import Variant as Variant
    from flwr_smartsplit.verify.crossed import with_crossing as with_crossing

_NAMES_BY_MODULE = {
    "defence": "Defence",
    "edge.hosts.grpc": "GrpcEdge",
    "edge.hosts.ray": "RayEdge",
    "flower.asynchronous.strategy": "AsyncSmartSplit",
    "flower.checkpoints.checkpoints": "Checkpoints",
    "flower.client": "SmartSplitNumPyClient",
    "flower.client_app": "build_client_app",
    "flower.legacy_strategy": "LegacySmartSplit",
    "flower.rounds.observations": "measured_seconds",
    "flower.planning": "Planning",
    "flower.strategy": "SmartSplit",
    "gates": "gated",
    "memory.budget": "MemoryBudget",
    "memory.cap": "memory_cap",
    "plan.advisor": "StragglerAdvisor",
    "plan.checkpointing.peak_memory": "predicted_peak_bytes",
    "plan.checkpointing.plan": "plan_recompute",
    "plan.codec_choice": "CodecRequest codec_by_rate",
    "plan.routes": (
        "RouteRequest cut_at_gate deepest_split deepest_u_shape first_that_fits"
    ),
    "plan.selection.selection": "Selection SelectionRequest select_at_random",
    "plan.selection.utility": "SelectByUtility",
    "plan.variants.movement": "Movement",
    "plan.variants.progressive": "Progressive",
    "plan.variants.variants": "ClientOutcome RoundOutcome VariantRequest Whole",
    "plan.variants.adaptive": "AdaptiveWidths",
    "plan.variants.deadline": "DeadlineWidths",
    "plan.variants.widths": "Widths",
    "profile.profile": "profile_chain",
    "serve.offer": "Offer",
    "serve.predictor": "Prediction Predictor",
    "serve.serving": "Serving",
    "server.gate_schedule": "GatePhase PruneSchedule",
    "server.hybrid": "HybridFL",
    "server.mixing.staleness": "DynamicStaleness PolynomialStaleness",
    "server.momentum": "Momentum",
    "server.pruning.prune_at": "HessianRate PruneAt",
    "server.server_data": "ServerData",
    "split.chain": "Chain",
    "split.narrow.grown": "grown",
    "split.narrow.narrowed": "narrowed",
    "split.segment": "Unit",
    "task": "Task",
    "train.fedprox": "proximal",
    "types": "BFloat16 Constraints DeviceTraits Float16 Integer Link Packed Raw "
    "RecomputePlan Route TopK Variant",
    "verify.crossed": "with_crossing",
}
_MODULES = {
    name: module for module, names in _NAMES_BY_MODULE.items() for name in names.split()
}
__all__ = sorted(_MODULES)  # noqa: PLE0605 - mypy reads the imports above


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used."""
    if name == "__version__":
        return version("flwr-smartsplit")  # What is installed; it stands in one place.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
