"""Train one shared model across devices too small to hold it, under Flower.

The names below are all of the public interface. They are loaded when they are first
used, so that importing the package brings in neither Ray nor Flower.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flwr_smartsplit.edge.hosts.ray import RayEdge
    from flwr_smartsplit.flower.client import SmartSplitNumPyClient
    from flwr_smartsplit.flower.client_app import build_client_app
    from flwr_smartsplit.flower.legacy_strategy import LegacySmartSplit
    from flwr_smartsplit.flower.observations import measured_seconds
    from flwr_smartsplit.flower.planning import Planning
    from flwr_smartsplit.flower.strategy import SmartSplit
    from flwr_smartsplit.memory.budget import MemoryBudget
    from flwr_smartsplit.memory.cap import memory_cap
    from flwr_smartsplit.plan.advisor import StragglerAdvisor
    from flwr_smartsplit.plan.checkpointing.peak_memory import predicted_peak_bytes
    from flwr_smartsplit.plan.checkpointing.plan import plan_recompute
    from flwr_smartsplit.plan.routes import (
        RouteRequest,
        deepest_split,
        deepest_u_shape,
        first_that_fits,
    )
    from flwr_smartsplit.plan.selection.selection import (
        Selection,
        SelectionRequest,
        select_at_random,
    )
    from flwr_smartsplit.plan.selection.utility import SelectByUtility
    from flwr_smartsplit.profile.profile import profile_chain
    from flwr_smartsplit.split.chain import Chain
    from flwr_smartsplit.split.segment import Unit
    from flwr_smartsplit.task import Task
    from flwr_smartsplit.train.fedprox import proximal
    from flwr_smartsplit.types import (
        Constraints,
        DeviceTraits,
        Link,
        RecomputePlan,
        Route,
    )

__all__ = [
    "Chain",
    "Constraints",
    "DeviceTraits",
    "LegacySmartSplit",
    "Link",
    "MemoryBudget",
    "Planning",
    "RayEdge",
    "RecomputePlan",
    "Route",
    "RouteRequest",
    "SelectByUtility",
    "Selection",
    "SelectionRequest",
    "SmartSplit",
    "SmartSplitNumPyClient",
    "StragglerAdvisor",
    "Task",
    "Unit",
    "build_client_app",
    "deepest_split",
    "deepest_u_shape",
    "first_that_fits",
    "measured_seconds",
    "memory_cap",
    "plan_recompute",
    "predicted_peak_bytes",
    "profile_chain",
    "proximal",
    "select_at_random",
]

_HOMES = {
    "Chain": "split.chain",
    "Constraints": "types",
    "DeviceTraits": "types",
    "LegacySmartSplit": "flower.legacy_strategy",
    "Link": "types",
    "MemoryBudget": "memory.budget",
    "Planning": "flower.planning",
    "RayEdge": "edge.hosts.ray",
    "RecomputePlan": "types",
    "Route": "types",
    "RouteRequest": "plan.routes",
    "SelectByUtility": "plan.selection.utility",
    "Selection": "plan.selection.selection",
    "SelectionRequest": "plan.selection.selection",
    "SmartSplit": "flower.strategy",
    "SmartSplitNumPyClient": "flower.client",
    "StragglerAdvisor": "plan.advisor",
    "Task": "task",
    "Unit": "split.segment",
    "build_client_app": "flower.client_app",
    "deepest_split": "plan.routes",
    "deepest_u_shape": "plan.routes",
    "first_that_fits": "plan.routes",
    "measured_seconds": "flower.observations",
    "memory_cap": "memory.cap",
    "plan_recompute": "plan.checkpointing.plan",
    "predicted_peak_bytes": "plan.checkpointing.peak_memory",
    "profile_chain": "profile.profile",
    "proximal": "train.fedprox",
    "select_at_random": "plan.selection.selection",
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
